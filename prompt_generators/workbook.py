"""XLSX files: looked through before they are read, then read by openpyxl, then limited once more.

A workbook is a ZIP archive of XML. What makes a small one large is refused by counting, in a
stream and before openpyxl builds anything of it: what the archive unpacks to, its entries, the
elements of its parts, and declarations of entities, which OOXML forbids. Nothing is evaluated.
"""

from __future__ import annotations

import datetime
import math
import mmap
import zipfile
from pathlib import Path
from typing import Any
from xml.parsers import expat

from prompt_generators.base import INT64_MAX, ProfileError, Scalar
from prompt_generators.grid import MAX_CELL, MAX_CELLS, MAX_COLUMNS, MAX_ROWS, Grid

MAX_UNPACKED_BYTES = 512 * 2**20
_MAX_ENTRIES = 10_000
_MAX_SHEETS = 1000
_MAX_LOOSE = 500_000  # elements outside of rows and shared strings: styles, names, formats
_MAX_TEXT = 16 * 2**20  # characters of one string, before its cell is known
_MAX_TAG = 4 * 2**20  # bytes of one tag or comment
_MAX_DEPTH = 100
_CHUNK = 2**16
_ENTRY = b"PK\x01\x02"  # begins every entry of the archive's directory
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_EXCEL_ERRORS = {"#NULL!", "#DIV/0!", "#VALUE!", "#REF!", "#NAME?", "#NUM!", "#N/A"}


class _RefusedError(Exception):
    """A part of an archive that is not read any further: what is wrong, and what is allowed."""

    def __init__(self, problem: str, allowed: str) -> None:
        super().__init__(problem)
        self.problem, self.allowed = problem, allowed


def read_workbook(path: Path, sheet: str | None) -> tuple[Grid, str]:
    """Read one sheet, the first if none is named. Returns its grid and its name.

    Raises:
        ProfileError: the file is no workbook, is larger than what is allowed, has no such sheet,
            or a cell that cannot be used.
    """
    book = _open(path)
    try:
        sheets = _sheets(path, book)
        name = next(iter(sheets)) if sheet is None else sheet
        if name not in sheets:
            raise ProfileError(
                "no such sheet",
                path=path,
                sheet=name,
                allowed=", ".join(repr(title) for title in sheets),
            )
        try:
            # Some programs write a wrong <dimension>, which would cut the table off.
            sheets[name].reset_dimensions()
            raw = _rows(path, name, sheets[name])
        except ProfileError:
            raise
        except Exception as error:
            raise _unreadable(path, error, name) from error
    finally:
        book.close()
    return _grid(path, name, raw), name


def sheet_names(path: Path) -> list[str]:
    """Names of a workbook's sheets in its order. Raises ProfileError, see `read_workbook`."""
    book = _open(path)
    try:
        return list(_sheets(path, book))
    finally:
        book.close()


def _open(path: Path) -> Any:
    """The workbook, looked through and opened; nothing of its sheets is read yet."""
    _check_archive(path)
    import openpyxl

    try:
        # data_only=False: a formula arrives as its text and is refused in `_cell`; the value that
        # a spreadsheet program cached beside it may be stale.
        return openpyxl.load_workbook(path, read_only=True, data_only=False, keep_links=False)
    except Exception as error:
        raise _unreadable(path, error) from error


def _sheets(path: Path, book: Any) -> dict[str, Any]:
    sheets = {worksheet.title: worksheet for worksheet in book.worksheets}
    if not sheets:
        raise ProfileError("the workbook has no sheet with cells", path=path)
    return sheets


def _rows(path: Path, sheet: str, worksheet: object) -> list[list[object]]:
    """Rows without what is empty at their ends, and without empty rows at the end."""
    raw: list[list[object]] = []
    seen = last = 0
    for values in worksheet.iter_rows(values_only=True):  # type: ignore[attr-defined]  # untyped
        row = list(values)
        seen += len(row)
        while row and row[-1] is None:
            row.pop()
        raw.append(row)
        if row:
            last = len(raw)
        # openpyxl fills what the file leaves out, so that one far cell makes many.
        if len(raw) > MAX_ROWS or seen > 4 * MAX_CELLS:
            raise ProfileError(
                f"over {MAX_ROWS:,} rows, or over {4 * MAX_CELLS:,} cells with the empty ones",
                path=path,
                sheet=sheet,
                row=len(raw),
                allowed=f"{MAX_ROWS:,} rows, {MAX_CELLS:,} cells",
            )
    return raw[:last]


def _check_archive(path: Path) -> None:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if _count(data, _ENTRY, _MAX_ENTRIES + 1) > _MAX_ENTRIES:
                raise ProfileError(
                    "the archive has too many entries", path=path, allowed=f"up to {_MAX_ENTRIES:,}"
                )
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            if unpacked > MAX_UNPACKED_BYTES:
                raise ProfileError(
                    f"unpacks to {unpacked:,} bytes",
                    path=path,
                    allowed=f"up to {MAX_UNPACKED_BYTES:,}",
                )
            for entry in entries:
                _check_entry(path, archive, entry)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
        if isinstance(error, ProfileError):
            raise
        raise _unreadable(path, error) from error


def _count(data: mmap.mmap, what: bytes, most: int) -> int:
    found, place = 0, data.find(what)
    while place >= 0 and found < most:
        found += 1
        place = data.find(what, place + len(what))
    return found


def _check_entry(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    if entry.compress_type not in _METHODS:
        raise ProfileError(
            f"{entry.filename!r} in it is packed in another way than workbooks are", path=path
        )
    try:
        with archive.open(entry) as content:
            scan = _PartScan()
            while chunk := content.read(_CHUNK):
                scan.feed(chunk)
    except expat.ExpatError:
        # No XML, or XML that is broken from here on: nothing reads any further.
        pass
    except _RefusedError as error:
        raise ProfileError(
            f"{error.problem} in its part {entry.filename!r}", path=path, allowed=error.allowed
        ) from error


class _PartScan:
    """Counts what openpyxl would keep of an XML part."""

    def __init__(self) -> None:
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._text
        self._parser.StartDoctypeDeclHandler = self._doctype
        self._depth = self._loose = self._inside = self._cells = self._strings = self._sheets = 0
        self._rows = self._characters = self._silent = 0
        self._in_unit = False

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes. Raises `_RefusedError`, `ExpatError`."""
        self._silent += len(chunk)  # until something is found in it
        self._parser.Parse(chunk, False)
        if self._silent > _MAX_TAG:
            raise _RefusedError("a tag or comment is too long", f"up to {_MAX_TAG:,} bytes")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._silent = 0
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _RefusedError("elements are nested too deeply", f"up to {_MAX_DEPTH}")
        local = name.rpartition(":")[2]
        if local in ("row", "si"):  # openpyxl lets go of the last one when the next is read
            self._in_unit, self._inside, self._characters = True, 0, 0
            if local == "row":
                # openpyxl makes all rows up to the number that one says it has.
                number = attributes.get("r", "")
                far = int(number) if number.isdecimal() and len(number) < 20 else 0
                self._rows = max(self._rows + 1, far)
            self._strings += local == "si"
        elif local == "c" and self._in_unit:
            self._cells += 1
            self._characters = 0
        elif local == "sheet":
            self._sheets += 1
        if self._in_unit:
            self._inside += 1
        else:
            self._loose += 1
        self._limit("cells", max(self._cells, self._strings), MAX_CELLS)
        self._limit("rows", self._rows, MAX_ROWS)
        self._limit("elements in one row", self._inside, 8 * MAX_COLUMNS)
        self._limit("sheets", self._sheets, _MAX_SHEETS)
        self._limit("elements outside of rows", self._loose, _MAX_LOOSE)

    def _end(self, name: str) -> None:
        self._silent = 0
        self._depth -= 1
        if name.rpartition(":")[2] in ("row", "si"):
            self._in_unit = False

    def _text(self, text: str) -> None:
        self._silent = 0
        self._characters += len(text)
        self._limit("characters in one text", self._characters, _MAX_TEXT)

    def _doctype(self, *_: object) -> None:
        raise _RefusedError("a document type, which could declare entities,", "none in a workbook")

    def _limit(self, what: str, count: int, most: int) -> None:
        if count > most:
            raise _RefusedError(f"over {most:,} {what}", f"up to {most:,}")


def _unreadable(path: Path, error: BaseException, sheet: str | None = None) -> ProfileError:
    return ProfileError(
        "cannot be read as XLSX: damaged, protected by a password, or another format under this "
        f"name ({type(error).__name__}: {str(error)[:300]})",
        path=path,
        sheet=sheet,
    )


def _grid(path: Path, sheet: str, raw: list[list[object]]) -> Grid:
    # An XLSX row may end early; what is empty at its end was formatting, not cells.
    width = max(map(len, raw), default=0)
    if not width:
        raise ProfileError(
            "the sheet is empty: a header and at least one row are needed", path=path, sheet=sheet
        )
    if len(raw) * width > MAX_CELLS or width > MAX_COLUMNS:
        raise ProfileError(
            f"its cells span {len(raw):,} rows and {width:,} columns",
            path=path,
            sheet=sheet,
            allowed=f"{MAX_CELLS:,} cells, {MAX_COLUMNS:,} columns",
        )
    header = [_cell(path, sheet, 1, None, value) for value in raw[0]]
    header += [None] * (width - len(header))
    rows: Grid = []
    for number, values in enumerate(raw[1:], start=2):
        row = [
            value if value is None else _cell(path, sheet, number, header[i], value)
            for i, value in enumerate(values)
        ]
        rows.append(row + [None] * (width - len(row)))
    columns = [_unify_column([row[i] for row in rows]) for i in range(width)]
    return [header, *(list(row) for row in zip(*columns, strict=True))]


def _cell(path: Path, sheet: str, row: int, column: object, value: object) -> Scalar:
    name = None if column is None else str(column)
    problem = allowed = None
    if isinstance(value, str):
        text = value.strip()
        if len(text) > MAX_CELL:
            problem, allowed = f"{len(text):,} characters", f"up to {MAX_CELL:,}"
        elif not text.startswith("=") and text not in _EXCEL_ERRORS:
            return text or None
        else:
            formula = text[0] == "="
            problem = "a formula, which is never evaluated" if formula else "an error of Excel's"
            allowed = "a value; copy the column and paste it as values"
    elif value is None or isinstance(value, (bool, datetime.date)):
        return value
    elif isinstance(value, (datetime.time, datetime.timedelta)):
        return str(value)
    elif isinstance(value, (int, float)):
        if math.isfinite(value) if isinstance(value, float) else abs(value) <= INT64_MAX:
            return value
        problem, allowed = "the number is too large", "64 bits"
    else:  # array formulas and data tables come as objects of openpyxl
        value = getattr(value, "text", value)
        problem = "a formula, which is never evaluated"
        allowed = "a value; copy the column and paste it as values"
    raise ProfileError(
        problem, path=path, sheet=sheet, row=row, column=name, value=value, allowed=allowed
    )


def _unify_column(cells: list[Scalar]) -> list[Scalar]:
    """Whole numbers beside fractions are floats; times at midnight throughout are dates.

    XLSX has one kind of number and one kind of time, so the column tells which was meant. Columns
    of several kinds (numbers and text) stay as they are.
    """
    values = [cell for cell in cells if cell is not None]
    kinds = {type(value) for value in values}
    if kinds == {int, float}:
        return [None if cell is None else float(cell) for cell in cells]  # type: ignore[arg-type]  # numbers only
    midnight = datetime.time()
    if kinds == {datetime.datetime} and all(
        isinstance(value, datetime.datetime) and value.time() == midnight for value in values
    ):
        return [cell.date() if isinstance(cell, datetime.datetime) else cell for cell in cells]
    return cells
