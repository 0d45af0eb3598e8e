"""Whether a run's processes grow with the number of samples: memory, open files, threads.

Three runs of the command line: 50 000 samples of workers that make nothing (`null_run`: all but the
work of the device is real), in one process and on a Ray of its own with two workers; and 2 000
images of 32 x 32 pixels in one step of the tiny checkpoint. Their processes are read from outside
four times a second. The slope is that of a line through the means of ten equal blocks; the first
fifth of the samples is left out, while pools and caches fill.

Prints a table and, as the last line, one JSON object; exit code 1 where memory is shown to grow
(with 95 % confidence) by more than 1 MiB for 10 000 samples, or open files grow at all.

    python tests/benchmarks/bench_memory.py [--null N] [--real N]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
sys.path.insert(0, str(SUPPORT))

from memory_watch import MIB, Watch, trend  # noqa: E402

JOB = """
extends: {root}/configs/z-image-tiny.yaml
name: memory
prompts: {{generator: avatars, count: {count}}}
sampling: {{width: {side}, height: {side}, num_inference_steps: 1, batch_size: 4}}
output: {{uri: {output}, shard_size: {shard}}}
"""
GOAL = 1.0  # MiB for 10 000 samples
EVERY = 0.25  # seconds


def main() -> int:
    """Run all cases; exit code 1 where something grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--null", type=int, default=50_000, help="samples of workers without work")
    parser.add_argument("--real", type=int, default=2_000, help="images of the tiny checkpoint")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    args = parser.parse_args()
    cases = [
        ("null, in one process", "null_run", args.null, 16, 64, ["--local"]),
        ("null, on Ray", "null_run", args.null, 16, 64, ["--workers", "2"]),
        ("32 px, in one process", "jobs", args.real, 32, 64, ["--local"]),
    ]
    rows = []
    for name, module, count, side, shard, flags in cases:
        if args.only not in name:
            continue
        rows += run_case(name, module, count=count, side=side, shard=shard, flags=flags)
    print(
        f"{'case':<23}{'process':<12}{'samples':>8}{'RSS MiB':>9}{'at end':>8}{'peak':>8}"
        f"{'MiB/10k':>9}{'+-':>6}{'heap/10k':>10}{'+-':>6}{'files':>8}{'threads':>9}"
    )
    for row in rows:
        print(
            f"{row['case']:<23}{row['process']:<12}{row['samples']:>8}{row['first_mib']:>9.1f}"
            f"{row['last_mib']:>8.1f}{row['peak_mib']:>8.1f}{row['slope_mib']:>9.2f}{row['error_mib']:>6.2f}"
            f"{row['heap_slope_mib']:>10.2f}{row['heap_error_mib']:>6.2f}"
            f"{row['handles'][0]:>4}-{row['handles'][1]}{row['threads'][0]:>6}-{row['threads'][1]}"
        )
    report = {
        "benchmark": "memory",
        "date": date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "goal_mib": GOAL,
        "results": rows,
    }
    print(json.dumps(report))
    return 0 if all(row["ok"] for row in rows) else 1


def run_case(
    name: str, module: str, *, count: int, side: int, shard: int, flags: list[str]
) -> list[dict[str, Any]]:
    """Run a job and say what became of each of its processes."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        job = Path(folder) / "job.yaml"
        job.write_text(JOB.format(root=ROOT, count=count, side=side, shard=shard, output=output))
        watch = Watch(output, shard)
        environment = os.environ | {
            "PYTHONPATH": f"{SUPPORT}:{ROOT}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_AUTH_MODE": "disabled",
        }
        started = time.monotonic()
        with (Path(folder) / "log").open("w+b") as log:
            command = [sys.executable, "-m", module, "run", str(job), *flags]
            process = subprocess.Popen(command, cwd=folder, env=environment, stderr=log)
            code = watch.follow(process, every=EVERY)
            log.seek(0)
            assert code == 0, log.read().decode()
        seconds = time.monotonic() - started
    rows = []
    for process_name, readings in watch.readings.items():
        memory = trend(readings, lambda r: r.resident / MIB)
        heap = trend(readings, lambda r: r.anonymous / MIB)
        # what comes after the last commit, writing metadata.parquet, is no part of the slope
        late = [r for r in readings if 0.2 * count < r.done < count]
        handles = trend(late, lambda r: r.handles, skip=0.2)
        grows = memory.at_least > GOAL or handles.at_least > 1
        rows.append(
            {
                "case": name,
                "process": process_name,
                "samples": count,
                "seconds": round(seconds, 1),
                "readings": len(readings),
                "first_mib": round(late[0].resident / MIB, 1),
                "last_mib": round(late[-1].resident / MIB, 1),
                "peak_mib": round(max(r.resident for r in readings) / MIB, 1),
                "slope_mib": round(memory.slope, 3),
                "error_mib": round(memory.error, 3),
                "heap_slope_mib": round(heap.slope, 3),
                "heap_error_mib": round(heap.error, 3),
                "heap_blocks_mib": [round(mean, 2) for mean in heap.means],
                "handles": [min(r.handles for r in late), max(r.handles for r in late)],
                "threads": [min(r.threads for r in late), max(r.threads for r in late)],
                "ok": not grows,
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
