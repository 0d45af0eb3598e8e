"""The whole job on a real Ray: the same bytes as without it, whatever is killed in between.

GPUs are logical here (`--num-gpus` on a machine that has none): Ray then places and isolates
actors just as with real ones.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from job_runs import JOB, ROOT, Job, kill_session, read_hashes, read_rows, wait_for

pytestmark = pytest.mark.ray

COUNT, STEPS, SHARD = 48, 24, 8


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[int, str]:
    """Hashes of the undisturbed job, made in one process without Ray."""
    folder = tmp_path_factory.mktemp("expected")
    output = folder / "out"
    text = JOB.format(root=ROOT, count=COUNT, steps=STEPS, output=output, shard_size=SHARD)
    (folder / "job.yaml").write_text(text)
    result = Job(folder / "job.yaml", output).run("--local")
    assert result.returncode == 0, result.stderr
    hashes = read_hashes(output)
    assert len(set(hashes.values())) == COUNT
    return hashes


@pytest.fixture
def job(make_job) -> Job:
    return make_job(count=COUNT, steps=STEPS, shard_size=SHARD)


def committed(job: Job) -> list[Path]:
    return list(job.output.glob("manifest/*.parquet"))


def worker_pids(process: subprocess.Popen) -> list[int]:
    pids = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
            if "WorkerActor" in " ".join(child.cmdline()):
                pids.append(child.pid)
    return pids


def assert_complete(job: Job, expected: dict[int, str]) -> None:
    rows = read_rows(job.output)
    assert {r["index"]: r["pixels_sha256"] for r in rows} == expected
    assert len(rows) == COUNT
    assert all((job.output / r["file_name"]).is_file() for r in rows)
    assert {r["status"] for r in rows} == {"ok"}
    verified = subprocess.run(
        [sys.executable, "-m", "jobs", "verify", str(job.output)], capture_output=True, check=False
    )
    assert verified.returncode == 0


def test_two_actors_pull_shards_and_give_the_bytes_of_one_process(job, expected, tmp_path):
    """And Ray, started for it, listens on loopback alone and leaves nothing behind."""
    home = tmp_path / "home"
    home.mkdir()
    process = job.start("--workers", "2", HOME=str(home))
    try:
        wait_for(lambda: len(worker_pids(process)) == 2)
        folders = assert_on_loopback(process)
        assert process.wait(120) == 0
    finally:
        kill_session(process)
    assert list(home.iterdir()) == []
    assert not any(Path(folder).exists() for folder in folders)
    assert_complete(job, expected)
    rows = read_rows(job.output)
    assert {r["worker"] for r in rows} == {"w0", "w1"}
    assert all(r["attempt"].startswith(f"{r['shard']:08d}-") for r in rows)
    logs = sorted(p.name for p in (job.output / "logs").iterdir())
    assert logs == ["000001-w0.log", "000001-w1.log"]
    again = job.run("--workers", "2")
    assert again.returncode == 0
    assert "nothing to make" in again.stderr
    assert "Ray" not in again.stderr
    assert len(list((job.output / "events").iterdir())) == 1


def assert_on_loopback(process: subprocess.Popen) -> set[str]:
    """Nothing of the job's processes listens elsewhere; the folders that its Ray has."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    commands = " ".join(word for p in family for word in p.cmdline())
    listening = [
        c.laddr.ip
        for p in family
        for c in p.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    folders = set(re.findall(r"/tmp/zimage-\w+", commands))
    assert folders
    return folders


@pytest.mark.slow  # as are the next ones: the chaos suite does this and more
def test_actor_killed_in_the_middle_is_replaced_and_its_shard_leased_again(job, expected):
    process = job.start("--workers", "1")
    try:
        wait_for(lambda: committed(job))
        os.kill(worker_pids(process)[0], signal.SIGKILL)  # the only one there is
        assert process.wait(120) == 0
    finally:
        kill_session(process)
    assert_complete(job, expected)
    assert '"event": "worker_died"' in "".join(
        p.read_text() for p in (job.output / "events").iterdir()
    )


@pytest.mark.slow
def test_driver_killed_in_the_middle_is_succeeded(job, expected):
    process = job.start("--workers", "2")
    try:
        wait_for(lambda: committed(job))
        process.kill()
        process.wait()
    finally:
        kill_session(process)
    kept = {p.name for p in committed(job)}
    assert 0 < len(kept) < COUNT // SHARD
    assert not (job.output / "metadata.parquet").exists()
    result = job.run("--workers", "1")
    assert result.returncode == 0, result.stderr
    assert f"{len(kept) * SHARD} images kept" in result.stderr
    assert kept < {p.name for p in committed(job)}
    assert_complete(job, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGINT, os.killpg),
        (signal.SIGTERM, os.kill),
    ],
)
def test_signal_drains_and_the_next_run_goes_on(job, expected, number, send):
    process = job.start("--workers", "2")
    try:
        wait_for(lambda: committed(job))
        send(process.pid, number)  # a terminal's Ctrl-C reaches every process of the job
        assert process.wait(60) == 130
    finally:
        kill_session(process)
    kept = read_hashes(job.output)
    assert 0 < len(kept) < COUNT
    assert kept.items() <= expected.items()
    # whole batches only, and no file without a row but those of batches under way
    assert all(len(r["batch"]) <= 4 for r in read_rows(job.output))
    result = job.run("--local")
    assert result.returncode == 0, result.stderr
    assert f"{len(kept)} images kept" in result.stderr
    assert_complete(job, expected)


@pytest.mark.slow
def test_hung_worker_is_given_up_after_stall_timeout(job, expected):
    process = job.start("--workers", "2", "--set", "run.stall_timeout=6")
    try:
        wait_for(lambda: committed(job))
        os.kill(worker_pids(process)[0], signal.SIGSTOP)
        assert process.wait(150) == 0
    finally:
        kill_session(process)
    assert_complete(job, expected)
    events = "".join(p.read_text() for p in (job.output / "events").iterdir())
    assert "worker_stalled" in events


@pytest.fixture(scope="module")
def cluster():
    """A Ray head with two logical GPUs on loopback; its address."""
    folder = tempfile.mkdtemp(prefix="zr-", dir="/tmp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    command += [f"--port={port}", "--num-gpus=2", "--num-cpus=2", "--include-dashboard=false"]
    command += [f"--temp-dir={folder}", "--object-store-memory=100000000"]
    head = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        time.sleep(3)
        yield f"127.0.0.1:{port}"
    finally:
        kill_session(head)


@pytest.mark.long
def test_one_actor_for_each_gpu_of_the_cluster_and_each_sees_its_own(job, expected, cluster):
    result = job.run(RAY_ADDRESS=cluster)
    assert result.returncode == 0, result.stderr
    assert "2 workers on the Ray cluster at" in result.stderr
    assert_complete(job, expected)
    events = [json.loads(x) for p in (job.output / "events").iterdir() for x in p.open()]
    ready = [e for e in events if e["event"] == "worker_ready"]
    assert sorted(e["visible_devices"] for e in ready) == ["0", "1"]
    assert len({e["pid"] for e in ready}) == 2


@pytest.mark.slow
def test_fewer_gpus_than_workers_starts_with_what_there_is_and_says_so(make_job, cluster):
    job = make_job(count=4)
    result = job.run("--workers", "3", RAY_ADDRESS=cluster)
    assert result.returncode == 0, result.stderr
    assert "3 workers asked, the cluster's 2 GPUs have room for 2" in result.stderr
    assert len(read_rows(job.output)) == 4
