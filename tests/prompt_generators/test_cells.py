"""A cell of an exported table starts no formula in the program that opens it."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_generators.cells import defused

FORMULAS = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n@x",
    "  =HYPERLINK(\"http://x\")",
    "\uff1d1+1",
    "\u00a0=1",
]  # fmt: skip


@pytest.mark.parametrize("cell", FORMULAS)
def test_formulas_become_text(cell: str) -> None:
    assert defused(cell) == f"'{cell}"


@pytest.mark.parametrize(
    "cell",
    ["A cat", "", "-5", "+3.25", "-1e6", "a=b", "'=1", 5, -5, 1.5, None, True, datetime.date.max],
)
def test_other_cells_stay(cell: object) -> None:
    assert defused(cell) is cell


@given(st.text())
def test_no_text_starts_a_formula(cell: str) -> None:
    written = defused(cell)
    assert written in (cell, f"'{cell}")
    start = written.lstrip()[:1]
    if start and start in "=+-@":
        float(cell)  # a number, not a formula
