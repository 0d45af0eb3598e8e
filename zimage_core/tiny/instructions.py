"""Instructions: what to change in a drawing, in words, and the drawing that is meant by them.

An instruction changes one thing that can be seen (a color, glasses, a hat, a beard, an expression,
a plate, an effect) and leaves the rest alone. It names the thing and what it shall be, not what it
was: that is in the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from zimage_core.tiny.attributes import (
    BOWL_DISHES,
    COLORS,
    DISH_COLORS,
    NONE,
    VALUES,
    Avatar,
    Food,
    Subject,
    attributes_of,
    kind_of,
    with_values,
)
from zimage_core.tiny.detector import measurable
from zimage_core.tiny.prose import with_article
from zimage_core.tiny.vocabulary import Vocabulary

CHANGES: Mapping[str, Mapping[str, float]] = {
    "avatars": {
        "background": 2.0,
        "hair_color": 1.5,
        "clothes_color": 1.5,
        "glasses": 2.0,
        "hat": 2.5,
        "beard": 1.5,
        "expression": 1.0,
        "eyes": 0.7,
    },
    "food": {"background": 1.5, "color": 1.5, "plate": 1.5},
    "gaming": {"background": 1.5, "color": 1.5, "effect": 1.5},
}
"""For each kind the attributes that instructions change, and how often."""

_TRIES = 50


@dataclass(frozen=True)
class Edit:
    """A drawing before and after an instruction.

    Attributes:
        before: what is given.
        after: what is asked for.
        attribute: what changes; "hat" stands for a hat and its color.
    """

    before: Subject
    after: Subject
    attribute: str

    @property
    def changed(self) -> dict[str, str]:
        """The new values that can be seen, by attribute."""
        seen, old = measurable(self.after), attributes_of(self.before)
        names = ("hat", "hat_color") if self.attribute == "hat" else (self.attribute,)
        return {name: seen[name] for name in names if seen.get(name, old[name]) != old[name]}

    @property
    def kept(self) -> dict[str, str]:
        """The values that can be seen before and after, and shall be the same."""
        before, after = measurable(self.before), measurable(self.after)
        hat = {"hat", "hat_color"} if self.attribute == "hat" else {self.attribute}
        return {name: value for name, value in before.items() if name in after and name not in hat}

    def reversed(self) -> Edit:
        """The edit that leads back."""
        return Edit(self.after, self.before, self.attribute)


def draw_edit(subject: Subject, random: Random) -> Edit:
    """Draw a change of a subject that can be seen.

    Raises:
        RuntimeError: none was found; no subject of this world is without one.
    """
    weights = CHANGES[kind_of(subject)]
    for _ in range(_TRIES):
        (attribute,) = random.choices(list(weights), list(weights.values()))
        values = _draw_values(subject, attribute, random)
        if values is None:
            continue
        after = with_values(subject, **values)
        edit = Edit(subject, after, attribute)
        if edit.changed and edit.reversed().changed:
            return edit
    raise RuntimeError(f"no change found for {subject}")


def _draw_values(subject: Subject, attribute: str, random: Random) -> dict[str, str] | None:
    """New values for an attribute, or None where the subject has no other."""
    kind = kind_of(subject)
    old = attributes_of(subject)[attribute]
    allowed = [value for value in VALUES[kind][attribute] if value != old]
    if isinstance(subject, Avatar):
        if attribute == "beard" and subject.gender == "woman":
            return None
        if attribute == "hat":
            return _draw_hat(subject, random)
    if isinstance(subject, Food):
        if attribute == "color":
            allowed = [c for c in DISH_COLORS[subject.dish] if c not in {old, NONE}]
        if attribute == "plate" and subject.dish in BOWL_DISHES:
            allowed = [value for value in allowed if value != NONE]
    # Things come and go as often as they are replaced.
    if NONE in allowed and random.random() < 0.5:
        return {attribute: NONE}
    return {attribute: random.choice(allowed)} if allowed else None


def _draw_hat(avatar: Avatar, random: Random) -> dict[str, str]:
    chance = random.random()
    if avatar.hat != NONE and chance < 0.45:
        return {"hat": NONE}
    color = random.choice([c for c in COLORS if c != avatar.hat_color])
    if avatar.hat != NONE and chance < 0.75:
        return {"hat_color": color}
    others = [hat for hat in VALUES["avatars"]["hat"] if hat not in {NONE, avatar.hat}]
    return {"hat": random.choice(others), "hat_color": color}


class InstructionWriter:
    """Writes instructions.

    Args:
        vocabulary: the words.
        random: the source of every choice.
    """

    def __init__(self, vocabulary: Vocabulary, random: Random) -> None:
        self.vocabulary = vocabulary
        self.random = random
        self._writers: Mapping[str, Callable[[Edit], str]] = {
            "background": self._background,
            "hair_color": lambda e: self._recolor(("hair",), self._hair_color(e)),
            "eyes": lambda e: self._recolor(("eyes",), self._word("avatars.eyes", e, "eyes")),
            "clothes_color": self._clothes,
            "glasses": self._glasses,
            "hat": self._hat,
            "beard": self._beard,
            "expression": self._expression,
            "color": self._color,
            "plate": self._plate,
            "effect": self._effect,
        }

    def instruction(self, edit: Edit) -> str:
        """Ask for an edit, in words by chance."""
        text = self._writers[edit.attribute](edit)
        text = text[:1].upper() + text[1:] if self._maybe(0.3) else text
        return text + ("." if self._maybe(0.2) else "")

    def _background(self, edit: Edit) -> str:
        value = attributes_of(edit.after)["background"]
        places = self.vocabulary.words("scenes", value)
        if places:
            place = self._one(places)
            return self._one((f"put it {place}", f"{place}", f"move it {place}"))
        color = self._one(self.vocabulary.words("backgrounds", value))
        return self._one(
            (
                f"make the background {color}",
                f"make the background {color}",
                f"change the background to {color}",
                f"{color} background",
                f"use {with_article(color)} background",
            )
        )

    def _hair_color(self, edit: Edit) -> str:
        return self._word("avatars.hair_color", edit, "hair_color")

    def _clothes(self, edit: Edit) -> str:
        value = attributes_of(edit.before)["clothes"]
        names = (*self.vocabulary.words("avatars.clothes", value), "clothes")
        return self._recolor(names, self._word("colors", edit, "clothes_color"))

    def _color(self, edit: Edit) -> str:
        values = attributes_of(edit.before)
        table, thing = ("food.dish", "dish") if "dish" in values else ("gaming.item", "item")
        # Not by a name that says a color.
        names = [
            name
            for name in self.vocabulary.words(table, values[thing])
            if name not in self.vocabulary.meanings("food.dish_color")
        ]
        return self._recolor((*names, "it"), self._word("colors", edit, "color"))

    def _recolor(self, names: tuple[str, ...], color: str) -> str:
        name = self._one(names)
        if name == "it":
            return self._one((f"make it {color}", f"change the color to {color}"))
        return self._one(
            (
                f"make the {name} {color}",
                f"make the {name} {color}",
                f"change the {name} to {color}",
                f"change the color of the {name} to {color}",
                f"{color} {name}",
            )
        )

    def _glasses(self, edit: Edit) -> str:
        old, new = attributes_of(edit.before)["glasses"], attributes_of(edit.after)["glasses"]
        if new == NONE:
            named = "sunglasses" if old == "sunglasses" and self._maybe(0.6) else "glasses"
            return self._removal(named)
        name = self._one(self.vocabulary.words("avatars.glasses", new))
        if old == NONE:
            return self._addition(name)
        return self._replacement("glasses", name)

    def _hat(self, edit: Edit) -> str:
        before, after = edit.before, edit.after
        assert isinstance(before, Avatar) and isinstance(after, Avatar)
        if before.hat != NONE:
            of_old = (*self.vocabulary.words("avatars.hat", before.hat), "hat")
            old = self._one(of_old[:-1] if before.hat == "headphones" else of_old)
            if after.hat == NONE:
                return self._removal(old)
            if after.hat == before.hat:
                return self._recolor((old,), self._word("colors", edit, "hat_color"))
        words = self.vocabulary.words("avatars.hat", after.hat)
        name = f"{self._word('colors', edit, 'hat_color')} {self._one(words)}"
        if after.hat != "headphones":
            name = with_article(name)
        if before.hat == NONE:
            return self._addition(name)
        return self._replacement(old, name)

    def _beard(self, edit: Edit) -> str:
        old, new = attributes_of(edit.before)["beard"], attributes_of(edit.after)["beard"]
        if new == NONE:
            named = self._one(self.vocabulary.words("avatars.beard", old))
            return self._one((self._removal(named), f"shave off the {named}", "clean-shaven"))
        name = with_article(self._one(self.vocabulary.words("avatars.beard", new)))
        if old == NONE:
            return self._one((f"add {name}", f"give them {name}", f"with {name}"))
        return self._replacement(self._one(self.vocabulary.words("avatars.beard", old)), name)

    def _expression(self, edit: Edit) -> str:
        word = self._word("avatars.expression", edit, "expression")
        if word.startswith("a "):
            return self._one((f"give them {word}", f"with {word}", f"change it to {word}"))
        return self._one((f"make them {word}", f"{word}", f"make the face {word}"))

    def _plate(self, edit: Edit) -> str:
        old, new = attributes_of(edit.before)["plate"], attributes_of(edit.after)["plate"]
        if new == NONE:
            return self._one((self._removal("plate"), "no plate"))
        bowl = attributes_of(edit.after)["dish"] in BOWL_DISHES
        words = [w for w in self.vocabulary.words("food.plate", new) if w.endswith("bowl") == bowl]
        name = self._one(words)
        plate = with_article(name)
        if old == NONE:
            return self._one((f"put it on {plate}", f"add {plate}"))
        if name.split()[0] in COLORS and self._maybe(0.5):
            vessel = "bowl" if bowl else "plate"
            return self._recolor((vessel,), name.split()[0])
        return self._one((f"put it {'in' if bowl else 'on'} {plate}", f"use {plate}"))

    def _effect(self, edit: Edit) -> str:
        old, new = attributes_of(edit.before)["effect"], attributes_of(edit.after)["effect"]
        if new == NONE:
            names = {"glow": ("glow", "aura"), "sparks": ("sparks", "stars")}
            return self._removal(self._one(names.get(old, ("fire", "flames"))))
        words = self._one(self.vocabulary.words("gaming.effect", new))
        return self._one((words, f"make it {words}"))

    def _addition(self, name: str) -> str:
        return self._one((f"add {name}", f"add {name}", f"put on {name}", f"with {name}"))

    def _removal(self, name: str) -> str:
        return self._one((f"remove the {name}", f"remove the {name}", f"take off the {name}"))

    def _replacement(self, old: str, new: str) -> str:
        return self._one((f"replace the {old} with {new}", f"change the {old} to {new}"))

    def _word(self, table: str, edit: Edit, attribute: str) -> str:
        """A word for the new value of an attribute."""
        return self._one(self.vocabulary.words(table, attributes_of(edit.after)[attribute]))

    def _one(self, choices: tuple[str, ...] | list[str]) -> str:
        return self.random.choice(choices)

    def _maybe(self, chance: float) -> bool:
        return self.random.random() < chance
