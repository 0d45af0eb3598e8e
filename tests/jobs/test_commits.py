"""Parts and their names: what a listing must tell, and whose row is current."""

import time
from datetime import UTC, date, datetime

import pyarrow as pa
import pytest

from jobs import manifest
from jobs.commits import Listing, PartName, failed_indices, missing_indices, write_part
from jobs.errors import StorageError
from jobs.manifest import COLUMN_NAMES, ManifestRow
from jobs.metadata_file import write_metadata
from jobs.plan import new_plan
from jobs.storage import Storage


def row(index: int, *, revision: int = 0, failed: bool = False, **changes) -> ManifestRow:
    values = {
        "file_name": None if failed else f"images/a/x_{index:08d}.png",
        "index": index,
        "prompt_index": index,
        "status": "failed" if failed else "ok",
        "prompt": f"prompt {index}",
        "negative_prompt": None,
        "seed": index,
        "width": 16,
        "height": 16,
        "num_inference_steps": 8,
        "guidance_scale": 0.0,
        "model": "m",
        "model_fingerprint": "sha256:0",
        "loras": None,
        "dtype": "float32",
        "attention": "native",
        "format": "png",
        "bytes": None if failed else 1,
        "sha256": None if failed else "aa",
        "pixels_sha256": None if failed else "bb",
        "shard": index // 4,
        "revision": revision,
        "attempt": "00000000-x",
        "batch": (index,),
        "batch_mode": "planned",
        "worker": "w0",
        "node": "n",
        "device": "cpu",
        "seconds": 0.1,
        "error_type": "generation_error" if failed else None,
        "error_message": "no" if failed else None,
        "created_at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "metadata": {},
    }
    return ManifestRow(**(values | changes))


def part(shard=0, revision=0, first=0, last=0, total=1, rows=1, failed=0, before=0, epoch=1):
    return PartName(shard, revision, first, last, total, rows, failed, before, epoch)


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path / "out"), create=True)


def test_name_round_trips_and_nothing_else_parses():
    name = PartName(12, 1, 3, 7, 8, 60, 2, 1, 5)
    assert str(name) == "00000012-r001-b0003-0007of0008-n00060-f00002-p00001-e000005.parquet"
    assert PartName.parse(str(name)) == name
    for wrong in (
        "metadata.parquet",
        str(name)[:-1],
        str(name).replace("r001", "r1"),
        "x" + str(name),
    ):
        with pytest.raises(ValueError, match="not the name of a manifest part"):
            PartName.parse(wrong)


def test_same_commit_twice_is_refused(storage):
    write_part(storage, part(), [row(0)])
    with pytest.raises(StorageError, match="exists already"):
        write_part(storage, part(), [row(0, prompt="other")])
    assert Listing(storage).current(0)["prompt"].to_pylist() == ["prompt 0"]


def test_listing_tells_done_partly_and_failed_without_reading(storage, monkeypatch):
    write_part(
        storage,
        part(shard=0, rows=4, last=1, total=2, failed=1),
        [row(i, failed=i == 2) for i in range(4)],
    )
    write_part(storage, part(shard=1, rows=2, total=2), [row(4), row(5)])
    monkeypatch.setattr("jobs.commits.read_part", lambda *_: pytest.fail("a part was read"))
    listing = Listing(storage)
    assert (listing.num_rows, listing.num_failed) == (6, 1)
    assert listing.state(0).rows == 4
    assert listing.state(1).rows == 2
    assert listing.state(9).rows == 0


def test_later_revision_is_current_and_mends_the_count(storage):
    write_part(storage, part(rows=4, failed=2), [row(i, failed=i > 1) for i in range(4)])
    write_part(
        storage,
        part(revision=1, rows=2, failed=1, before=2, epoch=2),
        [row(2, revision=1), row(3, revision=1, failed=True)],
    )
    listing = Listing(storage)
    assert (listing.num_rows, listing.num_failed) == (4, 1)
    table = listing.current(0)
    assert table["index"].to_pylist() == [0, 1, 2, 3]
    assert table["revision"].to_pylist() == [0, 0, 1, 1]
    assert [(s.id, i) for s, i in failed_indices(listing, new_plan(0, 4, 4))] == [(0, {3})]


def test_part_of_a_driver_taken_for_dead_neither_duplicates_nor_wins(storage):
    write_part(
        storage, part(rows=4, last=1, total=2, epoch=2), [row(i, worker="new") for i in range(4)]
    )
    write_part(
        storage,
        part(rows=2, total=2, epoch=1, failed=1),
        [row(0, worker="late"), row(1, worker="late", failed=True)],
    )
    listing = Listing(storage)
    assert (listing.num_rows, listing.num_failed) == (4, 0)
    assert listing.current(0)["worker"].to_pylist() == ["new"] * 4


def test_missing_indices(storage):
    plan = new_plan(0, 12, 4)
    write_part(storage, part(shard=0, rows=4), [row(i) for i in range(4)])
    write_part(storage, part(shard=1, rows=2, total=2), [row(4), row(6)])
    listing = Listing(storage)
    assert missing_indices(listing, plan.shard(0)) == set()
    assert missing_indices(listing, plan.shard(1)) == {5, 7}
    assert missing_indices(listing, plan.shard(2)) is None


def test_stray_file_in_the_manifest_is_an_error_that_names_it(storage):
    storage.put("manifest/copy.parquet", b"x")
    with pytest.raises(StorageError, match=r"copy\.parquet"):
        Listing(storage)


def test_damaged_part_is_an_error_that_names_it(storage):
    storage.put(f"manifest/{part(rows=4)}", b"PAR1 not parquet")
    with pytest.raises(StorageError, match="damaged manifest part"):
        Listing(storage).current(0)


@pytest.mark.long
def test_150_000_parts_are_listed_in_two_seconds(tmp_path):
    folder = tmp_path / "out" / "manifest"
    folder.mkdir(parents=True)
    for shard in range(150_000):
        (folder / str(part(shard=shard, rows=64, last=7, total=8))).touch()
    started = time.process_time()
    listing = Listing(Storage(str(tmp_path / "out")))
    assert time.process_time() - started < 2.0
    assert listing.num_rows == 150_000 * 64


def test_columns_types_and_order():
    table = manifest.to_table(
        [row(0, metadata={"name": "Zoë", "age": 30, "tall": True, "born": date(1990, 1, 1)})]
    )
    assert table.schema.names[: len(COLUMN_NAMES)] == list(COLUMN_NAMES)
    assert table.schema.names[len(COLUMN_NAMES) :] == [
        "profile_name",
        "profile_age",
        "profile_tall",
        "profile_born",
    ]
    kinds = {name: table.schema.field(name).type for name in table.schema.names}
    assert kinds["index"] == kinds["seed"] == kinds["bytes"] == kinds["shard"] == pa.int64()
    assert kinds["width"] == kinds["revision"] == kinds["num_inference_steps"] == pa.int32()
    assert kinds["guidance_scale"] == kinds["seconds"] == pa.float64()
    assert kinds["batch"] == pa.list_(pa.int64())
    assert kinds["created_at"] == pa.timestamp("us", tz="UTC")
    assert kinds["profile_age"] == pa.int64()
    assert kinds["profile_tall"] == pa.bool_()
    assert kinds["profile_born"] == pa.date32()
    read = manifest.from_parquet(manifest.to_parquet(table))
    assert read.equals(table)
    assert read.schema.metadata[b"zimage_schema_version"] == b"1"


def test_profile_columns_of_different_parts_get_one_type(storage):
    write_part(storage, part(shard=0), [row(0, metadata={"a": 1, "b": None, "c": "x"})])
    write_part(storage, part(shard=1), [row(4, metadata={"a": 1.5, "b": 2, "d": None})])
    assert write_metadata(storage, Listing(storage)) == 2
    table = manifest.from_parquet(storage.get("metadata.parquet"))
    assert table["index"].to_pylist() == [0, 4]
    assert table["profile_a"].to_pylist() == [1.0, 1.5]
    assert table["profile_b"].to_pylist() == [None, 2]
    assert table["profile_c"].to_pylist() == ["x", None]
    assert table["profile_d"].to_pylist() == [None, None]


def test_parts_with_and_without_tars_are_read_together(storage):
    """A part without any image has no such columns, nor have those of older versions."""
    write_part(storage, part(rows=1, failed=1, last=0, total=2), [row(0, failed=True)])
    in_tar = row(1, tar="images/00000000-x.tar", tar_offset=512, file_name="x_00000001.png")
    write_part(storage, part(rows=1, first=1, last=1, total=2), [in_tar])
    write_part(storage, part(shard=1), [row(4, metadata={"a": 1})])
    listing = Listing(storage)
    assert listing.current(0)["tar"].to_pylist() == [None, "images/00000000-x.tar"]
    assert listing.current(0, ["tar_offset"])["tar_offset"].to_pylist() == [None, 512]
    table = listing.current(1, ["tar", "tar_offset", "profile_b"])
    assert table.to_pydict() == {"index": [4], "tar": [None], "tar_offset": [None]} | {
        "profile_b": [None]
    }
    assert "tar" not in listing.current(1).schema.names
    schema = manifest.unify(listing.schemas())
    assert schema.names[-3:] == ["tar", "tar_offset", "profile_a"]
