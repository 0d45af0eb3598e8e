"""CSV and XLSX files as grids of plain Python values, before anything is known of their meaning.

Nothing is evaluated. A table is not trusted: what it says is data, and a file that unpacks to
more than `MAX_UNPACKED_BYTES` is refused before it is unpacked.
"""

from __future__ import annotations

import datetime
import io
import math
import re
import zipfile
from pathlib import Path

from prompt_generators.base import INT64_MAX, ProfileError, Scalar

EXTENSIONS = (".csv", ".xlsx")
MAX_UNPACKED_BYTES = 512 * 2**20

Grid = list[list[Scalar]]
"""Rows of cells, all of one length. Row 0 is the header; an empty cell is None."""

# An int in canonical form only: "007" and "+7" are names of something, not numbers.
_INT = re.compile(r"-?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+(?:[eE][+-]?[0-9]+)?)?")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_DATETIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?")
_BOOLS = {"true": True, "false": False}
_EXCEL_ERRORS = {"#NULL!", "#DIV/0!", "#VALUE!", "#REF!", "#NAME?", "#NUM!", "#N/A"}


def read_grid(path: Path, sheet: str | None = None) -> tuple[Grid, str | None]:
    """Read one sheet. Returns its grid and its name (`None` for CSV).

    Raises:
        ProfileError: the file cannot be read as what its extension says.
    """
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        raise ProfileError(
            "not a table's file name",
            path=path,
            value=path.suffix,
            allowed=f"{' or '.join(EXTENSIONS)}; save older formats as .xlsx",
        )
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "no such file"
        raise ProfileError(problem, path=path)
    if extension == ".xlsx":
        return _read_xlsx(path, sheet)
    if sheet is not None:
        raise ProfileError("a CSV file has no sheets", path=path, value=sheet, allowed="null")
    return _read_csv(path), None


def _read_csv(path: Path) -> Grid:
    import pandas as pd

    text = _decode(path)
    if not text.strip():
        raise ProfileError("the file is empty: a header and at least one row are needed", path=path)
    if not text.split("\n", 1)[0].strip():  # pandas would expect rows without cells
        raise ProfileError("the first row is empty: it must name the columns", path=path, row=1)
    try:
        # Python's own parser, because pandas' C parser fills short rows with "" and so hides them;
        # here what a row lacks is None, whereas an empty cell is "". All else stays text:
        # `_infer_column` decides on types, as pandas would make 34.0 of an int beside an empty
        # cell, 7 of "007" and an empty cell of "NA".
        frame = pd.read_csv(
            io.StringIO(text, newline=""),
            header=None,
            dtype=object,
            na_filter=False,
            skip_blank_lines=False,
            engine="python",
        )
    except pd.errors.ParserError as error:
        place = re.search(r"line (\d+)", str(error))
        raise ProfileError(
            f"not well-formed CSV: {error}", path=path, row=int(place[1]) if place else None
        ) from error
    rows: list[list[object]] = frame.values.tolist()
    width = len(rows[0])
    cells: list[list[str | None]] = []
    for number, row in enumerate(rows, start=1):
        present = [cell for cell in row if isinstance(cell, str)]
        if any(cell.strip() for cell in present) and len(present) < width:
            raise ProfileError(
                f"the row has {len(present)} cells, the header has {width}", path=path, row=number
            )
        cells.append([cell.strip() or None for cell in present])
        cells[-1] += [None] * (width - len(present))  # a blank line
    columns = [_infer_column([row[i] for row in cells[1:]]) for i in range(width)]
    return [list(cells[0]), *(list(row) for row in zip(*columns, strict=True))]


def _decode(path: Path) -> str:
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ProfileError("not UTF-8 text but UTF-16", path=path, allowed="UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProfileError(
            "not UTF-8 text",
            path=path,
            row=content.count(b"\n", 0, error.start) + 1,
            value=content[error.start : error.start + 1],
            allowed="UTF-8, with or without a byte order mark",
        ) from error
    if "\0" in text:
        row = text.count("\n", 0, text.index("\0")) + 1
        raise ProfileError("not text: it holds a NUL byte", path=path, row=row)
    return text


def _infer_column(cells: list[str | None]) -> list[Scalar]:
    """The type that every cell of the column can have without loss; text where there is none."""
    texts = [cell for cell in cells if cell is not None]
    if not texts:
        return list(cells)
    if all(text.lower() in _BOOLS for text in texts):
        return [None if cell is None else _BOOLS[cell.lower()] for cell in cells]
    if all(_INT.fullmatch(text) and len(text) <= 20 for text in texts):
        ints = [None if cell is None else int(cell) for cell in cells]
        if all(value is None or -INT64_MAX <= value <= INT64_MAX for value in ints):
            return list(ints)
        return list(cells)
    if all(_FLOAT.fullmatch(text) for text in texts):
        floats = [None if cell is None else float(cell) for cell in cells]
        # More digits than a float keeps: an account number, not a quantity.
        long = any(len(re.sub(r"\D", "", text)) > 17 for text in texts)
        if not long and all(value is None or math.isfinite(value) for value in floats):
            return list(floats)
        return list(cells)
    for pattern, parse in (
        (_DATE, datetime.date.fromisoformat),
        (_DATETIME, datetime.datetime.fromisoformat),
    ):
        if all(pattern.fullmatch(text) for text in texts):
            try:
                return [None if cell is None else parse(cell) for cell in cells]
            except ValueError:  # the 30th of February: it stays the text that it is
                return list(cells)
    return list(cells)


def _read_xlsx(path: Path, sheet: str | None) -> tuple[Grid, str]:
    _check_archive(path)
    import openpyxl

    try:
        # data_only=False: a formula arrives as its text and is refused in `_cell`; the value that
        # a spreadsheet program cached beside it may be stale.
        book = openpyxl.load_workbook(path, read_only=True, data_only=False)
    except Exception as error:
        raise _unreadable(path, error) from error
    try:
        sheets = {worksheet.title: worksheet for worksheet in book.worksheets}
        if not sheets:
            raise ProfileError("the workbook has no sheet with cells", path=path)
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
            raw = [list(row) for row in sheets[name].iter_rows(values_only=True)]
        except Exception as error:
            raise _unreadable(path, error, name) from error
    finally:
        book.close()
    return _grid(path, name, raw), name


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise _unreadable(path, error) from error
    if unpacked > MAX_UNPACKED_BYTES:
        raise ProfileError(
            f"unpacks to {unpacked} bytes", path=path, allowed=f"up to {MAX_UNPACKED_BYTES}"
        )


def _unreadable(path: Path, error: BaseException, sheet: str | None = None) -> ProfileError:
    return ProfileError(
        "cannot be read as XLSX: damaged, protected by a password, or another format under this "
        f"name ({type(error).__name__}: {error})",
        path=path,
        sheet=sheet,
    )


def _grid(path: Path, sheet: str, raw: list[list[object]]) -> Grid:
    # Trailing empty columns are formatting, not cells; an XLSX row may also end early.
    width = 0
    for values in raw:
        for i in range(len(values), width, -1):
            if values[i - 1] is not None:
                width = i
                break
    if not width:
        raise ProfileError(
            "the sheet is empty: a header and at least one row are needed", path=path, sheet=sheet
        )
    header = [_cell(path, sheet, 1, None, value) for value in raw[0][:width]]
    header += [None] * (width - len(header))
    rows: Grid = []
    for number, values in enumerate(raw[1:], start=2):
        row = [
            value if value is None else _cell(path, sheet, number, header[i], value)
            for i, value in enumerate(values[:width])
        ]
        rows.append(row + [None] * (width - len(row)))
    columns = [_unify_column([row[i] for row in rows]) for i in range(width)]
    return [header, *(list(row) for row in zip(*columns, strict=True))]


def _cell(path: Path, sheet: str, row: int, column: object, value: object) -> Scalar:
    name = None if column is None else str(column)
    problem = allowed = None
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith("=") and text not in _EXCEL_ERRORS:
            return text or None
        problem = "a formula, which is never evaluated" if text[0] == "=" else "an error of Excel's"
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
