"""Portraits of invented adults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from prompt_generators.composer import (
    Composer,
    background,
    choose,
    describe,
    has_preposition,
    phrase,
)
from prompt_generators.profiles import Profiles
from prompt_generators.vocabulary import Draw, with_article

MINIMUM_AGE = 18
MAXIMUM_AGE = 120

_GENDERS = {"f": "woman", "female": "woman", "m": "man", "male": "man", "x": "person"}
# Words for a minor, in the columns that say who the person is. Not in "cowboy", "baby blue",
# "child psychologist" or "kid gloves".
_MINOR = re.compile(
    r"\b(?:toddlers?|infants?|newborns?|pre-?teens?|teens?|teenage[dr]?s?|under-?age|"
    r"school(?:boy|girl|child)|boys?|girls?|children(?!['’]s)|(?:child|kid|baby|minor)(?!\s+\w)|"
    r"(?:\d|1[0-7])[- ]years?[- ]old)\b",
    re.IGNORECASE,
)
_WHO_COLUMNS = ("gender", "occupation", "extra")
_HAIR_NOUNS = {
    *("afro", "beehive", "bob", "braid", "braids", "bun", "buns", "cornrows", "curls", "cut"),
    *("dreadlocks", "fringe", "knot", "locs", "mohawk", "mullet", "pigtails", "ponytail"),
    *("quiff", "shag", "twists", "undercut"),
}
_EYEWEAR = ("glasses", "goggles", "shades", "monocle", "spectacles")
_FACIAL_HAIR = ("beard", "mustache", "moustache", "stubble", "goatee", "sideburns", "whiskers")


class AvatarGenerator(Composer):
    """Portraits from profiles of people, or of people drawn from a vocabulary.

    A profile's `name` stays out of the prompt unless `include_name` is true. People are adults:
    an `age` that is not a whole number from 18 to 120, or a word for a minor in `gender`,
    `occupation` or `extra`, is an error.

    Args:
        profiles, sheet, seed: as in `Composer`.
        include_name: put `name` into the prompt.
    """

    name = "avatars"
    columns = (
        *("name", "age", "gender", "skin_tone", "hair_style", "hair_color", "eye_color"),
        *("glasses", "hat", "beard", "expression", "clothes", "clothes_color", "background"),
        *("occupation", "style", "extra"),
    )
    yes_no = ("glasses", "hat", "beard")

    def __init__(
        self,
        profiles: Path | str | None = None,
        sheet: str | None = None,
        *,
        seed: int = 0,
        include_name: bool = False,
    ) -> None:
        if not isinstance(include_name, bool):
            raise ValueError(f"option include_name must be true or false, got {include_name!r}")
        self.include_name = include_name
        super().__init__(profiles, sheet, seed=seed)

    def check_row(self, profiles: Profiles, row: int) -> None:
        """Also refuse words for minors."""
        super().check_row(profiles, row)
        for column in _WHO_COLUMNS:
            if _MINOR.search(profiles.text_cell(row, column) or ""):
                raise profiles.error(
                    "says that the person is not an adult",
                    row=row,
                    column=column,
                    allowed=f"adults, aged {MINIMUM_AGE} to {MAXIMUM_AGE}",
                )

    def word(self, profiles: Profiles, row: int, column: str) -> str:
        """Also read `age`, a number."""
        if column == "age":
            return str(profiles.int_cell(row, "age", MINIMUM_AGE, MAXIMUM_AGE))
        return super().word(profiles, row, column)

    def compose(self, given: Mapping[str, str], draw: Draw) -> str:
        """Who it is, how they look and what they wear; then how the picture is made."""
        slots = draw.slots()
        age = int(given.get("age") or _age(draw))
        gender = _gender(given.get("gender") or draw.attribute("gender"))

        looks = [_skin(choose("skin_tone", given, draw)), _hair(given, draw, age, gender)]
        glasses = _glasses(choose("glasses", given, draw))
        if glasses != "sunglasses" or "eye_color" in given:
            eyes = choose("eye_color", given, draw)
            looks.append(eyes if not eyes or "eyes" in eyes else f"{eyes} eyes")
        looks.append(_beard(given, draw, gender))

        worn = [glasses and with_article(glasses), _hat(given, draw), _clothes(given, draw)]
        details = [
            phrase(_subject(given, age, gender, self.include_name), _with(looks)),
            _wearing(worn),
            _expression(choose("expression", given, draw)),
            slots["pose"],
            background(choose("background", given, draw)),
            given.get("extra", ""),
        ]
        picture = [choose("style", given, draw), slots["lighting"], slots["finish"]]
        return describe(slots["framing"], details, picture)


def _age(draw: Draw) -> int:
    least, most = draw.attribute("age").split("-")
    return draw.number("age in years", int(least), int(most))


def _gender(value: str) -> str:
    value = _GENDERS.get(value.casefold(), value)
    known = re.search(r"\b(?:wo)?man\b|\bperson\b|\blady\b|\bgentleman\b", value, re.IGNORECASE)
    return value if known else f"{value} person"


def _subject(given: Mapping[str, str], age: int, gender: str, include_name: bool) -> str:
    subject = with_article(f"{age}-year-old {gender}")
    name = given.get("name", "") if include_name else ""
    occupation = given.get("occupation", "")
    # Each of them as an apposition, closed by a comma: "Ana, a nurse, a 34-year-old woman with".
    return ", ".join(
        part for part in (name, occupation and with_article(occupation), subject) if part
    )


def _skin(value: str) -> str:
    return value if not value or "skin" in value else f"{value} skin"


def _hair(given: Mapping[str, str], draw: Draw, age: int, gender: str) -> str:
    style = given.get("hair_style")
    if style is None:
        style = draw.attribute("hair_style_man" if gender == "man" else "hair_style")
    if re.search(r"\b(?:bald|shaved|hairless)\b", style, re.IGNORECASE):
        return style if " " in style else f"a {style} head"
    color = given.get("hair_color")
    if color is None:
        color = draw.attribute("hair_color_older" if age >= 60 else "hair_color")
    if not style and not color:
        return ""
    if "hair" in style:
        return style.replace("hair", phrase(color, "hair"), 1)
    if style and style.split()[-1].lower() in _HAIR_NOUNS:
        return phrase(color, "hair in", with_article(style))
    return phrase(style, color, "hair")


def _glasses(value: str) -> str:
    return value if not value or value.lower().endswith(_EYEWEAR) else f"{value} glasses"


def _beard(given: Mapping[str, str], draw: Draw, gender: str) -> str:
    if "beard" not in given and gender != "man":
        return ""
    value = choose("beard", given, draw)
    if not value or value.casefold() == "clean-shaven":
        return ""
    if not any(word in value.lower() for word in _FACIAL_HAIR):
        value = f"{value} beard"
    return value if value.lower().endswith("stubble") else with_article(value)


def _hat(given: Mapping[str, str], draw: Draw) -> str:
    if "hat" in given:
        return given["hat"] and with_article(given["hat"])
    hat = draw.attribute("hat")
    return hat and with_article(f"{draw.attribute('hat_color')} {hat}")


def _clothes(given: Mapping[str, str], draw: Draw) -> str:
    clothes = choose("clothes", given, draw)
    if not clothes:
        return ""
    color = given.get("clothes_color")
    if color is None:
        # A profile's "white coat" has its color already.
        names = draw.vocabulary.attributes["clothes_color"]
        colors = {word for name in names for word in name.split()}
        color = "" if colors & set(clothes.lower().split()) else draw.attribute("clothes_color")
    article, _, rest = clothes.partition(" ")
    if article.lower() in {"a", "an", "the"} and rest:
        clothes = rest
    return with_article(phrase(color, clothes))


def _expression(value: str) -> str:
    if not value or value.split()[0].lower().endswith("ing") or has_preposition(value):
        return value
    if value.lower().endswith(("smile", "grin", "look", "expression", "frown", "gaze")):
        return f"with {with_article(value)}"
    return f"with {with_article(f'{value} expression')}"


def _with(looks: list[str]) -> str:
    return _list("with", looks)


def _wearing(worn: list[str]) -> str:
    return _list("wearing", worn)


def _list(verb: str, items: list[str]) -> str:
    items = [item for item in items if item]
    if not items:
        return ""
    *first, last = items
    return phrase(verb, f"{', '.join(first)} and {last}" if first else last)
