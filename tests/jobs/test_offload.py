"""Jobs whose models take turns on the device: the same bytes, and how `auto` decides."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_runs import Job, read_hashes, read_rows
from PIL import Image

from jobs.canaries import CanaryReport
from jobs.cli import main
from jobs.config import JobConfig
from jobs.errors import InputError
from jobs.executor import WorkerInfo
from jobs.job_file import load_job
from jobs.settings import resolve
from zimage_core import ZImagePipeline

MODES = ("phase", "model", "block")
GIB = 1024**3


def run(job: Job, *flags: str, mode: str | None = None) -> int:
    sets = ["--set", f"model.offload={mode}"] if mode else []
    return main(["run", str(job.path), "--local", *sets, *flags])


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of the pipeline's stages, in order."""
    calls: list[str] = []
    for name in ("encode", "encode_image", "denoise", "decode"):
        real = getattr(ZImagePipeline, name)

        def spy(self: Any, *args: Any, _name: str = name, _real: Any = real, **kwargs: Any) -> Any:
            calls.append(_name)
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(ZImagePipeline, name, spy)
    without_canary(monkeypatch)
    return calls


def without_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what a worker makes when it has loaded: it is no part of a shard."""
    monkeypatch.setattr("jobs.worker.fly_canary", lambda pipeline, on_step: CanaryReport(None, 1.0))


def test_phases_are_for_a_whole_shard(make_job: Callable[..., Job], stages: list[str]) -> None:
    plain = make_job(count=12, shard_size=6, name="plain")
    assert run(plain) == 0
    batches = [3 if name == "encode" else 0 for name in stages].count(3)
    assert stages == ["encode", "denoise", "decode"] * batches
    stages.clear()

    job = make_job(count=12, shard_size=6)
    assert run(job, mode="phase") == 0
    per_shard = batches // 2
    assert per_shard > 1
    one = ["encode"] * per_shard + ["denoise"] * per_shard + ["decode"] * per_shard
    assert stages == one * 2
    assert read_hashes(job.output) == read_hashes(plain.output)
    assert json.loads((job.output / "job.json").read_text())["fingerprint"]["offload"] == "phase"


@pytest.mark.parametrize("mode", ["model", "block"])
def test_bytes_are_those_without_offload(make_job: Callable[..., Job], mode: str) -> None:
    plain = make_job(count=6, name="plain")
    assert run(plain, "--set", "sampling.guidance_scale=2") == 0
    job = make_job(count=6)
    assert run(job, "--set", "sampling.guidance_scale=2", mode=mode) == 0
    assert read_hashes(job.output) == read_hashes(plain.output)


def test_phases_with_images_to_start_from(
    make_job: Callable[..., Job], tmp_path: Path, stages: list[str]
) -> None:
    pictures = tmp_path / "pics"
    pictures.mkdir()
    for i in range(3):
        array = np.random.default_rng(i).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(array).save(pictures / f"{i}.png")
    whole = (pictures / "2.png").read_bytes()
    (pictures / "3.png").write_bytes(whole[: len(whole) // 2])  # noticed when it is decoded
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["prompt", "photo"], *([f"cat {i}", f"{i}.png"] for i in range(4))]
        )
    flags = [
        *("--set", "prompts.generator=table", "--set", f"prompts.profiles={tmp_path / 't.csv'}"),
        *("--set", f"prompts.images_root={pictures}", "--set", "sampling.batch_size=2"),
        *("--set", "prompts.options={column: prompt, image_column: photo}"),
        *("--set", "sampling.num_inference_steps=4"),
    ]
    plain = make_job(count=4, name="plain")
    assert run(plain, *flags) == 3
    stages.clear()
    job = make_job(count=4)
    assert run(job, *flags, mode="phase") == 3
    # The batch with the bad picture is made last, by itself, of the good one alone.
    together = ["encode"] * 2 + ["encode_image"] + ["denoise"] + ["decode"]
    assert stages == [*together, "encode", "encode_image", "denoise", "decode"]
    expected = {r["index"]: (r["status"], r["error_message"]) for r in read_rows(plain.output)}
    found = {r["index"]: (r["status"], r["error_message"]) for r in read_rows(job.output)}
    assert found == expected
    assert [status for status, _ in found.values()] == ["ok", "ok", "ok", "failed"]
    assert read_hashes(job.output) == read_hashes(plain.output)


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_a_batch_that_fails_in_a_phase_is_made_by_itself(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    import torch

    real = getattr(ZImagePipeline, stage)

    def limited(self: Any, batch: Any, **kwargs: Any) -> Any:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("more than two")
        return real(self, batch, **kwargs)

    monkeypatch.setattr(ZImagePipeline, stage, limited)
    job = make_job(count=12, shard_size=12)
    assert run(job, mode="phase") == 0
    rows = read_rows(job.output)
    assert {r["batch_mode"] for r in rows} == {"planned", "halved"}
    assert all(len(r["batch"]) <= 2 for r in rows)
    log = "".join(path.read_text() for path in job.output.glob("logs/*.log"))
    assert ("left for later: OutOfMemoryError: more than two" in log) == (stage != "decode")


def test_an_interruption_finishes_what_is_denoised(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    real = ZImagePipeline.denoise
    calls = []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    without_canary(monkeypatch)
    monkeypatch.setattr(ZImagePipeline, "denoise", interrupted)
    job = make_job(count=12, shard_size=12)
    assert run(job, mode="phase") == 130
    monkeypatch.setattr(ZImagePipeline, "denoise", real)
    made = read_rows(job.output)
    assert len(calls) == 2
    assert 0 < len(made) < 12
    assert len({tuple(r["batch"]) for r in made}) == 2
    assert run(job, mode="phase") == 0
    plain = make_job(count=12, shard_size=12, name="plain")
    assert run(plain) == 0
    assert read_hashes(job.output) == read_hashes(plain.output)


def test_a_resume_keeps_the_way_it_was_begun(
    make_job: Callable[..., Job], capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(count=6)
    assert run(job, "--count", "4", mode="phase") == 0
    assert run(job, "--count", "4", mode="block") == 2
    assert "model.offload: was 'phase', now 'block'" in capsys.readouterr().err
    assert run(job) == 0  # auto stands for what it was
    log = "".join(path.read_text() for path in sorted(job.output.glob("logs/*.log")))
    assert log.count("offload phase") == 2


NEEDED = {"none": 22 * GIB, "phase": 13 * GIB, "model": 13 * GIB, "block": 3 * GIB}


def settings(make_job: Callable[..., Job], *sets: str, free: int = 0, device: str = "cuda") -> Any:
    flags = [f"model.{key}" if not key.startswith("run.") else key for key in sets]
    config: JobConfig = load_job(make_job().path, sets=flags)
    info = WorkerInfo("node", "a card", device, 24 * GIB, free_memory=free)
    return resolve(config, info, "weights", {}, lambda: NEEDED, 12)


@pytest.mark.parametrize(
    ("gib", "mode"), [(80, "none"), (22, "none"), (21, "phase"), (13, "phase"), (8, "block")]
)
def test_auto_takes_what_fits(make_job: Callable[..., Job], gib: int, mode: str) -> None:
    assert settings(make_job, free=gib * GIB).offload == mode


def test_auto_on_a_shared_gpu_counts_on_its_share(make_job: Callable[..., Job]) -> None:
    assert settings(make_job, "run.gpus_per_worker=0.5", free=30 * GIB).offload == "phase"
    assert settings(make_job, "run.gpus_per_worker=2", free=30 * GIB).offload == "none"


def test_auto_takes_the_least_where_nothing_fits(make_job: Callable[..., Job]) -> None:
    assert settings(make_job, free=2 * GIB).offload == "block"


def test_auto_asks_nothing_off_cuda(make_job: Callable[..., Job]) -> None:
    config = load_job(make_job().path)
    info = WorkerInfo("node", "cpu", "cpu", 24 * GIB)
    assert resolve(config, info, "weights", {}, lambda: pytest.fail("asked"), 12).offload == "none"


def test_a_named_mode_is_taken(make_job: Callable[..., Job]) -> None:
    for mode in ("none", *MODES):
        assert settings(make_job, f"offload={mode}", free=GIB).offload == mode
        assert settings(make_job, f"offload={mode}", device="cpu").offload == mode


def test_compile_excludes_block(make_job: Callable[..., Job]) -> None:
    assert settings(make_job, "compile=true", free=14 * GIB).offload == "phase"
    with pytest.raises(
        InputError, match=r"model.compile: true: a card has 8.0 GiB free, .* 13.0 GiB"
    ):
        settings(make_job, "compile=true", free=8 * GIB)


def test_the_worker_computes_what_is_needed(make_job: Callable[..., Job]) -> None:
    from jobs.executor import WorkerSpec
    from jobs.worker import GenerationWorker

    config = load_job(make_job().path, sets=["sampling.width=512", "sampling.height=512"])
    spec = WorkerSpec(config.model_dump_json(), str(make_job().output), 1, "nonce")
    needed = GenerationWorker(spec, "w0").memory_needed()
    assert needed["none"] >= needed["phase"] >= needed["block"] > 700 * 2**20
    larger = config.model_copy(
        update={
            "sampling": config.sampling.model_copy(update={"guidance_scale": 2.0, "width": 1024})
        }
    )
    spec = WorkerSpec(larger.model_dump_json(), str(make_job().output), 1, "nonce")
    assert GenerationWorker(spec, "w0").memory_needed()["none"] > needed["none"]
