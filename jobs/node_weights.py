"""A checkpoint's files into the memory of a node, by one reading however many workers load them.

Workers load from mapped files, and those of a node share the pages. But where nothing is in memory
yet, N that begin at once ask for pages here and there, each as it comes to them, and that is the
worst way to read from a disk or over a network. So the first worker reads from beginning to end,
the others wait for it, and then all load at once. Hashing reads everything too: what was hashed
just now need not be read again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

_READ_FROM = 1_000_000_000  # bytes; less is read in a moment
_RECENT = 300.0  # seconds for which what was read counts as being in memory
_SHARE = 0.5  # of the memory that is free: as much again is for weights as they are loaded
_BLOCK = 8 * 1024 * 1024
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def node_folder() -> Path | None:
    """This user's folder for what the processes of a node tell each other; None if there is none.

    What lies in it only saves work, so that one that cannot be written is no error.
    """
    folder = Path(tempfile.gettempdir()) / f"zimage-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    return None


def read_ahead(files: Sequence[Path]) -> str | None:
    """Read files into memory, unless another worker of this node does or has done so.

    Waits for a worker that reads them. One that dies meanwhile holds up nobody: the next one reads.

    Args:
        files: what loading will read.

    Returns:
        Words for the log on what was done or why not; None if nothing was to be done.

    Raises:
        OSError: a file cannot be read.
    """
    paths = sorted({path.resolve() for path in files})
    size = sum(path.stat().st_size for path in paths)
    free = available_memory()
    if free is None or size < _READ_FROM:
        return None
    if size > _SHARE * free:
        return (
            f"weights of {size / 1e9:.1f} GB are not read ahead: more than half of the "
            f"{free / 1e9:.1f} GB of memory that are free; each worker reads what it loads"
        )
    started = time.monotonic()
    with _reading(paths) as record:
        waited = time.monotonic() - started
        if record is None:
            return None
        if _is_recent(record.read()):
            return f"waited {waited:.1f} s for another worker to read" if waited > 1 else None
        for path in paths:
            _read(path)
        _note(record)
    seconds = time.monotonic() - started - waited
    return f"read {size / 1e9:.2f} GB of weights ahead in {seconds:.1f} s"


def note_read(files: Sequence[Path]) -> None:
    """Remember that this process has just read files from beginning to end."""
    paths = sorted({path.resolve() for path in files})
    if sum(path.stat().st_size for path in paths) < _READ_FROM:
        return
    with _reading(paths) as record:
        if record is not None:
            _note(record)


def available_memory() -> int | None:
    """Bytes that can be used without swapping, those of cached files among them; None off Linux."""
    if not _MEMINFO.exists():
        return None
    lines = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = _CGROUP / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cached = int(stat["active_file"]) + int(stat["inactive_file"])
        used = int((_CGROUP / "memory.current").read_text()) - cached
        free = min(free, int(most) - used)
    return max(0, free)


@contextlib.contextmanager
def _reading(paths: Sequence[Path]) -> Iterator[IO[str] | None]:
    """Hold what the node knows of these files as they are now; None where it can know nothing."""
    folder = node_folder()
    if folder is None:
        yield None
        return
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    with (folder / f"read-{key}").open("a+") as record:
        fcntl.flock(record, fcntl.LOCK_EX)  # the kernel lets go when its holder ends
        record.seek(0)
        yield record


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(_BLOCK)
        while file.readinto(buffer):
            pass


def _note(record: IO[str]) -> None:
    record.seek(0)
    record.truncate()
    with contextlib.suppress(OSError):  # a full disk: then the next worker reads again
        record.write(f"{_boot()} {time.monotonic()}")
        record.flush()


def _is_recent(text: str) -> bool:
    boot, _, when = text.partition(" ")
    return bool(when) and boot == _boot() and time.monotonic() - float(when) < _RECENT


def _boot() -> str:
    """Names the time since the system started, in which `time.monotonic` is one clock for all."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
