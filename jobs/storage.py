"""The output store: a local folder or an object store behind one small interface.

Two kinds of write exist. `put` replaces and is used only below a prefix that nobody else writes
to (an attempt's images, a driver's own event file). `create` is put-if-absent and is what epochs
and commits rest on: of two callers with one name exactly one succeeds, on local disks, S3, GCS
and Azure alike (obstore). Objects appear whole or not at all.

Every operation is tried again where that can help, with exponential backoff and jitter, and never
without end: see `_Patience`.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError
from obstore.store import LocalStore

from jobs.errors import InputError, StorageError, StorageUnusableError
from jobs.local_paths import check_folders, check_kind
from jobs.object_store import (
    SCHEMES,
    Verdict,
    bucket_is_missing,
    explain,
    open_store,
    verdict,
)

T = TypeVar("T")

# The status itself: ports, durations and identifiers in a message may hold the digits too.
_BEHIND_THE_END = re.compile(r"status code: 416\b|StartTooLarge")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_FIRST_DELAY = 0.25  # seconds; doubled each time, with jitter
_LAST_DELAY = 15.0
_LOCAL_TRIES = 4
_BUSY_SECONDS = 120.0  # after which no further try is begun
_UNREACHABLE_SECONDS = 10.0  # the same, for a store that has not answered yet
_UPLOAD_PART = 16 * 1024 * 1024  # bytes that must pass within a request's 30 s


class Storage:
    """Files of one output, addressed by `/`-separated paths relative to its root.

    Args:
        uri: a local path (absolute, or relative to the working directory), `s3://BUCKET/PREFIX`,
            `gs://BUCKET/PREFIX` or `az://CONTAINER/PREFIX`. Object stores are configured from the
            environment only; the first operation shows whether they can be used.
        create: make a missing local folder.

    Raises:
        InputError: the scheme is none of these.
        StorageError: the folder cannot be made or opened.

    All operations raise StorageError, and its subclass StorageUnusableError where trying again
    cannot help: no rights, no credentials, no such bucket, another region, a full disk.
    """

    def __init__(self, uri: str, *, create: bool = False) -> None:
        self.uri = uri
        self.answered = False  # whether an object store has ever answered
        match = _SCHEME.match(uri)
        self.root: Path | None = None
        try:
            if match is None or match.group(1) == "file":
                path = uri[len("file://") :] if match else uri
                self.root = Path(path).expanduser().absolute()
                check_folders(uri, self.root)
                # A reader of an output that is not there yet sees an empty one and makes nothing.
                present = create or self.root.exists()
                self._store: Any = LocalStore(self.root, mkdir=create) if present else None
            elif match.group(1) in SCHEMES:
                self._store = open_store(uri, retry=False)
                self._lister = open_store(uri, retry=True)
            else:
                raise InputError(
                    f"output.uri: {uri!r}: unknown scheme {match.group(1)!r}; allowed: "
                    f"a path, {', '.join(f'{s}://' for s in SCHEMES)}"
                )
        except (BaseError, OSError, ValueError) as error:
            raise StorageError(f"output {uri!r} cannot be opened: {self._words(error)}") from error

    def put(self, path: str, content: bytes | Path | IO[bytes]) -> None:
        """Write or replace `path`, from memory or from a local file. Raises StorageError."""

        def attempt() -> None:
            if not isinstance(content, bytes | Path):
                content.seek(0)
            # A large object goes in parts to an object store; it is there once all of them are.
            obstore.put(self._store, path, content, chunk_size=_UPLOAD_PART, max_concurrency=4)

        self._retry("write", path, attempt)

    def create(self, path: str, content: bytes) -> bool:
        """Write `path` only if it does not exist; whether it was this call. Raises StorageError.

        Args:
            content: must be the caller's own, by something random in it (a claim's nonce, a
                commit's attempts). A try whose answer was lost may have written the object, and
                the next one then finds it: equal content is how a call knows its own. Of two
                calls with equal content both would be told that it was theirs.
        """

        def attempt() -> bool:
            try:
                obstore.put(self._store, path, content, mode="create", use_multipart=False)
            except AlreadyExistsError as error:
                try:
                    return bytes(obstore.get(self._store, path).bytes()) == content
                except FileNotFoundError:
                    # S3 answers 409, which reads as "exists", while another's write is under way
                    raise _UndecidedError(str(error)) from error
            return True

        return self._retry("create", path, attempt)

    def get(self, path: str, *, most: int | None = None) -> bytes | None:
        """The content of `path`, or None where there is none. Raises StorageError.

        Args:
            most: bytes that it may have; what has more is not read.
        """

        def read() -> Any:
            found = obstore.get(self._store, path)
            size = found.meta["size"]
            if most is not None and size > most:
                raise StorageUnusableError(
                    f"{self.uri}/{path}: has {size:,} bytes; allowed: up to {most:,}"
                )
            return found.bytes()

        return self._get(path, read)

    def get_range(self, path: str, start: int, length: int) -> bytes | None:
        """`length` bytes of `path` from `start`, fewer where it ends before; None as for `get`.

        Raises StorageError.
        """

        def attempt() -> Any:
            try:
                return obstore.get_range(self._store, path, start=start, length=length)
            except BaseError as error:  # begins behind the end
                if _BEHIND_THE_END.search(str(error)):
                    return b""
                raise

        return self._get(path, attempt)

    def exists(self, path: str) -> bool:
        """Whether `path` is there. Raises StorageError."""

        def attempt() -> bool:
            if self._store is None:
                return False
            check_kind(self.uri, self.root, path)
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
        if self.root is not None:
            if not (self.root / prefix).is_dir():
                return
            try:
                for chunk in obstore.list(self._store, prefix, chunk_size=5000):
                    for meta in chunk:
                        yield meta["path"], meta["size"], meta["last_modified"]
            except (BaseError, OSError) as error:
                words = self._words(error)
                raise StorageError(f"{self.uri}/{prefix}: cannot be listed: {words}") from error
            return
        patience = _Patience(self, f"{self.uri}/{prefix}: cannot be listed")
        last, in_order = "", True
        while True:
            try:
                for chunk in obstore.list(self._lister, prefix, offset=last or None):
                    self.answered = True
                    for meta in chunk:
                        in_order = in_order and last < meta["path"]
                        last = meta["path"]
                        yield last, meta["size"], meta["last_modified"]
                return
            except (BaseError, OSError) as error:
                # Stores list in order, so that a listing goes on where it broke. One that does
                # not (S3's directory buckets) must not be taken for one that does.
                patience.failed(error, final=bool(last) and not in_order)

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

    def _get(self, path: str, read: Callable[[], Any]) -> bytes | None:
        def attempt() -> bytes | None:
            if self._store is None:
                return None
            check_kind(self.uri, self.root, path)
            try:
                return bytes(read())
            except FileNotFoundError as error:
                if self.root is None and bucket_is_missing(error):
                    raise
                return None

        return self._retry("read", path, attempt)

    def _retry(self, verb: str, path: str, operation: Callable[[], T]) -> T:
        patience = _Patience(self, f"{self.uri}/{path}: cannot {verb}")
        while True:
            try:
                result = operation()
            except (BaseError, OSError) as error:
                patience.failed(error)
            else:
                self.answered = True
                return result

    def _verdict(self, error: Exception) -> Verdict:
        if isinstance(error, _UndecidedError):
            return "busy"
        if self.root is None:
            return verdict(error)
        return "final" if _is_final(error) else "busy"

    def _words(self, error: Exception) -> str:
        remote = self.root is None and _SCHEME.match(self.uri) is not None
        return explain(self.uri, error) if remote else _short(error)


class _UndecidedError(OSError):
    """A conditional write collided with another, and it is open which of them counts."""


class _Patience:
    """How long one operation is tried.

    On a local disk four times. On an object store as often as fits into two minutes, so that an
    overload or a short outage costs time and no image; but for ten seconds only while the store
    has not answered at all, because then the address or the credentials are likelier to be wrong.
    """

    def __init__(self, storage: Storage, what: str) -> None:
        self._storage = storage
        self._what = what
        self._began = time.monotonic()
        self._tries = 0
        self._delay = _FIRST_DELAY

    def failed(self, error: Exception, *, final: bool = False) -> None:
        """Wait before the next try, or raise StorageError where there is to be none."""
        storage = self._storage
        self._tries += 1
        found = storage._verdict(error)
        message = f"{self._what}: {storage._words(error)}"
        if found == "final":
            raise StorageUnusableError(message) from error
        if found == "busy":
            storage.answered = True
        delay = self._delay * (0.5 + random.random())
        seconds = time.monotonic() - self._began
        if storage.root is not None:
            over = self._tries >= _LOCAL_TRIES
        else:
            limit = _BUSY_SECONDS if storage.answered else _UNREACHABLE_SECONDS
            over = seconds + delay > limit
        if final or over:
            tried = f" ({self._tries} tries in {seconds:.0f} s)" if self._tries > 1 else ""
            raise StorageError(f"{message}{tried}") from error
        time.sleep(delay)
        self._delay = min(2 * self._delay, _LAST_DELAY)


def _is_final(error: Exception) -> bool:
    """Whether trying again at once cannot help: permissions, a full or read-only disk."""
    text = str(error)
    final = (
        "Permission denied",
        "Read-only file system",
        "No space left",
        "quota exceeded",
        "Not a directory",
        "Too many levels of symbolic links",
        "File name too long",
    )
    kinds = (PermissionError, PermissionDeniedError)
    return isinstance(error, kinds) or any(word in text for word in final)


def _short(error: BaseException) -> str:
    """An obstore message without its debug dump."""
    return str(error).split("\n\nDebug source")[0].strip() or type(error).__name__
