"""Mistakes in what a job is given: each ends in one clear error with the right exit code.

A message must name the file, the key or cell, the value and what was allowed. What happens to an
output that does not fit the job is the subject of `test_bad_outputs`.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_calls import AVATARS, CHECKPOINT, CommandLine
from safetensors.torch import load_file, save_file

from jobs.errors import InputError
from jobs.job_file import load_job
from jobs.plan import job_generator

# Unlike `python -m jobs` it does not find the working directory on Python's path.
CONSOLE_SCRIPT = [str(Path(sys.executable).parent / "zimage")]
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"

JOB_FILES = {
    "yaml syntax": ("name: [t\nmodel: 1\n", ["job.yaml: line 2, column 6"]),
    "unknown key": ("seeds: 7\n", ["job.yaml: seeds: unknown key", "allowed: name, model"]),
    "empty file": ("", ["job.yaml: empty"]),
}


@pytest.mark.parametrize("case", JOB_FILES)
def test_job_file(zimage: CommandLine, case: str) -> None:
    text, words = JOB_FILES[case]
    good = (zimage.folder / "job.yaml").read_text()
    zimage.write("job.yaml", good + text if case == "unknown key" else text)
    for command in (["run", "job.yaml", "--local"], ["plan", "job.yaml"]):
        ended = zimage(*command, code=2)
        assert ended.err.startswith(f"zimage {command[0]}: ")
        assert all(word in ended.err for word in words), ended.err


def test_missing_job_file(zimage: CommandLine) -> None:
    ended = zimage("run", "nope.yaml", "--local", code=2)
    assert ended.err.startswith("zimage run: nope.yaml: no such file; shipped: jobs/avatars.yaml")


SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "wrong type": (
        ["sampling.num_inference_steps=many"],
        ["--set: sampling.num_inference_steps: value 'many'", "allowed: a whole number, 1 or more"],
    ),
    "odd size": (
        ["sampling.width=1000", "sampling.height=1000"],
        ["sampling.width: value 1000", "sampling.height: value 1000", "nearest: 992 or 1008"],
    ),
    "unknown scheme": (["output.uri=ftp://x/y"], ["'ftp://x/y'", "allowed: a path, s3://"]),
    "loras": (
        ["model.loras={ink: {path: ink.safetensors}}"],
        ["--set: model.loras.ink.path: ", "/ink.safetensors: no such file"],
    ),
    "unknown generator": (
        ["prompts.generator=avatar"],
        ["--set: prompts.generator: no generator 'avatar'", "allowed: avatars, food, gaming"],
    ),
    "unknown option": (
        ["prompts.options={colour: red}"],
        ["prompts.generator: generator 'avatars' has no option 'colour' (allowed: "],
    ),
    "no count": (
        ["prompts.count=null"],
        ["--set: prompts.count: null: generator 'avatars' is endless; allowed: a whole number"],
    ),
    "missing profiles": (
        ["prompts.profiles=nope.xlsx"],
        ["--set: prompts.profiles: ", "nope.xlsx: no such file"],
    ),
    "wrong sheet": (
        [f"prompts.profiles={AVATARS}", "prompts.sheet=Guests"],
        ["avatars.xlsx, sheet 'Guests': no such sheet (allowed: 'people', 'staff', 'README')"],
    ),
    "missing column": (
        ["prompts.generator=table", f"prompts.profiles={AVATARS}"],
        ["avatars.xlsx, sheet 'people', column 'prompt': no such column", "(allowed: 'id', "],
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_setting(zimage: CommandLine, case: str) -> None:
    sets, words = SETTINGS[case]
    flags = [part for assignment in sets for part in ("--set", assignment)]
    for command in (["run", "job.yaml", "--local"], ["plan", "job.yaml"]):
        ended = zimage(*command, *flags, code=2)
        assert all(word in ended.err for word in words), ended.err
    assert not (zimage.folder / "out").exists()


TABLES = {
    "empty": ("", "people.csv: the file is empty: a header and at least one row are needed"),
    "header only": ("id,age\n", "people.csv: no rows below the header"),
    "ids twice": ("id,age\na,30\na,31\n", "people.csv, row 3, column 'id'"),
    "ragged": ("id,age\na,30,x\n", "people.csv, row 2"),
    "under age": (
        "id,age\na,30\nb,17\n",
        "people.csv, row 3, column 'age': not a whole number in range, got 17 (allowed: 18 to 120)",
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_table(zimage: CommandLine, case: str) -> None:
    text, words = TABLES[case]
    zimage.write("people.csv", text)
    ended = zimage.run("--set", "prompts.profiles=people.csv", code=2)
    assert ended.err.startswith("zimage run: --set: prompts.profiles: ")
    assert words in ended.err


def test_under_age_profile_in_a_workbook_names_its_cell(zimage: CommandLine) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.title = "team"
    for row in (["id", "age"], ["a", 44], ["b", 12]):
        book.active.append(row)
    book.save(zimage.folder / "people.xlsx")
    ended = zimage.run("--set", "prompts.profiles=people.xlsx", code=2)
    assert "people.xlsx, sheet 'team', row 3, column 'age'" in ended.err
    assert "got 12 (allowed: 18 to 120)" in ended.err


def test_more_prompts_than_the_table_has(zimage: CommandLine) -> None:
    zimage.write("p.csv", "prompt\nA cat\nA dog\nA fox\n")
    table = ["--set", "prompts.generator=table", "--set", "prompts.profiles=p.csv"]
    ended = zimage.run(*table, code=2)
    assert "job.yaml: prompts.count: 8: generator 'table' has 3 prompts" in ended.err
    assert "allowed: 1 to 3, or null for all" in ended.err
    ended = zimage.run(*table, "--count", 2, "--start", 3, code=2)
    assert (
        "--start: prompts.start: 3: generator 'table' has 3 prompts; allowed: 0 to 2" in ended.err
    )


FLAGS = {
    "limit 0": (["run", "job.yaml", "--limit", "0"], "--limit: value '0': allowed: a whole"),
    "limit x": (["run", "job.yaml", "--limit", "x"], "--limit: value 'x': allowed: a whole"),
    "workers": (["run", "job.yaml", "--workers", "some"], "--workers: run.workers: value 'some'"),
    "device": (["plan", "job.yaml", "--device", "gtx9"], "--device: 'gtx9': unknown; allowed"),
    "command": (["paint"], "invalid choice: 'paint'"),
    "no output": (["status", "nothing"], "nothing: no such folder; allowed: the output of a job"),
    "not an output": (["verify", "."], ".: has no job.json; allowed: the output of a job"),
    "no address": (["submit", "job.yaml", "--output", "/out"], "give --address http://HEAD:8265"),
    "relative output": (
        ["submit", "job.yaml", "--address", "http://127.0.0.1:9"],
        "job.yaml: output.uri: value 'out': relative to Ray's copy of the working directory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FLAGS)
def test_flag(zimage: CommandLine, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    arguments, words = FLAGS[case]
    assert words in zimage(*arguments, code=2).err


GENERATE = {
    "size": (["--width", "1000"], 2, "--width: 1000: not divisible by 16; nearest: 992 or 1008"),
    "suffix": (["-o", "x.gif"], 2, "--output: x.gif: allowed: .png, .jpg, .jpeg, .webp"),
    "folder": (["-o", "no/x.png"], 2, "--output: no/x.png: no such folder: no"),
    "seed": (["--seed", "-1"], 2, "--seed: value '-1': allowed: a whole number, 0 or more"),
    "model": (["--model", "nope"], 5, "--model: nope: no such folder; allowed: a checkpoint"),
    "not a model": (["--model", "."], 5, "model_index.json"),
    "backend": (["--attention", "flash"], 2, "--attention: attention backend 'flash' cannot run"),
    "lora": (["--lora", "x.safetensors"], 2, "--lora: x.safetensors: no such file"),
    "lora scale": (["--lora-scale", "1"], 2, "--lora-scale: 1: no --lora is given"),
    "init image": (["--init-image", "x.png"], 2, "--init-image: x.png: no such file"),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate(zimage: CommandLine, case: str) -> None:
    arguments, code, words = GENERATE[case]
    known = ["--model", CHECKPOINT, "--prompt", "A cat", "--steps", 1, "--height", 32]
    known += ["--width", 32, "-o", "x.png"]
    ended = zimage("generate", *known, *arguments, code=code)
    assert words in ended.err
    assert not list(zimage.folder.glob("**/*.png"))


# Checkpoints.


def _without_tensor(folder: Path) -> None:
    tensors = load_file(folder / TRANSFORMER)
    del tensors["x_pad_token"]
    save_file(tensors, folder / TRANSFORMER)


def _misshaped(folder: Path) -> None:
    tensors = load_file(folder / TRANSFORMER)
    tensors["x_pad_token"] = tensors["x_pad_token"].repeat(2, 1)
    save_file(tensors, folder / TRANSFORMER)


def _truncated(folder: Path) -> None:
    content = (folder / TRANSFORMER).read_bytes()
    (folder / TRANSFORMER).write_bytes(content[:-1000])


def _pickled(folder: Path) -> None:
    (folder / TRANSFORMER).rename(folder / "transformer/diffusion_pytorch_model.bin")


def _without_config(folder: Path) -> None:
    (folder / "transformer/config.json").unlink()


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing tensor": (_without_tensor, [TRANSFORMER, "missing tensor 'x_pad_token'"]),
    "misshaped tensor": (
        _misshaped,
        [TRANSFORMER, "'x_pad_token' has shape [2, ", "asks for [1, "],
    ),
    "truncated": (_truncated, [TRANSFORMER, "is truncated"]),
    "pickle": (_pickled, ["diffusion_pytorch_model.bin: is a pickle", "must be safetensors"]),
    "no config": (_without_config, ["transformer/config.json: file is missing"]),
    "no folder": (shutil.rmtree, ["ckpt: no such"]),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint(zimage: CommandLine, case: str) -> None:
    damage, words = CHECKPOINTS[case]
    folder = zimage.folder / "ckpt"
    shutil.copytree(CHECKPOINT, folder)
    damage(folder)
    for command in (["plan", "job.yaml"], ["run", "job.yaml", "--local"]):
        ended = zimage(*command, "--set", "model.path=ckpt", code=5)
        assert "model.path: " in ended.err
        assert all(word in ended.err for word in words), ended.err
    # what could not be loaded does not hold the output to itself
    zimage.run("--count", 1, code=0)


@pytest.mark.parametrize("backend", ["flash", "_flash_3"])
def test_backend_that_cannot_run_here(zimage: CommandLine, backend: str) -> None:
    ended = zimage.run("--set", f"model.attention={backend}", code=2)
    assert f"model.attention: attention backend {backend!r} cannot run here" in ended.err
    assert "is not installed; 'native' runs everywhere" in ended.err
    assert not (zimage.folder / "out/images").exists()
    zimage.run("--count", 1, code=0)  # the first try does not spoil the output


# Generators of one's own.

MODULES = {
    "not there": ("", "nowhere:Mine", "importing 'nowhere' failed with ModuleNotFoundError"),
    "no class": ("", "mine:Mine", "module 'mine' has no 'Mine'"),
    "no method": ("class Mine: 0", "mine:Mine", "not a class with a method generate_prompt(index)"),
    "syntax": ("def (:", "mine:Mine", "importing 'mine' failed with SyntaxError"),
    "script": ("raise SystemExit(7)", "mine:Mine", "importing 'mine' failed with SystemExit: 7"),
    "constructor": (
        "class Mine:\n    def __init__(self): 1 / 0\n    def generate_prompt(self, index): ...",
        "mine:Mine",
        "its constructor raised ZeroDivisionError: division by zero",
    ),
    "length": (
        "class Mine:\n    __len__ = lambda self: 'x'\n    def generate_prompt(self, index): ...",
        "mine:Mine",
        "Mine.__len__ must give an int of 0 or more, or None where endless, got 'x'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODULES)
def test_generator_module(zimage: CommandLine, case: str) -> None:
    source, name, words = MODULES[case]
    zimage.write("mine.py", source)
    ended = zimage.run("--set", f"prompts.generator={name}", code=2)
    assert ended.err.startswith("zimage run: --set: prompts.generator: ")
    assert words in ended.err


ROWS = {
    "raises": ("raise KeyError('age')", "generate_prompt(2) raised KeyError: 'age'"),
    "exits": ("raise SystemExit(1)", "generate_prompt(2) raised SystemExit: 1"),
    "not a prompt": ("return 5", "must give a Prompt or a str, got 5"),
    "blank": ("return ' '", "Prompt.text must be text that is not blank, got ' '"),
    "size": (
        "return Prompt('A cat', width=1000)",
        "generate_prompt(2): width 1000: not divisible by 16; nearest: 992 or 1008",
    ),
    "lora": ("return Prompt('A cat', loras=('ink',))", "LoRA 'ink' is not declared in model.loras"),
    "image": ("return Prompt('A cat', images=('a.png',))", "the job has no prompts.images_root"),
    "surrogate": ("return 'A cat \\ud83d'", "Prompt.text holds a lone surrogate"),
    "message": ("raise ValueError('\\ud83d')", "generate_prompt(2) raised ValueError: ?"),
}


@pytest.mark.parametrize("case", ROWS)
def test_one_bad_prompt_is_one_failed_row(zimage: CommandLine, case: str) -> None:
    body, words = ROWS[case]
    name = zimage.write_generator(f"if index == 2: {body}\n        return f'A cat, {{index}}'")
    ended = zimage.run("--set", f"prompts.generator={name}", "--count", 4, code=3)
    assert "3 of 4 images" in ended.err and "1 failed row" in ended.err
    failed = [row for row in zimage.rows() if row["status"] == "failed"]
    assert [(row["index"], row["error_type"]) for row in failed] == [(2, "prompt_error")]
    assert words in failed[0]["error_message"]


def test_generator_that_fails_at_one_index_and_is_mended(zimage: CommandLine) -> None:
    body = "if index == 7: raise KeyError('age')\n        return f'A cat, {index}'"
    name = ["--set", f"prompts.generator={zimage.write_generator(body)}", "--count", 12]
    ended = zimage.run(*name, code=3)
    assert "sample 7: prompt_error: generate_prompt(7) raised KeyError: 'age'" in ended.err
    first = zimage.rows()
    assert [row["index"] for row in first if row["status"] == "failed"] == [7]
    assert all((zimage.folder / "out" / r["file_name"]).is_file() for r in first if r["index"] != 7)

    ended = zimage.run(*name, code=3)
    assert "11 images kept, 1 failed row left as is (--retry-failed makes it again)" in ended.err
    assert zimage.rows() == first  # nothing was made
    assert zimage("status", "out", code=0).out.splitlines()[-1].endswith("--retry-failed")

    zimage.write_generator("return f'A cat, {index}'")
    ended = zimage.run(*name, "--retry-failed", code=0)
    assert "1 failed row to make again" in ended.err
    rows = zimage.rows()
    assert rows[7]["status"] == "ok" and rows[7]["revision"] == 1
    assert rows[:7] + rows[8:] == first[:7] + first[8:]


def test_too_many_failures_stop_the_job(zimage: CommandLine) -> None:
    body = "if index % 3: raise ValueError('no face')\n        return f'A cat, {index}'"
    name = ["--set", f"prompts.generator={zimage.write_generator(body)}", "--count", 60]
    ended = zimage.run(*name, code=4)
    assert "13 of 20 samples failed, more than run.max_failure_rate 0.5 allows" in ended.err
    rows = zimage.rows()
    assert len(rows) < 60
    report = zimage("status", "out", code=0).out
    failed = sum(row["status"] == "failed" for row in rows)
    assert f"{len(rows) - failed} ok, {failed} failed, {60 - len(rows)} left of 60" in report
    assert "stopped" in report
    zimage("verify", "out", code=0)
    # the cause is mended: everything is made in the end
    zimage.write_generator("return f'A cat, {index}'")
    zimage.run(*name, "--retry-failed", code=0)
    assert [row["status"] for row in zimage.rows()] == ["ok"] * 60


def test_a_worker_finds_the_drivers_modules_from_elsewhere(
    zimage: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = zimage.write_generator("return f'A cat, {index}'", "dogs")
    config = load_job("job.yaml", sets=[f"prompts.generator={name}"])
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(InputError, match="No module named 'dogs'"):
        job_generator(config)
    assert job_generator(config, str(zimage.folder)).generate_prompt(3) == "A cat, 3"


# In processes of their own, as a shell starts them.


@pytest.mark.long
def test_generator_class_in_the_working_directory(zimage: CommandLine) -> None:
    name = zimage.write_generator("return f'A cat, {index}'", "cats")
    flags = ["--local", "--count", 2, "--set", f"prompts.generator={name}"]
    zimage.process("run", "job.yaml", *flags, code=0, program=CONSOLE_SCRIPT)
    assert [row["prompt"] for row in zimage.rows()] == ["A cat, 0", "A cat, 1"]


@pytest.mark.long
def test_a_process_ends_without_a_traceback(zimage: CommandLine) -> None:
    ended = zimage.process("run", "job.yaml", "--set", "sampling.width=1000", code=2)
    assert ended.err.count("\n") == 1
    ended = zimage.process("run", "job.yaml", "--local", "--set", "model.path=nope", code=5)
    assert "zimage run: model.path: " in ended.err


@pytest.mark.ray
@pytest.mark.slow
def test_generator_class_in_the_working_directory_on_ray(zimage: CommandLine) -> None:
    name = zimage.write_generator("return f'A cat, {index}'", "cats")
    flags = ["--count", 2, "--workers", 1, "--set", f"prompts.generator={name}"]
    zimage.process("run", "job.yaml", *flags, code=0, program=CONSOLE_SCRIPT)
    assert [row["prompt"] for row in zimage.rows()] == ["A cat, 0", "A cat, 1"]
