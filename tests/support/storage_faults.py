"""Faults of a store: deaths, lies, lost answers, errors and waits around every write of an output.

`install` puts itself before `obstore.put`, through which all writes go, so that retries and all
that is above them are the product's own. Used in processes that run a job, never in the test's.
"""

import itertools
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore

Put = Callable[..., Any]

KINDS = (
    "die_before",
    "die_half",  # with half of the bytes staged beside the target, as a local store leaves them
    "die_after",
    "lost_answer",  # written, but the caller hears of an error
    "refused",  # not written, and the caller hears of it
    "lie",  # not written, and the caller hears of success
    "torn_die",  # half of the bytes under the final name: a store without whole writes
    "torn_lie",
)


class StoreError(OSError):
    """What a store answers in these tests; the runner takes it for one that may pass."""


def install(plan: dict[str, Any]) -> None:
    """Disturb this process's writes from now on.

    Args:
        plan: `{"at": n, "kind": one of KINDS}` for the n-th write, counted from 1;
            `{"journal": file}` to list the paths of all writes there; or
            `{"rates": file}` for a JSON file of chances, see `_Rates`, read as it changes.
    """
    put = obstore.put
    if "rates" in plan:
        obstore.put = _Rates(put, Path(plan["rates"]))  # type: ignore[assignment]
        return
    numbers = itertools.count(1)
    lock = threading.Lock()

    def disturbed(store: Any, path: str, file: Any, **options: Any) -> Any:
        with lock:
            number = next(numbers)
        if "journal" in plan:
            with Path(plan["journal"]).open("a") as journal:
                journal.write(f"{path}\n")
        if number != plan.get("at"):
            return put(store, path, file, **options)
        return _disturb(plan["kind"], put, store, path, file, options)

    obstore.put = disturbed  # type: ignore[assignment]


def _disturb(kind: str, put: Put, store: Any, path: str, file: Any, options: Any) -> Any:
    if isinstance(file, bytes | Path):
        content = file if isinstance(file, bytes) else file.read_bytes()
    else:
        content = file.read()
        file.seek(0)
    half = content[: len(content) // 2]
    match kind:
        case "die_before":
            _die()
        case "die_half":
            # object_store writes `name#1`, and gives it its name when it is whole
            target = Path(store.prefix) / f"{path}#1"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(half)
            _die()
        case "die_after":
            put(store, path, file, **options)
            _die()
        case "lost_answer":
            put(store, path, file, **options)
            raise StoreError(f"connection reset after writing {path}")
        case "refused":
            raise StoreError(f"503 slow down: {path}")
        case "lie":
            return None
        case "torn_die":
            put(store, path, half, **options)
            _die()
        case "torn_lie":
            return put(store, path, half, **options)
    raise AssertionError(kind)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the other threads may run on for a moment, this one may not


class _Rates:
    """Chances of `refused` and `lost_answer`, and seconds that an image waits: `slow` [from, to].

    Read from a file that the test rewrites while the processes run; `seed` and the process number
    give the dice.
    """

    def __init__(self, put: Put, file: Path) -> None:
        self._put = put
        self._file = file
        self._read = 0
        self._rates: dict[str, Any] = {}
        self._dice = random.Random()

    def __call__(self, store: Any, path: str, file: Any, **options: Any) -> Any:
        rates = self._current()
        least, most = rates.get("slow", (0.0, 0.0))
        if most and path.startswith("images/"):
            time.sleep(self._dice.uniform(least, most))
        chance = self._dice.random()
        if chance < rates.get("refused", 0.0):
            return _disturb("refused", self._put, store, path, file, options)
        if chance < rates.get("refused", 0.0) + rates.get("lost_answer", 0.0):
            return _disturb("lost_answer", self._put, store, path, file, options)
        return self._put(store, path, file, **options)

    def _current(self) -> dict[str, Any]:
        changed = self._file.stat().st_mtime_ns
        if changed != self._read:
            self._rates = json.loads(self._file.read_text())
            if not self._read:
                self._dice.seed(f"{self._rates.get('seed')} {os.getpid()}")
            self._read = changed
        return self._rates
