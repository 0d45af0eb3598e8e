"""What workers make when they have loaded, and images that 16 bits were too few for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from job_runs import ROOT, Job, read_hashes, read_rows

from jobs.canaries import CanaryComparison, CanaryReport
from jobs.canary import fly_canary
from jobs.cli import main
from jobs.executor import WorkerInfo
from zimage_core import ZImagePipeline, load_from_local_dir

TINY = ROOT / "data" / "checkpoints" / "z-image-tiny"


def run(job: Job, *flags: str) -> int:
    return main(["run", str(job.path), "--local", *flags])


def pipeline(dtype: torch.dtype = torch.float32) -> ZImagePipeline:
    return ZImagePipeline(**load_from_local_dir(TINY, device="cpu", dtype=dtype))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_healthy_worker_agrees_with_itself(dtype: torch.dtype) -> None:
    made = pipeline(dtype)
    report = fly_canary(made, lambda step: None)
    assert report.batches_agree and report.fault is None and report.words() is None
    assert fly_canary(made, lambda step: None).digest == report.digest != ""


@pytest.fixture
def broken_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong for more than one image."""
    denoise = ZImagePipeline.denoise

    def wrong(self: Any, prompts: Any, **kwargs: Any) -> Any:
        return denoise(self, prompts, **kwargs) * (1.5 if len(prompts) > 1 else 1.0)

    monkeypatch.setattr(ZImagePipeline, "denoise", wrong)


def test_a_worker_whose_batches_are_wrong_makes_singles(
    make_job: Callable[..., Job], broken_batches: None, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(count=6)
    assert run(job) == 0
    assert "it makes every image alone" in capsys.readouterr().err
    rows = read_rows(job.output)
    assert {row["batch_mode"] for row in rows} == {"single"}
    assert all(row["batch"] == [row["index"]] for row in rows)
    lines = [
        json.loads(line)
        for path in job.output.glob("events/*.jsonl")
        for line in path.read_text().splitlines()
    ]
    (ready,) = [line for line in lines if line.get("event") == "worker_ready" or "canary" in line]
    assert ready["canary"]["batches"] is False


def test_singles_are_right_where_batches_are_wrong(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    alone = make_job(count=4, name="alone")
    assert run(alone, "--set", "sampling.batch_size=1") == 0
    request.getfixturevalue("broken_batches")
    job = make_job(count=4)
    assert run(job) == 0
    assert read_hashes(job.output) == read_hashes(alone.output)


def report(value: float) -> CanaryReport:
    return CanaryReport(0.0, 1e-4, np.full(8, value, np.float32).tobytes())


def test_the_worker_that_differs_is_named() -> None:
    info = WorkerInfo("node", "card", "cuda", 1)
    comparison = CanaryComparison()
    assert comparison.add("w0", info, report(1.0)) is None
    assert comparison.add("w1", info, report(1.00001)) is None
    found = comparison.add("w2", info, report(1.1))
    assert found is not None and found.odd == ("w2 on node (card)",)
    assert "look at the former's device" in found.words()
    assert comparison.add("w3", info, report(1.0)) is None, "said once"
    assert comparison.add("w4", info, CanaryReport(None, 1e-4, fault="no room")) is None


def spoiled(monkeypatch: pytest.MonkeyPatch, *, always: bool) -> None:
    """The first image of a batch is NaN in 16 bits, or in any dtype."""
    decode = ZImagePipeline.decode

    def spoil(self: Any, latents: Any) -> Any:
        images = decode(self, latents)
        if always or next(self.vae.parameters()).dtype == torch.bfloat16:
            images[0] = float("nan")
        return images

    monkeypatch.setattr("jobs.worker.fly_canary", lambda p, s: CanaryReport(None, 1.0))
    monkeypatch.setattr(ZImagePipeline, "decode", spoil)


@pytest.mark.long
def test_nan_in_16_bits_is_made_again_in_float32(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, always=False)
    job = make_job(count=4)
    assert run(job, "--set", "model.dtype=bfloat16") == 0
    rows = read_rows(job.output)
    again = [row for row in rows if row["dtype"] == "float32"]
    assert again and {row["batch_mode"] for row in again} == {"single"}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(Path(job.output / row["file_name"]).is_file() for row in rows)


@pytest.mark.long
def test_nan_in_float32_too_is_recorded(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, always=True)
    job = make_job(count=4)
    assert run(job, "--set", "model.dtype=bfloat16", "--set", "run.max_failure_rate=1") == 3
    failed = [row for row in read_rows(job.output) if row["status"] == "failed"]
    assert {row["error_type"] for row in failed} == {"invalid_image"}
    assert all("made alone in float32" in row["error_message"] for row in failed)
