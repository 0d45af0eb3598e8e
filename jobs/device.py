"""The device of a worker's process: what it is, and what its errors mean."""

from __future__ import annotations

import os
import socket

import torch

from jobs.executor import WorkerInfo
from jobs.record import versions


class DeviceError(RuntimeError):
    """The device is in a state that only a new process mends; the worker must end."""


def device_type() -> str:
    """The kind of device that this process can use: "cuda", "mps" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def describe_device() -> WorkerInfo:
    """This process and its device. Loads nothing."""
    kind = device_type()
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        device, memory = properties.name, int(properties.total_memory)
        free = int(torch.cuda.mem_get_info(0)[0])
    else:
        device = kind
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = 0  # of no use to anybody
    return WorkerInfo(
        node=socket.gethostname(),
        device=device,
        device_type=kind,
        memory=memory,
        free_memory=free,
        versions=versions(),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        pid=os.getpid(),
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch may help."""
    # the CPU's allocator raises a plain RuntimeError
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def is_device_failure(error: Exception) -> bool:
    """Whether only a new process helps."""
    # torch.AcceleratorError is a RuntimeError too, and older versions have no class for it
    return (
        isinstance(error, RuntimeError)
        and "CUDA error" in str(error)
        and "out of memory" not in str(error)
    )


def works_beside_host(device_type: str) -> bool:
    """Whether a device goes on with what it was asked for while the host does something else."""
    return device_type == "cuda"


def empty_cache() -> None:
    """Give back what the allocator holds for later, so that a smaller batch finds room."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
