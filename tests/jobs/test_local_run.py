"""A job in this process: what lands in the manifest, and what a second run makes of it."""

import json
import re
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from job_runs import read_hashes, read_rows, unmakeable
from PIL import Image

from jobs.cli import main
from jobs.manifest import COLUMN_NAMES
from jobs.writers import pixels_sha256


def run(job, *flags: str) -> int:
    return main(["run", str(job.path), "--local", *flags])


def test_rows_files_and_names_are_those_of_the_contract(make_job):
    job = make_job(count=12)
    assert run(job) == 0
    table = pq.read_table(job.output / "metadata.parquet")
    assert tuple(table.schema.names[: len(COLUMN_NAMES)]) == COLUMN_NAMES
    assert all(name.startswith("profile_") for name in table.schema.names[len(COLUMN_NAMES) :])
    rows = table.to_pylist()
    assert [r["index"] for r in rows] == list(range(12))
    for row in rows:
        name = f"faces_{row['index']:08d}.png"
        assert re.fullmatch(rf"images/{row['shard']:08d}-[0-9a-z]+/{name}", row["file_name"])
        assert row["seed"] == 42 + row["index"]
        assert row["status"] == "ok"
        assert row["revision"] == 0
        assert row["batch_mode"] == "planned"
        assert row["index"] in row["batch"]
        content = (job.output / row["file_name"]).read_bytes()
        assert len(content) == row["bytes"]
        with Image.open(job.output / row["file_name"]) as image:
            assert image.size == (64, 64)
            assert pixels_sha256(np.asarray(image)) == row["pixels_sha256"]
    assert sorted(p.name for p in job.output.iterdir()) == sorted(
        ["events", "images", "job.json", "logs", "manifest", "metadata.parquet"]
    )


def test_datasets_reads_the_output_as_an_image_folder(make_job, tmp_path):
    import datasets

    job = make_job(count=6)
    assert run(job) == 0
    dataset = datasets.load_dataset(
        "imagefolder", data_dir=str(job.output), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(dataset) == 6
    rows = {r["index"]: r for r in read_rows(job.output)}
    for example in dataset:
        row = rows[example["index"]]
        assert example["prompt"] == row["prompt"]
        assert example["profile_age"] == row["profile_age"]
        assert pixels_sha256(np.asarray(example["image"])) == row["pixels_sha256"]


def test_second_run_makes_nothing_and_writes_nothing(make_job, capsys):
    job = make_job(count=4)
    assert run(job) == 0
    before = {p: p.stat().st_mtime_ns for p in job.output.rglob("*")}
    assert run(job) == 0
    assert "nothing to make" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in job.output.rglob("*")} == before


def test_metadata_that_a_crash_left_behind_is_written_by_the_next_run(make_job):
    job = make_job(count=8)
    assert run(job, "--count", "4") == 0
    stale = (job.output / "metadata.parquet").read_bytes()
    assert run(job) == 0
    (job.output / "metadata.parquet").write_bytes(stale)
    assert run(job) == 0
    assert len(read_rows(job.output)) == 8


def test_count_grows_in_a_further_extent_and_leaves_the_first_alone(make_job):
    job = make_job(count=6, shard_size=4)
    assert run(job) == 0
    first = read_rows(job.output)
    assert run(job, "--count", "11") == 0
    rows = read_rows(job.output)
    assert rows[:6] == first
    assert [r["shard"] for r in rows] == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
    extents = json.loads((job.output / "job.json").read_text())["extents"]
    assert [(e["start"], e["stop"], e["first_shard"]) for e in extents] == [(0, 6, 0), (6, 11, 2)]


def test_images_per_prompt_number_and_seed_samples(make_job):
    job = make_job(count=3)
    assert run(job, "--set", "sampling.images_per_prompt=2", "--start", "1", "--count", "2") == 0
    rows = read_rows(job.output)
    assert [r["index"] for r in rows] == [2, 3, 4, 5]
    assert [r["prompt_index"] for r in rows] == [1, 1, 2, 2]
    assert [r["seed"] for r in rows] == [44, 45, 46, 47]
    assert rows[0]["prompt"] == rows[1]["prompt"] != rows[2]["prompt"]


def test_prompt_with_a_seed_of_its_own(make_job, tmp_path, monkeypatch):
    (tmp_path / "people.csv").write_text("prompt,seed\na face,7\nanother face,\n")
    monkeypatch.chdir(tmp_path)
    flags = ["prompts.generator=table", "prompts.profiles=people.csv"]
    flags += ["prompts.options={seed_column: seed}", "sampling.images_per_prompt=2"]
    job = make_job(count=2)
    assert run(job, *(word for flag in flags for word in ("--set", flag))) == 0
    assert [r["seed"] for r in read_rows(job.output)] == [7, 8, 44, 45]


def test_dry_run_goes_beside_the_output_and_makes_the_same_images(make_job):
    job = make_job(count=12, shard_size=12)
    assert run(job, "--limit", "4") == 0
    assert not job.output.exists()
    dry = job.output.with_name("out-dry")
    assert [r["index"] for r in read_rows(dry)] == [0, 1, 2, 3]
    assert run(job, "--limit", "6") == 0
    assert len(read_rows(dry)) == 6
    assert run(job, "--limit", "2") == 0  # never forgets what it has made
    assert len(read_rows(dry)) == 6


@pytest.mark.parametrize(("kind", "suffix"), [("jpeg", "jpg"), ("webp", "webp")])
def test_other_formats_of_the_same_pixels(make_job, kind, suffix):
    job = make_job(count=2, name=kind)
    assert run(job, "--set", f"output.format={kind}") == 0
    for row in read_rows(job.output):
        assert row["file_name"].endswith(f".{suffix}")
        assert row["format"] == kind
        with Image.open(job.output / row["file_name"]) as image:
            assert image.format == kind.upper()
    png = make_job(count=2, name="png")
    assert run(png) == 0
    assert read_hashes(png.output) == read_hashes(job.output)


def test_batches_hold_one_size_and_one_caption_bucket_in_index_order(make_job):
    job = make_job(count=24, shard_size=24)
    assert run(job) == 0
    rows = {r["index"]: r for r in read_rows(job.output)}
    batches = {tuple(r["batch"]) for r in rows.values()}
    assert sorted(i for batch in batches for i in batch) == list(range(24))
    assert all(list(batch) == sorted(batch) and len(batch) <= 4 for batch in batches)
    assert Counter(len(batch) for batch in batches)[4] >= 3


def test_out_of_memory_halves_the_batch_and_says_so(make_job, monkeypatch):
    import torch

    from jobs.worker import GenerationWorker

    generate = GenerationWorker._generate
    monkeypatch.setattr(
        GenerationWorker,
        "_generate",
        lambda self, batch: generate(self, batch) if len(batch) < 3 else _out_of_memory(torch),
    )
    job = make_job(count=12, shard_size=12)
    assert run(job) == 0
    rows = read_rows(job.output)
    halved = [r for r in rows if r["batch_mode"] == "halved"]
    assert halved
    assert {len(r["batch"]) for r in halved} <= {1, 2}
    assert all(len(r["batch"]) < 3 for r in rows)


def _out_of_memory(torch):
    raise torch.OutOfMemoryError("too much")


def test_sample_that_cannot_be_made_is_found_and_its_neighbours_are_made(make_job):
    job = make_job(count=4)
    with unmakeable(2):
        assert run(job) == 3
    rows = read_rows(job.output)
    assert [r["status"] for r in rows] == ["ok", "ok", "failed", "ok"]
    bad = rows[2]
    assert bad["error_type"] == "generation_error"
    assert "sample 2 cannot be made" in bad["error_message"]
    assert bad["file_name"] is None and bad["sha256"] is None
    assert run(job) == 3  # only failed rows are left, and nobody asked for them
    assert run(job, "--retry-failed") == 0
    mended = read_rows(job.output)[2]
    assert (mended["status"], mended["revision"]) == ("ok", 1)
    # its batch was made whole again, but only its own file was written
    assert len(list(job.output.glob("images/*/*.png"))) == 4
    other = make_job(count=4, name="other")
    assert run(other) == 0
    # made again within its planned batch: the bytes of a run in which nothing failed
    assert read_hashes(other.output)[2] == mended["pixels_sha256"]


@pytest.mark.parametrize("what", ["nan", "flat"])
def test_image_that_is_none_is_invalid(make_job, monkeypatch, what):
    from zimage_core import ZImagePipeline

    decode = ZImagePipeline.decode

    def spoil(self, latents):
        images = decode(self, latents)
        images[0] = float("nan") if what == "nan" else 0.5
        return images

    monkeypatch.setattr(ZImagePipeline, "decode", spoil)
    job = make_job(count=4)
    assert run(job, "--set", "sampling.batch_size=2") == 3
    failed = [r for r in read_rows(job.output) if r["status"] == "failed"]
    assert failed
    assert {r["error_type"] for r in failed} == {"invalid_image"}


def test_image_that_cannot_be_written_is_a_storage_error_of_its_row(make_job, monkeypatch):
    from jobs.errors import StorageError
    from jobs.storage import Storage

    put = Storage.put

    def refuse_one(self, path, content):
        if path.endswith("_00000001.png"):
            raise StorageError("503 slow down")
        put(self, path, content)

    monkeypatch.setattr(Storage, "put", refuse_one)
    job = make_job(count=4)
    assert run(job) == 3
    rows = read_rows(job.output)
    assert [r["error_type"] for r in rows] == [None, "storage_error", None, None]
    assert "503" in rows[1]["error_message"]


def test_image_that_cannot_be_encoded_costs_its_row_alone(make_job, monkeypatch):
    from jobs.writers import WRITERS

    writer = WRITERS["png"]
    encode = type(writer).encode
    calls = iter(range(100))

    def fail_once(self, pixels):
        if next(calls) == 0:
            raise ValueError("no memory for a buffer")
        return encode(self, pixels)

    monkeypatch.setattr(type(writer), "encode", fail_once)
    job = make_job(count=4)
    assert run(job) == 3
    failed = [r for r in read_rows(job.output) if r["status"] == "failed"]
    assert [r["error_type"] for r in failed] == ["generation_error"]
    assert "no memory for a buffer" in failed[0]["error_message"]


def test_broken_device_ends_the_run_and_the_next_one_goes_on(make_job, monkeypatch, capsys):
    from jobs.worker import GenerationWorker

    generate = GenerationWorker._generate

    def break_down(self, batch):
        if batch[0].index >= 4:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return generate(self, batch)

    monkeypatch.setattr(GenerationWorker, "_generate", break_down)
    job = make_job(count=8, shard_size=4)
    assert run(job) == 5
    assert "illegal memory access" in capsys.readouterr().err
    monkeypatch.setattr(GenerationWorker, "_generate", generate)
    assert run(job) == 0
    assert "4 images kept" in capsys.readouterr().err
    assert len(read_rows(job.output)) == 8


def test_worker_that_does_not_see_the_drivers_output_is_refused(make_job, monkeypatch, capsys):
    from jobs.worker import GenerationWorker

    check = GenerationWorker._check_output

    def elsewhere(self):
        from dataclasses import replace

        self.spec = replace(self.spec, nonce="of another place")
        check(self)

    monkeypatch.setattr(GenerationWorker, "_check_output", elsewhere)
    job = make_job(count=2)
    assert run(job) == 5
    assert "is not the same place" in capsys.readouterr().err
    assert not list(job.output.glob("images/*"))
