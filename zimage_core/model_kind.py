"""The kinds of model that a checkpoint has, and how their files may be laid out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from zimage_core.autoencoder import AutoencoderKL
from zimage_core.config import (
    AutoencoderConfig,
    TextEncoderConfig,
    TransformerConfig,
    VisionConfig,
)
from zimage_core.key_maps import (
    Layout,
    comfy_transformer,
    diffusers,
    ldm_autoencoder,
    llama_cpp_qwen3,
)
from zimage_core.text_encoder import TextEncoder
from zimage_core.transformer import ZImageTransformer2DModel
from zimage_core.vision import VisionEncoder


class Kind(NamedTuple):
    """A kind of model that a checkpoint has.

    Attributes:
        name: its folder, and its name in `model_index.json`.
        words: what a message calls it.
        stem: file name of its weights in a folder, without ending.
        model: its class.
        config: class of its configuration.
        layouts: ways to name its tensors.
        folder_prefixes: what a folder's files may put before every name.
        file_prefixes: what a single file may.
        shared_prefixes: how its names begin in a file that holds several models.
    """

    name: str
    words: str
    stem: str
    model: type[nn.Module]
    config: Any
    layouts: Callable[[Any], tuple[Layout, ...]]
    folder_prefixes: tuple[str, ...]
    file_prefixes: tuple[str, ...]
    shared_prefixes: tuple[str, ...]


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="transformer",
            words="transformer",
            stem="diffusion_pytorch_model",
            model=ZImageTransformer2DModel,
            config=TransformerConfig,
            layouts=lambda config: (diffusers, comfy_transformer),
            folder_prefixes=("",),
            file_prefixes=(
                "",
                "model.diffusion_model.",
                "diffusion_model.",
                "transformer.",
                "model.",
            ),
            shared_prefixes=("model.diffusion_model.",),
        ),
        Kind(
            name="vae",
            words="autoencoder",
            stem="diffusion_pytorch_model",
            model=AutoencoderKL,
            config=AutoencoderConfig,
            layouts=lambda config: (diffusers, ldm_autoencoder(len(config.block_out_channels))),
            folder_prefixes=("",),
            file_prefixes=("", "vae.", "first_stage_model."),
            shared_prefixes=("vae.", "first_stage_model."),
        ),
        Kind(
            name="text_encoder",
            words="text encoder",
            stem="model",
            model=TextEncoder,
            config=TextEncoderConfig,
            layouts=lambda config: (diffusers, llama_cpp_qwen3),
            # Published as the causal model (`model.layers...`), saved by others without the prefix.
            folder_prefixes=("model.", ""),
            file_prefixes=(
                *("model.", ""),
                *("text_encoders.qwen3_4b.transformer.model.", "text_encoders.qwen3_4b.model."),
                *("text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_4b."),
            ),
            shared_prefixes=("text_encoders.",),
        ),
    )
}
"""What every checkpoint has."""

VISION = Kind(
    name="siglip",
    words="vision encoder",
    stem="model",
    model=VisionEncoder,
    config=VisionConfig,
    layouts=lambda config: (diffusers,),
    # As transformers 5 saves it, and as 4 does.
    folder_prefixes=("", "vision_model."),
    file_prefixes=(),
    shared_prefixes=(),
)
"""What a checkpoint that takes pictures has besides; always its folder's own."""
