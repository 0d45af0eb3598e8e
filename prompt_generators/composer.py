"""What the composing generators (`avatars`, `food`, `gaming`) share: rows, draws and checks."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from prompt_generators.base import Prompt, Scalar, check_index
from prompt_generators.profiles import RESERVED_COLUMNS, Profiles, read_profiles
from prompt_generators.vocabulary import Draw, is_plural, load_vocabulary, with_article

_ABSENT = {"none", "no", "n/a", "-"}


class Composer(ABC):
    """Composes a prompt from a profile's row, and from a vocabulary where the row says nothing.

    Endless: index i uses row `i % rows`, and whatever that row leaves open is drawn anew for each
    i. A cell that says "none" (or "no", or false) leaves its attribute out of the prompt; an empty
    one leaves it open. Columns the class does not know only become metadata.

    Args:
        profiles: a CSV or XLSX table; without one everything is drawn.
        sheet: the XLSX sheet; the first one if not given.
        seed: another seed draws other prompts. It is not the seed of an image.

    Raises:
        ProfileError: the table, or a cell of it, cannot be used; all rows are checked.
        ValueError: an option is not what it must be.
    """

    name: ClassVar[str]
    """The generator's name: that of its vocabulary, and a part of what every draw depends on."""
    columns: ClassVar[tuple[str, ...]]
    """The columns whose cells become words."""
    yes_no: ClassVar[tuple[str, ...]] = ()
    """Those of `columns` in which true and false are also allowed."""

    def __init__(
        self, profiles: Path | str | None = None, sheet: str | None = None, *, seed: int = 0
    ) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"option seed must be an int, got {seed!r}")
        self.seed = seed
        self.vocabulary = load_vocabulary(self.name)
        self.profiles = read_table(profiles, sheet)
        if self.profiles is not None:
            _check_names(self.profiles, (*self.columns, *RESERVED_COLUMNS))
            for row in range(len(self.profiles)):
                self.check_row(self.profiles, row)

    def generate_prompt(self, index: int) -> Prompt:
        """The prompt of `index`, 0 or more."""
        check_index(index)
        draw = Draw(self.vocabulary, self.seed, self.name, index)
        if self.profiles is None:
            return Prompt(self.compose({}, draw))
        row = index % len(self.profiles)
        return self.profiles.prompt(row, self.compose(self.words(self.profiles, row), draw))

    @abstractmethod
    def compose(self, given: Mapping[str, str], draw: Draw) -> str:
        """The text of one prompt: what `given` says, and draws for the other attributes.

        `given` holds only what the profile says; "" means that the attribute is to be left out.
        """

    def check_row(self, profiles: Profiles, row: int) -> None:
        """Raise ProfileError for a row that cannot be used. Called for all rows, once."""
        profiles.prompt_fields(row)
        self.words(profiles, row)

    def words(self, profiles: Profiles, row: int) -> dict[str, str]:
        """The row's cells among `columns`, as words for `compose`. Empty cells are left out."""
        given = {}
        for column in self.columns:
            if profiles.rows[row].get(column) is not None:
                given[column] = self.word(profiles, row, column)
        return given

    def word(self, profiles: Profiles, row: int, column: str) -> str:
        """One cell, not empty, as words."""
        value: Scalar = profiles.rows[row][column]
        if column in self.yes_no and isinstance(value, bool):
            return column if value else ""
        text = " ".join((profiles.text_cell(row, column) or "").split()).rstrip(" .,;")
        return "" if text.casefold() in _ABSENT else text


def read_table(profiles: Path | str | None, sheet: str | None) -> Profiles | None:
    """The table, or `None` where none is given.

    Raises:
        ProfileError: the table cannot be read.
        ValueError: a sheet without a table.
    """
    if profiles is None:
        if sheet is not None:
            raise ValueError(f"sheet {sheet!r} is given, but no profile table")
        return None
    return read_profiles(profiles, sheet)


def _check_names(profiles: Profiles, known: tuple[str, ...]) -> None:
    """Refuse "Hair Colour": it is meant to be `hair_color`, and would be ignored in silence."""
    for column in profiles.columns:
        plain = re.sub(r"[\W_]+", "_", column.casefold()).strip("_").replace("colour", "color")
        if plain in known and column not in known:
            raise profiles.error(
                "looks like a column that the generator knows by another spelling",
                column=column,
                allowed=repr(plain),
            )


def choose(
    attribute: str,
    given: Mapping[str, str],
    draw: Draw,
    suits: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """What the profile says, else one of what suits the thing, else a draw from the vocabulary.

    "" where the attribute is left out: also where the vocabulary does not have it.
    """
    if attribute in given:
        return given[attribute]
    if suits and attribute in suits:
        return draw.one_of(attribute, suits[attribute])
    return draw.attribute(attribute) if attribute in draw.vocabulary.attributes else ""


def describe(framing: str, details: Sequence[str], picture: Sequence[str]) -> str:
    """Two sentences: `framing` of what is seen, then how the picture is made.

    `details[0]` is what is seen; details and parts of `picture` that are "" are left out.
    """
    seen = ", ".join(detail for detail in details if detail)
    made = ", ".join(part for part in picture if part)
    return f"{sentence(f'{framing} of {seen}')} {sentence(made)}"


def background(value: str) -> str:
    """A background as the end of a sentence; values may bring their own preposition."""
    if not value or has_preposition(value):
        return value
    if value.split()[0].lower() in {"a", "an", "the"} or is_plural(value):
        return f"against {value}"
    if value.endswith(("background", "backdrop", "wall", "sky")):
        return f"against {with_article(value)}"
    return f"against {with_article(f'{value} background')}"


def phrase(*words: str) -> str:
    """The words that are not empty, with a space between them."""
    return " ".join(word for word in words if word)


def sentence(text: str) -> str:
    """The text with a capital at its start and a full stop at its end."""
    text = " ".join(text.split())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


_PREPOSITIONS = {
    *("above", "against", "amid", "among", "at", "before", "behind", "beside", "by", "in"),
    *("inside", "near", "on", "over", "surrounded", "through", "under", "with", "within"),
}


def has_preposition(text: str) -> bool:
    """Whether the text says itself how it joins the sentence ("on a beach")."""
    return text.split()[0].lower() in _PREPOSITIONS
