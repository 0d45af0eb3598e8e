"""docs/errors.md describes every class of failure and exit code that there is, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator

from job_runs import ROOT

from jobs import errors
from jobs.errors import ERROR_TYPES, JobError

PAGE = (ROOT / "docs/errors.md").read_text()


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def first_cells(text: str) -> list[str]:
    return re.findall(r"^\| `?([\w]+)`? \|", text, re.MULTILINE)[1:]


def test_every_error_type_has_its_row_and_its_section() -> None:
    rows = section("Failed rows")
    assert first_cells(rows) == list(ERROR_TYPES)
    assert re.findall(r"^### (.*)$", rows, re.MULTILINE) == list(ERROR_TYPES)
    for text in re.split(r"^### ", rows, flags=re.MULTILINE)[1:]:
        assert re.search(r"^    \S", text, re.MULTILINE), "a message as it is printed"


def exceptions(kind: type[JobError]) -> Iterator[type[JobError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from exceptions(child)


def test_every_exit_code_is_described() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {kind.exit_code for kind in exceptions(JobError)} <= codes
    assert [int(cell) for cell in first_cells(section("Exit codes"))] == sorted(codes)
