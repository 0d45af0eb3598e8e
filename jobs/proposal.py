"""Which generator fits a table, from its columns' names and what kind of cells they have."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from jobs.errors import InputError
from jobs.quantities import counted
from jobs.table_view import Column
from jobs.template_draft import draft_template
from prompt_generators import GENERATORS, Profiles, resolve_generator
from prompt_generators.base import INT64_MAX
from prompt_generators.composer import Composer
from prompt_generators.profiles import RESERVED_COLUMNS

# Columns by which a table is known to be one of people, dishes or items of a game: all of the
# first, and so many of the second.
_MARKS: dict[str, tuple[set[str], set[str], int]] = {
    "avatars": (
        set(),
        {
            *("age", "gender", "skin_tone", "hair_style", "hair_color", "eye_color", "glasses"),
            *("hat", "beard", "expression", "clothes", "clothes_color", "occupation"),
        },
        3,
    ),
    "food": ({"dish"}, {"cuisine", "main_color", "plate", "garnish"}, 1),
    "gaming": ({"item"}, {"rarity", "effect"}, 1),
}
_PROMPTS = {
    *("prompt", "prompts", "image_prompt", "text_prompt", "prompt_text", "positive_prompt"),
    *("full_prompt", "final_prompt"),
}
_TEXTS = {"text", "caption", "captions", "description", "image_description", "scene_description"}
_WORDS = 6  # of a description in the middle, for it to be a prompt by itself
_SHOWN = 20  # columns in a message
_NEGATIVE = {"negative_prompt", "negative", "neg_prompt", "prompt_negative"}


@dataclass(frozen=True)
class Proposal:
    """A generator for a table.

    Attributes:
        generator: its name.
        options: for it, in the order in which they are written.
        used: columns that become words of the prompt.
        left_out: the other columns, and why each is left out.
        why: this generator, in a line.
        notes: what the user should know, a sentence each. Not safe to print as they are.
    """

    generator: str
    options: dict[str, Any]
    used: tuple[str, ...]
    left_out: Mapping[str, str]
    why: str
    notes: tuple[str, ...] = field(default=())

    def reasons(self) -> dict[str, list[str]]:
        """The columns that are left out, by why they are."""
        found: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            found.setdefault(why, []).append(name)
        return found


def prompt_columns(columns: Sequence[Column]) -> list[str]:
    """Columns that are plainly prompts, the likeliest first."""
    texts = [column for column in columns if column.kind == "text"]
    named = [c for c in texts if c.plain in _PROMPTS]
    named += [c for c in texts if c not in named and _is_prompt(c.plain)]
    if named:
        return [column.name for column in sorted(named, key=lambda c: c.plain != "prompt")]
    if _composer(columns) is not None:
        return []
    return [c.name for c in texts if c.plain in _TEXTS and not c.empty and _num_words(c) >= _WORDS]


def propose(profiles: Profiles, columns: Sequence[Column], prompt: str | None) -> Proposal:
    """Propose a generator.

    Args:
        prompt: the column that was chosen among `prompt_columns`; None where there is none.

    Raises:
        InputError: no column says what an image shows.
    """
    if prompt is not None:
        return _table(columns, prompt)
    name = _composer(columns)
    misspelled = _misspelled(columns, name) if name is not None else {}
    if name is not None and not misspelled:
        known = [c.name for c in columns if c.name in _known(name) and c.cells]
        used = tuple(column for column in known if (name, column) != ("avatars", "name"))
        others = {c.name: _why_unknown(c, name) for c in columns if c.name not in used}
        why = f"it knows {len(known)} of {counted(len(columns), 'column')}"
        return Proposal(name, {}, used, others, why, tuple(_notes(columns)))
    draft = draft_template(columns)
    if not draft.used:
        reasons = "; ".join(f"{n!r}: {why}" for n, why in [*draft.left_out.items()][:_SHOWN])
        raise InputError(
            f"{profiles.error('no column says what an image shows')} ({reasons}); allowed: a table "
            "with a column of texts"
        )
    notes = _notes(columns)
    if misspelled:
        renamed = ", ".join(f"{old!r} as {new!r}" for old, new in misspelled.items())
        notes.insert(0, f"the generator {name} would know the columns {renamed}: rename them, and")
        notes[0] += f" `zimage init` proposes {name}"
    options: dict[str, Any] = {"template": draft.template}
    gaps = [c for c in columns if c.name in draft.used and c.empty]
    if gaps:
        options["missing"] = ""
        names = ", ".join(f"{column.name!r} ({column.empty:,})" for column in gaps)
        notes.append(f"cells are empty in {names}: they read as the option `missing` says")
    why = f"a draft from {counted(len(draft.used), 'column name')}, to be edited"
    return Proposal("template", options, draft.used, draft.left_out, why, tuple(notes))


def _table(columns: Sequence[Column], prompt: str) -> Proposal:
    """The generator `table`, with the columns that it shall read under another name."""
    options: dict[str, Any] = {} if prompt == "prompt" else {"column": prompt}
    negative = next((c.name for c in columns if c.plain in _NEGATIVE and c.kind == "text"), None)
    if negative not in (None, "negative_prompt"):
        options["negative_column"] = negative
    seed = next((c for c in columns if c.plain == "seed" and c.kind == "whole numbers"), None)
    if seed is not None and seed.name != "seed" and _are_seeds(seed):
        options["seed_column"] = seed.name
    used = [prompt, *([negative] if negative else []), *([options.get("seed_column")] * 1)]
    read = {name for name in used if name} | set(RESERVED_COLUMNS)
    left_out = {c.name: "in the manifest alone" for c in columns if c.name not in read}
    why = f"column {prompt!r} holds the prompts"
    return Proposal("table", options, (prompt,), left_out, why, tuple(_notes(columns)))


def _composer(columns: Sequence[Column]) -> str | None:
    """The composing generator whose table this is, other spellings of columns included."""
    plain = {column.plain for column in columns if column.cells}
    content = [c for c in columns if c.cells and not c.is_id and c.name not in RESERVED_COLUMNS]
    for name, (needed, marks, least) in _MARKS.items():
        known = sum(column.plain in _known(name) for column in content)
        if needed <= plain and len(marks & plain) >= least and 2 * known >= len(content):
            return name
    return None


def _known(generator: str) -> tuple[str, ...]:
    assert generator in GENERATORS
    return cast("type[Composer]", resolve_generator(generator)).columns


def _misspelled(columns: Iterable[Column], generator: str) -> dict[str, str]:
    """Columns that the generator would know by another name, which it refuses."""
    known = {*_known(generator), *RESERVED_COLUMNS}
    return {c.name: c.plain for c in columns if c.plain in known and c.name not in known}


def _why_unknown(column: Column, generator: str) -> str:
    if column.name in RESERVED_COLUMNS:
        return "sets the image's own seed, size, negative prompt or adapters"
    if not column.cells:
        return "empty"
    if column.is_id:
        return "an id"
    if column.name == "name":
        return "with the option include_name alone"
    return f"not known to {generator}"


def _notes(columns: Iterable[Column]) -> list[str]:
    notes = []
    for column in columns:
        if column.name == "loras" and column.cells:
            notes.append("the column 'loras' names adapters: declare them under model.loras")
        if column.is_id and column.repeated:
            times = counted(column.repeated, "value")
            notes.append(f"column {column.name!r}: {times} repeated, in a column that names rows")
    return notes


def _is_prompt(plain: str) -> bool:
    words = plain.split("_")
    return "prompt" in words and "negative" not in words and "neg" not in words


def _num_words(column: Column) -> float:
    return statistics.median(len(str(cell).split()) for cell in column.cells)


def _are_seeds(column: Column) -> bool:
    return all(isinstance(cell, int) and 0 <= cell <= INT64_MAX for cell in column.cells)
