"""`rejected.csv`: which images of an output somebody looked at and does not want.

A mark is of an image, not of an index: it holds the hash of the pixels, so that it no longer
counts once the sample was made again otherwise. The file lies in the output, beside
`metadata.parquet`, and is a table that people may edit:

    index,pixels_sha256,note,at
    12,9f86d081...,six fingers,2026-11-30T15:04:05+00:00
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from jobs.config import MAX_INT64
from jobs.errors import InputError
from jobs.storage import Storage
from prompt_generators.cells import defused

PATH = "rejected.csv"
COLUMNS = ("index", "pixels_sha256", "note", "at")
MAX_NOTE = 500
"""Characters of a note."""
MAX_BYTES = 64 * 2**20
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
_INDEX = re.compile(r"\d{1,19}", re.ASCII)
_WRITING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Rejection:
    """One mark.

    Args:
        pixels_sha256: of the image that was looked at, as its row had it.
        note: what is wrong with it, at most `MAX_NOTE` characters.
        at: when it was marked, with its time zone.
        row: of the file that it was read from; 0 for one that was not read.
    """

    index: int
    pixels_sha256: str
    note: str
    at: datetime
    row: int = 0

    @property
    def image(self) -> tuple[int, str]:
        """What is marked; no two marks have the same."""
        return self.index, self.pixels_sha256


def read_rejected(storage: Storage) -> list[Rejection]:
    """All marks of an output in the order of the file, stale ones too; none where there is no file.

    Raises:
        InputError: a cell does not fit: file, row, column, value and what is allowed.
        StorageError: the file cannot be read.
    """
    content = storage.get(PATH, most=MAX_BYTES)
    return [] if content is None else parse_rejected(content, f"{storage.uri}/{PATH}")


def counting(
    rejections: Iterable[Rejection], current: Mapping[int, str | None]
) -> dict[int, Rejection]:
    """The marks that count, by index: those of the very image that a sample has now.

    Args:
        current: for each index the `pixels_sha256` of its current row.
    """
    return {r.index: r for r in rejections if current.get(r.index) == r.pixels_sha256}


def add_rejected(storage: Storage, rejections: Iterable[Rejection]) -> int:
    """Add marks, or replace the note of those that are there; how many images were not marked.

    Two writers on one machine wait for each other. On an object store, and between machines, the
    later of two that write in the same moment wins.

    Raises:
        InputError: the file that is there is damaged.
        StorageError: it cannot be read or written.
    """
    given = {r.image: replace(r, row=0) for r in rejections}

    def change(marks: dict[tuple[int, str], Rejection]) -> int:
        new = len(given.keys() - marks.keys())
        marks.update(given)
        return new

    return _change(storage, change)


def remove_rejected(storage: Storage, images: Iterable[tuple[int, str]]) -> int:
    """Take marks away, each named by index and hash; how many were there. Raises as for adding."""
    gone = list(images)

    def change(marks: dict[tuple[int, str], Rejection]) -> int:
        return sum(marks.pop(image, None) is not None for image in gone)

    return _change(storage, change)


def parse_rejected(
    content: bytes, where: str, current: Mapping[int, str | None] | None = None
) -> list[Rejection]:
    """Read a table of marks, as this module writes it or as a spreadsheet program saves it.

    Args:
        where: the file, for messages.
        current: for a table from elsewhere: the hash of each image that there is. Only the column
            `index` is needed then; a cell without a hash means the current image, one without a
            time means now, and an index without an image is an error.

    Raises:
        InputError: naming file, row (the header is row 1), column, value and what is allowed.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not UTF-8 ({error}); allowed: CSV in UTF-8") from error
    header = text.partition("\n")[0]
    comma = ";" if ";" in header and "," not in header else ","  # as Excel in half of Europe
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=comma, strict=True)
    found: dict[tuple[int, str], Rejection] = {}
    try:
        names = [name.strip() for name in next(lines, [])]
        _check_header(names, where, COLUMNS if current is None else COLUMNS[:1])
        for number, cells in enumerate(lines, 2):
            if not any(cells):
                continue
            if len(cells) > len(names):
                raise InputError(
                    f"{where}: row {number}: {len(cells)} cells; allowed: {len(names)}"
                )
            row = _Row(where, number, dict(zip(names, cells, strict=False)))
            mark = row.rejection(current)
            if mark.image in found:
                earlier = found[mark.image].row
                raise InputError(f"{where}: row {number}: the same image as in row {earlier}")
            found[mark.image] = mark
    except csv.Error as error:
        raise InputError(f"{where}: row {lines.line_num}: no CSV: {error}") from error
    return list(found.values())


def dump_rejected(rejections: Iterable[Rejection]) -> bytes:
    """The file's bytes; what a spreadsheet program would run as a formula is defused."""
    buffer = io.StringIO(newline="")
    lines = csv.writer(buffer, lineterminator="\n")
    lines.writerow(COLUMNS)
    for r in rejections:
        lines.writerow((r.index, r.pixels_sha256, defused(r.note), r.at.isoformat("T", "seconds")))
    return buffer.getvalue().encode()


def note_fault(note: str) -> str | None:
    """What is allowed, where a note does not fit."""
    return None if len(note) <= MAX_NOTE else f"up to {MAX_NOTE} characters"


@dataclass(frozen=True)
class _Row:
    where: str
    number: int
    cells: dict[str, str]

    def rejection(self, current: Mapping[int, str | None] | None) -> Rejection:
        text = self._cell("index")
        if not _INDEX.fullmatch(text) or int(text) > MAX_INT64:
            raise self._error("index", "the number of a sample")
        index = int(text)
        image = self._cell("pixels_sha256").lower()
        if current is not None and current.get(index) is None:
            raise self._error("index", "a sample that has an image")
        if not image and current is not None:
            image = current[index] or ""
        if not _HASH.fullmatch(image):
            raise self._error("pixels_sha256", "64 digits 0-9, a-f")
        note = self.cells.get("note", "").strip()
        fault = note_fault(note)
        if fault is not None:
            raise self._error("note", fault)
        return Rejection(index, image, note, self._time(optional=current is not None), self.number)

    def _time(self, *, optional: bool) -> datetime:
        text = self._cell("at")
        if optional and not text:
            return datetime.now(UTC)
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            time = None
        if time is None or time.tzinfo is None:
            raise self._error("at", "a time with its zone, such as 2026-11-30T15:04:05+00:00")
        return time

    def _cell(self, column: str) -> str:
        return self.cells.get(column, "").strip()

    def _error(self, column: str, allowed: str) -> InputError:
        value = self.cells.get(column, "")
        return InputError(
            f"{self.where}: row {self.number}, column {column}: value {value!r:.80}; "
            f"allowed: {allowed}"
        )


def _check_header(names: list[str], where: str, needed: Iterable[str]) -> None:
    for column in needed:
        if column not in names:
            raise InputError(
                f"{where}: row 1: no column {column!r}; allowed: a table with the columns "
                f"{', '.join(COLUMNS)}"
            )
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{where}: row 1: column {name!r:.80} is there twice")


def _change(storage: Storage, change: Callable[[dict[tuple[int, str], Rejection]], int]) -> int:
    with _alone(storage):
        before = read_rejected(storage)
        marks = {mark.image: mark for mark in before}
        count = change(marks)
        if list(marks.values()) != before:
            storage.put(PATH, dump_rejected(marks.values()))
    return count


@contextlib.contextmanager
def _alone(storage: Storage) -> Iterator[None]:
    """Nobody else of this machine changes the file meanwhile."""
    with _WRITING, contextlib.ExitStack() as stack:
        if storage.root is not None and storage.root.is_dir():
            folder = os.open(storage.root, os.O_RDONLY)
            stack.callback(os.close, folder)
            # A lock on the folder itself leaves no file behind. Some network file systems have none
            # for folders; there the later of two writers wins, as on an object store.
            with contextlib.suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_EX)
        yield
