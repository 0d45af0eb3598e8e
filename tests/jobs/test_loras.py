"""Jobs with LoRA adapters: a grid of prompts and adapters, its bytes, and what a resume refuses."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_calls import CommandLine
from lora_files import FORMATS, train, write
from PIL import Image

from zimage_core.loader import load_from_local_dir
from zimage_core.tiny.make import make_checkpoint

JOB = """
name: grid
model:
  path: {model}
  dtype: float32
  loras:
    ink: {{path: ink.safetensors, scale: 0.75}}
    pixel: {{path: pixel.safetensors}}
prompts: {{generator: "grid:Grid", count: {count}, options: {{sets: {sets}}}}}
sampling: {{width: 32, height: 32, num_inference_steps: 1, batch_size: 2}}
output: {{uri: {output}, shard_size: 16}}
"""
GRID = '''
from prompt_generators import Prompt


class Grid:
    """Each of two prompts with each set of adapters, the sets in turn."""

    def __init__(self, *, sets):
        self.sets = sets

    def generate_prompt(self, index):
        prompt, chosen = divmod(index, len(self.sets))
        text = ("a red circle", "a blue house")[prompt % 2]
        return Prompt(text, seed=100 + prompt, loras=self.sets[chosen])
'''
SETS: list[list[str]] = [[], ["pixel"], ["ink"], ["pixel", "ink"]]
MODULES = ("layers.0.attention.to_q", "layers.0.feed_forward.w1", "all_final_layer.2-1.linear")

Write = Callable[..., Path]
Run = Callable[..., None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("loras") / "tiny", dtype=torch.float32, dim=48, axes_dims=(8, 8, 8)
    )


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `ink` and `pixel`, of two makers."""
    folder = tmp_path_factory.mktemp("adapters")
    parts = load_from_local_dir(checkpoint, device="cpu", dtype=torch.float32)
    for seed, (name, form) in enumerate(
        {"ink": "kohya, musubi-tuner", "pixel": "ai-toolkit"}.items()
    ):
        pairs = train(parts["transformer"], MODULES, strength=2.0, seed=seed)
        write(folder / f"{name}.safetensors", FORMATS[form][0](pairs))
    return folder


@pytest.fixture
def job(zimage: CommandLine, checkpoint: Path, adapters: Path) -> Write:
    """Write the job with some sets of adapters beside copies of the adapters."""
    for file in adapters.iterdir():
        shutil.copy(file, zimage.folder)
    zimage.write("grid.py", GRID)

    def make(sets: list[list[str]] = SETS, *, output: str = "out", prompts: int = 2) -> Path:
        count = prompts * len(sets)
        text = JOB.format(model=checkpoint, sets=json.dumps(sets), count=count, output=output)
        return zimage.write("job.yaml", text)

    return make


def hashes(rows: list[Mapping[str, Any]]) -> dict[tuple[str, str | None], str]:
    """Hash of the pixels by prompt and adapters."""
    return {(row["prompt"], row["loras"]): row["pixels_sha256"] for row in rows}


def change(path: Path) -> None:
    """Another adapter that fits as well."""
    from safetensors.torch import load_file

    write(path, {key: tensor * 0.9 for key, tensor in load_file(path).items()})


@pytest.mark.long
def test_a_grid_has_the_bytes_of_jobs_with_one_adapter_each(
    zimage: CommandLine, job: Write
) -> None:
    job()
    zimage.run(code=0)
    rows = zimage.rows()
    assert [row["loras"] for row in rows] == [None, "pixel", "ink", "ink,pixel"] * 2
    grid = hashes(rows)
    assert len(set(grid.values())) == 8  # every adapter shows, and so do both together
    # Prompts of one set form a batch, whatever stands between them.
    assert [list(row["batch"]) for row in rows] == [[i % 4, i % 4 + 4] for i in range(8)]
    log = next((zimage.folder / "out" / "logs").iterdir()).read_text()
    worn = [line.partition("LoRAs ")[2] for line in log.splitlines() if "LoRAs" in line]
    # Each set once in the shard, not once for each prompt.
    assert [line.rpartition(" put in")[0] for line in worn] == ["ink", "ink, pixel", "pixel"]
    for i, chosen in enumerate(SETS):
        job([chosen], output=f"alone{i}")
        names = ["--set", "model.loras=null"] if not chosen else []
        zimage.run(*names, code=0)
        alone = hashes(zimage.rows(f"alone{i}"))
        assert len(alone) == 2
        assert alone == {key: grid[key] for key in alone}, chosen


def test_back_to_none_after_an_adapter_in_a_later_shard(zimage: CommandLine, job: Write) -> None:
    """Sets in another order, a sample a shard: the weights go back and forth."""
    job()
    zimage.run(code=0)
    grid = hashes(zimage.rows())
    job([["ink"], [], ["ink", "pixel"], [], ["pixel"]], output="other")
    flags = ["--set", "output.shard_size=1", "--set", "sampling.batch_size=1"]
    zimage.run(*flags, code=0)
    job([[]], output="none")
    zimage.run(*flags, "--set", "model.loras=null", code=0)
    other, none = hashes(zimage.rows("other")), hashes(zimage.rows("none"))
    for prompt in ("a red circle", "a blue house"):
        assert other[prompt, None] == none[prompt, None]
    assert len({*other.values()}) == len({*grid.values()}) == 8


def test_job_json_pins_content_and_scale(zimage: CommandLine, job: Write) -> None:
    from zimage_core.lora_file import lora_fingerprint

    job()
    zimage.run("--count", 4, code=0)
    record = json.loads((zimage.folder / "out" / "job.json").read_text())
    ink, pixel = (zimage.folder / f"{name}.safetensors" for name in ("ink", "pixel"))
    assert record["fingerprint"]["loras"] == {
        "ink": lora_fingerprint(ink),
        "pixel": lora_fingerprint(pixel),
    }
    assert record["job"]["model"]["loras"]["ink"] == {"path": str(ink), "scale": 0.75}


def test_a_resume_refuses_an_adapter_that_changed_by_its_name(
    zimage: CommandLine, job: Write
) -> None:
    job()
    zimage.run("--count", 4, code=0)
    before = {path: path.read_bytes() for path in (zimage.folder / "out").rglob("*.*")}

    ink = zimage.folder / "ink.safetensors"
    original = ink.read_bytes()
    change(ink)
    for command in (["run", "job.yaml", "--local"], ["plan", "job.yaml"]):
        error = zimage(*command, code=2).err
        assert "model.loras.ink: the adapter was sha256:" in error
        assert ", now sha256:" in error and str(ink) in error
        assert "pixel" not in error
    ink.write_bytes(original)

    scale = ["--set", "model.loras.pixel.scale=0.5"]
    assert "model.loras.pixel.scale: was 1.0, now 0.5" in zimage.run(*scale, code=2).err
    gone = ["--set", "model.loras=null", "--set", "model.loras.pixel.path=pixel.safetensors"]
    error = zimage.run(*gone, code=2).err
    assert "model.loras.ink: was declared, now is not" in error
    assert {p: p.read_bytes() for p in (zimage.folder / "out").rglob("*.*")} == before

    # The same content elsewhere is the same adapter, and the rest is made as if in one run.
    ink.rename(zimage.folder / "renamed.safetensors")
    zimage.run("--set", "model.loras.ink.path=renamed.safetensors", code=0)
    rows = zimage.rows()
    assert len(rows) == 8
    (zimage.folder / "renamed.safetensors").rename(ink)
    job(output="once")
    zimage.run("--count", 4, code=0)
    zimage.run(code=0)
    assert hashes(zimage.rows("once")) == hashes(rows)


def test_an_adapter_that_nothing_was_made_with_may_come_change_and_go(
    zimage: CommandLine, job: Write
) -> None:
    job([["ink"], []])
    zimage.run("--count", 2, code=0)
    change(zimage.folder / "pixel.safetensors")
    zimage.run("--count", 3, "--set", "model.loras.pixel.scale=0.1", code=0)
    shutil.copy(zimage.folder / "pixel.safetensors", zimage.folder / "third.safetensors")
    zimage.run("--set", "model.loras.third.path=third.safetensors", code=0)
    record = json.loads((zimage.folder / "out" / "job.json").read_text())
    assert set(record["fingerprint"]["loras"]) == {"ink", "pixel", "third"}
    assert len(zimage.rows()) == 4


def test_a_record_from_before_adapters_were_pinned_is_read(zimage: CommandLine, job: Write) -> None:
    job([[]])
    none = ["--set", "model.loras=null"]
    zimage.run("--count", 1, *none, code=0)
    path = zimage.folder / "out" / "job.json"
    record = json.loads(path.read_text())
    del record["fingerprint"]["loras"]
    path.write_text(json.dumps(record))
    zimage.run(code=0)
    assert len(zimage.rows()) == 2


def test_plan_tells_what_an_adapter_holds(zimage: CommandLine, job: Write) -> None:
    job()
    ended = zimage("plan", "job.yaml", "--json", code=0)
    ink, pixel = json.loads(ended.out)["loras"]
    assert (ink["name"], ink["scale"], pixel["name"], pixel["scale"]) == ("ink", 0.75, "pixel", 1.0)
    assert ink["modules"] == 3 and ink["unmatched"] == [] and ink["warnings"] == []
    assert ink["summary"] == "3 modules by LoRA of rank 3; 9 tensors matched"
    text = zimage("plan", "job.yaml", code=0).out
    assert "lora     ink at 0.75: " in text
    assert "3 modules by LoRA of rank 3" in text
    assert "     3  a red circle  [ink, pixel]" in text


def test_keys_left_out_are_said_before_a_run(zimage: CommandLine, job: Write) -> None:
    from safetensors.torch import load_file

    job()
    path = zimage.folder / "ink.safetensors"
    foreign = "lora_unet_siglip_refiner_0_attention_to_q.lora_down.weight"
    write(path, {**load_file(path), foreign: torch.ones(2, 2)})
    words = f"note: model.loras.ink: {path}: 1 of 10 tensors match nothing in the transformer"
    assert words in zimage.run("--count", 1, code=0).err
    ended = zimage("plan", "job.yaml", code=0)
    assert (
        f"NOTE: 1 of 10 tensors match nothing in the transformer and are left out: {foreign}"
        in ended.out
    )


def test_a_misfit_is_found_before_a_worker_starts(
    zimage: CommandLine, job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr("jobs.local_executor.LocalExecutor.start", never)
    job()
    path = zimage.folder / "ink.safetensors"
    write(
        path,
        {"layers.0.attention.to_q.lora_A.weight": torch.ones(2, 64)}
        | {"layers.0.attention.to_q.lora_B.weight": torch.ones(48, 2)},
    )
    for command in (["run", "job.yaml", "--local"], ["plan", "job.yaml"]):
        error = zimage(*command, code=2).err
        assert (
            f"job.yaml: model.loras.ink.path: {path}: tensor 'layers.0.attention.to_q.lora_A"
            in error
        )
        assert "has shape [2, 64], which for layers.0.attention.to_q must be [2, 48]" in error
    path.write_text("no adapter")
    error = zimage("plan", "job.yaml", code=2).err
    assert f"model.loras.ink.path: {path}: is corrupt, or no safetensors file" in error


def test_values_that_are_no_numbers_end_a_run(zimage: CommandLine, job: Write) -> None:
    from safetensors.torch import load_file

    job()
    path = zimage.folder / "ink.safetensors"
    tensors = load_file(path)
    next(t for t in tensors.values() if t.ndim == 2)[0, 0] = math.nan
    write(path, tensors)
    error = zimage.run(code=2).err
    assert f"model.loras.ink.path: {path}: tensor 'lora_unet_" in error
    assert "holds NaN or infinity" in error


def test_an_adapter_that_is_another_one_on_a_node_is_refused_there(
    zimage: CommandLine, job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.worker import GenerationWorker

    load = GenerationWorker.load

    def change_first(self: GenerationWorker, settings: Any) -> None:
        change(zimage.folder / "ink.safetensors")
        load(self, settings)

    monkeypatch.setattr(GenerationWorker, "load", change_first)
    job()
    error = zimage.run(code=5).err
    assert "model.loras.ink.path: " in error
    assert "is another adapter than the job's: sha256:" in error


def test_a_prompt_that_names_an_adapter_twice_is_one_failed_row(
    zimage: CommandLine, job: Write
) -> None:
    job([["ink"], ["ink", "ink"]])
    zimage.run("--count", 2, code=3)
    good, bad = zimage.rows()
    assert good["status"] == "ok"
    assert bad["error_type"] == "prompt_error"
    assert "LoRA 'ink' is named twice" in bad["error_message"]


# zimage generate


@pytest.fixture
def picture(zimage: CommandLine, job: Write, checkpoint: Path) -> Callable[..., bytes]:
    job()

    def make(*flags: object, code: int = 0) -> bytes:
        size = ["--width", 32, "--height", 32, "--steps", 1]
        known = ["--model", checkpoint, "--prompt", "a red circle", "--seed", 100, *size]
        zimage("generate", *known, *flags, "-o", "x.png", code=code)
        with Image.open(zimage.folder / "x.png") as image:
            return image.tobytes()

    return make


def test_generate_with_adapters(picture: Callable[..., bytes]) -> None:
    plain = picture()
    ink = picture("--lora", "ink.safetensors")
    both = picture("--lora", "ink.safetensors", "--lora", "pixel.safetensors", "--lora-scale", 0.5)
    each = picture(
        *("--lora", "ink.safetensors", "--lora-scale", 0.5),
        *("--lora", "pixel.safetensors", "--lora-scale", 0.5),
    )
    assert both == each
    assert len({plain, ink, both}) == 3
    assert picture("--lora", "ink.safetensors", "--lora-scale", 0) == plain
    only_ink = picture(
        *("--lora", "ink.safetensors", "--lora-scale", 1),
        *("--lora", "pixel.safetensors", "--lora-scale", 0),
    )
    assert only_ink == ink


def test_generate_says_what_it_changed(zimage: CommandLine, job: Write, checkpoint: Path) -> None:
    job()
    known = ["generate", "--model", checkpoint, "--prompt", "x", "--width", 32, "--height", 32]
    known += ["--steps", 1, "-o", "x.png", "--lora", "ink.safetensors"]
    ended = zimage(*known, "--lora-scale", 0.75, code=0)
    assert "ink.safetensors at 0.75: 3 modules by LoRA of rank 3; 9 tensors matched" in ended.err
    ended = zimage(*known, "--lora-scale", 1, "--lora-scale", 2, "--lora-scale", 3, code=2)
    assert "--lora-scale: 3 given for 1 --lora; allowed: one for all, or one for each" in ended.err
    assert "--lora-scale: nan: allowed" in zimage(*known, "--lora-scale", "nan", code=2).err
    (zimage.folder / "bad.safetensors").write_text("none")
    ended = zimage(*known, "--lora", "bad.safetensors", code=2)
    assert "--lora: bad.safetensors: is truncated: " in ended.err
