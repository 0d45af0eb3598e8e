"""`zimage export`: one folder of images with their rows, made again whenever it was broken off."""

import csv
import os
from pathlib import Path

import datasets
import numpy as np
import openpyxl
import pyarrow.parquet as pq
import pytest
from cli_calls import CommandLine
from PIL import Image

from jobs.writers import pixels_sha256


@pytest.fixture
def made(zimage: CommandLine) -> CommandLine:
    """With an output `out` of 8 images in 2 shards."""
    zimage.run(code=0)
    return zimage


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


IMAGES = [f"t_{i:08d}.png" for i in range(8)]


def test_copies_with_rows_that_fit(made: CommandLine, tmp_path: Path) -> None:
    ended = made("export", "out", "tidy", code=0)
    assert ended.out.startswith("8 images in tidy (8 copied; ")
    folder = made.folder / "tidy"
    assert names(folder) == ["metadata.parquet", "t.csv", *IMAGES]
    table = pq.read_table(folder / "metadata.parquet")
    whole = pq.read_table(made.folder / "out/metadata.parquet")
    assert table.schema.names == whole.schema.names
    assert table.drop(["file_name"]) == whole.drop(["file_name"])
    for row in table.to_pylist():
        assert row["file_name"] == f"t_{row['index']:08d}.png"
        assert (folder / row["file_name"]).stat().st_nlink == 1
        with Image.open(folder / row["file_name"]) as image:
            assert pixels_sha256(np.asarray(image)) == row["pixels_sha256"]
    dataset = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert sorted(dataset["index"]) == list(range(8))
    prompts = {row["index"]: row["prompt"] for row in whole.to_pylist()}
    for example in dataset:
        assert example["prompt"] == prompts[example["index"]]
        assert example["image"].size == (32, 32)


def test_links(made: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = made("export", "out", "tidy", "--link", code=0)
    assert "(8 linked; " in ended.out
    for row in made.rows():
        target = made.folder / f"tidy/t_{row['index']:08d}.png"
        assert target.samefile(made.folder / "out" / row["file_name"])

    def other_disk(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    ended = made("export", "out", "other", "--link", code=0)
    assert "(8 copied; " in ended.out
    assert "note: 8 images copied: no hard link can be made of them" in ended.out
    assert made("export", "out", "x", "--link", "--copy", code=2)


def test_goes_on_with_an_export_that_was_broken_off(made: CommandLine) -> None:
    made("export", "out", "tidy", code=0)
    folder = made.folder / "tidy"
    (folder / "metadata.parquet").unlink()
    (folder / IMAGES[3]).unlink()
    (folder / f".{IMAGES[3]}.part").write_bytes(b"half")
    kept = (folder / IMAGES[0]).stat().st_mtime_ns
    ended = made("export", "out", "tidy", code=0)
    assert "(1 copied, 7 there already; " in ended.out
    assert names(folder) == ["metadata.parquet", "t.csv", *IMAGES]
    assert (folder / IMAGES[0]).stat().st_mtime_ns == kept


def test_folders_that_hold_something_else(made: CommandLine) -> None:
    made.write("theirs/notes.txt", "x")
    words = made("export", "out", "theirs", code=2).err
    assert "theirs: holds 'notes.txt'; allowed: an empty folder, or an earlier export" in words
    made.write(f"images/{IMAGES[2]}", "another picture")
    words = made("export", "out", "images", code=2).err
    assert f"images/{IMAGES[2]}: is there with another content than sample 2 has" in words
    assert (made.folder / f"images/{IMAGES[2]}").read_text() == "another picture"
    (made.folder / "links").mkdir()
    (made.folder / f"links/{IMAGES[0]}").symlink_to(made.folder / "job.yaml")
    assert f"links: holds '{IMAGES[0]}'" in made("export", "out", "links", code=2).err
    assert "out/tidy: is in the output" in made("export", "out", "out/tidy", code=2).err
    assert "job.yaml: is no folder" in made("export", "out", "job.yaml", code=2).err
    assert "allowed: a local folder" in made("export", "out", "s3://bucket/x", code=2).err


def test_damaged_and_missing_images_are_left_out_with_their_rows(made: CommandLine) -> None:
    files = [made.folder / "out" / row["file_name"] for row in made.rows()]
    files[2].write_bytes(files[2].read_bytes()[:-7])
    files[5].unlink()
    ended = made("export", "out", "tidy", code=1)
    assert "sample 2: images/" in ended.out and ", committed " in ended.out
    assert "t_00000005.png: the file is missing; left out\n" in ended.out
    assert "left out: 2 samples damaged: zimage verify tells more\n" in ended.out
    folder = made.folder / "tidy"
    rows = pq.read_table(folder / "metadata.parquet").to_pylist()
    assert [row["index"] for row in rows] == [0, 1, 3, 4, 6, 7]
    assert names(folder)[2:] == [IMAGES[i] for i in (0, 1, 3, 4, 6, 7)]


def test_names_of_a_hostile_output_stay_in_the_folder(made: CommandLine) -> None:
    part = min((made.folder / "out/manifest").iterdir())
    table = pq.read_table(part)
    rows = table.to_pylist()
    secret = made.write("secret.png", "secret")
    rows[0]["file_name"] = "../secret.png"
    rows[1]["file_name"] = str(secret)
    pq.write_table(table.from_pylist(rows, schema=table.schema), part)
    ended = made("export", "out", "tidy", code=1)
    assert ended.out.count("leads out of the output; left out") == 2
    assert secret.read_text() == "secret" and IMAGES[0] not in names(made.folder / "tidy")
    record = made.folder / "out/job.json"
    record.write_text(record.read_text().replace('"name": "t"', '"name": "../t"'))
    assert "job.name is '../t': does not fit" in made("export", "out", "other", code=5).err


def test_cells_that_a_spreadsheet_would_run_and_what_is_left_out(zimage: CommandLine) -> None:
    body = "assert index != 1\n        return Prompt(f'=1+{index}', metadata={'note': '@SUM(1)'})"
    generator = ["--set", f"prompts.generator={zimage.write_generator(body)}"]
    zimage.run(*generator, "--count", 3, code=3)
    ended = zimage("export", "out", "tidy", code=0)
    assert "2 images in tidy" in ended.out and "left out: 1 sample failed\n" in ended.out
    content = (zimage.folder / "tidy/t.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbffile_name,index,")
    rows = list(csv.DictReader(content.decode("utf-8-sig").splitlines()))
    assert [row["prompt"] for row in rows] == ["'=1+0", "'=1+2"]
    assert rows[0]["profile_note"] == "'@SUM(1)" and rows[0]["error_type"] == ""
    assert rows[0]["batch"] in ("0 2", "0")
    table = pq.read_table(zimage.folder / "tidy/metadata.parquet").to_pylist()
    assert [row["prompt"] for row in table] == ["=1+0", "=1+2"]
    book = openpyxl.Workbook()  # a spreadsheet program takes such a cell for text
    book.active.append(list(rows[0].values()))
    assert all(cell.data_type != "f" for cell in book.active[1])


def test_nothing_to_export(zimage: CommandLine) -> None:
    zimage.run("--set", f"prompts.generator={zimage.write_generator('assert 0')}", code=3)
    assert "out: there is no image in it yet" in zimage("export", "out", "tidy", code=2).err
    assert not (zimage.folder / "tidy").exists()


def test_images_in_tars(zimage: CommandLine) -> None:
    zimage.run("--set", "output.layout=webdataset", code=0)
    ended = zimage("export", "out", "tidy", "--link", code=0)
    assert "8 images in tidy (8 copied; " in ended.out
    assert "note: 8 images copied: no hard link can be made of them" in ended.out
    rows = pq.read_table(zimage.folder / "tidy/metadata.parquet")
    assert "tar" not in rows.schema.names
    for row in rows.to_pylist():
        with Image.open(zimage.folder / "tidy" / row["file_name"]) as image:
            assert pixels_sha256(np.asarray(image)) == row["pixels_sha256"]
    zimage("regen", "out", 0, 5, code=0)
