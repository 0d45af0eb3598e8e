"""Checkpoint folders as diffusers lays them out, for models of any weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from zimage_core.autoencoder import AutoencoderKL
from zimage_core.config import (
    AutoencoderConfig,
    TextEncoderConfig,
    TransformerConfig,
    VisionConfig,
    VisionProcessorConfig,
)
from zimage_core.tiny.tokenizer import save_tokenizer
from zimage_core.weight_writer import name_shards, write_index

_DIFFUSERS_VERSION = "0.36.0.dev0"
TEXT_PREFIX = "model."
"""Before the text encoder's keys in its file."""


@dataclass(frozen=True)
class Checkpoint:
    """All that a folder holds but for the scheduler.

    Attributes:
        transformer: its configuration, as are the two that follow.
        vae: see `transformer`.
        text_encoder: see `transformer`.
        tokenizer: as `train_tokenizer` gives it.
        states: tensors of "transformer", "vae" and "text_encoder" by key; of the last, those of
            `full_model_shapes`; with `vision` also those of "siglip".
        vision: of the encoder of pictures, and what they are brought to it by; None where the
            transformer takes none.
    """

    transformer: TransformerConfig
    vae: AutoencoderConfig
    text_encoder: TextEncoderConfig
    tokenizer: Tokenizer
    states: Mapping[str, Mapping[str, Tensor]]
    vision: tuple[VisionConfig, VisionProcessorConfig] | None = None


def write_checkpoint(
    out: Path,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    shift: float,
    dynamic_shift: bool = False,
    shard_size: int | None = None,
) -> Path:
    """Write a checkpoint in diffusers' layout.

    Args:
        out: the folder.
        checkpoint: what to write.
        dtype: of the tensors, to which they are rounded.
        shift: as in `make_checkpoint`, as are the two that follow.
        dynamic_shift: see `shift`.
        shard_size: see `shift`.

    Returns:
        `out`.
    """
    index = _MODEL_INDEX if checkpoint.vision is None else _MODEL_INDEX | _VISION_INDEX
    _write_json(out / "model_index.json", index)
    _write_json(
        out / "scheduler" / "scheduler_config.json",
        {
            **_diffusers_class("FlowMatchEulerDiscreteScheduler"),
            "num_train_timesteps": 1000,
            "shift": shift,
            "use_dynamic_shifting": dynamic_shift,
        },
    )
    # As in the published folders: saved from the causal model, so keys start with `model.`.
    models: list[tuple[str, str, str, dict[str, Any]]] = [
        (
            "transformer",
            "diffusion_pytorch_model",
            "",
            {**_diffusers_class("ZImageTransformer2DModel"), **asdict(checkpoint.transformer)},
        ),
        (
            "vae",
            "diffusion_pytorch_model",
            "",
            {**_diffusers_class("AutoencoderKL"), **asdict(checkpoint.vae)},
        ),
        ("text_encoder", "model", TEXT_PREFIX, _qwen3_config(checkpoint.text_encoder, dtype)),
    ]
    if checkpoint.vision is not None:
        vision, processor = (asdict(config) for config in checkpoint.vision)
        written = {"architectures": ["Siglip2VisionModel"], "vision_use_head": True, **vision}
        models.append(("siglip", "model", "", written))
        processor["image_processor_type"] = "Siglip2ImageProcessor"
        _write_json(out / "siglip_processor" / "preprocessor_config.json", processor)
    for folder, stem, prefix, config in models:
        _write_json(out / folder / "config.json", config)
        state = {
            prefix + key: tensor.to(dtype).contiguous()
            for key, tensor in sorted(checkpoint.states[folder].items())
        }
        save_weights(out / folder, stem, state, shard_size)
    save_tokenizer(out / "tokenizer", checkpoint.tokenizer)
    return out


def read_vae(folder: Path) -> AutoencoderKL:
    """Read an autoencoder alone, from the `vae` folder of a checkpoint, in float32.

    Raises:
        CheckpointError: its configuration is no autoencoder's.
        RuntimeError: its tensors are not those of the configuration.
        OSError: there is no such folder.
    """
    vae = AutoencoderKL(AutoencoderConfig.from_json(folder / "config.json"))
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    vae.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    return vae


def save_weights(
    folder: Path, stem: str, state: Mapping[str, Tensor], shard_size: int | None = None
) -> None:
    """Write tensors as `<stem>.safetensors`, or as numbered shards with their index.

    Args:
        folder: must exist.
        stem: file name without ending, `diffusion_pytorch_model` or `model`.
        state: tensors by key, in the order in which shards are filled.
        shard_size: most bytes of one shard (a larger tensor gets one to itself); None: one file.
    """
    shards = name_shards(stem, {key: x.nbytes for key, x in state.items()}, shard_size)
    for name, keys in shards.items():
        save_file({key: state[key] for key in keys}, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        write_index(folder, stem, shards, sum(tensor.nbytes for tensor in state.values()))


def _diffusers_class(name: str) -> dict[str, str]:
    return {"_class_name": name, "_diffusers_version": _DIFFUSERS_VERSION}


_MODEL_INDEX = {
    **_diffusers_class("ZImagePipeline"),
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_VISION_INDEX = {
    **_diffusers_class("ZImageOmniPipeline"),
    "siglip": ["transformers", "Siglip2VisionModel"],
    "siglip_processor": ["transformers", "Siglip2ImageProcessor"],
}


def _qwen3_config(config: TextEncoderConfig, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` as transformers 4 writes it, which 5 reads too."""
    values = {key: value for key, value in asdict(config).items() if key != "layer_types"}
    return {
        **values,
        "architectures": ["Qwen3ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "initializer_range": 0.02,
        "max_window_layers": config.num_hidden_layers,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
