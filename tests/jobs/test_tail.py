"""The end of a job: no worker waits for another one, shown with the real scheduler and clock."""

from __future__ import annotations

import random

import pytest
from driver_loop import Driven, drive, sample
from simulated_executor import INFO, SimulatedExecutor

from jobs.dispatcher import Dispatcher
from jobs.executor import Planned, Progress
from jobs.plan import new_plan
from jobs.scheduler import Scheduler, Work


def simulate(
    executor: SimulatedExecutor,
    total: int,
    *,
    shard_size: int = 64,
    kills: dict[float, str] | None = None,
) -> Driven:
    """Make all samples, each once, while workers die at their times."""
    due = sorted((kills or {}).items())

    def kill(scheduler: Scheduler) -> None:
        while due and executor.now >= due[0][0]:
            executor.kill(due.pop(0)[1])

    return drive(executor, total, shard_size=shard_size, clock=lambda: executor.now, on_poll=kill)


def ideal(seconds: list[float], total: int) -> float:
    return total / sum(1 / each for each in seconds)


@pytest.mark.parametrize("workers", [8, 64, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch", [1, 4])
def test_one_slow_worker_costs_less_than_three_percent(workers: int, batch: int) -> None:
    seconds = [0.75] * (workers - 1) + [2.25]
    total = 200 * workers
    executor = SimulatedExecutor(seconds, batch=batch)
    simulate(executor, total)
    assert ideal(seconds, total) / executor.now >= 0.97


def test_without_division_it_would_cost_a_third(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure above can tell."""
    monkeypatch.setattr(Dispatcher, "_divide", lambda self: False)
    seconds = [0.75] * 63 + [2.25]
    executor = SimulatedExecutor(seconds)
    simulate(executor, 200 * 64)
    assert ideal(seconds, 200 * 64) / executor.now < 0.8


@pytest.mark.parametrize("workers", [8, 64, pytest.param(512, marks=pytest.mark.slow)])
def test_workers_that_start_late_and_vary(workers: int) -> None:
    draw = random.Random(7)
    seconds = [0.75 * draw.uniform(0.9, 1.3) for _ in range(workers)]
    load = [draw.uniform(25, 35) for _ in range(workers)]
    total = 200 * workers
    executor = SimulatedExecutor(seconds, load=load)
    simulate(executor, total)
    # All begin late, so that the best there is ends when as much as possible is made by then.
    low, high = 0.0, 1e6
    for _ in range(60):
        end = (low + high) / 2
        made = sum(max(0.0, end - late) / each for late, each in zip(load, seconds, strict=True))
        low, high = (end, high) if made < total else (low, end)
    assert low / executor.now >= 0.98, "cold start taken as given"


def test_the_last_batch_of_a_very_slow_worker_is_made_by_another() -> None:
    executor = SimulatedExecutor([1.0, 1.0, 1.0, 200.0])
    driven = simulate(executor, 60, shard_size=8)
    assert executor.now < 30
    assert executor.workers["w3"].made == 0
    assert len(driven.copies) == 1


def test_a_slow_worker_takes_nothing_that_another_ends_earlier() -> None:
    executor = SimulatedExecutor([1.0, 50.0], load=[0.0, 10.0])
    simulate(executor, 20, shard_size=20)
    assert executor.now <= 21
    assert executor.workers["w1"].made == 0


def test_few_samples_for_many_workers() -> None:
    executor = SimulatedExecutor([1.0] * 16)
    simulate(executor, 16, shard_size=64)
    assert executor.now < 3, "one shard, divided until each worker has a sample"


def test_nothing_is_made_twice_among_equals() -> None:
    executor = SimulatedExecutor([1.0] * 16)
    assert simulate(executor, 16 * 50).copies == {}
    assert sum(worker.made for worker in executor.workers.values()) == 16 * 50


@pytest.mark.parametrize("seed", range(20))
def test_workers_that_die_while_leases_are_divided(seed: int) -> None:
    draw = random.Random(seed)
    workers = draw.randint(3, 12)
    seconds = [draw.choice([0.5, 1.0, 1.0, 3.0]) for _ in range(workers)]
    executor = SimulatedExecutor(seconds, batch=draw.choice([1, 2, 4]))
    total = draw.randint(20, 200)
    names = [f"w{i}" for i in range(workers - 1)]
    draw.shuffle(names)
    end = ideal(seconds, total)
    kills = {draw.uniform(0.3 * end, 1.1 * end): name for name in names[: workers // 2]}
    simulate(executor, total, shard_size=draw.choice([8, 32, 64]), kills=kills)


def test_batches_that_a_worker_kept_are_not_asked_for_again():
    """Where results come a lease at a time, nothing else tells that a batch has begun."""
    (shard,) = new_plan(0, 8, 8).shards()
    scheduler = Scheduler([Work(shard)], max_attempts=3, placeholder=sample)
    lease = scheduler.next()
    assert lease is not None
    scheduler.assigned(lease, "busy")
    batches = tuple((i, i + 1) for i in range(0, 8, 2))
    planned = Planned(tuple(sample(i) for i in range(8)), batches)
    scheduler.progress(Progress("busy", INFO, lease, planned))
    asked: list[int] = []
    for _ in range(10):
        request = scheduler.split("idle")
        if request is None:
            break
        assert not set(request[1]) & set(asked)
        asked += request[1]
        scheduler.trimmed(lease, ())
    else:
        raise AssertionError("asked without end")
    assert 0 < len(asked) < 8
