"""A table as a person looks at it first: its sheets, and what stands in each column."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path

from jobs.quantities import counted
from jobs.terminal import visible_line
from prompt_generators import ProfileError, Profiles, Scalar, read_profiles
from prompt_generators.profiles import cell_text
from prompt_generators.spreadsheet import sheet_names

_SHOWN_COLUMNS = 40
_SHOWN_VALUES = 3
_NAME, _VALUE = 24, 20  # characters
_KINDS: dict[type, str] = {
    bool: "yes or no",
    int: "whole numbers",
    float: "numbers",
    str: "text",
    date: "dates",
    datetime: "times",
}
_ID_NAMES = {"id", "ids", "uuid", "guid", "key", "nr", "no", "number", "index", "row", "sku"}


@dataclass(frozen=True)
class Column:
    """What stands in a column.

    Attributes:
        name: as the table has it.
        kind: of its cells: `text`, `whole numbers`, `numbers`, `yes or no`, `dates`, `times`,
            `several kinds`, or `empty`.
        cells: that are not empty, in order.
        rows: of the table.
    """

    name: str
    kind: str
    cells: tuple[Scalar, ...]
    rows: int

    @property
    def empty(self) -> int:
        """Cells without a value."""
        return self.rows - len(self.cells)

    @property
    def plain(self) -> str:
        """The name as others would spell it: `Hair Colour` is `hair_color`."""
        return plain_name(self.name)

    @property
    def is_id(self) -> bool:
        """Whether its name says that it tells rows apart."""
        return self.plain in _ID_NAMES or self.plain.endswith(("_id", "_uuid", "_nr", "_key"))

    @property
    def repeated(self) -> int:
        """Cells that say what an earlier one says."""
        return len(self.cells) - len(set(map(cell_text, self.cells)))

    def words(self) -> str:
        """What stands in it, on one short line."""
        if not self.cells:
            return ""
        if self.is_id:
            return f"{counted(self.repeated, 'repeat')}" if self.repeated else "all different"
        if self.kind == "yes or no":
            yes = sum(cell is True for cell in self.cells)
            return f"{yes} yes, {len(self.cells) - yes} no"
        if self.kind in ("whole numbers", "numbers", "dates", "times"):
            least, most = (cell_text(f(self.cells)) for f in (min, max))  # type: ignore[type-var]  # of one kind
            return least if least == most else f"{least} to {most}"
        counts = Counter(map(cell_text, self.cells))
        if len(counts) == len(self.cells) > _SHOWN_VALUES:
            return f"all different: {_cut(next(iter(counts)), 2 * _VALUE)}, ..."
        shown = ", ".join(_cut(text, _VALUE) for text, _ in counts.most_common(_SHOWN_VALUES))
        more = len(counts) - _SHOWN_VALUES
        return f"{shown}, {more} more" if more > 0 else shown


@dataclass(frozen=True)
class Sheet:
    """One sheet, or a CSV file, and what keeps it from being a table of profiles.

    Attributes:
        name: None for CSV.
        profiles: its rows; None where there is a problem.
        problem: the first thing wrong with it; None where there is none.
    """

    name: str | None
    profiles: Profiles | None
    problem: ProfileError | None


def read_sheets(path: Path, sheet: str | None = None) -> list[Sheet]:
    """Read the sheets of a table in the file's order, or the one that is named.

    Raises:
        ProfileError: the file cannot be read at all, or has no such sheet.
    """
    names: Sequence[str | None] = sheet_names(path) or [None]
    if sheet is not None:
        if sheet not in names:
            read_profiles(path, sheet)  # says what is allowed
        names = [sheet]
    sheets = []
    for name in names:
        try:
            sheets.append(Sheet(name, read_profiles(path, name), None))
        except ProfileError as error:
            sheets.append(Sheet(name, None, error))
    return sheets


def columns_of(profiles: Profiles) -> list[Column]:
    """The columns of a table, in its order."""
    columns = []
    for name in profiles.columns:
        cells = tuple(row[name] for row in profiles.rows if row[name] is not None)
        kinds = {_KINDS[type(cell)] for cell in cells}
        kind = "several kinds" if len(kinds) > 1 else next(iter(kinds), "empty")
        columns.append(Column(name, kind, cells, len(profiles)))
    return columns


def plain_name(name: str) -> str:
    """A column's name in small letters and underscores, in American spelling."""
    return re.sub(r"[\W_]+", "_", name.casefold()).strip("_").replace("colour", "color")


def sheet_line(sheet: Sheet) -> str:
    """A sheet among others, in a line: its size, or why it is no table."""
    if sheet.profiles is not None:
        size = counted(len(sheet.profiles), "row")
        return f"{sheet.name!r}: {size}, {counted(len(sheet.profiles.columns), 'column')}"
    assert sheet.problem is not None
    place = f"row {sheet.problem.row}: " if sheet.problem.row else ""
    return f"{sheet.name!r}: no table of profiles ({place}{sheet.problem.problem})"


def column_lines(columns: Sequence[Column]) -> list[str]:
    """The columns as a small table, safe to print."""
    width = max(len(_cut(column.name, _NAME)) for column in columns)
    kinds = max(len(column.kind) for column in columns)
    lines = []
    for column in columns[:_SHOWN_COLUMNS]:
        empty = f"{column.empty:,} empty" if column.empty else ""
        name = _cut(column.name, _NAME)
        lines.append(f"{name:<{width}}  {column.kind:<{kinds}}  {empty:>12}  {column.words()}")
    more = len(columns) - _SHOWN_COLUMNS
    if more > 0:
        lines.append(f"... and {counted(more, 'more column')}")
    return [line.rstrip() for line in lines]


def _cut(text: str, longest: int) -> str:
    text = visible_line(text)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
