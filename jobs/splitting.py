"""At the end of a job: which lease gives up what, so that no worker waits for another one.

Guided self-scheduling with whole shards first, and their division when nothing else is left: an
idle worker gets the end of the lease that will take longest, as much of it as lets both end
together. What cannot be divided any more, the batch under way of a worker that is much slower,
is made a second time by an idle one; whichever result comes first counts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from jobs.executor import Lease
from jobs.pace import Pace

_LATE = 3.0  # times its own or the usual pace after which a batch counts as late
_CANDIDATES = 8  # leases that are looked at, those that end last


@dataclass(slots=True)
class Held:
    """A lease that a worker holds.

    Args:
        lease: what it still has to make of what it was given.
        worker: who holds it.
        is_running: whether it is the first of the worker's leases.
        is_planned: whether its batches are known.
        is_asked: it was asked to give something up, and has not answered.
        is_copied: another worker makes its last batch too.
        left: samples of it that are not made.
        asked: samples that it was last asked for.
        begun: samples that it was asked for and kept, as their batches had begun; their results
            may be long in coming, where a whole lease's come at once.
    """

    lease: Lease
    worker: str = ""
    is_running: bool = False
    is_planned: bool = False
    is_asked: bool = False
    is_copied: bool = False
    left: int = 0
    asked: frozenset[int] = frozenset()
    begun: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Split:
    """What is to be taken from a lease, or made a second time.

    Args:
        indices: of the samples.
        is_copy: whether the lease keeps them.
    """

    held: Held
    indices: tuple[int, ...]
    is_copy: bool = False


def choose_split(
    leases: Iterable[Held],
    batches_of: Callable[[Held], Sequence[tuple[int, ...]]],
    thief: str,
    pace: Pace,
) -> Split | None:
    """What an idle worker should take over; None where it would end nothing earlier.

    Args:
        leases: all that workers hold.
        batches_of: the batches of one that are not finished, in the order of work.
        thief: the idle worker.
    """
    candidates = [
        (_ends(held, pace), held.lease.attempt, held)
        for held in leases
        if held.left and not held.is_asked and not held.lease.isolate
    ]
    for ends, _, held in heapq.nlargest(_CANDIDATES, candidates):
        batches = batches_of(held)
        if not batches:
            continue
        split = _split(held, batches, thief, pace) or _copy(held, batches, ends, thief, pace)
        if split is not None:
            return split
    return None


def _ends(held: Held, pace: Pace) -> float:
    """Seconds until a lease is done, if nothing is taken from it."""
    seconds = held.left * pace.seconds(held.worker)
    return seconds - min(pace.waited(held.worker), pace.seconds(held.worker), seconds)


def _split(held: Held, batches: Sequence[tuple[int, ...]], thief: str, pace: Pace) -> Split | None:
    if held.is_running and not held.is_planned:
        return None  # in a moment its batches are known
    # The first batch of a running lease is being made.
    spare = batches[1:] if held.is_running else batches
    spare = [batch for batch in spare if not held.begun.issuperset(batch)]
    if not spare:
        return None
    own, others = pace.seconds(held.worker), pace.seconds(thief)
    left = sum(map(len, batches))
    share = left * own / (own + others) if own + others > 0 else left / 2
    taken: list[tuple[int, ...]] = []
    count = 0
    for batch in reversed(spare):
        if taken and count + len(batch) > share:
            break
        taken.insert(0, batch)
        count += len(batch)
    # Not where the owner alone would be done before the thief.
    if count * others > left * own:
        return None
    return Split(held, tuple(index for batch in taken for index in batch))


def _copy(
    held: Held, batches: Sequence[tuple[int, ...]], ends: float, thief: str, pace: Pace
) -> Split | None:
    if not held.is_running or not held.is_planned or held.is_copied or len(batches) != 1:
        return None
    batch = batches[0]
    again = len(batch) * pace.seconds(thief)
    is_late = pace.waited(held.worker) > _LATE * len(batch) * max(
        pace.usual, min(pace.seconds(held.worker), pace.seconds(thief))
    )
    if again <= 0 or not (is_late or ends > 2 * again):
        return None
    return Split(held, batch, is_copy=True)
