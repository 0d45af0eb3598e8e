"""A process that dies while it makes rejected images again, and the run that follows."""

import shutil
import signal

import pyarrow.parquet as pq
import pytest
from job_runs import read_hashes

from jobs.moved_seeds import next_seed

pytestmark = pytest.mark.long

REJECTED = (0, 2)  # one in each shard


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        ("die_after", "manifest/"),
        pytest.param("die_after", "", marks=pytest.mark.chaos),
        pytest.param("die_half", "", marks=pytest.mark.chaos),
    ],
)
def test_death_in_a_redo_makes_no_other_images_and_none_twice(
    server, run, undisturbed, expected, tmp_path, kind, written
):
    """Around every write of a file whose path begins with `written`."""
    marked = tmp_path / "marked"
    shutil.copytree(undisturbed[0], marked)
    (tmp_path / "marks.csv").write_text("index\n" + "".join(f"{i}\n" for i in REJECTED))
    assert server.run("gallery", marked, "--import-rejected", tmp_path / "marks.csv") == 0
    whole, journal = tmp_path / "whole", tmp_path / "journal"
    shutil.copytree(marked, whole)
    assert run(whole, "--redo-rejected", journal=str(journal)) == 0
    remade = read_hashes(whole)
    assert {index for index in remade if remade[index] != expected[index]} == set(REJECTED)
    seeds = {row["index"]: row["seed"] for row in rows_of(marked)}

    deaths = 0
    for number, path in enumerate(journal.read_text().splitlines(), 1):
        if not path.startswith(written):
            continue
        deaths += 1
        output = tmp_path / str(number)
        shutil.copytree(marked, output)
        assert run(output, "--redo-rejected", at=number, kind=kind) == -signal.SIGKILL
        assert run(output, "--redo-rejected") == 0, server.said
        assert read_hashes(output) == remade
        rows = [row for part in output.glob("manifest/*.parquet") for row in read(part)]
        again = [(row["index"], row["seed"]) for row in rows if row["revision"] > 0]
        assert sorted(again) == [(i, next_seed(seeds[i])) for i in REJECTED]
        shutil.rmtree(output)
    assert deaths >= len(REJECTED)


def read(part):
    return pq.read_table(part).to_pylist()


def rows_of(output):
    return read(output / "metadata.parquet")
