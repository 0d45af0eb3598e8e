"""A job on a cluster to which a seed's share of misfortune happens, run again until it is done.

    PYTHONPATH=tests/support python -m chaos_run --kills 200 --results output/chaos/results.jsonl

goes through seeds until so many processes were killed, those of earlier runs in the results
counted, and appends a line to the results for each seed.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from chaos_accounts import check_redone, num_copied
from chaos_cluster import ChaosCluster, chaos_cluster
from chaos_events import CODES, KILLS, MAX_NODES, STALL, WEIGHTS, Disturber
from fault_proxy import FaultProxy
from job_runs import JOB, ROOT, Job, kill_session, read_hashes
from output_checks import OutputWatcher, check_complete
from s3_server import BUCKET, s3_environment, s3_server

SHARD = 8
_MAX_RUNS = 60
_RUN_LIMIT = 240.0  # seconds after which a run that nothing more happens to counts as hung


@dataclass
class Figures:
    """One seed's line of the results."""

    seed: int
    store: str
    images: int
    events: Counter[str] = field(default_factory=Counter)
    codes: list[int] = field(default_factory=list)
    redone: int = 0
    in_flight: int = 0  # images of all leases under way at the events: what may be made twice
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        return sum(self.events[kind] for kind in KILLS)

    def line(self) -> str:
        facts = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": self.seed,
            "store": self.store,
            "images": self.images,
            "kills": self.kills,
            "events": dict(sorted(self.events.items())),
            "runs": len(self.codes),
            "exit_codes": self.codes,
            "redone": self.redone,
            "in_flight": self.in_flight,
            "seconds": round(self.seconds, 1),
        }
        return json.dumps(facts)


@dataclass
class ChaosRun:
    """One job under one seed."""

    job: Job
    output: str
    environment: dict[str, str]
    expected: dict[int, str]
    disturber: Disturber
    figures: Figures
    num_events: int

    def __post_init__(self) -> None:
        self.dice = self.disturber.dice
        self.log = self.job.path.parent / f"{self.figures.seed}.log"
        self.watcher = OutputWatcher(self.output, self.expected)
        self.report: dict | None = None
        self._draw()

    def run(self) -> None:
        """Until exit code 0, and then look at everything."""
        started = time.monotonic()
        for _ in range(_MAX_RUNS):
            code = self._once()
            self.figures.codes.append(code)
            if code == 0:
                break
            while code == 5 and "fill_disk" in self.disturber.lasting:
                time.sleep(0.1)  # who runs it again makes room first
                self.disturber.pending()
        else:
            raise AssertionError(f"not done after {_MAX_RUNS} runs: {self.figures.codes}")
        self.disturber.settle()
        self.figures.seconds = time.monotonic() - started
        self.watcher.look()
        redone = check_redone(self.watcher, SHARD)
        # a sample whose write failed for good is made once more by --retry-failed
        failed = sum(row["status"] == "failed" for row in self.watcher.rows)
        self.figures.in_flight = SHARD * self.disturber.in_flight
        twice = num_copied(self.watcher.storage)
        self.figures.redone = check_complete(
            self.output, self.expected, redone=self.figures.in_flight + failed + twice
        )
        assert self.figures.redone == redone

    def _once(self) -> int:
        """One run of the job, with the events that are due in it; its exit code."""
        flags = ["--retry-failed"] if self.report and self.report["failed"] else []
        happened = set(self.disturber.lasting)
        self._begin_of_run = self._last = time.monotonic()
        self._seen = len(self.watcher.rows)
        driver = self._start(*flags)
        try:
            while driver.poll() is None:
                self.disturber.pending()
                self._look()
                if self.figures.events.total() < self.num_events and self._due():
                    happened |= self._happen(driver)
                time.sleep(0.1)
                quiet = time.monotonic() - self._last
                assert quiet < _RUN_LIMIT, f"no end after {quiet:.0f} s: {self._said()}"
        finally:
            if driver.poll() is None:
                kill_session(driver)
        self._look()
        code = driver.returncode
        allowed = {0}.union(*(CODES.get(kind, set()) for kind in happened))
        if self.report and self.report["failed"]:
            allowed.add(3)
        said = self._said()
        assert code in allowed, f"exit code {code} after {sorted(happened)}:\n{said}"
        assert "Traceback" not in said, said
        assert "Unhandled error" not in said, said  # Ray's words for an answer that nobody reads
        return code

    def _happen(self, driver: subprocess.Popen[bytes]) -> set[str]:
        kind = self._kind
        if self.disturber.do(kind, driver, self._again):
            self._say(f"-- {kind}")
            self.figures.events[kind] += 1
            self._last, self._seen = time.monotonic(), len(self.watcher.rows)
            self._draw()
            return {kind}
        self._draw()
        return set()

    def _draw(self) -> None:
        """What comes next, and whether after so many rows or after so many seconds."""
        kinds = self.disturber.kinds()
        (self._kind,) = self.dice.choices(kinds, [WEIGHTS[kind] for kind in kinds])
        self._rows = self.dice.randrange(1, 4 * SHARD) if self.dice.random() < 0.75 else None
        self._wait = self.dice.uniform(0, 12)

    def _due(self) -> bool:
        if self._rows is not None:
            return len(self.watcher.rows) - self._seen >= self._rows
        return time.monotonic() - self._last >= self._wait

    def _look(self) -> None:
        # a disk is full for the reader of nothing, but a status may fall between two commits
        self.report = self.watcher.look() or self.report

    def _command(self, *flags: str) -> list[str]:
        return self.job.command("--output", self.output, *flags)

    def _start(self, *flags: str) -> subprocess.Popen[bytes]:
        self._say(f"-- run {len(self.figures.codes) + 1} {' '.join(flags)}")
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self._command(*flags),
                cwd=self.job.path.parent,
                env=os.environ | self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _again(self) -> int:
        """The same command beside the driver."""
        environment = os.environ | self.environment
        with self.log.open("ab") as log:
            return subprocess.run(
                self._command(),
                cwd=self.job.path.parent,
                env=environment,
                stdout=log,
                stderr=log,
                timeout=_RUN_LIMIT,
                check=False,
            ).returncode

    def _say(self, text: str) -> None:
        with self.log.open("a") as log:
            log.write(f"{datetime.now(UTC):%H:%M:%S} {text}\n")

    def _said(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]


class Chaos:
    """Everything that seeds share: the job, its undisturbed hashes, and the cluster.

    Args:
        folder: for all files.
        count: images of the job.
        s3: whether the output is on an object store, behind a proxy that can fail.
    """

    def __init__(self, folder: Path, *, count: int, s3: bool) -> None:
        self.folder = folder
        self.count = count
        self.s3 = s3
        path = folder / "job.yaml"
        output = folder / "undisturbed"
        text = JOB.format(root=ROOT, count=count, steps=1, output=output, shard_size=SHARD)
        path.write_text(f"{text}run: {{stall_timeout: {STALL}}}\n")
        self.job = Job(path, output)
        result = self.job.run("--local")
        assert result.returncode == 0, result.stderr
        self.expected = read_hashes(output)
        assert len(set(self.expected.values())) == count

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """With a cluster, and with what the output lies on."""
        self.rates = self.folder / "rates.json"
        self.rates.write_text("{}")
        preload = [ROOT / "tests/support/chaos_preload", ROOT / "tests/support", ROOT]
        self.environment = {
            "PYTHONPATH": os.pathsep.join(map(str, preload)),
            "CHAOS_RATES": str(self.rates),
            "OMP_NUM_THREADS": "1",
        }
        self.disk: Path | None = None
        self.proxy: FaultProxy | None = None
        with contextlib.ExitStack() as stack:
            if self.s3:
                server = stack.enter_context(s3_server())
                self.proxy = stack.enter_context(FaultProxy(server.address, delay=0.3))
                self.environment |= s3_environment(self.proxy.port)
                os.environ.update(s3_environment(server.port))  # the watcher's way is undisturbed
            else:
                self.disk = stack.enter_context(_small_disk(self.folder / "disk"))
            self.cluster: ChaosCluster = stack.enter_context(
                chaos_cluster(self.environment, nodes=MAX_NODES - 1)
            )
            self.environment |= self.cluster.access
            self.environment["RAY_ADDRESS"] = self.cluster.address
            yield

    def seed(self, number: int, num_events: int) -> Figures:
        """Run the job under one seed; raises AssertionError where a promise does not hold."""
        if self.s3:
            store, output = "s3", f"s3://{BUCKET}/seed-{number}"
        else:
            store = "folder" if self.disk is None else "tmpfs"
            output = str((self.disk or self.folder) / f"seed-{number}")
        figures = Figures(number, store, self.count)
        dice = random.Random(number)
        disturber = Disturber(self.cluster, dice, self.rates, self.disk, self.proxy)
        while len(self.cluster.nodes) < MAX_NODES - 1:
            self.cluster.add_node().result()
        environment = self.environment
        run = ChaosRun(self.job, output, environment, self.expected, disturber, figures, num_events)
        try:
            run.run()
        finally:
            disturber.settle()
        return figures


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of its own that can be filled; None where this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128m", "chaos", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        print("no rights to mount a small disk: `fill_disk` is left out", file=sys.stderr)
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--kills", type=int, help="until the results hold so many")
    wanted.add_argument("--seeds", type=int, nargs="+", help="just these")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--count", type=int, default=400, help="images of the job")
    parser.add_argument("--events", type=int, default=24, help="of each seed, at most")
    parser.add_argument("--s3", action="store_true", help="output on an object store")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no seed after")
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    done = [json.loads(line) for line in lines]
    kills = sum(line["kills"] for line in done)
    following = itertools.count(1 + max((line["seed"] for line in done), default=0))
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"{kills} kills so far; files in {folder}", flush=True)
    chaos = Chaos(folder, count=args.count, s3=args.s3)
    with chaos.started():
        for seed in args.seeds or following:
            if (args.kills and kills >= args.kills) or time.monotonic() - begun > args.seconds:
                break
            figures = chaos.seed(seed, args.events)
            kills += figures.kills
            with args.results.open("a") as results:
                results.write(figures.line() + "\n")
            print(figures.line(), flush=True)
    shutil.rmtree(folder, ignore_errors=True)  # where a promise broke, all is left to look at
    print(f"{kills} kills", flush=True)


if __name__ == "__main__":
    main()
