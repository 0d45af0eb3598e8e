"""What a drawing shows: avatars, food and game items, each by a handful of attributes.

Every attribute has a short list of values, and each value looks different from the others. Values
are words, but not all words that mean them: those are in `data/vocabularies/drawings.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from random import Random

COLORS = (
    *("red", "orange", "yellow", "green", "teal", "blue"),
    *("purple", "pink", "brown", "black", "white", "gray"),
)
PLAIN_BACKGROUNDS = (
    *("white", "gray", "dark", "red", "orange", "yellow", "green"),
    *("teal", "light blue", "blue", "navy", "purple", "pink"),
)
NONE = "none"


@dataclass(frozen=True)
class Avatar:
    """An invented adult, from the shoulders up."""

    background: str
    gender: str
    skin: str
    hair_style: str
    hair_color: str
    eyes: str
    glasses: str
    hat: str
    hat_color: str
    beard: str
    expression: str
    clothes: str
    clothes_color: str

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Food:
    """A dish; `color` is "none" where the dish has colors of its own."""

    background: str
    dish: str
    color: str
    plate: str

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class GameItem:
    """A piece of a game's inventory."""

    background: str
    item: str
    color: str
    effect: str

    def __post_init__(self) -> None:
        _check(self)


Subject = Avatar | Food | GameItem
KINDS: Mapping[str, type[Avatar] | type[Food] | type[GameItem]] = {
    "avatars": Avatar,
    "food": Food,
    "gaming": GameItem,
}
"""By the names that the prompt generators have too."""

DISH_COLORS: Mapping[str, tuple[str, ...]] = {
    "donut": ("pink", "brown", "white", "yellow", "blue", "purple", "green", "orange", "red"),
    "cupcake": ("pink", "brown", "white", "yellow", "blue", "purple", "green", "orange"),
    "ice cream": ("pink", "brown", "white", "yellow", "blue", "purple", "green", "orange"),
    "apple": ("red", "green", "yellow"),
    "soup": ("red", "orange", "green", "purple"),
    "cake": ("brown", "pink", "white", "yellow", "blue", "green"),
    "macarons": ("pink", "green", "purple", "yellow", "blue", "orange", "white"),
    **dict.fromkeys(("pizza", "burger", "sushi", "egg", "ramen", "tacos", "pancakes"), (NONE,)),
}
PLATES = (NONE, "white", "blue", "pink", "yellow", "red", "green", "brown", "black")
BOWL_DISHES = ("soup", "ramen")
"""Dishes in a bowl, whose color is that of `plate`; the others may stand on a plate."""

VALUES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "avatars": {
        "background": (*PLAIN_BACKGROUNDS, "park"),
        "gender": ("woman", "man", "person"),
        "skin": ("light", "tan", "light brown", "brown", "dark brown"),
        "hair_style": (
            *("short", "long", "curly", "bun", "bob", "braids", "afro", "spiky", "mohawk", "bald"),
        ),
        "hair_color": (
            *("black", "brown", "blonde", "red", "gray", "white"),
            *("blue", "pink", "green", "purple"),
        ),
        "eyes": ("brown", "green", "blue"),
        "glasses": (NONE, "round", "square", "sunglasses"),
        "hat": (NONE, "cap", "beanie", "top hat", "crown", "headphones"),
        "hat_color": (NONE, *COLORS),
        "beard": (NONE, "beard", "mustache"),
        "expression": ("smiling", "laughing", "neutral", "surprised", "sad"),
        "clothes": ("t-shirt", "shirt", "sweater", "hoodie", "jacket", "overalls"),
        "clothes_color": COLORS,
    },
    "food": {
        "background": (*PLAIN_BACKGROUNDS, "table"),
        "dish": tuple(DISH_COLORS),
        "color": (NONE, *COLORS),
        "plate": PLATES,
    },
    "gaming": {
        "background": (*PLAIN_BACKGROUNDS, "dungeon", "night"),
        "item": (
            *("sword", "shield", "potion", "gem", "coin", "heart", "slime"),
            *("controller", "staff", "helmet", "ring", "chest", "key", "axe"),
        ),
        "color": COLORS,
        "effect": (NONE, "glow", "sparks", "fire"),
    },
}
"""For each kind the allowed values of each attribute."""

COVERING_HATS = ("cap", "beanie", "top hat")
"""Hats under which a hair style shows only at the sides."""


def kind_of(subject: Subject) -> str:
    """The subject's kind, a key of `KINDS`."""
    return next(name for name, kind in KINDS.items() if isinstance(subject, kind))


def attributes_of(subject: Subject) -> dict[str, str]:
    """The subject's values by attribute."""
    return {field.name: getattr(subject, field.name) for field in fields(subject)}


def with_values(subject: Subject, **changes: str) -> Subject:
    """The subject with some values changed, and others that depend on them made to fit."""
    return make_subject(kind_of(subject), {**attributes_of(subject), **changes})


def make_subject(kind: str, values: Mapping[str, str]) -> Subject:
    """Make a subject of values, "none" and a color traded where another value asks for it.

    Raises:
        ValueError: a value is not one of `VALUES`.
        TypeError: attributes are missing or unknown.
    """
    values = dict(values)
    if kind == "avatars":
        if values["hat"] == NONE:
            values["hat_color"] = NONE
        elif values["hat_color"] == NONE:
            values["hat_color"] = "yellow" if values["hat"] == "crown" else "black"
    if kind == "food":
        colors = DISH_COLORS.get(values["dish"], ())
        if colors and values["color"] not in colors:
            values["color"] = colors[0]
        if values["dish"] in BOWL_DISHES and values["plate"] == NONE:
            values["plate"] = "white"
    return KINDS[kind](**values)


def draw_subject(kind: str, random: Random) -> Subject:
    """Draw a subject: all values of most attributes alike, rare ones rarely."""
    values = {name: random.choice(allowed) for name, allowed in VALUES[kind].items()}
    if kind == "avatars":
        _draw_person(values, random)
    if kind == "food":
        values["color"] = random.choice(DISH_COLORS[values["dish"]])
        if values["dish"] not in BOWL_DISHES and random.random() < 0.4:
            values["plate"] = NONE
    if kind == "gaming" and random.random() < 0.35:
        values["effect"] = NONE
    scenes = [value for value in VALUES[kind]["background"] if value not in PLAIN_BACKGROUNDS]
    if random.random() < 0.1:
        values["background"] = random.choice(scenes)
    return make_subject(kind, values)


def _draw_person(values: dict[str, str], random: Random) -> None:
    values["gender"] = random.choice(("woman", "man", "woman", "man", "person"))
    if values["gender"] == "woman":
        values["beard"] = NONE
        if values["hair_style"] in {"bald", "mohawk"} and random.random() < 0.6:
            values["hair_style"] = random.choice(("long", "bob", "bun", "braids", "curly"))
    if random.random() < 0.35:  # unusual colors are eased off
        values["hair_color"] = random.choice(("black", "brown", "blonde", "red"))
    for name, chance in (("glasses", 0.3), ("hat", 0.3), ("beard", 0.2)):
        if random.random() < chance:
            values[name] = NONE
    if values["hat"] != NONE:
        values["hat_color"] = random.choice(COLORS)


def _check(subject: Subject) -> None:
    for name, value in attributes_of(subject).items():
        allowed = VALUES[kind_of(subject)][name]
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
