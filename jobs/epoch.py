"""One driver: the claim on an output, its event log and its heartbeat.

Taking an epoch is creating `events/<epoch>-00000.jsonl`, which only one process can do. The
driver then appends what happens to numbered files of its epoch and rewrites the newest at least
every `HEARTBEAT` seconds, so that its age is the driver's heartbeat. Before each commit it looks
whether a later epoch exists; then it has been succeeded and commits nothing more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeGuard

from jobs.errors import OutputInUseError, StorageError, SupersededError
from jobs.storage import Storage

FOLDER = "events"
HEARTBEAT = 10.0  # seconds between two rewrites of the newest event file
DEAD_AFTER = 60.0  # seconds without one after which a driver on another host is dead
_MAX_FILE = 256 * 1024  # bytes after which the next event file begins
_TRIES = 100
_MAX_READ = 64 * 2**20  # far more than a file of events ever has
# What is read of events: types by key.
_FACTS: dict[str, dict[str, tuple[type, ...]]] = {
    "epoch": {"host": (str,), "pid": (int,), "started": (int, float), "nonce": (str,)},
    "commit": {"part": (str,)},
    "lease": {"attempt": (str,), "worker": (str,)},
    "worker_ready": {"worker": (str,), "node": (str,), "device": (str,), "pid": (int,)},
    "worker_died": {"worker": (str,)},
    "worker_stalled": {"worker": (str,)},
}
_NAME = re.compile(r"\d{6,}-\d{5,}\.jsonl", re.ASCII)


@dataclass(frozen=True)
class Claim:
    """Who owns, or owned, an epoch."""

    epoch: int
    host: str
    pid: int
    started: float  # the process's start, so that a reused pid is not taken for it
    nonce: str
    ended: bool
    last_seen: datetime


class Epoch:
    """A driver's claim on an output, from `take` to `close`. Use as a context manager."""

    def __init__(self, storage: Storage, number: int, nonce: str, first: dict[str, Any]) -> None:
        self.storage = storage
        self.number = number
        self.nonce = nonce
        self._lines = [json.dumps(first)]
        self._file = 0
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._stop = threading.Event()
        self._beat_error: StorageError | None = None
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, storage: Storage) -> Epoch:
        """Claim the next epoch.

        Raises:
            OutputInUseError: the newest epoch's driver is alive.
            StorageError: the output cannot be read or written.
        """
        for _ in range(_TRIES):
            claim = newest_claim(storage)
            if claim is not None and is_alive(claim):
                raise OutputInUseError(
                    f"{storage.uri} is in use by a driver on {claim.host.split('/')[0]} "
                    f"(pid {claim.pid}, epoch {claim.epoch}, last seen "
                    f"{claim.last_seen:%H:%M:%S} UTC); wait for it, or stop it, and run again"
                )
            number = 1 if claim is None else claim.epoch + 1
            nonce = secrets.token_hex(8)
            first = {
                "event": "epoch",
                "time": _now(),
                "epoch": number,
                "host": host_id(),
                "pid": os.getpid(),
                "started": process_start(os.getpid()),
                "nonce": nonce,
            }
            if storage.create(event_path(number, 0), (json.dumps(first) + "\n").encode()):
                return cls(storage, number, nonce, first)
        raise StorageError(f"{storage.uri}: could not take an epoch in {_TRIES} tries")

    def check(self) -> None:
        """Raise SupersededError if a later epoch exists."""
        if self.storage.exists(event_path(self.number + 1, 0)):
            raise SupersededError(
                f"{self.storage.uri}: another driver took epoch {self.number + 1}; this one "
                "stops and commits nothing more"
            )

    def event(self, event: str, **facts: object) -> None:
        """Record what happened; on disk within `HEARTBEAT` seconds."""
        with self._lock:
            self._lines.append(json.dumps({"event": event, "time": _now(), **facts}))

    def flush(self) -> None:
        """Rewrite the newest event file now. Raises StorageError."""
        with self._flushing:
            with self._lock:
                written = len(self._lines)
                lines = [*self._lines, json.dumps({"event": "heartbeat", "time": _now()})]
            content = ("\n".join(lines) + "\n").encode()
            # A slow store holds up this thread alone: events go on being taken in meanwhile.
            self.storage.put(event_path(self.number, self._file), content)
            if len(content) > _MAX_FILE:
                self._file += 1
                with self._lock:
                    del self._lines[:written]

    def close(self, **facts: object) -> None:
        """End the epoch, so that the next driver need not wait for the heartbeat to age."""
        self._stop.set()
        self._thread.join()
        self.event("end", **facts)
        self.flush()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            # A failed beat shows as a missing one; commits meet the same error and report it.
            with contextlib.suppress(StorageError):
                self.flush()


def newest_claim(storage: Storage) -> Claim | None:
    """The claim of the highest epoch, or None for an output without any. Raises StorageError."""
    names = _event_files(storage)
    if not names:
        return None
    epoch = int(names[-1].split("-")[0])
    files = [n for n in names if int(n.split("-")[0]) == epoch]
    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    ended = False
    for name in dict.fromkeys((files[0], files[-1])):
        for entry in _read_event_file(storage, name):
            first = first or entry
            last = entry
            ended = ended or entry["event"] == "end"
    if first is None or last is None or first.get("event") != "epoch":
        raise StorageError(f"{storage.uri}/{FOLDER}/{files[0]}: not a claim of an epoch")
    return Claim(
        epoch,
        first["host"],
        first["pid"],
        first["started"],
        first["nonce"],
        ended,
        datetime.fromisoformat(last["time"]),
    )


def is_alive(claim: Claim) -> bool:
    """Whether a claim's driver may still be working."""
    if claim.ended:
        return False
    if claim.host == host_id():
        return process_start(claim.pid) == claim.started
    return (datetime.now(UTC) - claim.last_seen).total_seconds() < DEAD_AFTER


def host_id() -> str:
    """Host name, boot and pid namespace: equal only where a pid means the same process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(boot.read_text().strip())
        parts.append(str(namespace.readlink()))
    return "/".join(parts)


def process_start(pid: int) -> float:
    """When a process began, in clock ticks since boot; 0 where no such process runs."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return _process_start_elsewhere(pid)
    state, *rest = stat.rpartition(")")[2].split()
    return 0.0 if state in "ZX" else float(rest[18])


def _process_start_elsewhere(pid: int) -> float:
    """Without /proc (macOS) a pid that answers counts as the same process."""
    if Path("/proc/self").exists():
        return 0.0
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return 0.0
    except PermissionError:
        return 1.0
    return 1.0


def event_path(epoch: int, number: int) -> str:
    """`events/<epoch>-<n>.jsonl`."""
    return f"{FOLDER}/{epoch:06d}-{number:05d}.jsonl"


def read_events(storage: Storage) -> list[dict[str, Any]]:
    """All events of an output in order, heartbeats left out. Raises StorageError."""
    events = []
    for name in _event_files(storage):
        for entry in _read_event_file(storage, name):
            if entry["event"] != "heartbeat":
                events.append({"epoch": int(name.split("-")[0]), **entry})
    return events


def _event_files(storage: Storage) -> list[str]:
    """Names of all event files in order; what else someone keeps in the folder is not ours."""
    return sorted(name for name in storage.names(FOLDER) if _NAME.fullmatch(name))


def _read_event_file(storage: Storage, name: str) -> list[dict[str, Any]]:
    """The events of one file. Raises StorageError for a damaged one."""
    entries: list[dict[str, Any]] = []
    content = storage.get(f"{FOLDER}/{name}", most=_MAX_READ) or b""
    for line in content.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not _is_event(entry):
            raise StorageError(
                f"{storage.uri}/{FOLDER}/{name}: line {len(entries) + 1} is damaged; where no "
                "driver is running, delete the file and run again"
            )
        entries.append(entry)
    return entries


def _is_event(entry: object) -> TypeGuard[dict[str, Any]]:
    """Whether a line holds what readers of events count on, whoever wrote it."""
    if not isinstance(entry, dict):
        return False
    event = entry.get("event")
    if not isinstance(event, str) or not _is_time(entry.get("time")):
        return False
    return all(type(entry.get(key)) in kinds for key, kinds in _FACTS.get(event, {}).items())


def _is_time(text: object) -> bool:
    try:
        return isinstance(text, str) and datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
