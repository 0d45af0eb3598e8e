"""A worker's log: plain lines under `logs/`, readable while the job runs."""

from __future__ import annotations

import contextlib
import threading
from datetime import UTC, datetime

from jobs.errors import StorageError
from jobs.storage import Storage
from jobs.terminal import visible_line


class WorkerLog:
    """Appends lines to a file on the output; object stores get the whole text at each flush."""

    def __init__(self, storage: Storage, path: str) -> None:
        self.storage = storage
        self.path = path
        self._lines: list[str] = []
        self._lock = threading.Lock()

    def write(self, text: str) -> None:
        """Add a line; on a local output it is on disk when this returns."""
        line = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {visible_line(text)}\n"
        with self._lock:
            if self.storage.root is None:
                self._lines.append(line)
                return
            # A log that cannot be written must not cost an image: the commit will meet the same
            # fault of the output and report it.
            with contextlib.suppress(OSError):
                target = self.storage.root / self.path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("a", encoding="utf-8") as file:
                    file.write(line)

    def flush(self) -> None:
        """Put the whole text on an object store; nothing to do on a local output."""
        with self._lock:
            if self._lines:
                with contextlib.suppress(StorageError):
                    self.storage.put(self.path, "".join(self._lines).encode())
