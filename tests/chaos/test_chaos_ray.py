"""A short share of misfortune for a job on a real cluster: one seed on a disk, one on S3.

`make chaos-long` goes on for as many seeds as it takes; both append to output/chaos/.
"""

import json
import os
import subprocess
import sys

import pytest
from chaos_events import MAX_NODES
from job_runs import ROOT

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

RESULTS = ROOT / "output/chaos/short.jsonl"


@pytest.mark.parametrize(
    ("flags", "kills"),
    [
        (["--seeds", "4", "--count", "240", "--events", "12"], 3),
        (["--seeds", "2", "--count", "120", "--events", "6", "--s3"], 1),
    ],
    ids=["disk", "s3"],
)
def test_job_survives_a_seed_of_events(tmp_path, flags, kills):
    path = [str(ROOT / "tests/support"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-m", "chaos_run", "--results", str(RESULTS), *flags],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "TMPDIR": "/tmp"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    figures = json.loads(RESULTS.read_text().splitlines()[-1])
    assert figures["kills"] >= kills  # else the seed shows nothing
    assert figures["runs"] >= 2
    assert figures["redone"] <= figures["in_flight"] <= figures["images"] * MAX_NODES
