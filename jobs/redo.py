"""Which images are to be made again because somebody rejected them, and with which seeds.

A mark counts for the very image that was looked at. So what is to be done follows from the marks
and the current rows alone: a run that is killed and started again makes the same images, and an
image that was made again is not made a third time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from jobs.commits import Listing
from jobs.moved_seeds import MovedSeed, next_seed, planned_seed
from jobs.plan import JobPlan
from jobs.quantities import counted, index_ranges
from jobs.rejected import PATH, Rejection, counting, read_rejected
from jobs.storage import Storage


@dataclass(frozen=True, slots=True)
class Redo:
    """A rejected image, which is the current one of its sample.

    Args:
        seed: of it.
        next: what it is made again with, unless the plan's seed has changed.
        note: what is wrong with it.
    """

    index: int
    seed: int
    next: MovedSeed
    note: str


@dataclass(frozen=True)
class Marks:
    """What the marks of an output come to.

    Args:
        redo: the images that are rejected now, by shard and index.
        made_again: marks of images whose samples were made again since.
        without_image: samples of marks that have no image, since they are not made or failed.
        outside: indices of marks that the job has not.
    """

    redo: dict[int, dict[int, Redo]] = field(default_factory=dict)
    made_again: int = 0
    without_image: tuple[int, ...] = ()
    outside: tuple[int, ...] = ()

    @property
    def num_rejected(self) -> int:
        """Images that are rejected now."""
        return sum(map(len, self.redo.values()))

    def notes(self) -> list[str]:
        """Words for the marks that lead to nothing."""
        words = []
        if self.made_again:
            marks = counted(self.made_again, "mark")
            words.append(f"{marks} of images that are not there any more, left aside")
        if self.without_image:
            words.append(f"sample {index_ranges(self.without_image)}: marked, but has no image")
        if self.outside:
            words.append(f"sample {index_ranges(self.outside)}: marked, but is none of the job's")
        return [f"{PATH}: {word}" for word in words]


def read_marks(storage: Storage, plan: JobPlan, listing: Listing) -> Marks:
    """Compare an output's marks with its current rows; only shards with marks are read.

    Raises:
        InputError: `rejected.csv` has a cell that does not fit.
        StorageError: it cannot be read, or a part of the manifest is damaged.
    """
    by_shard, outside = _by_shard(read_rejected(storage), plan)
    redo: dict[int, dict[int, Redo]] = {}
    images: dict[int, str | None] = {}
    columns = ["pixels_sha256", "seed", "planned_seed"]
    for shard, table in listing.current_tables(sorted(by_shard), columns):
        rows = {row["index"]: row for row in table.to_pylist()}
        current = {index: row["pixels_sha256"] for index, row in rows.items()}
        images |= current
        for index, mark in sorted(counting(by_shard[shard], current).items()):
            row, planned = rows[index], planned_seed(rows[index])
            assert isinstance(planned, int)
            moved = MovedSeed(planned, next_seed(row["seed"]))
            redo.setdefault(shard, {})[index] = Redo(index, row["seed"], moved, mark.note)
    marks = [mark for some in by_shard.values() for mark in some]
    without = {mark.index for mark in marks if images.get(mark.index) is None}
    replaced = sum(
        mark.index not in without and images[mark.index] != mark.pixels_sha256 for mark in marks
    )
    return Marks(redo, replaced, tuple(sorted(without)), tuple(sorted(outside)))


def _by_shard(
    marks: Iterable[Rejection], plan: JobPlan
) -> tuple[dict[int, list[Rejection]], set[int]]:
    by_shard: dict[int, list[Rejection]] = {}
    outside: set[int] = set()
    for mark in marks:
        try:
            shard = plan.shard_of(mark.index)
        except KeyError:
            outside.add(mark.index)
            continue
        by_shard.setdefault(shard.id, []).append(mark)
    return by_shard, outside
