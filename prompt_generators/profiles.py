"""Profile tables: rows with named columns, and the cells that every generator reads alike."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from prompt_generators.base import INT64_MAX, ProfileError, Prompt, Scalar
from prompt_generators.grid import Grid
from prompt_generators.spreadsheet import read_grid

RESERVED_COLUMNS = ("seed", "width", "height", "negative_prompt", "loras")
"""Columns that set the prompt's own fields instead of its text, in every built-in generator."""

SIZE_MULTIPLE = 16  # pixels; the model's patches are 2 x 2 latents of 8 x 8 pixels


class PromptFields(TypedDict, total=False):
    """Keyword arguments of `Prompt` that come from reserved columns."""

    seed: int | None
    width: int | None
    height: int | None
    negative_text: str | None
    images: tuple[str, ...]
    loras: tuple[str, ...]


@dataclass(frozen=True)
class Profiles:
    """A table of profiles.

    Attributes:
        path: the file, as it was given.
        sheet: the sheet's name; `None` for CSV.
        columns: names, in the file's order.
        rows: one dict from column to value for each row that is not empty; an empty cell is `None`.
        row_numbers: for each of `rows` the number a spreadsheet shows for it (the header is 1).
        fingerprint: `sha256:<hex>` of columns, values and their types, not of the file: saving the
            same table again, or as CSV instead of XLSX, does not change it.
    """

    path: Path
    sheet: str | None
    columns: tuple[str, ...]
    rows: tuple[dict[str, Scalar], ...]
    row_numbers: tuple[int, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    def error(
        self,
        problem: str,
        *,
        row: int | None = None,
        column: str | None = None,
        allowed: str | None = None,
    ) -> ProfileError:
        """The error for a cell of `rows[row]`, a column (`row=None`) or the table (neither)."""
        return ProfileError(
            problem,
            path=self.path,
            sheet=self.sheet,
            row=None if row is None else self.row_numbers[row],
            column=column,
            value=None if row is None or column is None else self.rows[row].get(column),
            allowed=allowed,
        )

    def require_column(self, column: str, what: str) -> None:
        """Raise ProfileError, listing the columns, unless there is one named `column`.

        `what` says who asks, for instance "the template".
        """
        if column not in self.columns:
            names = ", ".join(repr(name) for name in self.columns)
            raise self.error(f"no such column, but {what} uses it", column=column, allowed=names)

    def image_columns(self, given: object) -> tuple[str, ...]:
        """What the option `image_column` names: one column, several, or none (None).

        Raises:
            ProfileError: there is no such column.
            ValueError: it is neither a name nor a list of names.
        """
        if given is None:
            return ()
        names = given if isinstance(given, (list, tuple)) else (given,)
        for name in names:
            if not isinstance(name, str) or not name.strip():
                raise ValueError(
                    f"option image_column must be the name of a column, got {name!r} (a list of "
                    "names is allowed too)"
                )
            self.require_column(name, "option image_column")
        return tuple(names)

    def int_cell(self, row: int, column: str, least: int, most: int) -> int | None:
        """The cell as an int from `least` to `most`; `None` where it is empty.

        Whole floats (34.0) and numbers stored as text ("34") count as ints.
        """
        value = self.rows[row].get(column)
        if value is None:
            return None
        number: int | None
        if isinstance(value, int) and not isinstance(value, bool):
            number = value
        else:
            whole = isinstance(value, float) and value.is_integer()
            digits = isinstance(value, str) and re.fullmatch("[0-9]{1,19}", value)
            number = int(value) if whole or digits else None  # type: ignore[arg-type]  # no date
        if number is None or not least <= number <= most:
            raise self.error(
                "not a whole number in range",
                row=row,
                column=column,
                allowed=f"{least} to {most}" if most < INT64_MAX else f"{least} or more",
            )
        return number

    def text_cell(self, row: int, column: str) -> str | None:
        """The cell as text; `None` where it is empty."""
        value = self.rows[row].get(column)
        if value is None or isinstance(value, str):
            return value
        raise self.error(
            f"not text but of type {type(value).__name__}", row=row, column=column, allowed="text"
        )

    def prompt_fields(
        self,
        row: int,
        *,
        seed: str = "seed",
        negative: str = "negative_prompt",
        images: Sequence[str] = (),
    ) -> PromptFields:
        """What the reserved columns say; `seed`, `negative` and `images` name columns to read.

        A cell of `images` is the path of an image, empty where there is none.

        Raises:
            ProfileError: a cell that cannot be a seed, a size, a negative prompt or names of LoRAs.
        """
        width, height = self._side(row, "width"), self._side(row, "height")
        if (width is None) != (height is None):
            raise self.error(
                "width and height come together, but one of them is empty",
                row=row,
                column="width" if width is None else "height",
            )
        return {
            "seed": self.int_cell(row, seed, 0, INT64_MAX),
            "width": width,
            "height": height,
            "negative_text": self.text_cell(row, negative),
            "images": tuple(filter(None, (self.text_cell(row, column) for column in images))),
            "loras": self._loras(row),
        }

    def _loras(self, row: int) -> tuple[str, ...]:
        cell = self.text_cell(row, "loras")
        if cell is None:
            return ()
        names = tuple(name.strip() for name in cell.split(","))
        if not all(names):
            raise self.error(
                "a name is empty",
                row=row,
                column="loras",
                allowed="names of the job's model.loras, separated by commas",
            )
        return names

    def _side(self, row: int, column: str) -> int | None:
        side = self.int_cell(row, column, SIZE_MULTIPLE, 2**16)
        if side is not None and side % SIZE_MULTIPLE:
            below = side // SIZE_MULTIPLE * SIZE_MULTIPLE
            raise self.error(
                f"pixels not divisible by {SIZE_MULTIPLE}",
                row=row,
                column=column,
                allowed=f"the nearest are {below} and {below + SIZE_MULTIPLE}",
            )
        return side

    def prompt(self, row: int, text: str, fields: PromptFields | None = None) -> Prompt:
        """The prompt of `rows[row]`: `text`, the reserved columns, all columns as metadata."""
        fields = self.prompt_fields(row) if fields is None else fields
        return Prompt(text, metadata=self.rows[row], **fields)


def cell_text(value: Scalar) -> str:
    """How a value reads in a sentence: whole numbers without ".0", yes and no, ISO dates."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ", "minutes")
    return str(value)


def read_profiles(path: Path | str, sheet: str | None = None) -> Profiles:
    """Read a profile table, `.csv` (UTF-8, with or without BOM, commas) or `.xlsx`.

    The first row names the columns. Types are kept: int, float, bool, date, datetime and text, and
    an int stays one beside empty cells. In CSV a column has a type where all its cells have it:
    "007" is text, as is the whole column it stands in. Text is stripped; cells of nothing but
    white space are empty; empty rows are left out. `sheet` is the first one if not given.

    Raises:
        ProfileError: the first thing found that is wrong with the table: file missing or of
            another format, sheet unknown, no rows, columns without a name or with one twice,
            ragged rows, an XLSX formula (never evaluated) or error value, an `id` that occurs
            twice.
    """
    path = Path(path)
    grid, sheet = read_grid(path, sheet)
    columns = _column_names(path, sheet, grid)
    kept = [
        (number, dict(zip(columns, row, strict=False)))
        for number, row in enumerate(grid[1:], start=2)
        if any(cell is not None for cell in row)
    ]
    if not kept:
        raise ProfileError("no rows below the header", path=path, sheet=sheet)
    rows = tuple(row for _, row in kept)
    profiles = Profiles(
        path=path,
        sheet=sheet,
        columns=columns,
        rows=rows,
        row_numbers=tuple(number for number, _ in kept),
        fingerprint=_fingerprint(columns, rows),
    )
    _check_ids(profiles)
    return profiles


def _column_names(path: Path, sheet: str | None, grid: Grid) -> tuple[str, ...]:
    header = list(grid[0])
    while header and header[-1] is None and all(row[len(header) - 1] is None for row in grid):
        header.pop()
    names: dict[str, int] = {}  # name to position
    for position, value in enumerate(header, start=1):
        where = f"column {position} of the header"
        if value is None:
            raise ProfileError(
                f"{where} is empty: the first row must name every column",
                path=path,
                sheet=sheet,
                row=1,
            )
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ProfileError(
                f"{where} is not text", path=path, sheet=sheet, row=1, value=value, allowed="text"
            )
        name = " ".join(str(value).split())
        if name in names:
            raise ProfileError(
                f"columns {names[name]} and {position} have the same name",
                path=path,
                sheet=sheet,
                row=1,
                column=name,
            )
        names[name] = position
    if not names:
        raise ProfileError(
            "the first row is empty: it must name the columns", path=path, sheet=sheet, row=1
        )
    only = next(iter(names))
    if len(names) == 1 and (";" in only or "\t" in str(header[0])):
        raise ProfileError(
            "one column only, and its name holds separators",
            path=path,
            sheet=sheet,
            row=1,
            value=only,
            allowed="cells separated by commas",
        )
    return tuple(names)


def _check_ids(profiles: Profiles) -> None:
    if "id" not in profiles.columns:
        return
    seen: dict[str, int] = {}
    for i, row in enumerate(profiles.rows):
        if row["id"] is None:
            continue
        # 7 and "7" look the same in a file name and in a spreadsheet, so they are the same.
        first = seen.setdefault(cell_text(row["id"]), i)
        if first != i:
            raise profiles.error(
                f"the same id as in row {profiles.row_numbers[first]}", row=i, column="id"
            )


def _fingerprint(columns: Sequence[str], rows: Sequence[dict[str, Scalar]]) -> str:
    digest = hashlib.sha256(json.dumps(columns, ensure_ascii=False).encode())
    for row in rows:
        typed = [(type(cell).__name__, cell_repr(cell)) for cell in row.values()]
        digest.update(json.dumps(typed, ensure_ascii=False).encode())
    return f"sha256:{digest.hexdigest()}"


def cell_repr(value: Scalar) -> str:
    """A text that is the same for equal values and differs for different ones of one type."""
    return value.isoformat() if isinstance(value, datetime.date) else repr(value)
