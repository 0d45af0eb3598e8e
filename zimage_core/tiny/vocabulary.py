"""The words of captions: what each is drawn as, and the phrases that change nothing in a picture.

Both come from `data/vocabularies`, which the prompt generators read as well: `drawings.json` says
how the words of the generators' vocabularies (`avatars.json`, `food.json`, `gaming.json`) are
drawn, several on one value where the world has no drawing of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_core.tiny.attributes import KINDS, NONE, VALUES

FOLDER = Path(__file__).parents[2] / "data" / "vocabularies"
"""Where a clone has them; an installed wheel has none, and takes a folder as an argument."""

Table = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Vocabulary:
    """Words by what they mean.

    Attributes:
        tables: for each table of `drawings.json` and each value the words that mean it.
        noise: lists of words and phrases without an effect.
        slots: for each kind and slot ("framing", "lighting", ...) its phrases.
        things: for each kind and list of words that go with a thing ("material", "garnish", ...)
            all its words.
        styles: for each kind the names of styles, without an effect as well.
    """

    tables: Mapping[str, Table]
    noise: Table
    slots: Mapping[str, Table]
    things: Mapping[str, Table]
    styles: Table

    def words(self, table: str, value: str) -> tuple[str, ...]:
        """The words for a value; none where the table has no such value."""
        return self.tables[table].get(value, ())

    def meanings(self, table: str) -> dict[str, str]:
        """For each word of a table the value that it means."""
        return {word: value for value, words in self.tables[table].items() for word in words}


def load_vocabulary(folder: Path | None = None) -> Vocabulary:
    """Read the vocabulary.

    Args:
        folder: with `drawings.json` and one file for each kind; that of the clone if not given.

    Raises:
        ValueError: a file is missing, or a table names a value that is not drawn.
    """
    folder = folder or FOLDER
    drawings = _read(folder / "drawings.json")
    noise = drawings.pop("noise")
    slots: dict[str, Table] = {}
    things: dict[str, Table] = {}
    styles: dict[str, tuple[str, ...]] = {}
    for kind in KINDS:
        content = _read(folder / f"{kind}.json")
        slots[kind] = _tuples(content["slots"])
        things[kind] = _things(content)
        styles[kind] = tuple(content["attributes"]["style"])
    vocabulary = Vocabulary(
        tables={name: _tuples(table) for name, table in drawings.items()},
        noise=_tuples(noise),
        slots=slots,
        things=things,
        styles=styles,
    )
    _check(vocabulary, folder / "drawings.json")
    return vocabulary


_ATTRIBUTE_OF_TABLE = {
    "avatars.haircut": "hair_style",
    "avatars.bald": "hair_style",
    "avatars.bareheaded": "hat",
    "food.dish_color": "color",
}


def _check(vocabulary: Vocabulary, path: Path) -> None:
    for name, table in vocabulary.tables.items():
        kind, _, attribute = name.partition(".")
        if not attribute:
            continue
        allowed = VALUES[kind][_ATTRIBUTE_OF_TABLE.get(name, attribute)]
        for value in table:
            if value not in allowed:
                raise ValueError(f"{path}: {name}: {value!r}; allowed: {', '.join(allowed)}")


def _things(content: Mapping[str, Any]) -> Table:
    found: dict[str, list[str]] = {"rarity": list(content["attributes"].get("rarity", {}))}
    for suits in content.get("things", {}).values():
        for name, words in suits.items():
            found.setdefault(name, []).extend(words)
    return {
        name: tuple(dict.fromkeys(word for word in words if word != NONE))
        for name, words in found.items()
    }


def _tuples(lists: Mapping[str, Sequence[str]]) -> Table:
    return {name: tuple(values) for name, values in lists.items()}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: file is missing; vocabularies are in data/ of a clone")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
