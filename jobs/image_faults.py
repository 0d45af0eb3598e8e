"""Decoded tensors to pixels, and which of them are no images.

Looked for in the tensor, before conversion: NaN has no 8-bit value, and what it becomes depends on
the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.writers import Pixels
from zimage_core.images import quantise
from zimage_core.transfer import HostCopy


@dataclass(frozen=True, slots=True)
class ImageFault:
    """Why what was decoded is no image."""

    message: str


def to_pixels(decoded: Tensor) -> list[Pixels | ImageFault]:
    """Convert (B, 3, H, W) in [0, 1] to pixels, as `ComingPixels.wait` gives them."""
    return ComingPixels(decoded).wait()


class ComingPixels:
    """Decoded images on their way to the host, as 8-bit pixels.

    Args:
        decoded: (B, 3, H, W) in [0, 1]. What there is to find out is asked of its device, which
            nothing waits for.
    """

    def __init__(self, decoded: Tensor) -> None:
        finite = torch.isfinite(decoded).flatten(1).all(1)
        safe = torch.nan_to_num(decoded)
        pixels = quantise(safe)
        flat = (pixels == pixels[:, :1, :1]).flatten(1).all(1)
        self._copies = [HostCopy(tensor) for tensor in (pixels, finite, flat)]

    def wait(self) -> list[Pixels | ImageFault]:
        """B arrays uint8 (H, W, 3), or what is wrong with them.

        An image is flat where all its pixels get one and the same 8-bit colour.
        """
        pixels, finite, flat = (copy.wait() for copy in self._copies)
        images: list[Pixels | ImageFault] = []
        for image, is_finite, is_flat in zip(
            pixels.numpy(), finite.tolist(), flat.tolist(), strict=True
        ):
            if not is_finite:
                images.append(ImageFault("the decoded image has values that are not finite"))
            elif is_flat:
                colour = tuple(image[0, 0].tolist())
                images.append(ImageFault(f"the image is of one flat colour, rgb{colour}"))
            else:
                images.append(image)
        return images
