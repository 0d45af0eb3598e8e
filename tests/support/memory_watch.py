"""What the processes of a run hold while it goes on, and whether that grows with the samples made.

Read from outside of the processes, so that looking changes nothing in them.
"""

import json
import math
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MIB = 2**20
# One-sided 95 % of Student's t, by degrees of freedom.
_T95 = {4: 2.13, 6: 1.94, 8: 1.86, 10: 1.81, 14: 1.76, 18: 1.73}


@dataclass(frozen=True)
class Reading:
    """A process at one moment.

    Args:
        done: samples committed until then.
        resident: bytes of RAM.
        anonymous: those of them that no file and no shared memory backs: heap and stacks.
        handles: open files, sockets and pipes.
    """

    done: int
    resident: int
    anonymous: int
    handles: int
    threads: int


@dataclass(frozen=True)
class Trend:
    """A straight line through readings.

    Args:
        slope: per 10 000 samples.
        error: standard error of the slope.
        means: of the blocks that it goes through.
    """

    slope: float
    error: float
    freedom: int
    means: tuple[float, ...]

    @property
    def at_least(self) -> float:
        """What the slope is above with 95 % confidence."""
        return self.slope - _T95[self.freedom] * self.error


def trend(
    readings: Sequence[Reading],
    value: Callable[[Reading], float],
    *,
    skip: float = 0.2,
    blocks: int = 10,
) -> Trend:
    """Fit a line to the means of blocks of readings.

    Neighbouring readings are not independent (memory is taken and given back in steps), so that
    the error of a line through all of them would be far too small; means of long blocks nearly are.

    Args:
        skip: share of all samples at the beginning that is left out: caches and pools fill.
        blocks: of equal numbers of samples.
    """
    total = max(reading.done for reading in readings)
    parts: dict[int, list[Reading]] = defaultdict(list)
    for reading in readings:
        position = (reading.done / total - skip) / (1 - skip)
        if 0 <= position < 1:
            parts[int(position * blocks)].append(reading)
    if len(parts) < blocks:
        raise ValueError(f"only {len(parts)} of {blocks} blocks have readings: look more often")
    xs = [statistics.fmean(r.done for r in part) / 10_000 for part in parts.values()]
    ys = [statistics.fmean(value(r) for r in part) for part in parts.values()]
    ys = [y for _, y in sorted(zip(xs, ys, strict=True))]
    xs.sort()
    slope, intercept = statistics.linear_regression(xs, ys)
    freedom = blocks - 2
    residual = sum((y - slope * x - intercept) ** 2 for x, y in zip(xs, ys, strict=True)) / freedom
    spread = statistics.pvariance(xs) * blocks
    return Trend(slope, math.sqrt(residual / spread), freedom, tuple(ys))


@dataclass
class Watch:
    """Readings of the processes of a run, by what they are."""

    output: Path
    shard_size: int
    readings: dict[str, list[Reading]] = field(default_factory=lambda: defaultdict(list))

    def follow(self, process: subprocess.Popen[bytes], *, every: float) -> int:
        """Look every so many seconds until the run ends; its exit code."""
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            self.look(driver)
            time.sleep(every)
        return process.returncode

    def look(self, driver: psutil.Process) -> None:
        """Read the driver, its workers, and Ray's own processes where there are any."""
        done = self.done()
        if not done:
            return
        names = {pid: name for name, pid in self.workers().items() if pid != driver.pid}
        self._read("driver", driver.pid, done)
        for child in driver.children(recursive=True):
            try:
                program = child.name()
            except psutil.NoSuchProcess:
                continue
            if child.pid in names:
                self._read(f"worker {names[child.pid]}", child.pid, done)
            elif program in ("raylet", "gcs_server"):
                self._read(program, child.pid, done)

    def done(self) -> int:
        """Samples committed, but for the last shard's remainder."""
        folder = self.output / "manifest"
        return self.shard_size * len(list(folder.iterdir())) if folder.is_dir() else 0

    def workers(self) -> dict[str, int]:
        """Process ids of the workers, by name, as the events tell."""
        return {
            event["worker"]: event["pid"]
            for path in sorted(self.output.glob("events/*-00000.jsonl"))
            for event in map(json.loads, path.read_text().splitlines())
            if event["event"] == "worker_ready"
        }

    def _read(self, name: str, pid: int, done: int) -> None:
        try:
            status = dict(
                line.split(":", 1)
                for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                if ":" in line
            )
            handles = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            resident, anonymous = (int(status[k].split()[0]) * 1024 for k in ("VmRSS", "RssAnon"))
        except (OSError, KeyError):  # it has ended
            return
        threads = int(status["Threads"])
        self.readings[name].append(Reading(done, resident, anonymous, handles, threads))
