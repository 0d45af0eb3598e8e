"""Times of stages: what a run's events say of them, and what the report makes of that."""

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_calls import CommandLine

from jobs.output import Output
from jobs.report_facts import read_facts, read_runs
from jobs.stage_clock import StageClock

TIME = "2026-11-30T12:00:00+00:00"


def stage_seconds(output: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for file in (output / "events").iterdir():
        for line in file.read_text().splitlines():
            event = json.loads(line)
            for name, seconds in event["seconds"].items() if event["event"] == "stages" else ():
                found[name] = found.get(name, 0.0) + seconds
    return found


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_stages_of_a_run_are_the_seconds_of_its_rows(zimage: CommandLine, layout: str) -> None:
    zimage.run("--set", f"output.layout={layout}", code=0)
    found = stage_seconds(zimage.folder / "out")
    assert list(found) == ["text", "denoise", "decode", "write"]
    assert all(seconds > 0 for seconds in found.values())
    # A row has its share of its batch, reading and checking included, and its own writing.
    in_rows = sum(row["seconds"] for row in zimage.rows())
    assert 0.5 * in_rows < sum(found.values()) < 1.01 * in_rows
    assert read_facts(Output.open("out")).runs.stage_seconds == pytest.approx(found)
    zimage("report", "out", "--format", "md", "-o", "r.md", code=0)
    text = (zimage.folder / "r.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| denoising ")]
    share = found["denoise"] / sum(found.values())
    assert f"| {share:.1%} |" in rows[0] and f"| {found['denoise'] / 8:.3g} |" in rows[0]


def test_outputs_of_before_say_so(zimage: CommandLine) -> None:
    zimage.run(code=0)
    for file in (zimage.folder / "out/events").iterdir():
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if '"stages"' not in line))
    zimage("report", "out", "--format", "md", "-o", "r.md", code=0)
    assert "The events have no times of stages" in (zimage.folder / "r.md").read_text()


def test_what_raises_is_not_counted_and_what_is_taken_is_gone() -> None:
    clock = StageClock("cpu")
    with pytest.raises(torch.OutOfMemoryError), clock.stage("denoise"):
        raise torch.OutOfMemoryError
    with clock.stage("decode"):
        pass
    assert clock.take() == {}  # nothing is read before the device is done
    clock.settle()
    assert list(clock.take()) == ["decode"]
    clock.settle()
    assert clock.take() == {}


def test_writers_add_from_their_threads() -> None:
    clock = StageClock("cpu")

    def write() -> None:
        for _ in range(1000):
            clock.add("write", 0.5)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.take() == {"write": 2000.0}


class Event:
    """What a CUDA event is to a clock: recorded at a time, compared once its work is done."""

    now = 0.0
    done: float = math.inf

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return Event.done >= self.at

    def elapsed_time(self, other: "Event") -> float:
        assert Event.done >= other.at, "CUDA says that the device is not ready"
        return other.at - self.at


def test_on_cuda_marks_are_read_once_they_are_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "done", -1.0)
    clock = StageClock("cuda")
    for name, milliseconds in (("text", 20.0), ("denoise", 500.0), ("text", 30.0)):
        with clock.stage(name):
            monkeypatch.setattr(Event, "now", Event.now + milliseconds)
    clock.settle()
    assert clock.take() == {}  # nothing waits for a device
    monkeypatch.setattr(Event, "done", 520.0)
    clock.settle()
    assert clock.take() == pytest.approx({"text": 0.02, "denoise": 0.5})
    monkeypatch.setattr(Event, "done", 550.0)  # a batch that was encoded ahead
    clock.settle()
    assert clock.take() == pytest.approx({"text": 0.03})


@pytest.mark.parametrize(
    "said", [None, [], "x", {"denoise": "long"}, {"denoise": -1.0}, {"denoise": math.nan},
             {"denoise": 1e300}, {"denoise": 10**400}, {"<b>": 1.0}],
)  # fmt: skip
def test_events_of_somebody_else(said: Any) -> None:
    event = {"epoch": 1, "event": "stages", "time": TIME, "seconds": said}
    assert read_runs([event]).stage_seconds == {}
