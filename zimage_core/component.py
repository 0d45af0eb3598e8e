"""One model of a checkpoint: its tensors found in the files, whatever the files call them.

Strict in every layout: each tensor that the configuration asks for must be there with its shape,
and none may be left over but those that are known to be of no use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from zimage_core.config import CheckpointError
from zimage_core.empty_module import make_empty
from zimage_core.fp8 import attach_scales
from zimage_core.key_maps import Layout, Place, diffusers
from zimage_core.model_kind import KINDS, VISION, Kind
from zimage_core.recognition import describe, refuse_unsupported
from zimage_core.stored_tensor import Shape, StoredTensor, Weight
from zimage_core.text_encoder import full_model_shapes, text_encoder_shapes
from zimage_core.vision import pooling_head_shapes
from zimage_core.weight_files import WeightFiles, refuse_all

_TEXT_ARCHITECTURE = "qwen3"


@dataclass(frozen=True)
class Component:
    """One model of a checkpoint: how to make its module and the tensors that fill it.

    Attributes:
        make_module: makes it on the meta device, in no particular dtype.
        files: weight files and, where there are several, their index.
        weights: by key of the module's state dict, complete and of the right shapes.
        unused: by key of the whole published model what is there but not loaded.
        notes: what a user should know, a sentence each.
    """

    make_module: Callable[[], nn.Module]
    files: tuple[Path, ...]
    weights: Mapping[str, Weight]
    unused: Mapping[str, Weight]
    notes: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        """Number of elements of the tensors that are loaded."""
        return sum(weight.num_elements for weight in self.weights.values())


def open_component(
    kind: Kind, config: Any, files: WeightFiles, *, asked_by: str, single_file: bool
) -> Component:
    """Find the tensors of a model and compare them with those that its configuration asks for.

    Args:
        kind: which model.
        config: its configuration.
        files: where its weights are.
        asked_by: the configuration's name in messages.
        single_file: the files are one that may hold any layout, prefix and other models.

    Raises:
        CheckpointError: the file holds another model, or a format that is not supported; a tensor
            is missing, unexpected, mis-shaped or of a type that is no number.
    """
    make_module = partial(make_empty, kind.model, config)
    expected, unused = _shapes(kind, config, make_module)
    file = files.files[-1]
    prefix, layouts = _find_layout(kind, config, files, expected, single_file)
    others = tuple(
        name for other in KINDS.values() if other is not kind for name in other.shared_prefixes
    )
    own = {
        name: tensor
        for name, tensor in files.tensors.items()
        if not (single_file and name.startswith(others))
    }
    refuse_unsupported(file, own)
    tensors = attach_scales(own, files.metadata, prefixes=(prefix,), others=others)

    names = set(tensors)
    places = {key: _place(key, prefix, layouts, names) for key in (*expected, *unused)}
    problems: dict[str, None] = {}  # each once, though three keys may share a tensor
    weights: dict[str, Weight] = {}
    for key, shape in (expected | unused).items():
        place = places[key]
        if place.name in tensors:
            weight = _weight(tensors[place.name], place, shape, asked_by, problems)
            if weight is not None:
                weights[key] = weight
        elif key in expected:
            whole = _whole(place, shape)
            problems[f"{file}: missing tensor {place.name!r} of shape {list(whole)}"] = None
    notes = _left_over(kind, config, tensors, prefix, places, asked_by, problems)
    refuse_all(problems)
    return Component(
        make_module,
        files.files,
        {key: weights[key] for key in expected},
        {key: weights[key] for key in unused if key in weights},
        tuple(notes),
    )


def _shapes(
    kind: Kind, config: Any, make_module: Callable[[], nn.Module]
) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Shapes by key of what is loaded, and of what a file may hold besides."""
    if kind.name != "text_encoder":
        state = make_module().state_dict()
        unused = pooling_head_shapes(config) if kind is VISION else {}
        return {key: tuple(tensor.shape) for key, tensor in state.items()}, unused
    # A whole one also has what is not used here.
    expected = text_encoder_shapes(config)
    full = full_model_shapes(config)
    return expected, {key: shape for key, shape in full.items() if key not in expected}


def holds_model(kind: Kind, config: Any, files: WeightFiles) -> bool:
    """Whether a single file seems to hold a model: half of the names must be known.

    With more or fewer layers than the configuration has they still are.
    """
    expected, _ = _shapes(kind, config, partial(make_empty, kind.model, config))
    layouts = kind.layouts(config)
    prefix = _find_prefix(kind.file_prefixes, layouts, files, expected)
    present = sum(name.startswith(prefix) for name in files.tensors)
    known = _count(prefix, layouts, files, expected)
    return known > 0 and 2 * known >= min(present, len(expected))


def _find_layout(
    kind: Kind, config: Any, files: WeightFiles, expected: Mapping[str, Shape], single_file: bool
) -> tuple[str, tuple[Layout, ...]]:
    """The prefix that the files put before names, and the layouts, the most fitting one first."""
    layouts = kind.layouts(config) if single_file else (diffusers,)
    prefixes = kind.file_prefixes if single_file else kind.folder_prefixes
    file = files.files[-1]
    if single_file and not holds_model(kind, config, files):
        refuse_unsupported(file, files.tensors)
        raise CheckpointError(
            f"{file}: holds no {kind.words} of Z-Image; by its tensors it is "
            f"{describe(files.tensors)}"
        )
    architecture = files.metadata.get("general.architecture")
    # Qwen3-VL has the same shapes and other weights.
    of_gguf = "general.architecture" in files.metadata or file.suffix == ".gguf"
    if kind.name == "text_encoder" and of_gguf and architecture != _TEXT_ARCHITECTURE:
        raise CheckpointError(
            f"{file}: general.architecture is {architecture!r}; allowed for a text encoder: "
            f"{_TEXT_ARCHITECTURE!r}"
        )
    prefix = _find_prefix(prefixes, layouts, files, expected)
    return prefix, tuple(
        sorted(layouts, key=lambda layout: -_count(prefix, (layout,), files, expected))
    )


def _find_prefix(
    prefixes: Sequence[str],
    layouts: tuple[Layout, ...],
    files: WeightFiles,
    expected: Mapping[str, Shape],
) -> str:
    return max(prefixes, key=lambda prefix: _count(prefix, layouts, files, expected))


def _count(
    prefix: str, layouts: tuple[Layout, ...], files: WeightFiles, expected: Mapping[str, Shape]
) -> int:
    """How many keys the files hold under a prefix, in any of some layouts."""
    names = files.tensors
    return sum(any(prefix + layout(key).name in names for layout in layouts) for key in expected)


def _place(key: str, prefix: str, layouts: tuple[Layout, ...], names: set[str]) -> Place:
    """Where a key is, with the file's own name; where it should be if it is not there."""
    places = [layout(key) for layout in layouts]
    place = next((place for place in places if prefix + place.name in names), places[0])
    return place._replace(name=prefix + place.name)


def _whole(place: Place, shape: Shape) -> Shape:
    """Shape of the stored tensor of which a key's tensor is a part."""
    return (shape[0] * place.parts, *shape[1:]) if shape else shape


def _weight(
    stored: StoredTensor, place: Place, shape: Shape, asked_by: str, problems: dict[str, None]
) -> Weight | None:
    if stored.encoding.decode is None:
        raise CheckpointError(  # at once: it concerns hundreds of tensors
            f"{stored.file}: tensor {stored.name!r} is stored as {stored.dtype}, which is no "
            "supported type of weights; allowed: F32, F16, BF16, F8_E4M3, F8_E5M2"
        )
    whole = _whole(place, shape)
    allowed = [whole]
    if place.pointwise:
        allowed.append((*whole, 1, 1))
    if whole[:1] == (1,):  # GGUF drops leading ones
        allowed.append(whole[1:])
    if stored.shape not in allowed:
        problems[
            f"{stored.file}: tensor {stored.name!r} has shape {list(stored.shape)}, but "
            f"{asked_by} asks for {list(whole)}"
        ] = None
        return None
    count = math.prod(shape)
    if place.parts > 1 and count % stored.encoding.block_elements:
        problems[
            f"{stored.file}: tensor {stored.name!r} cannot be divided into {place.parts}: its "
            f"parts are no whole blocks of {stored.dtype}"
        ] = None
        return None
    return Weight(stored, shape, place.part * count)


def _left_over(
    kind: Kind,
    config: Any,
    tensors: Mapping[str, StoredTensor],
    prefix: str,
    places: Mapping[str, Place],
    asked_by: str,
    problems: dict[str, None],
) -> list[str]:
    """Judge tensors that no key asked for; notes about those that are let be."""
    used = {place.name for place in places.values()}
    useless: set[str] = set()
    head: dict[str, Shape] = {}
    if kind.name == "transformer":
        # Uninitialised memory in finetunes that ComfyUI saved: the norm has no weight
        # (https://github.com/huggingface/diffusers/pull/12888).
        useless.add(prefix + "norm_final.weight")
    if kind.name == "text_encoder":
        outer = prefix.removesuffix("model.")
        of_head = (config.vocab_size, config.hidden_size)
        head = {outer + "lm_head.weight": of_head, prefix + "output.weight": of_head}
        used.add(outer.removesuffix("transformer.") + "logit_scale")  # of ComfyUI's wrapper
    notes = []
    for name, tensor in tensors.items():
        if name in used:
            continue
        shape = head.get(name, tensor.shape)
        if name in useless or tensor.num_elements == 0:
            notes.append(f"{tensor.file}: tensor {name!r} is left out: it is of no use")
        elif name not in head:
            text = f"{tensor.file}: unexpected tensor {name!r} of shape {list(tensor.shape)}"
            problems[text] = None
        elif tensor.shape != shape:
            text = f"{tensor.file}: tensor {name!r} has shape {list(tensor.shape)}, but "
            problems[f"{text}{asked_by} asks for {list(shape)}"] = None
    return notes
