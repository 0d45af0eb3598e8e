"""Prompts that fill a sentence from a table's columns."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

from prompt_generators.base import Prompt, check_index
from prompt_generators.profiles import PromptFields, cell_text, read_profiles


class TemplateGenerator:
    """Fills `"portrait of a {age} year old {job}"` from each row.

    `{{` and `}}` are literal braces. A field is a column's name and nothing else: no attributes,
    no items, no conversions, no formats, because a table's content must never reach code.

    Args:
        profiles: a CSV or XLSX table.
        sheet: the XLSX sheet; the first one if not given.
        template: the sentence.
        missing: what an empty cell reads as; without it an empty cell that is used is an error.
        repeat: start again after the last row, endlessly, instead of ending there.
        image_column: the column with images to start from or to edit, or a list of several columns:
            paths relative to the job's `prompts.images_root`; an empty cell is none.

    Raises:
        ProfileError: the table, or a cell of it, cannot be used; all rows are checked.
        ValueError: no table is given, or an option is not what it must be.
    """

    def __init__(
        self,
        profiles: Path | str | None = None,
        sheet: str | None = None,
        *,
        template: str,
        missing: str | None = None,
        repeat: bool = False,
        image_column: str | Sequence[str] | None = None,
    ) -> None:
        if profiles is None:
            raise ValueError("the generator 'template' needs a profile table")
        if missing is not None and not isinstance(missing, str):
            raise ValueError(f"option missing must be text, got {missing!r}")
        if not isinstance(repeat, bool):
            raise ValueError(f"option repeat must be true or false, got {repeat!r}")
        self.parts = parse_template(template)
        self.missing = missing
        self.repeat = repeat
        self.profiles = read_profiles(profiles, sheet)
        self.image_columns = self.profiles.image_columns(image_column)
        for _, column in self.parts:
            if column is not None:
                self.profiles.require_column(column, f"the template {template!r}")
        for row in range(len(self.profiles)):
            if not self._fill(row).strip():
                raise self.profiles.error("the filled template is empty", row=row)
            self._fields(row)

    def __len__(self) -> int | None:  # type: ignore[override,unused-ignore]  # None where endless
        return None if self.repeat else len(self.profiles)

    def __bool__(self) -> bool:
        return True  # else `bool` would ask `__len__`, which may give None

    def generate_prompt(self, index: int) -> Prompt:
        """The template filled from row `index` (with `repeat`: modulo the number of rows).

        Raises:
            IndexError: there is no such row.
        """
        check_index(index, None if self.repeat else len(self.profiles))
        row = index % len(self.profiles)
        return self.profiles.prompt(row, self._fill(row), self._fields(row))

    def _fields(self, row: int) -> PromptFields:
        return self.profiles.prompt_fields(row, images=self.image_columns)

    def _fill(self, row: int) -> str:
        filled = []
        for literal, column in self.parts:
            filled.append(literal)
            if column is None:
                continue
            value = self.profiles.rows[row][column]
            if value is None and self.missing is None:
                raise self.profiles.error(
                    "the template uses this cell, but it is empty",
                    row=row,
                    column=column,
                    allowed="a value here, or the option `missing` with what to write instead",
                )
            filled.append(cell_text(value) if value is not None else str(self.missing))
        return "".join(filled)


def parse_template(template: object) -> list[tuple[str, str | None]]:
    """Pairs of literal text and the column that follows it (`None` where none does).

    Raises:
        ValueError: not text, blank, unbalanced braces, or a field that is not a plain name.
    """
    if not isinstance(template, str) or not template.strip():
        raise ValueError(f"option template must be text that is not blank, got {template!r}")
    try:
        # Only parsed, never formatted: `str.format` would follow attributes of the values.
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"option template: {error} in {template!r} (write {{{{ and }}}} for literal braces)"
        ) from error
    parts: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in fields:
        if name is not None and (spec or conversion or not name.strip() or set(name) & set(".[]")):
            shown = f"{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}"
            raise ValueError(
                f"option template: {{{shown}}} is not the plain name of a column in {template!r} "
                "(allowed: {column}, without attributes, items, conversions or formats)"
            )
        parts.append((literal, None if name is None else " ".join(name.split())))
    return parts
