"""The noise that images are made from, drawn from one generator or from one for each image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def draw_noise(
    shape: tuple[int, int, int, int], generators: Generator | Sequence[Generator] | None
) -> Tensor:
    """Draw standard normal noise where the generator lives.

    Args:
        shape: (B, F, h, w).
        generators: B of them, one for each image, whose noise then does not depend on the others;
            or a single one that draws the noise of all images at once; None is torch's default CPU
            generator.

    Returns:
        `shape`, float32, on the generators' device: only a CPU generator's seed means the same
        noise everywhere.

    Raises:
        ValueError: a list of another length than B.
    """
    if isinstance(generators, Sequence):
        check_generators(generators, shape[0])
        return torch.cat([draw_noise((1, *shape[1:]), generator) for generator in generators])
    device = "cpu" if generators is None else generators.device
    return torch.randn(shape, generator=generators, device=device, dtype=torch.float32)


def check_generators(generators: Sequence[Generator], num_images: int) -> None:
    """Raise ValueError unless there is one generator for each image."""
    if len(generators) != num_images:
        raise ValueError(f"generator: {len(generators)} generators for {num_images} images")


def noise_or_given(
    shape: tuple[int, int, int, int],
    generators: Sequence[Generator] | None,
    latents: Tensor | None,
) -> Tensor:
    """Draw noise, or check what was drawn already.

    Raises:
        ValueError: both or neither are given, or what is given is of another shape.
    """
    if (generators is None) == (latents is None):
        raise ValueError("generators, latents: exactly one of the two is needed")
    if latents is not None:
        check_shape("latents", latents, shape)
        return latents
    return draw_noise(shape, generators)


def check_shape(name: str, latents: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Raise ValueError unless latents have a shape; `name` is the argument's."""
    if tuple(latents.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(latents.shape)} must be {shape}")
