"""Weights that move between host memory and a device together, as one copy of one buffer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zimage_core.fused_weights import FusedRows
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
        fused: those of them that are rows of one tensor, and remain so.
        pin: lock the buffer in memory, so that copies to a CUDA device need not be waited for.

    Raises:
        ValueError: a parameter is a tensor class that is not made of plain tensors.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        fused: Sequence[FusedRows] = (),
        *,
        pin: bool = False,
    ) -> None:
        self._fused = tuple(fused)
        rows = {id(layer.weight) for joined in fused for layer in joined.layers}
        # What moves, and whose being written to means that it was.
        self._tensors = [joined.weight for joined in fused]
        self._written_to: list[list[Tensor]] = [
            [layer.weight for layer in joined.layers] for joined in fused
        ]
        for weight in parameters:
            if id(weight) not in rows:
                parts = plain_tensors(weight)
                self._tensors += parts
                self._written_to += [[part] for part in parts]
        self._offsets: list[int] = []
        size = 0
        for tensor in self._tensors:
            if type(tensor.data) is not Tensor:
                raise ValueError(
                    f"a {type(tensor.data).__name__} of shape {tuple(tensor.shape)} cannot "
                    "be offloaded; allowed: plain weights, without quantisation"
                )
            self._offsets.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = size
        self._host = torch.empty(size, dtype=torch.uint8)
        for tensor, view in zip(self._tensors, self._views(self._host), strict=True):
            tensor.data = view.copy_(tensor.data)
        self._distribute()
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
        self._put(self._views(buffer))
        self._written = self._versions()

    def point_to_host(self) -> None:
        """Let the parameters use host memory, and bring back what was written meanwhile."""
        views = self._views(self._host)
        now = self._versions()
        for view, tensor, before, after in zip(
            views, self._tensors, self._written, now, strict=True
        ):
            if before != after:
                view.copy_(tensor.data)
        self._put(views)
        self._written = self._versions()

    def _put(self, views: Sequence[Tensor]) -> None:
        for tensor, view in zip(self._tensors, views, strict=True):
            tensor.data = view
        self._distribute()

    def _distribute(self) -> None:
        for joined in self._fused:
            joined.distribute()

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for offset, tensor in zip(self._offsets, self._tensors, strict=True)
        ]

    def _versions(self) -> list[int]:
        """Counters that go up with every write into a tensor, not with a change of memory."""
        return [sum(part._version for part in parts) for parts in self._written_to]


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
