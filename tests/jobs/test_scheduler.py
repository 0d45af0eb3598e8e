"""The scheduler driven by hand: every history ends with each wanted index recorded once."""

import random
from datetime import UTC, datetime
from itertools import count

import pytest
from driver_loop import sample

from jobs.executor import Finished, Lease, Planned, Progress, Result, WorkerInfo, WorkerLost
from jobs.plan import new_plan
from jobs.scheduler import Commit, Scheduler, Work

INFO = WorkerInfo(node="n", device="cpu", device_type="cpu", memory=1)


def scheduler_for(total: int, shard_size: int, *, work=None, max_attempts: int = 3) -> Scheduler:
    names = count()
    plan = new_plan(0, total, shard_size)
    return Scheduler(
        work if work is not None else (Work(shard) for shard in plan.shards()),
        max_attempts=max_attempts,
        placeholder=sample,
        nonce=lambda: f"{next(names):06d}",
    )


class FakeWorker:
    """Plans batches of `batch` neighbours, dies on the poisoned index, else makes everything."""

    def __init__(
        self, scheduler: Scheduler, *, batch: int = 2, poison: frozenset[int] = frozenset()
    ):
        self.scheduler, self.batch, self.poison = scheduler, batch, poison

    def work(self, lease: Lease, *, stop_after: int | None = None) -> bool:
        """True if it lived to the end of the lease."""
        shard = lease.shard
        indices = list(lease.wanted if lease.isolate else range(shard.start, shard.stop))
        size = 1 if lease.isolate else self.batch
        batches = [tuple(indices[i : i + size]) for i in range(0, len(indices), size)]
        planned = Planned(tuple(sample(i) for i in indices), tuple(batches))
        self.scheduler.progress(Progress("w", INFO, lease, planned))
        for number, batch in enumerate(batches):
            wanted = [i for i in batch if i in set(lease.wanted)]
            if not wanted:
                continue
            if stop_after is not None and number >= stop_after:
                self.scheduler.ended(lease)
                return True
            if self.poison & set(batch):
                self.scheduler.lost(WorkerLost("w", INFO, lease, (), "worker_died", "gone", True))
                return False
            mode = "single" if lease.isolate else "planned"
            results = tuple(Result(i, batch, mode, datetime.now(UTC), f"{i}.png") for i in wanted)
            self.scheduler.progress(Progress("w", INFO, lease, Finished(results)))
        self.scheduler.ended(lease)
        return True


def drain(scheduler: Scheduler, worker: FakeWorker, limit: int = 1000) -> list[Commit]:
    commits = []
    for _ in range(limit):
        lease = scheduler.next()
        if lease is None:
            break
        worker.work(lease)
        commits += scheduler.take_commits()
    assert scheduler.num_leased == 0
    return commits


def outcomes(commits: list[Commit]) -> dict[int, Result]:
    found = {}
    for commit in commits:
        for outcome in commit.outcomes:
            assert outcome.result.index not in found, "an index was committed twice"
            found[outcome.result.index] = outcome.result
    return found


def test_every_shard_becomes_one_commit_of_all_its_batches():
    scheduler = scheduler_for(10, 4)
    commits = drain(scheduler, FakeWorker(scheduler))
    assert [(c.work.shard.id, c.first_batch, c.last_batch, c.num_batches) for c in commits] == [
        (0, 0, 1, 2),
        (1, 0, 1, 2),
        (2, 0, 0, 1),
    ]
    assert sorted(outcomes(commits)) == list(range(10))


def test_sample_that_kills_its_worker_is_found_and_the_rest_is_made():
    scheduler = scheduler_for(16, 8)
    commits = drain(scheduler, FakeWorker(scheduler, poison=frozenset({5})))
    found = outcomes(commits)
    assert sorted(found) == list(range(16))
    assert {i for i, r in found.items() if r.error_type} == {5}
    assert found[5].error_type == "worker_died"
    assert found[5].batch_mode == "single"
    # its neighbour in the batch was made alone, all others as planned
    assert found[4].batch_mode == "single"
    assert {i for i, r in found.items() if r.batch_mode == "planned"} == set(range(16)) - {4, 5}


def test_worker_that_dies_before_planning_costs_only_the_poisoned_samples():
    scheduler = scheduler_for(4, 4)
    poison, found = {2}, {}
    for _ in range(100):
        lease = scheduler.next()
        if lease is None:
            break
        if poison & set(lease.wanted):
            scheduler.lost(WorkerLost("w", INFO, lease, (), "worker_died", "gone", True))
        else:
            FakeWorker(scheduler).work(lease)
        found |= outcomes(scheduler.take_commits())
    assert sorted(found) == [0, 1, 2, 3]
    assert [found[i].error_type for i in range(4)] == [None, None, "worker_died", None]


def test_lost_worker_costs_no_finished_batch():
    scheduler = scheduler_for(8, 8)
    first = scheduler.next()
    worker = FakeWorker(scheduler, poison=frozenset({4}))
    assert not worker.work(first)
    again = scheduler.next()
    assert again.indices == (4, 5, 6, 7)  # batches 0 and 1 had come back
    assert again.attempt != first.attempt
    worker.poison = frozenset()
    worker.work(again)
    (commit,) = scheduler.take_commits()
    assert len(commit.outcomes) == 8


def test_queued_lease_of_a_lost_worker_counts_no_kill():
    scheduler = scheduler_for(4, 2)
    running, queued = scheduler.next(), scheduler.next()
    lost = WorkerLost("w", INFO, running, (queued,), "worker_stalled", "hung", True)
    scheduler.lost(lost)
    kills = {lease.shard.id: lease.kills for lease in (scheduler.next(), scheduler.next())}
    assert kills == {0: 1, 1: 0}


def test_results_of_a_worker_that_was_given_up_are_not_taken():
    scheduler = scheduler_for(2, 2)
    old = scheduler.next()
    scheduler.lost(WorkerLost("w", INFO, old, (), "worker_stalled", "hung", True))
    new = scheduler.next()
    FakeWorker(scheduler).work(old)  # woke up
    assert scheduler.take_commits() == []
    FakeWorker(scheduler).work(new)
    (commit,) = scheduler.take_commits()
    assert {o.lease.attempt for o in commit.outcomes} == {new.attempt}


def test_drained_shard_commits_its_whole_batches_only():
    scheduler = scheduler_for(8, 8)
    FakeWorker(scheduler).work(scheduler.next(), stop_after=3)
    assert scheduler.take_commits() == []
    scheduler.flush()
    (commit,) = scheduler.take_commits()
    assert (commit.first_batch, commit.last_batch, commit.num_batches) == (0, 2, 4)
    assert [o.result.index for o in commit.outcomes] == [0, 1, 2, 3, 4, 5]


def test_redone_rows_alone_are_committed_under_their_revision():
    shard = new_plan(0, 8, 8).shard(0)
    work = Work(shard, 2, frozenset({3, 6}), frozenset({6}))
    scheduler = scheduler_for(8, 8, work=[work])
    (commit,) = drain(scheduler, FakeWorker(scheduler))
    assert [o.result.index for o in commit.outcomes] == [3, 6]
    assert commit.work.revision == 2
    assert commit.failed_before == 1
    # made together with the neighbours of their planned batches
    assert [o.result.batch for o in commit.outcomes] == [(2, 3), (6, 7)]


@pytest.mark.parametrize("seed", range(30))
def test_random_histories_account_for_every_index(seed):
    rng = random.Random(seed)
    total, shard_size = rng.randint(1, 40), rng.randint(1, 9)
    poison = frozenset(rng.sample(range(total), min(total, rng.randint(0, 3))))
    scheduler = scheduler_for(total, shard_size, max_attempts=rng.randint(1, 4))
    found = {}
    worker = FakeWorker(scheduler, batch=rng.randint(1, 5), poison=poison)
    for _ in range(10_000):
        lease = scheduler.next()
        if lease is None:
            break
        if rng.random() < 0.1 and not poison:
            scheduler.lost(WorkerLost("w", INFO, lease, (), "worker_died", "node gone", True))
        else:
            worker.work(lease)
        found |= outcomes(scheduler.take_commits())
    assert sorted(found) == list(range(total))
    if poison:
        assert {i for i, r in found.items() if r.error_type} == poison


def test_worker_that_dies_between_its_last_result_and_its_end_costs_nothing():
    scheduler = scheduler_for(2, 2)
    lease = scheduler.next()
    worker = FakeWorker(scheduler)
    ended, scheduler.ended = scheduler.ended, lambda _: None
    worker.work(lease)
    scheduler.ended = ended
    assert len(scheduler.take_commits()) == 1
    assert scheduler.lost(WorkerLost("w", INFO, lease, (), "worker_died", "gone", True)) == []
    assert scheduler.num_leased == 0
    assert scheduler.next() is None


def test_drain_keeps_samples_that_were_made_alone_in_a_shard_nobody_planned():
    scheduler = scheduler_for(3, 3)
    for _ in range(2):
        lost = WorkerLost("w", INFO, scheduler.next(), (), "worker_died", "gone", True)
        scheduler.lost(lost)
    FakeWorker(scheduler).work(scheduler.next())
    scheduler.flush()
    (commit,) = scheduler.take_commits()
    assert [o.result.index for o in commit.outcomes] == [0]
