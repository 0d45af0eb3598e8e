"""What is in a picture: attributes measured from pixels, by drawing alternatives and comparing.

No model is involved: the values whose drawing is nearest to the picture win. Pictures and drawings
are compared at half size, so that small shifts of edges weigh little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from zimage_core.tiny.attributes import (
    BOWL_DISHES,
    COLORS,
    COVERING_HATS,
    DISH_COLORS,
    NONE,
    VALUES,
    Avatar,
    Food,
    GameItem,
    Subject,
    attributes_of,
    make_subject,
    with_values,
)
from zimage_core.tiny.canvas import Jitter
from zimage_core.tiny.world import draw_array

Pixels = NDArray[np.float32]

COMPARED_SIZE = 64
_SHIFTS = tuple(product((-2.0, 0.0, 2.0), repeat=2))
# Where only the background is seen in nearly all drawings: corners and the upper sides.
_BACKGROUND_SPOTS = ((1, 1, 5, 5), (1, 59, 5, 63), (12, 1, 20, 4), (12, 60, 20, 63))


@dataclass(frozen=True)
class Detection:
    """The subject that a picture shows best.

    Attributes:
        subject: its attributes.
        distance: mean squared difference of the picture and that drawing, colors in [0, 1].
    """

    subject: Subject
    distance: float


def detect(picture: NDArray[np.uint8], kind: str) -> Detection:
    """Measure the attributes of a picture.

    Args:
        picture: (H, W, 3) uint8, H = W a multiple of 64.
        kind: what to look for, a key of `KINDS`.

    Raises:
        ValueError: the picture has another shape.
    """
    target = _shrink(picture)
    if kind == "avatars":
        return _Fit(target, _first_avatar(target)).avatar()
    return _Fit(target, _first_item(target, kind)).item()


def measurable(subject: Subject) -> dict[str, str]:
    """The attributes that can be seen: not eyes behind sunglasses, nor hair under a hat.

    Of gender it is the eyelashes, which only women have in this world.
    """
    values = attributes_of(subject)
    if isinstance(subject, Avatar):
        if subject.gender != "woman":
            values["gender"] = "person"
        if subject.glasses == "sunglasses":
            del values["eyes"], values["gender"]
        if subject.hat in COVERING_HATS:
            del values["hair_style"]
        if subject.hair_style == "bald" or (
            subject.hat in COVERING_HATS and subject.hair_style in {"mohawk", "spiky", "bun"}
        ):
            del values["hair_color"]
        if subject.hat == NONE:
            del values["hat_color"]
    elif isinstance(subject, Food) and subject.color == NONE:
        del values["color"]
    return values


class _Fit:
    """A subject that comes nearer to the target change by change.

    Args:
        target: (64, 64, 3) in [0, 1].
        subject: where to start.
    """

    def __init__(self, target: Pixels, subject: Subject) -> None:
        self.target = target
        self.subject = subject
        self.jitter = Jitter()
        self.distance = self._measure(subject, self.jitter)

    def avatar(self) -> Detection:
        """Fit all attributes of an avatar, the large ones first."""
        hats = [("none", NONE), *product(VALUES["avatars"]["hat"][1:], COLORS)]
        hair = list(product(VALUES["avatars"]["hair_style"][:-1], VALUES["avatars"]["hair_color"]))
        hair.append(("bald", "black"))
        self.best("clothes_color")
        self.best("skin")
        self.best_of(("hair_style", "hair_color"), hair)
        self.best_of(("hat", "hat_color"), hats)
        self.shift()
        for sweep in range(3):
            before = self.distance
            self.best("glasses")
            self.best("beard")
            self.best("expression")
            self.best_of(("hair_style", "hair_color"), hair if sweep else self._near_hair())
            self.best_of(("hat", "hat_color"), hats)
            self.best_of(
                ("clothes", "clothes_color"), product(VALUES["avatars"]["clothes"], COLORS)
            )
            for attribute in ("skin", "eyes", "gender", "background"):
                self.best(attribute)
            self.best_of(
                ("beard", "expression"),
                product(VALUES["avatars"]["beard"], VALUES["avatars"]["expression"]),
            )
            self.shift()
            if self.distance > before * 0.995:
                break
        return Detection(self.subject, self.distance)

    def item(self) -> Detection:
        """Fit what is left to fit of a dish or a game item."""
        for _ in range(2):
            before = self.distance
            self.shift()
            if isinstance(self.subject, Food):
                self.best("background")
                self.best("plate")
                self.best_of(("color",), [(c,) for c in DISH_COLORS[self.subject.dish]])
            else:
                self.best("background")
                self.best_of(("effect", "color"), product(VALUES["gaming"]["effect"], COLORS))
            if self.distance > before * 0.995:
                break
        return Detection(self.subject, self.distance)

    def best(self, attribute: str) -> None:
        """Keep the value of an attribute that comes nearest."""
        kind = {Avatar: "avatars", Food: "food", GameItem: "gaming"}[type(self.subject)]
        self.best_of((attribute,), [(value,) for value in VALUES[kind][attribute]])

    def best_of(self, names: tuple[str, ...], choices: Iterable[tuple[str, ...]]) -> None:
        """Keep the combination of values that comes nearest."""
        start = self.subject
        for values in choices:
            changed = with_values(start, **dict(zip(names, values, strict=True)))
            if changed != self.subject:
                self._try(changed, self.jitter)

    def shift(self) -> None:
        """Keep the shift that comes nearest."""
        for step in (1.0, 0.5):
            x, y = self.jitter.dx, self.jitter.dy
            for dx, dy in _SHIFTS:
                self._try(self.subject, Jitter(x + dx * step, y + dy * step))

    def _near_hair(self) -> list[tuple[str, ...]]:
        values = attributes_of(self.subject)
        return [(style, values["hair_color"]) for style in VALUES["avatars"]["hair_style"]]

    def _try(self, subject: Subject, jitter: Jitter) -> None:
        distance = self._measure(subject, jitter)
        if distance < self.distance:
            self.subject, self.jitter, self.distance = subject, jitter, distance

    def _measure(self, subject: Subject, jitter: Jitter) -> float:
        drawing = _drawing(subject, jitter)
        return float(np.square(drawing - self.target).mean())


def _first_avatar(target: Pixels) -> Subject:
    person = {
        "background": "white",
        "gender": "person",
        "skin": "light brown",
        "hair_style": "short",
        "hair_color": "brown",
        "eyes": "brown",
        "glasses": NONE,
        "hat": NONE,
        "hat_color": NONE,
        "beard": NONE,
        "expression": "smiling",
        "clothes": "t-shirt",
        "clothes_color": "gray",
    }
    return make_subject("avatars", {**person, "background": _background(target, "avatars")})


def _first_item(target: Pixels, kind: str) -> Subject:
    """The nearest of all items in all of their colors, on the background that is there."""
    background = _background(target, kind)
    nearest: tuple[float, Subject] | None = None
    for subject in _candidates(kind, background):
        distance = min(
            float(np.square(_drawing(subject, jitter) - target).mean()) for jitter in (Jitter(),)
        )
        if nearest is None or distance < nearest[0]:
            nearest = distance, subject
    assert nearest is not None
    return nearest[1]


def _candidates(kind: str, background: str) -> Iterable[Subject]:
    if kind == "gaming":
        for item, color, effect in product(VALUES[kind]["item"], COLORS, VALUES[kind]["effect"]):
            values = {"background": background, "item": item, "color": color, "effect": effect}
            yield make_subject(kind, values)
        return
    for dish, colors in DISH_COLORS.items():
        plates = [
            plate for plate in VALUES[kind]["plate"] if plate != NONE or dish not in BOWL_DISHES
        ]
        for color, plate in product(colors, plates):
            values = {"background": background, "dish": dish, "color": color, "plate": plate}
            yield make_subject(kind, values)


def _background(target: Pixels, kind: str) -> str:
    """The background whose spots come nearest."""

    def spots(pixels: Pixels) -> Pixels:
        parts = [pixels[a:c, b:d].reshape(-1, 3) for a, b, c, d in _BACKGROUND_SPOTS]
        return np.concatenate(parts)

    seen = spots(target)
    distances: Mapping[str, float] = {
        name: float(np.abs(spots(_drawing(_plain(kind, name), Jitter())) - seen).mean())
        for name in VALUES[kind]["background"]
    }
    return min(distances, key=lambda name: distances[name])


def _plain(kind: str, background: str) -> Subject:
    """A subject that leaves the spots of the background free."""
    if kind == "avatars":
        values = {name: allowed[0] for name, allowed in VALUES[kind].items()}
        return make_subject(kind, {**values, "background": background})
    if kind == "food":
        dish = {"background": background, "dish": "apple", "color": "red", "plate": NONE}
        return make_subject(kind, dish)
    item = {"background": background, "item": "heart", "color": "red", "effect": NONE}
    return make_subject(kind, item)


@lru_cache(maxsize=6000)
def _drawing(subject: Subject, jitter: Jitter) -> Pixels:
    array = draw_array(subject, jitter, size=COMPARED_SIZE, supersampling=2)
    return array.astype(np.float32) / 255.0


def _shrink(picture: NDArray[np.uint8]) -> Pixels:
    height, width, *rest = picture.shape
    if height != width or height % COMPARED_SIZE or rest != [3]:
        raise ValueError(f"picture has shape {picture.shape}; allowed: (N * 64, N * 64, 3)")
    n = height // COMPARED_SIZE
    blocks = picture.reshape(COMPARED_SIZE, n, COMPARED_SIZE, n, 3)
    shrunk: Pixels = blocks.mean(axis=(1, 3), dtype=np.float32) / np.float32(255.0)
    return shrunk
