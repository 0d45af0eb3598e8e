"""How fast each worker is, from the times at which its results come in."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

_WEIGHT = 0.3  # of the newest batch in a worker's average


class Pace:
    """Seconds per sample of every worker, a moving average.

    Args:
        clock: seconds from any beginning.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._changes = 1  # since the middle was looked for
        self._usual = 0.0

    def begun(self, worker: str) -> None:
        """A worker begins with something."""
        self._since[worker] = self._clock()

    def finished(self, worker: str, samples: int) -> None:
        """A worker has made so many samples since it began, or since it was last heard of."""
        now = self._clock()
        since = self._since.get(worker)
        self._since[worker] = now
        if since is None or samples < 1:
            return
        seconds = (now - since) / samples
        known = self._seconds.get(worker, seconds)
        self._seconds[worker] = known + _WEIGHT * (seconds - known)
        self._changes += 1

    def waited(self, worker: str) -> float:
        """Seconds since a worker was last heard of."""
        return self._clock() - self._since.get(worker, self._clock())

    def seconds(self, worker: str) -> float:
        """Seconds per sample of a worker; of a new one what is usual."""
        known = self._seconds.get(worker)
        return self.usual if known is None else known

    @property
    def usual(self) -> float:
        """Seconds per sample of the worker in the middle; 0 before there is any result."""
        if 4 * self._changes > len(self._seconds) > 0:
            self._usual = statistics.median(self._seconds.values())
            self._changes = 0
        return self._usual

    def fastest(self, workers: Iterable[str]) -> str | None:
        """The fastest of some workers; None where there are none."""
        return min(workers, key=lambda worker: (self.seconds(worker), worker), default=None)
