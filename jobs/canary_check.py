"""The canary without a job: whether a checkpoint's batches are right on this machine.

What every worker does when it has loaded (`jobs.canary`), for `zimage doctor --model`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from jobs.memory_needs import first_fitting
from jobs.node_weights import available_memory
from jobs.quantities import memory_size

_FLOAT32 = 4  # bytes
_ROOM = 1.2  # of the weights, for what is computed with them


def check_canary(doctor: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Load a checkpoint and make the canary, where there is room for it.

    Args:
        doctor: the report of `zimage doctor`, with a model that is complete.
        parts: files or folders that replace models of it, by name.

    Returns:
        The keys of `canary` that docs/cli.md describes. Nothing that goes wrong is raised.
    """
    import torch

    from jobs.canary import TOLERANCES, fly_canary
    from jobs.device import DeviceError
    from zimage_core import ZImagePipeline, load_from_local_dir

    device, attention, model = doctor["device"], doctor["attention_auto"], doctor["model"]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found: dict[str, Any] = {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "batches_agree": None,
        "difference": None,
        "tolerance": TOLERANCES[dtype],
        "seconds": None,
        "reason": None,
    }
    offload, free = _offload(doctor)
    if offload is None:
        found["reason"] = f"{memory_size(free)} of memory are free, too little for this model"
        return found
    started = time.perf_counter()
    try:
        components = load_from_local_dir(
            model["path"], device=device, dtype=dtype, attention=attention, offload=offload, **parts
        )
        report = fly_canary(ZImagePipeline(**components), lambda step: None)
    except (ValueError, RuntimeError, OSError, ImportError, DeviceError) as error:
        found["reason"] = f"{type(error).__name__}: {error}"
        return found
    found["seconds"] = round(time.perf_counter() - started, 3)
    if report.difference is None:
        found["reason"] = report.fault
        return found
    facts = report.facts()
    return found | {"batches_agree": facts["batches"], "difference": facts["difference"]}


def canary_problems(canary: Mapping[str, Any]) -> list[dict[str, str]]:
    """What stands in the way, and what mends it."""
    if canary["batches_agree"] is not False:
        return []
    attention = canary["attention"]
    key = "sampling.batch_size=1" if attention == "native" else "model.attention=native"
    return [
        {
            "problem": f"images of a batch differ from the same made alone, on {canary['device']} "
            f"with attention {attention}: workers make every image alone here",
            "fix": f"zimage run JOB --set {key}",
        }
    ]


def format_canary(canary: Mapping[str, Any]) -> str:
    """What was found, for people."""
    where = f"{canary['device']} ({canary['dtype']}, attention {canary['attention']})"
    if canary["batches_agree"] is None:
        return f"canary     nothing to compare on {where}: {canary['reason']}"
    words = "agree with" if canary["batches_agree"] else "DIFFER from"
    size = "without measure" if canary["difference"] is None else f"by {canary['difference']:.2g}"
    return (
        f"canary     images of a batch {words} the same made alone, on {where}: {size}, "
        f"allowed {canary['tolerance']:g}; {canary['seconds']:.1f} s with loading"
    )


def _offload(doctor: Mapping[str, Any]) -> tuple[str | None, int]:
    """How the models take turns, None where there is no room, and the bytes that are free."""
    model = doctor["model"]
    if doctor["gpus"]:
        free = doctor["gpus"][0]["free_bytes"]
        sizes = model["memory"]
        return (first_fitting(sizes[0]["needed_bytes"], free) if sizes else "none"), free
    limit = doctor["cpu"]["memory_bytes"]
    available = available_memory()
    free = limit if available is None else min(limit, available)
    needed = sum(model["parameters"].values()) * _FLOAT32 * _ROOM
    return ("none" if needed <= free else None), free
