"""A first template from the names of a table's columns: English that a person goes on with.

Names are looked up as people write them in spreadsheets; a column that is not known there is named
before its value. What is in the cells has no part in the wording.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jobs.table_view import Column
from prompt_generators.profiles import RESERVED_COLUMNS, cell_text

MOST_COLUMNS = 16
_LONG_TEXT = 300  # characters in the middle cell
_CODE = re.compile(r"[A-Za-z]{0,4}[-_ #]?\d[\w-]*")
_FILE = re.compile(r".+\.(?:png|jpe?g|webp|gif|bmp|tiff?)", re.IGNORECASE)
_PLACE = re.compile(r"(?:[a-z]+://|www\.)\S+|\S+@\S+\.\w+", re.IGNORECASE)

_PRIVATE = {
    *("email", "e_mail", "mail", "phone", "telephone", "mobile", "address", "street", "zip"),
    *("zip_code", "postcode", "postal_code", "url", "link", "website", "price", "status"),
    *("notes", "note", "comment", "comments", "remark", "remarks", "todo", "file", "filename"),
    *("file_name", "language", "locale", "version", "author", "created_by"),
}
_FIRST_NAMES = {"name", "first_name", "last_name", "surname", "full_name", "username", "nickname"}
_GENDERS = {"gender", "sex"}
_PEOPLE = {
    *_GENDERS,
    *("age", "occupation", "job", "profession", "hair_color", "hair", "hair_style", "eye_color"),
    *("skin_tone", "skin", "nationality", "ethnicity"),
}
_SUBJECTS = (
    *("subject", "main_subject", "object", "item", "product", "product_name", "dish", "meal"),
    *("food", "animal", "species", "creature", "character", "plant", "flower", "vehicle", "car"),
    *("building", "landscape", "scene", "thing", "topic", "theme", "title", "motif", "what"),
)
_KINDS = ("breed", "type", "category", "kind", "class")
_ADJECTIVES = (
    *("rarity", "size", "shape", "age_group", "condition", "color", "main_color", "pattern"),
    *("material", "nationality", "ethnicity", "cuisine"),
)
# (names, words around the value), in the order of the sentence
_PHRASES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("age", "age_years"), "{} years old"),
    (("occupation", "job", "profession", "role"), "{}"),
    (("species", "breed"), "{}"),
    (("skin_tone", "skin"), "{} skin"),
    (("hair", "hair_style", "hairstyle"), "{} hair"),
    (("hair_color",), "{} hair"),
    (("eye_color", "eyes"), "{} eyes"),
    (("beard",), "{} beard"),
    (("expression", "facial_expression"), "{} expression"),
    (("emotion",), "{} expression"),
    (("clothes", "clothing", "outfit", "costume", "dress", "wearing"), "wearing {}"),
    (("clothes_color", "outfit_color"), "{} clothes"),
    (("hat", "glasses", "accessory", "accessories", "jewelry"), "with {}"),
    (("garnish", "topping", "toppings"), "with {}"),
    (("plate",), "on {}"),
    (("effect", "detail", "details", "features", "extra"), "{}"),
    (("holding", "prop", "props"), "holding {}"),
    (("action", "activity", "pose", "doing"), "{}"),
    (("location", "place", "setting", "environment", "city", "country", "where"), "in {}"),
    (("background", "backdrop"), "{} background"),
    (("season",), "in {}"),
    (("weather",), "{} weather"),
    (("time_of_day", "daytime"), "{}"),
    (("mood", "atmosphere"), "{} mood"),
    (("lighting", "light"), "{} light"),
    (("composition", "framing", "shot", "camera", "camera_angle", "angle", "view", "lens"), "{}"),
    (("palette", "colors", "color_palette"), "{} colors"),
    (("style", "art_style", "medium", "genre"), "{} style"),
    (("artist",), "in the style of {}"),
    (("quality",), "{}"),
)
_Place = Callable[[Column], str]  # takes a column into the sentence; how it stands there
_ORDER = {name: place for place, (names, _) in enumerate(_PHRASES) for name in names}


@dataclass(frozen=True)
class Draft:
    """A template, and which columns it has.

    Attributes:
        template: as the option of the generator `template` takes it; "" where no column fits.
        used: columns in it, in its order.
        left_out: the other columns, and why each of them is left out.
    """

    template: str
    used: tuple[str, ...]
    left_out: dict[str, str]


def draft_template(columns: Sequence[Column]) -> Draft:
    """Draft a template for a table."""
    people = any(column.plain in _PEOPLE for column in columns)
    left_out: dict[str, str] = {}
    chosen: list[Column] = []
    for column in columns:
        why = _why_not(column, people)
        if why is None and len(chosen) == MOST_COLUMNS:
            why = f"over {MOST_COLUMNS} columns"
        if why is None:
            chosen.append(column)
        else:
            left_out[column.name] = why
    if not chosen:
        return Draft("", (), left_out)
    parts, used = _sentence(chosen, people)
    text = ", ".join(parts)
    return Draft(text[0].upper() + text[1:], tuple(used), left_out)


def _sentence(columns: Sequence[Column], people: bool) -> tuple[list[str], list[str]]:
    """Phrases of the sentence, and the columns in them by name."""
    rest = list(columns)
    used: list[str] = []

    def place(column: Column) -> str:
        rest.remove(column)
        used.append(column.name)
        return f"{{{column.name}}}"

    def first(names: Sequence[str] | set[str]) -> Column | None:
        order = list(names)
        found = [column for column in rest if column.plain in names]
        return min(found, key=lambda column: order.index(column.plain), default=None)

    adjectives = [c for n in _ADJECTIVES for c in rest if c.plain == n]
    subject = first(_SUBJECTS) or (None if people else first(sorted(_FIRST_NAMES)))
    subject = subject or (None if people else first(_KINDS))
    if subject is not None:
        words = [place(column) for column in adjectives if column is not subject]
        parts = [" ".join(["picture of", *words, place(subject)])]
    elif people:
        gender = first(_GENDERS)
        words = [place(c) for c in adjectives if c.plain in ("nationality", "ethnicity")]
        person = "person" if gender is None else place(gender)
        parts = [" ".join(["portrait of a", *words, person])]
    else:  # nothing says what is seen: the first text does
        texts = [column for column in rest if column.plain not in _ORDER]
        head = next(iter(texts), rest[0])
        words = [place(column) for column in adjectives if column is not head and column in rest]
        parts = [" ".join(["picture of", *words, place(head)])]
    known = sorted((c for c in rest if c.plain in _ORDER), key=lambda c: _ORDER[c.plain])
    for column in known:
        if column in rest:
            parts.append(_phrase(column, rest, place))
    for column in list(rest):
        label = column.plain.replace("_", " ")
        if label.endswith(" color"):
            parts.append(f"{place(column)} {label.removesuffix(' color')}")
        else:
            parts.append(f"{label}: {place(column)}" if label else place(column))
    return parts, used


def _phrase(column: Column, rest: Sequence[Column], place: _Place) -> str:
    """The words of a known column; two that belong together are one phrase."""
    pairs = {
        ("hair", "hair_style", "hairstyle"): ("hair_color", "{0} {1} hair"),
        ("clothes", "clothing", "outfit", "dress"): ("clothes_color", "wearing {1} {0}"),
    }
    for names, (partner, words) in pairs.items():
        other = next((c for c in rest if c.plain == partner), None)
        if column.plain in names and other is not None:
            return words.format(place(column), place(other))
    return _PHRASES[_ORDER[column.plain]][1].replace("{}", place(column))


def _why_not(column: Column, people: bool) -> str | None:
    """Why a column is no part of a template; None where it is one."""
    plain = column.plain
    known = plain in _ORDER or plain in _SUBJECTS or plain in _ADJECTIVES or plain in _KINDS
    known = known or plain in _GENDERS
    if not column.cells:
        return "empty"
    if column.name in RESERVED_COLUMNS:
        return "sets the image's own seed, size, negative prompt or adapters"
    if column.is_id:
        return "an id"
    if set(column.name) & set("{}[].!:"):
        return "its name cannot stand in a template"
    if 2 * column.empty > column.rows:
        return "over half of it is empty"
    if people and plain in _FIRST_NAMES:
        return "a person's name"
    if plain in _PRIVATE:
        return "says nothing that is seen"
    if not known and column.kind not in ("text", "several kinds"):
        return column.kind
    texts = [cell_text(cell) for cell in column.cells]
    for pattern, what in ((_FILE, "image files"), (_PLACE, "addresses"), (_CODE, "codes")):
        if column.kind == "text" and all(pattern.fullmatch(text) for text in texts):
            return what
    if statistics.median(map(len, texts)) > _LONG_TEXT:
        return "long texts"
    return None
