"""A run holds no more memory and no more files after many samples than after a few."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from job_runs import ROOT
from memory_watch import MIB, Reading, Watch, trend

SUPPORT = Path(__file__).parents[1] / "support"
COUNT, SHARD = 3000, 50
# MiB for 10 000 samples: 200 bytes each. A short run takes 0.7, events and caches that fill; of a
# sample with its result 1 KiB is held.
LIMIT = 2.0
JOB = """
extends: {root}/configs/z-image-tiny.yaml
name: nothing
prompts: {{generator: template, profiles: rows.csv, count: {count}, options: {{template: "{{n}}"}}}}
sampling: {{width: 16, height: 16, num_inference_steps: 1, batch_size: 10}}
output: {{uri: out, shard_size: {shard}}}
"""


@pytest.mark.long
def test_a_run_of_many_samples_grows_by_nothing(tmp_path: Path) -> None:
    """Driver and worker in one process, all but the device's work real: see `null_run`."""
    rows = "\n".join(f"thing {n}" for n in range(COUNT))
    (tmp_path / "rows.csv").write_text(f"n\n{rows}\n")
    (tmp_path / "job.yaml").write_text(JOB.format(root=ROOT, count=COUNT, shard=SHARD))
    watch = Watch(tmp_path / "out", SHARD)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "null_run", "run", "job.yaml", "--local"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{SUPPORT}{os.pathsep}{ROOT}"},
            stderr=log,
        )
        try:
            code = watch.follow(process, every=0.05)
        finally:
            process.kill()
    assert code == 0, (tmp_path / "log").read_text()
    readings = watch.readings["driver"]
    heap = trend(readings, lambda r: r.anonymous / MIB, skip=0.3)
    assert heap.at_least < LIMIT, f"MiB of memory for 10 000 samples: {heap}"
    late = [r for r in readings if 0.3 * COUNT < r.done < COUNT]  # not the end's metadata.parquet
    files = trend(late, lambda r: r.handles, skip=0.3)
    assert files.at_least < 1, f"open files for 10 000 samples: {files}"
    assert max(r.handles for r in late) < 50
    assert max(r.threads for r in late) < 50


@pytest.mark.parametrize(("leak", "found"), [(0.0, False), (0.7, False), (4.0, True)])
def test_the_measure_tells_growth_from_noise(leak: float, found: bool) -> None:
    """`leak` in MiB for 10 000 samples, under steps of memory that is taken and given back."""
    draw = random.Random(3)
    readings, level = [], 400.0
    for done in range(0, COUNT, 10):
        if done % 200 == 0:
            level = 400 + draw.uniform(-0.2, 0.2)
        held = int((level + leak * done / 10_000) * MIB)
        readings.append(Reading(done, held, held, 30, 5))
    assert (trend(readings, lambda r: r.anonymous / MIB).at_least > LIMIT) is found
