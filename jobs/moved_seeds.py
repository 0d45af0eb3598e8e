"""Seeds that moved on: those of images that are made again because somebody rejected them.

A seed moves on by a constant, so that the next one depends on nothing but the one before. The
generator that noise comes from reads only the low 32 bits of a seed (torch's Mersenne Twister);
the constant is 2**32 divided by the golden ratio, whose multiples keep as far from each other
there as can be: seeds that follow each other, as those of a job do, never meet. See ADR 17.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jobs.plan import MAX_SEED, Sample

STRIDE = 0x9E3779B9


@dataclass(frozen=True, slots=True)
class MovedSeed:
    """The seed of a sample that is another than the plan's.

    Args:
        planned: what the plan had when it moved on.
    """

    planned: int
    seed: int

    def into(self, sample: Sample) -> Sample:
        """The sample with this seed."""
        return replace(sample, seed=self.seed, planned_seed=self.planned)


def next_seed(seed: int) -> int:
    """The seed after `seed`, in [0, 2**63)."""
    return (seed + STRIDE) % MAX_SEED


def planned_seed(row: Mapping[str, object]) -> object:
    """The seed that the plan had when a row was made.

    Args:
        row: with `seed` and, where its output has the column, `planned_seed`.
    """
    planned = row.get("planned_seed")
    return row["seed"] if planned is None else planned


def with_moved_seed(sample: Sample, seeds: Mapping[int, MovedSeed]) -> Sample:
    """A planned sample, with the seed that it moved on to, if it did.

    One whose planned seed has changed since, such as in the table, starts anew from that.
    """
    moved = seeds.get(sample.index)
    return sample if moved is None or moved.planned != sample.seed else moved.into(sample)
