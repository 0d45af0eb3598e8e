"""What a training of the tiny checkpoint depends on."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numpy as np
import PIL
import tokenizers
import torch
import transformers

from zimage_core.tiny.make import Sizes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a training depends on, but for how long its stages take."""

    seed: int = 0
    dim: int = 160
    layers: int = 5
    heads: int = 5
    text_dim: int = 128
    text_layers: int = 3
    text_mlp: int = 320
    vocab_size: int = 2048
    vae_channels: tuple[int, ...] = (32, 48, 64, 64)
    latents: int = 14000
    captions: int = 40000
    batch_size: int = 40
    dropout: float = 0.1
    guidance: float = 1.0
    threads: int = 2

    @property
    def latents_seed(self) -> str:
        """Of the list of drawings that the transformer learns from."""
        return f"{self.seed}/latents"

    def sizes(self) -> Sizes:
        """Of the models."""
        return Sizes(
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            text_dim=self.text_dim,
            text_layers=self.text_layers,
            text_heads=4,
            text_kv_heads=2,
            text_head_dim=32,
            text_mlp=self.text_mlp,
            vocab_size=self.vocab_size,
            vae_channels=self.vae_channels,
        )


def versions() -> dict[str, str]:
    """What a training depends on besides its settings."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "machine": platform.machine(),
    }
