"""Thumbnails of an output's images, each made once: a folder of small WebP files.

A file's name is the beginning of the hash of the image's pixels, so that an image that was made
again gets a new one, and files are never changed. They appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from jobs.errors import InputError, StorageError
from jobs.output import read_image_bytes
from jobs.parallel import ordered_map
from jobs.progress_bar import ProgressBar
from jobs.storage import Storage
from jobs.writers import decode_image, sha256

SIDE = 256
"""Pixels of a thumbnail's longer side; smaller images keep their size."""
_QUALITY = 80
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NAME = re.compile(r"[0-9a-f]{32}\.webp", re.ASCII)
_STAGED = re.compile(r"\.[0-9a-f]{32}\.webp\.[0-9a-f]{8}\.part", re.ASCII)
_MAX_BYTES = 2**20  # far more than a thumbnail ever has
_THREADS = min(16, os.cpu_count() or 1)


class ImageProblemError(Exception):
    """An image that is missing, or is not what its row says."""


def thumbnail_name(pixels_sha256: object) -> str | None:
    """The file name of an image's thumbnail; None for what is no hash."""
    if not isinstance(pixels_sha256, str) or not _HASH.fullmatch(pixels_sha256):
        return None
    return f"{pixels_sha256[:32]}.webp"


class ThumbnailFolder:
    """Thumbnails on a local disk.

    Args:
        path: made when the first one is written.

    Raises:
        InputError: it is a link or a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise InputError(f"{path}: is a link or a file; allowed: a folder for thumbnails")

    def names(self) -> set[str]:
        """Names of the thumbnails that are there."""
        return {entry.name for entry in self._entries() if _NAME.fullmatch(entry.name)}

    def read(self, name: str) -> bytes | None:
        """One thumbnail, or None where it is not there or no WebP file of a thumbnail's size."""
        try:
            # not through a link, which someone else's folder may hold
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            with os.fdopen(os.open(self.path / name, flags), "rb") as file:
                content = file.read(_MAX_BYTES + 1)
        except OSError:
            return None
        fits = len(content) <= _MAX_BYTES and content[:4] == b"RIFF" and content[8:12] == b"WEBP"
        return content if fits else None

    def write(self, name: str, content: bytes) -> None:
        """Let a thumbnail appear. Raises StorageError."""
        part = self.path / f".{name}.{secrets.token_hex(4)}.part"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            part.replace(self.path / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise StorageError(f"{self.path}: cannot be written: {error.strerror}") from error

    def remove_others(self, kept: set[str]) -> int:
        """Remove thumbnails, and halves of them, that are not among `kept`; how many."""
        gone = 0
        for entry in self._entries():
            ours = _NAME.fullmatch(entry.name) or _STAGED.fullmatch(entry.name)
            if ours and entry.name not in kept:
                with contextlib.suppress(FileNotFoundError):
                    Path(entry.path).unlink()
                    gone += 1
        return gone

    def _entries(self) -> Iterable[os.DirEntry[str]]:
        try:
            with os.scandir(self.path) as entries:
                return [entry for entry in entries if entry.is_file(follow_symlinks=False)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}") from error


def checked_image(storage: Storage, row: Mapping[str, Any]) -> bytes:
    """The file of a row's image, compared with its hash.

    Args:
        row: an `ok` row with `sha256` and `jobs.output.IMAGE_COLUMNS`.

    Raises:
        ImageProblemError: it is missing, another one, or outside of the output.
    """
    try:
        content = read_image_bytes(storage, row)
    except StorageError as error:
        raise ImageProblemError(str(error)) from error
    if content is None:
        raise ImageProblemError(f"{row['file_name']}: the file is missing")
    if sha256(content) != row["sha256"]:
        raise ImageProblemError(f"{row['file_name']}: is not the file that was committed")
    return content


def make_thumbnail(content: bytes) -> bytes:
    """An image file's thumbnail as a WebP file. Raises ImageProblemError for what is no image."""
    try:
        image = Image.fromarray(decode_image(content))
    except OSError as error:
        raise ImageProblemError(f"cannot be decoded: {error}") from error
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=_QUALITY, method=4)
    return buffer.getvalue()


def make_thumbnails(
    storage: Storage, folder: ThumbnailFolder, rows: Iterable[Mapping[str, Any]]
) -> tuple[int, dict[int, str]]:
    """Make the thumbnails that are missing.

    Args:
        rows: `ok` rows, see `checked_image`.

    Returns:
        How many were made; and for each index whose image has a problem, what it is.

    Raises:
        StorageError: the folder cannot be written.
    """
    there = folder.names()
    made = 0
    problems: dict[int, str] = {}
    missing: dict[str, list[Mapping[str, Any]]] = {}  # equal images share one
    for row in rows:
        name = thumbnail_name(row["pixels_sha256"])
        if name is None:
            problems[row["index"]] = f"pixels_sha256 {row['pixels_sha256']!r:.80} is no hash"
        elif name not in there:
            missing.setdefault(name, []).append(row)

    def one(item: tuple[str, list[Mapping[str, Any]]]) -> tuple[list[Mapping[str, Any]], str]:
        name, same = item
        problem = ""
        for row in same:
            try:
                folder.write(name, make_thumbnail(checked_image(storage, row)))
                return same, ""
            except ImageProblemError as error:
                problem = problem or str(error)
        return same, problem

    with ProgressBar("making thumbnails", len(missing)) as bar:
        for same, problem in ordered_map(one, missing.items(), threads=_THREADS):
            bar.update()
            made += not problem
            if problem:
                problems.update({row["index"]: problem for row in same})
    return made, problems
