"""What can happen to a job on a cluster, each thing with what it may cost and how a run may end."""

import contextlib
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from chaos_cluster import ChaosCluster
from fault_proxy import Fault, FaultProxy, seeded

KILLS = frozenset({"kill_worker", "kill_driver", "kill_raylet", "kill_node"})
# how often each is drawn; kills are half of all
WEIGHTS = {
    "kill_worker": 5,
    "kill_driver": 5,
    "kill_raylet": 2,
    "kill_node": 3,
    "add_node": 2,
    "freeze_worker": 1,
    "freeze_node": 1,
    "drain": 2,
    "stop_at_once": 1,
    "second_driver": 1,
    "fill_disk": 2,
    "storage_errors": 4,
}
# exit codes besides 0 that an event may lead to
CODES = {
    "kill_driver": {-signal.SIGKILL},
    "drain": {130},
    "stop_at_once": {130},
    "fill_disk": {5},
    "storage_errors": {3, 5},
}
MAX_NODES = 3
STALL = 8  # seconds: `run.stall_timeout` of these jobs
CALM = {"slow": [0.02, 0.2]}  # an image's wait, so that there is something in flight at each event
ROUGH = {"slow": [0.02, 0.3], "refused": 0.2, "lost_answer": 0.2}


@dataclass
class Disturber:
    """Does things to a job.

    Args:
        cluster: on which it runs.
        dice: of the seed.
        rates: file that `storage_faults` reads in all processes of the job.
        disk: the file system of the output, if it is one that may be filled.
        proxy: before the object store, if the output is on one.
    """

    cluster: ChaosCluster
    dice: random.Random
    rates: Path
    disk: Path | None = None
    proxy: FaultProxy | None = None
    in_flight: int = 0  # leases that were under way at what has happened so far, at most
    _later: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    _lasting: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._set_rates(CALM)

    def kinds(self) -> list[str]:
        """What can be done here."""
        return [kind for kind in WEIGHTS if kind != "fill_disk" or self.disk is not None]

    @property
    def lasting(self) -> frozenset[str]:
        """What has begun and not ended."""
        return frozenset(self._lasting)

    def do(self, kind: str, driver: subprocess.Popen[bytes], again: Callable[[], int]) -> bool:
        """Let it happen; False where it cannot now, as with a worker to kill where none is.

        Args:
            driver: the job's driver, alive a moment ago.
            again: runs the job once more and gives its exit code.
        """
        if kind == "second_driver":
            code = again()
            assert code == 6 or driver.poll() is not None, code
            return True
        if kind in ("kill_driver", "drain", "stop_at_once"):
            self.in_flight += MAX_NODES if kind != "drain" else 0
            driver.send_signal(signal.SIGKILL if kind == "kill_driver" else signal.SIGTERM)
            if kind == "stop_at_once":
                self._in(0.3, lambda: driver.send_signal(signal.SIGTERM))
            return True
        if kind in ("kill_worker", "freeze_worker"):
            return self._strike_worker(frozen=kind == "freeze_worker")
        if kind in ("kill_raylet", "kill_node", "freeze_node"):
            return self._strike_node(kind)
        if kind == "add_node":
            if len(self.cluster.nodes) >= MAX_NODES:
                return False
            self.cluster.add_node()
            return True
        if kind in self._lasting:
            return False
        self._lasting.add(kind)
        self.in_flight += MAX_NODES
        if kind == "fill_disk":
            self._fill_disk()
        else:
            self._err()
        return True

    def pending(self) -> None:
        """Do what is due by now: to be called often."""
        now = time.monotonic()
        due = [entry for entry in self._later if entry[0] <= now]
        self._later = [entry for entry in self._later if entry[0] > now]
        for _, action in due:
            action()

    def settle(self) -> None:
        """End at once what lasts, and give the cluster back what it lost."""
        while self._later:
            _, action = self._later.pop(0)
            action()

    def _strike_worker(self, *, frozen: bool) -> bool:
        workers = self.cluster.workers()
        if not workers:
            return False
        worker = self.dice.choice(workers)
        self.in_flight += 1
        try:
            worker.send_signal(signal.SIGSTOP if frozen else signal.SIGKILL)
        except psutil.NoSuchProcess:
            return False
        return True

    def _strike_node(self, kind: str) -> bool:
        if not self.cluster.nodes:
            return False
        node = self.dice.choice(self.cluster.nodes)
        self.in_flight += 1
        if kind == "freeze_node":
            self.cluster.freeze(node, signal.SIGSTOP)
            self._in(STALL + 4, lambda: self.cluster.freeze(node, signal.SIGCONT))
            return True
        if kind == "kill_raylet":
            self.cluster.kill_raylet(node)
        else:
            self.cluster.kill_node(node)
        self._in(self.dice.uniform(0, 4), self._restock)
        return True

    def _restock(self) -> None:
        if len(self.cluster.nodes) < MAX_NODES - 1:
            self.cluster.add_node()

    def _fill_disk(self) -> None:
        assert self.disk is not None
        filler = self.disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"x" * 4096):
                pass

        def free() -> None:
            filler.unlink()
            self._lasting.discard("fill_disk")

        self._in(self.dice.uniform(3, 6), free)

    def _err(self) -> None:
        if self.proxy is not None:
            rates = {Fault.UNAVAILABLE: 0.1, Fault.DROP_AFTER: 0.1, Fault.FAIL_AFTER: 0.1}
            rates |= {Fault.DROP_BEFORE: 0.1, Fault.DELAY: 0.1, Fault.CUT: 0.1}
            self.proxy.schedule = seeded(self.dice.randrange(1 << 30), rates)
        else:
            self._set_rates(ROUGH)

        def end() -> None:
            if self.proxy is not None:
                self.proxy.schedule = lambda _: None
            self._set_rates(CALM)
            self._lasting.discard("storage_errors")

        self._in(self.dice.uniform(6, 15), end)

    def _set_rates(self, rates: dict[str, object]) -> None:
        new = self.rates.with_suffix(".new")
        new.write_text(json.dumps({"seed": self.dice.randrange(1 << 30), **rates}))
        new.replace(self.rates)

    def _in(self, seconds: float, action: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + seconds, action))
