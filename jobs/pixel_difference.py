"""How far two images of one size are from each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jobs.writers import Pixels


@dataclass(frozen=True)
class PixelDifference:
    """How far an image is from another one.

    Args:
        max_difference: the largest difference of two values, of 255.
        differing: share of the values that are others.
        psnr: in decibels; None where nothing differs.
    """

    max_difference: int
    differing: float
    psnr: float | None

    def words(self) -> str:
        """For a sentence that says from what."""
        return (
            f"by up to {self.max_difference} of 255 in {self.differing:.2%} of the values, "
            f"PSNR {self.psnr or math.inf:.1f} dB"
        )


def pixel_difference(first: Pixels, second: Pixels) -> PixelDifference:
    """Compare two uint8 arrays (H, W, 3) of one shape."""
    distance = np.abs(first.astype(np.int16) - second.astype(np.int16))
    mean_square = float(np.mean(np.square(distance, dtype=np.float64)))
    return PixelDifference(
        max_difference=int(distance.max()),
        differing=float(np.mean(distance > 0)),
        psnr=10 * math.log10(255**2 / mean_square) if mean_square else None,
    )
