"""What a caption says: attributes read from its words, for captions of the grammar and others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from zimage_core.tiny.attributes import NONE
from zimage_core.tiny.vocabulary import Vocabulary


class CaptionReader:
    """Reads attributes from captions.

    Args:
        vocabulary: the words.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tables = {name: vocabulary.meanings(name) for name in vocabulary.tables}
        table = self._tables
        colors = _any(table["colors"])
        between = {
            kind: _any(
                word
                for name in ("rarity", "cuisine", "material", "main_color")
                for word in vocabulary.things[kind].get(name, ())
                if word.casefold() not in table["colors"]
            )
            for kind in ("food", "gaming")
        }
        hair_color = f"(?:({_any(table['avatars.hair_color'])}) )?"
        self._hair = _pattern(
            f"(?:({_any(table['avatars.hair_style'])}) )?{hair_color}"
            f"hair(?: in (?:an? )?({_any(table['avatars.haircut'])}))?"
        )
        self._haircut = _pattern(f"{hair_color}({_any(table['avatars.haircut'])})")
        self._bald = _pattern(f"({_any(table['avatars.bald'])})")
        self._hat = _pattern(f"(?:({colors}) )?({_any(table['avatars.hat'])}|hat)")
        self._clothes = _pattern(f"(?:({colors}) )?({_any(table['avatars.clothes'])})")
        self._background = _pattern(
            f"(?:plain )?({_any(table['backgrounds'])}) (?:background|backdrop)"
        )
        self._scene = _pattern(f"({_any(table['scenes'])})")
        self._simple = {
            "gender": _pattern(f"({_any(table['avatars.gender'])})"),
            "skin": _pattern(f"({_any(table['avatars.skin'])}) skin"),
            "eyes": _pattern(f"({_any(table['avatars.eyes'])}) eyes"),
            "glasses": _pattern(f"({_any(table['avatars.glasses'])})"),
            "beard": _pattern(f"({_any(table['avatars.beard'])})"),
            "expression": _pattern(f"({_any(table['avatars.expression'])})(?! mood)"),
        }
        self._dish = _pattern(
            f"(?:({colors}) )?(?:(?:{between['food']}) )*({_any(table['food.dish'])})"
        )
        self._plate = _pattern(f"({_any(table['food.plate'])})")
        self._item = _pattern(
            f"(?:({colors}) )?(?:(?:{between['gaming']}) )*({_any(table['gaming.item'])})"
        )
        self._effect = _pattern(f"({_any(table['gaming.effect'])})")

    def kind(self, caption: str) -> str | None:
        """The kind of what a caption describes; None where it names nothing that is known."""
        text = caption.casefold()
        if self._dish.search(text):
            return "food"
        if self._simple["gender"].search(text):
            return "avatars"
        return "gaming" if self._item.search(text) else None

    def read(self, caption: str) -> tuple[str | None, dict[str, str]]:
        """The kind, and the attributes that the caption states; what it leaves open is absent."""
        text = caption.casefold()
        kind = self.kind(caption)
        found: dict[str, str] = {}
        if kind is None:
            return None, found
        if match := self._scene.search(text):
            found["background"] = self._tables["scenes"][match[1]]
        elif match := self._background.search(text):
            found["background"] = self._tables["backgrounds"][match[1]]
        if kind == "avatars":
            self._read_person(text, found)
        elif kind == "food":
            self._read_dish(text, found)
        else:
            self._read_item(text, found)
        return kind, found

    def _read_person(self, text: str, found: dict[str, str]) -> None:
        for attribute, pattern in self._simple.items():
            if match := pattern.search(text):
                found[attribute] = self._tables[f"avatars.{attribute}"][match[1]]
        self._read_hair(text, found)
        if match := _pattern(f"({_any(self._tables['avatars.bareheaded'])})").search(text):
            found["hat"], found["hat_color"] = NONE, NONE
        elif match := self._hat.search(text):
            if match[2] != "hat":
                found["hat"] = self._tables["avatars.hat"][match[2]]
            if match[1]:
                found["hat_color"] = self._tables["colors"][match[1]]
        if match := self._clothes.search(text):
            found["clothes"] = self._tables["avatars.clothes"][match[2]]
            if match[1]:
                found["clothes_color"] = self._tables["colors"][match[1]]

    def _read_hair(self, text: str, found: dict[str, str]) -> None:
        if self._bald.search(text):
            found["hair_style"] = "bald"
            return
        style = color = cut = None
        if match := self._hair.search(text):
            style, color, cut = match.groups()
        elif match := self._haircut.search(text):
            color, cut = match.groups()
        if color:
            found["hair_color"] = self._tables["avatars.hair_color"][color]
        if cut:
            found["hair_style"] = self._tables["avatars.haircut"][cut]
        elif style:
            found["hair_style"] = self._tables["avatars.hair_style"][style]

    def _read_dish(self, text: str, found: dict[str, str]) -> None:
        match = self._dish.search(text)
        assert match is not None
        found["dish"] = self._tables["food.dish"][match[2]]
        if match[1]:
            found["color"] = self._tables["colors"][match[1]]
        elif match[2] in self._tables["food.dish_color"]:
            found["color"] = self._tables["food.dish_color"][match[2]]
        if match := self._plate.search(text):
            found["plate"] = self._tables["food.plate"][match[1]]

    def _read_item(self, text: str, found: dict[str, str]) -> None:
        match = self._item.search(text)
        assert match is not None
        found["item"] = self._tables["gaming.item"][match[2]]
        if match[1]:
            found["color"] = self._tables["colors"][match[1]]
        if match := self._effect.search(text):
            found["effect"] = self._tables["gaming.effect"][match[1]]


def _any(words: Mapping[str, str] | Iterable[str]) -> str:
    """A pattern for any of the words, the longer ones first."""
    return "|".join(re.escape(word.casefold()) for word in sorted(words, key=len, reverse=True))


def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-]){pattern}(?![\w-])")
