"""The drawing world: a picture for the attributes of a subject, and a background behind it.

`draw(subject)` is a pure function: the same subject and jitter give the same pixels.
"""

from __future__ import annotations

from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zimage_core.tiny.attributes import Avatar, Food, Subject
from zimage_core.tiny.avatar_drawing import draw_avatar
from zimage_core.tiny.canvas import Canvas, Jitter
from zimage_core.tiny.food_drawing import draw_food
from zimage_core.tiny.item_drawing import draw_item
from zimage_core.tiny.palette import BACKGROUND
from zimage_core.tiny.scenery import draw_dungeon, draw_night, draw_park, draw_table

SIZE = 128
MAX_SHIFT = 2.0
MAX_TINT = 5

_SCENES = {
    "park": draw_park,
    "table": draw_table,
    "dungeon": draw_dungeon,
    "night": draw_night,
}


def draw(
    subject: Subject, jitter: Jitter | None = None, *, size: int = SIZE, supersampling: int = 4
) -> Image.Image:
    """Draw a subject.

    Args:
        subject: what is seen.
        jitter: a small shift and tint; none is the drawing as it was designed.
        size: pixels of a side.
        supersampling: pixels averaged to one along each side; less is faster and coarser.

    Returns:
        RGB, size by size.
    """
    canvas = Canvas(size, supersampling, jitter or Jitter())
    scene = _SCENES.get(subject.background)
    if scene is None:
        canvas.fill(BACKGROUND[subject.background])
    else:
        scene(canvas)
    if isinstance(subject, Avatar):
        draw_avatar(canvas, subject)
    elif isinstance(subject, Food):
        draw_food(canvas, subject)
    else:
        draw_item(canvas, subject)
    return canvas.picture()


def draw_array(
    subject: Subject, jitter: Jitter | None = None, *, size: int = SIZE, supersampling: int = 4
) -> NDArray[np.uint8]:
    """As `draw`, as an array (size, size, 3) of uint8."""
    return np.asarray(draw(subject, jitter, size=size, supersampling=supersampling))


def draw_jitter(random: Random) -> Jitter:
    """A small shift and tint."""
    return Jitter(
        dx=random.uniform(-MAX_SHIFT, MAX_SHIFT),
        dy=random.uniform(-MAX_SHIFT, MAX_SHIFT),
        tint=(
            random.randint(-MAX_TINT, MAX_TINT),
            random.randint(-MAX_TINT, MAX_TINT),
            random.randint(-MAX_TINT, MAX_TINT),
        ),
    )
