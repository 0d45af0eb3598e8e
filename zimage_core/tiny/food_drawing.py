"""Dishes, each in one arrangement that is easy to recognise."""

from __future__ import annotations

from math import cos, pi, sin

from zimage_core.tiny.attributes import BOWL_DISHES, Food
from zimage_core.tiny.canvas import Canvas, Color, edge, shade
from zimage_core.tiny.palette import PAINT, WHITE

BREAD: Color = (226, 160, 84)
CRUST: Color = (206, 132, 58)
LETTUCE: Color = (110, 188, 66)
TOMATO: Color = (222, 60, 46)
CHEESE: Color = (255, 206, 70)
SPRINKLES = ((255, 255, 255), (250, 214, 60), (70, 150, 240), (236, 70, 90))


def draw_food(canvas: Canvas, food: Food) -> None:
    """Draw the dish, on its plate or in its bowl, over the background that is there."""
    color = PAINT[food.color] if food.color != "none" else WHITE
    if food.dish in BOWL_DISHES:
        _bowl(canvas, PAINT[food.plate])
    elif food.plate != "none":
        _plate(canvas, PAINT[food.plate])
    _DISHES[food.dish](canvas, color)


def _plate(canvas: Canvas, color: Color) -> None:
    canvas.ellipse(64, 101, 58, 19, edge(color))
    canvas.ellipse(64, 99, 57, 17.5, color)
    canvas.ellipse(64, 98.5, 42, 11.5, shade(color, 0.88) if sum(color) > 200 else (64, 64, 72))


def _bowl(canvas: Canvas, color: Color) -> None:
    line = edge(color)
    canvas.box(44, 100, 84, 116, shade(color, 0.85), radius=4, outline=line)
    canvas.chord(64, 58, 54, 54, 0, 180, line)
    canvas.chord(64, 58, 52.3, 52.3, 0, 180, color)
    canvas.ellipse(64, 58, 54, 20, color, line)


def _donut(canvas: Canvas, icing: Color) -> None:
    canvas.ellipse(64, 66, 45, 37, BREAD, edge(CRUST))
    waves = [
        (64 + (40 + 2.6 * sin(9 * a)) * cos(a), 62 + (31 + 2.6 * sin(9 * a)) * sin(a))
        for a in (2 * pi * i / 90 for i in range(90))
    ]
    canvas.polygon(waves, icing, edge(icing))
    for i in range(14):
        a = 2 * pi * i / 14
        radius = 0.62 if i % 2 else 0.82
        x, y = 64 + 40 * radius * cos(a), 62 + 31 * radius * sin(a)
        tilt = 2.4 * a
        tip = (x + 3 * cos(tilt), y + 3 * sin(tilt))
        canvas.line([(x - 3 * cos(tilt), y - 3 * sin(tilt)), tip], 2.6, SPRINKLES[i % 4])
    canvas.ellipse(64, 64, 13, 10, edge(CRUST))
    canvas.ellipse(64, 66, 11.5, 8, (96, 62, 40))


def _cupcake(canvas: Canvas, frosting: Color) -> None:
    line = edge(frosting)
    canvas.polygon([(36, 70), (92, 70), (84, 108), (44, 108)], (238, 190, 120), (140, 90, 50))
    for x in (45, 54.5, 64, 73.5, 83):
        canvas.line([(x, 72), (64 + (x - 64) * 0.74, 107)], 2, (176, 120, 66))
    for y, rx, ry in ((66, 36, 13), (51, 28, 12), (37, 18, 10)):
        canvas.ellipse(64, y, rx, ry, frosting, line)
    canvas.ellipse(64, 23, 8, 8, (216, 32, 48), (130, 16, 28))
    canvas.arc(70, 18, 8, 10, 180, 280, 1.8, (80, 120, 50))


def _ice_cream(canvas: Canvas, scoop: Color) -> None:
    canvas.polygon([(37, 60), (91, 60), (64, 122)], BREAD, edge(CRUST))
    for shift in (-18, 0, 18):
        canvas.line([(64 + shift * 1.2, 62), (64 + shift * 0.3 + 10, 98)], 1.8, CRUST)
        canvas.line([(64 + shift * 1.2, 62), (64 + shift * 0.3 - 10, 98)], 1.8, CRUST)
    line = edge(scoop)
    canvas.ellipse(64, 40, 34, 32, scoop, line)
    for x in (38, 51, 64, 77, 90):
        canvas.ellipse(x, 61, 8, 6.5, scoop, line)
    canvas.box(34, 48, 94, 60, scoop)
    canvas.ellipse(52, 28, 9, 6, shade(scoop, 1.45))


def _apple(canvas: Canvas, color: Color) -> None:
    line = edge(color)
    canvas.ellipse(48, 68, 28, 34, color, line)
    canvas.ellipse(80, 68, 28, 34, color, line)
    canvas.ellipse(64, 72, 33, 32, color)
    canvas.ellipse(45, 56, 7, 11, shade(color, 1.5))
    canvas.arc(74, 38, 12, 22, 180, 255, 4, (104, 64, 34))
    canvas.polygon([(66, 32), (78, 18), (98, 20), (88, 33), (76, 36)], LETTUCE, edge(LETTUCE))


def _pizza(canvas: Canvas, _: Color) -> None:
    canvas.polygon([(14, 34), (114, 34), (66, 116)], CHEESE, edge(CRUST))
    canvas.box(9, 22, 119, 42, CRUST, radius=10, outline=edge(CRUST))
    for x, y in ((42, 57), (80, 56), (63, 84)):
        canvas.ellipse(x, y, 11, 10, (200, 44, 38), (136, 24, 22))
    for x, y in ((60, 52), (56, 70), (74, 73)):
        canvas.ellipse(x, y, 4.5, 3, (60, 140, 50))


def _burger(canvas: Canvas, _: Color) -> None:
    canvas.box(20, 91, 108, 111, BREAD, radius=9, outline=edge(CRUST))
    canvas.box(17, 78, 111, 95, (106, 58, 34), radius=7, outline=(66, 34, 20))
    canvas.polygon([(18, 70), (110, 70), (98, 84), (82, 75), (64, 88), (46, 75)], CHEESE)
    canvas.box(18, 65, 110, 73, TOMATO, radius=4)
    for x in (22, 39, 56, 73, 90, 106):
        canvas.ellipse(x, 63, 11, 5.5, LETTUCE, edge(LETTUCE))
    canvas.chord(64, 60, 47, 41, 180, 360, edge(CRUST))
    canvas.chord(64, 59, 45.4, 39, 180, 360, BREAD)
    for x, y in ((44, 40), (58, 31), (73, 30), (86, 41), (64, 44)):
        canvas.ellipse(x, y, 3, 2, (255, 240, 208))


def _sushi(canvas: Canvas, _: Color) -> None:
    rice, fish = (248, 246, 240), (250, 128, 88)
    for x, y in ((40, 84), (90, 84)):
        canvas.ellipse(x, y + 4, 25, 19, (30, 44, 40))
        canvas.box(x - 25, y - 10, x + 25, y + 4, (30, 44, 40))
        canvas.ellipse(x, y - 10, 25, 14, (30, 44, 40))
        canvas.ellipse(x, y - 10, 21.5, 11, rice)
        canvas.ellipse(x, y - 10, 9.5, 5.5, fish if x < 64 else (120, 190, 70))
    canvas.box(26, 34, 102, 56, rice, radius=10, outline=(176, 174, 168))
    canvas.box(20, 22, 108, 46, fish, radius=11, outline=(186, 76, 44))
    for x in (38, 56, 74, 92):
        canvas.line([(x + 5, 25), (x - 5, 43)], 2.6, (255, 204, 178))


def _egg(canvas: Canvas, _: Color) -> None:
    white, line = (252, 252, 248), (190, 184, 170)
    parts = ((64, 68, 44, 31), (36, 78, 24, 20), (92, 60, 24, 22), (78, 86, 28, 18))
    for x, y, rx, ry in parts:
        canvas.ellipse(x, y, rx + 1.5, ry + 1.5, line)
    for x, y, rx, ry in parts:
        canvas.ellipse(x, y, rx, ry, white)
    canvas.ellipse(62, 65, 20, 18, (250, 182, 32), (214, 136, 14))
    canvas.ellipse(55, 58, 5.5, 4, (255, 232, 150))


def _ramen(canvas: Canvas, _: Color) -> None:
    canvas.ellipse(64, 58, 47, 15.5, (214, 140, 62))
    for y in (53, 58, 63):
        canvas.arc(50, y + 6, 22, 9, 195, 345, 2.6, (255, 228, 150))
        canvas.arc(52, y - 4, 24, 8, 15, 165, 2.6, (255, 228, 150))
    canvas.ellipse(86, 54, 15, 9.5, WHITE, (200, 196, 186))
    canvas.ellipse(86, 54, 7.5, 5, (250, 178, 44))
    canvas.line([(30, 48), (98, 8)], 3.4, (150, 88, 46))
    canvas.line([(42, 46), (110, 14)], 3.4, (150, 88, 46))
    for x, y in ((60, 67), (72, 68), (46, 48)):
        canvas.ellipse(x, y, 3.6, 2.4, (90, 176, 60))


def _soup(canvas: Canvas, color: Color) -> None:
    canvas.ellipse(64, 58, 47, 15.5, color)
    canvas.arc(62, 58, 24, 7, 20, 330, 3, (255, 244, 220))
    canvas.ellipse(64, 57, 5, 3, (76, 160, 60))
    for x in (44, 64, 84):
        canvas.arc(x - 4, 28, 5, 7, 270, 90, 2.6, (214, 216, 222))
        canvas.arc(x - 4, 14, 5, 7, 90, 270, 2.6, (214, 216, 222))


def _tacos(canvas: Canvas, _: Color) -> None:
    shell, line = (244, 196, 92), (176, 122, 40)
    for x, y in ((76, 82), (52, 92)):
        canvas.chord(x, y, 44, 50, 180, 360, (196, 142, 54))
        for i in range(6):
            a = pi + pi * (i + 0.5) / 6
            filling = (LETTUCE, TOMATO, (130, 74, 42))[i % 3]
            canvas.ellipse(x + 37 * cos(a), y + 42 * sin(a), 9, 8, filling, edge(filling))
        canvas.chord(x, y + 4, 40, 42, 180, 360, line)
        canvas.chord(x, y + 3, 38.4, 40, 180, 360, shell)


def _pancakes(canvas: Canvas, _: Color) -> None:
    for y in (94, 82, 70, 58):
        canvas.ellipse(64, y, 43, 15, (190, 118, 52), (130, 76, 30))
        canvas.ellipse(64, y - 2, 40, 12, (236, 178, 94))
    syrup = (146, 66, 22)
    canvas.ellipse(64, 55, 32, 9, syrup)
    for x, length in ((40, 24), (58, 36), (84, 28)):
        canvas.line([(x, 56), (x, 56 + length)], 7, syrup)
    canvas.polygon([(52, 46), (66, 41), (79, 46), (66, 52)], (255, 232, 120), (200, 160, 50))
    canvas.polygon([(52, 46), (66, 52), (66, 58), (52, 52)], (246, 212, 88))
    canvas.polygon([(79, 46), (66, 52), (66, 58), (79, 52)], (226, 190, 70))


def _cake(canvas: Canvas, frosting: Color) -> None:
    line = edge(frosting)
    canvas.polygon([(18, 58), (100, 58), (100, 106), (18, 106)], (240, 200, 136), line)
    canvas.box(18, 76, 100, 84, shade(frosting, 0.92))
    canvas.polygon([(100, 58), (114, 46), (114, 94), (100, 106)], shade(frosting, 0.8), line)
    canvas.polygon([(18, 58), (58, 32), (114, 46), (100, 60), (18, 64)], frosting, line)
    canvas.box(17, 56, 101, 66, frosting, radius=4, outline=line)
    for x in (30, 50, 70, 90):
        canvas.ellipse(x, 66, 7, 7, frosting)
    canvas.ellipse(72, 36, 11, 11, (222, 40, 52), (136, 18, 30))
    canvas.polygon([(62, 28), (72, 31), (82, 28), (78, 21), (72, 25), (66, 21)], LETTUCE)


def _macarons(canvas: Canvas, color: Color) -> None:
    for x, y in ((38, 90), (90, 90), (64, 50)):
        line = edge(color)
        canvas.ellipse(x, y + 9, 25, 13, color, line)
        canvas.box(x - 23, y - 1, x + 23, y + 8, shade(color, 1.65), outline=line)
        for i in range(6):
            canvas.ellipse(x - 21 + 8.4 * i, y + 0.5, 4.4, 3.2, shade(color, 0.86), line)
        canvas.chord(x, y + 1, 26, 23, 180, 360, line)
        canvas.chord(x, y, 24.4, 21, 180, 360, color)
        canvas.ellipse(x - 9, y - 12, 5, 3, shade(color, 1.5))


_DISHES = {
    "donut": _donut,
    "cupcake": _cupcake,
    "ice cream": _ice_cream,
    "apple": _apple,
    "soup": _soup,
    "cake": _cake,
    "macarons": _macarons,
    "pizza": _pizza,
    "burger": _burger,
    "sushi": _sushi,
    "egg": _egg,
    "ramen": _ramen,
    "tacos": _tacos,
    "pancakes": _pancakes,
}
