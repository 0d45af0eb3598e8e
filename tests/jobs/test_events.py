"""The story of an output from its event files alone: who made what, when, on which attempt."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq
from cli_calls import CommandLine

from jobs.quantities import index_ranges, range_indices

FAILS_AT_FIRST = (
    "import pathlib\n"
    "        if index == 2 and not pathlib.Path('mended').exists():\n"
    "            raise ValueError('not yet')\n"
    "        return f'A cat, {index}'"
)


@dataclass(frozen=True)
class Told:
    """What the events say of one row."""

    part: str
    attempt: str
    worker: str
    node: str
    device: str
    status: str
    leased: datetime
    committed: datetime


def told_by_events(output: Path) -> list[tuple[int, Told]]:
    """Each committed row, from `events/*.jsonl` and nothing else."""
    workers: dict[tuple[str, str], dict] = {}
    leases: dict[str, dict] = {}
    rows: list[tuple[int, Told]] = []
    for file in sorted((output / "events").iterdir()):
        epoch = file.name.split("-")[0]
        for line in file.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "worker_ready":
                workers[epoch, event["worker"]] = event
            elif event["event"] == "lease":
                assert event["attempt"] not in leases
                leases[event["attempt"]] = event
            elif event["event"] == "commit":
                failed = range_indices(event["failed"])
                for attempt, text in event["attempts"].items():
                    lease = leases[attempt]
                    worker = workers[epoch, lease["worker"]]
                    assert worker["versions"]["torch"]
                    for index in range_indices(text):
                        assert index in range_indices(lease["indices"])
                        told = Told(
                            part=event["part"],
                            attempt=attempt,
                            worker=lease["worker"],
                            node=worker["node"],
                            device=worker["device"],
                            status="failed" if index in failed else "ok",
                            leased=datetime.fromisoformat(lease["time"]),
                            committed=datetime.fromisoformat(event["time"]),
                        )
                        rows.append((index, told))
    return rows


def test_events_alone_tell_who_made_what_when_and_on_which_attempt(zimage: CommandLine) -> None:
    generator = ["--set", f"prompts.generator={zimage.write_generator(FAILS_AT_FIRST)}"]
    zimage.run(*generator, code=3)
    zimage.write("mended", "")
    zimage.run(*generator, "--count", 10, "--retry-failed", code=0)

    told = told_by_events(zimage.folder / "out")
    parts = sorted((zimage.folder / "out/manifest").iterdir())
    committed = [(part.name, row) for part in parts for row in pq.read_table(part).to_pylist()]
    assert len(committed) == 11  # 8, then the failed one again and 2 more
    assert sorted((t.part, index) for index, t in told) == sorted(
        (part, row["index"]) for part, row in committed
    )
    facts = {(t.part, index): t for index, t in told}
    for part, row in committed:
        known = facts[part, row["index"]]
        for key in ("attempt", "worker", "node", "device", "status"):
            assert getattr(known, key) == row[key], key
        assert known.leased <= row["created_at"] <= known.committed
        if row["status"] == "ok":
            assert row["file_name"].split("/")[1] == known.attempt
    assert [t.status for index, t in told if index == 2] == ["failed", "ok"]


def test_ranges_come_back_as_they_were() -> None:
    assert index_ranges([]) == "" and range_indices("") == []
    assert index_ranges([7, 0, 1, 2, 9, 10]) == "0-2,7,9-10"
    assert range_indices("0-2,7,9-10") == [0, 1, 2, 7, 9, 10]
    assert index_ranges(range(5, 6)) == "5"
