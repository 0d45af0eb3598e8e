"""Portraits of invented adults, drawn from the back to the front."""

from __future__ import annotations

from math import cos, pi, sin

from zimage_core.tiny.attributes import COVERING_HATS, Avatar
from zimage_core.tiny.canvas import Canvas, Color, Point, edge, shade
from zimage_core.tiny.palette import (
    DARK,
    EYE_COLORS,
    HAIR_COLORS,
    LIPS,
    PAINT,
    SKIN_COLORS,
    TONGUE,
    WHITE,
)

# The face: everything else is placed around it.
X, Y, RX, RY = 64.0, 63.0, 28.0, 31.0
EYE_Y, EYE_DX = 60.0, 13.0
MOUTH_Y = 80.0


def draw_avatar(canvas: Canvas, avatar: Avatar) -> None:
    """Draw the person over the background that the canvas has already."""
    skin, hair = SKIN_COLORS[avatar.skin], HAIR_COLORS[avatar.hair_color]
    style = _visible_style(avatar)
    _back_hair(canvas, style, hair, avatar.hat)
    _clothes(canvas, avatar.clothes, PAINT[avatar.clothes_color], skin)
    if style == "braids":
        _braids(canvas, hair)
    for side in (-1, 1):
        canvas.ellipse(X + side * RX, Y + 2, 5.5, 7, skin, edge(skin))
    canvas.ellipse(X, Y, RX, RY, skin, edge(skin))
    canvas.ellipse(X, Y - 1, RX - 3, RY - 4, skin)
    _front_hair(canvas, style, hair)
    _beard(canvas, avatar.beard, hair)
    _mouth(canvas, avatar)
    _eyes(canvas, avatar, hair)
    canvas.arc(X, Y + 5, 3.5, 3.5, 20, 160, 2, shade(skin, 0.68))
    _glasses(canvas, avatar.glasses)
    if avatar.hat != "none":
        _hat(canvas, avatar.hat, PAINT[avatar.hat_color])


def _visible_style(avatar: Avatar) -> str:
    """What stands on top of the head does not fit under a hat."""
    under_a_hat = avatar.hat in COVERING_HATS
    if under_a_hat and avatar.hair_style in {"spiky", "bun"}:
        return "short"
    return "bald" if under_a_hat and avatar.hair_style == "mohawk" else avatar.hair_style


def _back_hair(canvas: Canvas, style: str, hair: Color, hat: str) -> None:
    line = edge(hair)
    if style == "long":
        canvas.ellipse(X, 58, 37, 40, hair, line)
        canvas.box(27, 58, 101, 122, hair, radius=12, outline=line)
        canvas.box(28.5, 50, 99.5, 90, hair)
    elif style == "bob":
        canvas.ellipse(X, 60, 37, 37, hair, line)
        canvas.box(27, 58, 101, 94, hair, radius=7, outline=line)
        canvas.box(28.5, 52, 99.5, 80, hair)
    elif style == "afro":
        canvas.ellipse(X, 48, 46, 43, hair, line)
    elif style == "curly":
        circle = [(X + 33 * sin(a), 58 - 31 * cos(a)) for a in _angles(-2.35, 2.35, 13)]
        for x, y in circle:
            canvas.ellipse(x, y, 10.5, 10.5, line)
        for x, y in circle:
            canvas.ellipse(x, y, 9, 9, hair)
    elif style == "bun":
        canvas.ellipse(X, 20, 14, 12.5, hair, line)
    elif style == "spiky":
        points: list[Point] = []
        for i, a in enumerate(_angles(-1.65, 1.65, 15)):
            radius = 46 if i % 2 else 31
            points.append((X + radius * sin(a) * 0.86, 60 - radius * cos(a)))
        canvas.polygon([(X, 70), *points], hair, line)
    elif style == "mohawk":
        canvas.polygon(
            [
                (53, 44),
                (49, 10),
                (56.5, 17),
                (60, 5),
                (64, 13),
                (68, 5),
                (71.5, 17),
                (79, 10),
                (75, 44),
            ],
            hair,
            line,
        )
    elif style == "braids" and hat not in COVERING_HATS:
        canvas.ellipse(X, 56, 33, 31, hair, line)


def _front_hair(canvas: Canvas, style: str, hair: Color) -> None:
    """Hair over the forehead: the top of an ellipse around the head, down to a hairline."""
    if style == "bald":
        return
    if style == "mohawk":
        canvas.polygon([(55, 50), (53, 34), (64, 28), (75, 34), (73, 50)], hair)
        return
    lower = {"short": 58.0, "spiky": 54.0, "afro": 56.0, "bun": 56.0}.get(style, 64.0)
    top = [(X + 30.5 * cos(a), 62 + 34 * sin(a)) for a in _angles(pi, 2 * pi, 25)]
    left, right = (X - 30.5, lower), (X + 30.5, lower)
    if style in {"long", "braids"}:  # parted in the middle
        line = [right, (88, 52), (78, 44), (X, 35), (50, 44), (40, 52), left]
    elif style == "bob":  # a straight fringe
        line = [right, (88, 62), (87, 47), (41, 47), (40, 62), left]
    elif style in {"curly", "afro"}:
        arch = [(X + 26 * cos(a), 56 + 14 * sin(a)) for a in _angles(0, -pi, 13)]
        line = [right, *arch, left]
    elif style == "bun":  # combed back
        arch = [(X + 27 * cos(a), 57 + 18 * sin(a)) for a in _angles(0, -pi, 13)]
        line = [right, *arch, left]
    else:  # combed to a side
        line = [right, (89, 52), (80, 43), (58, 48), (46, 43), (40, 51), left]
    canvas.polygon([*top, *line], hair)
    canvas.line(line[1:-1], 1.2, edge(hair))
    canvas.line(top, 1.4, edge(hair))


def _braids(canvas: Canvas, hair: Color) -> None:
    for x in (32, 96):
        for i in range(6):
            canvas.ellipse(x, 70 + 9 * i, 7.5, 6.5, hair, edge(hair))


def _clothes(canvas: Canvas, clothes: str, color: Color, skin: Color) -> None:
    line, dark = edge(color), shade(color, 0.78) if sum(color) > 200 else shade(color, 1.16)
    body = shade(WHITE, 0.93) if clothes == "overalls" else color
    canvas.box(14, 101, 114, 150, body, radius=22, outline=edge(body))
    neck = shade(skin, 0.86)
    canvas.box(52, 82, 76, 106, neck)
    canvas.ellipse(X, 105, 12, 7, neck)
    if clothes == "t-shirt":
        canvas.arc(X, 104, 15, 10.5, 0, 180, 3, dark)
    elif clothes == "shirt":
        canvas.polygon([(51, 97), (X, 112), (53, 121), (42, 103)], shade(color, 1.3), line)
        canvas.polygon([(77, 97), (X, 112), (75, 121), (86, 103)], shade(color, 1.3), line)
        canvas.line([(X, 113), (X, 128)], 1.5, line)
    elif clothes == "sweater":
        canvas.box(48, 95, 80, 112, color, radius=5, outline=line)
        for x in (56, 64, 72):
            canvas.line([(x, 98), (x, 109)], 1.3, dark)
    elif clothes == "hoodie":
        canvas.arc(X, 100, 27, 17, -20, 200, 9, dark)
        canvas.line([(55, 112), (55, 127)], 2.2, WHITE)
        canvas.line([(73, 112), (73, 127)], 2.2, WHITE)
    elif clothes == "jacket":
        canvas.polygon([(52, 100), (76, 100), (X, 134)], shade(WHITE, 0.95))
        canvas.polygon([(52, 97), (41, 103), (45, 113), (X, 132)], dark, line)
        canvas.polygon([(76, 97), (87, 103), (83, 113), (X, 132)], dark, line)
    else:
        canvas.box(36, 113, 92, 150, color, radius=3, outline=line)
        canvas.polygon([(32, 101), (46, 100), (51, 116), (37, 118)], color, line)
        canvas.polygon([(96, 101), (82, 100), (77, 116), (91, 118)], color, line)
        for x in (43, 85):
            canvas.ellipse(x, 117, 2.6, 2.6, (250, 214, 80), line)


def _eyes(canvas: Canvas, avatar: Avatar, hair: Color) -> None:
    brow = shade(hair, 0.7) if sum(hair) > 200 else hair
    lift, slant = {"surprised": (-4.0, 0.0), "sad": (-1.0, -3.5)}.get(avatar.expression, (0, 1.0))
    for side in (-1, 1):
        x = X + side * EYE_DX
        canvas.ellipse(x, EYE_Y, 8.6, 7.6, shade(SKIN_COLORS[avatar.skin], 0.55))
        canvas.ellipse(x, EYE_Y, 7.6, 6.6, WHITE)
        canvas.ellipse(x, EYE_Y, 5.6, 5.6, EYE_COLORS[avatar.eyes])
        canvas.ellipse(x, EYE_Y, 2.4, 2.4, DARK)
        canvas.ellipse(x + 2, EYE_Y - 2, 1.3, 1.3, WHITE)
        if avatar.gender == "woman":
            canvas.arc(x, EYE_Y, 9.2, 8.2, 190, 350, 2.4, DARK)
            canvas.line([(x + side * 8, EYE_Y - 3), (x + side * 11.5, EYE_Y - 6)], 2, DARK)
        width = {"man": 4.2, "person": 2.8, "woman": 1.9}[avatar.gender]
        inner, outer = (x - side * 6.5, 49 + lift + slant), (x + side * 7.5, 49.5 + lift - slant)
        canvas.line([inner, (x, 47.5 + lift), outer], width, brow)


def _mouth(canvas: Canvas, avatar: Avatar) -> None:
    lips = LIPS[avatar.gender]
    if avatar.expression == "smiling":
        canvas.chord(X, 74, 15, 13.5, 20, 160, lips)
        canvas.chord(X, 75, 12, 10, 18, 162, WHITE)
    elif avatar.expression == "laughing":
        canvas.chord(X, 74, 16.5, 17.5, 0, 180, lips)
        canvas.chord(X, 75.5, 14, 13.5, 0, 180, (96, 24, 32))
        canvas.box(52, 75.5, 76, 79, WHITE)
        canvas.ellipse(X, 86.5, 6, 3, TONGUE)
    elif avatar.expression == "neutral":
        canvas.line([(54, MOUTH_Y), (74, MOUTH_Y)], 4.2, lips)
    elif avatar.expression == "surprised":
        canvas.ellipse(X, 81.5, 7.5, 8.5, lips)
        canvas.ellipse(X, 81.5, 4.8, 5.8, (70, 16, 26))
    else:
        canvas.arc(X, 88, 13, 10.5, 200, 340, 4.2, lips)


def _beard(canvas: Canvas, beard: str, hair: Color) -> None:
    line = edge(hair)
    if beard == "beard":
        jaw = [(X + 28.5 * cos(a), 64 + 35 * sin(a)) for a in _angles(0, pi, 25)]
        inner = [(38, 70), (46, 71), (55, 70.5), (X, 72), (73, 70.5), (82, 71), (90, 70)]
        canvas.polygon([*jaw, *inner], hair)
        canvas.line(jaw, 1.4, line)
        canvas.ellipse(X, 81, 16.5, 8.6, shade(hair, 0.72) if sum(hair) > 200 else hair)
    elif beard == "mustache":
        for side in (-1, 1):
            canvas.polygon(
                [(X, 70), (X + side * 9, 69.5), (X + side * 19, 76), (X + side * 9, 76), (X, 74.5)],
                hair,
                line,
            )


def _glasses(canvas: Canvas, glasses: str) -> None:
    if glasses == "none":
        return
    frame = (24, 24, 30)
    for side in (-1, 1):
        x = X + side * EYE_DX
        canvas.line([(x + side * 10, EYE_Y - 2), (X + side * 28, EYE_Y - 4)], 2.4, frame)
        if glasses == "round":
            canvas.ring(x, EYE_Y, 12, 12, 2.6, frame)
        elif glasses == "square":
            _frame(canvas, x - 12, EYE_Y - 10, x + 12, EYE_Y + 10, frame)
        else:
            canvas.box(x - 12, EYE_Y - 9, x + 12, EYE_Y + 9, frame, radius=6)
            canvas.line([(x - 6, EYE_Y - 4), (x - 2, EYE_Y - 5)], 2.2, (120, 125, 140))
    canvas.line([(X - 2, EYE_Y - 2), (X + 2, EYE_Y - 2)], 2.6, frame)


def _frame(
    canvas: Canvas, left: float, top: float, right: float, bottom: float, color: Color
) -> None:
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    canvas.line([*corners, (right, top)], 2.8, color)


def _hat(canvas: Canvas, hat: str, color: Color) -> None:
    line, dark = edge(color), shade(color, 0.78) if sum(color) > 200 else shade(color, 1.16)
    if hat == "cap":
        canvas.chord(X, 44, 33, 30, 180, 360, line)
        canvas.chord(X, 43.5, 31.5, 28.5, 180, 360, color)
        canvas.ellipse(X, 15.5, 3.5, 2.5, dark, line)
        canvas.ellipse(X, 44, 38, 6.5, dark, line)
    elif hat == "beanie":
        canvas.ellipse(X, 10, 7.5, 7.5, dark, line)
        canvas.chord(X, 42, 33, 30, 180, 360, line)
        canvas.chord(X, 41.5, 31.5, 28.5, 180, 360, color)
        canvas.box(29, 34, 99, 46, dark, radius=5, outline=line)
    elif hat == "top hat":
        canvas.box(40, 3, 88, 42, color, radius=2, outline=line)
        canvas.box(41, 29, 87, 36, dark)
        canvas.ellipse(X, 41, 42, 6, color, line)
    elif hat == "crown":
        canvas.polygon(
            [(36, 42), (31, 12), (46, 24), (55, 8), (X, 20), (73, 8), (82, 24), (97, 12), (92, 42)],
            color,
            line,
        )
        for x in (47, 64, 81):
            canvas.ellipse(x, 34, 3.2, 3.2, dark, line)
    else:
        canvas.arc(X, 56, 38, 44, 180, 360, 6, line)
        canvas.arc(X, 56, 37, 43, 180, 360, 4, color)
        for side in (-1, 1):
            canvas.ellipse(X + side * 33, 63, 9, 13, color, line)
            canvas.ellipse(X + side * 34, 63, 4.5, 8, dark)


def _angles(start: float, end: float, count: int) -> list[float]:
    return [start + (end - start) * i / (count - 1) for i in range(count)]
