"""Our components and a pipeline of diffusers on one checkpoint, and what both are given."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from zimage_core import generate, load_from_local_dir


def picture(seed: int = 0, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A gradient under noise: no two rows, columns or channels alike."""
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 90, (height, width, 3))
    slope = np.linspace(0, 150, width)[None, :, None] + np.linspace(0, 15, height)[:, None, None]
    return Image.fromarray((noise + slope * (1 + seed % 2) / 2).astype(np.uint8))


def seeded(num_images: int, first: int = 100) -> list[Generator]:
    return [Generator().manual_seed(first + i) for i in range(num_images)]


def distance(actual: Any, expected: Any) -> float:
    """Largest difference, relative to the largest value."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


class PipelinePair:
    """Both in float32.

    Args:
        folder: the checkpoint.
        reference: class of diffusers' pipeline.
        defaults: arguments of every call of either.
    """

    def __init__(self, folder: Path, reference: Any, defaults: Mapping[str, Any]) -> None:
        self.components = load_from_local_dir(folder, device="cpu", dtype=torch.float32)
        self.reference = reference.from_pretrained(folder, torch_dtype=torch.float32)
        self.reference.set_progress_bar_config(disable=True)
        self._defaults = {"output_type": "latent", **defaults}

    def ours(self, **arguments: Any) -> Tensor:
        latents = generate(**self.components, **{**self._defaults, **arguments})
        assert isinstance(latents, Tensor)
        return latents

    def theirs(self, **arguments: Any) -> Tensor:
        """Arguments are copied: diffusers changes some."""
        arguments = {**self._defaults, "guidance_scale": 0.0, **arguments}
        images: Tensor = self.reference(**copy.deepcopy(arguments)).images
        return images
