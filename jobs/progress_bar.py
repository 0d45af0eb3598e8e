"""Progress of a command that reads: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Never, TextIO

from tqdm import tqdm

from jobs.quantities import duration

_BAR_AFTER = 1.0  # seconds; what is done sooner shows none
_LINE_EVERY = 10.0  # seconds between two plain lines


class ProgressBar:
    """Counts things that are done; use as a context manager.

    Args:
        what: is going on: `verifying`.
        total: how many things there are.
        unit: what they are called, in the singular.
        stream: where to; a bar only if it is a terminal.
    """

    def __init__(
        self, what: str, total: int, unit: str = "image", stream: TextIO | None = None
    ) -> None:
        self._what = what
        self._total = total
        self._unit = unit
        self._stream = stream or sys.stderr
        self._done = 0
        self._started = self._line = time.monotonic()
        self._bar: tqdm[Never] | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                desc=what,
                total=total,
                unit=unit,
                file=self._stream,
                delay=_BAR_AFTER,
                dynamic_ncols=True,
            )

    def __enter__(self) -> ProgressBar:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1) -> None:
        """`count` more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._line >= _LINE_EVERY:
            self._line = now
            left = (self._total - self._done) * (now - self._started) / max(self._done, 1)
            words = f"{self._what}: {self._done:,} of {self._total:,} {self._unit}s"
            print(f"{words}, about {duration(left)} left", file=self._stream, flush=True)
