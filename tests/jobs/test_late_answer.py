"""Real Ray: a worker's answer to a question for parts of its lease overtaken by the lease's end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import ray
from driver_loop import drive
from sleeping_actor import SleepingActor
from sleeping_executor import SETTINGS, sleeping_executor

from jobs.cluster import connected
from jobs.executor import LeaseEnded, Trimmed

pytestmark = [pytest.mark.ray, pytest.mark.long]


class LateActor(SleepingActor):
    """Gives up at once what it is asked for, and is slow to say so."""

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def trim(self, attempt: str, indices: Sequence[int]) -> tuple[int, ...]:
        given = self.claims.give_up(attempt, indices)
        time.sleep(2)
        return given


def test_what_was_given_up_is_made_by_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))
    with connected(num_cpus=2):
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        executor = sleeping_executor(2, 0.2, actor=LateActor)
        executor.start()
        try:
            executor.load(SETTINGS)
            events = drive(executor, 8, shard_size=8, together=True).events  # each sample once
        finally:
            executor.stop()
    given = next(event for event in events if isinstance(event, Trimmed) and event.indices)
    ended = [e for e in events if isinstance(e, LeaseEnded) and e.worker == given.worker]
    assert events.index(given) < events.index(ended[0])
