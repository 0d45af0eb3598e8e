"""Pieces of a game's inventory, each in one view, and the effects around them."""

from __future__ import annotations

from math import cos, pi, sin

from zimage_core.tiny.attributes import GameItem
from zimage_core.tiny.canvas import Canvas, Color, Point, edge, shade
from zimage_core.tiny.palette import BACKGROUND, DARK, PAINT, WHITE

WOOD: Color = (146, 92, 52)
GOLD: Color = (240, 190, 60)
STEEL: Color = (196, 204, 214)
CORNERS: tuple[Point, ...] = ((15, 22), (112, 18), (16, 106), (113, 108), (10, 64), (118, 62))


def draw_item(canvas: Canvas, item: GameItem) -> None:
    """Draw the item and its effect over the background that is there."""
    if item.effect == "glow":
        _glow(canvas, item.background)
    elif item.effect == "fire":
        _fire(canvas)
    _ITEMS[item.item](canvas, PAINT[item.color])
    if item.effect == "sparks":
        for i, corner in enumerate(CORNERS):
            _spark(canvas, corner, 11 if i < 4 else 8)


def _glow(canvas: Canvas, background: str) -> None:
    base = BACKGROUND.get(background, (60, 58, 84))
    # On light backgrounds light alone would not show: the halo is warm.
    halo = (255, 236, 130)
    for radius, strength in ((60, 0.35), (53, 0.65), (46, 1.0)):
        red, green, blue = (round(b + (h - b) * strength) for b, h in zip(base, halo, strict=True))
        canvas.ellipse(64, 64, radius, radius, (red, green, blue))


def _fire(canvas: Canvas) -> None:
    for scale, color in ((1.0, (226, 62, 26)), (0.78, (255, 150, 40)), (0.54, (255, 226, 110))):
        points: list[Point] = [(64 - 58 * scale, 128)]
        tips = ((-50, 30), (-36, 66), (-24, 8), (-10, 48), (2, 0), (14, 48), (26, 10))
        for x, y in (*tips, (38, 66), (50, 32)):
            points.append((64 + x * scale, 128 - (128 - y) * scale * 0.97))
        canvas.polygon([*points, (64 + 58 * scale, 128), (64, 134)], color)


def _spark(canvas: Canvas, at: Point, size: float) -> None:
    x, y = at
    star: list[Point] = []
    for i in range(8):
        radius = size if i % 2 == 0 else size * 0.32
        star.append((x + radius * sin(pi * i / 4), y - radius * cos(pi * i / 4)))
    canvas.polygon(star, (255, 232, 90), (190, 140, 20))


def _sword(canvas: Canvas, color: Color) -> None:
    canvas.polygon([(53, 80), (53, 22), (64, 5), (75, 22), (75, 80)], color, edge(color))
    canvas.polygon([(64, 8), (73.5, 23), (73.5, 80), (64, 80)], shade(color, 0.78))
    canvas.box(33, 77, 95, 88, GOLD, radius=5, outline=edge(GOLD))
    canvas.box(57, 88, 71, 110, WOOD, outline=edge(WOOD))
    canvas.ellipse(64, 114, 9, 8, GOLD, edge(GOLD))


def _shield(canvas: Canvas, color: Color) -> None:
    def outline(scale: float) -> list[Point]:
        half = [(0, -50), (22, -44), (44, -44), (44, 0), (36, 24), (20, 42), (0, 54)]
        whole = half + [(-x, y) for x, y in half[-2:0:-1]]
        return [(64 + x * scale, 62 + y * scale) for x, y in whole]

    canvas.polygon(outline(1.0), STEEL, edge(STEEL))
    canvas.polygon(outline(0.84), color, edge(color))
    canvas.box(58, 26, 70, 100, shade(WHITE, 0.95))
    canvas.box(30, 50, 98, 62, shade(WHITE, 0.95))
    canvas.ellipse(64, 56, 11, 11, GOLD, edge(GOLD))


def _potion(canvas: Canvas, color: Color) -> None:
    glass, line = (226, 240, 248), (96, 116, 132)
    canvas.box(54, 14, 74, 28, WOOD, radius=3, outline=edge(WOOD))
    canvas.box(53, 26, 75, 56, glass, outline=line)
    canvas.ellipse(64, 78, 39, 37, glass, line)
    canvas.box(54.5, 30, 73.5, 54, glass)
    canvas.chord(64, 78, 34.5, 32.5, -14, 194, color)
    canvas.ellipse(64, 70.5, 33.5, 5, shade(color, 1.35))
    for x, y, r in ((52, 86, 4), (70, 92, 5), (76, 80, 3)):
        canvas.ellipse(x, y, r, r, shade(color, 1.45))
    canvas.arc(64, 78, 31, 29, 150, 210, 3.4, WHITE)


def _gem(canvas: Canvas, color: Color) -> None:
    top, mid, low = 28.0, 52.0, 108.0
    canvas.polygon([(36, top), (92, top), (114, mid), (64, low), (14, mid)], color, edge(color))
    canvas.polygon([(36, top), (48, mid), (14, mid)], shade(color, 1.3))
    canvas.polygon([(36, top), (92, top), (80, mid), (48, mid)], shade(color, 1.5))
    canvas.polygon([(92, top), (114, mid), (80, mid)], shade(color, 0.88))
    canvas.polygon([(14, mid), (48, mid), (64, low)], shade(color, 0.92))
    canvas.polygon([(80, mid), (114, mid), (64, low)], shade(color, 0.7))
    outline = [(36, top), (92, top), (114, mid), (64, low), (14, mid), (36, top), (92, top)]
    canvas.line(outline, 1.8, edge(color))


def _coin(canvas: Canvas, color: Color) -> None:
    canvas.ellipse(67, 67, 46, 46, shade(color, 0.6) if sum(color) > 200 else (90, 90, 98))
    canvas.ellipse(63, 64, 46, 46, color, edge(color))
    canvas.ring(63, 64, 37, 37, 3, edge(color))
    star: list[Point] = []
    for i in range(10):
        radius = 26 if i % 2 == 0 else 11
        star.append((63 + radius * sin(pi * i / 5), 66 - radius * cos(pi * i / 5)))
    canvas.polygon(star, shade(color, 1.55), edge(color))


def _heart(canvas: Canvas, color: Color) -> None:
    points: list[Point] = []
    for i in range(60):
        a = 2 * pi * i / 60
        x = 16 * sin(a) ** 3
        y = 13 * cos(a) - 5 * cos(2 * a) - 2 * cos(3 * a) - cos(4 * a)
        points.append((64 + 3 * x, 60 - 3 * y))
    canvas.polygon(points, color, edge(color))
    canvas.line([*points, points[0]], 2.2, edge(color))
    canvas.ellipse(42, 42, 10, 7, shade(color, 1.6))


def _slime(canvas: Canvas, color: Color) -> None:
    line = edge(color)
    canvas.chord(64, 96, 49, 70, 180, 360, line)
    canvas.chord(64, 95.5, 47.4, 68, 180, 360, color)
    canvas.box(15, 92, 113, 110, color, radius=9, outline=line)
    canvas.box(17, 84, 111, 100, color)
    canvas.ellipse(42, 50, 9, 6, shade(color, 1.6))
    for x in (46, 82):
        canvas.ellipse(x, 76, 9.5, 11, WHITE)
        canvas.ellipse(x, 78, 5, 6, DARK)
    canvas.arc(64, 88, 11, 8, 15, 165, 3, DARK)


def _controller(canvas: Canvas, color: Color) -> None:
    line = edge(color)
    for side in (-1, 1):
        canvas.ellipse(64 + side * 37, 78, 22, 30, color, line)
    canvas.box(24, 38, 104, 84, color, radius=20, outline=line)
    for side in (-1, 1):
        canvas.ellipse(64 + side * 37, 77, 20, 27, color)
    dark = (40, 40, 46) if sum(color) > 200 else (150, 150, 158)
    canvas.box(30, 56, 54, 63, dark, radius=1.5)
    canvas.box(38.5, 47.5, 45.5, 71.5, dark, radius=1.5)
    for x, y, button in (
        (88, 49, (250, 210, 60)),
        (88, 70, (90, 200, 90)),
        (77.5, 59.5, (90, 150, 250)),
        (98.5, 59.5, (240, 80, 80)),
    ):
        canvas.ellipse(x, y, 5.4, 5.4, button, dark)
    for x in (53, 75):
        canvas.ellipse(x, 80, 8, 8, dark)


def _staff(canvas: Canvas, color: Color) -> None:
    for width, paint in ((9.6, edge(WOOD)), (6.6, WOOD)):
        canvas.line([(22, 124), (74, 54)], width, paint)
        canvas.arc(86, 38, 29, 29, 20, 150, width, paint)
        canvas.arc(86, 38, 29, 29, 150, 235, width * 0.8, paint)
    canvas.line([(44, 94), (52, 84)], 9, GOLD)
    canvas.ellipse(87, 34, 20, 20, color, edge(color))
    canvas.ellipse(80, 27, 6, 5.5, shade(color, 1.65))


def _helmet(canvas: Canvas, color: Color) -> None:
    line = edge(color)
    canvas.polygon(
        [(64, 30), (58, 6), (80, 10), (104, 30), (96, 44), (84, 28)], (214, 44, 44), (120, 20, 24)
    )
    canvas.chord(64, 64, 43, 44, 180, 360, line)
    canvas.chord(64, 63.5, 41.4, 42, 180, 360, color)
    canvas.box(21, 60, 107, 112, color, radius=10, outline=line)
    canvas.box(22.6, 54, 105.4, 70, color)
    canvas.box(30, 62, 98, 74, DARK if sum(color) > 200 else (120, 120, 128), radius=3)
    canvas.box(59, 62, 69, 108, shade(color, 0.82) if sum(color) > 200 else (74, 74, 82))
    for x in (38, 48, 80, 90):
        canvas.line([(x, 84), (x, 102)], 3.4, line)


def _ring(canvas: Canvas, color: Color) -> None:
    canvas.ring(64, 80, 35, 35, 10, edge(GOLD))
    canvas.ring(64, 80, 33.6, 33.6, 7.2, GOLD)
    points = [(46, 14), (82, 14), (95, 29), (64, 58), (33, 29)]
    canvas.polygon(points, color, edge(color))
    canvas.polygon([(46, 14), (82, 14), (76, 29), (52, 29)], shade(color, 1.45))
    canvas.polygon([(76, 29), (95, 29), (64, 58)], shade(color, 0.75))
    canvas.line([*points, points[0], points[1]], 1.8, edge(color))


def _chest(canvas: Canvas, color: Color) -> None:
    line = edge(color)
    canvas.box(16, 26, 112, 80, color, radius=24, outline=line)
    canvas.box(16, 58, 112, 108, shade(color, 0.88), radius=4, outline=line)
    for x in (28, 100):
        canvas.box(x - 6, 28, x + 6, 107, GOLD, outline=edge(GOLD))
    canvas.box(14, 55, 114, 64, GOLD, radius=2, outline=edge(GOLD))
    canvas.box(53, 50, 75, 76, GOLD, radius=4, outline=edge(GOLD))
    canvas.ellipse(64, 61, 4, 4, DARK)
    canvas.line([(64, 61), (64, 70)], 3.4, DARK)


def _key(canvas: Canvas, color: Color) -> None:
    line = edge(color)
    for width, paint in ((12.0, line), (9.0, color)):
        canvas.line([(64, 58), (64, 116)], width, paint)
        canvas.line([(64, 97), (82, 97)], width, paint)
        canvas.line([(64, 113), (86, 113)], width, paint)
    canvas.ring(64, 36, 27, 27, 12, line)
    canvas.ring(64, 36, 25.4, 25.4, 8.8, color)


def _axe(canvas: Canvas, color: Color) -> None:
    canvas.line([(58, 122), (58, 10)], 10, edge(WOOD))
    canvas.line([(58, 122), (58, 10)], 7, WOOD)
    blade: list[Point] = [(54, 30), (80, 26), (104, 8), (114, 40), (104, 74), (80, 54), (54, 50)]
    canvas.polygon(blade, color, edge(color))
    sharp: list[Point] = [(98, 14), (104, 8), (114, 40), (104, 74), (98, 68), (104, 40)]
    canvas.polygon(sharp, shade(STEEL, 1.4))
    canvas.line([*blade, blade[0], blade[1]], 1.8, edge(color))
    canvas.polygon([(54, 34), (38, 30), (38, 50), (54, 46)], color, edge(color))


_ITEMS = {
    "sword": _sword,
    "shield": _shield,
    "potion": _potion,
    "gem": _gem,
    "coin": _coin,
    "heart": _heart,
    "slime": _slime,
    "controller": _controller,
    "staff": _staff,
    "helmet": _helmet,
    "ring": _ring,
    "chest": _chest,
    "key": _key,
    "axe": _axe,
}
