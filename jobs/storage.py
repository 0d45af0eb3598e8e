"""The output store: a local folder or an object store behind one small interface.

Two kinds of write exist. `put` replaces and is used only below a prefix that nobody else writes
to (an attempt's images, a driver's own event file). `create` is put-if-absent and is what epochs
and commits rest on: of two callers with one name exactly one succeeds, on local disks, S3, GCS
and Azure alike (obstore). Objects appear whole or not at all.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, from_url

from jobs.errors import InputError, StorageError, StorageUnusableError

T = TypeVar("T")

REMOTE_SCHEMES = ("s3", "gs", "az")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_RETRIES = 4
_FIRST_DELAY = 0.25  # seconds; doubled each time, with jitter


class Storage:
    """Files of one output, addressed by `/`-separated paths relative to its root.

    Args:
        uri: a local path (absolute, or relative to the working directory), `s3://`, `gs://` or
            `az://`. Credentials of object stores come from the environment only.
        create: make a missing local folder.

    Raises:
        InputError: the scheme is none of these.
        StorageError: the folder cannot be made or opened.
    """

    def __init__(self, uri: str, *, create: bool = False) -> None:
        self.uri = uri
        match = _SCHEME.match(uri)
        self.root: Path | None = None
        try:
            if match is None or match.group(1) == "file":
                path = uri[len("file://") :] if match else uri
                self.root = Path(path).expanduser().absolute()
                _check_folders(uri, self.root)
                # A reader of an output that is not there yet sees an empty one and makes nothing.
                present = create or self.root.exists()
                self._store: Any = LocalStore(self.root, mkdir=create) if present else None
            elif match.group(1) in REMOTE_SCHEMES:
                self._store = from_url(uri)
            else:
                raise InputError(
                    f"output.uri: {uri!r}: unknown scheme {match.group(1)!r}; allowed: "
                    f"a path, {', '.join(f'{s}://' for s in REMOTE_SCHEMES)}"
                )
        except (BaseError, OSError, ValueError) as error:
            raise StorageError(f"output {uri!r} cannot be opened: {_short(error)}") from error

    def put(self, path: str, content: bytes | Path) -> None:
        """Write or replace `path`; retried with backoff. Raises StorageError."""
        self._retry("write", path, lambda: obstore.put(self._store, path, content))

    def create(self, path: str, content: bytes) -> bool:
        """Write `path` only if it does not exist; False if it does. Raises StorageError.

        A retry after a lost answer could find our own object: then equal content counts as ours.
        """
        tried = False

        def attempt() -> bool:
            nonlocal tried
            try:
                obstore.put(self._store, path, content, mode="create")
            except AlreadyExistsError:
                return tried and bytes(obstore.get(self._store, path).bytes()) == content
            finally:
                tried = True
            return True

        return self._retry("create", path, attempt)

    def get(self, path: str) -> bytes | None:
        """The content of `path`, or None where there is none. Raises StorageError."""

        def attempt() -> bytes | None:
            if self._store is None:
                return None
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except FileNotFoundError:
                return None

        return self._retry("read", path, attempt)

    def exists(self, path: str) -> bool:
        """Whether `path` is there. Raises StorageError."""

        def attempt() -> bool:
            if self._store is None:
                return False
            try:
                obstore.head(self._store, path)
            except FileNotFoundError:
                return False
            return True

        return self._retry("look up", path, attempt)

    def delete(self, path: str) -> bool:
        """Remove `path`; False if it was gone already. Raises StorageError.

        On a local output nothing is removed through a symbolic link, wherever the link leads.
        """

        def attempt() -> bool:
            if self.root is None:
                if not self.exists(path):
                    return False
                obstore.delete(self._store, path)
                return True
            # not through obstore, which follows links and refuses names that a broken write left
            folder = self.root
            for part in path.split("/")[:-1]:
                folder /= part
                if part == ".." or folder.is_symlink():
                    raise StorageUnusableError(f"{self.uri}/{path}: leads out of the output")
            try:
                (self.root / path).unlink()
            except FileNotFoundError:
                return False
            return True

        return self._retry("remove", path, attempt)

    def list(self, prefix: str) -> Iterator[tuple[str, int, datetime]]:
        """(path, bytes, last modified) of everything below the folder `prefix`, unordered."""
        try:
            if self.root is not None and not (self.root / prefix).is_dir():
                return
            for chunk in obstore.list(self._store, prefix, chunk_size=5000):
                for meta in chunk:
                    yield meta["path"], meta["size"], meta["last_modified"]
        except (BaseError, OSError) as error:
            raise StorageError(f"{self.uri}/{prefix}: cannot be listed: {_short(error)}") from error

    def names(self, folder: str) -> Iterator[str]:
        """Names of the files directly in `folder`, unordered; the fast way to read commits."""
        if self.root is not None:
            # A plain directory read: object metadata of 150 000 files would cost a stat each.
            try:
                # object_store stages a write beside its target as `name#1`
                yield from (n for n in os.listdir(self.root / folder) if "#" not in n)  # noqa: PTH208 - a Path for each of 150 000 names takes a second
            except FileNotFoundError:
                return
            except OSError as error:
                raise StorageError(f"{self.uri}/{folder}: {_short(error)}") from error
        else:
            start = len(folder) + 1
            for path, _, _ in self.list(folder):
                yield path[start:]

    def _retry(self, verb: str, path: str, operation: Callable[[], T]) -> T:
        delay = _FIRST_DELAY
        for left in reversed(range(_RETRIES)):
            try:
                return operation()
            except (BaseError, OSError) as error:
                message = f"{self.uri}/{path}: cannot {verb}: {_short(error)}"
                if _is_final(error):
                    raise StorageUnusableError(message) from error
                if left == 0:
                    raise StorageError(message) from error
                time.sleep(delay * (0.5 + random.random()))
                delay *= 2
        raise AssertionError("unreachable")


def _check_folders(uri: str, root: Path) -> None:
    """Say it in plain words where a file is in the way of the output's folder."""
    for path in (root, *root.parents):
        if path.exists():
            if not path.is_dir():
                raise StorageUnusableError(
                    f"output {uri!r} cannot be opened: {path} is a file; allowed: a folder, or a "
                    "path that is not there yet"
                )
            return


def _is_final(error: Exception) -> bool:
    """Whether trying again at once cannot help: permissions, a full or read-only disk."""
    text = str(error)
    final = (
        "Permission denied",
        "Read-only file system",
        "No space left",
        "quota exceeded",
        "Not a directory",
    )
    kinds = (PermissionError, PermissionDeniedError, UnauthenticatedError)
    return isinstance(error, kinds) or any(word in text for word in final)


def _short(error: BaseException) -> str:
    """An obstore message without its debug dump."""
    return str(error).split("\n\nDebug source")[0].strip() or type(error).__name__
