"""Reading a job: what wins, where paths lead, and what each mistake is told."""

import os
import pickle
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import EXIT_INPUT
from jobs.job_file import JobFileError, load_job, read_job

BODY = "name: a\nmodel: {path: ckpt}\nprompts: {generator: avatars}\noutput: {uri: out}\n"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes a file below the working directory of the test."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "job.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return Path(name)

    return write


def problems(*args: Any, **kwargs: Any) -> tuple[str, ...]:
    with pytest.raises(JobFileError) as caught:
        load_job(*args, **kwargs)
    assert caught.value.exit_code == EXIT_INPUT
    return caught.value.problems


# --- precedence ---------------------------------------------------------------------------------

SOURCES = ("extends", "file", "overlay-extends", "overlay", "overlay-2", "set", "set-2", "flag")


@pytest.mark.parametrize("given", [*combinations(SOURCES, 2), SOURCES])
def test_the_later_source_wins(write: Write, given: tuple[str, ...]) -> None:
    count = {source: number for number, source in enumerate(SOURCES, start=1)}

    def line(source: str) -> str:
        return f"prompts: {{count: {count[source]}}}\n" if source in given else "{}\n"

    write(line("extends"), "base.yaml")
    job = "extends: ./base.yaml\nname: a\nmodel: {path: c}\noutput: {uri: o}\n"
    inner = f", count: {count['file']}" if "file" in given else ""
    path = write(job + f"prompts: {{generator: avatars{inner}}}\n")
    write(line("overlay-extends"), "over-base.yaml")
    overlay = "extends: over-base.yaml\n" + (line("overlay") if "overlay" in given else "")
    overlays = [write(overlay, "over.yaml"), write(line("overlay-2"), "over2.yaml")]
    config = load_job(
        path,
        overlays=overlays,
        sets=[f"prompts.count={count[source]}" for source in ("set", "set-2") if source in given],
        flags={"prompts.count": count["flag"] if "flag" in given else None},
    )
    assert config.prompts.count == count[given[-1]]


def test_mappings_merge_deeply_and_anything_else_replaces(write: Write) -> None:
    write(
        "prompts: {options: {keep: 1, both: {x: 1, y: [1, 2]}, gone: 3}}\n"
        "model: {revision: main, loras: {ink: {path: ink.safetensors, scale: 0.5}}}\n",
        "base/base.yaml",
    )
    path = write(
        "extends: base/base.yaml\n"
        + BODY.replace("{path: ckpt}", "{path: ckpt, revision: null, loras: {ink: {scale: 2}}}")
    )
    config = load_job(path, sets=["prompts.options.both.y=[9]", "prompts.options.gone=null"])
    assert config.prompts.options == {"keep": 1, "both": {"x": 1, "y": [9]}, "gone": None}
    assert config.model.revision is None
    assert config.model.loras["ink"].scale == 2.0
    assert config.model.loras["ink"].path == Path.cwd() / "base" / "ink.safetensors"
    assert load_job(path, sets=["model.loras=null"]).model.loras == {}


def test_presets_extend_by_name_and_files_are_listed_in_order(write: Write) -> None:
    middle = write("extends: z-image\nsampling: {seed: 7}\n", "middle.yaml")
    path = write("extends: ./middle.yaml\n" + BODY)
    overlay = write("{}", "over.yaml")
    config = load_job(path, overlays=[overlay])
    assert (config.sampling.num_inference_steps, config.sampling.guidance_scale) == (50, 4.0)
    assert config.sampling.seed == 7
    assert [file.name for file in config.files] == [
        "z-image.yaml",
        "middle.yaml",
        "job.yaml",
        "over.yaml",
    ]
    assert all(file.is_absolute() for file in config.files)
    assert config.source == path.absolute()
    assert middle.absolute() in config.files


def test_set_values_are_yaml(write: Write) -> None:
    config = load_job(
        write(BODY),
        sets=[
            "run.workers=2",
            "model.compile=false",
            "prompts.sheet='2024'",
            "sampling.negative_prompt=''",
            "prompts.options={seed: 3, words: [a, b]}",
            "output.uri=s3://bucket/a=b",
        ],
    )
    assert config.run.workers == 2
    assert config.model.compile is False
    assert config.prompts.sheet == "2024"
    assert config.prompts.options == {"seed": 3, "words": ["a", "b"]}
    assert config.output.uri == "s3://bucket/a=b"


# --- paths --------------------------------------------------------------------------------------


def test_input_paths_are_relative_to_the_file_that_writes_them(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("model: {path: ../ckpt}\nprompts: {images_root: pics}\n", "presets/p.yaml")
    path = write(
        "extends: ../presets/p.yaml\nname: a\noutput: {uri: out/x}\n"
        "prompts: {generator: avatars, profiles: ../data/p.csv}\n",
        "jobs/a.yaml",
    )
    config = load_job(path)
    assert config.model.path == tmp_path / "ckpt"
    assert config.prompts.images_root == tmp_path / "presets" / "pics"
    assert config.prompts.profiles == tmp_path / "data" / "p.csv"
    assert config.output.uri == "out/x"  # as written: relative to the working directory

    monkeypatch.chdir(tmp_path / "jobs")
    config = load_job("a.yaml", sets=["prompts.profiles=mine.csv"])
    assert config.prompts.profiles == tmp_path / "jobs" / "mine.csv"
    assert config.model.path == tmp_path / "ckpt"


def test_tilde_is_the_home_folder(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    path = write(BODY.replace("path: ckpt", "path: ~/ckpt").replace("uri: out", "uri: ~/out"))
    config = load_job(path)
    assert config.model.path == Path("/home/someone/ckpt")
    assert config.output.uri == "/home/someone/out"
    (line,) = problems(path, sets=["model.path=~nobody-of-that-name/x"])
    assert line.startswith("--set: model.path: value '~nobody-of-that-name/x': no such user")


def test_absolute_paths_stay_and_a_links_folder_counts_as_written(
    write: Write, tmp_path: Path
) -> None:
    write(BODY, "real/job.yaml")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert load_job("link/job.yaml").model.path == tmp_path / "link" / "ckpt"
    assert load_job("link/job.yaml", sets=["model.path=/m"]).model.path == Path("/m")


def test_layers_keep_paths_as_they_were_written(write: Write) -> None:
    path = write(BODY.replace("avatars", "avatars, profiles: /abs/p.csv"))
    _, layers = read_job(path, sets=["model.path=x/y"])
    assert layers.paths[("prompts", "profiles")].text == "/abs/p.csv"
    written = layers.paths[("model", "path")]
    assert (written.text, written.path, written.origin.label) == (
        "x/y",
        Path.cwd() / "x" / "y",
        "--set",
    )


# --- Ray cluster files --------------------------------------------------------------------------

CLUSTER = "cluster_name: c\nprovider: {type: local}\n"


def test_cluster_file_carries_its_job_inline(write: Write, tmp_path: Path) -> None:
    inline = "".join(f"    {line}\n" for line in BODY.splitlines())
    path = write(CLUSTER + "metadata:\n  job:\n" + inline, "home/ray_bootstrap_config.yaml")
    config = load_job(path)
    assert config.name == "a"
    assert config.model.path == tmp_path / "home" / "ckpt"
    assert config.source == path.absolute()
    (line,) = problems(path, overlays=[write("run: {workers: 0}", "o.yaml")])
    assert line.startswith("o.yaml: run.workers: value 0: ")
    broken = write(CLUSTER + "metadata: {job: {extends: z-image, nam: x}}\n", "b.yaml")
    lines = problems(broken)
    assert lines[0].startswith("b.yaml: metadata.job.name: missing")
    assert any(line.startswith("b.yaml: metadata.job.nam: unknown key") for line in lines)


def test_cluster_file_names_its_job(write: Write, tmp_path: Path) -> None:
    write(BODY, "jobs/a.yaml")
    path = write(CLUSTER + "metadata: {job: ../jobs/a.yaml}\n", "clusters/c.yaml")
    config = load_job(path)
    assert config.model.path == tmp_path / "jobs" / "ckpt"
    assert [file.name for file in config.files] == ["c.yaml", "a.yaml"]
    itself = write(CLUSTER + "metadata: {job: self.yaml}\n", "self.yaml")
    (line,) = problems(itself)
    assert "a circle: self.yaml -> self.yaml" in line


@pytest.mark.parametrize(
    "metadata", ["", "metadata: {}\n", "metadata: {job: 3}\n", "metadata: x\n"]
)
def test_cluster_file_without_a_job_says_where_it_belongs(write: Write, metadata: str) -> None:
    (line,) = problems(write(CLUSTER + metadata))
    assert line.startswith("job.yaml: metadata.job: ")
    assert "the job itself as a mapping, or the path of a job file" in line


# --- every mistake has its own words ------------------------------------------------------------

UNREADABLE: dict[str, tuple[str | bytes, list[str]]] = {
    "empty": ("", ["job.yaml: empty", "mapping"]),
    "only a comment": ("# hello\n", ["job.yaml: empty"]),
    "a list": ("- a\n- b\n", ["job.yaml: a list, where a mapping"]),
    "text": ("hello", ["job.yaml: text, where a mapping"]),
    "syntax": ("name: a\nmodel: {path: x\nrun: 1\n", ["job.yaml: line 3, column"]),
    "tab": ("name: a\nmodel:\n\tpath: x\n", ["job.yaml: line 3, column 1", "token"]),
    "repeated key": (BODY + "name: b\n", ["line 5, column 1", "'name' is given twice", "line 1"]),
    "repeated nested": ("model: {path: a, path: b}\n", ["line 1, column 18", "'path' is given"]),
    "quoted repeat": ("name: a\n'name': b\n", ["'name' is given twice"]),
    "not utf-8": (b"name: a\nx: caf\xe9\n", ["job.yaml: line 2, column 7", "0xe9", "UTF-8"]),
    "utf-16": (BODY.encode("utf-16"), ["job.yaml: line 1, column 1", "UTF-8"]),
    "control character": ("name: a\nx: '\x07'\n", ["job.yaml: line 2, column 5", "U+0007"]),
    "too large": (b"#" * 1_000_001, ["job.yaml: over 1 MB"]),
    "two documents": (BODY + "---\nname: b\n", ["line 5", "document"]),
    "python tag": ("name: !!python/object/apply:os.getcwd []\n", ["line 1, column 7", "tag"]),
    "impossible date": ("name: 2024-13-45\n", ["line 1, column 7", "2024-13-45", "quote it"]),
    "empty integer": ("name: !!int ''\n", ["line 1, column 7", "does not fit int"]),
    "number as key": (BODY + "prompts2: {1: x}\n", ["key 1 is a whole number", "quote it"]),
    "boolean as key": (BODY + "on: x\n", ["key true is a boolean", "quote it"]),
    "unhashable key": ("{[a]: b}\n", ["line 1, column 2"]),
    "nested too deeply": (
        "a: " + "[" * 20_000,
        ["job.yaml: line 1, column 104: nested too deeply"],
    ),
    "own alias": ("a: &x [*x]\n", ["line 1", "alias inside of itself"]),
    "unknown alias": ("a: *x\n", ["line 1, column 4", "alias"]),
    "bomb": (
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)),
        ["line 5", "more than 100000 values"],
    ),
    "merge bomb": (
        "a0: &a0 {k0: 1, k1: 2}\n"
        + "".join(
            f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], x: 1}}\n" for n in range(1, 12)
        ),
        ["more than 100000 values"],
    ),
    "unknown preset": (
        "extends: z-image-turb\n" + BODY,
        [
            "job.yaml: extends: value 'z-image-turb'",
            "no such preset",
            "z-image-turbo, ./",
            "z-image",
        ],
    ),
    "extends a list": ("extends: [z-image]\n" + BODY, ["job.yaml: extends", "a list does not"]),
    "extends nothing": ("extends:\n" + BODY, ["job.yaml: extends: value null"]),
    "extends a missing file": ("extends: ./none.yaml\n" + BODY, ["none.yaml: no such file"]),
    "extends itself": ("extends: ./job.yaml\n" + BODY, ["a circle: job.yaml -> job.yaml"]),
    "extends a folder": ("extends: ./\n" + BODY, ["a folder, not a file"]),
}
UNREADABLE["unknown preset"][1][2] = "z-image-edit, z-image-tiny, z-image-tiny-edit, z-image-turbo"


@pytest.mark.parametrize("case", list(UNREADABLE))
def test_unreadable_files(write: Write, case: str) -> None:
    text, words = UNREADABLE[case]
    (line,) = problems(write(text))
    for word in words:
        assert word in line


def test_missing_file_folder_and_forbidden_file(write: Write, tmp_path: Path) -> None:
    write(BODY)
    (line,) = problems("nope.yaml")
    assert line.startswith("nope.yaml: no such file; shipped: jobs/avatars.yaml, ")
    (line,) = problems(tmp_path)
    assert "a folder, not a file" in line
    (line,) = problems("x" * 300)
    assert "cannot be read: File name too long" in line
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (line,) = problems("loop.yaml")
    assert line.startswith("loop.yaml: cannot be read: ")
    (line,) = problems("job.yaml", overlays=[Path("o.yaml")])
    names = "z-image, z-image-edit, z-image-tiny, z-image-tiny-edit, z-image-turbo"
    assert line == f"o.yaml: no such file; shipped: {names}"


def test_a_fifo_is_read_like_a_file(write: Write, tmp_path: Path) -> None:
    """`--config <(...)` in a shell gives a pipe, which has no size to look at first."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"sampling: {seed: 5}\n")
    os.close(write_end)
    try:
        config = load_job(write(BODY), overlays=[Path(f"/dev/fd/{read_end}")])
    finally:
        os.close(read_end)
    assert config.sampling.seed == 5


def test_byte_order_mark_and_aliases_are_fine(write: Write) -> None:
    body = "x: &size {width: 512, height: 512}\n".replace("x: ", "sampling: ")
    config = load_job(write(b"\xef\xbb\xbf" + (body + BODY).encode()))
    assert config.sampling.width == 512
    text = BODY.replace("avatars", "avatars, options: {a: &w [1, 2], b: *w}")
    assert load_job(write(text)).prompts.options == {"a": [1, 2], "b": [1, 2]}


def test_a_long_circle_names_the_whole_chain(write: Write) -> None:
    write("extends: ./b.yaml\n" + BODY, "a.yaml")
    write("extends: ./c.yaml\n", "b.yaml")
    write("extends: ./b.yaml\n", "c.yaml")
    (line,) = problems("a.yaml")
    assert line == "c.yaml: extends: a circle: b.yaml -> c.yaml -> b.yaml"


WRONG: list[tuple[str, list[str]]] = [
    ("model.dtype=bfloat", ["'bfloat'", "did you mean bfloat16?", "allowed: auto, bfloat16, "]),
    ("model.attention=flash_3", ["did you mean _flash_3?", "_native_flash"]),
    ("model.compile=maybe", ["'maybe'", "text does not belong", "auto, true, false"]),
    ("model.source=hf", ["value 'hf': unknown; allowed: huggingface, modelscope"]),
    ("model.revision=123", ["123", "a whole number does not belong here (quote it"]),
    ("model.path=null", ["no weights: neither model.path nor model.repo"]),
    ("model.path=''", ["model.path: value ''", "not a path"]),
    ("model.path=[a]", ['value ["a"]', "a list does not belong"]),
    ("model=null", ["model: value null", "a mapping with the keys path, repo"]),
    ("model.loras={x: {scal: 1}}", ["model.loras.x.path: missing; allowed: a path"]),
    ("model.loras.x.path=1", ["model.loras.x.path: value 1"]),
    ("model.loras={'a b': {path: x}}", ["name 'a b'", "file name", "A-Z a-z 0-9"]),
    ("model.loras.x=ink.safetensors", ["model.loras.x", "a mapping with the keys path, scale"]),
    ("prompts.generator=null", ["prompts.generator: value null", "package.module:Class"]),
    ("prompts.count='8'", ["value '8'", "text does not belong", "without quotes"]),
    ("prompts.count=1e3", ["value '1e3'", "in digits"]),
    ("prompts.count=true", ["value true", "a boolean does not belong", "1 or more"]),
    ("prompts.count=0", ["value 0: out of range", "1 or more, or null"]),
    ("prompts.count=8.0", ["value 8.0", "a number does not belong", "a whole number"]),
    ("prompts.start=-1", ["out of range; allowed: a whole number, 0 or more"]),
    ("prompts.sheet=2024-01-01", ["value 2024-01-01", "a date", "quote it"]),
    ("prompts.options.day=2024-01-01", ["prompts.options.day: value 2024-01-01: a date"]),
    ("prompts.options.x=.nan", ["NaN"]),
    ("sampling.width=1000", ["not divisible by 16; nearest: 992 or 1008"]),
    ("sampling.height=0", ["too small; nearest: 16"]),
    ("sampling.width=512.0", ["a number does not belong here", "divisible by 16"]),
    ("sampling.guidance_scale=-0.5", ["out of range", "0 or more"]),
    ("sampling.guidance_scale=1e-3", ["'1e-3'", "1.0e-3"]),
    ("sampling.guidance_scale=.inf", ["out of range"]),
    ("sampling.seed=9223372036854775808", ["out of range", "2**63 - 1"]),
    ("sampling.batch_size=large", ["'large'", "allowed: auto or a whole number, 1 or more"]),
    ("sampling.batch_size=0", ["out of range"]),
    ("sampling.cfg_normalization=-1", ["value -1", "true, false or a number"]),
    ("sampling.strength=2", ["value 2: out of range; allowed: a number from 0 to 1"]),
    ("sampling.steps=8", ["sampling.steps: unknown key", "num_inference_steps"]),
    ("sampling.num_inference_step=8", ["did you mean sampling.num_inference_steps?"]),
    ("width=512", ["unknown key; did you mean sampling.width?", "allowed: name, model, "]),
    ("output.uri=''", ["output.uri: value '': empty", "s3://BUCKET/PREFIX"]),
    ("output.uri=ftp://x", ["unknown scheme ftp://"]),
    ("output.uri=gs://", ["no bucket is named"]),
    ("output.format=PNG", ["did you mean png?", "png, jpeg, webp"]),
    ("output.layout=tar", ["files, webdataset"]),
    ("run.gpus_per_worker=1.5", ["value 1.5", "whole ones"]),
    ("run.stall_timeout=0", ["a number of seconds above 0"]),
    ("run.max_failure_rate=50", ["a number from 0 to 1"]),
    ("name=a/b", ["value 'a/b'", "A-Z a-z 0-9 . _ -"]),
    ("name=no", ["value false", "a boolean does not belong here (quote it"]),
    ("name={}x", ["--set: name: value '{}x'", "not YAML"]),
    ("extends=z-image", ["--set: extends: unknown key"]),
    ("sampling.seed", ["--set: value 'sampling.seed': not KEY=VALUE"]),
    ("=1", ["--set: value '=1': not KEY=VALUE"]),
    ("sampling..seed=1", ["--set: value 'sampling..seed=1': not KEY=VALUE"]),
    ("prompts.options={1: 2}", ["--set: prompts.options", "key 1 is a whole number"]),
]


@pytest.mark.parametrize(("assignment", "words"), WRONG, ids=[case[0] for case in WRONG])
def test_wrong_values(write: Write, assignment: str, words: list[str]) -> None:
    lines = problems(write(BODY), sets=[assignment])
    text = "\n".join(lines)
    for word in words:
        assert word in text
    assert len(lines) == (2 if "scal: 1" in assignment else 1)
    if assignment not in ("model.path=null",):  # about two keys: the job file answers
        assert all(line.startswith("--set: ") for line in lines)


def test_all_errors_come_at_once_each_with_who_set_the_key(write: Write) -> None:
    write("sampling: {width: 1000, height: 1000}\nrun: {workers: many}\n", "base.yaml")
    path = write(
        "extends: ./base.yaml\nname: a\nprompts: {profiles: 3}\n"
        "model: {path: c, dtyp: x}\noutput: {uri: o}\nsampling: {height: 512}\n"
    )
    overlay = write("model: {offload: yes}\n", "over.yaml")
    lines = problems(
        path,
        overlays=[overlay],
        sets=["sampling.strength=3"],
        flags={"prompts.start": -1, "prompts.count": None, "run.threads_per_worker": 0},
    )
    starts = [
        "job.yaml: prompts.generator: missing",
        "job.yaml: prompts.profiles: value 3",
        "--start: prompts.start: value -1",
        "job.yaml: model.dtyp: unknown key; did you mean model.dtype?",
        "over.yaml: model.offload: value true",
        "base.yaml: sampling.width: value 1000",
        "--set: sampling.strength: value 3",
        "base.yaml: run.workers: value 'many'",
        "--threads_per_worker: run.threads_per_worker: value 0",
    ]
    assert len(lines) == len(starts)
    for start in starts:
        assert any(line.startswith(start) for line in lines), start


def test_files_that_cannot_be_read_are_all_named(write: Write) -> None:
    lines = problems(
        write("name: [\n"),
        overlays=[write("x: 1\nx: 2\n", "o1.yaml"), Path("o2.yaml")],
        sets=["a"],
    )
    assert [line.split(":")[0] for line in lines] == ["job.yaml", "o1.yaml", "o2.yaml", "--set"]


def test_an_empty_section_is_told_so(write: Write) -> None:
    """All keys of a section commented out leave null, a common slip."""
    (line,) = problems(write(BODY + "run:\n  # workers: 2\n"))
    assert line.startswith("job.yaml: run: value null: null (nothing) does not belong here")


def test_files_outside_the_working_directory_are_named_in_full(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(BODY + "run: {workers: 0}\n", "job.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (line,) = problems("../job.yaml")
    assert line.startswith(f"{tmp_path}/job.yaml: run.workers: ")


def test_error_survives_pickling(write: Write) -> None:
    with pytest.raises(JobFileError) as caught:
        load_job(write("name: 1\n"))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.problems == caught.value.problems
    assert str(copy) == str(caught.value)


def test_braces_in_a_value_are_shown_as_they_are(write: Write) -> None:
    (line,) = problems(write(BODY), sets=["output.uri='x{0}://{y}'"])
    assert "unknown scheme x{0}://" in line
