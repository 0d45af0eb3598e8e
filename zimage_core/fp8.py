"""Scaled float8 weights as ComfyUI marks them: which scale belongs to which tensor.

A weight is its float8 numbers times a float32 scale, one for the tensor or one for each row. Three
ways of saying so are in use:

- old: a tensor `scaled_fp8` marks the file; layer `L` has `L.weight` and `L.scale_weight`;
- a JSON for each layer as a uint8 tensor, `L.comfy_quant`, with `L.weight` and `L.weight_scale`;
- the same for all layers in the file's metadata, `_quantization_metadata`: {"layers": {L: ...}}
  (https://github.com/comfyanonymous/ComfyUI, QUANTIZATION.md).

Scales of activations (`scale_input`, `input_scale`) are of no use here: weights are multiplied out
when they are read, and computed with in the dtype of the model. Float8 without any of these is a
plain cast.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zimage_core.config import CheckpointError
from zimage_core.safetensors_file import FLOAT8_DTYPES
from zimage_core.stored_tensor import PLAIN_DTYPES, StoredTensor
from zimage_core.weight_files import refuse_all

METADATA_KEY = "_quantization_metadata"
_MARKER = "scaled_fp8"
_LAYER_MARKER = ".comfy_quant"
_SCALES = (".weight_scale", ".scale_weight")
_WITHOUT_EFFECT = (".input_scale", ".scale_input")
_FORMATS = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn_rowwise": "F8_E4M3",
}
# What a layer's JSON may say besides its format without changing the numbers.
_KNOWN_SETTINGS = ("format", "full_precision_matrix_mult", "orig_dtype", "orig_shape")
_MARKER_DTYPES = (*FLOAT8_DTYPES, *PLAIN_DTYPES)


def attach_scales(
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    *,
    prefixes: tuple[str, ...] = (),
    others: tuple[str, ...] = (),
) -> dict[str, StoredTensor]:
    """Give scaled float8 weights their scales, and leave out scales and markers.

    Reads the tensors that are markers; they are a few bytes each.

    Args:
        tensors: of one model, by the file's own names.
        metadata: of the file.
        prefixes: that the metadata may leave out of its names of layers.
        others: prefixes of layers that belong to other models of the same file.

    Returns:
        The weights by name, those that are scaled with `scale`.

    Raises:
        CheckpointError: a format that is not float8 or unknown, a scale that is missing, of another
            shape than one number for the tensor or for each row, or that belongs to no weight; a
            marker that cannot be read. All of them, one a line.
    """
    problems: list[str] = []
    weights: dict[str, StoredTensor] = {}
    scales: dict[str, StoredTensor] = {}
    formats: dict[str, str] = {}
    old_prefixes: list[str] = []
    for name, tensor in tensors.items():
        layer, dot, ending = name.rpartition(".")
        suffix = dot + ending
        if ending == _MARKER:
            if tensor.dtype not in _MARKER_DTYPES:
                problems.append(
                    f"{tensor.file}: marker {name!r} is stored as {tensor.dtype}; allowed: "
                    f"{', '.join(_MARKER_DTYPES)}"
                )
            old_prefixes.append(name.removesuffix(_MARKER))
        elif suffix == _LAYER_MARKER:
            place = f"{tensor.file}: by its tensor {name!r} the layer {layer!r}"
            formats[layer] = _format(place, _read_json(tensor))
        elif suffix in _SCALES:
            if layer in scales:
                problems.append(
                    f"{tensor.file}: tensor {name!r} is a second scale of {layer + '.weight'!r}"
                )
            scales[layer] = tensor
        elif suffix not in _WITHOUT_EFFECT:
            weights[name] = tensor
    file = next(iter(tensors.values())).file if tensors else Path()
    for layer, settings in _metadata_layers(file, metadata).items():
        if others and layer.startswith(others):
            continue
        names = [prefix + layer for prefix in ("", *prefixes)]
        found = next((name for name in names if f"{name}.weight" in weights), layer)
        place = f"{file}: by {METADATA_KEY} in its metadata the layer {layer!r}"
        formats[found] = _format(place, settings)
    for layer, format_name in formats.items():
        problems += _marked_problems(file, layer, format_name, weights, scales)
    for name, tensor in weights.items():
        layer = name.removesuffix(".weight")
        if (
            tensor.dtype in FLOAT8_DTYPES
            and len(tensor.shape) > 1
            and name.endswith(".weight")
            and layer not in scales
            and name.startswith(tuple(old_prefixes))
        ):
            problems.append(
                f"{tensor.file}: missing tensor {layer + '.scale_weight'!r}: {name!r} is stored as "
                f"{tensor.dtype} in a file marked {_MARKER}"
            )
    for layer, scale in scales.items():
        weight = weights.get(f"{layer}.weight")
        if weight is not None and weight.dtype not in (*FLOAT8_DTYPES, *PLAIN_DTYPES):
            raise CheckpointError(  # at once: a file has hundreds of such layers
                f"{weight.file}: tensor {weight.name!r} is stored as {weight.dtype} with the scale "
                f"{scale.name!r}, which is not supported; allowed: {', '.join(FLOAT8_DTYPES)}"
            )
        problem = _scale_problem(scale, weight)
        if problem is not None:
            problems.append(f"{scale.file}: tensor {scale.name!r} {problem}")
        elif weight is not None:
            weights[weight.name] = replace(weight, scale=scale)
    refuse_all(problems)
    return weights


def _marked_problems(
    file: Path,
    layer: str,
    format_name: str,
    weights: Mapping[str, StoredTensor],
    scales: Mapping[str, StoredTensor],
) -> list[str]:
    """What a layer that is marked as float8 lacks."""
    weight = weights.get(f"{layer}.weight")
    if weight is None:
        return [f"{file}: missing tensor {layer + '.weight'!r}, which is marked as {format_name}"]
    if weight.dtype != _FORMATS[format_name]:
        return [
            f"{weight.file}: tensor {weight.name!r} is stored as {weight.dtype}, but marked as "
            f"{format_name}"
        ]
    if layer not in scales:
        return [
            f"{weight.file}: missing tensor {layer + '.weight_scale'!r}: {weight.name!r} is marked "
            f"as {format_name}"
        ]
    return []


def _scale_problem(scale: StoredTensor, weight: StoredTensor | None) -> str | None:
    if weight is None:
        return f"is the scale of {scale.name.rpartition('.')[0] + '.weight'!r}, which is not there"
    if scale.dtype not in PLAIN_DTYPES:
        return f"is a scale stored as {scale.dtype}; allowed: {', '.join(PLAIN_DTYPES)}"
    rows = weight.shape[:1]
    if scale.num_elements != 1 and scale.shape not in (rows, (*rows, 1)):
        return (
            f"has shape {list(scale.shape)}, but scales {weight.name!r} of shape "
            f"{list(weight.shape)}; allowed: one number, or one for each of its "
            f"{rows[0] if rows else 0} rows"
        )
    # Old files give unquantised layers a scale too, to be multiplied with like any other.
    plain = weight.dtype in PLAIN_DTYPES and scale.name.endswith(".scale_weight")
    if weight.dtype not in FLOAT8_DTYPES and not plain:
        return f"is the scale of {weight.name!r}, which is stored as {weight.dtype}; allowed: " + (
            ", ".join(FLOAT8_DTYPES)
        )
    return None


def _format(place: str, settings: Any) -> str:
    """Format of a layer's settings, which are its name or an object that holds it."""
    if isinstance(settings, str):
        settings = {"format": settings}
    name = settings.get("format") if isinstance(settings, dict) else None
    if not isinstance(name, str):
        raise CheckpointError(f"{place} is {settings!r}; allowed: an object with a format")
    others = sorted(key for key, value in settings.items() if key not in _KNOWN_SETTINGS and value)
    if name not in _FORMATS or others:
        with_others = f" with {', '.join(others)}" if others else ""
        # Raised at once: a file has hundreds of such layers.
        raise CheckpointError(
            f"{place} is quantised as {name}{with_others}, which is not supported; allowed: "
            f"{', '.join(_FORMATS)}"
        )
    return name


def _metadata_layers(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        return {}
    try:
        layers = json.loads(metadata[METADATA_KEY])["layers"]
    except (ValueError, TypeError, KeyError, RecursionError):
        layers = None
    if not isinstance(layers, dict):
        raise CheckpointError(
            f"{file}: {METADATA_KEY} in its metadata is not JSON with an object 'layers'"
        )
    return layers


def _read_json(tensor: StoredTensor) -> Any:
    """The JSON that a tensor of uint8 spells."""
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            return json.loads(file.read(tensor.num_bytes))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} cannot be read as JSON: {error}"
        ) from error
