"""A little English for captions."""

from __future__ import annotations

from collections.abc import Sequence

_PLURALS = (
    *("headphones", "overalls", "glasses", "sunglasses", "braids", "locs"),
    *("macarons", "tacos", "pancakes"),
)
_MASSES = ("ramen", "sushi", "soup", "borscht", "hair", "skin")


def with_article(phrase: str) -> str:
    """The phrase with "a" or "an" before it, where English wants one."""
    last = phrase.split()[-1]
    if last in _PLURALS or last in _MASSES or phrase.startswith(("a ", "an ")):
        return phrase
    if phrase[0].isdigit():
        an = phrase[0] == "8" or phrase.startswith(("11", "18"))
    else:
        an = phrase[0] in "aeiou" and not phrase.startswith("uni")
    return f"{'an' if an else 'a'} {phrase}"


def enumeration(items: Sequence[str]) -> str:
    """The items with commas and an "and"; at least one."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def spaced(*words: str) -> str:
    """The words that are not empty, with spaces."""
    return " ".join(word for word in words if word)


def sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."
