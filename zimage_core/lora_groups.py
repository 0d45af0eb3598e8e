"""The tensors of an adapter's file, gathered by the module they change, and found to fit it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from zimage_core.config import CheckpointError
from zimage_core.lora_deltas import Shape, kind_of, misfit, missing_parts, plain_shape
from zimage_core.lora_file import LoraFile
from zimage_core.lora_names import ModuleNames, Place, shape_of, split_key
from zimage_core.weight_files import refuse_all

_NO_MATRICES = ("alpha", "dora", "up_bias", "diff_bias")
_SHOWN_KEYS = 3


@dataclass(frozen=True)
class LoraGroup:
    """The tensors of one change.

    Args:
        places: the modules that are changed: one, or several that share a fused change.
        keys: in the file, by part.
    """

    places: tuple[Place, ...]
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def first_key(self) -> str:
        """A key by which an error can name the group."""
        return next(iter(self.keys.values()))


@dataclass(frozen=True)
class ResolvedFile:
    """A file whose every tensor has a place in the model, or is known to have none."""

    groups: tuple[LoraGroup, ...]
    unmatched: tuple[str, ...]
    redundant: tuple[str, ...]


def resolve(file: LoraFile, names: ModuleNames) -> ResolvedFile:
    """Find the place of every tensor and check that it fits there.

    Raises:
        CheckpointError: no tensor has a place, or one that has does not fit it; file and tensors
            are named, all that do not fit at once.
    """
    groups: dict[str, LoraGroup] = {}
    unmatched: list[str] = []
    problems: list[str] = []
    for key in file.shapes:
        split = split_key(key)
        found = None if split is None else names.find(split[0])
        if split is None or found is None:
            owner = names.owner(key)
            if owner is None:
                unmatched.append(key)
            else:
                problems.append(
                    f"{file.path}: tensor {key!r} is for {owner}, but is no part of a LoRA, LoHa, "
                    "LoKr, DoRA or difference (docs/lora.md)"
                )
            continue
        flat, places = found
        other = groups.setdefault(flat, LoraGroup(places)).keys.setdefault(split[1], key)
        if other != key:
            problems.append(f"{file.path}: tensors {other!r} and {key!r} are the same part twice")
    refuse_all(problems)
    if not groups:
        shown = ", ".join(map(repr, list(file.shapes)[:_SHOWN_KEYS]))
        raise CheckpointError(
            f"{file.path}: none of its {len(file.shapes)} tensors matches the transformer: "
            f"{shown}, ...; allowed: names such as "
            "'transformer.layers.0.attention.to_q.lora_A.weight' (docs/lora.md)"
        )
    used, redundant = _without_repeats(file, names, groups)
    refuse_all(problem for group in used for problem in _problems(file, names, group))
    return ResolvedFile(tuple(used), tuple(unmatched), tuple(redundant))


def _without_repeats(
    file: LoraFile, names: ModuleNames, groups: Mapping[str, LoraGroup]
) -> tuple[list[LoraGroup], list[str]]:
    """Leave out what repeats a change of the model's own names under another layout's.

    Some files hold queries, keys and values both apart and fused, for two programs
    (https://github.com/huggingface/diffusers/issues/13203).
    """
    used: list[LoraGroup] = []
    redundant: list[str] = []
    taken: dict[str, str] = {}
    for flat in sorted(groups, key=lambda flat: not names.is_own(flat)):
        group = groups[flat]
        again = [place.module for place in group.places if place.module in taken]
        if len(again) == len(group.places):
            redundant += group.keys.values()
        elif again:
            raise CheckpointError(
                f"{file.path}: tensor {group.first_key!r} changes {again[0]}, as "
                f"{taken[again[0]]!r} does, but the two do not change the same modules"
            )
        else:
            used.append(group)
            taken |= {place.module: group.first_key for place in group.places}
    return used, redundant


def _problems(file: LoraFile, names: ModuleNames, group: LoraGroup) -> list[str]:
    """What is wrong with the tensors of one change, one line each."""
    shapes = {part: plain_shape(file.shapes[key]) for part, key in group.keys.items()}
    try:
        kind = kind_of(shapes)
    except ValueError as error:
        return [f"{file.path}: tensor {group.first_key!r}: {error}"]
    missing = missing_parts(kind, shapes)
    if missing:
        return [
            f"{file.path}: tensor {group.first_key!r} lacks its partner, {' and '.join(missing)}"
        ]
    where = " and ".join(place.module for place in group.places)
    lines = []
    for part, words in _misfits(kind, shapes, names, group.places):
        key = group.keys[part]
        shape = list(file.shapes[key])
        lines.append(f"{file.path}: tensor {key!r} has shape {shape}, which for {where} {words}")
    return lines


def _misfits(
    kind: str, shapes: Mapping[str, Shape], names: ModuleNames, places: tuple[Place, ...]
) -> list[tuple[str, str]]:
    """Parts whose shape does not fit, each with what it must be."""
    found: list[tuple[str, str]] = []
    weight, bias = (shape_of(places, names.shapes, name) for name in ("weight", "bias"))
    assert weight is not None  # names are those of modules with a weight
    if kind != "bias":
        matrices = {part: s for part, s in shapes.items() if part not in _NO_MATRICES}
        fault = misfit(kind, matrices, weight)
        found += [] if fault is None else [fault]
    for part in ("up_bias", "diff_bias"):
        if part in shapes and shapes[part] != bias:
            allowed = "has no bias to be added to" if bias is None else f"must be {list(bias)}"
            found.append((part, allowed))
    if "alpha" in shapes and math.prod(shapes["alpha"]) != 1:
        found.append(("alpha", "must be one number"))
    if "dora" in shapes:
        by_row, by_column = (weight[0], 1), (1, *weight[1:])
        if kind == "bias" or len(weight) != 2:
            found.append(("dora", "has no matrix whose lengths it could set"))
        elif shapes["dora"] not in (by_row, by_row[:1], by_column):
            found.append(("dora", f"must be {list(by_row)} or {list(by_column)}"))
        elif shapes["dora"] == by_column and len(places) > 1:
            found.append(("dora", "is of columns, whose lengths cannot be parted into rows"))
    return found
