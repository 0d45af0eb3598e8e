"""How far a transfer or a check of large files is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Never, Self, TextIO

from tqdm import tqdm

_LINE_EVERY = 10.0  # seconds between two plain lines


def byte_size(count: float) -> str:
    """Bytes in decimal units, as disks and hubs count: `9.97 GB`."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


class ByteProgress:
    """Counts bytes of several threads and says how far they are, on standard error.

    Args:
        label: what is being done, `fetching Tongyi-MAI/Z-Image-Turbo`.
        total: bytes of all of it.
        stream: where to; a bar only if it is a terminal.
    """

    def __init__(self, label: str, total: int, stream: TextIO | None = None) -> None:
        self.label = label
        self.total = total
        self.stream = stream or sys.stderr
        self.done = 0
        self._lock = threading.Lock()
        self._started = self._line = time.monotonic()
        self._counted = 0
        self._bar: tqdm[Never] | None = None
        if self.stream.isatty():
            self._bar = tqdm(
                total=total,
                desc=label,
                unit="B",
                unit_scale=True,
                file=self.stream,
                dynamic_ncols=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int, *, found: bool = False) -> None:
        """`count` more bytes are done; negative where some must be done again.

        `found` are bytes that were there already: they are no part of the speed.
        """
        with self._lock:
            self.done += count
            self._counted += 0 if found else count
            if self._bar is not None:
                self._bar.update(count)
                return
            now = time.monotonic()
            if now - self._line < _LINE_EVERY:
                return
            self._line = now
            self._say(self._words(now))

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        with self._lock:
            self._say(text)

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def _words(self, now: float) -> str:
        words = f"{self.label}: {byte_size(self.done)} of {byte_size(self.total)}"
        rate = self._counted / max(now - self._started, 1e-9)
        if rate <= 0:
            return words
        minutes = max(self.total - self.done, 0) / rate / 60
        return f"{words}, {byte_size(rate)}/s, about {minutes:.0f} min left"
