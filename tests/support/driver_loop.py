"""The driver's loop without storage, for executors whose workers only pretend to make images."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from jobs.dispatcher import Dispatcher
from jobs.executor import (
    Event,
    Executor,
    Lease,
    LeaseEnded,
    Progress,
    Trimmed,
    WorkerLost,
)
from jobs.open_shard import Commit, Work
from jobs.plan import Sample, new_plan
from jobs.scheduler import Scheduler


def sample(index: int) -> Sample:
    return Sample(index, index, f"prompt {index}", "", index, 16, 16)


@dataclass
class Driven:
    """What came of it.

    Args:
        seconds: by the given clock, from when the first lease could be handed out.
        events: all but results.
        own_seconds: CPU time of this thread outside of `Executor.poll`.
        leases: how many were handed out.
        copies: for attempts that made samples a second time, whose.
    """

    commits: list[Commit] = field(default_factory=list)
    seconds: float = 0.0
    events: list[Event] = field(default_factory=list)
    own_seconds: float = 0.0
    leases: int = 0
    copies: dict[str, str] = field(default_factory=dict)


def drive(
    executor: Executor,
    total: int,
    *,
    shard_size: int = 64,
    clock: Callable[[], float] = time.monotonic,
    together: bool = False,
    on_poll: Callable[[Scheduler], None] = lambda scheduler: None,
) -> Driven:
    """Lease samples until all are made; each is committed exactly once, or an assertion fails.

    Args:
        together: begin when all workers are ready, not with the first.
        on_poll: called after each look at what happened.
    """
    names = itertools.count()
    scheduler = Scheduler(
        (Work(shard) for shard in new_plan(0, total, shard_size).shards()),
        max_attempts=3,
        placeholder=sample,
        nonce=lambda: f"{next(names):08d}",
        clock=clock,
    )
    driven = Driven()

    def count(lease: Lease, worker: str) -> None:
        driven.leases += 1
        original = scheduler.copy_of(lease.attempt)
        if original is not None:
            driven.copies[lease.attempt] = original

    dispatcher = Dispatcher(scheduler, executor, on_lease=count)
    begun: float | None = None
    resumed = time.thread_time()
    while True:
        if begun is None and (not together or len(executor.idle()) == executor.num_workers):
            begun = clock()
        if begun is not None:
            dispatcher.hand_out()
            if scheduler.num_leased == 0 and scheduler.remaining(1) == 0:
                break
        driven.own_seconds += time.thread_time() - resumed
        events = executor.poll(0.5)
        resumed = time.thread_time()
        for event in events:
            match event:
                case Progress():
                    scheduler.progress(event)
                    continue
                case LeaseEnded():
                    scheduler.ended(event.lease, drained=event.drained)
                case Trimmed():
                    scheduler.trimmed(event.lease, event.indices)
                case WorkerLost():
                    scheduler.lost(event)
            driven.events.append(event)
        on_poll(scheduler)
        driven.commits += scheduler.take_commits()
    driven.seconds = clock() - begun
    made = Counter(o.result.index for commit in driven.commits for o in commit.outcomes)
    assert made == Counter(range(total)), "each index once"
    return driven
