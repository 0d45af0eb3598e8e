"""Planning and merging at size: bounded, in time by a loop over the same names."""

import re
import time
import tracemalloc
from collections.abc import Iterator

import pyarrow as pa

from jobs import manifest
from jobs.commits import Listing, PartName
from jobs.metadata_file import write_metadata
from jobs.plan import new_plan
from jobs.resume import Resume
from jobs.storage import Storage

PLAN = new_plan(0, 1_000_000, 64)
# every second shard; every 128th of them without its last batch
NAMES = [
    str(PartName(shard, 0, 0, 7, 8, 56 if shard % 256 == 0 else 64, 0, 0, 1))
    for shard in range(0, PLAN.num_shards, 2)
]


class NamesOnly(Storage):
    """An output of which only the names of its parts are there."""

    def __init__(self) -> None:
        self.uri = "names"

    def names(self, folder: str) -> Iterator[str]:
        return iter(NAMES)


def plan_all() -> int:
    """Read the names, say what there is to do and count all shards that have work."""
    listing = Listing(NamesOnly())
    listing.current = lambda shard, columns=None: pa.table(
        {"index": range(shard * 64, shard * 64 + 56)}
    )
    resume = Resume(PLAN, listing)
    made = sum(map(len, resume.work()))
    assert made == resume.num_to_make
    assert "(62 shards partly done)" in resume.words()
    return made


def test_a_million_indices_half_done_are_planned_in_30_mb() -> None:
    """Ten million take 37 MiB: what is held goes with the parts, and not with the indices."""
    expected = 1_000_000 - sum(PartName.parse(name).rows for name in NAMES)
    tracemalloc.start()
    try:
        assert plan_all() == expected
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30e6


def test_planning_takes_a_few_times_as_long_as_finding_the_numbers_in_the_names() -> None:
    """About three times. The faster of several tries each, since others use the machine too."""
    planning, numbers = [], []
    for _ in range(5):
        began = time.process_time()
        plan_all()
        middle = time.process_time()
        found = [list(map(int, re.findall(r"\d+", name))) for name in NAMES]
        numbers.append(time.process_time() - middle)
        planning.append(middle - began)
        assert len(found) == len(NAMES)
    assert min(planning) < 10 * min(numbers)


def test_merging_holds_a_row_group_and_not_all_rows(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(manifest, "_ROW_GROUP", 1_000)
    storage = Storage(str(tmp_path / "out"), create=True)
    rows = 1_000
    text = "a prompt of some length " * 40
    for shard in range(20):
        table = pa.table(
            {field.name: _values(field, shard * rows, rows, text) for field in manifest.SCHEMA},
            schema=manifest.SCHEMA,
        )
        name = PartName(shard, 0, 0, 0, 1, rows, 0, 0, 1)
        storage.put(f"manifest/{name}", manifest.to_parquet(table))
    whole = 20 * table.nbytes
    peak = 0
    written = manifest.write_tables

    def watch(path, schema, tables):
        def watched():
            nonlocal peak
            for each in tables:
                peak = max(peak, pa.total_allocated_bytes() - before)
                yield each

        return written(path, schema, watched())

    monkeypatch.setattr(manifest, "write_tables", watch)
    monkeypatch.setattr("jobs.commits._READERS", 1)
    before = pa.total_allocated_bytes()
    assert write_metadata(storage, Listing(storage)) == 20 * rows
    assert peak < whole / 3, (peak, whole)


def _values(field: pa.Field, first: int, rows: int, text: str) -> pa.Array:
    """Any values of a column's type, those of `index` in order."""
    if field.name == "index":
        return pa.array(range(first, first + rows), field.type)
    if field.nullable:
        return pa.nulls(rows, field.type)
    if pa.types.is_list(field.type):
        return pa.array([[first + n] for n in range(rows)], field.type)
    if field.name == "prompt":
        return pa.array([f"{text}{first + n}" for n in range(rows)])
    return pa.array([0] * rows).cast(field.type)
