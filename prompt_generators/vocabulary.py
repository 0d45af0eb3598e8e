"""Weighted vocabularies, and draws from them that depend on nothing but a key.

A draw is a BLAKE2b hash of (seed, generator, index, attribute): no random state, no Python
`hash`, no floats, so the same choice on every machine, in any order and in any process.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from pathlib import Path

_PACKAGE = Path(__file__).parent
# Vocabularies are data that others share: `data/vocabularies` in a clone, a folder of this package
# in a wheel, which has no place for a top-level `data`.
_CLONE_FOLDER = _PACKAGE.parent / "data" / "vocabularies"
VOCABULARY_FOLDER = _CLONE_FOLDER if _CLONE_FOLDER.is_dir() else _PACKAGE / "vocabularies"


def stable_hash(*key: str | int) -> int:
    """An int of 64 bits, uniform over keys. Keys of different parts never run into each other."""
    digest = hashlib.blake2b(digest_size=8)
    for part in key:
        data = str(part).encode()
        digest.update(len(data).to_bytes(4, "big"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "big")


def permute(index: int, size: int, *key: str | int) -> int:
    """Where a pseudorandom permutation of `range(size)`, one for each key, takes `index`.

    A Feistel network of four rounds over the next power of four, walked until it is below `size`:
    consecutive indices land far apart, and no two on the same place.
    """
    assert 0 <= index < size
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for level in range(4):
            left, right = right, left ^ (stable_hash(*key, level, right) & mask)
        index = left << half | right
        if index < size:
            return index


@dataclass(frozen=True)
class Vocabulary:
    """The words of one generator.

    Attributes:
        attributes: for each attribute its values with whole-number weights. The value "none"
            stands for leaving the attribute out.
        slots: lists of phrases of which every prompt takes one each. The combination is a
            permutation of the index: any `combinations` consecutive prompts differ in it.
        things: what a generator draws (dishes, items), each with lists that suit it.
    """

    attributes: Mapping[str, Mapping[str, int]]
    slots: Mapping[str, Sequence[str]]
    things: Mapping[str, Mapping[str, Sequence[str]]]

    @property
    def combinations(self) -> int:
        """How many combinations of one phrase from each slot there are."""
        return prod(len(phrases) for phrases in self.slots.values())


@lru_cache
def load_vocabulary(name: str) -> Vocabulary:
    """The vocabulary shipped as `vocabularies/<name>.json`."""
    content = json.loads(vocabulary_path(name).read_text(encoding="utf-8"))
    return Vocabulary(content["attributes"], content["slots"], content.get("things", {}))


def vocabulary_path(name: str) -> Path:
    """The file of a shipped vocabulary."""
    return VOCABULARY_FOLDER / f"{name}.json"


@dataclass(frozen=True)
class Draw:
    """All choices of one prompt: a pure function of `seed`, `name` (the generator) and `index`."""

    vocabulary: Vocabulary
    seed: int
    name: str
    index: int

    def attribute(self, attribute: str) -> str:
        """A value of `attribute` by weight; "" where the vocabulary's choice is "none"."""
        return self.weighted(attribute, self.vocabulary.attributes[attribute])

    def weighted(self, attribute: str, weights: Mapping[str, int]) -> str:
        """One of `weights` by weight; "" for "none". `attribute` keeps draws independent."""
        ends = list(accumulate(weights.values()))
        drawn = list(weights)[bisect_right(ends, self._hash(attribute) % ends[-1])]
        return "" if drawn == "none" else drawn

    def one_of(self, attribute: str, values: Sequence[str]) -> str:
        """One of `values`, all alike; "" for "none"."""
        drawn = values[self._hash(attribute) % len(values)]
        return "" if drawn == "none" else drawn

    def number(self, attribute: str, least: int, most: int) -> int:
        """An int from `least` to `most`, both included."""
        return least + self._hash(attribute) % (most - least + 1)

    def slots(self) -> dict[str, str]:
        """The phrase of every slot. Any `combinations` consecutive indices give different ones."""
        size = self.vocabulary.combinations
        combination = permute(self.index % size, size, self.seed, self.name, "slots")
        chosen = {}
        for slot, phrases in self.vocabulary.slots.items():
            combination, position = divmod(combination, len(phrases))
            chosen[slot] = phrases[position]
        return chosen

    def _hash(self, attribute: str) -> int:
        return stable_hash(self.seed, self.name, self.index, attribute)


_SILENT_OR_LIKE_A_CONSONANT = ("hour", "honest", "heir")
_VOWEL_LIKE_A_CONSONANT = ("uni", "use", "eu", "one", "ukulele", "ura", "uti")


def with_article(phrase: str) -> str:
    """The phrase with "a" or "an" before it, unless it is plural or has an article already."""
    first = phrase.split()[0].lower()
    if first in {"a", "an", "the", "some", "two", "three", "his", "her", "their"}:
        return phrase
    if is_plural(phrase):
        return phrase
    return f"{_article(first)} {phrase}"


def _article(first: str) -> str:
    if first[0].isdigit():
        digits = "".join(ch for ch in first if ch.isdigit())
        return "an" if digits[0] == "8" or digits in {"11", "18"} else "a"
    if first.startswith(_SILENT_OR_LIKE_A_CONSONANT):
        return "an"
    if first[0] in "aeiou" and not first.startswith(_VOWEL_LIKE_A_CONSONANT):
        return "an"
    return "a"


def is_plural(phrase: str) -> bool:
    """Whether the last word of the phrase's head ("boots", not "glass" or "canvas") is plural."""
    head = phrase.lower().split(" with ")[0].split(" of ")[0].split()[-1]
    return head.endswith("s") and not head.endswith(("ss", "us", "is", "as"))
