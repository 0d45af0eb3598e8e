"""An actor in the place of `WorkerActor` that sleeps instead of making images."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import ray
from driver_loop import sample

from jobs.claims import Claims
from jobs.executor import (
    Finished,
    Lease,
    Message,
    Planned,
    Result,
    Settings,
    WorkerInfo,
    WorkerSpec,
)
from jobs.mailbox import Mailbox
from jobs.ray_worker import END


class SleepingActor:
    """Sleeps for each sample; `spec.config` is JSON: `seconds`, and those of single workers."""

    def __init__(self, spec: WorkerSpec, name: str) -> None:
        config = json.loads(spec.config)
        self.seconds = config.get(name, config["seconds"])
        self.claims = Claims()
        self.ticks = 0
        self.draining = threading.Event()
        self.device = ThreadPoolExecutor(1)

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
    def run(self, lease: Lease) -> Iterator[list[Message | tuple[str, bool]]]:
        yield from Mailbox(self._messages(lease), self.device)

    def _messages(self, lease: Lease) -> Iterator[Message | tuple[str, bool]]:
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
