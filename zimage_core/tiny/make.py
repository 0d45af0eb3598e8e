"""Make a checkpoint of random weights: every file a real one has, small enough to commit.

    python -m zimage_core.tiny.make OUT --dim 64 --layers 4 --seed 0

The same arguments give the same bytes. Its images mean nothing, but loading, batching, files and
numbers behave as those of the published checkpoints do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from zimage_core.autoencoder import AutoencoderKL
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.text_encoder import full_model_shapes
from zimage_core.tiny.tokenizer import save_tokenizer
from zimage_core.transformer import ZImageTransformer2DModel

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_DIFFUSERS_VERSION = "0.36.0.dev0"


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
    """Write a folder that this package and `diffusers.ZImagePipeline` load.

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
        transformer_shapes = _shapes(ZImageTransformer2DModel(transformer))
        vae_shapes = _shapes(AutoencoderKL(vae))
    # As in the published folders: saved from the causal model, so keys start with `model.`.
    text_shapes = {f"model.{key}": shape for key, shape in full_model_shapes(text).items()}

    _write_json(out / "model_index.json", _MODEL_INDEX)
    _write_json(
        out / "scheduler" / "scheduler_config.json",
        {
            **_diffusers_class("FlowMatchEulerDiscreteScheduler"),
            "num_train_timesteps": 1000,
            "shift": shift,
            "use_dynamic_shifting": dynamic_shift,
        },
    )
    models: list[tuple[str, str, dict[str, Any], dict[str, tuple[int, ...]]]] = [
        (
            "transformer",
            "diffusion_pytorch_model",
            {**_diffusers_class("ZImageTransformer2DModel"), **asdict(transformer)},
            transformer_shapes,
        ),
        (
            "vae",
            "diffusion_pytorch_model",
            {**_diffusers_class("AutoencoderKL"), **asdict(vae)},
            vae_shapes,
        ),
        ("text_encoder", "model", _qwen3_config(text, dtype), text_shapes),
    ]
    for folder, stem, config, shapes in models:
        _write_json(out / folder / "config.json", config)
        state = {
            key: _draw(f"{seed}/{folder}/{key}", key, shape).to(dtype)
            for key, shape in sorted(shapes.items())
        }
        save_weights(out / folder, stem, state, shard_size)
    save_tokenizer(out / "tokenizer", chosen.vocab_size)
    return out


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
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_size
    for key, tensor in state.items():
        if shard_size is not None and room is not None:
            if shards[-1] and tensor.nbytes > room:
                shards.append({})
                room = shard_size
            room -= tensor.nbytes
        shards[-1][key] = tensor
    if len(shards) == 1:
        save_file(shards[0], folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(tensor.nbytes for tensor in state.values())
    _write_json(
        folder / f"{stem}.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
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


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    main()
