"""Hashes of large files: several algorithms in one reading, several files at once."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

_BLOCK = 8 * 1024 * 1024
# Hashing is bound by the disk; more threads than this only make its heads and queues busier.
_THREADS = 8

Progress = Callable[[int], object]


class Stopped(Exception):  # noqa: N818 - nothing went wrong: somebody else asked for an end
    """The work was given up because another part of it failed or was interrupted."""


class FileHashes(NamedTuple):
    """What a file holds, for comparing: its size in bytes and its hashes in hex, by algorithm."""

    size: int
    hashes: dict[str, str]


def new_hash(algorithm: str, size: int) -> Any:
    """Start a hash.

    Args:
        algorithm: `md5`, `sha256`, or `git_sha1`, which is how Git names a file's content.
        size: of the whole content in bytes; only Git's counts it in.
    """
    if algorithm == "git_sha1":
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return hashlib.new(algorithm, usedforsecurity=False)


def hash_file(
    path: Path,
    algorithms: Iterable[str],
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> FileHashes:
    """Read a file once and hash it in every way asked for.

    Raises:
        OSError: it cannot be read.
        Stopped: `stop` was set.
    """
    with path.open("rb", buffering=0) as file:
        running = {name: new_hash(name, os.fstat(file.fileno()).st_size) for name in algorithms}
        buffer = memoryview(bytearray(_BLOCK))
        size = 0
        while count := file.readinto(buffer):
            if stop is not None and stop.is_set():
                raise Stopped
            for state in running.values():
                state.update(buffer[:count])  # lets other threads run
            size += count
            if progress is not None:
                progress(count)
    return FileHashes(size, {name: state.hexdigest() for name, state in running.items()})


def hash_files(
    files: Sequence[tuple[Path, Sequence[str]]], progress: Progress | None = None
) -> list[FileHashes | OSError]:
    """Hash several files at once.

    Args:
        files: each with its algorithms.
        progress: told of every block of bytes, from any thread.

    Returns:
        What each file holds, or why it cannot be read, in the order of `files`.
    """
    stop = threading.Event()

    def one(item: tuple[Path, Sequence[str]]) -> FileHashes | OSError:
        try:
            return hash_file(*item, progress, stop)
        except OSError as error:
            return error

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        try:
            return list(pool.map(one, files))
        except BaseException:
            stop.set()  # leaving waits for the threads, and a shard takes half a minute
            pool.shutdown(wait=False, cancel_futures=True)
            raise
