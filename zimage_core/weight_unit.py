"""Weights that move between host memory and a device together, as one copy of one buffer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zimage_core.quantization import plain_tensors

_log = logging.getLogger(__name__)
# Offsets of tensors in a buffer: what vectorised kernels, and the tests of compiled code, ask for.
_ALIGNMENT = 256


class WeightUnit:
    """Parameters of some modules, kept in one host buffer, of which a device may hold a copy.

    The parameter objects stay the same: only the memory that they point to changes. So whoever
    holds them, be it an adapter or compiled code, goes on working. What is written into a
    parameter while it points to a device is copied back before it points to the host again.

    Making a unit moves the parameters into its buffer: for a moment they exist twice.

    Args:
        parameters: in host memory, without gradients; of a quantised one its parts are moved.
        pin: lock the buffer in memory, so that copies to a CUDA device need not be waited for.

    Raises:
        ValueError: a parameter is a tensor class that is not made of plain tensors.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, pin: bool = False) -> None:
        self._parameters = [part for weight in parameters for part in plain_tensors(weight)]
        self._offsets: list[int] = []
        size = 0
        for parameter in self._parameters:
            if type(parameter.data) is not Tensor:
                raise ValueError(
                    f"a {type(parameter.data).__name__} of shape {tuple(parameter.shape)} cannot "
                    "be offloaded; allowed: plain weights, without quantisation"
                )
            self._offsets.append(size)
            size += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = size
        self._host = torch.empty(size, dtype=torch.uint8)
        for parameter, view in zip(self._parameters, self._views(self._host), strict=True):
            parameter.data = view.copy_(parameter.data)
        if pin:
            _pin(self._host)
        self._copied: list[int] = []
        self._written = self._versions()

    def copy_to(self, buffer: Tensor) -> None:
        """Begin to copy the weights to a device; whoever reads them must be ordered after it.

        Args:
            buffer: uint8, of at least `num_bytes`, on the device.
        """
        buffer[: self.num_bytes].copy_(self._host, non_blocking=True)
        self._copied = self._versions()

    @property
    def is_copied(self) -> bool:
        """Whether the last copy holds what the parameters hold."""
        return self._copied == self._versions()

    def point_to(self, buffer: Tensor) -> None:
        """Let the parameters use the copy in a buffer."""
        for parameter, view in zip(self._parameters, self._views(buffer), strict=True):
            parameter.data = view
        self._written = self._versions()

    def point_to_host(self) -> None:
        """Let the parameters use host memory, and bring back what was written meanwhile."""
        for i, view in enumerate(self._views(self._host)):
            parameter = self._parameters[i]
            if parameter._version != self._written[i]:
                view.copy_(parameter.data)
            parameter.data = view
        self._written = self._versions()

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[offset : offset + p.nbytes].view(p.dtype).view(p.shape)
            for offset, p in zip(self._offsets, self._parameters, strict=True)
        ]

    def _versions(self) -> list[int]:
        """Counters that go up with every write into a parameter, not with a change of memory."""
        return [parameter._version for parameter in self._parameters]


def _pin(buffer: Tensor) -> None:
    """Lock a buffer in memory.

    `Tensor.pin_memory` would round its size up to a power of two, which for the published
    transformer is two fifths more.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    pointer, size = buffer.data_ptr(), buffer.nbytes
    if size == 0:
        return
    error = int(runtime.cudaHostRegister(pointer, size, 0))
    if error:
        _log.warning(
            "%d MB of weights cannot be locked in host memory (CUDA error %d); copies to the GPU "
            "are slower",
            size // 10**6,
            error,
        )
        return
    weakref.finalize(buffer, runtime.cudaHostUnregister, pointer)
