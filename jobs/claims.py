"""Which batches of a worker's leases it makes, and which it has given up: for each one of both."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence

_REMEMBERED = 64  # leases that have ended, of which a late question may still ask


class Claims:
    """Decides between a worker that goes on and a driver that asks for a part of its lease.

    Safe between the thread that makes batches and the one that answers the driver.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, list[frozenset[int]]] = {}  # batches not begun, by attempt
        self._given_up: dict[str, set[int]] = {}
        self._ended: deque[str] = deque()

    def plan(self, attempt: str, batches: Iterable[Sequence[int]]) -> None:
        """The batches of a lease that is begun: of each the samples that are wanted."""
        with self._lock:
            self._waiting[attempt] = [frozenset(batch) for batch in batches]

    def begin(self, attempt: str, batch: Sequence[int]) -> bool:
        """Whether a batch is still to be made; if so it can be given up no more."""
        with self._lock:
            wanted = frozenset(batch)
            if wanted <= self._given_up.get(attempt, set()):
                return False
            waiting = self._waiting.get(attempt, [])
            if wanted in waiting:
                waiting.remove(wanted)
            return True

    def give_up(self, attempt: str, indices: Sequence[int]) -> tuple[int, ...]:
        """Give up the batches of a lease that are wholly among some samples and not begun.

        Returns:
            The samples given up; of a lease that is not begun that is all of them.
        """
        asked = set(indices)
        with self._lock:
            given_up = self._given_up.setdefault(attempt, set())
            if attempt in self._waiting:
                whole = [batch for batch in self._waiting[attempt] if batch <= asked]
                self._waiting[attempt] = [b for b in self._waiting[attempt] if b not in whole]
                asked = {index for batch in whole for index in batch}
            given_up |= asked
            return tuple(sorted(asked))

    def forget(self, attempt: str) -> None:
        """A lease has ended: nothing of it is left to give up."""
        with self._lock:
            self._waiting[attempt] = []
            self._ended.append(attempt)
            if len(self._ended) > _REMEMBERED:
                old = self._ended.popleft()
                del self._waiting[old]
                self._given_up.pop(old, None)
