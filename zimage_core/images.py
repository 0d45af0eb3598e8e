"""From decoded tensors to pixels: uint8 arrays and PIL images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def from_signed(images: Tensor) -> Tensor:
    """Map what the autoencoder decodes, (B, 3, H, W) in about [-1, 1], to float32 in [0, 1]."""
    return (images.float() * 0.5 + 0.5).clamp(0.0, 1.0)


def to_float(images: Tensor) -> NDArray[np.float32]:
    """Bring (B, 3, H, W) in [0, 1] to the host as float32, (B, H, W, 3)."""
    array: NDArray[np.float32] = images.float().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Quantise (B, 3, H, W) in [0, 1] to 8-bit RGB, (B, H, W, 3), halves rounded to even.

    Works on the device of `images`, so a quarter of the bytes travel to the host. NaN has no 8-bit
    value: test for it before.
    """
    scaled = (images.float() * 255.0).round().to(torch.uint8)
    array: NDArray[np.uint8] = scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array


def to_pil(images: Tensor) -> list[Image]:
    """Turn (B, 3, H, W) in [0, 1] into B RGB images."""
    from PIL import Image as PilImage

    return [PilImage.fromarray(array) for array in to_uint8(images)]
