"""Game items and creatures."""

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


class GamingGenerator(Composer):
    """Items from a game's tables, or drawn from a vocabulary in which each item has what suits it.

    An item that the vocabulary does not know gets no drawn category or material: they could
    contradict it.

    Args:
        profiles, sheet, seed: as in `Composer`.
    """

    name = "gaming"
    columns = (
        *("item", "category", "rarity", "material", "color", "effect", "background", "style"),
    )

    def compose(self, given: Mapping[str, str], draw: Draw) -> str:
        """What it is and what it does; then how the picture is made."""
        slots = draw.slots()
        item = given.get("item") or draw.attribute("item")
        suits = draw.vocabulary.things.get(item.lower(), {})

        words = phrase(
            choose("rarity", given, draw, suits),
            choose("color", given, draw, suits),
            choose("material", given, draw, suits),
            item,
        )
        category = choose("category", given, draw, suits)
        details = [
            with_article(words),
            phrase(
                category and with_article(category), _effect(choose("effect", given, draw, suits))
            ),
            slots["view"],
            background(choose("background", given, draw, suits)),
        ]
        picture = [choose("style", given, draw, suits), slots["lighting"], slots["finish"]]
        return describe(slots["framing"], details, picture)


def _effect(value: str) -> str:
    if not value or has_preposition(value):
        return value
    # "glowing", "glowing softly" and "covered in frost" stand alone; "floating sparks" does not.
    first, *rest = value.lower().split()
    alone = not rest or rest[0].endswith("ly") or has_preposition(rest[0])
    return value if alone and first.endswith(("ing", "ed", "en")) else f"with {value}"
