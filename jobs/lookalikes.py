"""Images of an output that look alike: found by what is seen, not by their bytes.

Two images are alike where the low frequencies of their brightness agree (a hash of 63 bits from
the discrete cosine transform, as pHash has it) and the colors of their 8 x 8 thumbnails too.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from jobs.parallel import ordered_map
from jobs.progress_bar import ProgressBar
from jobs.storage import Storage
from jobs.thumbnails import ImageProblemError, checked_image
from jobs.writers import decode_image

BITS = 63
_MOST_BITS = 10  # of the hash that differ between images that are alike
_MOST_COLOR = 0.08  # root mean square of the thumbnails' difference, colors in [0, 1]
RULE = (
    f"Alike are images of whose hash of brightness at most {_MOST_BITS} of {BITS} bits differ, and "
    f"whose colors, as thumbnails of 8 x 8, differ by at most {_MOST_COLOR} of 1."
)
_SIDE, _LOW, _COLORS = 32, 8, 8
_SHOWN = 96  # pixels of a shown picture
_THREADS = 4
_BLOCK = 1024  # rows compared at once

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Look:
    """How an image looks.

    Attributes:
        bits: (63,) of -1 and 1.
        colors: (192,) in [0, 1].
        picture: of at most 96 pixels a side, a WebP file.
    """

    bits: Array
    colors: Array
    picture: bytes


@dataclass(frozen=True)
class Pair:
    """An image, and the earlier one that it looks most like.

    Attributes:
        first, second: places in what was compared, `first < second`.
        bits: of the hash that differ.
        color: root mean square of the thumbnails' difference.
    """

    first: int
    second: int
    bits: int
    color: float


def look_at(pixels: npt.NDArray[np.uint8]) -> Look:
    """How an image of (H, W, 3) looks."""
    image = Image.fromarray(pixels)
    gray = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    low = _COSINES @ np.asarray(gray, np.float32) @ _COSINES.T
    flat = low.reshape(-1)[1:]  # without the mean
    # a margin, so that rounding decides nothing where there is no such frequency
    bits = np.where(flat > np.median(flat) + 1.0, 1.0, -1.0).astype(np.float32)
    small = image.resize((_COLORS, _COLORS), Image.Resampling.BOX)
    colors = np.asarray(small, np.float32).reshape(-1) / np.float32(255)
    image.thumbnail((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75)
    return Look(bits, colors, buffer.getvalue())


def look_alikes(looks: Sequence[Look]) -> list[Pair]:
    """For each image that is like an earlier one, the pair with the closest; the closest first."""
    if len(looks) < 2:
        return []
    bits = np.stack([look.bits for look in looks])
    colors = np.stack([look.colors for look in looks])
    pairs = []
    for start in range(0, len(looks), _BLOCK):
        stop = min(start + _BLOCK, len(looks))
        # the product of -1s and 1s counts bits that agree less those that do not
        differing = (BITS - bits[start:stop] @ bits[:stop].T) / 2
        for row in range(start, stop):
            near = np.flatnonzero(differing[row - start, :row] <= _MOST_BITS)
            if not near.size:
                continue
            color = np.sqrt(np.square(colors[near] - colors[row]).mean(axis=1))
            alike = color <= _MOST_COLOR
            if alike.any():
                order = np.lexsort((color[alike], differing[row - start, near[alike]]))
                best = near[alike][order[0]]
                count = round(float(differing[row - start, best]))
                pairs.append(Pair(int(best), row, count, float(color[alike][order[0]])))
    return sorted(pairs, key=lambda pair: (pair.bits, pair.color, pair.second))


def read_looks(
    storage: Storage, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[tuple[Mapping[str, Any], Look]], list[str]]:
    """Look at the images of rows.

    Args:
        rows: `ok` rows, see `checked_image`.

    Returns:
        Rows with what their images look like; and what is wrong with the other images.
    """

    def one(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], Look | str]:
        try:
            return row, look_at(decode_image(checked_image(storage, row)))
        except (ImageProblemError, OSError) as error:
            return row, f"sample {row['index']}: {error}"

    found: list[tuple[Mapping[str, Any], Look]] = []
    problems: list[str] = []
    with ProgressBar("comparing images", len(rows)) as bar:
        seen: Iterable[tuple[Mapping[str, Any], Look | str]]
        seen = ordered_map(one, rows, threads=_THREADS)
        for row, look in seen:
            bar.update()
            if isinstance(look, str):
                problems.append(look)
            else:
                found.append((row, look))
    return found, problems


def _cosines() -> Array:
    """(8, 32): the lowest frequencies of the DCT-II, orthonormal."""
    places = np.arange(_SIDE)
    waves = np.cos(np.pi * (2 * places[None] + 1) * np.arange(_LOW)[:, None] / (2 * _SIDE))
    waves *= np.sqrt(2 / _SIDE)
    waves[0] /= np.sqrt(2)
    return waves.astype(np.float32)


_COSINES = _cosines()
