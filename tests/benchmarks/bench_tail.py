"""How much of the workers' time a job loses at its end, and at its beginning.

Simulated: the real scheduler and dispatcher over workers under a simulated clock
(`simulated_executor`), 8 to 512 of them, 200 samples of 0.75 s for each, shards of 64. Against
them, computed, a static split, where each worker gets as many samples up front, and a pull without
any division: whoever is free takes the next shard, of 64 or of 8. With a cold start every worker
needs 45 to 75 s at random before its first lease. Planning a lease takes 20 ms in all of them, an
answer to the driver 5 ms, and the driver no time: what it takes is measured beside it, as CPU time
of its thread. All samples of a worker take the same time.

Efficiency is the time of the best division there is, by the time taken. With a cold start two are
given: that of what comes after it (the best division of the work among workers that begin when
they do), and that of all, against workers that begin at once.

Real: actors that sleep on a Ray of its own, as many as `--ray` says.

Prints tables and, as the last line, one JSON object; exit code 1 where one of 64 workers that is
3 times slower costs more than 3 %.

    python tests/benchmarks/bench_tail.py [--workers N...] [--ray N...] [--each N]
"""

import argparse
import heapq
import json
import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parents[1] / "support"
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(SUPPORT))
os.environ["PYTHONPATH"] = f"{SUPPORT}:{ROOT}"  # of actors
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from driver_loop import drive  # noqa: E402
from simulated_executor import SimulatedExecutor  # noqa: E402

SECONDS, SHARD, GOAL = 0.75, 64, 0.97
MIXES = ("equal", "one 3x slower", "0-10 % slower")
PLAN = 0.02
RAY_SECONDS, RAY_EACH, RAY_SHARD = 0.7, 40, 16


@dataclass(frozen=True)
class Row:
    """One simulated job; efficiencies of the four ways."""

    workers: int
    mix: str
    cold: bool
    ours: float
    pull_8: float
    pull_64: float
    static: float
    ours_of_all: float  # the beginning included, as the next three
    pull_8_of_all: float
    pull_64_of_all: float
    static_of_all: float
    leases: int
    driver_ms_per_lease: float
    driver_share: float  # of the simulated time


def main() -> int:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="*", default=[8, 32, 64, 128, 256, 512])
    parser.add_argument("--ray", type=int, nargs="*", default=[16], help="actors that sleep")
    parser.add_argument("--each", type=int, default=200, help="samples for each worker")
    args = parser.parse_args()
    rows = [
        simulated(workers, mix, cold, args.each)
        for workers in args.workers
        for mix in MIXES
        for cold in (False, True)
    ]
    for cold in (False, True):
        print("cold start of 45 to 75 s" if cold else "all ready at once")
        print(
            f"{'':<22}{'ours':>8}{'pull 8':>8}{'pull 64':>8}{'static':>8}{'(with the start)':>33}"
        )
        for row in rows:
            if row.cold == cold:
                after = (row.ours, row.pull_8, row.pull_64, row.static)
                of_all = (
                    *(row.ours_of_all, row.pull_8_of_all),
                    *(row.pull_64_of_all, row.static_of_all),
                )
                print(
                    f"{row.workers:>5}  {row.mix:<15}"
                    + "".join(f"{value:>8.3f}" for value in after)
                    + "   "
                    + "".join(f"{value:>8.3f}" for value in of_all)
                    + f"{row.driver_ms_per_lease:>8.2f} ms of CPU a lease"
                )
    real = [on_ray(workers, slow) for workers in args.ray for slow in (False, True)]
    for found in real:
        print(
            f"Ray, {found['workers']} actors that sleep, {found['mix']}: efficiency "
            f"{found['efficiency']:.3f} in {found['seconds']:.1f} s; driver "
            f"{found['driver_ms_per_lease']:.1f} ms of CPU a lease, "
            f"{found['driver_ms_per_sample']:.2f} a sample; {found['driver_cpu']:.0%} of a core"
        )
    report = {
        "benchmark": "tail",
        "date": date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()},
        "samples_per_worker": args.each,
        "seconds_per_sample": SECONDS,
        "shard_size": SHARD,
        "simulated": [asdict(row) for row in rows],
        "ray": real,
    }
    print(json.dumps(report))
    missed = [r for r in rows if (r.workers, r.mix) == (64, MIXES[1]) and r.ours < GOAL]
    return 1 if missed else 0


def seconds_of(workers: int, mix: str) -> list[float]:
    """Seconds per sample of each worker."""
    draw = random.Random(workers)
    factors = {
        "equal": [1.0] * workers,
        "one 3x slower": [1.0] * (workers - 1) + [3.0],
        "0-10 % slower": [draw.uniform(1.0, 1.1) for _ in range(workers)],
    }
    return [SECONDS * factor for factor in factors[mix]]


def simulated(workers: int, mix: str, cold: bool, each: int) -> Row:
    """One job in the three ways."""
    seconds = seconds_of(workers, mix)
    total = workers * each
    draw = random.Random(7)
    load = [draw.uniform(45, 75) if cold else 0.0 for _ in seconds]
    best = best_end(seconds, load, total)
    best_of_all = best_end(seconds, [0.0] * workers, total)
    executor = SimulatedExecutor(seconds, load=load, plan=PLAN)
    driven = drive(executor, total, shard_size=SHARD, clock=lambda: executor.now)
    ends = (
        executor.now,
        pull_end(seconds, load, total, 8),
        pull_end(seconds, load, total, SHARD),
        max(late + PLAN + each * one for late, one in zip(load, seconds, strict=True)),
    )
    return Row(
        workers,
        mix,
        cold,
        *(round(best / end, 4) for end in ends),
        *(round(best_of_all / end, 4) for end in ends),
        leases=driven.leases,
        driver_ms_per_lease=round(1000 * driven.own_seconds / driven.leases, 3),
        driver_share=round(driven.own_seconds / executor.now, 4),
    )


def pull_end(seconds: Sequence[float], load: Sequence[float], total: int, shard: int) -> float:
    """When a job ends whose workers take whole shards, the next one whenever they are free."""
    free = [(late, worker) for worker, late in enumerate(load)]
    heapq.heapify(free)
    ends = 0.0
    for start in range(0, total, shard):
        now, worker = heapq.heappop(free)
        now += PLAN + min(shard, total - start) * seconds[worker]
        ends = max(ends, now)
        heapq.heappush(free, (now, worker))
    return ends


def best_end(seconds: Sequence[float], load: Sequence[float], total: int) -> float:
    """When the workers, each from when it is ready, have made so many samples together."""
    low, high = min(load), max(load) + total * max(seconds)
    for _ in range(80):
        end = (low + high) / 2
        made = sum(max(0.0, end - late) / one for late, one in zip(load, seconds, strict=True))
        low, high = (end, high) if made < total else (low, end)
    return high


def on_ray(workers: int, one_slow: bool) -> dict[str, Any]:
    """A job of actors that sleep, on a Ray of its own."""
    from sleeping_executor import SETTINGS, sleeping_executor

    from jobs.cluster import connected

    seconds = [RAY_SECONDS] * workers
    single = {}
    if one_slow:
        seconds[-1] *= 3
        single[f"w{workers - 1}"] = seconds[-1]
    total = workers * RAY_EACH
    with connected(num_cpus=workers):
        executor = sleeping_executor(workers, RAY_SECONDS, single, stall_timeout=600)
        executor.start()
        try:
            executor.load(SETTINGS)
            begun = time.process_time()
            driven = drive(executor, total, shard_size=RAY_SHARD, together=True)
            used = time.process_time() - begun
        finally:
            executor.stop()
    ideal = best_end(seconds, [0.0] * workers, total)
    return {
        "workers": workers,
        "mix": MIXES[1] if one_slow else MIXES[0],
        "samples": total,
        "seconds": round(driven.seconds, 2),
        "efficiency": round(ideal / driven.seconds, 4),
        "leases": driven.leases,
        "driver_ms_per_lease": round(1000 * used / driven.leases, 2),
        "driver_ms_per_sample": round(1000 * used / total, 3),
        "scheduler_ms_per_lease": round(1000 * driven.own_seconds / driven.leases, 2),
        "driver_cpu": round(used / driven.seconds, 3),
    }


if __name__ == "__main__":
    sys.exit(main())
