"""Architectures as the checkpoint's own JSON states them, read strictly (`config_keys`)."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Self

from zimage_core.config_keys import (
    BOOL,
    COUNT,
    COUNT_OR_NULL,
    COUNTS,
    HEADS,
    LAYERS,
    NULL,
    NUMBER,
    PATCHES,
    POSITIONS,
    POSITIVE,
    RESAMPLING,
    THREE_NUMBERS,
    THREE_POSITIVES,
    ValueKind,
    all_of,
    config_key,
    exactly,
    read_config,
    refuse,
)
from zimage_core.config_keys import MAX_JSON_BYTES as MAX_JSON_BYTES
from zimage_core.config_keys import CheckpointError as CheckpointError
from zimage_core.config_keys import read_json as read_json
from zimage_core.config_keys import read_json_object as read_json_object
from zimage_core.config_keys import shown as shown
from zimage_core.config_keys import unrepeated as unrepeated


def _is_full_attention(values: Any) -> bool:
    return isinstance(values, list) and all(value == "full_attention" for value in values)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """`transformer/config.json` of a Z-Image checkpoint."""

    all_patch_size: tuple[int, ...] = config_key(PATCHES)
    all_f_patch_size: tuple[int, ...] = config_key(PATCHES)
    in_channels: int = config_key(COUNT)
    dim: int = config_key(COUNT)
    n_layers: int = config_key(LAYERS)
    n_refiner_layers: int = config_key(LAYERS)
    n_heads: int = config_key(COUNT)
    n_kv_heads: int = config_key(COUNT)
    norm_eps: float = config_key(POSITIVE)
    qk_norm: bool = config_key(BOOL)
    cap_feat_dim: int = config_key(COUNT)
    rope_theta: float = config_key(POSITIVE)
    t_scale: float = config_key(POSITIVE)
    axes_dims: tuple[int, ...] = config_key(COUNTS)
    axes_lens: tuple[int, ...] = config_key(POSITIONS)
    siglip_feat_dim: int | None = config_key(COUNT_OR_NULL, default=None)

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read and check the file.

        Raises:
            CheckpointError: a key is missing, unknown or holds what it may not; the numbers do not
                fit together.
        """
        config = read_config(cls, path)
        refuse(path, config._misfits())
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

    in_channels: int = config_key(COUNT)
    out_channels: int = config_key(COUNT)
    down_block_types: tuple[str, ...] = config_key(all_of("DownEncoderBlock2D"))
    up_block_types: tuple[str, ...] = config_key(all_of("UpDecoderBlock2D"))
    block_out_channels: tuple[int, ...] = config_key(COUNTS)
    layers_per_block: int = config_key(LAYERS)
    act_fn: str = config_key(exactly("silu"))
    latent_channels: int = config_key(COUNT)
    norm_num_groups: int = config_key(COUNT)
    scaling_factor: float = config_key(POSITIVE)
    shift_factor: float = config_key(NUMBER)
    use_quant_conv: bool = config_key(BOOL)
    use_post_quant_conv: bool = config_key(BOOL)
    mid_block_add_attention: bool = config_key(BOOL)
    latents_mean: None = config_key(NULL, default=None)
    latents_std: None = config_key(NULL, default=None)
    sample_size: int = config_key(COUNT, default=1024)  # diffusers' tile size: of no effect here
    # Whether the autoencoder needs float32 where the other models are in float16.
    force_upcast: bool = config_key(BOOL, default=True)

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read and check the file.

        Raises:
            CheckpointError: a key is missing, unknown or holds what it may not; the numbers do not
                fit together.
        """
        config = read_config(cls, path)
        refuse(path, config._misfits())
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

    vocab_size: int = config_key(COUNT)
    hidden_size: int = config_key(COUNT)
    intermediate_size: int = config_key(COUNT)
    num_hidden_layers: int = config_key(LAYERS)
    num_attention_heads: int = config_key(HEADS)
    num_key_value_heads: int = config_key(HEADS)
    head_dim: int = config_key(HEADS)
    max_position_embeddings: int = config_key(COUNT)
    rms_norm_eps: float = config_key(POSITIVE)
    rope_theta: float = config_key(POSITIVE)
    attention_bias: bool = config_key(BOOL)
    hidden_act: str = config_key(exactly("silu"))
    model_type: str = config_key(exactly("qwen3"))
    use_sliding_window: bool = config_key(exactly(False), default=False)
    rope_scaling: None = config_key(NULL, default=None)
    layer_types: tuple[str, ...] | None = config_key(
        ValueKind(
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
                refuse(
                    path, [f"rope_parameters is {shown(rope)}; allowed: rope_theta and rope_type"]
                )
            if rope.get("rope_type", "default") != "default":
                refuse(path, [f'rope_type is {shown(rope["rope_type"])}; allowed: "default"'])
            values = {"rope_theta": rope.get("rope_theta"), **values}
        known = {key: value for key, value in values.items() if key not in _QWEN3_WITHOUT_EFFECT}
        config = read_config(cls, path, known)
        refuse(path, config._misfits())
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


# Keys of every transformers configuration that do not touch hidden states.
_WITHOUT_EFFECT = frozenset(
    {
        "architectures",
        "attention_dropout",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
    }
)
_QWEN3_WITHOUT_EFFECT = _WITHOUT_EFFECT | {
    "bos_token_id",
    "eos_token_id",
    "max_window_layers",
    "pad_token_id",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
}
# The head pools what is seen into one vector, which is used nowhere here.
_SIGLIP2_WITHOUT_EFFECT = _WITHOUT_EFFECT | {"vision_use_head"}


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """`siglip/config.json` of a checkpoint that takes pictures: the keys of SigLIP 2's encoder."""

    hidden_size: int = config_key(COUNT)
    intermediate_size: int = config_key(COUNT)
    num_hidden_layers: int = config_key(LAYERS)
    num_attention_heads: int = config_key(HEADS)
    num_patches: int = config_key(COUNT)
    patch_size: int = config_key(COUNT)
    num_channels: int = config_key(exactly(3), default=3)
    hidden_act: str = config_key(exactly("gelu_pytorch_tanh"), default="gelu_pytorch_tanh")
    layer_norm_eps: float = config_key(POSITIVE, default=1e-6)
    model_type: str = config_key(exactly("siglip2_vision_model"))

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read and check the file.

        Raises:
            CheckpointError: a key is missing, unknown or holds what it may not; the numbers do not
                fit together.
        """
        known = {k: v for k, v in read_json(path).items() if k not in _SIGLIP2_WITHOUT_EFFECT}
        config = read_config(cls, path, known)
        refuse(path, config._misfits())
        return config

    def _misfits(self) -> list[str]:
        rules = {
            f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
            f"{self.num_attention_heads}": self.hidden_size % self.num_attention_heads == 0,
            f"num_patches is {self.num_patches}, but must be a square: positions are learned on a "
            "grid of as many rows as columns": isqrt(self.num_patches) ** 2 == self.num_patches,
        }
        return [rule for rule, holds in rules.items() if not holds]


# What transformers' classes write besides, or leave null: nothing of it touches these pictures.
_PROCESSOR_WITHOUT_EFFECT = frozenset(
    {
        "crop_size",
        "data_format",
        "default_to_square",
        "device",
        "disable_grouping",
        "do_center_crop",
        "do_convert_rgb",
        "do_pad",
        "input_data_format",
        "pad_size",
        "processor_class",
        "return_tensors",
        "size",
    }
)


@dataclass(frozen=True, kw_only=True)
class VisionProcessorConfig:
    """`siglip_processor/preprocessor_config.json`: how pictures become what the encoder sees."""

    patch_size: int = config_key(COUNT)
    max_num_patches: int = config_key(
        # Pictures are also made larger, to be seen in so many; published are 256 to 1024.
        ValueKind("a whole number from 1 to 4096", lambda v: COUNT.accepts(v) and v <= 4096)
    )
    image_mean: tuple[float, float, float] = config_key(THREE_NUMBERS)
    image_std: tuple[float, float, float] = config_key(THREE_POSITIVES)
    rescale_factor: float = config_key(POSITIVE)
    resample: int = config_key(RESAMPLING)
    do_resize: bool = config_key(exactly(True), default=True)
    do_rescale: bool = config_key(exactly(True), default=True)
    do_normalize: bool = config_key(exactly(True), default=True)
    image_processor_type: str | None = config_key(
        exactly(
            None,
            "Siglip2ImageProcessor",
            "Siglip2ImageProcessorFast",
            "Siglip2ImageProcessorPil",
        ),
        default=None,
    )

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read and check the file.

        Raises:
            CheckpointError: a key is missing, unknown or holds what it may not.
        """
        values = read_json(path)
        known = {k: v for k, v in values.items() if k not in _PROCESSOR_WITHOUT_EFFECT}
        return read_config(cls, path, known)
