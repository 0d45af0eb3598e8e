"""Pictures of food."""

from __future__ import annotations

from collections.abc import Mapping

from prompt_generators.composer import (
    Composer,
    background,
    choose,
    describe,
    has_preposition,
    phrase,
)
from prompt_generators.vocabulary import Draw, with_article

_VESSELS = ("bowl", "cup", "mug", "glass", "jar", "pan", "pot", "basket", "box", "tin")


class FoodGenerator(Composer):
    """Dishes from a menu, or drawn from a vocabulary in which each dish has what suits it.

    A dish that the vocabulary does not know gets no drawn cuisine, color, plate or garnish: they
    could contradict it.

    Args:
        profiles, sheet, seed: as in `Composer`.
    """

    name = "food"
    columns = ("dish", "cuisine", "main_color", "plate", "garnish", "background", "style")

    def compose(self, given: Mapping[str, str], draw: Draw) -> str:
        """What it is and how it is served; then how the picture is made."""
        slots = draw.slots()
        dish = given.get("dish") or draw.attribute("dish")
        suits = draw.vocabulary.things.get(dish.lower(), {})

        color, cuisine = (
            choose("main_color", given, draw, suits),
            choose("cuisine", given, draw, suits),
        )
        words = phrase(color, cuisine, dish)
        details = [
            with_article(words) if suits.get("article", ["none"]) != ["none"] else words,
            _plate(choose("plate", given, draw, suits)),
            _garnish(choose("garnish", given, draw, suits)),
            slots["arrangement"],
            background(choose("background", given, draw, suits)),
        ]
        picture = [choose("style", given, draw, suits), slots["lighting"], slots["finish"]]
        return describe(slots["framing"], details, picture)


def _plate(value: str) -> str:
    if not value or has_preposition(value):
        return value and f"served {value}"
    preposition = "in" if value.lower().endswith(_VESSELS) else "on"
    return f"served {preposition} {with_article(value)}"


def _garnish(value: str) -> str:
    return value if not value or has_preposition(value) else f"garnished with {value}"
