"""A file that arrives in pieces, over several connections and several processes."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from zimage_core.file_hashes import Progress, Stopped, hash_file, new_hash


class PartialFile:
    """Appends to what an earlier process left, and hashes all of it as it comes.

    Enough of a file object to be handed to a client library that writes into one.

    Args:
        path: where the bytes wait until they are all there.
        size: of the whole file in bytes.
        algorithm: hash that is kept; see `file_hashes.new_hash`.
        progress: told of bytes, negative ones where bytes must come again.
        stop: once set, nothing is written any more, and `Stopped` is raised instead.
    """

    def __init__(
        self, path: Path, size: int, algorithm: str, progress: Progress, stop: threading.Event
    ) -> None:
        self.path = path
        self.name = str(path)
        self.size = size
        self._algorithm = algorithm
        self._progress = progress
        self._stop = stop
        self._file: IO[bytes]

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
        self._hash = new_hash(self._algorithm, self.size)
        while block := self._file.read(8 * 1024 * 1024):
            self._hash.update(block)
        self._hashed = self._file.tell()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, data: bytes) -> int:
        """Append bytes.

        Raises:
            Stopped: another part of the download failed, or it was interrupted.
        """
        if self._stop.is_set():
            raise Stopped
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._hash.update(data)
        self._hashed += len(data)
        self._progress(len(data))
        return len(data)

    def tell(self) -> int:
        """Number of bytes that are there, also of those that something else wrote (hf_transfer)."""
        return os.fstat(self._file.fileno()).st_size

    def seek(self, place: int) -> int:
        """Go to a place; all after it must be cut off by `truncate` next."""
        return self._file.seek(place)

    def truncate(self) -> int:
        """Drop what is after the current place; raises `Stopped` like `write`."""
        if self._stop.is_set():
            raise Stopped
        kept = self._file.tell()
        self._progress(kept - self._hashed)
        self._file.truncate()
        if kept:
            self._file.seek(0)
            content = self._file.read(kept)
        else:
            content = b""
        self._hash = new_hash(self._algorithm, self.size)
        self._hash.update(content)
        self._hashed = kept
        return kept

    def flush(self) -> None:
        """Nothing to do: every write goes to the system at once."""

    def restart(self) -> None:
        """Drop all bytes."""
        self.seek(0)
        self.truncate()

    def finish(self) -> str:
        """Bring all bytes to the disk; their hash in hex."""
        os.fsync(self._file.fileno())
        if self.tell() != self._hashed:  # something wrote past this object
            return hash_file(self.path, [self._algorithm]).hashes[self._algorithm]
        content: str = self._hash.hexdigest()
        return content
