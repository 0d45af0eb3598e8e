"""Opening files that others made: a pipe is not waited for, a device is not read.

A checkpoint, an adapter or an output of others may hold a named pipe or a link to a device under
the name of a file: opening the first waits for a writer for ever, reading `/dev/zero` never ends.
Links to files are followed: the hub's cache is made of them.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        OSError: as `open` does; or it is no regular file, and the message says what it is.
        ValueError: its name has a zero byte.
    """
    _check(os.stat(path))  # noqa: PTH116 - beside fstat; opening a device may already do something
    # Another one may have taken its place since: not to wait for a pipe's writer then.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        _check(os.fstat(handle))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: Path, most: int) -> bytes:
    """Read a whole file of at most `most` bytes.

    Raises:
        OSError: see `open_regular`.
        ValueError: it is larger.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"over {most:,} bytes, which is the most allowed")
    return content


def _check(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(f"is {kind}; allowed: a file")
