"""Decoded tensors to pixels, and which of them are no images.

Looked for in the tensor, before conversion: NaN has no 8-bit value, and what it becomes depends on
the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.writers import Pixels
from zimage_core.images import to_uint8


@dataclass(frozen=True, slots=True)
class ImageFault:
    """Why what was decoded is no image."""

    message: str


def to_pixels(decoded: Tensor) -> list[Pixels | ImageFault]:
    """Convert (B, 3, H, W) in [0, 1] to B arrays uint8 (H, W, 3), or what is wrong with them.

    An image is flat where all its pixels would get one and the same 8-bit colour.
    """
    finite = torch.isfinite(decoded).flatten(1).all(1)
    safe = torch.nan_to_num(decoded)
    steps = (safe.float() * 255.0).round()
    flat = (steps == steps[:, :, :1, :1]).flatten(1).all(1)
    images: list[Pixels | ImageFault] = []
    for image, is_finite, is_flat in zip(
        to_uint8(safe), finite.tolist(), flat.tolist(), strict=True
    ):
        if not is_finite:
            images.append(ImageFault("the decoded image has values that are not finite"))
        elif is_flat:
            colour = tuple(image[0, 0].tolist())
            images.append(ImageFault(f"the image is of one flat colour, rgb{colour}"))
        else:
            images.append(image)
    return images
