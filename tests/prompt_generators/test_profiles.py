import csv
import datetime
import re
import time
import zipfile
from collections.abc import Callable

import openpyxl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_generators import ProfileError, read_profiles, workbook


def write_csv(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_xlsx(path, **sheets):
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def typed(profiles, column):
    return [(type(row[column]), row[column]) for row in profiles.rows]


def test_csv_types_are_kept_beside_empty_cells(tmp_path):
    path = write_csv(
        tmp_path / "t.csv",
        "i,zeros,f,b,d,t,s,na,e\n"
        "1,007,1.5,TRUE,2024-02-29,2024-01-01 10:30,x,NA,\n"
        ",12,,,,,  ,,\n"
        "-3,5,2,false,2024-01-01,2024-01-01T00:00:00, y ,None,  \n",
    )
    table = read_profiles(path)
    none = (type(None), None)
    assert typed(table, "i") == [(int, 1), none, (int, -3)]
    assert typed(table, "zeros") == [(str, "007"), (str, "12"), (str, "5")]
    assert typed(table, "f") == [(float, 1.5), none, (float, 2.0)]
    assert typed(table, "b") == [(bool, True), none, (bool, False)]
    assert [row["d"] for row in table.rows] == [
        *(datetime.date(2024, 2, 29), None, datetime.date(2024, 1, 1))
    ]
    assert table.rows[2]["t"] == datetime.datetime(2024, 1, 1)
    assert typed(table, "s") == [(str, "x"), none, (str, "y")]
    assert typed(table, "na") == [(str, "NA"), none, (str, "None")]
    assert typed(table, "e") == [none, none, none]


@pytest.mark.parametrize(
    "cells",
    [
        ["2024-02-30", "2024-01-01"],
        ["1e5", "2"],
        ["123456789012345678901", "2"],
        ["0.1234567890123456789", "1"],
        ["+1", "2"],
        ["nan", "1.5"],
        ["true", "1"],
        ["=1+1", "=A1"],
        ["١٢", "1"],
    ],
)
def test_csv_columns_that_would_lose_something_stay_text(tmp_path, cells):
    path = write_csv(tmp_path / "t.csv", "a,b\n" + "".join(f"{cell},x\n" for cell in cells))
    assert typed(read_profiles(path), "a") == [(str, cell) for cell in cells]


def test_xlsx_types_are_kept(tmp_path):
    day, moment = datetime.date(2024, 2, 29), datetime.datetime(2024, 1, 1, 10, 30)
    rows = [
        ["i", "f", "b", "d", "t", "s", "time"],
        [1, 1.5, True, day, moment, "007", datetime.time(9, 15)],
        [None, None, None, None, None, "  ", None],
        [3, 2, False, day, datetime.datetime(2024, 1, 1), " é ", None],
    ]
    table = read_profiles(write_xlsx(tmp_path / "t.xlsx", s=rows))
    none = (type(None), None)
    assert table.row_numbers == (2, 4)
    assert typed(table, "i") == [(int, 1), (int, 3)]
    assert typed(table, "f") == [(float, 1.5), (float, 2.0)]
    assert typed(table, "b") == [(bool, True), (bool, False)]
    assert typed(table, "d") == [(datetime.date, day), (datetime.date, day)]
    assert typed(table, "t")[0] == (datetime.datetime, moment)
    assert typed(table, "s") == [(str, "007"), (str, "é")]
    assert typed(table, "time") == [(str, "09:15:00"), none]


def test_bom_line_ends_and_format_do_not_change_the_content(tmp_path):
    plain = "id,name\n1,Åsa\n2,Дмитро\n3,陽菜\n"
    tables = [
        read_profiles(write_csv(tmp_path / "a.csv", plain)),
        read_profiles(write_csv(tmp_path / "b.csv", b"\xef\xbb\xbf" + plain.encode())),
        read_profiles(write_csv(tmp_path / "c.csv", plain.replace("\n", "\r\n"))),
        read_profiles(write_csv(tmp_path / "D.CSV", plain.replace("\n", "\n \n") + "\n\n")),
        read_profiles(
            write_xlsx(
                tmp_path / "e.xlsx", s=[["id", "name"], [1, "Åsa"], [2, "Дмитро"], [3, "陽菜"]]
            )
        ),
    ]
    assert {table.columns for table in tables} == {("id", "name")}
    assert [table.rows for table in tables] == [tables[0].rows] * 5
    assert len({table.fingerprint for table in tables}) == 1


def test_fingerprint_sees_values_types_and_columns(tmp_path):
    contents = [
        "a,b\n1,x\n",
        "a,b\n01,x\n",
        "a,b\n2,x\n",
        "b,a\n1,x\n",
        "a,b\n1,x\n1,x\n",
        "a,b\n1.0,x\n",
    ]
    fingerprints = {
        read_profiles(write_csv(tmp_path / f"{i}.csv", content)).fingerprint
        for i, content in enumerate(contents)
    }
    assert len(fingerprints) == len(contents)
    assert all(value.startswith("sha256:") and len(value) == 71 for value in fingerprints)


def test_quoted_cells_keep_commas_and_lines_and_row_numbers_count_records(tmp_path):
    path = write_csv(tmp_path / "t.csv", 'id,s\n1,"a, b"\n\n2,"two\nlines"\n2,c\n')
    with pytest.raises(ProfileError, match="row 5, column 'id': the same id as in row 4, got 2"):
        read_profiles(path)


CSV_ERRORS = {
    "not UTF-8": (b"a,b\nx,\xe9\n", "row 2: not UTF-8 text"),
    "UTF-16": ("a,b\n1,2\n".encode("utf-16"), "UTF-16"),
    "empty": (b"", "the file is empty"),
    "blank": (b"\xef\xbb\xbf \n\n", "the file is empty"),
    "header only": (b"a,b\n\n,\n", "no rows below the header"),
    "no header": (b",\n1,2\n", "column 1 of the header|first row is empty"),
    "blank first row": (b"\n\na,b\n1,2\n", "row 1: the first row is empty"),
    "unnamed column": (b"a,,c\n1,2,3\n", "column 2 of the header is empty"),
    "same name": (b"a,b, a \n1,2,3\n", "row 1, column 'a': columns 1 and 3 have the same name"),
    "short row": (b"a,b,c\n1,2,3\n1,2\n", "row 3: the row has 2 cells, the header has 3"),
    "long row": (b"a,b\n1,2\n\n1,2,3\n", "row 4: not well-formed CSV"),
    "open quote": (b'a,b\n"x,2\n3,4\n', "not well-formed CSV"),
    "semicolons": (b"a;b\n1;2\n", "separated by commas"),
    "tabs": (b"a\tb\n1\t2\n", "separated by commas"),
    "NUL": (b"a,b\n1,2\nx\0,2\n", "row 3: not text"),
    "same id": (b"id,b\n7,x\n8,y\n7,z\n", "row 4, column 'id': the same id as in row 2, got 7"),
}


@pytest.mark.parametrize(("content", "message"), CSV_ERRORS.values(), ids=CSV_ERRORS)
def test_bad_csv_is_one_error_that_names_the_place(tmp_path, content, message):
    path = write_csv(tmp_path / "t.csv", content)
    with pytest.raises(ProfileError, match=message) as caught:
        read_profiles(path)
    assert str(path) in str(caught.value)


def test_bad_files_are_one_error(tmp_path):
    table = write_csv(tmp_path / "t.csv", "a\nx\n")
    with pytest.raises(ProfileError, match=r"no\.csv: no such file"):
        read_profiles(tmp_path / "no.csv")
    with pytest.raises(ProfileError, match="a folder"):
        (tmp_path / "folder.csv").mkdir()
        read_profiles(tmp_path / "folder.csv")
    with pytest.raises(ProfileError, match=r"got '\.xls' \(allowed: \.csv or \.xlsx"):
        read_profiles(tmp_path / "t.xls")
    with pytest.raises(ProfileError, match="a CSV file has no sheets, got 'people'"):
        read_profiles(table, "people")


@pytest.mark.parametrize("damage", ["text", "truncated", "emptied", "old format", "broken xml"])
def test_damaged_xlsx_is_one_error(tmp_path, damage):
    path = write_xlsx(tmp_path / "t.xlsx", s=[["a"], ["x"]])
    content = path.read_bytes()
    if damage == "broken xml":
        path = rewrite_sheet(path, tmp_path / "broken.xlsx", b"</row>", b"</wor>")
    else:
        path.write_bytes(
            {
                "text": b"a,b\n1,2\n",
                "truncated": content[: len(content) // 2],
                "emptied": b"",
                "old format": bytes.fromhex("d0cf11e0a1b11ae1") + bytes(600),
            }[damage]
        )
    with pytest.raises(ProfileError, match="cannot be read as XLSX") as caught:
        read_profiles(path)
    assert str(path) in str(caught.value)


def test_xlsx_that_unpacks_to_too_much_is_refused_unread(tmp_path, monkeypatch):
    path = write_xlsx(tmp_path / "t.xlsx", s=[["a"], ["x"]])
    monkeypatch.setattr(workbook, "MAX_UNPACKED_BYTES", 100)
    with pytest.raises(ProfileError, match="unpacks to"):
        read_profiles(path)


XLSX_ERRORS = {
    "formula": ([["a", "b"], [1, "=A2*2"]], "row 2, column 'b': a formula.*got '=A2\\*2'"),
    "error value": ([["a"], ["#REF!"]], "row 2, column 'a': an error of Excel's"),
    "empty": ([], "the sheet is empty"),
    "no rows": ([["a", "b"]], "no rows below the header"),
    "no header": ([[None, None], [1, 2]], "column 1 of the header|first row is empty"),
    "unnamed": ([["a", None], [1, 2]], "column 2 of the header is empty"),
    "number as name": ([["a", 1.5], [1, 2]], "column 2 of the header is not text, got 1.5"),
    "same id": ([["id"], ["x"], [None], ["x"]], "row 4, column 'id': the same id as in row 2"),
    "same id, other type": ([["id"], [7], ["7"]], "row 3, column 'id': the same id as in row 2"),
}


@pytest.mark.parametrize(("rows", "message"), XLSX_ERRORS.values(), ids=XLSX_ERRORS)
def test_bad_sheet_is_one_error_that_names_the_place(tmp_path, rows, message):
    path = write_xlsx(tmp_path / "t.xlsx", fine=[["a"], [1]], bad=rows)
    assert read_profiles(path).sheet == "fine"
    with pytest.raises(ProfileError, match=message) as caught:
        read_profiles(path, "bad")
    assert f"{path}, sheet 'bad'" in str(caught.value)


def test_unknown_sheet_lists_the_sheets(tmp_path):
    path = write_xlsx(tmp_path / "t.xlsx", people=[["a"], [1]], notes=[["a"], [2]])
    with pytest.raises(ProfileError, match=r"sheet 'People': no such .*'people', 'notes'"):
        read_profiles(path, "People")
    assert read_profiles(path, "notes").rows == ({"a": 2},)


def rewrite_sheet(source, target, pattern, replacement):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, re.sub(pattern, replacement, old.read(entry)))
    return target


def test_wrong_dimension_does_not_cut_the_table_off(tmp_path):
    source = write_xlsx(tmp_path / "s.xlsx", s=[["a", "b"], [1, 2], [3, 4]])
    path = rewrite_sheet(
        source, tmp_path / "t.xlsx", rb'<dimension ref="[^"]*"', b'<dimension ref="A1"'
    )
    assert read_profiles(path).rows == ({"a": 1, "b": 2}, {"a": 3, "b": 4})


@pytest.mark.parametrize("number", [b"99999999999999999999", b"1e999"])
def test_number_beyond_64_bits_is_an_error(tmp_path, number):
    source = write_xlsx(tmp_path / "s.xlsx", s=[["a"], [12345]])
    path = rewrite_sheet(source, tmp_path / "t.xlsx", b"12345", number)
    with pytest.raises(ProfileError, match="row 2, column 'a': the number is too large"):
        read_profiles(path)


def test_cached_value_of_a_formula_is_not_taken(tmp_path):
    source = write_xlsx(tmp_path / "s.xlsx", s=[["a"], [12345]])
    path = rewrite_sheet(source, tmp_path / "t.xlsx", b"<v>12345</v>", b"<f>1+1</f><v>2</v>")
    with pytest.raises(ProfileError, match="row 2, column 'a': a formula"):
        read_profiles(path)


def test_trailing_empty_columns_are_not_columns(tmp_path):
    path = write_csv(tmp_path / "t.csv", "a,b,,\n1,2,,\n")
    assert read_profiles(path).columns == ("a", "b")


@pytest.mark.parametrize("kind", ["csv", pytest.param("xlsx", marks=pytest.mark.slow)])
def test_ten_thousand_rows_take_no_four_times_what_cells_cost(tmp_path, kind):
    """In CPU seconds; what reading cells costs openpyxl is another matter on each machine."""
    names = ["id", "name", *(f"column {i}" for i in range(8))]
    rows = [
        [i, f"Ελένη {i}", *(f"value {j}" for j in range(6)), i / 4, True] for i in range(10_000)
    ]
    if kind == "csv":
        lines = [",".join(str(cell) for cell in row) for row in [names, *rows]]
        path = write_csv(tmp_path / "t.csv", "\n".join(lines))
    else:
        path = write_xlsx(tmp_path / "t.xlsx", s=[names, *rows])
    read_profiles(write_csv(tmp_path / "warm.csv", "a\nx\n"))  # pays for importing pandas

    def bare() -> None:
        sheet = openpyxl.load_workbook(path, read_only=True)["s"]
        assert sum(len(row) for row in sheet.iter_rows(values_only=True)) == 100_010

    def seconds(read: Callable[[], object]) -> float:
        start = time.process_time()
        read()
        return time.process_time() - start

    ours = min(seconds(lambda: read_profiles(path)) for _ in range(2))
    assert len(read_profiles(path)) == 10_000
    limit = 2.0 if kind == "csv" else 4 * min(seconds(bare) for _ in range(2))
    assert ours < limit, (ours, limit)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.one_of(st.none(), st.integers(-(2**63) + 1, 2**63 - 1)),
            st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_csv_gives_back_what_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["n", "key", "text"])
        for number, text in rows:
            writer.writerow([number, "k", f"t{text}"])
    table = read_profiles(path)
    assert [(row["n"], row["text"]) for row in table.rows] == [
        (number, f"t{text}".strip()) for number, text in rows
    ]
