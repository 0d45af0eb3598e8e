"""LoRA files as their producers write them, with the change that each must make."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from zimage_core.config import TransformerConfig
from zimage_core.transformer import ZImageTransformer2DModel

CONFIG = TransformerConfig(
    all_patch_size=(2,),
    all_f_patch_size=(1,),
    in_channels=16,
    dim=48,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    norm_eps=1e-5,
    qk_norm=True,
    cap_feat_dim=40,
    rope_theta=256.0,
    t_scale=1000.0,
    axes_dims=(8, 8, 8),
    axes_lens=(1024, 512, 512),
)

# One module of each part of the model; a pipeline of all parts breaks if one of them is missed.
MODULES = (
    "layers.0.attention.to_q",
    "layers.0.attention.to_k",
    "layers.0.attention.to_v",
    "layers.0.attention.to_out.0",
    "layers.1.attention.to_q",
    "layers.1.attention.to_k",
    "layers.1.attention.to_v",
    "layers.0.feed_forward.w1",
    "layers.1.feed_forward.w2",
    "layers.1.adaLN_modulation.0",
    "noise_refiner.0.attention.to_q",
    "noise_refiner.0.attention.to_k",
    "noise_refiner.0.attention.to_v",
    "context_refiner.0.attention.to_out.0",
    "context_refiner.0.feed_forward.w3",
    "all_x_embedder.2-1",
    "all_final_layer.2-1.linear",
    "all_final_layer.2-1.adaLN_modulation.1",
    "cap_embedder.1",
    "t_embedder.mlp.0",
)


def small_transformer() -> ZImageTransformer2DModel:
    """Random weights of `CONFIG`, the same each time."""
    torch.manual_seed(0)
    return ZImageTransformer2DModel(CONFIG).requires_grad_(False).eval()


@dataclass(frozen=True)
class LowRankPair:
    """What was trained for one module."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def delta(self) -> Tensor:
        return self.up @ self.down * (self.alpha / self.rank)


Trained = Mapping[str, LowRankPair]
Tensors = dict[str, Tensor]


def train(
    model: nn.Module,
    modules: Sequence[str] = MODULES,
    *,
    rank: int = 3,
    alpha: float | None = None,
    strength: float = 1.0,
    seed: int = 0,
) -> dict[str, LowRankPair]:
    """Random low-rank changes about as large as the weights; `alpha` None is the rank."""
    generator = Generator().manual_seed(seed)
    pairs = {}
    for name in modules:
        weight = model.get_submodule(name).weight
        rows, columns = weight.shape
        size = strength * (float(weight.detach().float().std()) / rank**0.5) ** 0.5
        pairs[name] = LowRankPair(
            size * torch.randn(rank, columns, generator=generator),
            size * torch.randn(rows, rank, generator=generator),
            float(rank if alpha is None else alpha),
        )
    return pairs


def with_parts(
    pairs: Trained, name: Callable[[str], str], down: str, up: str, *, alpha: bool = False
) -> Tensors:
    """Tensors under `name(module) + part`."""
    tensors: Tensors = {}
    for module, pair in pairs.items():
        tensors[name(module) + down] = pair.down
        tensors[name(module) + up] = pair.up
        if alpha:
            tensors[name(module) + ".alpha"] = torch.tensor(pair.alpha)
    return tensors


def underscored(module: str) -> str:
    return module.replace(".", "_")


def _diffusers(pairs: Trained) -> Tensors:
    return with_parts(pairs, "transformer.{}".format, ".lora_A.weight", ".lora_B.weight")


def _peft(pairs: Trained) -> Tensors:
    return with_parts(pairs, "base_model.model.{}".format, ".lora_A.weight", ".lora_B.weight")


def _ai_toolkit(pairs: Trained) -> Tensors:
    return with_parts(pairs, "diffusion_model.{}".format, ".lora_A.weight", ".lora_B.weight")


def _diffsynth(pairs: Trained) -> Tensors:
    return with_parts(pairs, str, ".lora_A.default.weight", ".lora_B.default.weight")


def _diffsynth_whole_pipeline(pairs: Trained) -> Tensors:
    name = "pipe.dit.{}".format
    return with_parts(pairs, name, ".lora_A.default.weight", ".lora_B.default.weight")


def _without_weight(pairs: Trained) -> Tensors:
    return with_parts(pairs, "transformer.{}".format, ".lora_A", ".lora_B")


def _down_up_with_dots(pairs: Trained) -> Tensors:
    down, up = ".lora_down.weight", ".lora_up.weight"
    return with_parts(pairs, "diffusion_model.{}".format, down, up, alpha=True)


def _down_up_underscored(prefix: str) -> Callable[[Trained], Tensors]:
    def layout(pairs: Trained) -> Tensors:
        def name(module: str) -> str:
            return prefix + underscored(module)

        return with_parts(pairs, name, ".lora_down.weight", ".lora_up.weight", alpha=True)

    return layout


_kohya = _down_up_underscored("lora_unet_")


def _musubi_folded(pairs: Trained) -> Tensors:
    """musubi-tuner's `convert_lora --target other`: alpha goes into both factors by its root."""
    tensors = _ai_toolkit(pairs)
    for module, pair in pairs.items():
        for part in ("A", "B"):
            key = f"diffusion_model.{module}.lora_{part}.weight"
            tensors[key] = tensors[key] * (pair.alpha / pair.rank) ** 0.5
    return tensors


def _old_diffusers(pairs: Trained) -> Tensors:
    """Attention alone: `attention.processor.to_q_lora.down.weight`."""
    tensors: Tensors = {}
    for module, pair in pairs.items():
        parent, _, leaf = module.removesuffix(".0").rpartition(".")
        for part, tensor in (("down", pair.down), ("up", pair.up)):
            tensors[f"transformer.{parent}.processor.{leaf}_lora.{part}.weight"] = tensor
    return tensors


def _linear_layer(pairs: Trained) -> Tensors:
    down, up = ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"
    return with_parts(pairs, "transformer.{}".format, down, up)


def _as_convolutions(pairs: Trained) -> Tensors:
    return {
        key: tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        for key, tensor in _kohya(pairs).items()
    }


def _fused(pairs: Trained) -> tuple[dict[str, list[LowRankPair]], dict[str, LowRankPair]]:
    """Queries, keys and values by their module's parent, and the other modules."""
    fused: dict[str, list[LowRankPair]] = {}
    rest = dict(pairs)
    for module in pairs:
        parent, _, leaf = module.rpartition(".")
        if leaf == "to_q":
            fused[parent] = [rest.pop(f"{parent}.to_{x}") for x in "qkv"]
    return fused, rest


def comfy_name(module: str) -> str:
    return (
        module.replace("to_out.0", "out")
        .replace("all_x_embedder.2-1", "x_embedder")
        .replace("all_final_layer.2-1", "final_layer")
    )


def _comfy(pairs: Trained) -> Tensors:
    """Fused queries, keys, values as musubi-tuner converts them: block-diagonal, alpha three times.

    A rank of 3r divides an alpha of 3a as r does a.
    """
    fused, rest = _fused(pairs)

    def name(module: str) -> str:
        return "lora_unet_" + comfy_name(module).replace(".", "_")

    tensors = with_parts(rest, name, ".lora_down.weight", ".lora_up.weight", alpha=True)
    for parent, three in fused.items():
        stem = name(f"{parent}.qkv")
        tensors[f"{stem}.lora_down.weight"] = torch.cat([p.down for p in three])
        tensors[f"{stem}.lora_up.weight"] = torch.block_diag(*(p.up for p in three))
        tensors[f"{stem}.alpha"] = torch.tensor(3 * three[0].alpha)
    return tensors


def _dots(pairs: Trained) -> Tensors:
    """Most underscores of a name made dots, with fused copies of what is there apart."""
    fused, _ = _fused(pairs)

    def dotted(name: str) -> str:
        dots = name.replace("_", ".")
        return dots.replace("to.out", "to_out").replace("feed.forward", "feed_forward")

    tensors = with_parts(pairs, dotted, ".lora.down.weight", ".lora.up.weight")
    for module, pair in pairs.items():
        tensors[f"{dotted(module.rpartition('.')[0])}.{module.rpartition('.')[2]}.alpha"] = (
            torch.tensor(pair.alpha)
        )
        if module.endswith("to_out.0"):
            copy = dotted(module.removesuffix("to_out.0") + "out")
            tensors[f"{copy}.lora.down.weight"] = pair.down
            tensors[f"{copy}.lora.up.weight"] = pair.up
    for parent, three in fused.items():
        stem = f"{dotted(parent)}.qkv"
        tensors[f"{stem}.lora.down.weight"] = torch.cat([p.down for p in three])
        tensors[f"{stem}.lora.up.weight"] = torch.block_diag(*(p.up for p in three))
        tensors[f"{stem}.alpha"] = torch.tensor(3 * three[0].alpha)
    return tensors


def _whole_prefix(pairs: Trained) -> Tensors:
    down, up = ".lora_A.weight", ".lora_B.weight"
    return with_parts(pairs, "model.diffusion_model.{}".format, down, up)


# Name of the format, its writer, and whether it stores an alpha (else alpha is the rank).
FORMATS: dict[str, tuple[Callable[[Trained], Tensors], bool]] = {
    "diffusers": (_diffusers, False),
    "peft": (_peft, False),
    "ai-toolkit": (_ai_toolkit, False),
    "diffsynth": (_diffsynth, False),
    "diffsynth, whole pipeline": (_diffsynth_whole_pipeline, False),
    "no .weight": (_without_weight, False),
    "down and up with dots": (_down_up_with_dots, True),
    "kohya, musubi-tuner": (_kohya, True),
    "kohya, two underscores": (_down_up_underscored("lora_unet__"), True),
    "OneTrainer": (_down_up_underscored("lora_transformer_"), True),
    "lycoris_": (_down_up_underscored("lycoris_"), True),
    "musubi-tuner, alpha folded": (_musubi_folded, True),
    "lora_linear_layer": (_linear_layer, False),
    "as convolutions": (_as_convolutions, True),
    "ComfyUI, block-diagonal": (_comfy, True),
    "dots with copies": (_dots, True),
    "model.diffusion_model": (_whole_prefix, False),
}
ATTENTION_FORMATS = {"old diffusers": _old_diffusers}


def diffusers_metadata(pairs: Trained, **config: object) -> dict[str, str]:
    """What diffusers' `save_lora_weights` writes into the header."""
    first = next(iter(pairs.values()))
    values = {"r": first.rank, "lora_alpha": first.alpha, "target_modules": list(pairs), **config}
    prefixed = {f"transformer.{key}": value for key, value in values.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(prefixed)}


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
) -> Path:
    # Cloned: safetensors refuses tensors that share their memory.
    save_file({k: t.to(dtype).clone().contiguous() for k, t in tensors.items()}, path, metadata)
    return path
