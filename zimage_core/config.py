"""Architectures as the checkpoint's own JSON states them, read strictly.

A number that the file does not give is never guessed: a missing key, an unknown key and a value of
the wrong kind are errors, all of a file reported at once. Keys that start with an underscore are
notes of diffusers (`_class_name`, `_diffusers_version`) and are skipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

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

_Config = TypeVar("_Config")


class CheckpointError(ValueError):
    """A checkpoint folder cannot be used; the message names the file and what is wrong in it."""


class _Kind(NamedTuple):
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


def _is_full_attention(values: Any) -> bool:
    return isinstance(values, list) and all(value == "full_attention" for value in values)


def _exactly(*allowed: Any) -> _Kind:
    text = " or ".join(json.dumps(value) for value in allowed)
    # `1 == True` in Python, not in JSON.
    return _Kind(text, lambda value: any(value == a and type(value) is type(a) for a in allowed))


def _all_of(allowed: str) -> _Kind:
    return _Kind(
        f'a list of "{allowed}"', lambda v: _is_list(v, lambda item: item == allowed), tuple
    )


_COUNT = _Kind("a whole number above 0", _is_count)
_COUNT_OR_NULL = _Kind(f"null or {_COUNT.allowed}", lambda value: value is None or _is_count(value))
_COUNTS = _Kind("a list of whole numbers above 0", lambda v: _is_list(v, _is_count), tuple)
_POSITIVE = _Kind("a number above 0", _is_positive, float)
_BOOL = _Kind("true or false", lambda value: isinstance(value, bool))
_LAYERS = _Kind(
    f"a whole number from 1 to {_MAX_LAYERS}", lambda v: _is_count(v) and v <= _MAX_LAYERS
)
_PATCHES = _Kind(
    "a list of whole numbers from 1 to 16",
    lambda v: _is_list(v, lambda item: _is_count(item) and item <= 16),
    tuple,
)
_POSITIONS = _Kind(
    f"a list of whole numbers from 1 to {_MAX_POSITIONS}",
    lambda v: _is_list(v, lambda item: _is_count(item) and item <= _MAX_POSITIONS),
    tuple,
)
_HEADS = _Kind(f"a whole number from 1 to {_MAX_HEADS}", lambda v: _is_count(v) and v <= _MAX_HEADS)
_NUMBER = _Kind("a number", _is_number, float)
_NULL = _exactly(None)


def _key(kind: _Kind, **default: Any) -> Any:
    """Declare a field that is read from the key of the same name; without `default` it must be."""
    return field(metadata={"kind": kind}, **default)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """`transformer/config.json` of a Z-Image checkpoint."""

    all_patch_size: tuple[int, ...] = _key(_PATCHES)
    all_f_patch_size: tuple[int, ...] = _key(_PATCHES)
    in_channels: int = _key(_COUNT)
    dim: int = _key(_COUNT)
    n_layers: int = _key(_LAYERS)
    n_refiner_layers: int = _key(_LAYERS)
    n_heads: int = _key(_COUNT)
    n_kv_heads: int = _key(_COUNT)
    norm_eps: float = _key(_POSITIVE)
    qk_norm: bool = _key(_BOOL)
    cap_feat_dim: int = _key(_COUNT)
    rope_theta: float = _key(_POSITIVE)
    t_scale: float = _key(_POSITIVE)
    axes_dims: tuple[int, ...] = _key(_COUNTS)
    axes_lens: tuple[int, ...] = _key(_POSITIONS)
    siglip_feat_dim: int | None = _key(_COUNT_OR_NULL, default=None)

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read and check the file.

        Raises:
            CheckpointError: a key is missing, unknown or holds what it may not; the numbers do not
                fit together.
        """
        config = _read(cls, path)
        _refuse(path, config._misfits())
        return config

    def _misfits(self) -> list[str]:
        head_dim = self.dim / self.n_heads
        rules = {
            f"n_kv_heads is {self.n_kv_heads}, but must equal n_heads, {self.n_heads}": (
                self.n_kv_heads == self.n_heads
            ),
            f"dim {self.dim} / n_heads {self.n_heads} is {head_dim:g}, but must equal the sum of "
            f"axes_dims {list(self.axes_dims)}": head_dim == sum(self.axes_dims),
            f"axes_dims is {list(self.axes_dims)}, but must be even numbers": (
                all(dim % 2 == 0 for dim in self.axes_dims)
            ),
            f"axes_dims {list(self.axes_dims)} and axes_lens {list(self.axes_lens)} must each be "
            "three numbers": len(self.axes_dims) == len(self.axes_lens) == 3,
            f"all_patch_size {list(self.all_patch_size)} and all_f_patch_size "
            f"{list(self.all_f_patch_size)} must be of one length": (
                len(self.all_patch_size) == len(self.all_f_patch_size)
            ),
            f"all_f_patch_size is {list(self.all_f_patch_size)}, but must start with 1": (
                self.all_f_patch_size[0] == 1
            ),
        }
        return [rule for rule, holds in rules.items() if not holds]


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """`vae/config.json`: the keys of diffusers' AutoencoderKL."""

    in_channels: int = _key(_COUNT)
    out_channels: int = _key(_COUNT)
    down_block_types: tuple[str, ...] = _key(_all_of("DownEncoderBlock2D"))
    up_block_types: tuple[str, ...] = _key(_all_of("UpDecoderBlock2D"))
    block_out_channels: tuple[int, ...] = _key(_COUNTS)
    layers_per_block: int = _key(_LAYERS)
    act_fn: str = _key(_exactly("silu"))
    latent_channels: int = _key(_COUNT)
    norm_num_groups: int = _key(_COUNT)
    scaling_factor: float = _key(_POSITIVE)
    shift_factor: float = _key(_NUMBER)
    use_quant_conv: bool = _key(_BOOL)
    use_post_quant_conv: bool = _key(_BOOL)
    mid_block_add_attention: bool = _key(_BOOL)
    latents_mean: None = _key(_NULL, default=None)
    latents_std: None = _key(_NULL, default=None)
    sample_size: int = _key(_COUNT, default=1024)  # diffusers' tile size: of no effect here
    # Whether the autoencoder needs float32 where the other models are in float16.
    force_upcast: bool = _key(_BOOL, default=True)

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read and check the file.

        Raises:
            CheckpointError: a key is missing, unknown or holds what it may not; the numbers do not
                fit together.
        """
        config = _read(cls, path)
        _refuse(path, config._misfits())
        return config

    def _misfits(self) -> list[str]:
        stages = len(self.block_out_channels)
        channels, groups = list(self.block_out_channels), self.norm_num_groups
        rules = {
            f"down_ and up_block_types must have {stages} items, like block_out_channels": (
                len(self.down_block_types) == len(self.up_block_types) == stages
            ),
            f"block_out_channels {channels} must be multiples of norm_num_groups {groups}": (
                all(number % groups == 0 for number in channels)
            ),
        }
        return [rule for rule, holds in rules.items() if not holds]


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """`text_encoder/config.json`: the keys of Qwen3 that shape the hidden states."""

    vocab_size: int = _key(_COUNT)
    hidden_size: int = _key(_COUNT)
    intermediate_size: int = _key(_COUNT)
    num_hidden_layers: int = _key(_LAYERS)
    num_attention_heads: int = _key(_HEADS)
    num_key_value_heads: int = _key(_HEADS)
    head_dim: int = _key(_HEADS)
    max_position_embeddings: int = _key(_COUNT)
    rms_norm_eps: float = _key(_POSITIVE)
    rope_theta: float = _key(_POSITIVE)
    attention_bias: bool = _key(_BOOL)
    hidden_act: str = _key(_exactly("silu"))
    model_type: str = _key(_exactly("qwen3"))
    use_sliding_window: bool = _key(_exactly(False), default=False)
    rope_scaling: None = _key(_NULL, default=None)
    layer_types: tuple[str, ...] | None = _key(
        _Kind(
            'null or a list of "full_attention"',
            lambda v: v is None or (v and _is_full_attention(v)),
            lambda v: v and tuple(v),
        ),
        default=None,
    )

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read and check the file, as transformers 4 (`rope_theta`) or 5 (`rope_parameters`) wrote.

        Raises:
            CheckpointError: a key is missing, unknown or holds what it may not; the numbers do not
                fit together.
        """
        values = read_json(path)
        rope = values.pop("rope_parameters", None)
        if rope is not None:
            if not isinstance(rope, dict) or set(rope) - {"rope_theta", "rope_type"}:
                _refuse(
                    path, [f"rope_parameters is {shown(rope)}; allowed: rope_theta and rope_type"]
                )
            if rope.get("rope_type", "default") != "default":
                _refuse(path, [f'rope_type is {shown(rope["rope_type"])}; allowed: "default"'])
            values = {"rope_theta": rope.get("rope_theta"), **values}
        known = {key: value for key, value in values.items() if key not in _QWEN3_WITHOUT_EFFECT}
        config = _read(cls, path, known)
        _refuse(path, config._misfits())
        return config

    def _misfits(self) -> list[str]:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        rules = {
            f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}": (
                heads % kv_heads == 0
            ),
            f"num_hidden_layers is {self.num_hidden_layers}, but must be 2 or more: Z-Image takes "
            "the output of the last layer but one": self.num_hidden_layers >= 2,
            f"head_dim is {self.head_dim}, but must be even": self.head_dim % 2 == 0,
        }
        return [rule for rule, holds in rules.items() if not holds]


# Keys of Qwen3 and of every transformers configuration that do not touch the hidden states.
_QWEN3_WITHOUT_EFFECT = frozenset(
    {
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "max_window_layers",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "sliding_window",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


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


def _read(cls: type[_Config], path: Path, values: dict[str, Any] | None = None) -> _Config:
    values = read_json(path) if values is None else values
    keys = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    quantised = values.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        _refuse(
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
        kind: _Kind = item.metadata["kind"]
        if name not in values:
            if item.default is MISSING:
                problems.append(f"missing key {name!r}; allowed: {kind.allowed}")
        elif not kind.accepts(values[name]):
            problems.append(f"{name} is {shown(values[name])}; allowed: {kind.allowed}")
        else:
            arguments[name] = kind.read(values[name])
    _refuse(path, problems)
    return cls(**arguments)


def _refuse(path: Path, problems: list[str]) -> None:
    if len(problems) > _MAX_PROBLEMS:
        more = len(problems) - _MAX_PROBLEMS
        problems = [*problems[:_MAX_PROBLEMS], f"... and {more} more problems"]
    if problems:
        raise CheckpointError("\n".join(f"{path}: {problem}" for problem in problems))
