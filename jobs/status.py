"""`zimage status`: how far an output is, read from the output alone, driver alive or not."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import pyarrow.compute as pc

from jobs.epoch import is_alive, newest_claim, read_events
from jobs.errors import InputError
from jobs.output import Output
from jobs.quantities import counted, duration
from jobs.redo import read_marks
from jobs.terminal import visible_line

_SHOWN_FAILURES = 20
_RECENT = 600.0  # seconds over which the rate of a running job is taken
_BAR = 30
_ONCE = ("--retry-failed", "--accept-changes", "--redo-rejected")


def status(uri: str, *, as_json: bool = False) -> int:
    """Print the state of an output; exit code 0.

    Raises:
        InputError: there is no output of a job at `uri`.
        StorageError: it cannot be read.
    """
    report = status_report(uri)
    print(json.dumps(report, indent=2) if as_json else format_status(report))
    return 0


def status_report(uri: str) -> dict[str, Any]:
    """The state of an output; keys are documented in docs/cli.md and stable."""
    output = Output.open(uri)
    listing, plan = output.listing, output.record.plan
    claim = newest_claim(output.storage)
    running = claim is not None and is_alive(claim)
    events = read_events(output.storage)
    rate = _rate(output, events) if running else None
    left = plan.num_samples - listing.num_rows
    failures = _failures(output)
    partly = sum(0 < s.rows < len(plan.shard(i)) for i, s in listing.states.items())
    complete = sum(s.rows >= len(plan.shard(i)) for i, s in listing.states.items())
    rejected = _rejected(output)
    ready = [e for e in events if claim and e["epoch"] == claim.epoch]
    return {
        "output": uri,
        "name": output.record.config["name"],
        "state": "running" if running else ("complete" if left == 0 else "stopped"),
        "planned": plan.num_samples,
        "ok": listing.num_rows - listing.num_failed,
        "failed": listing.num_failed,
        "left": left,
        "shards": {"planned": plan.num_shards, "complete": complete, "partly": partly},
        "images_per_second": rate,
        "eta_seconds": left / rate if rate else None,
        "driver": None
        if claim is None
        else {
            "epoch": claim.epoch,
            "host": claim.host.split("/")[0],
            "pid": claim.pid,
            "alive": running,
            "ended": claim.ended,
            "last_seen": claim.last_seen.isoformat(timespec="seconds"),
        },
        "workers": _workers(ready),
        "failures_by_type": dict(Counter(f["error_type"] for f in failures)),
        "failures": failures,
        "rejected": rejected,
        "next": next_command(
            output, uri, running=running, left=left, rejected=len(rejected["samples"])
        ),
    }


def format_status(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    planned, ok, failed = report["planned"], report["ok"], report["failed"]
    done = (ok + failed) / planned if planned else 1.0
    bar = "#" * int(done * _BAR)
    lines = [
        f"{report['name']}: {report['state']}",
        f"[{bar:<{_BAR}}] {done:.1%}  {ok} ok, {failed} failed, {report['left']} left of {planned}",
    ]
    if report["images_per_second"]:
        eta = f", about {duration(report['eta_seconds'])} left" if report["left"] else ""
        lines.append(f"rate      {report['images_per_second']:.2f} images/s{eta}")
    driver = report["driver"]
    if driver:
        alive = "ended" if driver["ended"] else "dead, or its machine is"
        alive = "alive" if driver["alive"] else alive
        lines.append(
            f"driver    epoch {driver['epoch']} on {driver['host']} (pid {driver['pid']}), "
            f"{alive}, last seen {driver['last_seen']}"
        )
    if driver and driver["alive"]:
        for worker in report["workers"]:
            lines.append(f"worker    {worker['name']} on {worker['node']} ({worker['device']})")
    if report["failures"]:
        kinds = ", ".join(f"{n} {kind}" for kind, n in report["failures_by_type"].items())
        lines.append(f"failures  {kinds}")
        for failure in report["failures"][:_SHOWN_FAILURES]:
            first = (failure["error_message"] or "").splitlines() or [""]
            lines.append(f"  {failure['index']:>8}  {failure['error_type']}: {first[0]}")
        hidden = len(report["failures"]) - _SHOWN_FAILURES
        if hidden > 0:
            lines.append(f"  ... and {hidden} more (--json lists all)")
    rejected = report["rejected"]
    if rejected["problem"]:
        lines.append(f"rejected  {rejected['problem']}")
    elif rejected["samples"] or rejected["made_again"]:
        again = f", {rejected['made_again']:,} made again" if rejected["made_again"] else ""
        images = counted(len(rejected["samples"]), "image") if rejected["samples"] else "none now"
        lines.append(f"rejected  {images}{again}")
    if report["next"]:
        lines.append(f"next      {report['next']}")
    return "\n".join(map(visible_line, lines))


def _failures(output: Output) -> list[dict[str, Any]]:
    failures = []
    shards = [i for i in sorted(output.listing.states) if output.listing.states[i].failed]
    columns = ["status", "error_type", "error_message", "prompt"]
    for _, table in output.listing.current_tables(shards, columns):
        failed = table.filter(pc.equal(table["status"], "failed"))
        failures += [
            {key: row[key] for key in ("index", "error_type", "error_message", "prompt")}
            for row in failed.to_pylist()
        ]
    return failures


def _rejected(output: Output) -> dict[str, Any]:
    """What is marked in `rejected.csv`; a damaged one keeps nobody from looking at the rest."""
    try:
        marks = read_marks(output.storage, output.record.plan, output.listing)
    except InputError as error:
        return {"samples": [], "made_again": 0, "problem": str(error)}
    samples = sorted(index for shard in marks.redo.values() for index in shard)
    return {"samples": samples, "made_again": marks.made_again, "problem": None}


def _rate(output: Output, events: list[dict[str, Any]]) -> float | None:
    """Images a second over the last commits of the newest epoch."""
    from jobs.commits import PartName

    epoch = events[-1]["epoch"] if events else 0
    now = datetime.now(UTC)
    begun: datetime | None = None
    rows = 0
    for event in events:
        if event["epoch"] != epoch:
            continue
        time = datetime.fromisoformat(event["time"])
        if event["event"] == "worker_ready" and begun is None:
            begun = time
        if event["event"] == "commit" and (now - time).total_seconds() < _RECENT:
            rows += PartName.parse(event["part"]).rows
    if begun is None or not rows:
        return None
    seconds = min(_RECENT, (now - begun).total_seconds())
    return rows / seconds if seconds > 0 else None


def _workers(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Workers of the newest epoch that were not lost since."""
    workers: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "worker_ready":
            workers[event["worker"]] = {
                "name": event["worker"],
                "node": event["node"],
                "device": event["device"],
                "pid": event["pid"],
            }
        elif event["event"] in ("worker_died", "worker_stalled"):
            workers.pop(event["worker"], None)
    return list(workers.values())


def next_command(
    output: Output, uri: str, *, running: bool, left: int, rejected: int = 0
) -> str | None:
    """The command to run next, or None where there is nothing to do."""
    if running:
        return None
    if output.listing.num_failed:
        return run_command(output, uri, "--retry-failed")
    if rejected and not left:
        return run_command(output, uri, "--redo-rejected")
    return run_command(output, uri) if left else None


def run_command(output: Output, uri: str, *flags: str) -> str:
    """The command that made this output, quoted for a shell, with `flags` for this once."""
    command = output.record.command or ["zimage", "run", "JOB", "--output", uri]
    return shlex.join([*(word for word in command if word not in _ONCE), *flags])
