"""What a run tells the person who started it: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Never, TextIO

from tqdm import tqdm

from jobs.quantities import duration
from jobs.scheduler import Outcome
from jobs.terminal import visible

_LINE_EVERY = 10.0  # seconds between two plain lines
_SHOWN_FAILURES = 10


class ProgressReport:
    """Progress of one run on standard error.

    Args:
        total: samples that this run makes.
        stream: where to; a bar only if it is a terminal.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total = total
        self.stream = stream or sys.stderr
        self._started = time.monotonic()
        self._first: float | None = None
        self._line = self._started
        self._done = 0
        self._failed = 0
        self._shown = 0
        self._bar: tqdm[Never] | None = None
        if self.stream.isatty() and total:
            self._bar = tqdm(
                total=total, unit="img", file=self.stream, dynamic_ncols=True, smoothing=0.1
            )

    def say(self, text: str) -> None:
        """A line above the bar."""
        text = visible(text)
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def ended(self, count: int, failed: int) -> None:
        """`count` more samples ended; `failed` of all so far are failed ones."""
        self._done += count
        self._failed = failed
        now = time.monotonic()
        if self._first is None and count:
            self._first = now
        if self._bar is not None:
            self._bar.update(count)
            if failed:
                self._bar.set_postfix(failed=failed)
        elif count and now - self._line >= _LINE_EVERY:
            self._line = now
            self.say(self._words(now))

    def failed(self, outcome: Outcome) -> None:
        """A failed row was committed; the first few are shown, all are in the manifest."""
        self._shown += 1
        if self._shown <= _SHOWN_FAILURES:
            result = outcome.result
            text = (result.error_message or "").splitlines()
            self.say(f"sample {result.index}: {result.error_type}: {text[0] if text else ''}")
        elif self._shown == _SHOWN_FAILURES + 1:
            self.say("more samples failed; `zimage status` lists them all")

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        """Since the report began."""
        return time.monotonic() - self._started

    def _words(self, now: float) -> str:
        rate = self._done / max(now - self._started, 1e-9)
        left = (self.total - self._done) / rate if rate else 0
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self._done}/{self.total}{failed}, {rate:.2f} img/s, about {duration(left)} left"
