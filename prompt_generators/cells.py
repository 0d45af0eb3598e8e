"""Cells of tables that are written for others to open."""

from __future__ import annotations

import re
from typing import TypeVar

T = TypeVar("T")

# What spreadsheet programs take for the start of a formula, fullwidth forms included, also behind
# white space that they drop (https://owasp.org/www-community/attacks/CSV_Injection).
_FORMULA = re.compile(r"[\s\0]*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def defused(cell: T) -> T | str:
    """A cell as it may be written into a CSV or XLSX file that a spreadsheet program will open.

    Text that the program would run as a formula gets an apostrophe in front, which spreadsheet
    programs read as "this is text"; text that is a number, and all that is no text, stays as it
    is. Reading such a table back gives the text with its apostrophe.
    """
    if not isinstance(cell, str) or _NUMBER.fullmatch(cell) or not _FORMULA.match(cell):
        return cell
    return f"'{cell}"
