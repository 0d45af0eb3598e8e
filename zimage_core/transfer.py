"""Copies between host and device for which the host does not wait.

A plain `.to("cuda")` or `.cpu()` returns when all that was asked of the device before is done, and
until the host has asked for more the device has nothing to do.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor to a device, of any shape and dtype.

    From the host to CUDA it is copied to pinned memory, and only asked for from there: it is there
    for whatever is asked of the same stream later. PyTorch keeps the pinned memory that long. What
    is pinned already is its owner's, who may write into it: the host waits for that.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        pinned = _pinned(tensor.shape, tensor.dtype)
        if pinned is not None:
            return pinned.copy_(tensor).to(device, non_blocking=True)
    return tensor.to(device)


class HostCopy:
    """A tensor on its way to the host; `wait` has it.

    Args:
        tensor: of any shape and dtype, not to be written to. On CUDA it is copied into pinned
            memory once the stream has made it, and may be freed at once.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        pinned = _pinned(tensor.shape, tensor.dtype) if tensor.device.type == "cuda" else None
        if pinned is None:
            self._tensor = tensor.cpu()
            return
        self._tensor = pinned
        pinned.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The tensor on the host, once it has come; equal to the last bit."""
        if self._event is None:
            return self._tensor
        self._event.synchronize()
        # Not pinned: that memory is never given back, and what comes may wait long to be written.
        return self._tensor.clone()


def _pinned(shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """Host memory that a GPU reads and writes by itself; None where no more can be locked."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        _log.warning("host memory cannot be pinned (%s); copies wait for the GPU", error)
        return None
