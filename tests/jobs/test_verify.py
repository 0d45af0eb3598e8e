"""`zimage verify`: what it finds in an output that somebody laid hands on, and what is no fault."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_calls import CommandLine
from PIL import Image

from jobs.writers import sha256


@pytest.fixture
def made(zimage: CommandLine) -> CommandLine:
    """With an output `out` of 8 images in 2 shards."""
    zimage.run(code=0)
    return zimage


def report(command: CommandLine, code: int) -> dict:
    return json.loads(command("verify", "out", "--json", code=code).out)


def parts(command: CommandLine) -> list[Path]:
    return sorted((command.folder / "out/manifest").iterdir())


def rewrite(part: Path, **columns: list) -> None:
    """Change columns of a part in place, with all the rest as it is."""
    table = pq.read_table(part)
    for name, values in columns.items():
        position = table.schema.get_field_index(name)
        field = table.schema.field(position)
        table = table.set_column(position, field, pa.array(values, field.type))
    pq.write_table(table, part)


def test_kinds_of_differences(made: CommandLine) -> None:
    files = [made.folder / "out" / row["file_name"] for row in made.rows()]
    files[0].unlink()
    files[1].write_bytes(files[2].read_bytes())
    content = files[3].read_bytes()  # a row that fits a file that is no image
    files[3].write_bytes(b"x" * len(content))
    table = pq.read_table(parts(made)[0]).to_pydict()
    rewrite(parts(made)[0], sha256=[*table["sha256"][:3], sha256(b"x" * len(content))])
    (made.folder / "out/metadata.parquet").unlink()
    found = report(made, code=1)
    kinds = {d["index"]: d["kind"] for d in found["differences"]}
    assert kinds == {0: "missing", 1: "changed", 3: "unreadable"}
    assert found["checked"] == 8 and found["manifest"] == []


def test_an_image_whose_row_was_changed_too_is_found_by_its_pixels(made: CommandLine) -> None:
    """The file's hash and size are made to fit; the pixels' hash is still that of the first."""
    row = made.rows()[0]
    file = made.folder / "out" / row["file_name"]
    Image.new("RGB", (32, 32), "red").save(file)
    content = file.read_bytes()
    table = pq.read_table(parts(made)[0]).to_pydict()
    rewrite(
        parts(made)[0],
        sha256=[sha256(content), *table["sha256"][1:]],
        bytes=[len(content), *table["bytes"][1:]],
    )
    (made.folder / "out/metadata.parquet").unlink()
    (difference,) = report(made, code=1)["differences"]
    assert difference["index"] == 0 and difference["problem"].startswith("pixels ")
    # and a row that says another size than the image has
    rewrite(parts(made)[0], width=[64, *table["width"][1:]])
    (difference,) = report(made, code=1)["differences"]
    assert difference["problem"] == "32x32, committed 64x32"


def test_files_that_no_commit_refers_to_are_a_note(made: CommandLine) -> None:
    orphan = made.folder / "out/images/00000000-aaaaaaaa/t_00000000.png"
    orphan.parent.mkdir()
    orphan.write_bytes(b"123")
    ended = made("verify", "out", code=0)
    assert "8 of 8 images as committed\n" in ended.out
    assert "note: 1 file (3 B) that no commit refers to; zimage gc out lists them" in ended.out
    assert report(made, code=0)["orphans"] == {"files": 1, "bytes": 3, "under_way": False}


def test_a_lost_part_of_the_manifest(made: CommandLine) -> None:
    lost = parts(made)[1]
    content = lost.read_bytes()
    lost.unlink()
    found = report(made, code=1)
    problem = {"file": f"manifest/{lost.name}", "problem": "was committed and is gone"}
    assert found["manifest"] == [problem]
    assert (found["rows"], found["planned"]) == (4, 8)
    lost.write_bytes(content)
    assert report(made, code=0)["manifest"] == []
    lost.unlink()
    made.run(code=0)  # or the images are made again
    assert report(made, code=0)["manifest"] == []


def test_rows_that_are_not_in_the_plan_or_there_twice(made: CommandLine) -> None:
    first, second = parts(made)
    kept = second.read_bytes()
    rewrite(second, index=[4, 5, 6, 99])
    assert "sample 99: shard 1 is 4 to 7" in made("verify", "out", code=1).out
    rewrite(second, index=[4, 5, 6, 6])
    assert "sample 6 has two rows" in made("verify", "out", code=1).out
    rewrite(second, index=[4, 5, 6, 7], revision=[0, 0, 0, 3])
    assert "sample 7: shard or revision is not that of" in made("verify", "out", code=1).out
    pq.write_table(pq.read_table(first).slice(1), first)
    assert "3 rows; its name says 4" in made("verify", "out", code=1).out
    second.write_bytes(kept)
    shutil.copy(second, second.with_name(second.name.replace("00000001-", "00000007-")))
    assert "is of shard 7, but job.json plans shards 0 to 1" in made("verify", "out", code=5).err


def test_another_schema(made: CommandLine) -> None:
    part = parts(made)[0]
    table = pq.read_table(part)
    pq.write_table(table.replace_schema_metadata({"zimage_schema_version": "2"}), part)
    assert f"{part.name}: schema version 2; allowed: 1" in made("verify", "out", code=1).out


def test_metadata_that_is_not_what_the_manifest_says(made: CommandLine) -> None:
    file = made.folder / "out/metadata.parquet"
    table = pq.read_table(file)
    position = table.schema.get_field_index("seed")
    seeds = pa.array([*table["seed"].to_pylist()[:-1], 5], pa.int64())
    pq.write_table(table.set_column(position, table.schema.field(position), seeds), file)
    words = "metadata.parquet: sample 7: seed is another one than the manifest's"
    assert words in made("verify", "out", code=1).out
    pq.write_table(table.slice(0, 7), file)
    assert "sample 7: row is missing" in made("verify", "out", code=1).out
    file.unlink()
    ended = made("verify", "out", code=0)
    assert "note: metadata.parquet is not there yet; the next run that ends" in ended.out


def test_an_output_that_is_not_complete_is_no_difference(zimage: CommandLine) -> None:
    body = "assert index != 1\n        return f'A cat {index}'"
    generator = ["--set", f"prompts.generator={zimage.write_generator(body)}"]
    zimage.run(*generator, "--count", 4, code=3)
    ended = zimage("verify", "out", code=0)
    assert ended.out == "3 of 3 images as committed; 1 failed row without one\n"
