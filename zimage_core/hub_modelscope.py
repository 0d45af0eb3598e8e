"""ModelScope: listing and bytes through `modelscope_hub`, the light half of its client.

(`import modelscope` imports torch, and hands downloads to `modelscope_hub`.) The library goes on
by itself with files that a killed process left, and checks every file's SHA-256.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from zimage_core.byte_progress import ByteProgress
from zimage_core.hub import COMMIT, PARTS_FOLDER, WORKERS, HubError, RemoteFile, Snapshot

_MODEL = "model"
_INSTALL = "pip install 'zimage-batch[modelscope]'"
_LOG_IN = "log in (`ms login`, or set MODELSCOPE_API_TOKEN)"
_COPY = "or fetch on a machine that reaches it and copy the folder"


class ModelScopeHub:
    """See `zimage_core.hub.Hub`.

    `MODELSCOPE_ENDPOINT` and `MODELSCOPE_API_TOKEN` mean what they do to the library.
    """

    def __init__(self) -> None:
        try:
            self._library: Any = import_module("modelscope_hub")
        except ImportError as error:
            raise ValueError(
                f"source 'modelscope' needs the package modelscope-hub: {_INSTALL}"
            ) from error
        # a configuration of its own: the library's default one is read once for all
        self._api = self._library.HubApi(config=self._library.HubConfig())
        self.endpoint = str(self._api.legacy.endpoint)

    def snapshot(self, repo: str, revision: str | None) -> Snapshot:
        """See `Hub.snapshot`. The main branch is called `master` here."""
        try:
            self._use_site_of(repo)
            entries = self._api.legacy.list_repo_files(repo, _MODEL, revision or "master")
            if not entries:
                # what the hub answers for a revision that does not exist
                known = [
                    str(item.get("Revision"))
                    for item in self._api.list_repo_revisions(repo, _MODEL)
                ]
                raise HubError(
                    f"{self._page(repo)} has no revision {revision or 'master'!r}, or no files in "
                    f"it; there are: {', '.join(known) or 'none'}"
                )
        except HubError:
            raise
        except Exception as error:
            raise HubError(self._reason(error, repo)) from error
        files = []
        for entry in entries:
            if entry.get("Type") != "tree":
                sha256 = (entry.get("Sha256") or "").lower() or None
                files.append(RemoteFile(entry["Path"], int(entry["Size"]), sha256))
        return Snapshot(repo, revision, _commit(entries, revision), tuple(files))

    def partial_bytes(self, file: RemoteFile, folder: Path) -> int:
        """See `Hub.partial_bytes`."""
        part = folder / f"{file.path}.incomplete"  # the library's name for it
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
        left = sorted(files, key=lambda file: file.size, reverse=True)
        while left:
            done, there = progress.done, self._arrived(left, folder)
            try:
                self._fetch(snapshot, left, folder, progress)
                return
            except self._library.FileDownloadError as error:
                path, cause = next(iter(error.failed_files.items()))
                if isinstance(cause, OSError) and cause.errno is not None:
                    raise cause from error  # the disk's
                moved = self._arrived(left, folder) > there
                # The library gives a file an hour and a few tries. What has moved may go on.
                if not (moved and all(map(self._may_pass, error.failed_files.values()))):
                    raise HubError(self._reason(cause, snapshot.repo, path)) from error
                progress.say(f"{path}: {_words(cause)}; going on")
                # it will report the bytes of unfinished files again
                ended = sum(file.size for file in left if file.path not in error.failed_files)
                progress.add(done + ended - progress.done)
                left = [file for file in left if file.path in error.failed_files]
            except self._library.HubError as error:
                raise HubError(self._reason(error, snapshot.repo)) from error

    def _fetch(
        self,
        snapshot: Snapshot,
        files: Sequence[RemoteFile],
        folder: Path,
        progress: ByteProgress,
    ) -> None:
        with self._without_bars():
            self._api.download_repo(
                snapshot.repo,
                _MODEL,
                revision=snapshot.revision or "master",
                local_dir=folder,
                cache_dir=folder / PARTS_FOLDER,  # only for its locks
                file_list=[
                    {"Path": file.path, "Size": file.size, "Sha256": file.sha256, "Type": "blob"}
                    for file in files
                ],
                max_workers=WORKERS,
                progress_callbacks=[_callback(self._library, progress)],
            )

    def _arrived(self, files: Sequence[RemoteFile], folder: Path) -> int:
        """Bytes that are there of files that are being fetched."""
        paths = [folder / file.path for file in files]
        whole = sum(path.stat().st_size for path in paths if path.is_file())
        return whole + sum(self.partial_bytes(file, folder) for file in files)

    def _may_pass(self, error: BaseException) -> bool:
        if isinstance(error, self._library.FileIntegrityError):
            return False
        return bool(getattr(error, "retryable", False)) or "Deadline" in type(error).__name__

    def _use_site_of(self, repo: str) -> None:
        """The library has two sites; which one holds the repository must be found out."""
        if "MODELSCOPE_ENDPOINT" in os.environ or "MODELSCOPE_DOMAIN" in os.environ:
            return
        self.endpoint = self._api.resolve_endpoint_for_read(repo)
        self._api = self._library.HubApi(endpoint=self.endpoint)

    def _page(self, repo: str) -> str:
        return f"{self.endpoint}/models/{repo}"

    def _reason(self, error: BaseException, repo: str, file: str | None = None) -> str:
        """What an exception of the library means to the user, and what to do."""
        library, page = self._library, self._page(repo)
        what = f"{file} of {repo}" if file else repo
        if isinstance(error, library.NotExistError):
            if file:
                return f"{page} lists {file} but does not have it; try again, or another revision"
            return f"{page}: no such repository, or a private one; check the name, or {_LOG_IN}"
        if isinstance(error, library.AuthenticationError):
            return f"{page} wants a login for {what}; {_LOG_IN}"
        if isinstance(error, library.PermissionDeniedError):
            return f"{page} refuses {what} (403); {_LOG_IN} with a token that may read it"
        if isinstance(error, library.FileIntegrityError):
            return (
                f"{what} came with other bytes than the repository lists, several times "
                f"({_words(error)}); try again later, or from another source"
            )
        status = getattr(error, "status_code", None)
        if status is not None:
            return f"{page} answers {status} for {what}; try again later"
        if file:
            return (
                f"{what}: the connection broke and did not come back ({_words(error)}); run the "
                "same again, it goes on from there"
            )
        return f"{self.endpoint} cannot be reached ({_words(error)}); check the network, {_COPY}"

    @contextmanager
    def _without_bars(self) -> Iterator[None]:
        """One bar for all files is shown instead of the library's, which it cannot be told."""
        module: Any = import_module("modelscope_hub._download")
        bar = module.tqdm
        module.tqdm = partial(bar, disable=True)
        try:
            yield
        finally:
            module.tqdm = bar


def _commit(entries: Sequence[dict[str, Any]], revision: str | None) -> str | None:
    """The commit of a listing: each file names the one that changed it last."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    newest = max(entries, key=lambda entry: entry.get("CommittedDate") or 0)
    commit = newest.get("Revision")
    return commit if isinstance(commit, str) and COMMIT.fullmatch(commit) else None


def _callback(library: Any, progress: ByteProgress) -> type[Any]:
    """A class that the library makes one of for each file, and tells of its bytes."""

    class Callback(library.ProgressCallback):  # type: ignore[misc]
        def update(self, size: int) -> None:
            progress.add(size)

    return Callback


def _words(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
