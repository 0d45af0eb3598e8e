"""The colors of the drawings, apart enough that each can be told from the others."""

from __future__ import annotations

from collections.abc import Mapping

from zimage_core.tiny.canvas import Color

WHITE: Color = (250, 250, 250)
DARK: Color = (28, 26, 32)
TONGUE: Color = (232, 110, 120)

PAINT: Mapping[str, Color] = {
    "red": (214, 44, 44),
    "orange": (244, 136, 32),
    "yellow": (250, 208, 50),
    "green": (62, 168, 70),
    "teal": (20, 150, 150),
    "blue": (48, 100, 214),
    "purple": (128, 66, 178),
    "pink": (246, 130, 178),
    "brown": (126, 80, 46),
    "black": (44, 44, 50),
    "white": (244, 244, 244),
    "gray": (146, 150, 156),
}

BACKGROUND: Mapping[str, Color] = {
    "white": (248, 248, 246),
    "gray": (198, 202, 206),
    "dark": (54, 54, 60),
    "red": (200, 60, 56),
    "orange": (246, 160, 70),
    "yellow": (250, 222, 98),
    "green": (118, 194, 112),
    "teal": (40, 158, 158),
    "light blue": (146, 208, 250),
    "blue": (66, 122, 220),
    "navy": (32, 48, 104),
    "purple": (134, 84, 182),
    "pink": (250, 180, 206),
}

SKIN_COLORS: Mapping[str, Color] = {
    "light": (253, 222, 198),
    "tan": (232, 184, 140),
    "light brown": (196, 140, 94),
    "brown": (146, 96, 60),
    "dark brown": (92, 58, 40),
}

HAIR_COLORS: Mapping[str, Color] = {
    "black": (34, 30, 34),
    "brown": (106, 64, 36),
    "blonde": (238, 200, 92),
    "red": (196, 76, 30),
    "gray": (150, 152, 158),
    "white": (240, 240, 242),
    "blue": (52, 108, 222),
    "pink": (244, 112, 172),
    "green": (66, 170, 84),
    "purple": (132, 70, 184),
}

EYE_COLORS: Mapping[str, Color] = {
    "brown": (116, 66, 28),
    "green": (46, 160, 72),
    "blue": (52, 128, 232),
}

LIPS: Mapping[str, Color] = {
    "woman": (206, 40, 66),
    "man": (170, 74, 66),
    "person": (186, 62, 70),
}
