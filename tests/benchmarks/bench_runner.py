"""What the runner costs, beside work that only sleeps: against Ray Data, ActorPool and a Pool.

Two workers that make nothing, that sleep 50 ms and that sleep 700 ms for each sample; a record of
each comes back to the driver's memory, which is all of the sink, the same for all. Ours is the
scheduler, the dispatcher and `RayExecutor` with their leases, heartbeats and division at the end,
with one message for each sample, and without storage. The others:

- Ray Data: `range(...).map_batches` with an actor class, one sample a batch, read by `iter_rows`;
  blocks as large as our shards for samples that take no time, smaller ones for those that do;
- Ray's `ActorPool.map_unordered`, one call for each sample;
- `multiprocessing.Pool`, spawned, `imap_unordered`, in chunks of 8 for samples that take no time.

Each is checked to give every index once. Start is left out: time begins when all workers are ready
and ends with the last record; for Ray Data it begins later, with the first sample, as its actors
start with the work. They run alternately on one Ray of their own. Efficiency is the time of the
work divided evenly, by the time taken.

Prints a table and, as the last line, one JSON object.

    python tests/benchmarks/bench_runner.py [--null 10000] [--short 1000] [--long 200] [--rounds 3]
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parents[1] / "support"
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(SUPPORT))
os.environ["PYTHONPATH"] = f"{SUPPORT}:{ROOT}"  # of actors
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")

WORKERS, SHARD = 2, 64
OURS, DATA, ACTORS, POOL = "ours", "Ray Data", "ActorPool", "multiprocessing.Pool"

Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Samples that take so many seconds each."""

    seconds: float
    total: int
    block: int  # of Ray Data
    chunk: int  # of multiprocessing.Pool

    @property
    def ideal(self) -> float:
        return -(-self.total // WORKERS) * self.seconds


@dataclass(frozen=True)
class Taken:
    """Wall seconds of a case, start left out, and CPU seconds of the driver's process.

    Ray Data's CPU seconds include the start of its actors.
    """

    wall: float
    cpu: float


def main() -> int:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--null", type=int, default=10_000, help="samples that take no time")
    parser.add_argument("--short", type=int, default=1000, help="samples of 50 ms")
    parser.add_argument("--long", type=int, default=200, help="samples of 700 ms")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from jobs.cluster import connected

    load = os.getloadavg()[0]
    cases = [
        Case(0.0, args.null, SHARD, 8),
        Case(0.05, args.short, 8, 1),
        Case(0.7, args.long, 1, 1),
    ]
    ways: dict[str, Callable[[Case], Taken]] = {
        OURS: ours,
        DATA: ray_data,
        ACTORS: actor_pool,
        POOL: process_pool,
    }
    rows = []
    with connected(num_cpus=2 * WORKERS):  # half of them for what Ray Data reads with
        for case in cases:
            if not case.total:
                continue
            taken: dict[str, list[Taken]] = {name: [] for name in ways}
            for _ in range(args.rounds if case.seconds == 0 else 1):
                for name, run in ways.items():
                    taken[name].append(run(case))
                    print(f"{case.seconds} s, {name}: {taken[name][-1]}", file=sys.stderr)
            rows += [row(case, name, found) for name, found in taken.items()]
    print(
        f"{'':<30}{'samples':>8}{'s':>8}{'ms a sample':>13}{'above ideal':>13}{'efficiency':>12}"
        f"{'driver CPU ms':>15}"
    )
    for found in rows:
        title = f"{1000 * found['seconds']:g} ms"
        print(f"{title:<8}" if found["way"] == OURS else f"{'':<8}", end="")
        efficiency = "-" if found["efficiency"] is None else f"{found['efficiency']:.3f}"
        print(
            f"{found['way']:<22}{found['samples']:>8}{found['wall_s']:>8.2f}{found['ms']:>13.3f}"
            f"{found['ms_above']:>13.3f}{efficiency:>12}{found['driver_ms']:>15.3f}"
        )
    report = {
        "benchmark": "runner",
        "date": date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load": [round(value, 1) for value in (load, os.getloadavg()[0])],
        "versions": {"python": platform.python_version(), "ray": version("ray")},
        "workers": WORKERS,
        "shard_size": SHARD,
        "results": rows,
    }
    print(json.dumps(report))
    return 0


def row(case: Case, way: str, found: list[Taken]) -> dict[str, Any]:
    """For the table and the report: medians of the rounds."""
    wall = statistics.median(taken.wall for taken in found)
    cpu = statistics.median(taken.cpu for taken in found)
    return {
        "seconds": case.seconds,
        "way": way,
        "samples": case.total,
        "wall_s": round(wall, 3),
        "rounds_s": [round(taken.wall, 3) for taken in found],
        "ms": round(1000 * wall / case.total, 4),
        "ms_above": round(1000 * (wall - case.ideal) / case.total, 4),
        "efficiency": round(case.ideal / wall, 4) if case.ideal else None,
        "driver_ms": round(1000 * cpu / case.total, 4),
    }


def make(index: int, seconds: float) -> Record:
    """What a worker does for a sample: nothing, for so long."""
    begun = time.time()
    if seconds:
        time.sleep(seconds)
    return {"index": index, "begun": begun, "status": "ok", "file_name": f"images/{index:08d}.png"}


def check(records: Iterable[Record], case: Case) -> list[Record]:
    """The records, each index once."""
    found = list(records)
    assert sorted(record["index"] for record in found) == list(range(case.total))
    return found


def ours(case: Case) -> Taken:
    """Our scheduler, dispatcher and executor, with actors that sleep."""
    from driver_loop import drive
    from sleeping_executor import SETTINGS, sleeping_executor

    executor = sleeping_executor(WORKERS, case.seconds, stall_timeout=600)
    executor.start()
    try:
        executor.load(SETTINGS)
        # `drive` says itself when all were ready, so that only CPU time has to wait for it
        while len(executor.idle()) < WORKERS:
            executor.poll(0.1)
        cpu = time.process_time()
        driven = drive(executor, case.total, shard_size=SHARD, together=True)
        cpu = time.process_time() - cpu
    finally:
        executor.stop()
    return Taken(driven.seconds, cpu)


class Sleeper:
    """The actor of Ray Data and of ActorPool; Ray Data's wait for each other before they begin."""

    def __init__(self, seconds: float, meeting: str = "") -> None:
        self.seconds = seconds
        if meeting:
            (Path(meeting) / str(os.getpid())).touch()
            deadline = time.monotonic() + 120
            while len(list(Path(meeting).iterdir())) < WORKERS:
                assert time.monotonic() < deadline, "the other actor does not start"
                time.sleep(0.01)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        records = [make(int(index), self.seconds) for index in batch["id"]]
        return {key: [record[key] for record in records] for key in records[0]}

    def make(self, index: int) -> Record:
        return make(index, self.seconds)


def ray_data(case: Case) -> Taken:
    """Ray Data's `map_batches`."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    with tempfile.TemporaryDirectory() as meeting:
        made = ray.data.range(
            case.total, override_num_blocks=max(WORKERS, case.total // case.block)
        ).map_batches(
            Sleeper,
            fn_constructor_args=(case.seconds, meeting),
            batch_size=1,
            concurrency=WORKERS,
            num_cpus=1,
        )
        cpu = time.process_time()
        records = list(made.iter_rows())
        ended = time.time()
        cpu = time.process_time() - cpu
    check(records, case)
    return Taken(ended - min(record["begun"] for record in records), cpu)


def actor_pool(case: Case) -> Taken:
    """Ray's `ActorPool`."""
    import ray
    from ray.util import ActorPool

    remote = ray.remote(num_cpus=1)(Sleeper)
    actors = [remote.remote(case.seconds) for _ in range(WORKERS)]
    try:
        ray.get([actor.make.remote(0) for actor in actors])
        wall, cpu = time.monotonic(), time.process_time()
        pool = ActorPool(actors)
        records = list(pool.map_unordered(lambda a, i: a.make.remote(i), range(case.total)))
        taken = Taken(time.monotonic() - wall, time.process_time() - cpu)
    finally:
        for actor in actors:
            ray.kill(actor)
    check(records, case)
    return taken


def process_pool(case: Case) -> Taken:
    """The standard library's `Pool`."""
    work = partial(make, seconds=case.seconds)
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        pool.map(partial(make, seconds=0.5), range(WORKERS), 1)  # both are ready
        wall, cpu = time.monotonic(), time.process_time()
        records = list(pool.imap_unordered(work, range(case.total), case.chunk))
        taken = Taken(time.monotonic() - wall, time.process_time() - cpu)
    check(records, case)
    return taken


if __name__ == "__main__":
    sys.exit(main())
