"""The driver's side of one actor, and what Ray's errors about it mean."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ray._private import state as ray_state
from ray.exceptions import RayTaskError

from jobs.executor import Lease, WorkerInfo


@dataclass(slots=True)
class RayHandle:
    """One actor: what it was asked, what it holds, and when it last moved.

    Args:
        trimming: questions for parts of leases that it has not answered.
        ended: what it said at the end of its first lease, while such an answer is still to come.
        leaving: it was told to end what is under way and to begin nothing.
        moved: when it last did something, by our clock.
    """

    name: str
    actor: Any
    describing: Any = None
    loading: Any = None
    info: WorkerInfo | None = None
    ready: bool = False
    leases: deque[tuple[Lease, Any]] = field(default_factory=deque)
    trimming: dict[Any, Lease] = field(default_factory=dict)
    ended: tuple[str, bool] | None = None
    leaving: bool = False
    beating: Any = None
    ticks: int = -1
    moved: float = 0.0
    asked: float = 0.0

    @property
    def takes_leases(self) -> bool:
        """Whether it has loaded, and may be given work."""
        return self.ready and not self.leaving

    def questions(self) -> list[Any]:
        """References whose answers are waited for."""
        refs = [ref for ref in (self.describing, self.beating, *self.trimming) if ref is not None]
        if self.loading is not None:
            if self.describing is None:
                refs.append(self.loading)
        elif self.stream is not None:
            refs.append(self.stream)
        return refs

    @property
    def stream(self) -> Any:
        """Where the messages of its first lease come from; None without one or after its last."""
        return self.leases[0][1] if self.leases and self.ended is None else None

    @property
    def owes_answer(self) -> bool:
        """Whether it was asked for parts of its first lease, and has not answered."""
        first = self.leases[0][0].attempt
        return any(lease.attempt == first for lease in self.trimming.values())


def node_of(worker: RayHandle) -> str:
    """Ray's name of the node of an actor, also of one that died before it could say; or ""."""
    if worker.info is not None:
        return worker.info.node_id
    known = ray_state.actors(worker.actor._actor_id.hex())
    return str(known.get("Address", {}).get("NodeID", ""))


def cause_of(error: BaseException) -> BaseException:
    """The exception that was raised in the worker."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return cause if isinstance(cause, BaseException) else error


def first_line(error: BaseException) -> str:
    """An error of Ray without the pages that follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "creation task" in lines[0]:
        return lines[-1]  # what the actor's constructor raised
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
