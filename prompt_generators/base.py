"""What a prompt is, what a generator of prompts is, and the error that a bad table gives."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Scalar = str | int | float | bool | datetime.datetime | datetime.date | None
"""A flat value: a table's cell, an entry of a prompt's metadata, a column of the manifest."""

INT64_MAX = 2**63 - 1


class ProfileError(ValueError):
    """A profile table that cannot be used: says where in the table, and what was allowed there.

    `row` is the number that a spreadsheet shows: the header is row 1.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: Path | str | None = None,
        sheet: str | None = None,
        row: int | None = None,
        column: str | None = None,
        value: object = None,
        allowed: str | None = None,
    ) -> None:
        self.problem = problem
        self.path = None if path is None else Path(path)
        self.sheet = sheet
        self.row = row
        self.column = column
        self.value = value
        self.allowed = allowed
        place = [
            *([] if path is None else [str(path)]),
            *([] if sheet is None else [f"sheet {sheet!r}"]),
            *([] if row is None else [f"row {row}"]),
            *([] if column is None else [f"column {column!r}"]),
        ]
        message = f"{', '.join(place)}: {problem}" if place else problem
        if value is not None:
            message += f", got {_shown(value)}"
        if allowed is not None:
            message += f" (allowed: {allowed})"
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        # The default rebuilds an exception from its message alone and would lose the place.
        return _rebuild_profile_error, (
            self.problem,
            self.path,
            self.sheet,
            self.row,
            self.column,
            self.value,
            self.allowed,
        )


def _rebuild_profile_error(
    problem: str,
    path: Path | None,
    sheet: str | None,
    row: int | None,
    column: str | None,
    value: object,
    allowed: str | None,
) -> ProfileError:
    return ProfileError(
        problem, path=path, sheet=sheet, row=row, column=column, value=value, allowed=allowed
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Metadata(Mapping[str, Scalar]):
    """A mapping that is only read. Unlike `types.MappingProxyType` it pickles and copies."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Scalar]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> Scalar:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


@dataclass(frozen=True)
class Prompt:
    """One prompt and what it asks for besides its text. What is `None` the job decides.

    Attributes:
        text: what the image shows; not blank.
        negative_text: what it must not show.
        seed: 0 to 2**63 - 1 (the manifest's int64).
        width, height: pixels.
        images: relative to the job's `prompts.images_root`: the one to start from, or, with a
            checkpoint that edits, the pictures to edit, in order.
        loras: names that the job declares under `model.loras`.
        metadata: flat scalars, copied to the manifest as `profile_<name>`.

    Raises:
        ValueError: a field is not what it must be.
    """

    text: str
    negative_text: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    images: Sequence[str] = ()
    loras: Sequence[str] = ()
    metadata: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise ValueError(f"Prompt.text must be text that is not blank, got {self.text!r}")
        if self.negative_text is not None and not isinstance(self.negative_text, str):
            raise ValueError(
                f"Prompt.negative_text must be text or None, got {self.negative_text!r}"
            )
        _check_utf8("text", self.text)
        _check_utf8("negative_text", self.negative_text)
        _check_int("seed", self.seed, 0)
        _check_int("width", self.width, 1)
        _check_int("height", self.height, 1)
        object.__setattr__(self, "images", _names("images", self.images))
        object.__setattr__(self, "loras", _names("loras", self.loras))
        object.__setattr__(self, "metadata", _metadata(self.metadata))


def _check_utf8(name: str, text: object) -> None:
    # Half an emoji, cut off by slicing UTF-16 elsewhere, is a str that nothing can write.
    if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"Prompt.{name} holds a lone surrogate, which is no text: {text!r}")


def _check_int(name: str, value: object, least: int) -> None:
    if value is None:
        return
    # A bool is an int to Python, never to whoever wrote the prompt.
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not least <= value <= INT64_MAX:  # type: ignore[operator]  # is an int here
        raise ValueError(f"Prompt.{name} must be an int from {least} to 2**63 - 1, got {value!r}")


def _names(name: str, values: object) -> tuple[str, ...]:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"Prompt.{name} must be a list or tuple of texts, got {values!r}")
    names = tuple(str(value) if isinstance(value, Path) else value for value in values)
    for value in names:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"Prompt.{name} must hold texts that are not blank, got {value!r}")
        _check_utf8(name, value)
    return names


def _metadata(values: object) -> Metadata:
    if not isinstance(values, Mapping):
        raise ValueError(f"Prompt.metadata must be a mapping, got {values!r}")
    for key, value in values.items():
        if not isinstance(key, str) or not key:
            raise ValueError(f"Prompt.metadata must have texts as keys, got {key!r}")
        if value is not None and not isinstance(value, (str, int, float, datetime.date)):
            raise ValueError(
                f"Prompt.metadata[{key!r}] must be a str, int, float, bool, datetime, date or "
                f"None, got {value!r} of type {type(value).__name__}"
            )
        _check_utf8("metadata", key)
        _check_utf8(f"metadata[{key!r}]", value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"Prompt.metadata[{key!r}] is {value!r}; write None where unknown")
        if isinstance(value, int) and not -INT64_MAX - 1 <= value <= INT64_MAX:
            raise ValueError(f"Prompt.metadata[{key!r}] does not fit in 64 bits: {value!r}")
    return Metadata(values)


@runtime_checkable
class PromptGenerator(Protocol):
    """Gives the prompt of every index.

    `generate_prompt` is a pure function of the constructor's arguments and `index`: the same
    prompt on every machine, in any order. A generator that ends defines `__len__`, the number of
    its prompts; one that does not end leaves `__len__` out (see `generator_length`).
    """

    def generate_prompt(self, index: int) -> Prompt | str:
        """The prompt of `index`, 0 or more."""
        ...


def generator_length(generator: PromptGenerator) -> int | None:
    """How many prompts `generator` has, `None` where it is endless.

    Endless is a class without `__len__`, with `__len__ = None`, or whose `__len__` gives `None`.

    Raises:
        ValueError: `__len__` gives something else than an int of 0 or more.
    """
    method = getattr(type(generator), "__len__", None)
    length = None if method is None else method(generator)
    if length is None:
        return None
    if not isinstance(length, int) or isinstance(length, bool) or length < 0:
        raise ValueError(
            f"{type(generator).__name__}.__len__ must give an int of 0 or more, or None where "
            f"endless, got {length!r}"
        )
    return length


def prompt_at(generator: PromptGenerator, index: int) -> Prompt:
    """`generator.generate_prompt(index)` as a `Prompt`, also where the generator gives a `str`.

    Raises:
        ValueError: the generator gives something else. What it raises itself is passed on.
    """
    result: object = generator.generate_prompt(index)
    if isinstance(result, Prompt):
        return result
    if isinstance(result, str):
        return Prompt(result)
    raise ValueError(
        f"{type(generator).__name__}.generate_prompt({index}) must give a Prompt or a str, "
        f"got {result!r}"
    )


def check_index(index: int, length: int | None = None) -> None:
    """Raise IndexError unless `index` is an int from 0 up to (not including) `length`."""
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise IndexError(f"a prompt's index must be an int of 0 or more, got {index!r}")
    if length is not None and index >= length:
        raise IndexError(f"there is no prompt {index}: the generator has {length}")
