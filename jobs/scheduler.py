"""The pull scheduler: shards become leases, results become commits, lost workers cost nothing.

Pure logic without storage or Ray, and with a clock that may be simulated, so that a test can drive
it through any history. The driver asks `next` for a lease whenever a worker has room, tells it
what came back, and writes the commits that `take_commits` hands out. When all is handed out and a
worker is idle, `split` says what it can take over (`splitting`).
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Literal

from jobs.errors import ErrorType
from jobs.executor import Finished, Lease, Planned, Progress, Result, WorkerInfo, WorkerLost
from jobs.open_shard import Commit, OpenShard, Outcome, Work
from jobs.pace import Pace
from jobs.plan import Sample, Shard
from jobs.splitting import Held, Split, choose_split

__all__ = ["Commit", "Outcome", "Scheduler", "Work"]

_NONCE_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_SPLIT_AFTER = 2  # kills by one shard before it is split


class Scheduler:
    """Hands out leases over `work` and gathers what comes back.

    Args:
        work: what is to be made, read lazily; at most one item for each (shard, revision).
        max_attempts: `run.max_shard_attempts`: a sample that was with a worker that died so many
            times, in the end alone, is recorded as failed.
        placeholder: stands for a sample that no worker could even plan.
        nonce: random end of an attempt's name.
        clock: seconds, for the pace of workers.
    """

    def __init__(
        self,
        work: Iterable[Work],
        *,
        max_attempts: int,
        placeholder: Callable[[int], Sample],
        nonce: Callable[[], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work: Iterator[Work] = iter(work)
        self._max_attempts = max_attempts
        self._placeholder = placeholder
        self._nonce = nonce or (lambda: "".join(secrets.choice(_NONCE_LETTERS) for _ in range(8)))
        self._again: deque[Lease] = deque()
        self._ahead: deque[Work] = deque()
        self._open: dict[int, deque[OpenShard]] = {}  # by shard; the first is under way
        self._leased: dict[str, Held] = {}  # by attempt
        self._doubled: set[str] = set()  # attempts that make the same batch
        self._copies: dict[str, str] = {}  # of them the later one, and which it doubles
        self.pace = Pace(clock)
        self._commits: deque[Commit] = deque()
        self.num_ended = 0
        self.num_failed = 0

    @property
    def num_leased(self) -> int:
        """Leases that workers hold."""
        return len(self._leased)

    @property
    def num_asked(self) -> int:
        """Leases that were asked to give something up, and have not answered."""
        return sum(held.is_asked for held in self._leased.values())

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
        while self._again:
            lease = self._again.popleft()
            if self._left(lease):  # not made by another one meanwhile
                break
        else:
            if not self.remaining(1):
                return None
            work = self._ahead.popleft()
            queue = self._open.setdefault(work.shard.id, deque())
            indices = None if work.indices is None else tuple(sorted(work.indices))
            lease = Lease(work.shard, self._attempt(work.shard), indices, seeds=work.seeds)
            queue.append(OpenShard(work, set(lease.wanted)))
        self._leased[lease.attempt] = Held(lease, left=len(lease.wanted))
        return lease

    def assigned(self, lease: Lease, worker: str) -> None:
        """A worker was given a lease."""
        held = self._leased[lease.attempt]
        held.worker = worker
        others = [h for h in self._leased.values() if h.worker == worker and h is not held]
        if not others:
            held.is_running = True
            self.pace.begun(worker)

    def split(self, thief: str) -> tuple[Lease, tuple[int, ...]] | None:
        """What an idle worker should take over, when `next` has nothing for it.

        Returns:
            A lease and samples that its worker is to be asked for (`Executor.trim`); None where
            there are none, or where they can be leased at once, as `next` then does.
        """
        split = choose_split(
            self._leased.values(), lambda held: self._left(held.lease), thief, self.pace
        )
        if split is None:
            return None
        if split.is_copy:
            self._copy(split)
            return None
        split.held.is_asked = True
        split.held.asked = frozenset(split.indices)
        return split.held.lease, split.indices

    def trimmed(self, lease: Lease, indices: Sequence[int]) -> None:
        """A worker has given up samples of a lease, which become a lease of their own."""
        held = self._leased.get(lease.attempt)
        if held is None:
            return
        held.is_asked = False
        given = set(indices)
        held.begun |= held.asked - given
        taken = given & {index for batch in self._left(held.lease) for index in batch}
        if taken:
            kept = tuple(index for index in held.lease.wanted if index not in given)
            held.lease = replace(held.lease, indices=kept)
            held.left -= len(taken)
            self._again.append(self._renew(lease, tuple(sorted(taken)), lease.kills))

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
            self._leased[event.lease.attempt].is_planned = True
            self.pace.begun(event.worker)
            return
        assert isinstance(message, Finished)
        self.pace.finished(event.worker, len(message.results))
        for result in message.results:
            self._record(shard, event.lease, result, event.worker, event.info)
        self._commit_if_whole(shard)

    def ended(self, lease: Lease, *, drained: bool = False) -> None:
        """A worker is done with a lease. What it left out because it drained is leased again."""
        held = self._leased.pop(lease.attempt, None)
        if held is None:
            return
        self._begin_next(held.worker)
        left = self._left_alone(held.lease) if drained else ()
        if left:
            self._again.appendleft(self._renew(lease, left, lease.kills))

    def lost(self, event: WorkerLost) -> list[str]:
        """Lease a lost worker's samples again, in smaller pieces if they keep killing.

        Returns:
            Words for what was decided, for the log.
        """
        words = []
        for queued in event.queued:
            held = self._leased.pop(queued.attempt, None)
            if held is not None and held.lease.wanted:
                lease = held.lease
                self._again.appendleft(self._renew(lease, lease.indices, lease.kills))
                words.append(f"shard {lease.shard.id} had not begun: leased again")
        held = None if event.running is None else self._leased.pop(event.running.attempt, None)
        if held is None:
            return words
        lease = held.lease
        shard = self._of(lease)
        if shard is None:  # it died between its last result and saying that it was done
            return words
        left = self._left_alone(lease)
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
                self._commits.extend(shard.whole_batches())
        self._open.clear()

    def take_commits(self) -> list[Commit]:
        """Commits that became possible since the last call."""
        commits = list(self._commits)
        self._commits.clear()
        return commits

    def _left(self, lease: Lease) -> list[tuple[int, ...]]:
        """What is not made yet of a lease: by batch where they are known, in the order of work."""
        shard = self._of(lease)
        return [] if shard is None else shard.left(lease.wanted)

    def _left_alone(self, lease: Lease) -> tuple[int, ...]:
        """What is not made yet of a lease that is held no more, nor promised by another one."""
        others = [held.lease for held in self._leased.values()] + list(self._again)
        elsewhere = {i for other in others if other.shard == lease.shard for i in other.wanted}
        left = {i for batch in self._left(lease) for i in batch} - elsewhere
        return tuple(sorted(left))

    def _copy(self, split: Split) -> None:
        """Lease a batch that is under way a second time; its first result counts."""
        split.held.is_copied = True
        lease = split.held.lease
        copy = self._renew(lease, split.indices, lease.kills)
        self._doubled |= {lease.attempt, copy.attempt}
        self._copies[copy.attempt] = lease.attempt
        self._again.append(copy)

    def copy_of(self, attempt: str) -> str | None:
        """The attempt whose samples this one makes a second time, if it does."""
        return self._copies.get(attempt)

    def _begin_next(self, worker: str) -> None:
        """The next of a worker's leases is its first one now."""
        for held in self._leased.values():
            if held.worker == worker:
                held.is_running = True
                self.pace.begun(worker)
                return

    def _pieces(
        self, shard: OpenShard, lease: Lease, left: Sequence[int], kills: int
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

    def _attempt(self, shard: Shard) -> str:
        return f"{shard.id:08d}-{self._nonce()}"

    def _renew(
        self, lease: Lease, indices: tuple[int, ...] | None, kills: int, *, isolate: bool = False
    ) -> Lease:
        attempt, isolate = self._attempt(lease.shard), lease.isolate or isolate
        return Lease(lease.shard, attempt, indices, isolate, kills, lease.seeds)

    def _of(self, lease: Lease) -> OpenShard | None:
        """The open shard that wants a lease's samples; None if it is committed already."""
        wanted = set(lease.wanted)
        queue = self._open.get(lease.shard.id, ())
        return next((shard for shard in queue if wanted <= shard.wanted), None)

    def _record(
        self, shard: OpenShard, lease: Lease, result: Result, worker: str, info: WorkerInfo | None
    ) -> None:
        if result.index in shard.outcomes or result.index not in shard.wanted:
            return
        sample = shard.samples.get(result.index)
        if sample is None:
            sample = self._placeholder(result.index)
            moved = shard.work.seeds.get(result.index)
            sample = sample if moved is None else moved.into(sample)
        shard.outcomes[result.index] = Outcome(sample, result, lease, worker, info)
        held = self._leased.get(lease.attempt)
        if held is not None:
            held.left -= 1
        self.num_ended += 1
        self.num_failed += result.error_type is not None

    def _fail(
        self,
        shard: OpenShard,
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

    def _commit_if_whole(self, shard: OpenShard) -> None:
        commit = shard.whole()
        if commit is None:
            return
        self._commits.append(commit)
        queue = self._open[shard.work.shard.id]
        queue.remove(shard)
        if not queue:
            del self._open[shard.work.shard.id]
        for attempt in self._doubled & self._leased.keys():
            if self._leased[attempt].lease.shard == shard.work.shard:
                del self._leased[attempt]  # its worker is late with what is done
