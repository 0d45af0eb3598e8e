"""Running a model whose blocks are in host memory: two of them on the device at any time.

While one block computes, the weights of the next are on their way into the other of two slots.
On CUDA the copies have a stream of their own; elsewhere they are plain copies.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zimage_core.fused_weights import fused_rows
from zimage_core.weight_unit import WeightUnit


class _Slot:
    """A buffer on the device, and which block's weights it holds."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: int | None = None
        on_cuda = device.type == "cuda"
        self.ready = _event() if on_cuda else None  # the copy has arrived
        self.free = _event() if on_cuda else None  # the block has computed


class BlockStream:
    """Streams the weights of blocks that run one after the other.

    Hooks on the blocks do it, so that a model's `forward` knows nothing of it.

    Args:
        blocks: in the order in which they run; their weights in host memory.
        device: where they compute.
        restart: which block follows the last one, when the next pass begins.
        pin: see `WeightUnit`.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], device: torch.device, *, restart: int, pin: bool
    ) -> None:
        self._units = [
            WeightUnit(list(block.parameters()), fused_rows(block), pin=pin) for block in blocks
        ]
        self._device = device
        self._restart = restart
        self._slots: list[_Slot] = []
        self._copies = _stream(device) if device.type == "cuda" else None
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(functools.partial(self._enter, i))
            # Also after an error, or the block would keep memory that is given to another one.
            block.register_forward_hook(functools.partial(self._leave, i), always_call=True)

    @property
    def device_bytes(self) -> int:
        """Bytes of the two slots, once they are made."""
        return 2 * max(unit.num_bytes for unit in self._units)

    def open(self) -> None:
        """Make the slots, and begin to fetch the first block."""
        if self._slots:
            return
        size = max(unit.num_bytes for unit in self._units)
        self._slots = [_Slot(size, self._device) for _ in range(2)]
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
        self._fetch(0, self._slots[0])

    def close(self) -> None:
        """Give the slots' memory back."""
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copies)
        self._slots = []

    def _enter(self, index: int, block: nn.Module, arguments: Any) -> None:
        self.open()
        unit = self._units[index]
        slot = next((slot for slot in self._slots if slot.block == index), None)
        if slot is None or not unit.is_copied:
            # Not the block that was expected, or an adapter wrote into it since it was fetched.
            slot = slot or self._slots[0]
            self._fetch(index, slot)
        if slot.ready is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.ready)
        unit.point_to(slot.buffer)
        other = self._slots[1] if slot is self._slots[0] else self._slots[0]
        following = index + 1 if index + 1 < len(self._units) else self._restart
        if other.block != following:
            self._fetch(following, other)

    def _leave(self, index: int, block: nn.Module, arguments: Any, result: Any) -> None:
        slot = next((slot for slot in self._slots if slot.block == index), None)
        if slot is not None and slot.free is not None:
            slot.free.record(torch.cuda.current_stream(self._device))
        self._units[index].point_to_host()

    def _fetch(self, index: int, slot: _Slot) -> None:
        """Begin to copy a block's weights into a slot, once the block in it has computed."""
        slot.block = index
        if self._copies is None:
            self._units[index].copy_to(slot.buffer)
            return
        assert slot.ready is not None and slot.free is not None
        self._copies.wait_event(slot.free)
        with torch.cuda.stream(self._copies):
            self._units[index].copy_to(slot.buffer)
            slot.ready.record(self._copies)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
