"""Signals that come at other moments than the first one of a user who waits."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from job_runs import JOB, ROOT, Job, kill_session, wait_for

pytestmark = pytest.mark.long


def test_third_signal_of_an_impatient_user_is_130_as_the_second(tmp_path):
    output = tmp_path / "out"
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(root=ROOT, count=40, steps=1, output=output, shard_size=4))
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps({"slow": [0.5, 0.5]}))  # the writers end a moment after the rest
    preload = [ROOT / "tests/support/chaos_preload", ROOT / "tests/support", ROOT]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, preload)), "CHAOS_RATES": str(rates)}
    process = Job(path, output).start("--local", **environment)
    try:
        wait_for(lambda: list(output.glob("manifest/*.parquet")))
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert process.wait(60) == 130
    finally:
        kill_session(process)
    assert "Traceback" not in (tmp_path / "run.log").read_text()
    rows = [r for p in output.glob("manifest/*.parquet") for r in pq.read_table(p).to_pylist()]
    assert 0 < len(rows) < 40
    assert all((output / row["file_name"]).is_file() for row in rows)


def test_a_signal_while_the_process_ends_changes_nothing(tmp_path):
    output = tmp_path / "out"
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(root=ROOT, count=4, steps=1, output=output, shard_size=4))
    slow_end = "import atexit, sys, time; from jobs.cli import main; " + (
        "atexit.register(lambda: (print('ending', flush=True), time.sleep(3))); sys.exit(main())"
    )
    command = [sys.executable, "-c", slow_end, "run", str(path), "--local"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert any(line == "ending\n" for line in process.stdout)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert len(list(output.glob("manifest/*.parquet"))) == 1
