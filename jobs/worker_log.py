"""A worker's log: plain lines under `logs/`, readable while the job runs."""

from __future__ import annotations

import contextlib
import threading
from datetime import UTC, datetime

from jobs.errors import StorageError
from jobs.storage import Storage
from jobs.terminal import visible_line

_MAX_FILE = 256 * 1024  # bytes after which the log goes on in a next object


class WorkerLog:
    """Appends lines to a file on the output.

    An object store has no appending: there the newest object is written again at each flush. Once
    it is large the log goes on in another one, `<path>.00001` and so on, so that neither what is
    sent at a flush nor what is held in memory grows with the job.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        self.storage = storage
        self.path = path
        self._lines: list[bytes] = []  # of the newest object
        self._is_sent = True
        self._number = 0
        self._lock = threading.Lock()

    def write(self, text: str) -> None:
        """Add a line; on a local output it is on disk when this returns."""
        line = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {visible_line(text)}\n"
        with self._lock:
            if self.storage.root is None:
                self._lines.append(line.encode())
                self._is_sent = False
                return
            # A log that cannot be written must not cost an image: the commit will meet the same
            # fault of the output and report it.
            with contextlib.suppress(OSError):
                target = self.storage.root / self.path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("a", encoding="utf-8") as file:
                    file.write(line)

    def flush(self) -> None:
        """Put the newest lines on an object store; nothing to do on a local output."""
        with self._lock:
            if self._is_sent:
                return
            content = b"".join(self._lines)
            path = f"{self.path}.{self._number:05d}" if self._number else self.path
            with contextlib.suppress(StorageError):  # the lines stay for the next flush
                self.storage.put(path, content)
                self._is_sent = True
                if len(content) >= _MAX_FILE:
                    self._lines.clear()
                    self._number += 1
