"""`output.layout: webdataset`: one tar for each attempt, found through the manifest."""

import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from job_runs import Job, read_hashes, read_rows, unmakeable
from PIL import Image

from jobs.cli import main
from jobs.errors import StorageError
from jobs.executor import Finished, Planned
from jobs.image_output import Made
from jobs.job_file import load_job
from jobs.manifest import COLUMN_NAMES
from jobs.storage import Storage
from jobs.tar_output import image_output
from jobs.writers import pixels_sha256

LAYOUT = "--set=output.layout=webdataset"


def run(job: Job, *flags: str) -> int:
    return main(["run", str(job.path), "--local", LAYOUT, *flags])


def tars(output: Path) -> dict[str, bytes]:
    """By shard: every attempt's name ends in a nonce."""
    return {p.name.split("-")[0]: p.read_bytes() for p in sorted(output.glob("images/*.tar"))}


def test_tars_hold_what_the_manifest_says_and_the_images_of_the_other_layout(make_job, tmp_path):
    job = make_job(count=10)
    assert run(job) == 0
    rows = read_rows(job.output)
    names = pq.read_schema(job.output / "metadata.parquet").names
    assert names[: len(COLUMN_NAMES)] == list(COLUMN_NAMES)
    assert names[len(COLUMN_NAMES) : len(COLUMN_NAMES) + 2] == ["tar", "tar_offset"]
    assert sorted(p.name for p in job.output.iterdir()) == [
        *("events", "images", "job.json", "logs", "manifest", "metadata.parquet", "tars.txt")
    ]
    assert (job.output / "tars.txt").read_text().split() == sorted({r["tar"] for r in rows})
    for r in rows:
        assert r["tar"] == f"images/{r['attempt']}.tar"
        with (job.output / r["tar"]).open("rb") as file:
            file.seek(r["tar_offset"])
            content = file.read(r["bytes"])
        with Image.open(io.BytesIO(content)) as image:
            assert pixels_sha256(np.asarray(image)) == r["pixels_sha256"]
        with tarfile.open(job.output / r["tar"]) as tar:
            member = tar.getmember(r["file_name"])
            assert (member.offset_data, member.size) == (r["tar_offset"], r["bytes"])
    other = make_job(count=10, name="files")
    assert main(["run", str(other.path), "--local"]) == 0
    assert read_hashes(other.output) == read_hashes(job.output)
    assert "tar" not in pq.read_schema(other.output / "metadata.parquet").names
    assert not (other.output / "tars.txt").exists()


def test_webdataset_reads_prompt_metadata_and_pixels(make_job):
    job = make_job(count=10, shard_size=5)
    assert run(job) == 0
    urls = [str(job.output / line) for line in (job.output / "tars.txt").read_text().split()]
    assert len(urls) == 2
    rows = {r["index"]: r for r in read_rows(job.output)}
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert {s["json"]["index"] for s in samples} == set(rows)
    for sample in samples:
        r = rows[sample["json"]["index"]]
        assert sample["__key__"] == f"faces_{r['index']:08d}"
        assert set(sample) >= {"png", "json", "txt"}
        assert pixels_sha256(sample["png"]) == r["pixels_sha256"]
        assert sample["txt"] == r["prompt"] == sample["json"]["prompt"]
        assert sample["json"]["profile_age"] == r["profile_age"]
        assert sample["json"]["seed"] == r["seed"]


def test_same_images_give_the_same_tar(make_job):
    one = make_job(count=8, name="one")
    assert run(one) == 0
    two = make_job(count=8, name="two")
    assert run(two) == 0
    assert len(tars(one.output)) == 2
    assert tars(one.output) == tars(two.output)
    with tarfile.open(next(one.output.glob("images/*.tar"))) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")


def test_dots_of_a_name_do_not_break_keys(make_job):
    job = make_job(count=2)
    assert run(job, "--set=name=v1.5.faces", "--set=output.format=webp") == 0
    urls = [str(path) for path in job.output.glob("images/*.tar")]
    sample = next(iter(webdataset.WebDataset(urls, shardshuffle=False)))
    assert sample["__key__"] == "v1-5-faces_00000000"
    assert set(sample) >= {"webp", "json", "txt"}


def test_commands_read_tars(make_job, capsys):
    job = make_job(count=8)
    assert run(job) == 0
    out = str(job.output)
    assert run(job) == 0
    assert "nothing to make" in capsys.readouterr().err
    assert main(["verify", out]) == 0
    assert main(["status", out, "--json"]) == 0
    assert main(["gc", out]) == 0
    capsys.readouterr()
    # a byte of one image, and the end of another tar
    rows = read_rows(job.output)
    with (job.output / rows[0]["tar"]).open("r+b") as file:
        file.seek(rows[0]["tar_offset"] + 100)
        file.write(b"\xff\xfe")
    os.truncate(job.output / rows[7]["tar"], rows[7]["tar_offset"] + 10)
    assert main(["verify", out, "--json"]) == 1
    found = {d["index"] for d in json.loads(capsys.readouterr().out)["differences"]}
    assert 0 in found and 7 in found and found <= {0, 4, 5, 6, 7}
    (job.output / rows[0]["tar"]).unlink()
    assert main(["verify", out, "--json"]) == 1
    found = {d["index"]: d for d in json.loads(capsys.readouterr().out)["differences"]}
    assert found[1]["problem"] == "the file is missing"


def test_gc_knows_tars_of_dead_attempts(make_job, capsys):
    job = make_job(count=4)
    assert run(job) == 0
    dead = [
        job.output / "images" / "00000000-aaaaaaaa.tar",
        job.output / "images" / "00000000-bbbbbbbb.tar#1",
    ]
    for file in dead:
        file.write_bytes(b"x" * 100)
        os.utime(file, (0, 0))
    kept = next(p for p in job.output.glob("images/*.tar") if p not in dead)
    os.utime(kept, (0, 0))
    capsys.readouterr()
    assert main(["gc", str(job.output), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {f["file"] for f in report["leftovers"]} == {f"images/{f.name}" for f in dead}
    assert main(["gc", str(job.output), "--delete"]) == 0
    assert list(job.output.glob("images/*")) == [kept]
    assert main(["verify", str(job.output)]) == 0


def test_failed_sample_is_made_again_in_a_tar_of_its_own(make_job):
    job = make_job(count=4)
    with unmakeable(2):
        assert run(job) == 3
    failed = read_rows(job.output)[2]
    assert (failed["status"], failed["tar"], failed["tar_offset"]) == ("failed", None, None)
    assert failed["file_name"] is None
    assert run(job, "--retry-failed") == 0
    rows = read_rows(job.output)
    assert [r["revision"] for r in rows] == [0, 0, 1, 0]
    assert len({r["tar"] for r in rows}) == 2
    assert len((job.output / "tars.txt").read_text().split()) == 2
    with tarfile.open(job.output / rows[2]["tar"]) as tar:
        assert tar.getnames() == [f"faces_00000002.{kind}" for kind in ("png", "json", "txt")]
    assert main(["verify", str(job.output)]) == 0


def test_tar_that_cannot_be_written_fails_its_images_alone(make_job, monkeypatch):
    put = Storage.put

    def refuse_first_shard(self, path, content):
        if path.startswith("images/00000000-"):
            raise StorageError("503 slow down")
        put(self, path, content)

    monkeypatch.setattr(Storage, "put", refuse_first_shard)
    job = make_job(count=8)
    assert run(job) == 3
    rows = read_rows(job.output)
    assert [r["error_type"] for r in rows] == ["storage_error"] * 4 + [None] * 4
    assert all(r["sha256"] is None and r["tar"] is None for r in rows[:4])
    monkeypatch.setattr(Storage, "put", put)
    assert run(job, "--retry-failed") == 0
    assert main(["verify", str(job.output)]) == 0


def test_what_was_made_before_a_device_broke_is_not_lost(make_job, monkeypatch, capsys):
    from jobs.worker import GenerationWorker

    generate = GenerationWorker._generate

    def break_down(self, batch):
        if batch[0].index >= 4:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return generate(self, batch)

    monkeypatch.setattr(GenerationWorker, "_generate", break_down)
    job = make_job(count=12, shard_size=12)
    batches = "--set=sampling.batch_size=2"
    assert run(job, batches) == 5
    again = re.search(r"(\d+) samples leased again", capsys.readouterr().err)
    assert again is not None and int(again[1]) < 12
    (tar,) = job.output.glob("images/*.tar")
    with tarfile.open(tar) as opened:
        assert len(opened.getnames()) == 3 * (12 - int(again[1]))
    monkeypatch.setattr(GenerationWorker, "_generate", generate)
    assert run(job, batches) == 0
    assert len(read_rows(job.output)) == 12
    assert main(["verify", str(job.output)]) == 0


def test_results_of_a_lease_come_together(tmp_path, make_job):
    """Ray goes through a worker's messages with `send`."""
    config = load_job(make_job().path, sets=["output.layout=webdataset"])
    output = image_output(Storage(str(tmp_path / "out"), create=True), config)
    made = Made(0, "00000000-x", (0,), "planned")
    results = tuple(made.failed("generation_error", str(n)) for n in range(3))
    messages = [Planned((), ()), *(Finished((result,)) for result in results)]
    stream = output.deliver("00000000-x", iter(messages))
    assert next(stream) == Planned((), ())
    assert stream.send("taken") == Finished(results)
    with pytest.raises(StopIteration):
        stream.send("taken")
    output.close()
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_temporary_folder_that_cannot_be_written_is_named(make_job, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jobs.tar_output.tempfile.TemporaryFile", full)
    job = make_job(count=4)
    assert run(job) == 5
    assert "set TMPDIR to another folder" in capsys.readouterr().err


def test_layout_cannot_change_in_an_output(make_job, capsys):
    job = make_job(count=4)
    assert run(job) == 0
    assert main(["run", str(job.path), "--local"]) == 2
    assert "output.layout: was 'webdataset', now 'files'" in capsys.readouterr().err


def test_dry_run(make_job):
    job = make_job(count=8)
    assert run(job, "--limit", "2") == 0
    dry = job.output.with_name("out-dry")
    assert [r["index"] for r in read_rows(dry)] == [0, 1]
    assert (dry / "tars.txt").exists()
