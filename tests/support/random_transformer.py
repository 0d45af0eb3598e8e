"""A transformer with random weights of which each counts."""

from __future__ import annotations

import torch

from zimage_core.config import TransformerConfig
from zimage_core.transformer import ZImageTransformer2DModel


def random_transformer(config: TransformerConfig, seed: int = 0) -> ZImageTransformer2DModel:
    """Random weights; norms away from one and pad tokens as large as real ones, so each counts."""
    torch.manual_seed(seed)
    model = ZImageTransformer2DModel(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("embedder.0.weight"):
            torch.nn.init.normal_(parameter, mean=0.8, std=0.3)
        elif "pad_token" in name:
            torch.nn.init.normal_(parameter)
    return model.requires_grad_(False)
