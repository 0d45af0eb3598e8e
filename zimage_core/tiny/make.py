"""Make a checkpoint of random weights: every file a real one has, small enough to commit.

    python -m zimage_core.tiny.make OUT --dim 64 --layers 4 --seed 0

The same arguments give the same bytes. Its images mean nothing, but loading, batching, files and
numbers behave as those of the published checkpoints do.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimage_core.autoencoder import AutoencoderKL
from zimage_core.chat_template import VISION_END, VISION_START
from zimage_core.config import (
    AutoencoderConfig,
    TextEncoderConfig,
    TransformerConfig,
    VisionConfig,
    VisionProcessorConfig,
)
from zimage_core.text_encoder import full_model_shapes
from zimage_core.tiny.tokenizer import SPECIAL_TOKENS, train_tokenizer
from zimage_core.tiny.writer import TEXT_PREFIX, Checkpoint, write_checkpoint
from zimage_core.transformer import ZImageTransformer2DModel
from zimage_core.vision import VisionEncoder, pooling_head_shapes

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the architecture of a tiny checkpoint is made from; defaults give about 2 MB."""

    dim: int = 64
    layers: int = 4
    heads: int = 2
    refiners: int = 1
    axes_dims: tuple[int, ...] = (8, 12, 12)
    axes_lens: tuple[int, ...] = (1024, 512, 512)
    text_dim: int = 64
    text_layers: int = 3
    text_heads: int = 4
    text_kv_heads: int = 2
    text_head_dim: int = 16
    text_mlp: int = 160
    vocab_size: int = 1024
    latent_channels: int = 16
    vae_channels: tuple[int, ...] = (16, 16, 32, 32)
    vae_layers: int = 1
    vae_groups: int = 8
    siglip_dim: int = 0
    """Width of what is seen in pictures; 0 makes a checkpoint that takes none."""

    def transformer(self) -> TransformerConfig:
        """Configuration of the diffusion transformer."""
        return TransformerConfig(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=self.latent_channels,
            dim=self.dim,
            n_layers=self.layers,
            n_refiner_layers=self.refiners,
            n_heads=self.heads,
            n_kv_heads=self.heads,
            norm_eps=1e-5,
            qk_norm=True,
            cap_feat_dim=self.text_dim,
            siglip_feat_dim=self.siglip_dim or None,
            rope_theta=256.0,
            t_scale=1000.0,
            axes_dims=tuple(self.axes_dims),
            axes_lens=tuple(self.axes_lens),
        )

    def autoencoder(self) -> AutoencoderConfig:
        """Configuration of the autoencoder."""
        stages = len(self.vae_channels)
        return AutoencoderConfig(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            block_out_channels=tuple(self.vae_channels),
            layers_per_block=self.vae_layers,
            act_fn="silu",
            latent_channels=self.latent_channels,
            norm_num_groups=self.vae_groups,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=True,
        )

    def text_encoder(self) -> TextEncoderConfig:
        """Configuration of the text encoder, its unused last layer counted."""
        return TextEncoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.text_dim,
            intermediate_size=self.text_mlp,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.text_heads,
            num_key_value_heads=self.text_kv_heads,
            head_dim=self.text_head_dim,
            max_position_embeddings=40960,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            attention_bias=False,
            hidden_act="silu",
            model_type="qwen3",
        )

    def vision(self) -> tuple[VisionConfig, VisionProcessorConfig] | None:
        """Configurations of the encoder of pictures and of its processor, where there is one."""
        if not self.siglip_dim:
            return None
        return vision_configs(self.siglip_dim, layers=2, max_patches=64)


def vision_configs(
    dim: int, *, layers: int, max_patches: int
) -> tuple[VisionConfig, VisionProcessorConfig]:
    """Configurations of an encoder of patches of 16 pixels, with 4 x 4 places, and its processor.

    Args:
        dim: width of what is seen.
        layers: of the encoder.
        max_patches: into which a picture is cut.
    """
    encoder = VisionConfig(
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_patches=16,
        patch_size=16,
        model_type="siglip2_vision_model",
    )
    processor = VisionProcessorConfig(
        patch_size=16,
        max_num_patches=max_patches,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        rescale_factor=1 / 255,
        resample=2,
    )
    return encoder, processor


def make_checkpoint(
    out: Path | str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    shift: float = 3.0,
    dynamic_shift: bool = False,
    shard_size: int | None = None,
    **sizes: Any,
) -> Path:
    """Write a folder that this package and diffusers' `ZImagePipeline` load.

    With `siglip_dim` it takes pictures, and `ZImageOmniPipeline` is what loads it.

    Args:
        out: the folder; must not exist yet, or be empty.
        seed: of the weights; each tensor has a stream of its own, so that a tensor stays the same
            when others come or go.
        dtype: float16, bfloat16 or float32.
        shift: timestep shift of the scheduler.
        dynamic_shift: let the shift depend on the size of the image instead.
        shard_size: most bytes of tensors in one weight file; None writes one file a model.
        sizes: fields of `Sizes`.

    Returns:
        `out` as a path.

    Raises:
        ValueError: `out` holds something; `dtype` or the sizes are not possible.
        TypeError: `sizes` has a name that `Sizes` has not.
    """
    chosen = Sizes(**sizes)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}; allowed: {', '.join(DTYPES)}")
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: folder is not empty")

    transformer, vae, text = chosen.transformer(), chosen.autoencoder(), chosen.text_encoder()
    with torch.device("meta"):
        shapes = {
            "transformer": _shapes(ZImageTransformer2DModel(transformer)),
            "vae": _shapes(AutoencoderKL(vae)),
        }
    shapes["text_encoder"] = full_model_shapes(text)
    vision = chosen.vision()
    tokens: tuple[str, ...] = SPECIAL_TOKENS
    if vision is not None:
        with torch.device("meta"):
            shapes["siglip"] = _shapes(VisionEncoder(vision[0])) | pooling_head_shapes(vision[0])
        tokens = (*SPECIAL_TOKENS, VISION_START, VISION_END)
    prefixes = {"text_encoder": TEXT_PREFIX}
    states = {
        folder: {
            key: _draw(f"{seed}/{folder}/{prefixes.get(folder, '')}{key}", key, shape)
            for key, shape in sorted(of_model.items())
        }
        for folder, of_model in shapes.items()
    }
    return write_checkpoint(
        out,
        Checkpoint(
            transformer,
            vae,
            text,
            train_tokenizer(chosen.vocab_size, special_tokens=tokens),
            states,
            vision,
        ),
        dtype=dtype,
        shift=shift,
        dynamic_shift=dynamic_shift,
        shard_size=shard_size,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m zimage_core.tiny.make", description="Make a checkpoint of random weights."
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--shift", type=float, default=3.0)
    parser.add_argument("--dynamic-shift", action="store_true")
    parser.add_argument("--shard-size", type=int, metavar="BYTES")
    for item in fields(Sizes):
        kind = int if isinstance(item.default, int) else _numbers
        parser.add_argument(f"--{item.name.replace('_', '-')}", type=kind, default=item.default)
    options = vars(parser.parse_args(arguments))
    options["dtype"] = DTYPES[options["dtype"]]
    out = make_checkpoint(options.pop("out"), **options)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.2f} MB")


def _draw(stream: str, key: str, shape: tuple[int, ...]) -> Tensor:
    """Draw a float32 tensor whose scale keeps activations of a deep model finite and varied."""
    seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big") >> 1
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if key.endswith("bias"):
        return 0.05 * noise
    if len(shape) == 1:
        return 1.0 + 0.1 * noise  # norm weights
    if "pad_token" in key or "embed_tokens" in key:
        return 0.5 * noise
    fan_in = noise[0].numel()
    return noise * float(fan_in**-0.5)


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    main()
