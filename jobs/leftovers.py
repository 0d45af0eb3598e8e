"""Files of an output that no commit refers to: what dead attempts and broken writes left behind.

Only names that this project writes are looked at; whatever else someone keeps in an output is
listed as unknown and nobody's to remove. Symbolic links are never followed.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Literal, NamedTuple

from jobs.commits import Listing, read_part
from jobs.config import NAME_PATTERN
from jobs.output import Output
from jobs.parallel import ordered_map
from jobs.progress_bar import ProgressBar
from jobs.storage import Storage

MIN_AGE = timedelta(days=1)  # design: an attempt younger than this may still be under way
IMAGES = "images"
_ATTEMPT = re.compile(r"(\d{8,})-[a-z0-9]{6,16}", re.ASCII)
_TAR = re.compile(
    _ATTEMPT.pattern + r"\.tar(?:#\d+)?", re.ASCII
)  # an attempt of the webdataset layout
_IMAGE = re.compile(NAME_PATTERN + r"_\d{8,}\.(?:png|jpg|webp)")
_STAGED = re.compile(r"(.+)#\d+")  # object_store writes `name#1` and renames it
# where files may have been staged, besides the attempts, and under which names
_STAGED_NAMES = {
    "": re.compile(r"job\.json|metadata\.parquet|tars\.txt|rejected\.csv"),
    "manifest": re.compile(r"\d{8,}-r\d{3,}-b[\w-]+\.parquet"),
    "events": re.compile(r"\d{6,}-\d{5,}\.jsonl"),
}
_READERS = 8

Kind = Literal["uncommitted", "staged", "superseded"]


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file that could go.

    Args:
        kind: `uncommitted`: an image that no row names; `staged`: half a write; `superseded`: an
            image that only rows of earlier revisions name. Where images lie in tars, a tar of such
            images alone.
    """

    file: str
    bytes: int
    kind: Kind


@dataclass
class Survey:
    """What was found.

    Args:
        leftovers: files that no commit refers to and that are old enough.
        young: those that are not.
        superseded: images of rows that were made again since.
        unknown: paths below `images/` that are nobody's business, and links.
        empty: folders of attempts in which there is nothing.
    """

    leftovers: list[Leftover] = field(default_factory=list)
    young: list[Leftover] = field(default_factory=list)
    superseded: list[Leftover] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)


def total_bytes(files: list[Leftover]) -> int:
    """Their size together."""
    return sum(file.bytes for file in files)


def survey(output: Output, *, min_age: timedelta = MIN_AGE) -> Survey:
    """Look for what no commit refers to.

    Args:
        output: opened after the last driver ended; commits of a later one are not seen.
        min_age: an attempt counts as young if any of its files was written since.

    Raises:
        StorageError: the output or one of its parts cannot be read.
    """
    found = Survey()
    newest_old = datetime.now(UTC) - min_age
    attempts = sorted(_attempts(output.storage, found), key=lambda a: (a.shard, a.name))
    with ProgressBar("looking for leftovers", len(attempts), "attempt") as bar:
        for shard_names, group in _with_names(output.listing, attempts):
            for attempt in group:
                _sort_out(found, attempt, shard_names, newest_old)
                bar.update()
    for folder, pattern in _STAGED_NAMES.items():
        for entry in _files(output.storage, folder, found.unknown):
            match = _STAGED.fullmatch(entry.name)
            if match and pattern.fullmatch(match[1]):
                leftover = Leftover(_join(folder, entry.name), entry.bytes, "staged")
                old = entry.modified <= newest_old
                (found.leftovers if old else found.young).append(leftover)
    return found


class _File(NamedTuple):
    name: str
    bytes: int
    modified: datetime


class _Attempt(NamedTuple):
    """Files in one folder; `name` is empty for an attempt's tar, which lies beside the folders."""

    name: str
    shard: int
    files: list[_File]

    @property
    def folder(self) -> str:
        return _join(IMAGES, self.name) if self.name else IMAGES


class _Names(NamedTuple):
    """Files that a shard's rows name, images or tars: of the current rows, and of all revisions."""

    current: set[str]
    all: set[str]


def _sort_out(found: Survey, attempt: _Attempt, names: _Names, newest_old: datetime) -> None:
    """Put each file of an attempt where it belongs."""
    young = any(file.modified > newest_old for file in attempt.files)
    if not attempt.files:
        found.empty.append(attempt.folder)
    for file in attempt.files:
        path = _join(attempt.folder, file.name)
        staged = _STAGED.fullmatch(file.name)
        if path in names.current:
            continue
        if path in names.all:
            found.superseded.append(Leftover(path, file.bytes, "superseded"))
        elif attempt.name and not _IMAGE.fullmatch(staged[1] if staged else file.name):
            found.unknown.append(path)
        else:
            kind: Kind = "staged" if staged else "uncommitted"
            (found.young if young else found.leftovers).append(Leftover(path, file.bytes, kind))


def _attempts(storage: Storage, found: Survey) -> Iterator[_Attempt]:
    """All attempts with their files; whatever else lies beside them goes to `found.unknown`."""
    if storage.root is None:
        yield from _remote_attempts(storage, found)
        return
    folder = storage.root / IMAGES
    if folder.is_symlink():
        found.unknown.append(IMAGES)
        return
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        match = _ATTEMPT.fullmatch(entry.name)
        path = f"{IMAGES}/{entry.name}"
        tar = _TAR.fullmatch(entry.name)
        if tar is not None and entry.is_file(follow_symlinks=False):
            yield from _tar_attempt(entry, int(tar[1]))
        elif match is None or not entry.is_dir(follow_symlinks=False):
            found.unknown.append(path)
        else:
            yield _Attempt(entry.name, int(match[1]), list(_files(storage, path, found.unknown)))


def _remote_attempts(storage: Storage, found: Survey) -> Iterator[_Attempt]:
    attempts: dict[str, _Attempt] = {}
    for path, size, modified in storage.list(IMAGES):
        folder, _, name = path.removeprefix(f"{IMAGES}/").partition("/")
        match = _ATTEMPT.fullmatch(folder)
        tar = _TAR.fullmatch(folder)
        if tar is not None and not name:
            yield _Attempt("", int(tar[1]), [_File(folder, size, modified)])
            continue
        if match is None or not name or "/" in name:
            found.unknown.append(path)
            continue
        attempt = attempts.setdefault(folder, _Attempt(folder, int(match[1]), []))
        attempt.files.append(_File(name, size, modified))
    yield from attempts.values()


def _tar_attempt(entry: os.DirEntry[str], shard: int) -> Iterator[_Attempt]:
    with contextlib.suppress(FileNotFoundError):  # a staged one, gone since
        status = entry.stat(follow_symlinks=False)
        modified = datetime.fromtimestamp(status.st_mtime, UTC)
        yield _Attempt("", shard, [_File(entry.name, status.st_size, modified)])


def _files(storage: Storage, folder: str, unknown: list[str]) -> Iterator[_File]:
    """Plain files directly in a folder of a local output; an object store stages nothing."""
    if storage.root is None or (folder and (storage.root / folder).is_symlink()):
        return
    try:
        entries = list(os.scandir(storage.root / folder))
    except FileNotFoundError:
        return
    for entry in entries:
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # gone since
            continue
        if stat.S_ISREG(status.st_mode):
            modified = datetime.fromtimestamp(status.st_mtime, UTC)
            yield _File(entry.name, status.st_size, modified)
        elif folder.startswith(IMAGES):
            unknown.append(_join(folder, entry.name))


def _with_names(
    listing: Listing, attempts: list[_Attempt]
) -> Iterator[tuple[_Names, list[_Attempt]]]:
    """Attempts by shard, each with the names in that shard's rows, read in parallel and lazily."""
    shards = [list(group) for _, group in groupby(attempts, key=lambda attempt: attempt.shard)]
    numbers = [group[0].shard for group in shards]
    names = ordered_map(lambda shard: _names(listing, shard), numbers, threads=_READERS)
    return zip(names, shards, strict=True)


def _names(listing: Listing, shard: int) -> _Names:
    parts = sorted(listing.parts.get(shard, ()), key=lambda part: (part.revision, part.epoch))
    current: dict[int, str | None] = {}
    every: set[str] = set()
    for part in parts:
        rows = read_part(listing.storage, part, ["index", "file_name", "tar"]).to_pydict()
        tars = rows.get("tar") or [None] * len(rows["index"])
        files = [tar or name for tar, name in zip(tars, rows["file_name"], strict=True)]
        current.update(zip(rows["index"], files, strict=True))
        every.update(name for name in files if name is not None)
    return _Names({name for name in current.values() if name is not None}, every)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
