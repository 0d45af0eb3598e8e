"""Prompts that are written out in a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prompt_generators.base import Prompt, check_index
from prompt_generators.profiles import read_profiles


class TableGenerator:
    """Row i of the table is prompt i; the table's rows are all there is.

    Args:
        profiles: a CSV or XLSX table.
        sheet: the XLSX sheet; the first one if not given.
        column: the column with the prompts; every cell must hold text.
        negative_column: one with negative prompts; `negative_prompt` is read if not given.
        seed_column: one with seeds; `seed` is read if not given.
        image_column: one with images to start from or to edit, or a list of several columns: paths
            relative to the job's `prompts.images_root`; an empty cell is none.

    Raises:
        ProfileError: the table, or a cell of it, cannot be used; all rows are checked.
        ValueError: no table is given, or an option is not what it must be.
    """

    def __init__(
        self,
        profiles: Path | str | None = None,
        sheet: str | None = None,
        *,
        column: str = "prompt",
        negative_column: str | None = None,
        seed_column: str | None = None,
        image_column: str | Sequence[str] | None = None,
    ) -> None:
        if profiles is None:
            raise ValueError("the generator 'table' needs a profile table")
        named = {
            "column": column,
            "negative_column": negative_column,
            "seed_column": seed_column,
        }
        self.profiles = read_profiles(profiles, sheet)
        for option, name in named.items():
            if name is None and option != "column":
                continue
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"option {option} must be the name of a column, got {name!r}")
            self.profiles.require_column(name, f"option {option}")
        self.column = column
        self.negative_column = negative_column or "negative_prompt"
        self.seed_column = seed_column or "seed"
        self.image_columns = self.profiles.image_columns(image_column)
        for row in range(len(self.profiles)):
            if self.profiles.rows[row][column] is None:
                raise self.profiles.error("the prompt is empty", row=row, column=column)
            self.generate_prompt(row)

    def __len__(self) -> int:
        return len(self.profiles)

    def generate_prompt(self, index: int) -> Prompt:
        """The prompt in row `index`, counted from 0 over the rows that are not empty.

        Raises:
            IndexError: there is no such row.
        """
        check_index(index, len(self.profiles))
        text = self.profiles.text_cell(index, self.column)
        assert text is not None  # checked by the constructor
        fields = self.profiles.prompt_fields(
            index, seed=self.seed_column, negative=self.negative_column, images=self.image_columns
        )
        return self.profiles.prompt(index, text, fields)
