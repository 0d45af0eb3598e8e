"""`rejected.csv`: marks of images that survive edits by people, and count for their image alone."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobs.errors import InputError
from jobs.rejected import (
    PATH,
    Rejection,
    add_rejected,
    counting,
    parse_rejected,
    read_rejected,
    remove_rejected,
)
from jobs.storage import Storage

A, B, C = "a" * 64, "b" * 64, "c" * 64
AT = datetime(2026, 11, 30, 15, 4, 5, tzinfo=UTC)
HEADER = "index,pixels_sha256,note,at"


def mark(index: int, image: str, note: str = "") -> Rejection:
    return Rejection(index, image, note, AT)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def read(storage: Storage) -> list[tuple[int, str, str]]:
    return [(r.index, r.pixels_sha256, r.note) for r in read_rejected(storage)]


def test_marks_are_added_changed_and_removed(storage: Storage, tmp_path: Path) -> None:
    assert read_rejected(storage) == []
    assert add_rejected(storage, [mark(3, A), mark(1, B, 'six "fingers", at least')]) == 2
    assert add_rejected(storage, [mark(3, A, "blurred"), mark(4, C)]) == 1
    assert read(storage) == [(3, A, "blurred"), (1, B, 'six "fingers", at least'), (4, C, "")]
    assert all(r.at == AT for r in read_rejected(storage))
    assert (tmp_path / PATH).read_text().splitlines()[1] == f"3,{A},blurred,{AT.isoformat()}"
    assert remove_rejected(storage, [(3, A), (1, A), (9, C)]) == 1  # of index 1 another image
    assert read(storage) == [(1, B, 'six "fingers", at least'), (4, C, "")]
    assert [path.name for path in tmp_path.iterdir()] == [PATH]


def test_a_mark_counts_for_its_image_alone(storage: Storage) -> None:
    add_rejected(storage, [mark(0, A), mark(1, B), mark(2, C)])
    found = counting(read_rejected(storage), {0: A, 1: C, 2: None})
    assert list(found) == [0] and found[0].pixels_sha256 == A


def test_notes_that_a_spreadsheet_would_run_are_defused_once(storage: Storage) -> None:
    add_rejected(storage, [mark(0, A, "=1+1"), mark(1, B, "two\nlines")])
    assert read(storage) == [(0, A, "'=1+1"), (1, B, "two\nlines")]
    add_rejected(storage, [mark(2, C)])
    assert read(storage)[0] == (0, A, "'=1+1")


def test_a_file_that_a_spreadsheet_program_saved() -> None:
    text = f"\ufeffnote;index;pixels_sha256;mine\r\nblurred;7;{A.upper()};x\r\n;8;;\r\n;;;\r\n"
    found = parse_rejected(text.encode(), "mine.csv", {7: A, 8: B})
    assert [(r.index, r.pixels_sha256, r.note, r.row) for r in found] == [
        (7, A, "blurred", 2),
        (8, B, "", 3),
    ]
    assert all((datetime.now(UTC) - r.at).total_seconds() < 60 for r in found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "row 1: no column 'index'; allowed: a table with the columns index, pixels_sha256,"),
        ("index,index\n", "row 1: column 'index' is there twice"),
        ("index\n1.5\n", "row 2, column index: value '1.5'; allowed: the number of a sample"),
        ("index\n\n0\n9\n", "row 4, column index: value '9'; allowed: a sample that has an image"),
        (f"index\n{10**18}0\n", "allowed: the number of a sample"),
        ("index,pixels_sha256\n0,../x\n", "column pixels_sha256: value '../x'; allowed: 64 digits"),
        ("index,at\n0,yesterday\n", "row 2, column at: value 'yesterday'; allowed: a time with"),
        ("index,at\n0,2026-11-30\n", "column at: value '2026-11-30'; allowed: a time with its"),
        (f"index,note\n0,{'x' * 501}\n", "column note: value 'xxx"),
        ("index\n0\n0\n", "row 3: the same image as in row 2"),
        ("index,note\n0,a,b\n", "row 2: 3 cells; allowed: 2"),
        ('index\n"0', "row 2: no CSV"),
    ],
)
def test_mistakes_name_file_row_and_column(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_rejected(text.encode(), "mine.csv", {0: A})
    message = str(caught.value)
    assert message.startswith("mine.csv: row ") and words in message and len(message) < 250


def test_a_damaged_file_is_neither_read_nor_written_over(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / PATH).write_text(f"{HEADER}\n0,,x,{AT.isoformat()}\n")
    for call in (
        lambda: read_rejected(storage),
        lambda: add_rejected(storage, [mark(1, A)]),
        lambda: remove_rejected(storage, [(1, A)]),
    ):
        with pytest.raises(InputError, match=r"rejected\.csv: row 2, column pixels_sha256: value"):
            call()
    assert (tmp_path / PATH).read_text().endswith("0,,x,2026-11-30T15:04:05+00:00\n")
    (tmp_path / PATH).write_bytes(b"index\n\xff\n")
    with pytest.raises(InputError, match="is not UTF-8"):
        read_rejected(storage)


def test_writers_of_one_machine_wait_for_each_other(storage: Storage, tmp_path: Path) -> None:
    code = (
        "import sys; from datetime import datetime, UTC\n"
        "from jobs.rejected import *; from jobs.storage import Storage\n"
        "first = int(sys.argv[2])\n"
        "for i in range(first, first + 25):\n"
        "    add_rejected(Storage(sys.argv[1]), [Rejection(i, 'a' * 64, '', datetime.now(UTC))])\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(first)])
        for first in (0, 100)
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert {r.index for r in read_rejected(storage)} == {*range(25), *range(100, 125)}


def test_marks_on_an_object_store(uri: str) -> None:
    storage = Storage(uri)
    assert add_rejected(storage, [mark(3, A, "blurred")]) == 1
    assert read(Storage(uri)) == [(3, A, "blurred")]
    assert remove_rejected(storage, [(3, A)]) == 1
    assert read(Storage(uri)) == []
