"""An anti-aliased canvas in units of one 128th of the picture's side.

Shapes are drawn by Pillow at several times the size and averaged down once at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Point = tuple[float, float]

UNITS = 128
OUTLINE = 1.5
"""Width of a shape's outline."""


@dataclass(frozen=True)
class Jitter:
    """How a drawing differs from another one of the same attributes.

    Attributes:
        dx: shift to the right, in units.
        dy: shift downwards, in units.
        tint: added to red, green and blue of every color.
    """

    dx: float = 0.0
    dy: float = 0.0
    tint: Color = (0, 0, 0)


def shade(color: Color, factor: float) -> Color:
    """Darken a color (factor below 1), or lighten it towards white (above 1)."""
    if factor <= 1:
        red, green, blue = (round(value * factor) for value in color)
    else:
        red, green, blue = (round(value + (255 - value) * (factor - 1)) for value in color)
    return red, green, blue


def edge(color: Color) -> Color:
    """The color of the outline of a shape: a darker one of its own kind."""
    return shade(color, 0.55) if sum(color) > 150 else shade(color, 1.22)


class Canvas:
    """A square picture.

    Args:
        size: pixels of a side of the result.
        supersampling: pixels that are averaged to one, along each side.
        jitter: shift and tint of all that is drawn (the shift leaves fills of the whole alone).
    """

    def __init__(self, size: int, supersampling: int, jitter: Jitter) -> None:
        self._supersampling = supersampling
        self._scale = size * supersampling / UNITS
        self._jitter = jitter
        side = size * supersampling
        self._image = Image.new("RGB", (side, side))
        self._draw = ImageDraw.Draw(self._image)

    def picture(self) -> Image.Image:
        """The finished picture, RGB."""
        return self._image.reduce(self._supersampling)

    def fill(self, color: Color) -> None:
        """Paint everything."""
        side = self._image.width
        self._draw.rectangle((0, 0, side, side), fill=self._tinted(color))

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, color: Color, outline: Color | None = None
    ) -> None:
        """An ellipse around (x, y)."""
        if outline is not None:
            self._draw.ellipse(self._box(x, y, rx, ry), fill=self._tinted(outline))
            rx, ry = rx - OUTLINE, ry - OUTLINE
        self._draw.ellipse(self._box(x, y, rx, ry), fill=self._tinted(color))

    def ring(self, x: float, y: float, rx: float, ry: float, width: float, color: Color) -> None:
        """The line of an ellipse."""
        self._draw.ellipse(
            self._box(x, y, rx, ry), outline=self._tinted(color), width=self._length(width)
        )

    def arc(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        start: float,
        end: float,
        width: float,
        color: Color,
    ) -> None:
        """A part of the line of an ellipse; angles in degrees, clockwise from the right."""
        box = self._box(x, y, rx, ry)
        self._draw.arc(box, start, end, fill=self._tinted(color), width=self._length(width))

    def pie(
        self, x: float, y: float, rx: float, ry: float, start: float, end: float, color: Color
    ) -> None:
        """The part of an ellipse between two angles, to its center."""
        self._draw.pieslice(self._box(x, y, rx, ry), start, end, fill=self._tinted(color))

    def chord(
        self, x: float, y: float, rx: float, ry: float, start: float, end: float, color: Color
    ) -> None:
        """The part of an ellipse between two angles, cut off straight."""
        self._draw.chord(self._box(x, y, rx, ry), start, end, fill=self._tinted(color))

    def box(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        color: Color,
        *,
        radius: float = 0.0,
        outline: Color | None = None,
    ) -> None:
        """A rectangle, its corners rounded by `radius`."""
        corners = (*self._point((left, top)), *self._point((right, bottom)))
        if right <= left or bottom <= top:
            raise ValueError(f"box from {left}, {top} to {right}, {bottom} has no inside")
        self._draw.rounded_rectangle(
            corners,
            radius * self._scale,
            fill=self._tinted(color),
            outline=None if outline is None else self._tinted(outline),
            width=0 if outline is None else self._length(OUTLINE),
        )

    def polygon(self, points: Sequence[Point], color: Color, outline: Color | None = None) -> None:
        """A closed shape."""
        corners = [self._point(point) for point in points]
        self._draw.polygon(corners, fill=self._tinted(color))
        if outline is not None:
            self.line([*points, points[0], points[1]], OUTLINE, outline)

    def line(self, points: Sequence[Point], width: float, color: Color) -> None:
        """A line with round ends and joints."""
        corners = [self._point(point) for point in points]
        pen, tinted = self._length(width), self._tinted(color)
        self._draw.line(corners, fill=tinted, width=pen, joint="curve")
        for x, y in (corners[0], corners[-1]):
            r = pen / 2
            self._draw.ellipse((x - r, y - r, x + r, y + r), fill=tinted)

    def _point(self, point: Point) -> Point:
        return (
            (point[0] + self._jitter.dx) * self._scale,
            (point[1] + self._jitter.dy) * self._scale,
        )

    def _box(self, x: float, y: float, rx: float, ry: float) -> tuple[float, float, float, float]:
        return (*self._point((x - rx, y - ry)), *self._point((x + rx, y + ry)))

    def _length(self, width: float) -> int:
        return max(1, round(width * self._scale))

    def _tinted(self, color: Color) -> Color:
        red, green, blue = (
            min(255, max(0, value + tint))
            for value, tint in zip(color, self._jitter.tint, strict=True)
        )
        return red, green, blue
