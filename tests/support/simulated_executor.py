"""Workers under a simulated clock, behind the protocol of an executor: hours pass in seconds.

They plan, make, drain, give up batches and die as real ones do (`jobs.claims` is the real one);
what takes time is one number for each worker.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from driver_loop import sample

from jobs.claims import Claims
from jobs.executor import (
    Event,
    Finished,
    Lease,
    LeaseEnded,
    Planned,
    Progress,
    Result,
    Settings,
    Trimmed,
    WorkerInfo,
    WorkerLost,
    WorkerReady,
)

INFO = WorkerInfo(node="n", device="cpu", device_type="cpu", memory=1)
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(slots=True)
class SimulatedWorker:
    """Makes batches of `batch` neighbours, each sample in `seconds`."""

    name: str
    seconds: float
    batch: int = 1
    claims: Claims = field(default_factory=Claims)
    ready: bool = False
    leases: deque[Lease] = field(default_factory=deque)
    made: int = 0


class SimulatedExecutor:
    """Implements `jobs.executor.Executor`.

    Args:
        seconds: per sample, of each worker.
        load: seconds until each worker is ready.
        plan: seconds that a worker needs before a lease's first batch.
        answer: seconds until a question for a part of a lease is answered.
    """

    def __init__(
        self,
        seconds: Sequence[float],
        *,
        load: Sequence[float] = (),
        batch: int = 1,
        plan: float = 0.02,
        answer: float = 0.005,
    ) -> None:
        self.now = 0.0
        self.workers = {
            f"w{i}": SimulatedWorker(f"w{i}", each, batch) for i, each in enumerate(seconds)
        }
        self.num_workers = len(self.workers)
        self._plan, self._answer = plan, answer
        self._heap: list[tuple[float, int, object]] = []
        self._order = itertools.count()
        for i, name in enumerate(self.workers):
            self._at(load[i] if load else 0.0, ("ready", name))

    def start(self) -> WorkerInfo:
        return INFO

    def fingerprint(self) -> str:
        return "weights"

    def takes_pictures(self) -> bool:
        return False

    def memory_needed(self) -> Mapping[str, int]:
        return {}

    def load(self, settings: Settings) -> None: ...

    def free(self) -> int:
        return sum(2 - len(w.leases) for w in self.workers.values() if w.ready)

    def idle(self) -> list[str]:
        return [w.name for w in self.workers.values() if w.ready and not w.leases]

    def submit(self, lease: Lease, worker: str | None = None) -> str:
        ready = [w for w in self.workers.values() if w.ready]
        chosen = min(ready, key=lambda w: (w.name != worker, len(w.leases)))
        chosen.leases.append(lease)
        if len(chosen.leases) == 1:
            self._begin(chosen)
        return chosen.name

    def trim(self, lease: Lease, indices: Sequence[int]) -> None:
        for worker in self.workers.values():
            if any(held.attempt == lease.attempt for held in worker.leases):
                self._at(self._answer, ("trim", worker.name, lease, tuple(indices)))
                return
        self._at(0.0, Trimmed("", lease, ()))

    def poll(self, timeout: float) -> list[Event]:
        """The next thing that happens; the clock goes on to it."""
        if not self._heap:
            return []
        self.now, _, what = heapq.heappop(self._heap)
        if not isinstance(what, tuple):
            return [what]  # type: ignore[list-item]
        kind, name, *rest = what
        worker = self.workers.get(name)
        if worker is None:
            return []
        if kind == "ready":
            worker.ready = True
            return [WorkerReady(name, INFO, self.now)]
        if kind == "trim":
            lease, indices = rest
            return [Trimmed(name, lease, worker.claims.give_up(lease.attempt, indices))]
        assert kind == "step"
        lease, batches, number = rest
        return self._step(worker, lease, batches, number)

    def kill(self, name: str) -> None:
        """Lose a worker now."""
        worker = self.workers.pop(name)
        leases = list(worker.leases)
        running = leases[0] if leases else None
        self._at(
            0.0,
            WorkerLost(name, INFO, running, tuple(leases[1:]), "worker_died", "killed", True),
        )

    def drain(self) -> None: ...

    def stop(self) -> None: ...

    def _begin(self, worker: SimulatedWorker) -> None:
        lease = worker.leases[0]
        indices = list(range(lease.shard.start, lease.shard.stop))
        size = worker.batch
        planned = [tuple(indices[i : i + size]) for i in range(0, len(indices), size)]
        wanted = set(lease.wanted)
        batches = [some for b in planned if (some := tuple(i for i in b if i in wanted))]
        worker.claims.plan(lease.attempt, batches)
        message = Planned(tuple(sample(i) for i in indices), tuple(planned))
        self._at(self._plan, Progress(worker.name, INFO, lease, message))
        self._advance(worker, lease, batches, 0, self._plan)

    def _advance(
        self,
        worker: SimulatedWorker,
        lease: Lease,
        batches: list[tuple[int, ...]],
        number: int,
        after: float,
    ) -> None:
        while number < len(batches) and not worker.claims.begin(lease.attempt, batches[number]):
            number += 1
        seconds = worker.seconds * len(batches[number]) if number < len(batches) else 0.0
        self._at(after + seconds, ("step", worker.name, lease, batches, number))

    def _step(
        self,
        worker: SimulatedWorker,
        lease: Lease,
        batches: list[tuple[int, ...]],
        number: int,
    ) -> list[Event]:
        if number >= len(batches):
            worker.leases.popleft()
            worker.claims.forget(lease.attempt)
            if worker.leases:
                self._begin(worker)
            return [LeaseEnded(worker.name, lease, drained=False)]
        batch = batches[number]
        worker.made += len(batch)
        results = tuple(Result(i, batch, "planned", NOW, f"{lease.attempt}/{i}") for i in batch)
        self._advance(worker, lease, batches, number + 1, 0.0)
        return [Progress(worker.name, INFO, lease, Finished(results))]

    def _at(self, after: float, what: object) -> None:
        heapq.heappush(self._heap, (self.now + after, next(self._order), what))
