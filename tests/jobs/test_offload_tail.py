"""Models that take turns, and parts of a lease that another worker takes: each sample once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from job_runs import Job, read_hashes

from jobs.canaries import CanaryReport
from jobs.cli import main
from jobs.epoch import Epoch
from jobs.executor import Finished, Lease, Planned, Settings, WorkerSpec
from jobs.job_file import load_job
from jobs.plan import Shard
from jobs.storage import Storage
from jobs.worker import GenerationWorker
from zimage_core import ZImagePipeline

COUNT = 12


@pytest.fixture
def worker(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[GenerationWorker]:
    """One that has loaded a job of one shard with `model.offload: phase`."""
    monkeypatch.setattr("jobs.worker.fly_canary", lambda pipeline, on_step: CanaryReport(None, 1.0))
    config = load_job(
        make_job(count=COUNT, shard_size=COUNT).path,
        sets=["model.offload=phase", "sampling.batch_size=2"],
    )
    storage = Storage(str(tmp_path / "out"), create=True)
    epoch = Epoch.take(storage)
    spec = WorkerSpec(config.model_dump_json(), str(tmp_path / "out"), epoch.number, epoch.nonce)
    made = GenerationWorker(spec, "w0")
    weights = made.fingerprint()
    made.load(Settings("cpu", "float32", "native", False, "phase", 2, 1, "tiny", weights))
    yield made
    made.close()
    epoch.close(reason="done")


@pytest.mark.parametrize(("stage", "call"), [("encode", 3), ("denoise", 2), ("decode", 1)])
def test_what_is_given_up_meanwhile_is_made_by_the_other_and_nothing_twice(
    worker: GenerationWorker,
    make_job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    call: int,
) -> None:
    shard = Shard(0, 0, COUNT)
    lease, other = Lease(shard, "00000000-holder"), "00000000-thief"
    calls: Counter[str] = Counter()
    given: list[int] = []

    def ask() -> None:
        given.extend(worker.trim(lease.attempt, range(COUNT)))

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(ZImagePipeline, name)

        def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            if (name, calls[name]) == (stage, call):
                asker = threading.Thread(target=ask)  # as Ray's thread for control does
                asker.start()
                asker.join()
            return real(self, *args, **kwargs)

        return spy

    for name in ("encode", "denoise", "decode"):
        monkeypatch.setattr(ZImagePipeline, name, watched(name))

    messages = list(worker.run(lease))
    (plan,) = [message for message in messages if isinstance(message, Planned)]
    batches = len(plan.batches)
    begun = {"encode": 0, "denoise": call, "decode": batches}[stage]
    assert sorted(given) == sorted(i for batch in plan.batches[begun:] for i in batch)
    if given:
        messages += worker.run(Lease(shard, other, indices=tuple(given)))
    made = [m for message in messages if isinstance(message, Finished) for m in message.results]
    assert Counter(result.index for result in made) == Counter(range(COUNT))
    assert {r.index for r in made if r.file_name and other in r.file_name} == set(given)
    assert calls["denoise"] == calls["decode"] == batches

    plain = make_job(count=COUNT, shard_size=COUNT, name="plain")
    assert main(["run", str(plain.path), "--local", "--set", "sampling.batch_size=2"]) == 0
    assert {result.index: result.pixels_sha256 for result in made} == read_hashes(plain.output)
