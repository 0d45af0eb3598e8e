"""Copies between host and device for which the host does not wait.

A plain `.to("cuda")` or `.cpu()` returns when all that was asked of the device before is done, and
until the host has asked for more the device has nothing to do.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor to a device, of any shape and dtype.

    From the host to CUDA it is copied to pinned memory, and only asked for from there: it is there
    for whatever is asked of the same stream later. PyTorch keeps the pinned memory that long.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host; `wait` has it.

    Args:
        tensor: of any shape and dtype; on CUDA it is copied once the stream has made it, into
            pinned memory. It may be changed and freed at once.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._tensor = tensor.cpu()
            return
        self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._tensor.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The tensor on the host, once it has come; equal to the last bit."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor
