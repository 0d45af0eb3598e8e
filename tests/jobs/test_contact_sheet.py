"""The contact sheet of an output: its committed pictures, and one error where there are none."""

import pytest
from cli_calls import CommandLine
from PIL import Image

from jobs.contact_sheet import main


@pytest.fixture
def cli(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return CommandLine(tmp_path, capsys)


def test_it_shows_what_is_committed_in_index_order(cli, capsys):
    cli.run(code=0)
    assert main(["out", "sheet.png", "--columns", "3", "--limit", "5"]) == 0
    assert capsys.readouterr().out == "sheet.png: 112x76\n"
    with Image.open("sheet.png") as sheet:
        for row in cli.rows()[:5]:
            down, across = divmod(row["index"], 3)
            left, top = 4 + across * 36, 4 + down * 36
            with Image.open(cli.folder / "out" / row["file_name"]) as picture:
                assert sheet.crop((left, top, left + 32, top + 32)).tobytes() == picture.tobytes()
        assert sheet.getpixel((4 + 2 * 36, 4 + 36)) == (255, 255, 255)  # five of six cells


def test_a_lost_picture_is_an_error(cli, capsys):
    cli.run(code=0)
    lost = cli.rows()[3]["file_name"]
    (cli.folder / "out" / lost).unlink()
    assert main(["out", "sheet.png"]) == 2
    assert f"{lost}: the file is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["out", "sheet.png"], "out: no such folder"),
        (["out", "sheet.png", "--columns", "0"], "--columns: 0: allowed: 1 or more"),
    ],
)
def test_mistakes_are_named(cli, capsys, arguments, words):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_a_file_that_cannot_be_written_is_named(cli, capsys):
    cli.run(code=0)
    for file in ("none/sheet.png", "sheet.what"):
        assert main(["out", file]) == 2
        assert f"{file}: cannot be written" in capsys.readouterr().err
