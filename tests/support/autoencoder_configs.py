"""Autoencoders small enough to compute in a moment, one for each way in which configs differ."""

from collections.abc import Mapping
from typing import Any

import torch

_BASE = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16, 16, 24),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "flux-like": {},
    "two-layers": {"layers_per_block": 2, "latent_channels": 16},
    "no-attention": {"mid_block_add_attention": False},
    "quant-convs": {"use_quant_conv": True, "use_post_quant_conv": True},
    "two-stages": {"block_out_channels": (16, 8), "norm_num_groups": 8, "out_channels": 4},
}


def autoencoder_values(**changes: Any) -> dict[str, Any]:
    """What a checkpoint's config.json says, in its own keys."""
    values = {**_BASE, **changes}
    stages = len(values["block_out_channels"])
    values["down_block_types"] = ("DownEncoderBlock2D",) * stages
    values["up_block_types"] = ("UpDecoderBlock2D",) * stages
    return values


def random_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights for the keys and shapes of a state, norms and biases random too."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(tensor.shape, generator=generator) * tensor[0].numel() ** -0.5
        for key, tensor in state.items()
    }
