"""The pull scheduler: shards become leases, results become commits, lost workers cost nothing.

Pure logic without clock, storage or Ray, so that a test can drive it through any history. The
driver asks `next` for a lease whenever a worker has room, tells it what came back, and writes
the commits that `take_commits` hands out.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from jobs.errors import ErrorType
from jobs.executor import Finished, Lease, Planned, Progress, Result, WorkerInfo, WorkerLost
from jobs.plan import Sample, Shard

_NONCE_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_SPLIT_AFTER = 2  # kills by one shard before it is split


@dataclass(frozen=True, slots=True)
class Work:
    """Rows of a shard that are to be made.

    Args:
        indices: which; None for all.
        revision: 0 for rows made for the first time, else above all revisions of the shard.
        failed_before: those of them whose current row is a failed one.
    """

    shard: Shard
    revision: int = 0
    indices: frozenset[int] | None = None
    failed_before: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.shard) if self.indices is None else len(self.indices)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A sample with what became of it and where."""

    sample: Sample
    result: Result
    lease: Lease
    worker: str
    info: WorkerInfo | None


@dataclass(frozen=True, slots=True)
class Commit:
    """Rows of whole batches of one shard that can be committed."""

    work: Work
    first_batch: int
    last_batch: int
    num_batches: int
    outcomes: tuple[Outcome, ...]  # in index order

    @property
    def failed_before(self) -> int:
        """How many of the rows replace failed ones."""
        return sum(o.result.index in self.work.failed_before for o in self.outcomes)


@dataclass(slots=True)
class _Open:
    """A shard under way."""

    work: Work
    wanted: set[int]
    samples: dict[int, Sample] = field(default_factory=dict)
    batches: tuple[tuple[int, ...], ...] = ()  # of the whole shard, once a worker planned it
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def batch_of(self) -> dict[int, int]:
        return {index: n for n, batch in enumerate(self.batches) for index in batch}


class Scheduler:
    """Hands out leases over `work` and gathers what comes back.

    Args:
        work: what is to be made, read lazily; at most one item for each (shard, revision).
        max_attempts: `run.max_shard_attempts`: a sample that was with a worker that died so many
            times, in the end alone, is recorded as failed.
        placeholder: stands for a sample that no worker could even plan.
        nonce: random end of an attempt's name.
    """

    def __init__(
        self,
        work: Iterable[Work],
        *,
        max_attempts: int,
        placeholder: Callable[[int], Sample],
        nonce: Callable[[], str] | None = None,
    ) -> None:
        self._work: Iterator[Work] = iter(work)
        self._max_attempts = max_attempts
        self._placeholder = placeholder
        self._nonce = nonce or (lambda: "".join(secrets.choice(_NONCE_LETTERS) for _ in range(8)))
        self._again: deque[Lease] = deque()
        self._ahead: deque[Work] = deque()
        self._open: dict[int, deque[_Open]] = {}  # by shard; the first is under way
        self._leased: dict[str, Lease] = {}  # by attempt
        self._commits: deque[Commit] = deque()
        self.num_ended = 0
        self.num_failed = 0

    @property
    def num_leased(self) -> int:
        """Leases that workers hold."""
        return len(self._leased)

    def remaining(self, at_most: int) -> int:
        """How many leases could be handed out now, counted up to `at_most`."""
        while len(self._again) + len(self._ahead) < at_most:
            work = next(self._work, None)
            if work is None:
                break
            self._ahead.append(work)
        return min(at_most, len(self._again) + len(self._ahead))

    def next(self) -> Lease | None:
        """A lease for a worker with room, or None when all work is handed out."""
        if self._again:
            lease = self._again.popleft()
        elif self.remaining(1):
            work = self._ahead.popleft()
            queue = self._open.setdefault(work.shard.id, deque())
            indices = None if work.indices is None else tuple(sorted(work.indices))
            lease = self._lease(work.shard, indices)
            queue.append(_Open(work, set(lease.wanted)))
        else:
            return None
        self._leased[lease.attempt] = lease
        return lease

    def progress(self, event: Progress) -> None:
        """Take in a worker's message about a lease."""
        if event.lease.attempt not in self._leased:
            return  # from a worker that was given up; its successor's rows count
        shard = self._of(event.lease)
        if shard is None:
            return
        message = event.message
        if isinstance(message, Planned):
            shard.samples |= {s.index: s for s in message.samples}
            if not event.lease.isolate:
                shard.batches = message.batches
            return
        assert isinstance(message, Finished)
        for result in message.results:
            self._record(shard, event.lease, result, event.worker, event.info)
        self._commit_if_whole(shard)

    def ended(self, lease: Lease) -> None:
        """A worker is done with a lease. What it left out (it drained) stays undone."""
        self._leased.pop(lease.attempt, None)

    def lost(self, event: WorkerLost) -> list[str]:
        """Lease a lost worker's samples again, in smaller pieces if they keep killing.

        Returns:
            Words for what was decided, for the log.
        """
        words = []
        for lease in event.queued:
            if self._leased.pop(lease.attempt, None) is not None:
                self._again.appendleft(self._renew(lease, lease.indices, lease.kills))
                words.append(f"shard {lease.shard.id} had not begun: leased again")
        lease_or_none = event.running
        if lease_or_none is None or self._leased.pop(lease_or_none.attempt, None) is None:
            return words
        lease = lease_or_none
        shard = self._of(lease)
        if shard is None:  # it died between its last result and saying that it was done
            return words
        left = [i for i in lease.wanted if i in shard.wanted and i not in shard.outcomes]
        kills = lease.kills + 1
        if not left:
            return words
        pieces = self._pieces(shard, lease, left, kills)
        if pieces is None:
            message = (
                f"sample {left[0]} ended its worker {kills} times, at last alone: {event.reason}"
            )
            self._fail(shard, lease, left, event.error_type, message, event)
            words.append(message)
        else:
            self._again.extendleft(reversed(pieces))
            words.append(
                f"shard {lease.shard.id} lost its worker ({kills}): "
                f"{len(left)} samples leased again as {len(pieces)} leases"
            )
        return words

    def flush(self) -> None:
        """Make commits of the whole batches that are done in shards that are not."""
        for queue in self._open.values():
            for shard in queue:
                self._commit_partly(shard)
        self._open.clear()

    def take_commits(self) -> list[Commit]:
        """Commits that became possible since the last call."""
        commits = list(self._commits)
        self._commits.clear()
        return commits

    def _pieces(
        self, shard: _Open, lease: Lease, left: Sequence[int], kills: int
    ) -> list[Lease] | None:
        """Leases for what a lost worker left; None if it is one sample that is to be given up."""
        if kills < min(_SPLIT_AFTER, self._max_attempts):
            return [self._renew(lease, tuple(left), kills)]
        if lease.isolate:
            if len(left) > 1:
                return [self._renew(lease, (i,), kills) for i in left]
            return None if kills >= self._max_attempts else [self._renew(lease, (left[0],), kills)]
        rest = set(left)
        groups = [tuple(i for i in batch if i in rest) for batch in shard.batches]
        groups = [g for g in groups if g]
        if len(groups) > 1 and sum(map(len, groups)) == len(left):
            return [self._renew(lease, g, kills) for g in groups]
        return [self._renew(lease, (i,), kills, isolate=True) for i in left]

    def _lease(self, shard: Shard, indices: tuple[int, ...] | None) -> Lease:
        return Lease(shard, f"{shard.id:08d}-{self._nonce()}", indices)

    def _renew(
        self, lease: Lease, indices: tuple[int, ...] | None, kills: int, *, isolate: bool = False
    ) -> Lease:
        attempt = f"{lease.shard.id:08d}-{self._nonce()}"
        return Lease(lease.shard, attempt, indices, lease.isolate or isolate, kills)

    def _of(self, lease: Lease) -> _Open | None:
        """The open shard that wants a lease's samples; None if it is committed already."""
        wanted = set(lease.wanted)
        queue = self._open.get(lease.shard.id, ())
        return next((shard for shard in queue if wanted <= shard.wanted), None)

    def _record(
        self, shard: _Open, lease: Lease, result: Result, worker: str, info: WorkerInfo | None
    ) -> None:
        if result.index in shard.outcomes or result.index not in shard.wanted:
            return
        sample = shard.samples.get(result.index) or self._placeholder(result.index)
        shard.outcomes[result.index] = Outcome(sample, result, lease, worker, info)
        self.num_ended += 1
        self.num_failed += result.error_type is not None

    def _fail(
        self,
        shard: _Open,
        lease: Lease,
        indices: Sequence[int],
        error_type: ErrorType | Literal["worker_died", "worker_stalled"],
        message: str,
        event: WorkerLost,
    ) -> None:
        for index in indices:
            result = Result(
                index=index,
                batch=(index,),
                batch_mode="single",
                created_at=datetime.now(UTC),
                error_type=error_type,
                error_message=message[:2000],
            )
            self._record(shard, lease, result, event.worker, event.info)
        self._commit_if_whole(shard)

    def _commit_if_whole(self, shard: _Open) -> None:
        if len(shard.outcomes) < len(shard.wanted):
            return
        self._commit(shard, sorted(shard.outcomes))
        queue = self._open[shard.work.shard.id]
        queue.remove(shard)
        if not queue:
            del self._open[shard.work.shard.id]

    def _commit_partly(self, shard: _Open) -> None:
        """Whole batches only, in runs of neighbours, so that a name tells which."""
        if not shard.batches and shard.outcomes:  # all made alone: each is a batch of its own
            self._commit(shard, sorted(shard.outcomes))
        run: list[int] = []
        for batch in shard.batches:
            wanted = [i for i in batch if i in shard.wanted]
            if wanted and all(i in shard.outcomes for i in wanted):
                run.extend(wanted)
            elif wanted and run:
                self._commit(shard, sorted(run))
                run = []
        if run:
            self._commit(shard, sorted(run))

    def _commit(self, shard: _Open, indices: Sequence[int]) -> None:
        batch_of = shard.batch_of()
        numbers = [batch_of.get(i, 0) for i in indices]
        self._commits.append(
            Commit(
                work=shard.work,
                first_batch=min(numbers),
                last_batch=max(numbers),
                num_batches=max(1, len(shard.batches)),
                outcomes=tuple(shard.outcomes[i] for i in indices),
            )
        )
