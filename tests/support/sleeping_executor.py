"""`RayExecutor` on actors that sleep, on the Ray cluster that this process is connected to."""

from __future__ import annotations

import json
from collections.abc import Mapping

from sleeping_actor import SleepingActor

from jobs.executor import Settings, WorkerSpec
from jobs.ray_executor import RayExecutor

SETTINGS = Settings("cpu", "float32", "native", False, "none", 1, 1, "none", "none")


def sleeping_executor(
    workers: int | str,
    seconds: float,
    single: Mapping[str, float] | None = None,
    *,
    actor: type = SleepingActor,
    stall_timeout: float = 60,
) -> RayExecutor:
    """Each worker sleeps `seconds` for a sample, or what `single` says by its name."""
    config = json.dumps({"seconds": seconds, **(single or {})})
    return RayExecutor(
        WorkerSpec(config, "nowhere", 1, "nonce"),
        workers=workers,
        gpus_per_worker=1,
        threads_per_worker=1,
        stall_timeout=stall_timeout,
        actor=actor,
    )
