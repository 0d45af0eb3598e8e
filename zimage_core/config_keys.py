"""Strict reading of JSON: which keys a file of a checkpoint may have, and what each may hold.

A number that the file does not give is never guessed: a missing key, an unknown key and a value of
the wrong kind are errors, all of a file reported at once. Keys that start with an underscore are
notes of diffusers (`_class_name`, `_diffusers_version`) and are skipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from zimage_core.regular_file import read_regular

MAX_JSON_BYTES = 64 * 2**20
"""Of a JSON file of a checkpoint; the largest published one, `tokenizer.json`, has 11 MB."""

# Far above any model, and small enough that no product of a few of them overflows 64 bits.
_MAX_COUNT = 2**24
_MAX_LAYERS = 1024
_MAX_HEADS = 4096  # and channels of a head
_MAX_POSITIONS = 2**17  # of an axis; tables of that length are made
_MAX_ITEMS = 64  # of a list
_MAX_PROBLEMS = 10  # that one message tells
_MAX_SHOWN = 200  # characters of a value

Config = TypeVar("Config")


class CheckpointError(ValueError):
    """A checkpoint folder cannot be used; the message names the file and what is wrong in it."""


class ValueKind(NamedTuple):
    """What a key may hold: `accepts` sees the JSON value, `read` turns it into the field."""

    allowed: str
    accepts: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda value: value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_int(value) and 0 < value <= _MAX_COUNT


def _is_positive(value: Any) -> bool:
    # Python's JSON reader takes NaN and Infinity, which no checkpoint means.
    return _is_number(value) and value > 0


def _is_number(value: Any) -> bool:
    # A whole number of JSON may have thousands of digits, which no float holds.
    return (_is_int(value) and abs(value) <= 2**53) or (
        isinstance(value, float) and math.isfinite(value)
    )


def _is_list(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return (
        isinstance(value, list | tuple)
        and 0 < len(value) <= _MAX_ITEMS
        and all(map(accepts, value))
    )


def exactly(*allowed: Any) -> ValueKind:
    """One of these values, and of the same type."""
    text = " or ".join(json.dumps(value) for value in allowed)
    # `1 == True` in Python, not in JSON.
    return ValueKind(
        text, lambda value: any(value == a and type(value) is type(a) for a in allowed)
    )


def all_of(allowed: str) -> ValueKind:
    """A list of nothing but this word."""
    return ValueKind(
        f'a list of "{allowed}"', lambda v: _is_list(v, lambda item: item == allowed), tuple
    )


COUNT = ValueKind("a whole number above 0", _is_count)
COUNT_OR_NULL = ValueKind(
    f"null or {COUNT.allowed}", lambda value: value is None or _is_count(value)
)
COUNTS = ValueKind("a list of whole numbers above 0", lambda v: _is_list(v, _is_count), tuple)
POSITIVE = ValueKind("a number above 0", _is_positive, float)
BOOL = ValueKind("true or false", lambda value: isinstance(value, bool))
LAYERS = ValueKind(
    f"a whole number from 1 to {_MAX_LAYERS}", lambda v: _is_count(v) and v <= _MAX_LAYERS
)
PATCHES = ValueKind(
    "a list of whole numbers from 1 to 16",
    lambda v: _is_list(v, lambda item: _is_count(item) and item <= 16),
    tuple,
)
POSITIONS = ValueKind(
    f"a list of whole numbers from 1 to {_MAX_POSITIONS}",
    lambda v: _is_list(v, lambda item: _is_count(item) and item <= _MAX_POSITIONS),
    tuple,
)
HEADS = ValueKind(
    f"a whole number from 1 to {_MAX_HEADS}", lambda v: _is_count(v) and v <= _MAX_HEADS
)
NUMBER = ValueKind("a number", _is_number, float)
THREE_NUMBERS = ValueKind(
    "a list of three numbers", lambda v: _is_list(v, _is_number) and len(v) == 3, tuple
)
THREE_POSITIVES = ValueKind(
    "a list of three numbers above 0", lambda v: _is_list(v, _is_positive) and len(v) == 3, tuple
)
RESAMPLING = exactly(*range(6))  # of Pillow: 2 is bilinear
NULL = exactly(None)


def config_key(kind: ValueKind, **default: Any) -> Any:
    """Declare a field that is read from the key of the same name; without `default` it must be."""
    return field(metadata={"kind": kind}, **default)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object without its keys that start with an underscore.

    Raises:
        CheckpointError: the file is missing, is no JSON, or holds something other than an object.
    """
    values = read_json_object(path)
    return {key: value for key, value in values.items() if not key.startswith("_")}


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object with all its keys.

    Raises:
        CheckpointError: the file is missing, is no JSON, or holds something other than an object.
    """
    try:
        text = read_regular(path, MAX_JSON_BYTES).decode("utf-8")
        values = json.loads(text, object_pairs_hook=unrepeated)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: file is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(values).__name__}")
    return values


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs, for `json.loads`: no key may be there twice.

    Readers differ in which one counts, so that a file could be checked as one thing and read as
    another. Raises `ValueError`.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # None: goes on
        raise ValueError(f"key {shown(twice)} is given twice")
    return found


def shown(value: object) -> str:
    """`repr` of a value that a file gives, cut to what fits into a message."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def read_config(cls: type[Config], path: Path, values: dict[str, Any] | None = None) -> Config:
    """Read a dataclass whose fields were declared with `config_key`.

    Args:
        cls: the dataclass.
        path: the file, as messages name it.
        values: what it holds; None reads it.

    Raises:
        CheckpointError: a key is missing, unknown or holds what it may not.
    """
    values = read_json(path) if values is None else values
    keys = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    quantised = values.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        refuse(
            path,
            [
                f"quantization_config: is quantised with {str(method)[:_MAX_SHOWN]}, which is not "
                "supported"
            ],
        )
    problems = [
        f"unknown key {shown(key)} with value {shown(values[key])}; allowed: {', '.join(keys)}"
        for key in values
        if key not in keys
    ]
    arguments = {}
    for name, item in keys.items():
        kind: ValueKind = item.metadata["kind"]
        if name not in values:
            if item.default is MISSING:
                problems.append(f"missing key {name!r}; allowed: {kind.allowed}")
        elif not kind.accepts(values[name]):
            problems.append(f"{name} is {shown(values[name])}; allowed: {kind.allowed}")
        else:
            arguments[name] = kind.read(values[name])
    refuse(path, problems)
    return cls(**arguments)


def refuse(path: Path, problems: list[str]) -> None:
    """Raise `CheckpointError` with these problems of a file, where there are any."""
    if len(problems) > _MAX_PROBLEMS:
        more = len(problems) - _MAX_PROBLEMS
        problems = [*problems[:_MAX_PROBLEMS], f"... and {more} more problems"]
    if problems:
        raise CheckpointError("\n".join(f"{path}: {problem}" for problem in problems))
