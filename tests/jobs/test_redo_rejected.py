"""`--redo-rejected`: just the images that somebody rejected are made again, with other noise."""

import contextlib
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from cli_calls import CommandLine
from driver_loop import sample
from PIL import Image

from jobs.cli import main
from jobs.commits import Listing
from jobs.epoch import read_events
from jobs.errors import StorageError
from jobs.executor import Lease, WorkerLost
from jobs.job_file import load_job
from jobs.moved_seeds import STRIDE, MovedSeed, next_seed
from jobs.plan import Shard
from jobs.preparation import RunOptions, prepare
from jobs.rejected import Rejection, add_rejected
from jobs.scheduler import Scheduler, Work
from jobs.storage import Storage
from zimage_core.tiny.make import make_checkpoint

JOB = """
name: t
model: {{path: {model}, dtype: float32}}
prompts: {{generator: table, profiles: t.csv}}
sampling: {{width: 32, height: 32, num_inference_steps: 1, batch_size: 3}}
output: {{uri: out, shard_size: 4}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder of a job of 8 images in two shards, in batches of up to 3, that was run."""
    folder = tmp_path_factory.mktemp("finished")
    # random weights that load in a moment
    model = tmp_path_factory.mktemp("model") / "m"
    make_checkpoint(model, layers=1, text_layers=2, vae_channels=(8, 8, 8, 8))
    (folder / "job.yaml").write_text(JOB.format(model=model))
    write_table(folder)
    with contextlib.chdir(folder):
        assert main(["run", "job.yaml", "--local"]) == 0
    return folder


@pytest.fixture
def made(zimage: CommandLine, finished: Path) -> CommandLine:
    """In a copy of that folder."""
    shutil.copytree(finished, zimage.folder, dirs_exist_ok=True)
    return zimage


def write_table(folder: Path, prompts: dict[int, str] | None = None, **seeds: int) -> None:
    """Eight prompts of one length; `s3=7` is a seed of a row's own."""
    lines = [f"a cat of {i}" if i not in (prompts or {}) else prompts[i] for i in range(8)]
    rows = [f"{line},{seeds.get(f's{i}', 100 + i)},a.png" for i, line in enumerate(lines)]
    (folder / "t.csv").write_text("\n".join(["prompt,seed,picture", *rows]) + "\n")


def reject(zimage: CommandLine, *indices: int) -> None:
    rows = "".join(f"{i},six fingers\n" for i in indices)
    zimage.write("marks.csv", f"index,note\n{rows}")
    ended = zimage("gallery", "out", "--import-rejected", "marks.csv", code=0)
    assert "zimage run JOB --redo-rejected makes them again" in ended.err


def by_index(zimage: CommandLine, output: str = "out") -> dict[int, dict]:
    return {row["index"]: row for row in zimage.rows(output)}


def pixels(rows: dict[int, dict]) -> dict[int, str]:
    return {index: row["pixels_sha256"] for index, row in rows.items()}


def status(zimage: CommandLine) -> dict:
    return json.loads(zimage("status", "out", "--json", code=0).out)


def test_exactly_the_rejected_images_change_and_can_be_rejected_again(made: CommandLine) -> None:
    before = by_index(made)
    files = {p: p.stat().st_mtime_ns for p in (made.folder / "out/images").rglob("*.png")}
    nothing = made.run("--redo-rejected", code=0).err
    assert "8 images kept, no image is rejected, nothing to make" in nothing

    reject(made, 1, 6)
    found = status(made)
    assert found["rejected"] == {"samples": [1, 6], "made_again": 0, "problem": None}
    assert found["next"].endswith(" --redo-rejected")
    planned = made("plan", "job.yaml", "--redo-rejected", code=0).out
    assert f"\n         1  seed 101 -> {101 + STRIDE}: six fingers\n" in planned
    plan = json.loads(made("plan", "job.yaml", "--redo-rejected", "--json", code=0).out)
    assert [(r["index"], r["next_seed"]) for r in plan["redo"]] == [
        (1, 101 + STRIDE),
        (6, 106 + STRIDE),
    ]
    assert plan["to_make"] == 2
    assert "8 images kept, nothing to make" in made.run(code=0).err  # a mark alone is none
    words = made.run("--redo-rejected", code=0).err
    assert "6 images kept, 2 rejected images to make again with their next seeds" in words

    once = by_index(made)
    assert [i for i in once if pixels(once)[i] != pixels(before)[i]] == [1, 6]
    for index, row in once.items():
        again = index in (1, 6)
        assert row["seed"] == 100 + index + again * STRIDE
        assert row["planned_seed"] == (100 + index if again else None)
        assert row["revision"] == int(again)
        # with the neighbours that it was made with before, which are made for its sake
        assert (row["batch"], row["batch_mode"]) == (before[index]["batch"], "planned")
        assert again or row["attempt"] == before[index]["attempt"]
    assert len(once[1]["batch"]) == 3
    assert all(path.stat().st_mtime_ns == modified for path, modified in files.items())
    assert len(list((made.folder / "out/images").rglob("*.png"))) == 10
    made("verify", "out", code=0)
    made("regen", "out", *range(8), code=0)
    assert "nothing to make" in made.run(code=0).err  # another seed is no change
    nothing = made.run("--redo-rejected", code=0).err
    assert "rejected.csv: 2 marks of images that are not there any more, left aside" in nothing

    reject(made, 0, 1)
    options = RunOptions(redo_rejected=True)
    prepared = prepare(load_job("job.yaml"), options, create=False)
    (work,) = prepared.resume.work()
    assert (work.revision, work.indices) == (2, {0, 1})
    assert work.seeds == {
        0: MovedSeed(100, 100 + STRIDE),
        1: MovedSeed(101, 101 + 2 * STRIDE),
    }
    made.run("--redo-rejected", code=0)
    twice = by_index(made)
    assert [i for i in twice if pixels(twice)[i] != pixels(once)[i]] == [0, 1]
    assert (twice[1]["seed"], twice[1]["planned_seed"]) == (101 + 2 * STRIDE, 101)
    assert (twice[0]["seed"], twice[0]["revision"]) == (100 + STRIDE, 2)
    made("regen", "out", *range(4), code=0)  # 2 was made beside another 0 and 1

    reject(made, 2)  # whose neighbours are made as they are now
    (work,) = prepare(load_job("job.yaml"), options, create=False).resume.work()
    assert {index: moved.seed for index, moved in work.seeds.items()} == {
        0: 100 + STRIDE,
        1: 101 + 2 * STRIDE,
        2: 102 + STRIDE,
    }
    found = status(made)
    assert found["rejected"] == {"samples": [2], "made_again": 4, "problem": None}
    events = read_events(Storage(str(made.folder / "out")))
    assert [e["rejected"] for e in events if e["event"] == "plan"] == ["", "1,6", "0-1"]


@pytest.mark.slow
@pytest.mark.ray
def test_redo_on_ray_makes_the_images_of_one_without(made: CommandLine) -> None:
    reject(made, 0, 1, 6)
    shutil.copytree(made.folder / "out", made.folder / "ray")
    made.run("--redo-rejected", code=0)
    flags = ["--workers", 2, "--output", "ray", "--redo-rejected"]
    made.process("run", "job.yaml", *flags, code=0)
    assert pixels(by_index(made, "ray")) == pixels(by_index(made))
    assert [row["seed"] for row in made.rows("ray")] == [row["seed"] for row in made.rows()]
    made("verify", "ray", code=0)


def test_marks_that_lead_to_nothing_are_said(made: CommandLine) -> None:
    storage = Storage(str(made.folder / "out"))
    at = datetime.now(UTC)
    add_rejected(storage, [Rejection(99, "a" * 64, "", at), Rejection(2, "b" * 64, "", at)])
    ended = made.run("--redo-rejected", code=0)
    assert "note: rejected.csv: 1 mark of images that are not there any more" in ended.err
    assert "note: rejected.csv: sample 99: marked, but is none of the job's" in ended.err
    made.write("out/rejected.csv", "index,pixels_sha256,note,at\nx,,,\n")
    words = "rejected.csv: row 2, column index: value 'x'; allowed: the number of a sample"
    assert words in made.run("--redo-rejected", code=2).err
    assert words in made("status", "out", code=0).out
    made.run(code=0)  # which has nothing to do with it


def test_edited_row_of_a_remade_image_keeps_its_seed_until_that_is_edited(
    made: CommandLine,
) -> None:
    """In tars, and with a picture that the images start from."""
    Image.effect_noise((32, 32), 50).convert("RGB").save(made.folder / "a.png")
    starts = ["--set", "prompts.images_root=.", "--set", "sampling.num_inference_steps=2"]
    starts += ["--set", "prompts.options.image_column=picture"]
    tars = [*starts, "--output", "tars", "--set", "output.layout=webdataset"]
    made.run(*tars, code=0)
    marks = made.write("marks.csv", "index\n2\n5\n")
    made("gallery", "tars", "--import-rejected", marks, code=0)
    made.run(*tars, "--redo-rejected", code=0)

    write_table(made.folder, {2: "a dog of 2"}, s5=7)
    words = made.run(*tars, code=2).err
    assert "2 of 8 samples that are made already" in words
    assert "sample 2: prompt: 'a cat of 2' -> 'a dog of 2'\n" in words
    assert "sample 5: seed: 105 -> 7\n" in words
    made.run(*tars, "--accept-changes", code=0)
    rows = by_index(made, "tars")
    assert (rows[2]["seed"], rows[2]["planned_seed"]) == (102 + STRIDE, 102)
    assert (rows[5]["seed"], rows[5]["planned_seed"]) == (7, None)
    assert "nothing to make" in made.run(*tars, code=0).err
    made("verify", "tars", code=0)
    made("regen", "tars", 2, 5, code=0)
    # what a job makes whose table has always had these seeds
    write_table(made.folder, {2: "a dog of 2"}, s2=102 + STRIDE, s5=7)
    made.run(*starts, "--output", "fresh", code=0)
    assert pixels(by_index(made, "fresh")) == pixels(rows)


def test_remake_that_fails_is_retried_with_the_seed_that_it_was_to_have(
    made: CommandLine,
) -> None:
    body = (
        "from pathlib import Path\n"
        "        if index == 1 and Path('broken').exists():\n"
        "            raise RuntimeError('the wrong moment')\n"
        "        return Prompt(f'a cat of {index}', seed=100 + index)"
    )
    flags = ["--set", f"prompts.generator={made.write_generator(body)}"]
    flags += ["--set", "prompts.profiles=null", "--count", "4", "--output", "own"]
    made.run(*flags, code=0)
    before = by_index(made, "own")
    made.write("marks.csv", "index\n1\n2\n")
    made("gallery", "own", "--import-rejected", "marks.csv", code=0)
    broken = made.write("broken", "")
    made.run(*flags, "--redo-rejected", code=3)
    failed = by_index(made, "own")[1]
    assert (failed["error_type"], failed["seed"]) == ("prompt_error", 101 + STRIDE)
    broken.unlink()
    ended = made.run(*flags, "--redo-rejected", code=3).err  # a failed row is not a rejected image
    assert "rejected.csv: sample 1: marked, but has no image" in ended
    made.run(*flags, "--retry-failed", code=0)
    rows = by_index(made, "own")
    assert [(rows[i]["seed"], rows[i]["planned_seed"]) for i in (1, 2)] == [
        (101 + STRIDE, 101),
        (102 + STRIDE, 102),
    ]
    assert [i for i in rows if pixels(rows)[i] != pixels(before)[i]] == [1, 2]
    made("regen", "own", 1, 2, code=0)
    assert "nothing to make" in made.run(*flags, code=0).err


def test_seeds_in_a_row_never_meet_also_in_what_noise_is_made_of() -> None:
    """Torch's generator on a CPU reads 32 bits of a seed."""

    def noise(seed: int) -> list[float]:
        return torch.randn(4, generator=torch.Generator("cpu").manual_seed(seed)).tolist()

    assert noise(42) == noise(42 + 2**32) != noise(next_seed(42))
    seed, low = 2**63 - 5, set()
    for _ in range(101):
        low.add(seed % 2**32)
        seed = next_seed(seed)
        assert 0 <= seed < 2**63
    ordered = sorted(low)
    gaps = [b - a for a, b in zip(ordered, [*ordered[1:], ordered[0] + 2**32], strict=True)]
    assert min(gaps) > 20_000_000  # samples of a job, each rejected a hundred times


def test_lost_worker_passes_the_seeds_on() -> None:
    seeds = {1: MovedSeed(1, 77)}
    work = Work(Shard(0, 0, 4), 1, frozenset({1}), seeds=seeds)
    scheduler = Scheduler([work], max_attempts=2, placeholder=sample)

    def lost(lease: Lease) -> WorkerLost:
        return WorkerLost("w", None, lease, (), "worker_died", "gone", True)

    for _ in range(4):  # until it is given up, before any worker could say what its prompt is
        lease = scheduler.next()
        if lease is None:
            break
        assert lease.seeds == seeds
        scheduler.lost(lost(lease))
    (commit,) = scheduler.take_commits()
    (outcome,) = commit.outcomes
    assert outcome.result.error_type == "worker_died"
    assert (outcome.sample.seed, outcome.sample.planned_seed) == (77, 1)


def test_planned_seed_of_another_type_is_a_damaged_part(made: CommandLine) -> None:
    (part, *_) = sorted((made.folder / "out/manifest").iterdir())
    table = pq.read_table(part)
    texts = table["prompt"]
    pq.write_table(table.append_column("planned_seed", texts), part)
    with pytest.raises(StorageError, match=r"column planned_seed is string; allowed: int64"):
        Listing(Storage(str(made.folder / "out"))).current(0)
