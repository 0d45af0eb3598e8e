"""One process of a machine at a time works on a folder, however many want to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from zimage_core.config import CheckpointError

LOCK_NAME = ".zimage-lock"
_POLL = 0.2  # seconds between two tries
_TRIES = 5  # to make the folder while others remove theirs
_SAY_EVERY = 60.0  # seconds between two words about waiting


class FolderLock:
    """Holds a folder by `flock` on a file in it; the folder is made where it is missing.

    The kernel lets go when the holder ends in whatever way, so a killed one blocks nobody. On file
    systems that share such locks between machines (NFS since Linux 2.6.12) it holds for all.

    Args:
        folder: to be held.
        purpose: for the words of those that wait, `fetching Tongyi-MAI/Z-Image-Turbo`.
    """

    def __init__(self, folder: Path, purpose: str) -> None:
        self.folder = folder
        self.purpose = purpose
        self._file: IO[str] | None = None
        self._made: list[Path] = []  # folders that were missing, the innermost first

    def __enter__(self) -> Self:
        """Wait for the folder.

        Raises:
            CheckpointError: the folder cannot be made or written, or its file system has no locks.
        """
        started = said = time.monotonic()
        told = False
        while True:
            file = self._open()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                now = time.monotonic()
                if not told or now - said > _SAY_EVERY:
                    told, said = True, now
                    file.seek(0)
                    print(
                        f"{self.folder}: waiting {now - started:.0f} s for "
                        f"{file.read() or 'another process'} to end {self.purpose}",
                        file=sys.stderr,
                        flush=True,
                    )
                file.close()
                time.sleep(_POLL)
                continue
            except OSError as error:
                file.close()
                (self.folder / LOCK_NAME).unlink(missing_ok=True)
                self._remove_made()
                raise CheckpointError(
                    f"{self.folder}: its file system has no locks ({error}), so that two processes "
                    "could write at once; fetch into a local folder and copy that"
                ) from error
            if self._is_current(file):
                break
            file.close()  # the holder before us removed it
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._file is not None
        # removed while it is held: whoever waits finds that out and makes a new one
        (self.folder / LOCK_NAME).unlink(missing_ok=True)
        self._file.close()
        self._remove_made()

    def _open(self) -> IO[str]:
        try:
            if not self._made:
                ways = (self.folder, *self.folder.parents)
                self._made = [folder for folder in ways if not folder.exists()]
            for _ in range(_TRIES - 1):
                # another process may remove a folder that it has made, this one's parent too
                with contextlib.suppress(FileNotFoundError):
                    return self._made_and_opened()
            return self._made_and_opened()
        except OSError as error:
            self._remove_made()
            raise CheckpointError(
                f"{self.folder}: cannot be written: {error}; give a folder that can, or one that "
                "is complete"
            ) from error

    def _made_and_opened(self) -> IO[str]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return (self.folder / LOCK_NAME).open("a+", encoding="utf-8")

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # not empty: that is what it was made for
            for folder in self._made:
                folder.rmdir()

    def _is_current(self, file: IO[str]) -> bool:
        try:
            there = (self.folder / LOCK_NAME).stat()
        except OSError:
            return False
        return os.path.samestat(os.fstat(file.fileno()), there)
