"""Turning pydantic's findings about a job into lines that its author can act on.

One line for each key: `FILE: key.path: value 'x': what is wrong; allowed: ...`, where FILE is
whoever set that key (a file, `--set` or a flag).
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from jobs.config import SECTIONS, Allowed, JobConfig
from jobs.layers import Keys, Layers
from jobs.yaml_file import kind

_BOUNDS = {
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "finite_number",
    "int_parsing_size",
}
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?")


def explain(error: ValidationError, layers: Layers) -> list[str]:
    """Return one line for each key that is wrong, in the order of the schema."""
    grouped: dict[Keys, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        grouped.setdefault(_keys(detail, layers.data), []).append(detail)
    return [_line(keys, details, layers) for keys, details in grouped.items()]


def unknown_key(keys: Keys) -> str:
    """Return what is wrong with a key that does not exist: nearest ones and all allowed ones."""
    *parents, key = keys
    _, model = _schema_at(tuple(parents))
    siblings = list(model.model_fields) if model else []
    home = [section for section in SECTIONS if key in _section(section).model_fields]
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        hint = f"; did you mean {'.'.join([*parents, near[0]])}?"
    elif home:
        hint = f"; did you mean {home[0]}.{key}?"
    else:
        hint = ""
    return f"unknown key{hint}; allowed: {', '.join(siblings)}"


def show(value: object) -> str:
    """Return a value as it would be written in YAML, cut to a readable length."""
    if isinstance(value, str):
        text = repr(value)
    elif value is None or isinstance(value, bool | int | float | dict | list):
        text = json.dumps(value, ensure_ascii=False, default=str)
    else:
        text = str(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _line(keys: Keys, details: list[ErrorDetails], layers: Layers) -> str:
    types = {detail["type"] for detail in details}
    if "extra_forbidden" in types:
        return f"{layers.origin(keys).place(keys)}: {unknown_key(keys)}"
    field, model = _schema_at(keys)
    if "missing" in types:
        # Nobody wrote it. A section may have been touched by anyone; the job file answers for it.
        origin = layers.main if len(keys) <= 2 else layers.origin(keys)
        return f"{origin.place(keys)}: missing; allowed: {_allowed(field, model)}"
    if any(detail["loc"][-1] == "[key]" for detail in details):
        allowed = _allowed(JobConfig.model_fields["name"], None)
        place = layers.origin(keys).place(keys)
        return f"{place}: name {show(keys[-1])}: {_custom(details)}; allowed: {allowed}"
    if model is not None and "job" in types:  # about several keys of a section: no one value
        return f"{layers.main.place(keys)}: {_custom(details)}"
    return (
        f"{layers.origin(keys).place(keys)}: value {show(layers.value(keys))}: "
        f"{_what(layers.value(keys), details, field)}; allowed: {_allowed(field, model)}"
    )


def _what(value: object, details: list[ErrorDetails], field: FieldInfo | None) -> str:
    types = {detail["type"] for detail in details}
    if "job" in types:
        return _custom(details)
    if types & _BOUNDS:
        return "out of range"
    if types <= {"literal_error"} and isinstance(value, str):
        choices = [str(choice) for choice in get_args(field.annotation)] if field else []
        near = difflib.get_close_matches(value.lower(), choices, n=1)
        return f"unknown; did you mean {near[0]}?" if near else "unknown"
    what = f"{kind(value)} does not belong here"
    if isinstance(value, str) and types & {"int_type", "float_type"} and _NUMBER.fullmatch(value):
        if "float_type" not in types:
            return f"{what} (write the number in digits, without quotes)"
        if "e" in value.lower():
            return f"{what} (YAML reads a power of ten only with a point and a sign: 1.0e-3)"
        return f"{what} (write the number without quotes)"
    if "string_type" in types and value is not None and not isinstance(value, dict | list):
        return f"{what} (quote it if it is meant as text)"
    return what


def _custom(details: list[ErrorDetails]) -> str:
    return next(str(detail["msg"]) for detail in details if detail["type"] == "job")


def _keys(detail: ErrorDetails, data: dict[str, Any]) -> Keys:
    """Return the part of pydantic's location that is keys, without its names of union members."""
    keys: list[str] = []
    value: Any = data
    for part in detail["loc"]:
        if isinstance(value, dict) and (part in value or detail["type"] == "missing"):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
        else:
            continue
        keys.append(str(part))
    return tuple(keys)


def _schema_at(keys: Keys) -> tuple[FieldInfo | None, type[BaseModel] | None]:
    """Return the field that a key belongs to, and the section it opens if it opens one."""
    field: FieldInfo | None = None
    model: type[BaseModel] | None = JobConfig
    entries: type[BaseModel] | None = None  # what a mapping of free names holds (model.loras)
    for key in keys:
        if entries is not None:
            model, entries = entries, None
            continue
        if model is None or key not in model.model_fields:
            break
        field = model.model_fields[key]
        model = _as_model(field.annotation)
        if get_origin(field.annotation) is dict:
            entries = _as_model(get_args(field.annotation)[1])
    return field, model


def _section(name: str) -> type[BaseModel]:
    model = _as_model(JobConfig.model_fields[name].annotation)
    assert model is not None
    return model


def _as_model(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _allowed(field: FieldInfo | None, model: type[BaseModel] | None) -> str:
    if model is not None:
        return f"a mapping with the keys {', '.join(model.model_fields)}"
    if field is None:
        return "nothing"
    notes = [note.text for note in field.metadata if isinstance(note, Allowed)]
    # The outermost note is the last; a Literal without one speaks for itself.
    return notes[-1] if notes else ", ".join(str(choice) for choice in get_args(field.annotation))
