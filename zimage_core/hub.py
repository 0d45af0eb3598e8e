"""What a model hub must be able to do, the same for every hub: list a repository, bring its files.

`hub_huggingface` and `hub_modelscope` do it, each with the client library of its hub.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from zimage_core.byte_progress import ByteProgress
from zimage_core.config import CheckpointError

# Source to the module and class that speak with it.
_HUBS = {
    "huggingface": ("zimage_core.hub_huggingface", "HuggingFaceHub"),
    "modelscope": ("zimage_core.hub_modelscope", "ModelScopeHub"),
}
SOURCES = tuple(_HUBS)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")

# Where parts of files wait inside a folder until they are whole.
PARTS_FOLDER = ".zimage-download"
WORKERS = 8  # files that are fetched at once


class HubError(CheckpointError):
    """A hub cannot give what is asked of it; the message says what to do about it."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as a hub lists it.

    Attributes:
        path: in the repository, with slashes.
        size: in bytes.
        sha256: of the content, hex; None where the hub does not say.
        git_sha1: hash by which Git names the content, hex; None where the hub does not say.
    """

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def check(self) -> tuple[str, str] | None:
        """Algorithm and hash that the content must have; None where the hub gives neither."""
        if self.sha256 is not None:
            return "sha256", self.sha256
        return None if self.git_sha1 is None else ("git_sha1", self.git_sha1)


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit.

    Attributes:
        repo: `Tongyi-MAI/Z-Image-Turbo`.
        revision: branch, tag or commit that was asked for; None for the main branch.
        commit: which commit that is now, hex; None where the hub does not say.
        files: all that it holds.
    """

    repo: str
    revision: str | None
    commit: str | None
    files: tuple[RemoteFile, ...]


class Hub(Protocol):
    """A place that repositories are fetched from."""

    endpoint: str

    def snapshot(self, repo: str, revision: str | None) -> Snapshot:
        """List a repository.

        Raises:
            HubError: there is no such repository or revision, it may not be read, or the hub
                cannot be reached.
        """

    def partial_bytes(self, file: RemoteFile, folder: Path) -> int:
        """Bytes of a file that an earlier `fetch` left in `folder` without ending."""

    def fetch(
        self,
        snapshot: Snapshot,
        files: Sequence[RemoteFile],
        folder: Path,
        progress: ByteProgress,
        stop: threading.Event,
    ) -> None:
        """Bring files into a folder; each appears under its name whole, with the listed content.

        Goes on where an earlier call was broken off. Bytes are reported to `progress`.

        Raises:
            HubError: a file cannot be had, or came with another content twice.
            OSError: it cannot be written.
        """


def open_hub(source: str) -> Hub:
    """Make the client of a hub.

    Raises:
        ValueError: `source` is unknown, or its package is not installed.
    """
    if source not in _HUBS:
        raise ValueError(f"source is {source!r}; allowed: {', '.join(SOURCES)}")
    module, name = _HUBS[source]
    hub: Any = getattr(import_module(module), name)
    client: Hub = hub()
    return client


def check_repository(repo: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        ValueError: with the name and what is allowed.
    """
    if not _REPOSITORY.fullmatch(repo):
        raise ValueError(
            f"repository is {repo!r}; allowed: OWNER/NAME, such as Tongyi-MAI/Z-Image-Turbo"
        )
