"""CSV and XLSX files as grids of plain Python values, before anything is known of their meaning.

Nothing is evaluated. A table is not trusted: what it says is data, and one that is larger than
`grid` allows is refused before it takes memory. Of XLSX that is the work of `workbook`.
"""

from __future__ import annotations

import csv
import datetime
import io
import math
import re
import warnings
from pathlib import Path

from prompt_generators.base import INT64_MAX, ProfileError, Scalar
from prompt_generators.grid import MAX_CELL, MAX_CELLS, MAX_COLUMNS, MAX_FILE_BYTES, Grid
from prompt_generators.workbook import read_workbook
from prompt_generators.workbook import sheet_names as workbook_sheets

EXTENSIONS = (".csv", ".xlsx")

# An int in canonical form only: "007" and "+7" are names of something, not numbers.
_INT = re.compile(r"-?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+(?:[eE][+-]?[0-9]+)?)?")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_DATETIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?")
_BOOLS = {"true": True, "false": False}


def read_grid(path: Path, sheet: str | None = None) -> tuple[Grid, str | None]:
    """Read one sheet. Returns its grid and its name (`None` for CSV).

    Raises:
        ProfileError: the file cannot be read as what its extension says.
    """
    try:
        _check_file(path)
        if path.suffix.lower() == ".xlsx":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of openpyxl's, about styles and extensions
                return read_workbook(path, sheet)
        if sheet is not None:
            raise ProfileError("a CSV file has no sheets", path=path, value=sheet, allowed="null")
        return _read_csv(path), None
    except OSError as error:
        raise _unreadable(path, error) from error


def sheet_names(path: Path) -> list[str]:
    """Names of an XLSX file's sheets in its order; none for CSV.

    Raises:
        ProfileError: the file cannot be read as what its extension says.
    """
    try:
        _check_file(path)
        if path.suffix.lower() == ".csv":
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return workbook_sheets(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _check_file(path: Path) -> None:
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        raise ProfileError(
            "not a table's file name",
            path=path,
            value=path.suffix,
            allowed=f"{' or '.join(EXTENSIONS)}; save older formats as .xlsx",
        )
    if not path.is_file():
        problem = "is a pipe or device, not a file" if path.exists() else "no such file"
        raise ProfileError("is a folder, not a file" if path.is_dir() else problem, path=path)
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ProfileError(
            f"the file has {size:,} bytes", path=path, allowed=f"up to {MAX_FILE_BYTES:,}"
        )


def _unreadable(path: Path, error: OSError) -> ProfileError:
    return ProfileError(f"cannot be read: {error.strerror or error}", path=path)


def _read_csv(path: Path) -> Grid:
    import pandas as pd

    text = _decode(path)
    if not text.strip():
        raise ProfileError("the file is empty: a header and at least one row are needed", path=path)
    if not text.split("\n", 1)[0].strip():  # pandas would expect rows without cells
        raise ProfileError("the first row is empty: it must name the columns", path=path, row=1)
    _check_size(path, text)
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


def _check_size(path: Path, text: str) -> None:
    """Refuse what would take much more memory as a table than as text."""
    cells = number = 0
    names: list[str] = []
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        for number, row in enumerate(reader, start=1):
            names = names or row
            cells += len(row)
            if len(row) > MAX_COLUMNS or cells > MAX_CELLS:
                problem = (
                    f"over {MAX_CELLS:,} cells" if cells > MAX_CELLS else f"{len(row):,} cells"
                )
                allowed = f"{MAX_COLUMNS:,} columns, {MAX_CELLS:,} cells"
                raise ProfileError(problem, path=path, row=number, allowed=allowed)
            long = next((i for i, cell in enumerate(row) if len(cell) > MAX_CELL), None)
            if long is not None:
                raise _too_long(path, number, names[long] if 0 < long < len(names) else None)
    except csv.Error as error:
        # The csv module has a limit of its own, above ours: mostly a quote that is never closed.
        if "field larger" in str(error):
            raise _too_long(path, number + 1, None) from error


def _too_long(path: Path, row: int, column: str | None) -> ProfileError:
    return ProfileError(
        f"a cell of over {MAX_CELL:,} characters; is a quote not closed?",
        path=path,
        row=row,
        column=column and column[:80],
        allowed=f"up to {MAX_CELL:,}",
    )


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
