"""The sizes of a picture to edit: what may be one, and in which sizes it is encoded.

As in diffusers' `ZImageOmniPipeline`: a picture of more than 1024 * 1024 pixels is made smaller,
whole, and seen so; of that the autoencoder gets the middle, its sides whole numbers of patches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

MIN_SIDE = 64
"""Pixels of a picture's shorter side, at least."""
MAX_ASPECT = 8
"""Of the longer side to the shorter one, at most."""
MAX_AREA = 1024 * 1024
"""Pixels of a picture; a larger one is resized."""

Size = tuple[int, int]


class PictureSizes(NamedTuple):
    """Width and height of a picture, as its two encoders take it."""

    seen: Size
    """What the vision encoder is shown."""
    cropped: Size
    """What the autoencoder encodes."""


def picture_sizes(
    width: int, height: int, *, multiple: int, area: int | None = None
) -> PictureSizes:
    """Say in which sizes a picture is encoded.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        multiple: of what the sides are encoded in, `ZImagePipeline.size_multiple`.
        area: pixels to which a picture of more than `MAX_AREA` is resized; None is `MAX_AREA`.

    Raises:
        ValueError: it has a side below `MIN_SIDE`, is longer than `MAX_ASPECT` allows, or nothing
            would be left of it at that area.
    """
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"a picture of {width} x {height}; allowed: {MIN_SIDE} pixels or more a side"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"a picture of {width} x {height}; allowed: one side at most {MAX_ASPECT} times the "
            "other"
        )
    seen = width, height
    if width * height > MAX_AREA:
        scale = math.sqrt((area or MAX_AREA) / (width * height))
        seen = int(width * scale), int(height * scale)
        if min(seen) < multiple:
            raise ValueError(
                f"a picture of {width} x {height} would become {seen[0]} x {seen[1]}, the area of "
                f"the result; allowed: {multiple} pixels or more a side"
            )
    return PictureSizes(seen, (seen[0] // multiple * multiple, seen[1] // multiple * multiple))
