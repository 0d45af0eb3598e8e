"""What a resume and an end cost at size: planning, listing commits, and `metadata.parquet`.

- *plan*: a job of 10 million indices in shards of 64, half done (every second shard), from a list
  of names as storage would give it (made before): reading the names, the words of a resume, and
  walking through all that is left to make. The goal was 2 s and 300 MB.
- *list*: a folder with 150 000 parts (empty files) on a local disk: which shards are complete,
  partly done, how many rows failed. The goal was 2 s. The plain reading of the folder is shown too.
- *manifest*: parts of 64 rows, a million rows in all: making and writing them as a driver does, and
  merging them into `metadata.parquet`; against the obvious way with pandas (read all parts,
  concatenate, sort by index, write), whose rows must be equal. Both read the same parts.

The code is the project's own throughout. Each measurement is a process of its own, without imports;
CPU seconds beside wall seconds, since a busy machine stretches these; memory above that before
(`VmRSS`) at the end and at most (`VmHWM`).

Prints a table and, as the last line, one JSON object; exit code 1 where rows differ.

    python tests/benchmarks/bench_resume.py [--indices 10000000] [--parts 150000] [--rows 1000000]
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.commits import FOLDER, Listing, PartName, write_part
from jobs.manifest import ManifestRow
from jobs.metadata_file import PATH, write_metadata
from jobs.plan import new_plan
from jobs.resume import Resume
from jobs.storage import Storage

SHARD = 64
CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
Row = dict[str, Any]


def main() -> int:
    """Run all cases; exit code 1 where rows differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--indices", type=int, default=10_000_000)
    parser.add_argument("--parts", type=int, default=150_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=7, help="of planning and listing")
    parser.add_argument("--merges", type=int, default=1, help="rounds of merging, each way")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    rows: list[Row] = []
    if args.indices:
        rows += middle("plan", [apart(plan, args.indices) for _ in range(args.rounds)])
    with tempfile.TemporaryDirectory() as scratch:
        if args.parts:
            folder = Path(scratch) / "listed"
            make_names(folder, args.parts)
            rows += middle("list", [apart(list_parts, folder) for _ in range(args.rounds)])
        if args.rows:
            folder = Path(scratch) / "rows"
            rows += middle("manifest", [apart(write_parts, folder, args.rows)])
            ways: dict[str, list[list[Row]]] = {"merge": [], "pandas": []}
            for _ in range(args.merges):
                ways["merge"].append(apart(merge, folder))
                ways["pandas"].append(apart(merge_with_pandas, folder))
            rows += middle("manifest", ways["merge"]) + middle("manifest", ways["pandas"])
            equal = apart(same_rows, folder)
        else:
            equal = True
    print(f"{'':<10}{'step':<34}{'s':>9}{'CPU s':>9}{'MiB':>8}{'peak':>8}  found")
    for row in rows:
        print(
            f"{row['case']:<10}{row['step']:<34}{row['seconds']:>9.3f}{row['cpu']:>9.3f}"
            f"{row['held_mib']:>8.1f}{row['peak_mib']:>8.1f}  {row['found']}"
        )
    print(f"rows of both files equal: {equal}")
    report = {
        "benchmark": "resume",
        "date": date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load": [round(value, 1) for value in (load, os.getloadavg()[0])],
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("pyarrow", "pandas")},
        "equal": equal,
        "results": rows,
    }
    print(json.dumps(report))
    return 0 if equal else 1


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def middle(case: str, rounds: list[list[Row]]) -> list[Row]:
    """Of each step the median of its rounds, with the least and the most CPU seconds."""
    rows = []
    for steps in zip(*rounds, strict=True):
        row = {"case": case, "step": steps[0]["step"], "found": steps[0]["found"]}
        for key in ("seconds", "cpu", "held_mib", "peak_mib"):
            row[key] = round(statistics.median(step[key] for step in steps), 3)
        row["cpu_range"] = [min(s["cpu"] for s in steps), max(s["cpu"] for s in steps)]
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    return rows


class Meter:
    """Time and memory of steps that follow each other in one process."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self.before = memory()["VmRSS"]
        self.rows: list[Row] = []
        self._begin()

    def _begin(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def done(self, step: str, found: object) -> None:
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        now = memory()
        self.rows.append(
            {
                "step": step,
                "seconds": round(wall, 3),
                "cpu": round(cpu, 3),
                "held_mib": round(now["VmRSS"] - self.before, 1),
                "peak_mib": round(now["VmHWM"] - self.before, 1),
                "found": found,
            }
        )
        self._begin()


def memory() -> dict[str, float]:
    """MiB of this process, by the system's names."""
    text = Path("/proc/self/status").read_text()
    return {name: int(kib) / 1024 for name, kib in re.findall(r"(VmHWM|VmRSS):\s+(\d+) kB", text)}


class NamesOnly(Storage):
    """An output of which only the names of its parts are there."""

    def __init__(self, names: list[str]) -> None:
        self.uri = "names"
        self._names = names

    def names(self, folder: str) -> Iterator[str]:
        return iter(self._names)


def part(shard: int, *, rows: int = SHARD, failed: int = 0) -> PartName:
    return PartName(shard, 0, 0, rows // 8 - 1, SHARD // 8, rows, failed, 0, 1)


def plan(indices: int) -> list[Row]:
    """Plan a job whose every second shard is done; every 64th of those has lost its last batch."""
    whole = new_plan(0, indices, SHARD)

    names = [
        str(part(shard, rows=SHARD - 8 if shard % 128 == 0 else SHARD))
        for shard in range(0, whole.num_shards - 1, 2)
    ]
    storage = NamesOnly(names)
    meter = Meter()
    listing = Listing(storage)
    meter.done("reading the names", f"{listing.num_rows:,} rows")
    resume = Resume(whole, listing)
    meter.done("words", resume.words())
    # Of a shard that is partly done its part is read when it is leased; here there is none.
    listing.current = lambda shard, columns=None: pa.table(  # type: ignore[method-assign]
        {"index": range(shard * SHARD, shard * SHARD + SHARD - 8)}
    )
    made = sum(map(len, resume.work()))
    meter.done("all work, handed out", f"{made:,} to make")
    assert made == resume.num_to_make == indices - listing.num_rows
    return [*meter.rows, total(meter.rows)]


def total(rows: list[Row]) -> Row:
    """All steps together."""
    times = {key: round(sum(row[key] for row in rows), 3) for key in ("seconds", "cpu")}
    return rows[-1] | times | {"step": "together", "found": ""}


def make_names(folder: Path, parts: int) -> None:
    """Empty parts: every 100th shard partly done, every 50th with failed rows."""
    (folder / FOLDER).mkdir(parents=True)
    for shard in range(parts):
        rows, failed = (SHARD - 8 if shard % 100 == 0 else SHARD), (3 if shard % 50 == 0 else 0)
        (folder / FOLDER / str(part(shard, rows=rows, failed=failed))).touch()


def list_parts(folder: Path) -> list[Row]:
    """Say from the names alone what is complete, partly done and failed."""
    storage = Storage(str(folder))
    meter = Meter()
    count = len(os.listdir(folder / FOLDER))  # noqa: PTH208 - as `Storage.names` does
    meter.done("(reading the folder alone)", f"{count:,} names")
    listing = Listing(storage)
    states = listing.states.values()
    partly = sum(0 < state.rows < SHARD for state in states)
    found = f"{len(states) - partly:,} complete, {partly:,} partly, {listing.num_failed:,} failed"
    meter.done("complete, partly, failed", found)
    assert partly == -(-count // 100) and listing.num_failed == 3 * -(-count // 50)
    return meter.rows


def row(index: int) -> ManifestRow:
    """A row as a job on a GPU writes it."""
    pixels = hashlib.sha256(str(index).encode()).hexdigest()
    attempt = f"{index // SHARD:08d}-k3f9qz7w"
    age = 20 + index % 50
    return ManifestRow(
        file_name=f"images/{attempt}/avatars_{index:08d}.png",
        index=index,
        prompt_index=index,
        status="ok",
        prompt=f"studio portrait of a {age} year old person, number {index}, soft window light",
        negative_prompt=None,
        seed=42 + index,
        width=1024,
        height=1024,
        num_inference_steps=8,
        guidance_scale=0.0,
        model="Tongyi-MAI/Z-Image-Turbo",
        model_fingerprint="sha256:" + "ab" * 32,
        loras=None,
        dtype="bfloat16",
        attention="native",
        format="png",
        bytes=1_500_000 + index % 1000,
        sha256=hashlib.sha256(pixels.encode()).hexdigest(),
        pixels_sha256=pixels,
        shard=index // SHARD,
        revision=0,
        attempt=attempt,
        batch=tuple(range(index // 8 * 8, index // 8 * 8 + 8)),
        batch_mode="planned",
        worker="w0",
        node="node",
        device="NVIDIA H100 80GB HBM3",
        seconds=0.7 + index % 100 / 1000,
        error_type=None,
        error_message=None,
        created_at=CREATED,
        metadata={"name": f"n{index}", "age": age, "city": "Oslo"},
    )


def write_parts(folder: Path, count: int) -> list[Row]:
    """Commit rows as a driver does; making the rows themselves is left out."""
    storage = Storage(str(folder), create=True)
    meter = Meter()
    wall, cpu = time.perf_counter(), time.process_time()
    making = 0.0
    for shard in range(count // SHARD):
        began = time.process_time()
        rows = [row(shard * SHARD + n) for n in range(SHARD)]
        making += time.process_time() - began
        write_part(storage, part(shard), rows)
    meter.wall, meter.cpu = wall, cpu + making
    size = sum(path.stat().st_size for path in (folder / FOLDER).iterdir()) / 1e6
    meter.done("writing parts", f"{count // SHARD:,} parts, {size:.1f} MB")
    return meter.rows


def merge(folder: Path) -> list[Row]:
    """Ours."""
    storage = Storage(str(folder))
    meter = Meter()
    listing = Listing(storage)
    rows = write_metadata(storage, listing)
    size = (folder / PATH).stat().st_size / 1e6
    meter.done("merging", f"{rows:,} rows, {size:.1f} MB")
    return meter.rows


def merge_with_pandas(folder: Path) -> list[Row]:
    """The obvious way; it knows nothing of revisions."""
    meter = Meter()
    frames = [pd.read_parquet(path) for path in (folder / FOLDER).glob("*.parquet")]
    frame = pd.concat(frames).sort_values("index")
    path = folder / "pandas.parquet"
    frame.to_parquet(path, index=False, compression="zstd")
    meter.done("merging with pandas", f"{len(frame):,} rows, {path.stat().st_size / 1e6:.1f} MB")
    return meter.rows


def same_rows(folder: Path) -> bool:
    """Whether both files hold the same rows in the same order, batch by batch."""
    ours, theirs = (pq.ParquetFile(folder / name) for name in (PATH, "pandas.parquet"))
    if ours.metadata.num_rows != theirs.metadata.num_rows:
        return False
    pairs = zip(ours.iter_batches(10_000), theirs.iter_batches(10_000), strict=True)
    for a, b in pairs:
        if a.schema.names != b.schema.names:
            return False
        wanted = pa.Table.from_batches([b]).cast(a.schema)  # pandas forgets what is null
        if (
            not pa.Table.from_batches([a])
            .replace_schema_metadata()
            .equals(wanted.replace_schema_metadata())
        ):
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
