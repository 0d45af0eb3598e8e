"""One row of the spreadsheet is edited and the job run again: that row's images are remade."""

from pathlib import Path

import openpyxl
import pytest
from cli_calls import CommandLine

ROWS = [("id", "prompt", "mood"), *[(i, f"A cat of {2000 + i}", "calm") for i in range(6)]]


def write_csv(file: Path, rows: list[tuple]) -> None:
    file.write_text("".join(",".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


def write_xlsx(file: Path, rows: list[tuple]) -> None:
    if file.exists():  # as a person does it: one cell of the book that is there
        book = openpyxl.load_workbook(file)
        for cells, row in zip(book["people"].iter_rows(), rows, strict=True):
            for cell, value in zip(cells, row, strict=True):
                cell.value = value
    else:
        book = openpyxl.Workbook()
        book.active.title = "people"
        for row in rows:
            book.active.append(row)
    book.save(file)


@pytest.mark.parametrize("table", ["people.csv", "people.xlsx"])
def test_exactly_the_images_of_an_edited_row_are_made_again(
    zimage: CommandLine, table: str
) -> None:
    write = write_csv if table.endswith(".csv") else write_xlsx
    write(zimage.folder / table, ROWS)
    flags = ["--set", "prompts.generator=table", "--set", f"prompts.profiles={table}"]
    flags += ["--count", "6", "--set", "sampling.images_per_prompt=2"]
    zimage.run(*flags, code=0)
    before = {row["index"]: row for row in zimage.rows()}
    files = {p: p.stat().st_mtime_ns for p in (zimage.folder / "out/images").rglob("*.png")}

    edited = list(ROWS)
    edited[4] = (3, "A dog of 2003", "calm")
    write(zimage.folder / table, edited)
    words = zimage.run(*flags, code=2).err
    assert "the profile table's content changed, and with it 2 of 12 samples" in words
    assert "  sample 6: prompt: 'A cat of 2003' -> 'A dog of 2003'\n  sample 7: " in words
    assert "10 images kept, 2 to make again" in zimage.run(*flags, "--accept-changes", code=0).err

    after = {row["index"]: row for row in zimage.rows()}
    assert [i for i in after if after[i] != before[i]] == [6, 7]
    for index in (6, 7):
        assert (after[index]["prompt"], after[index]["revision"]) == ("A dog of 2003", 1)
        assert after[index]["pixels_sha256"] != before[index]["pixels_sha256"]
    assert all(path.stat().st_mtime_ns == modified for path, modified in files.items())
    assert len(list((zimage.folder / "out/images").rglob("*.png"))) == 14
    # what was remade is what a job makes that always had this table
    zimage.run(*flags, "--output", "fresh", code=0)
    assert [r["pixels_sha256"] for r in zimage.rows("fresh")] == [
        after[i]["pixels_sha256"] for i in sorted(after)
    ]
    zimage("verify", "out", code=0)
    zimage("regen", "out", 5, 6, 7, 8, code=0)
    assert "nothing to make" in zimage.run(*flags, code=0).err
