"""How alike two pictures look, whatever their bytes."""

import numpy as np
from PIL import Image

_MARGIN = 8  # of 255: on a plain background neighbours differ by nothing but rounding


def difference_hash(picture: Image.Image) -> int:
    """64 bits: of 9x8 gray values, whether each is clearly darker than its right neighbour."""
    gray = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = (gray[:, :-1] + _MARGIN < gray[:, 1:]).reshape(-1)
    return int("".join("1" if bit else "0" for bit in bits), 2)


def hash_distance(one: int, other: int) -> int:
    """Bits that differ, 0 to 64."""
    return (one ^ other).bit_count()


def color_distance(one: Image.Image, other: Image.Image) -> float:
    """Root mean squared difference of the pictures' 16x16 thumbnails, colors in [0, 1]."""
    a, b = (
        np.asarray(p.convert("RGB").resize((16, 16), Image.Resampling.BOX), np.float64) / 255
        for p in (one, other)
    )
    return float(np.sqrt(np.square(a - b).mean()))
