"""What an output says of itself: counts, times, who made what. Read in one pass over its rows."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.epoch import read_events
from jobs.output import Output
from jobs.stage_clock import STAGES, add_seconds

SLOWEST = 10
MOST_FAILURES = 200
"""Failed samples that are kept with their words; all are counted."""
_MOST_MESSAGES = 3  # different ones of a class
_COLUMNS = (
    *("status", "prompt", "width", "height", "worker", "node", "device", "seconds"),
    *("batch_mode", "error_type", "error_message", "created_at"),
)
_MOST_SECONDS = 1e7  # what says more, or is no number, is not believed
_LEFT = ("worker_died", "worker_stalled")  # events that end a worker

Floats = npt.NDArray[np.float64]


@dataclass
class Maker:
    """What one worker on one device made; workers of later runs that bear its name included.

    Attributes:
        images: made.
        seconds: for them, without loading and waiting.
        failed: samples that failed in its hands.
    """

    images: int = 0
    seconds: float = 0.0
    failed: int = 0


@dataclass(frozen=True)
class Runs:
    """What the events tell of the runs that made an output.

    Attributes:
        number: of runs that had a worker.
        active_seconds: from each run's first worker to its end, summed.
        worker_seconds: the same for each worker, by device.
        loading_seconds: of each worker.
        lost: workers that died or hung.
        stage_seconds: of all workers, by stage.
    """

    number: int = 0
    active_seconds: float = 0.0
    worker_seconds: Mapping[str, float] = field(default_factory=dict)
    loading_seconds: Sequence[float] = ()
    lost: int = 0
    stage_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Facts:
    """Of the current rows of an output.

    Attributes:
        created: when images were made, seconds since 1970, ascending.
        seconds: that they took, in no order.
        slowest: their rows, the slowest first.
        failures: the first failed rows.
        failed_by_type: all of them.
        messages: for each class its first messages, and how often each occurs.
    """

    created: Floats
    seconds: Floats
    slowest: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    failed_by_type: Counter[str]
    messages: dict[str, Counter[str]]
    makers: dict[tuple[str, str, str], Maker]
    batch_modes: Counter[str]
    runs: Runs

    def device_seconds(self) -> dict[str, tuple[int, float]]:
        """Images and the seconds that they took, by device."""
        found: dict[str, tuple[int, float]] = {}
        for (_, _, device), maker in self.makers.items():
            images, seconds = found.get(device, (0, 0.0))
            found[device] = (images + maker.images, seconds + maker.seconds)
        return found


def read_facts(output: Output) -> Facts:
    """Read all current rows and the events of an output.

    Raises:
        StorageError: a part of the manifest, or a file of events, is damaged.
    """
    created: list[Floats] = []
    seconds: list[Floats] = []
    slowest: list[tuple[float, int, dict[str, Any]]] = []
    facts = Facts(np.empty(0), np.empty(0), [], [], Counter(), {}, {}, Counter(), Runs())
    for _, table in output.listing.current_tables(sorted(output.listing.parts), _COLUMNS):
        is_ok = pc.equal(table["status"], "ok")
        made = table.filter(is_ok)
        created.append(_times(made["created_at"]))
        taken = made["seconds"].to_numpy().astype(np.float64)
        known = np.isfinite(taken)
        seconds.append(taken[known])
        for place in np.argsort(-np.where(known, taken, -1.0))[:SLOWEST]:
            if known[place]:
                row = made.slice(int(place), 1).to_pylist()[0]
                slowest.append((float(taken[place]), -row["index"], row))
        slowest = heapq.nlargest(SLOWEST, slowest, key=lambda entry: entry[:2])
        _add_makers(facts, table)
        _add_failures(facts, table.filter(pc.invert(is_ok)))
    facts.created = np.sort(np.concatenate(created)) if created else np.empty(0)
    facts.seconds = np.concatenate(seconds) if seconds else np.empty(0)
    facts.slowest = [row for _, _, row in slowest]
    facts.runs = read_runs(read_events(output.storage))
    return facts


def rates(created: Floats, bins: int) -> tuple[Floats, Floats]:
    """Images a second over time.

    Args:
        created: seconds since 1970, ascending, at least two that differ.
        bins: stretches of equal length.

    Returns:
        The stretches' edges in seconds since the first image (bins + 1), and the rates (bins).
    """
    since = created - created[0]
    counts, edges = np.histogram(since, bins=bins, range=(0.0, float(since[-1])))
    return edges.astype(np.float64), counts / (edges[1] - edges[0])


def read_runs(events: Iterable[Mapping[str, Any]]) -> Runs:
    """What the events of an output tell of its runs, see `Runs`."""
    epochs: dict[int, list[Mapping[str, Any]]] = {}
    for event in events:
        epochs.setdefault(event["epoch"], []).append(event)
    number, active, lost = 0, 0.0, 0
    workers: dict[str, float] = {}
    loading: list[float] = []
    stages: dict[str, float] = {}
    for entries in epochs.values():
        end = max(_seconds(event) for event in entries)
        ready: dict[str, tuple[float, str]] = {}
        first: float | None = None
        for event in entries:
            if event["event"] == "worker_ready":
                time = _seconds(event)
                first = time if first is None else first
                ready[event["worker"]] = (time, event["device"])
                taken = event.get("seconds")
                if isinstance(taken, float) and 0 <= taken < _MOST_SECONDS:
                    loading.append(taken)
            elif event["event"] == "stages":
                add_seconds(stages, _stage_seconds(event))
            elif event["event"] in _LEFT:
                lost += 1
                since, device = ready.pop(event["worker"], (None, ""))
                if since is not None:
                    workers[device] = workers.get(device, 0.0) + max(0.0, _seconds(event) - since)
        for since, device in ready.values():
            workers[device] = workers.get(device, 0.0) + max(0.0, end - since)
        if first is not None:
            number += 1
            active += max(0.0, end - first)
    return Runs(number, active, workers, loading, lost, stages)


def _stage_seconds(event: Mapping[str, Any]) -> dict[str, float]:
    """What can be believed of an event, which anyone may have written."""
    said = event.get("seconds")
    if not isinstance(said, dict):
        return {}
    found = {name: said[name] for name in STAGES if isinstance(said.get(name), float)}
    return {name: seconds for name, seconds in found.items() if 0 <= seconds < _MOST_SECONDS}


def _add_makers(facts: Facts, table: pa.Table) -> None:
    grouped = table.group_by(["worker", "node", "device", "status"]).aggregate(
        [("index", "count"), ("seconds", "sum")]
    )
    for row in grouped.to_pylist():
        maker = facts.makers.setdefault((row["worker"], row["node"], row["device"]), Maker())
        if row["status"] == "ok":
            maker.images += row["index_count"]
            maker.seconds += row["seconds_sum"] or 0.0
        else:
            maker.failed += row["index_count"]
    facts.batch_modes.update(table["batch_mode"].to_pylist())


def _add_failures(facts: Facts, failed: pa.Table) -> None:
    for row in failed.to_pylist():
        kind, words = row["error_type"] or "unknown", row["error_message"] or ""
        facts.failed_by_type[kind] += 1
        messages = facts.messages.setdefault(kind, Counter())
        first = (words.splitlines() or [""])[0]
        if first in messages or len(messages) < _MOST_MESSAGES:
            messages[first] += 1
        if len(facts.failures) < MOST_FAILURES:
            facts.failures.append(row)


def _times(column: pa.ChunkedArray) -> Floats:
    micros = column.cast(pa.int64()).to_numpy()
    return np.asarray(micros, np.float64) / 1e6


def _seconds(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()
