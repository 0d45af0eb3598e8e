"""Shards under way: what is wanted of them, what came back, and what of it can be committed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from jobs.executor import Lease, Result, WorkerInfo
from jobs.moved_seeds import MovedSeed
from jobs.plan import Sample, Shard


@dataclass(frozen=True, slots=True)
class Work:
    """Rows of a shard that are to be made.

    Args:
        indices: which; None for all.
        revision: 0 for rows made for the first time, else above all revisions of the shard.
        failed_before: those of them whose current row is a failed one.
        seeds: of samples of the shard that are not the plan's, by index.
    """

    shard: Shard
    revision: int = 0
    indices: frozenset[int] | None = None
    failed_before: frozenset[int] = frozenset()
    seeds: Mapping[int, MovedSeed] = field(default_factory=dict, hash=False)

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
class OpenShard:
    """A shard under way."""

    work: Work
    wanted: set[int]
    samples: dict[int, Sample] = field(default_factory=dict)
    batches: tuple[tuple[int, ...], ...] = ()  # of the whole shard, once a worker planned it
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def left(self, indices: Sequence[int]) -> list[tuple[int, ...]]:
        """Those of some samples that are not made: by batch where known, in the order of work."""
        left = {i for i in indices if i in self.wanted and i not in self.outcomes}
        if not left:
            return []
        if not self.batches:
            return [tuple(sorted(left))]
        return [some for batch in self.batches if (some := tuple(i for i in batch if i in left))]

    def whole(self) -> Commit | None:
        """The commit of everything that is wanted; None while a sample is missing."""
        if len(self.outcomes) < len(self.wanted):
            return None
        return self._commit(sorted(self.outcomes))

    def whole_batches(self) -> Iterator[Commit]:
        """Commits of the batches that are done, in runs of neighbours: a name tells which."""
        if not self.batches and self.outcomes:  # all made alone: each is a batch of its own
            yield self._commit(sorted(self.outcomes))
        run: list[int] = []
        for batch in self.batches:
            wanted = [i for i in batch if i in self.wanted]
            if wanted and all(i in self.outcomes for i in wanted):
                run.extend(wanted)
            elif wanted and run:
                yield self._commit(sorted(run))
                run = []
        if run:
            yield self._commit(sorted(run))

    def _commit(self, indices: Sequence[int]) -> Commit:
        batch_of = {index: n for n, batch in enumerate(self.batches) for index in batch}
        numbers = [batch_of.get(i, 0) for i in indices]
        return Commit(
            work=self.work,
            first_batch=min(numbers),
            last_batch=max(numbers),
            num_batches=max(1, len(self.batches)),
            outcomes=tuple(self.outcomes[i] for i in indices),
        )
