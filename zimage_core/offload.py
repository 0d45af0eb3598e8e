"""Models that take turns on a device whose memory does not hold all of them.

- `phase` and `model`: the weights live in host memory, and those of one model at a time are on the
  device: text encoder, encoder of pictures, transformer or autoencoder. The two differ in who
  calls: with `phase` a caller runs one stage for many images before it begins the next, with
  `model` it makes one batch after the other.
- `block`: as these, but of all but the autoencoder only two blocks are on the device, see
  `BlockStream`.

The arithmetic is the same as without: so are the bytes of images, but for large ones, which the
autoencoder makes in tiles (`tiling`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from zimage_core.block_stream import BlockStream
from zimage_core.fused_weights import fused_rows
from zimage_core.text_encoder import TextEncoder
from zimage_core.transformer import ZImageTransformer2DModel
from zimage_core.vision import VisionEncoder
from zimage_core.weight_unit import WeightUnit

OFFLOAD_MODES = ("none", "phase", "model", "block")
# The attribute by which a model knows its residency: what `generate` is given are models alone.
_ATTRIBUTE = "_residency"


class Residency:
    """Which of the models that share a device has its weights there.

    Args:
        models: all that share it; their weights in host memory.
        device: where they compute.
        mode: "phase", "model" or "block".

    Raises:
        ValueError: another mode, or weights that cannot be moved so (`WeightUnit`).
    """

    def __init__(self, models: Sequence[nn.Module], device: torch.device, mode: str) -> None:
        if mode not in OFFLOAD_MODES[1:]:
            raise ValueError(f"offload: {mode!r}; allowed: {', '.join(OFFLOAD_MODES)}")
        self.device = device
        self._resident: nn.Module | None = None
        pin = device.type == "cuda"
        self._weights: dict[nn.Module, list[WeightUnit]] = {}
        self._streams: dict[nn.Module, BlockStream] = {}
        for model in models:
            blocks, restart = streamed_blocks(model)
            own = parameters_outside(model, blocks)
            # A unit for each block: making one needs its memory twice.
            units = [WeightUnit(own, pin=pin)]
            if blocks and mode == "block":
                self._streams[model] = BlockStream(blocks, device, restart=restart, pin=pin)
            else:
                units += [
                    WeightUnit(list(block.parameters()), fused_rows(block), pin=pin)
                    for block in blocks
                ]
            self._weights[model] = units
            setattr(model, _ATTRIBUTE, self)

    def streams(self, model: nn.Module) -> bool:
        """Whether only two blocks of a model are on the device at any time."""
        return model in self._streams

    @property
    def resident(self) -> nn.Module | None:
        """The model whose weights are on the device."""
        return self._resident

    def use(self, model: nn.Module) -> None:
        """Bring a model's weights to the device, the weights of another one away before."""
        if model is self._resident:
            return
        self.put_away()
        for unit in self._weights[model]:
            buffer = torch.empty(unit.num_bytes, dtype=torch.uint8, device=self.device)
            unit.copy_to(buffer)
            unit.point_to(buffer)
        if model in self._streams:
            self._streams[model].open()
        self._resident = model

    def put_away(self) -> None:
        """Leave no weights on the device."""
        if self._resident is None:
            return
        for unit in self._weights[self._resident]:
            unit.point_to_host()
        if self._resident in self._streams:
            self._streams[self._resident].close()
        self._resident = None
        if self.device.type == "cuda":
            # The next model's tensors have other sizes than the holes that this one leaves.
            torch.cuda.empty_cache()


def place(models: Mapping[str, nn.Module], device: torch.device, mode: str) -> None:
    """Let models that are in host memory take turns on a device; `none` does nothing.

    Raises:
        ValueError: see `Residency`.
    """
    if mode != "none":
        Residency(list(models.values()), device, mode)


def use(model: nn.Module) -> None:
    """See to it that a model's weights are where it computes. Does nothing without offload."""
    residency = _residency(model)
    if residency is not None:
        residency.use(model)


def put_away(model: nn.Module) -> None:
    """Leave on the device no weights of a model, nor of those that it shares the device with."""
    residency = _residency(model)
    if residency is not None:
        residency.put_away()


def is_streamed(model: nn.Module) -> bool:
    """Whether a model's blocks come to the device one by one (mode "block")."""
    residency = _residency(model)
    return residency is not None and residency.streams(model)


def compute_device(model: nn.Module) -> torch.device:
    """Where a model computes, wherever its weights are now."""
    residency = _residency(model)
    return next(model.parameters()).device if residency is None else residency.device


def streamed_blocks(model: nn.Module) -> tuple[list[nn.Module], int]:
    """The blocks of a model in the order in which they run, and which one follows the last.

    Captions, and what is seen in pictures, are refined once for many passes through the others, so
    that the first block of the noise refiner follows the last of all.
    """
    if isinstance(model, ZImageTransformer2DModel):
        once = [*model.context_refiner, *(model.siglip_refiner or ())]
        return [*once, *model.noise_refiner, *model.layers], len(once)
    if isinstance(model, TextEncoder):
        return list(model.layers), 0
    if isinstance(model, VisionEncoder):
        return list(model.encoder.layers), 0
    return [], 0


def parameters_outside(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """A model's parameters that belong to none of its blocks."""
    inner = {id(parameter) for block in blocks for parameter in block.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in inner]


def _residency(model: nn.Module) -> Residency | None:
    residency = getattr(model, _ATTRIBUTE, None)
    assert residency is None or isinstance(residency, Residency)
    return residency
