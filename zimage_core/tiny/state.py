"""Stages of a training, each resumable from one file, and its log.

A file is written whole beside the old one and put in its place at once: what is found after a crash
is never half of a state.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from zimage_core.tiny.settings import versions

SAVE_SECONDS = 90.0
_WARM_UP_STEPS = 60
_DECAY_FROM = 0.5


@dataclass(frozen=True)
class Budget:
    """How long a stage is to take: a number of steps, or else minutes that it is worked on.

    Minutes are turned into steps by the pace so far. That is settled once 0.4 of them are over,
    while the learning rate is still constant, and logged: with these steps a training repeats.
    """

    steps: int | None = None
    minutes: float = 1.0

    def estimate(self, step: int, seconds: float) -> int:
        """Steps of the whole stage, by the pace of its first `step` steps in `seconds`."""
        if self.steps is not None:
            return self.steps
        return max(step + 1, round(self.minutes * 60 * step / seconds))


def learning_rate(step: int, total: int) -> float:
    """Factor of the learning rate: a warm-up, constant to half of the steps, then down to 0."""
    warm = min(1.0, (step + 1) / max(1, min(_WARM_UP_STEPS, total / 4)))
    progress = step / max(1, total)
    return warm * min(1.0, max(0.0, (1 - progress) / (1 - _DECAY_FROM)))


class Log:
    """JSON lines, one for each event, in a file and shortly on the terminal.

    Args:
        path: appended to.
        quiet: nothing goes to the terminal.
    """

    def __init__(self, path: Path, *, quiet: bool = False) -> None:
        self.path = path
        self.quiet = quiet

    def write(self, stage: str, **values: Any) -> None:
        """Append an event."""
        event = {"time": round(time.time(), 1), "stage": stage, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        if not self.quiet:
            shown = " ".join(f"{name}={_short(value)}" for name, value in values.items())
            print(f"{stage}: {shown}", flush=True)


class Stage:
    """One stage of the training: its loop, and its file.

    Args:
        path: state file.
        name: in the log.
        budget: how long it runs.
        log: the log.
        parts: what is saved and restored, by name: anything with `state_dict` and
            `load_state_dict`.
        random: the source of the stage's choices, saved as well.
        generator: of its tensors, saved as well.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        budget: Budget,
        log: Log,
        parts: Mapping[str, Any],
        random: Random,
        generator: torch.Generator,
    ) -> None:
        self.path, self.name, self.budget, self.log = path, name, budget, log
        self.parts, self.random, self.generator = parts, random, generator
        self.step, self.seconds = 0, 0.0
        self.total: int | None = budget.steps
        if path.is_file():
            self._restore()

    def is_done(self) -> bool:
        """Whether all steps are taken."""
        return self.total is not None and self.step >= self.total

    def run(
        self,
        step: Callable[[int, int], Mapping[str, float]],
        *,
        report: Callable[[int], None] | None = None,
        log_every: int = 20,
    ) -> None:
        """Take the steps that are left.

        Args:
            step: takes one, given its number and the (estimated) number of all; returns numbers
                for the log, which gets their means.
            report: called about ten times and at the end, with the number of the step.
            log_every: steps for each line of the log.
        """
        if self.is_done():
            self.log.write(self.name, step=self.step, state="already done")
            return
        sums: dict[str, float] = {}
        since_save = time.monotonic()
        reported = 0
        while not self.is_done():
            started = time.monotonic()
            total = self.total or max(self.budget.estimate(10, 10.0), 1)
            for name, value in step(self.step, total).items():
                sums[name] = sums.get(name, 0.0) + value
            self.step += 1
            self.seconds += time.monotonic() - started
            if self.budget.steps is None and (self.step == 20 or self.step % 100 == 0):
                self._estimate()
            if self.step % log_every == 0 or self.is_done():
                count = (self.step - 1) % log_every + 1
                means = {name: round(value / count, 5) for name, value in sums.items()}
                pace = round(self.seconds / self.step, 4)
                self.log.write(self.name, step=self.step, of=self.total, pace=pace, **means)
                sums = {}
            if time.monotonic() - since_save > SAVE_SECONDS or self.is_done():
                self.save()
                since_save = time.monotonic()
            tenth = 10 * self.step // (self.total or total)
            if report is not None and (tenth > reported or self.is_done()):
                reported = tenth
                report(self.step)
        self.log.write(self.name, step=self.step, seconds=round(self.seconds), state="done")

    def save(self) -> None:
        """Write the state file."""
        save_atomically(
            self.path,
            {
                "step": self.step,
                "seconds": self.seconds,
                "total": self.total,
                "random": self.random.getstate(),
                "generator": self.generator.get_state(),
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
            },
        )

    def _estimate(self) -> None:
        if self.total is None or self.step < 0.4 * self.total:
            self.total = self.budget.estimate(self.step, self.seconds)

    def _restore(self) -> None:
        state = load_state(self.path)
        self.step, self.seconds = state["step"], state["seconds"]
        if self.budget.steps is None:
            self.total = state["total"]
        self.random.setstate(state["random"])
        self.generator.set_state(state["generator"])
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.log.write(self.name, step=self.step, of=self.total, state="resumed")


def record_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note in a state folder what its training depends on, or see that it is as it was begun.

    Raises:
        ValueError: the folder was begun with other settings.
    """
    path = folder / "settings.json"
    mine = json.loads(json.dumps(settings))
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))["settings"]
        changed = [f"{key}={begun.get(key)}" for key in mine if begun.get(key) != mine[key]]
        if changed:
            raise ValueError(
                f"{path}: this training was begun with {', '.join(changed)}; "
                "use the same settings, or another state folder"
            )
        return
    text = json.dumps({"settings": mine, "versions": versions()}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def save_atomically(path: Path, state: Any) -> None:
    """Write tensors and plain values to a file that appears at once, whole."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def load_state(path: Path) -> Any:
    """Read what `save_atomically` wrote. No code in the file is run.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as a training state: {error}") from error


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
