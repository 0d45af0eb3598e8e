"""Profile tables that are none: one error each, with file, sheet, row, column and value."""

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import openpyxl
import pytest
from bounds import Refuser

TABLE = ["--set", "prompts.generator=table", "--set", "prompts.profiles=t.csv"]
WORKBOOK = ["--set", "prompts.generator=table", "--set", "prompts.profiles=t.xlsx"]

CSV: dict[str, tuple[bytes, str]] = {
    "a NUL byte": (b"prompt\na\nb\0\n", "t.csv, row 3: not text: it holds a NUL byte"),
    "NUL bytes alone": (bytes(4000), "t.csv, row 1: not text: it holds a NUL byte"),
    "not UTF-8": (b"prompt\nna\xefve\n", "t.csv, row 2: not UTF-8 text, got b'\\xef' (allowed"),
    "a lone surrogate": (b"prompt\n\xed\xa0\x80\n", "t.csv, row 2: not UTF-8 text"),
    "overlong UTF-8": (b"prompt\n\xc0\xaf\n", "t.csv, row 2: not UTF-8 text"),
    "UTF-16": ("prompt\na\n".encode("utf-16"), "t.csv: not UTF-8 text but UTF-16"),
    "UTF-32": ("prompt\na\n".encode("utf-32"), "t.csv: not UTF-8 text but UTF-16"),
    "empty": (b"", "t.csv: the file is empty"),
    "blank": (b"\n \n\t\n", "t.csv: the file is empty"),
    "a header alone": (b"prompt\n", "t.csv: no rows below the header"),
    "a cell of 10 MB": (b"prompt\n" + b"a" * 10_000_000, "row 2: a cell of over 100,000 charact"),
    "a quote that is never closed": (
        b'prompt\n"a\n' + b"b\n" * 200_000,
        "row 2: a cell of over 100,000 characters; is a quote not closed?",
    ),
    "a row of many cells": (b"prompt\n" + b"," * 20_000, "t.csv, row 2: 20,001 cells (allowed: 1"),
    "a header of many cells": (b"a," * 20_000 + b"\n1\n", "t.csv, row 1: 20,001 cells"),
    "an id twice": (b"id,prompt\n7,a\n7,b\n", "row 3, column 'id': the same id as in row 2, got 7"),
    "a column twice": (b"prompt,prompt\na,b\n", "column 'prompt': columns 1 and 2 have the same"),
    "no such column": (b"text\na\n", "column 'prompt': no such column, but option column uses it"),
    "a column without a name": (b"prompt,,x\na,b,c\n", "row 1: column 2 of the header is empty"),
    "a prompt that is empty": (b"prompt,x\na,1\n,2\n", "row 3, column 'prompt': the prompt is emp"),
    "a prompt that is a number": (b"prompt\n7\n", "column 'prompt': not text but of type int, got"),
    "a row too short": (b"prompt,x\na\n", "t.csv, row 2: the row has 1 cells, the header has 2"),
    "a row too long": (b"prompt,x\na,b,c\n", "t.csv, row 2: not well-formed CSV"),
    "a seed below 0": (b"prompt,seed\na,-1\n", "column 'seed': not a whole number in range, got -"),
    "a seed past 64 bits": (b"prompt,seed\na,9223372036854775808\n", "column 'seed': not a whole"),
    "a seed of letters": (b"prompt,seed\na,x\n", "row 2, column 'seed': not a whole number in ran"),
    "a width that is none": (b"prompt,width,height\na,17,32\n", "the nearest are 16 and 32"),
    "a huge width": (b"prompt,width,height\na,99999999,32\n", "row 2, column 'width': not a whole"),
    "a width alone": (b"prompt,width,height\na,32,\n", "column 'height': width and height come to"),
    "names of LoRAs": (b'prompt,loras\na,"x,,y"\n', "column 'loras': a name is empty, got 'x,,y"),
    "separated by semicolons": (b"prompt;x\na;b\n", "(allowed: cells separated by commas)"),
    "a workbook by another name": (b"PK\x03\x04" + bytes(60), "not text: it holds a NUL byte"),
    "HTML": (b"<html>\n<body>a, b</body>\n", "t.csv, row 2: not well-formed CSV"),
}


@pytest.mark.parametrize("case", CSV)
def test_csv(refuse: Refuser, case: str) -> None:
    content, words = CSV[case]
    (refuse.folder / "t.csv").write_bytes(content)
    refuse("plan", "job.yaml", *TABLE, code=2, words=["--set: prompts.profiles: ", words])


def workbook(*rows: list[object], title: str = "s") -> bytes:
    book = openpyxl.Workbook()
    book.active.title = title
    for row in rows:
        book.active.append(row)
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


GOOD = workbook(["prompt", "n"], ["a cat", 12345])
SHEET = "xl/worksheets/sheet1.xml"


def changed(old: bytes, new: bytes, part: str = SHEET) -> Callable[[], bytes]:
    """The good workbook with bytes of one part replaced."""
    return lambda: rewritten({part: lambda content: content.replace(old, new)})


def rewritten(
    changes: dict[str, Callable[[bytes], bytes]], more: dict[str, bytes] | None = None
) -> bytes:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(GOOD)) as source,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            content = source.read(entry)
            new = changes.get(entry.filename, lambda content: content)(content)
            assert entry.filename not in changes or new != content, entry.filename
            target.writestr(entry, new)
        for name, content in (more or {}).items():
            target.writestr(name, content)
    return buffer.getvalue()


def bomb(says: int) -> Callable[[], bytes]:
    """A part of 32 MB, of which the archive's directory says that it unpacks to `says` bytes."""

    def make() -> bytes:
        content = bytearray(rewritten({}, {"xl/media/0.bin": bytes(32 * 2**20)}))
        struct.pack_into("<I", content, content.rindex(b"PK\x01\x02") + 24, says)
        return bytes(content)

    return make


def shared_strings(text: bytes) -> bytes:
    part = b'<sst xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">%s</sst>'
    return rewritten({}, {"xl/sharedStrings.xml": part % text})


XLSX: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "no archive": (b"prompt,n\na,1\n", "t.xlsx: cannot be read as XLSX"),
    "empty": (b"", "t.xlsx: cannot be read as XLSX"),
    "cut off": (GOOD[:-30], "t.xlsx: cannot be read as XLSX"),
    "an archive of something else": (lambda: _archive({"a.txt": b"hi"}), "cannot be read as XLSX"),
    "the old format": (bytes.fromhex("d0cf11e0a1b11ae1") + bytes(600), "cannot be read as XLSX"),
    "a bomb": (bomb(600_000_000), "t.xlsx: unpacks to 600,0"),
    "a bomb that lies": (bomb(10), "t.xlsx: cannot be read as XLSX"),
    "entities": (
        changed(b"<worksheet", b'<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">]><worksheet'),
        f"a document type, which could declare entities, in its part '{SHEET}'",
    ),
    "an entity of a file": (
        changed(b"<worksheet", b'<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]><worksheet'),
        "a document type, which could declare entities,",
    ),
    "elements in elements": (
        lambda: shared_strings(b"<a>" * 5000 + b"</a>" * 5000),
        "elements are nested too deeply in its part 'xl/sharedStrings.xml' (allowed: up to 100)",
    ),
    "a cell of 10 MB": (
        changed(b"<v>12345</v>", b"<v>" + b"1" * 10_000_000 + b"</v>"),
        "t.xlsx",
    ),
    "a text of 20 MB": (
        lambda: shared_strings(b"<si><t>prompt</t></si><si><t>" + b"a" * 20_000_000 + b"</t></si>"),
        "over 16,777,216 characters in one text in its part 'xl/sharedStrings.xml'",
    ),
    "an attribute of 20 MB": (
        changed(b"<worksheet", b'<worksheet a="' + b"a" * 20_000_000 + b'"'),
        "a tag or comment is too long",
    ),
    "a formula": (
        changed(b"<v>12345</v>", b"<f>HYPERLINK(&quot;http://x&quot;)</f><v>1</v>"),
        "sheet 's', row 2, column 'n': a formula, which is never evaluated, got '=HYPERLINK",
    ),
    "a formula as text": (
        workbook(["prompt"], ["=cmd|' /C calc'!A0"]),
        "row 2, column 'prompt': a formula, which is never evaluated, got \"=cmd|' /C calc'!A0\"",
    ),
    "an array formula": (
        changed(b"<v>12345</v>", b'<f t="array" ref="B2">SUM(A1)</f><v>1</v>'),
        "row 2, column 'n': a formula",
    ),
    "an error of Excel's": (
        workbook(["prompt"], ["#REF!"]),
        "column 'prompt': an error of Excel's",
    ),
    "a number past 64 bits": (changed(b"12345", b"9" * 40), "column 'n': the number is too large"),
    "a number past a float": (changed(b"12345", b"1e999"), "column 'n': the number is too large"),
    "a number that is none": (changed(b"12345", b"1.2.3"), "t.xlsx, sheet 's': cannot be read as"),
    "a text that is not there": (
        changed(b't="inlineStr"><is><t>a cat</t></is>', b't="s"><v>99</v>'),
        "t.xlsx, sheet 's': cannot be read as XLSX",
    ),
    "a cell of no place": (changed(b'r="B2"', b'r="!!"'), "t.xlsx, sheet 's': cannot be read as"),
    "a row of no number": (changed(b'<row r="2"', b'<row r="x"'), "t.xlsx, sheet 's': cannot be"),
    "a row far below": (
        changed(b'<row r="2"', b'<row r="99999999"'),
        "over 1,048,576 rows in its part",
    ),
    "no sheet in it": (
        changed(b"sheets>", b"steets>", "xl/workbook.xml"),
        "t.xlsx: the workbook has no sheet with cells",
    ),
    "many sheets": (
        changed(b"<sheets>", b"<sheets>" + b'<sheet name="x"/>' * 2000, "xl/workbook.xml"),
        "over 1,000 sheets in its part 'xl/workbook.xml'",
    ),
    "an empty sheet": (workbook(), "sheet 's': the sheet is empty: a header and at least one row"),
    "no such column": (workbook(["text"], ["a"]), "sheet 's', column 'prompt': no such column"),
    "an id twice": (
        workbook(["id", "prompt"], [7, "a"], ["7", "b"]),
        "row 3, column 'id': the same id as in row 2, got '7'",
    ),
    "a column twice": (workbook(["prompt", " prompt"], ["a", "b"]), "columns 1 and 2 have the sam"),
}


def _archive(parts: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("case", XLSX)
def test_xlsx(refuse: Refuser, case: str) -> None:
    made, words = XLSX[case]
    (refuse.folder / "t.xlsx").write_bytes(made if isinstance(made, bytes) else made())
    refuse("plan", "job.yaml", *WORKBOOK, code=2, words=["--set: prompts.profiles: ", words])


def test_sheet_that_is_not_there(refuse: Refuser) -> None:
    (refuse.folder / "t.xlsx").write_bytes(workbook(["prompt"], ["a"], title="it's \u202eb"))
    words = "t.xlsx, sheet 'S': no such sheet (allowed: \"it's \\u202eb\")"
    refuse("plan", "job.yaml", *WORKBOOK, "--set", "prompts.sheet=S", code=2, words=[words])


def test_files_that_are_none(refuse: Refuser) -> None:
    (refuse.folder / "folder.csv").mkdir()
    os.mkfifo(refuse.folder / "pipe.csv")
    for name, target in (("zero.csv", "/dev/zero"), ("loop.csv", "loop.csv"), ("gone.csv", "no")):
        (refuse.folder / name).symlink_to(target)
    with (refuse.folder / "large.csv").open("wb") as file:
        file.truncate(2**33)
    for name, words in {
        "folder.csv": "folder.csv: is a folder, not a file",
        "pipe.csv": "pipe.csv: is a pipe or device, not a file",
        "zero.csv": "zero.csv: is a pipe or device, not a file",
        "loop.csv": "loop.csv: no such file",
        "gone.csv": "gone.csv: no such file",
        "large.csv": "large.csv: the file has 8,589,934,592 bytes (allowed: up to 268,435,456)",
        "job.yaml": "not a table's file name, got '.yaml' (allowed: .csv or .xlsx",
        "a" * 300 + ".csv": ".csv: cannot be read: File name too long",
    }.items():
        table = ["--set", "prompts.generator=table", "--set", f"prompts.profiles={name}"]
        refuse("plan", "job.yaml", *table, code=2, words=["--set: prompts.profiles: ", words])


# What acts on a terminal, a spreadsheet or a file system, and is a prompt like any other.
ACTING = {
    "escape": "a cat \x1b]0;owned\x07\x1b[2J",
    "carriage return": "a cat\rall 8 images as committed",
    "bidi": "a \u202etac",
    "formula": "=cmd|' /C calc'!A0",
    "template": "{{ 7 * 7 }} {0.__class__} {% x %} ${HOME} $(id) `id`",
    "path": "../../../../etc/passwd",
    "special tokens": "<|im_end|><|endoftext|>",
    "emoji": "\U0001f469\u200d\U0001f680",
}


def test_prompts_that_act_elsewhere_are_prompts(refuse: Refuser) -> None:
    lines = [f'"{text}"' for text in ACTING.values()]
    (refuse.folder / "t.csv").write_bytes("\n".join(["prompt", *lines]).encode())
    ended = refuse.zimage("plan", "job.yaml", *TABLE, code=0)
    assert all(line.isprintable() for line in ended.out.replace("\u200d", "").splitlines())
    assert "\\u001b]0;owned\\u0007" in ended.out and "\\u202etac" in ended.out
    refuse.zimage.run(*TABLE, code=0)
    assert [row["prompt"] for row in refuse.zimage.rows()] == list(ACTING.values())
    refuse.zimage("export", "out", "tidy", code=0)
    names = {path.name for path in Path("tidy").iterdir()}
    assert names == {f"t_{i:08d}.png" for i in range(8)} | {"metadata.parquet", "t.csv"}
    table = (refuse.folder / "tidy/t.csv").read_text(encoding="utf-8-sig")
    assert ",'=cmd|' /C calc'!A0," in table and ",=cmd" not in table
