"""An actor in the place of `WorkerActor` that sleeps instead of making images."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

import ray

from jobs.claims import Claims
from jobs.dispatcher import Dispatcher
from jobs.executor import (
    Event,
    Executor,
    Finished,
    Lease,
    LeaseEnded,
    Message,
    Planned,
    Progress,
    Result,
    Settings,
    Trimmed,
    WorkerInfo,
    WorkerLost,
    WorkerSpec,
)
from jobs.open_shard import Work
from jobs.plan import Sample, new_plan
from jobs.ray_worker import END
from jobs.scheduler import Scheduler


def sample(index: int) -> Sample:
    return Sample(index, index, f"prompt {index}", "", index, 16, 16)


class SleepingActor:
    """Sleeps for each sample; `spec.config` is JSON: `seconds`, and those of single workers."""

    def __init__(self, spec: WorkerSpec, name: str) -> None:
        config = json.loads(spec.config)
        self.seconds = config.get(name, config["seconds"])
        self.claims = Claims()
        self.ticks = 0
        self.draining = threading.Event()

    def describe(self) -> WorkerInfo:
        return WorkerInfo(
            socket.gethostname(),
            "cpu",
            "cpu",
            1,
            pid=os.getpid(),
            node_id=ray.get_runtime_context().get_node_id(),
        )

    def load(self, settings: Settings) -> tuple[float, None]:
        return 0.0, None

    @ray.method(num_returns="streaming")  # type: ignore[untyped-decorator]
    def run(self, lease: Lease) -> Iterator[Message | tuple[str, bool]]:
        indices = range(lease.shard.start, lease.shard.stop)
        wanted = set(lease.wanted)
        self.claims.plan(lease.attempt, [(i,) for i in indices if i in wanted])
        yield Planned(tuple(map(sample, indices)), tuple((i,) for i in indices))
        for index in lease.wanted:
            if self.draining.is_set():
                break
            if not self.claims.begin(lease.attempt, (index,)):
                continue
            time.sleep(self.seconds)
            self.ticks += 1
            now = datetime.now(UTC)
            yield Finished((Result(index, (index,), "planned", now, f"{lease.attempt}/{index}"),))
        self.claims.forget(lease.attempt)
        yield (END, self.draining.is_set())

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def beat(self) -> int:
        return self.ticks

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def trim(self, attempt: str, indices: Sequence[int]) -> tuple[int, ...]:
        return self.claims.give_up(attempt, indices)

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def drain(self) -> None:
        self.draining.set()


def drive(
    executor: Executor, total: int, shard_size: int, on_poll: Callable[[Scheduler], None]
) -> tuple[Counter[int], float, list[Event]]:
    """The driver's loop without storage.

    Returns:
        How often each index was committed; seconds from when all workers of the beginning were
        ready; what happened, results aside.
    """
    settings = Settings("cpu", "float32", "native", False, "none", 1, 1, "none", "none")
    scheduler = Scheduler(
        (Work(shard) for shard in new_plan(0, total, shard_size).shards()),
        max_attempts=3,
        placeholder=sample,
    )
    dispatcher = Dispatcher(scheduler, executor)
    executor.load(settings)
    found: Counter[int] = Counter()
    happened: list[Event] = []
    begun = 0.0
    while True:
        if begun or len(executor.idle()) == executor.num_workers:
            begun = begun or time.monotonic()
            dispatcher.hand_out()
            if scheduler.num_leased == 0 and scheduler.remaining(1) == 0:
                break
        for event in executor.poll(0.5):
            match event:
                case Progress():
                    scheduler.progress(event)
                case LeaseEnded():
                    scheduler.ended(event.lease, drained=event.drained)
                case Trimmed():
                    scheduler.trimmed(event.lease, event.indices)
                case WorkerLost():
                    scheduler.lost(event)
            if not isinstance(event, Progress):
                happened.append(event)
        for commit in scheduler.take_commits():
            found.update(outcome.result.index for outcome in commit.outcomes)
        on_poll(scheduler)
    for commit in scheduler.take_commits():
        found.update(outcome.result.index for outcome in commit.outcomes)
    return found, time.monotonic() - begun, happened
