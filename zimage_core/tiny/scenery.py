"""Backgrounds that are places. They fill the canvas and stay where they are under jitter's shift.

Shapes reach beyond the picture's sides, so that a shift opens no gap.
"""

from __future__ import annotations

from zimage_core.tiny.canvas import Canvas, shade
from zimage_core.tiny.palette import WHITE


def draw_park(canvas: Canvas) -> None:
    """Sky with a sun, and grass."""
    canvas.fill((150, 212, 250))
    canvas.ellipse(14, 14, 13, 13, (255, 224, 84))
    canvas.ellipse(104, 22, 18, 7, WHITE)
    canvas.ellipse(112, 17, 10, 7, WHITE)
    canvas.ellipse(16, 104, 60, 40, (92, 180, 84))
    canvas.ellipse(112, 108, 60, 40, (70, 158, 70))


def draw_table(canvas: Canvas) -> None:
    """A wooden table before a light wall."""
    canvas.fill((244, 228, 204))
    wood = (176, 116, 66)
    canvas.box(-10, 78, 138, 140, wood)
    for y in (78, 95, 112):
        canvas.line([(-10, y), (138, y)], 2, shade(wood, 0.75))


def draw_dungeon(canvas: Canvas) -> None:
    """A wall of large stones with a torch on each side."""
    stone = (82, 80, 88)
    canvas.fill(stone)
    for y in range(-2, 140, 26):
        canvas.line([(-10, y), (138, y)], 2.4, shade(stone, 0.62))
        start = -20 if (y + 2) // 26 % 2 else 0
        for x in range(start, 150, 42):
            canvas.line([(x, y), (x, y + 26)], 2.4, shade(stone, 0.62))
    for x in (11, 117):
        canvas.box(x - 2.5, 34, x + 2.5, 56, (110, 70, 40))
        canvas.ellipse(x, 26, 7, 11, (255, 150, 40))
        canvas.ellipse(x, 29, 3.5, 6, (255, 226, 110))


def draw_night(canvas: Canvas) -> None:
    """A dark sky with stars and a moon."""
    sky = (22, 24, 62)
    canvas.fill(sky)
    canvas.ellipse(108, 20, 12, 12, (250, 240, 190))
    canvas.ellipse(103, 17, 10, 10, sky)
    for x, y in ((14, 16), (34, 8), (10, 60), (118, 62), (20, 112), (110, 110), (62, 6), (8, 90)):
        canvas.ellipse(x, y, 2.2, 2.2, (255, 250, 210))
