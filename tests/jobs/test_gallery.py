"""`zimage gallery`: the page's data, its thumbnails, and the table of rejected images."""

import base64
import hashlib
import io
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_calls import CommandLine, Ended
from gallery_output import commit, make_output, picture
from PIL import Image

from jobs.commits import Listing
from jobs.gallery_html import html_page, json_text
from jobs.gallery_rows import block
from jobs.metadata_file import write_metadata
from jobs.storage import Storage
from jobs.thumbnails import SIDE, make_thumbnail
from jobs.writers import PNGWriter

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028<!-- {{data}} \u202egnp.exe"


@pytest.fixture
def out(zimage: CommandLine) -> Path:
    """An output of 100 samples, of which sample 96 failed."""
    make_output("out", 100)
    return zimage.folder / "out"


def data_of(page: Path, name: str) -> Any:
    found = re.findall(
        rf'<script type="application/json" id="{name}">(.*?)</script>', page.read_text()
    )
    assert len(found) == 1
    return json.loads(found[0])


def rows_of(page: Path) -> list[dict[str, Any]]:
    data = data_of(page, "rows")
    rows: list[dict[str, Any]] = [{} for _ in range(data["rows"])]
    for name, column in data["columns"].items():
        values = column.get("values") or [column["of"][place] for place in column["at"]]
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows


def test_a_page_of_an_output(zimage: CommandLine, out: Path) -> None:
    ended = zimage("gallery", "out", code=0)
    assert re.fullmatch(
        rf"{out.relative_to(zimage.folder)}/gallery\.html: 99 images, 1 failed \(\d.*; thumbnails "
        r"in .*__gallery__: 64 made, 0 there\)\n",
        ended.out.replace(f"{zimage.folder}/", ""),
    )
    page = out / "gallery.html"
    facts, rows = data_of(page, "facts"), rows_of(page)
    assert (facts["name"], facts["planned"], facts["ok"], facts["failed"]) == ("faces", 100, 99, 1)
    assert facts["retry"].endswith("jobs/faces.yaml --output out --retry-failed")
    assert facts["redo"].endswith("jobs/faces.yaml --output out --redo-rejected")
    assert [row["index"] for row in rows] == list(range(100))
    table = {
        row["index"]: row for row in pq.read_table(next((out / "manifest").iterdir())).to_pylist()
    }
    for row in rows:
        stored = table[row["index"]]
        for name in ("prompt", "seed", "status", "pixels_sha256", "error_message", "profile_age"):
            assert row[name] == stored[name]
        if row["status"] == "ok":
            assert (out / facts["images"] / row["file_name"]).is_file()
            thumbnail = out / facts["thumbnails"] / f"{row['pixels_sha256'][:32]}.webp"
            with Image.open(thumbnail) as image:
                shown = np.asarray(image.convert("RGB"), float)
            assert np.abs(shown - picture(row["index"] % 64)).mean() < 6


def test_thumbnails_are_made_once_and_follow_the_images(zimage: CommandLine, out: Path) -> None:
    zimage("gallery", "out", code=0)
    folder = out / "__gallery__"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / f".{'a' * 32}.webp.00000000.part").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    assert ": 0 made, 64 there" in zimage("gallery", "out", code=0).out
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.suffix == ".webp"} == before
    commit(Storage(str(out)), 0, 10, revision=1)  # made again, otherwise
    assert ": 10 made, 64 there" in zimage("gallery", "out", code=0).out
    names = {path.name for path in folder.iterdir()}
    assert names > {"notes.txt"} and not any(name.endswith(".part") for name in names)
    shown = {
        f"{row['pixels_sha256'][:32]}.webp"
        for row in rows_of(out / "gallery.html")
        if row["status"] == "ok"
    }
    assert names == shown | {"notes.txt"}


def test_a_thumbnail_keeps_the_shape_and_enlarges_nothing() -> None:
    for (height, width), size in (((600, 1000), (SIDE, 154)), ((64, 48), (48, 64))):
        content = PNGWriter().encode(np.zeros((height, width, 3), np.uint8))
        with Image.open(io.BytesIO(make_thumbnail(content))) as image:
            assert image.format == "WEBP" and image.size == size


def test_an_output_with_a_page_is_still_an_imagefolder(zimage: CommandLine, tmp_path: Path) -> None:
    storage = make_output("out", 8)
    write_metadata(storage, Listing(storage))
    zimage("gallery", "out", code=0)
    dataset = datasets.load_dataset(
        "imagefolder", data_dir="out", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert sorted(dataset["index"]) == list(range(8))
    assert zimage("gc", "out", "--min-age", 0, code=0).out.startswith("nothing to remove")
    zimage("verify", "out", code=0)


def test_a_page_of_its_own_place(zimage: CommandLine, out: Path) -> None:
    (zimage.folder / "a b").mkdir()
    zimage("gallery", "out", "-o", "a b/faces.html", code=0)
    page = zimage.folder / "a b/faces.html"
    facts, row = data_of(page, "facts"), rows_of(page)[5]
    assert facts["images"] == "../out/" and facts["thumbnails"] == "__faces__/"
    assert (page.parent / facts["images"] / row["file_name"]).is_file()
    assert not (out / "gallery.html").exists() and not (out / "__gallery__").exists()


def test_an_embedded_page_is_one_file(zimage: CommandLine, out: Path) -> None:
    ended = zimage("gallery", "out", "--embed", "-o", "faces.html", code=0)
    assert "thumbnails inside: 64 made, 0 there" in ended.out
    assert not (zimage.folder / "__faces__").exists()
    page = zimage.folder / "faces.html"
    thumbnails, facts = data_of(page, "thumbnails"), data_of(page, "facts")
    assert (facts["images"], facts["thumbnails"]) == (None, None) and len(thumbnails) == 64
    for row in rows_of(page):
        if row["status"] == "ok":
            content = base64.b64decode(thumbnails[row["pixels_sha256"][:32]])
            with Image.open(io.BytesIO(content)) as image:
                assert image.size == (64, 64)
    assert "img-src data:;" in page.read_text()


def test_images_in_tars_and_of_object_stores(zimage: CommandLine, uri: str) -> None:
    zimage.run("--set", "output.layout=webdataset", "--output", "tars", "--count", 4, code=0)
    zimage("gallery", "tars", code=0)
    page = zimage.folder / "tars/gallery.html"
    assert all("file_name" not in row for row in rows_of(page))
    assert len(list((page.parent / "__gallery__").iterdir())) == 4
    make_output(uri, 10, distinct=4)
    words = zimage("gallery", uri, code=2).err
    assert f"{uri}: is no local folder; allowed: with -o FILE for the page" in words
    zimage("gallery", uri, "-o", "remote.html", code=0)
    page = zimage.folder / "remote.html"
    assert data_of(page, "facts")["images"] is None
    assert len(list((page.parent / "__remote__").iterdir())) == 4


def test_text_is_data_in_the_page(zimage: CommandLine) -> None:
    make_output("out", 3, prompts={1: HOSTILE}, metadata={1: {HOSTILE: HOSTILE}})
    zimage("gallery", "out", code=0)
    page = zimage.folder / "out/gallery.html"
    row = rows_of(page)[1]
    assert row["prompt"] == row[f"profile_{HOSTILE}"] == HOSTILE
    text = page.read_text()
    assert text.count("<script") == text.count("</script>") == 3 and "\u2028" not in text
    assert "onerror" in text and "<img src=x" not in text and "<!-- " not in text


def test_the_policy_names_the_script_and_the_style_of_the_page(
    zimage: CommandLine, out: Path
) -> None:
    zimage("gallery", "out", code=0)
    text = (out / "gallery.html").read_text()
    policy = unescape(re.findall(r'Content-Security-Policy" content="([^"]*)"', text)[0])
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert "connect-src" not in policy and "http" not in policy
    served = html_page({"name": "a<b", "mode": "served"}, {})
    assert "connect-src &#x27;self&#x27;" in served and "<title>a&lt;b</title>" in served


def test_numbers_that_javascript_has_not() -> None:
    rows = [
        {"index": 0, "seed": 2**63 - 1, "guidance_scale": float("nan")},
        {"index": 1, "seed": 2**53 - 1, "guidance_scale": float("inf")},
    ]
    columns = json.loads(json_text(block(rows)))["columns"]
    assert columns["seed"]["values"] == ["9223372036854775807", 2**53 - 1]
    assert columns["guidance_scale"]["values"] == ["nan", "inf"]
    assert set(columns) == {"index", "seed", "guidance_scale"}


def test_images_that_are_damaged_or_outside(zimage: CommandLine) -> None:
    make_output("out", 10)
    out = zimage.folder / "out"
    secret = zimage.write("secret.png", "secret")
    part = next((out / "manifest").iterdir())
    table = pq.read_table(part)
    rows = table.to_pylist()
    rows[1]["file_name"] = "../secret.png"
    rows[2]["pixels_sha256"] = "../../secret"
    pq.write_table(table.from_pylist(rows, schema=table.schema), part)
    (out / rows[0]["file_name"]).write_bytes(b"no image")
    (out / rows[3]["file_name"]).unlink()
    ended = zimage("gallery", "out", code=1)
    assert f"sample 0: {rows[0]['file_name']}: is not the file that was committed\n" in ended.out
    assert "'../secret.png': leads out of the output\n" in ended.out
    assert "sample 2: pixels_sha256 '../../secret' is no hash\n" in ended.out
    assert f"sample 3: {rows[3]['file_name']}: the file is missing\n" in ended.out
    assert "\n4 images cannot be shown: zimage verify tells more" in ended.out
    shown = rows_of(out / "gallery.html")
    assert shown[1]["file_name"] is None
    assert [row["index"] for row in shown if row["problem"]] == [0, 1, 2, 3]
    assert secret.read_text() == "secret"


def test_what_is_in_the_place_of_a_page(zimage: CommandLine, out: Path) -> None:
    def refused(*arguments: object) -> str:
        return zimage("gallery", "out", *arguments, code=2).err

    mine = zimage.write("mine.html", "<h1>mine</h1>")
    assert "mine.html: is there and no page of this command; allowed:" in refused("-o", "mine.html")
    (zimage.folder / "link.html").symlink_to(mine)
    assert "link.html: is a link, a folder or a device" in refused("-o", "link.html")
    assert "-o: x.txt: allowed: a local file that ends in .html" in refused("-o", "x.txt")
    assert "-o: none/x.html: no such folder: none" in refused("-o", "none/x.html")
    (out / "__gallery__").symlink_to(zimage.folder)
    assert "__gallery__: is a link or a file; allowed: a folder" in refused()
    assert mine.read_text() == "<h1>mine</h1>"


def test_flags_that_do_not_fit_and_outputs_without_images(zimage: CommandLine, out: Path) -> None:
    def refused(*arguments: object) -> str:
        return zimage("gallery", *arguments, code=2).err

    assert "--embed and --serve: allowed: one of the two" in refused("out", "--serve", "--embed")
    assert "--port: 80: allowed: with --serve alone" in refused("out", "--port", 80)
    assert "--port: 70000: allowed: 0 to 65535" in refused("out", "--serve", "--port", 70000)
    assert "none: no such folder; allowed: the output of a job" in refused("none")
    make_output("empty", 10, made=0)
    assert "empty: there is no image in it yet; --serve shows them" in refused("empty")


def test_help_fits_a_screen(zimage: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = zimage("gallery", "--help", code=0).out
    assert len(words.splitlines()) <= 24 and "example: zimage gallery output/avatars" in words


def test_marks_of_a_table_count_for_their_image(zimage: CommandLine, out: Path) -> None:
    def imported(*, code: int = 0) -> Ended:
        return zimage("gallery", "out", "--import-rejected", "mine.csv", code=code)

    hashes = {
        row["index"]: row["pixels_sha256"]
        for row in pq.read_table(next((out / "manifest").iterdir())).to_pylist()
    }
    zimage.write(
        "mine.csv", f"index,pixels_sha256,note\n3,,blurred\n4,{hashes[4]},\n5,{'0' * 64},\n"
    )
    ended = imported()
    assert ended.out == (
        "out/rejected.csv: 2 images rejected, 0 already were\n"
        "left out: 1 row of images that were made again since\n"
    )
    zimage("gallery", "out", code=0)
    marked = data_of(out / "gallery.html", "facts")["rejected"]
    assert marked == [[3, hashes[3], "blurred"], [4, hashes[4], ""]]
    commit(Storage(str(out)), 0, 4, revision=1)  # sample 3 is made again
    zimage("gallery", "out", code=0)
    assert data_of(out / "gallery.html", "facts")["rejected"] == [[4, hashes[4], ""]]
    assert len((out / "rejected.csv").read_text().splitlines()) == 3
    zimage.write("mine.csv", "index\n96\n")
    words = imported(code=2).err
    assert "mine.csv: row 2, column index: value '96'; allowed: a sample that has an image" in words
    (zimage.folder / "mine.csv").unlink()
    assert "--import-rejected: mine.csv: No such file" in imported(code=2).err
    (out / "rejected.csv").write_text("index\n")
    words = zimage("gallery", "out", code=2).err
    assert "out/rejected.csv: row 1: no column 'pixels_sha256'" in words
