"""Hugging Face: listing and bytes through `huggingface_hub`, going on after a break by our own.

The library (2.4) drops a file that it has begun when its process ends, and a shard of Z-Image has
10 GB. So each file is kept here until it is whole, under the name of its content, and the
library's `http_get` is asked for the rest of it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
)

from zimage_core.byte_progress import ByteProgress
from zimage_core.daemon_threads import for_each
from zimage_core.file_hashes import Stopped
from zimage_core.hub import COMMIT, PARTS_FOLDER, WORKERS, HubError, RemoteFile, Snapshot
from zimage_core.partial_file import PartialFile

_TRIES = 4  # without a single new byte, before a file is given up
_BARS = "huggingface_hub.http_get"
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
_LOG_IN = "log in (`hf auth login`, or set HF_TOKEN)"
_COPY = "or fetch on a machine that reaches it and copy the folder"


class HuggingFaceHub:
    """See `zimage_core.hub.Hub`. `HF_ENDPOINT` and `HF_TOKEN` mean what they do to the library."""

    retry_seconds = 1.0  # before the second try; doubles

    def __init__(self) -> None:
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")

    def snapshot(self, repo: str, revision: str | None) -> Snapshot:
        """See `Hub.snapshot`."""
        try:
            info = HfApi(endpoint=self.endpoint).model_info(
                repo, revision=revision, files_metadata=True
            )
        except Exception as error:
            if not (_may_pass(error) or _is_of_the_hub(error)):
                raise
            raise HubError(self._reason(error, repo, revision)) from error
        if info.sha is None:
            raise HubError(f"{self.endpoint} does not say which commit of {repo} it has")
        if revision is not None and COMMIT.fullmatch(revision) and info.sha != revision:
            raise HubError(
                f"asked for commit {revision}, {self.endpoint} answered with {info.sha}; it does "
                "not keep to commits"
            )
        files = []
        for item in info.siblings or ():
            if item.size is None:
                raise HubError(f"{self.endpoint} does not say how large {item.rfilename} is")
            # what a pointer of Git LFS stands for has its own hash; the blob is the pointer
            sha256 = None if item.lfs is None else item.lfs["sha256"]
            blob = item.blob_id if item.lfs is None else None
            files.append(RemoteFile(item.rfilename, item.size, sha256, blob))
        return Snapshot(repo, revision, info.sha, tuple(files))

    def partial_bytes(self, file: RemoteFile, folder: Path) -> int:
        """See `Hub.partial_bytes`."""
        part = _part(file, folder)
        return part.stat().st_size if part.is_file() else 0

    def fetch(
        self,
        snapshot: Snapshot,
        files: Sequence[RemoteFile],
        folder: Path,
        progress: ByteProgress,
        stop: threading.Event,
    ) -> None:
        """See `Hub.fetch`."""
        # one file at a time would leave the network idle between small ones; large ones first
        ordered = sorted(files, key=lambda file: file.size, reverse=True)
        with _without_bars():
            for_each(
                lambda file: self._fetch(snapshot, file, folder, progress, stop),
                ordered,
                WORKERS,
                stop,
            )

    def _fetch(
        self,
        snapshot: Snapshot,
        file: RemoteFile,
        folder: Path,
        progress: ByteProgress,
        stop: threading.Event,
    ) -> None:
        algorithm, expected = file.check or ("sha256", None)
        part = _part(file, folder)
        with PartialFile(part, file.size, algorithm, progress.add, stop) as target:
            progress.add(target.tell(), found=True)
            for last in (False, True):
                self._fill(target, snapshot, file, progress, stop)
                found = target.finish()
                if expected in (None, found):
                    break
                target.restart()
                if last:
                    raise HubError(
                        f"{file.path} came with {algorithm} {found}, the repository lists "
                        f"{expected}, twice; try again later, or from another source"
                    )
                progress.say(f"{file.path}: came with a wrong {algorithm}; fetching it again")
        if stop.is_set():
            raise Stopped
        place = folder / file.path
        place.parent.mkdir(parents=True, exist_ok=True)
        part.replace(place)

    def _fill(
        self,
        target: PartialFile,
        snapshot: Snapshot,
        file: RemoteFile,
        progress: ByteProgress,
        stop: threading.Event,
    ) -> None:
        """Fetch what is missing of a file, over as many connections as it takes."""
        url = hf_hub_url(snapshot.repo, file.path, revision=snapshot.commit, endpoint=self.endpoint)
        # a compressed answer could not be gone on with: ranges count bytes of the file
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        failures = 0
        if target.tell() > file.size:
            target.restart()
        while target.tell() < file.size:
            before = target.tell()
            try:
                http_get(
                    url,
                    target,
                    resume_size=before,
                    headers=headers,
                    expected_size=file.size,
                    displayed_filename=file.path,
                )
            except Stopped:
                raise
            except Exception as error:
                if not _may_pass(error):
                    if not _is_of_the_hub(error):  # the disk's, or a mistake in here
                        raise
                    reason = self._reason(error, snapshot.repo, snapshot.revision, file.path)
                    raise HubError(reason) from error
                if target.tell() > file.size:  # an old library appends where no range is heeded
                    target.restart()
                failures = 0 if target.tell() > before else failures + 1
                if failures == _TRIES:
                    raise HubError(
                        f"{file.path}: the connection broke {_TRIES} times in a row at byte "
                        f"{target.tell()} of {file.size} ({_words(error)}); run the same again, it "
                        "goes on from there"
                    ) from error
                progress.say(f"{file.path}: {_words(error)}; going on from byte {target.tell()}")
                stop.wait(self.retry_seconds * 2**failures)
                if stop.is_set():
                    raise Stopped from error

    def _reason(
        self, error: Exception, repo: str, revision: str | None, file: str | None = None
    ) -> str:
        """What an exception of the library means to the user, and what to do."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        page = f"{self.endpoint}/{repo}"
        what = f"{file} of {repo}" if file else repo
        if isinstance(error, errors.GatedRepoError):
            return f"{what} is gated: accept its terms on {page} and {_LOG_IN}"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{page} has no revision {revision!r}; give a branch, tag or commit of it"
        if isinstance(error, errors.EntryNotFoundError) or (file and status == 404):
            return f"{page} lists {file} but does not have it; try again, or another revision"
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            return f"{page}: no such repository, or a private one; check the name, or {_LOG_IN}"
        if status == 401:
            return f"{page} wants a login for {what}; {_LOG_IN}"
        if status == 403:
            return f"{page} refuses {what} (403); {_LOG_IN} with a token that may read it"
        if status is not None:
            return f"{page} answers {status} for {what}; try again later"
        if isinstance(error, errors.OfflineModeIsEnabled):
            return f"HF_HUB_OFFLINE is set, and the folder is not complete; unset it, {_COPY}"
        return f"{self.endpoint} cannot be reached ({_words(error)}); check the network, {_COPY}"


def _part(file: RemoteFile, folder: Path) -> Path:
    # by content as well: bytes of an older version can never be gone on with
    content = file.check[1][:16] if file.check else str(file.size)
    return folder / PARTS_FOLDER / f"{file.path.replace('/', '--')}.{content}.part"


def _may_pass(error: Exception) -> bool:
    """Whether another try could do better."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return False
    if isinstance(error, OSError):
        return error.errno not in _DISK_ERRORS
    return type(error).__module__.partition(".")[0] in _TRANSPORTS


def _is_of_the_hub(error: Exception) -> bool:
    return hasattr(error, "response") or isinstance(error, errors.OfflineModeIsEnabled)


def _words(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


@contextmanager
def _without_bars() -> Iterator[None]:
    """One bar for all files is shown instead of the library's one for each."""
    if are_progress_bars_disabled(_BARS):
        yield
        return
    disable_progress_bars(_BARS)
    try:
        yield
    finally:
        enable_progress_bars(_BARS)
