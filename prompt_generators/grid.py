"""A table as rows of cells, before anything is known of their meaning, and how large one may be.

Tables are not trusted, and a file of kilobytes can unpack to gigabytes. The limits leave room for
any table that a person keeps; a table at all of them is read in half a minute with 1.5 GB.
"""

from __future__ import annotations

from prompt_generators.base import Scalar

Grid = list[list[Scalar]]
"""Rows of cells, all of one length. Row 0 is the header; an empty cell is None."""

MAX_FILE_BYTES = 256 * 2**20
MAX_ROWS = 2**20
"""Of a sheet, as Excel has it; in CSV only cells are counted."""
MAX_COLUMNS = 2**14
"""As Excel has it."""
MAX_CELLS = 5_000_000
"""Rows times columns, empty cells too."""
MAX_CELL = 100_000
"""Characters of a cell; Excel itself takes 32,767."""
