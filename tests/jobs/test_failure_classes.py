"""Each class of failure on a real Ray with the tiny checkpoint: what becomes of it, its cure."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from job_runs import ROOT, Job, kill_session, read_hashes, read_rows, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]

SUPPORT = ROOT / "tests/support"
PRELOAD = os.pathsep.join(map(str, [SUPPORT / "failure_preload", SUPPORT, ROOT]))
TINY = ROOT / "data/checkpoints/z-image-tiny"


def environment(folder: Path, failures: dict[str, Any]) -> dict[str, str]:
    """For processes in which something goes wrong; the file may be changed between two runs."""
    path = folder / "failures.json"
    path.write_text(json.dumps(failures))
    return {"FAILURES": str(path), "PYTHONPATH": PRELOAD}


def read_events(job: Job) -> list[dict[str, Any]]:
    paths = sorted((job.output / "events").iterdir())
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.mark.chaos
def test_each_sample_that_fails_is_found_classed_and_made_later(
    make_job: Callable[..., Job], tmp_path: Path
) -> None:
    """All at once, for starting Ray takes longer than any of them."""
    job = make_job(count=20, shard_size=4)
    failures = {"max_batch": 2, "kill": [1], "hang": [6], "nan": [9], "flat": [11], "raise": [14]}
    flags = ("--workers", "2", "--set", "run.stall_timeout=8", "--set", "run.max_shard_attempts=1")
    ended = job.run(*flags, **environment(tmp_path, failures))
    assert ended.returncode == 3, ended.stderr
    rows = {row["index"]: row for row in read_rows(job.output)}
    assert sorted(rows) == list(range(20))
    failed = {i: row["error_type"] for i, row in rows.items() if row["status"] == "failed"}
    assert failed == {
        1: "worker_died",
        6: "worker_stalled",
        9: "invalid_image",
        11: "invalid_image",
        14: "generation_error",
    }
    assert "not finite" in rows[9]["error_message"]
    assert "one flat colour" in rows[11]["error_message"]
    assert rows[14]["error_message"] == "RuntimeError: this batch cannot be made"
    assert rows[1]["error_message"].startswith("sample 1 ended its worker 2 times, at last alone: ")
    assert "run.stall_timeout" in rows[6]["error_message"]
    assert all(len(row["batch"]) <= 2 for row in rows.values())
    modes = {row["batch_mode"] for i, row in rows.items() if i > 15}
    assert "halved" in modes and "single" not in modes, "nothing went wrong there but memory"

    again = job.run("--local", "--retry-failed")
    assert again.returncode == 0, again.stderr
    made = {row["index"]: row for row in read_rows(job.output)}
    assert {row["status"] for row in made.values()} == {"ok"}
    kept = [i for i in rows if i not in failed]
    assert all(made[i]["sha256"] == rows[i]["sha256"] for i in kept)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    """Two nodes with a logical GPU each; the weights lie in the home of the second alone."""
    from ray.cluster_utils import Cluster

    folder = tmp_path / "good" / ".cache" / "zimage"
    folder.mkdir(parents=True)
    (folder / "Tongyi-MAI--Z-Image-Turbo").symlink_to(TINY)
    shared = environment(tmp_path, {})
    options = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 80 * 2**20}
    made = Cluster(
        initialize_head=True,
        head_node_args={**options, "env_vars": {**shared, "HOME": str(tmp_path / "bad")}},
    )
    made.add_node(**options, env_vars={**shared, "HOME": str(tmp_path / "good")})
    yield made
    made.shutdown()


WEIGHTS = ("--set", "model.path=null", "--set", "model.repo=Tongyi-MAI/Z-Image-Turbo")


@pytest.mark.slow
def test_a_node_without_the_weights_is_left_aside(
    make_job: Callable[..., Job], cluster: Any, tmp_path: Path
) -> None:
    job = make_job(count=24, steps=24, shard_size=4)
    process = job.start(*WEIGHTS, RAY_ADDRESS=cluster.address)
    log = tmp_path / "run.log"
    try:
        wait_for(
            lambda: "left aside" in log.read_text() and list(job.output.glob("manifest/*")), 200
        )
        (ready,) = [e for e in read_events(job) if e["event"] == "worker_ready"]
        os.kill(ready["pid"], signal.SIGKILL)  # now the bad node is the one that is free
        assert process.wait(200) == 0, log.read_text()
    finally:
        kill_session(process)
    assert len(read_hashes(job.output)) == 24
    events = read_events(job)
    (failed,) = [e for e in events if e["event"] == "load_failed"]
    assert "model.repo" in failed["message"]
    assert failed["node_id"] == cluster.head_node.node_id
    assert len([e for e in events if e["event"] == "worker_died"]) == 1
    (line,) = [line for line in log.read_text().splitlines() if "left aside" in line]
    assert failed["worker"] in line and failed["node"] in line and failed["message"] in line

    # On the same cluster, for it takes long to start.
    environment(tmp_path, {"nan": list(range(0, 60, 2))})
    job = make_job(count=60, shard_size=4, name="many")
    ended = job.run(*WEIGHTS, "--set", "run.max_failure_rate=0.3", RAY_ADDRESS=cluster.address)
    assert ended.returncode == 4, ended.stderr
    assert "more than run.max_failure_rate 0.3 allows" in ended.stderr
    rows = read_rows(job.output)
    assert 20 <= len(rows) < 60
    assert {row["error_type"] for row in rows if row["index"] % 2 == 0} == {"invalid_image"}


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_ends_its_batch_and_leaves(
    make_job: Callable[..., Job], tmp_path: Path
) -> None:
    job = make_job(count=24, steps=24, shard_size=8)
    process = job.start("--workers", "2")
    try:
        wait_for(lambda: list(job.output.glob("manifest/*")), 200)
        told = next(e for e in read_events(job) if e["event"] == "worker_ready")
        os.kill(told["pid"], signal.SIGTERM)
        assert process.wait(200) == 0, (tmp_path / "run.log").read_text()
    finally:
        kill_session(process)
    events = read_events(job)
    (leaving,) = [e for e in events if e["event"] == "worker_leaving"]
    assert (leaving["worker"], leaving["reason"]) == (told["worker"], "it was told to stop")
    assert "worker_died" not in {e["event"] for e in events}
    rows = read_rows(job.output)
    assert [(row["index"], row["status"]) for row in rows] == [(i, "ok") for i in range(24)]
    held = [e["attempt"] for e in events if e["event"] == "lease" and e["worker"] == told["worker"]]
    made = {f"images/{a}/{path.name}" for a in held for path in job.output.glob(f"images/{a}/*")}
    assert made <= {row["file_name"] for row in rows}, "nothing that it made was for nothing"
    assert not Path(f"/proc/{told['pid']}").exists()
