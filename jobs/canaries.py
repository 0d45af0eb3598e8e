"""What workers report of their canaries, and which of them compute otherwise than the others.

Pure logic: no torch, no clock. The canary itself is in `canary`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from jobs.quantities import counted

if TYPE_CHECKING:
    from jobs.executor import WorkerInfo


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """What a worker's two fixed prompts gave.

    Args:
        difference: between images made in a batch and made alone, relative to the latter's norm,
            the larger of latents' and pixels'; None where there is nothing to compare.
        tolerance: what it may be in the job's dtype.
        latents: of the images made alone, float32; empty where they could not be made.
        fault: why there is nothing to compare.
    """

    difference: float | None
    tolerance: float
    latents: bytes = b""
    fault: str | None = None

    @property
    def batches_agree(self) -> bool:
        """Whether batches may be made; they may where nothing speaks against it."""
        return self.difference is None or self.difference <= self.tolerance

    @property
    def digest(self) -> str:
        """The same where the same bytes were made, 16 hex digits; empty where none were."""
        return hashlib.sha256(self.latents).hexdigest()[:16] if self.latents else ""

    def facts(self) -> dict[str, object]:
        """What the event of a worker that is ready says of it."""
        return {
            "digest": self.digest,
            "difference": _number(self.difference),
            "tolerance": self.tolerance,
            "batches": self.batches_agree,
            "fault": self.fault,
        }

    def words(self) -> str | None:
        """For people, where there is something to say."""
        if self.fault is not None:
            return f"the canary could not be judged: {self.fault}"
        if self.batches_agree:
            return None
        return (
            f"images of a batch differ from the same made alone by {self.difference:.2g} (allowed "
            f"{self.tolerance:g}): it makes every image alone"
        )


def distance(a: CanaryReport, b: CanaryReport) -> float:
    """Norm of the difference of two canaries, relative to the larger of them; infinite for NaN."""
    left = np.frombuffer(a.latents, np.float32).astype(np.float64)
    right = np.frombuffer(b.latents, np.float32).astype(np.float64)
    if left.shape != right.shape:
        return math.inf
    scale = max(np.linalg.norm(left), np.linalg.norm(right))
    found = float(np.linalg.norm(left - right) / scale) if scale else 0.0
    return found if math.isfinite(found) else math.inf


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Workers whose canaries differ beyond the tolerance.

    Args:
        odd: the fewer; each as `name on node (device)`.
        others: the more, or those that came first.
        difference: between the two.
    """

    odd: tuple[str, ...]
    others: tuple[str, ...]
    difference: float
    tolerance: float

    def words(self) -> str:
        """For people."""
        by = f"differ by {self.difference:.2g} (allowed {self.tolerance:g})"
        if len(self.odd) == len(self.others):
            return (
                f"canaries of {', '.join(self.odd)} and of {', '.join(self.others)} {by}: one of "
                "the two computes wrongly"
            )
        return (
            f"canaries of {', '.join(self.odd)} and of {counted(len(self.others), 'other worker')} "
            f"{by}: look at the former's device"
        )

    def facts(self) -> dict[str, object]:
        """What the event says of it."""
        return {
            "workers": list(self.odd),
            "others": list(self.others),
            "difference": _number(self.difference),
            "tolerance": self.tolerance,
        }


@dataclass(slots=True)
class _Group:
    """Workers whose canaries agree with the first one's."""

    report: CanaryReport
    members: list[str] = field(default_factory=list)


class CanaryComparison:
    """The canaries of a run's workers, each compared with the first of every kind."""

    def __init__(self) -> None:
        self._groups: list[_Group] = []
        self._named: set[str] = set()

    def add(self, worker: str, info: WorkerInfo, report: CanaryReport) -> Disagreement | None:
        """Take in a worker's canary; who is to be named now, if anybody new."""
        if not report.latents:
            return None
        name = f"{worker} on {info.node} ({info.device})"
        for group in self._groups:
            if distance(report, group.report) <= report.tolerance:
                group.members.append(name)
                break
        else:
            self._groups.append(_Group(report, [name]))
        if len(self._groups) == 1:
            return None
        largest = max(self._groups, key=lambda group: len(group.members))
        odd = [group for group in self._groups if group is not largest]
        names = [name for group in odd for name in group.members]
        if self._named.issuperset(names):
            return None
        self._named.update(names)
        return Disagreement(
            tuple(names),
            tuple(largest.members),
            max(distance(group.report, largest.report) for group in odd),
            report.tolerance,
        )


def _number(value: float | None) -> float | None:
    """As JSON has it: no infinity."""
    return None if value is None or not math.isfinite(value) else round(value, 9)
