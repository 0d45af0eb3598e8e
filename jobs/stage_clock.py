"""How long the stages of a job take, measured while it runs and without making a device wait."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

STAGES = ("text", "pictures", "denoise", "decode", "write")
"""In the order of work; `write` is encoding, hashing and storing, on threads beside the device."""


class StageClock:
    """Seconds of each stage since they were last taken.

    On CUDA the ends of a stage are events of the stream, and read once the device has passed
    them. On a CPU work is done when its call returns.

    Args:
        device_type: of the models, such as "cuda".
    """

    def __init__(self, device_type: str) -> None:
        self._on_cuda = device_type == "cuda"
        self._marks: deque[tuple[str, Any, Any]] = deque()
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what the device does inside. What raises is not counted."""
        began = device_mark(self._on_cuda)
        yield
        self._marks.append((name, began, device_mark(self._on_cuda)))

    def settle(self) -> None:
        """Read the marks up to where the device is, past whatever it has brought to the host."""
        while self._marks and (not self._on_cuda or self._marks[0][2].query()):
            name, began, ended = self._marks.popleft()
            self.add(name, seconds_between(began, ended))

    def add(self, name: str, seconds: float) -> None:
        """Count seconds of a stage that is timed elsewhere. From any thread."""
        with self._lock:
            add_seconds(self._seconds, {name: seconds})

    def take(self) -> dict[str, float]:
        """Seconds by stage, of those that took any, and begin anew."""
        with self._lock:
            taken, self._seconds = self._seconds, {}
        return {name: taken[name] for name in STAGES if name in taken}


def add_seconds(total: dict[str, float], more: Mapping[str, float]) -> None:
    """Add seconds by stage to those that are there."""
    for name, seconds in more.items():
        total[name] = total.get(name, 0.0) + seconds


def device_mark(on_cuda: bool) -> Any:
    """A moment of a device's work; on CUDA an event of its stream, for which nothing waits."""
    if not on_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds_between(began: Any, ended: Any) -> float:
    """Seconds from one mark to another, once the device is done."""
    if isinstance(began, float):
        return float(ended - began)
    return float(began.elapsed_time(ended)) / 1000
