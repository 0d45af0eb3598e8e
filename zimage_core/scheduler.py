"""Noise schedule of flow matching and its Euler step.

Latents at noise level sigma are `sigma * noise + (1 - sigma) * image`; sampling walks sigma from 1
to 0. The scheduler holds numbers only and no state of a run, so one object may serve many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from zimage_core.config import CheckpointError, read_json


def calculate_shift(
    image_seq_len: int,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Interpolate the dynamic shift `mu` linearly in the number of image tokens.

    Args:
        image_seq_len: tokens of the image, before padding to 32.
        base_seq_len: number of tokens at which `mu` is `base_shift`.
        max_seq_len: number of tokens at which `mu` is `max_shift`.
        base_shift: see `base_seq_len`.
        max_shift: see `max_seq_len`.
    """
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    return image_seq_len * slope + (base_shift - slope * base_seq_len)


@dataclass(frozen=True, kw_only=True)
class FlowMatchEulerDiscreteScheduler:
    """Euler sampler of a flow-matching model; fields are the keys of `scheduler_config.json`.

    `shift` is used as it is unless `use_dynamic_shifting`, which derives the shift from the size of
    the image. The options that follow `time_shift_type` belong to other models: they are read
    because checkpoints carry them, and must keep their neutral value.

    Raises:
        ValueError: a value is out of range, or an option of another model is switched on.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    stochastic_sampling: bool = False

    def __post_init__(self) -> None:
        for name in ("num_train_timesteps", "base_image_seq_len", "max_image_seq_len"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {value!r} must be a positive integer")
        for name in ("shift", "base_shift", "max_shift"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name}: {value!r} must be a number")
        if not 0.0 < self.shift < math.inf:
            raise ValueError(f"shift: {self.shift!r} must be a positive number")
        if not isinstance(self.use_dynamic_shifting, bool):
            raise ValueError(f"use_dynamic_shifting: {self.use_dynamic_shifting!r} must be a bool")
        if self.max_image_seq_len <= self.base_image_seq_len:
            raise ValueError(
                f"max_image_seq_len: {self.max_image_seq_len} must be greater than "
                f"base_image_seq_len {self.base_image_seq_len}"
            )
        if self.time_shift_type not in ("exponential", "linear"):
            raise ValueError(
                f"time_shift_type: {self.time_shift_type!r} must be 'exponential' or 'linear'"
            )
        for name in _OPTIONS_OF_OTHER_MODELS:
            if getattr(self, name):
                raise ValueError(
                    f"{name}: {getattr(self, name)!r} is not supported; Z-Image has it off"
                )

    @classmethod
    def from_json(cls, path: Path) -> FlowMatchEulerDiscreteScheduler:
        """Read `scheduler_config.json`; a key that is absent has the default, as in diffusers.

        Raises:
            CheckpointError: the file is missing or no JSON object, a key is unknown, a value is
                not allowed.
        """
        config = read_json(path)
        allowed = [field.name for field in fields(cls)]
        unknown = [key for key in config if key not in allowed]
        if unknown:
            values = ", ".join(f"{key!r} with value {config[key]!r}" for key in unknown)
            raise CheckpointError(f"{path}: unknown key {values}; allowed: {', '.join(allowed)}")
        try:
            return cls(**config)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def sigmas(self, num_inference_steps: int, *, image_seq_len: int) -> Tensor:
        """Noise levels of a run: n levels from 1 down, then 0, so that n steps are n forwards.

        Args:
            num_inference_steps: n.
            image_seq_len: tokens of the image before padding; matters for dynamic shifting only.

        Returns:
            (n + 1,) float32 on the CPU.

        Raises:
            ValueError: n is less than 1.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: {num_inference_steps} must be at least 1")
        levels = torch.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
        if self.use_dynamic_shifting:
            mu = calculate_shift(
                image_seq_len,
                self.base_image_seq_len,
                self.max_image_seq_len,
                self.base_shift,
                self.max_shift,
            )
            # A tensor, since torch divides a number by a tensor with two roundings.
            factor = torch.tensor(math.exp(mu) if self.time_shift_type == "exponential" else mu)
            shifted = factor / (factor + (1.0 / levels - 1.0))
        else:
            shifted = self.shift * levels / (1.0 + (self.shift - 1.0) * levels)
        return torch.cat((shifted, torch.zeros(1)))

    def model_times(self, sigmas: Tensor) -> Tensor:
        """Times that the model is called with, 1 - sigma for each step: (n,) float32.

        Computed through training timesteps, whose rounding the sinusoidal embedding amplifies.

        Args:
            sigmas: as `sigmas()` returns them, (n + 1,).
        """
        timesteps = sigmas[:-1] * self.num_train_timesteps
        return (self.num_train_timesteps - timesteps) / self.num_train_timesteps

    def scale_noise(self, images: Tensor, noise: Tensor, sigmas: Tensor, index: int) -> Tensor:
        """Bring clean latents to the noise level `sigmas[index]`, where step `index` begins.

        Args:
            images: latents of images, float32.
            noise: standard normal, float32, the shape of `images`.
            sigmas: see `step`.
            index: step number, from 0.
        """
        return sigmas[index] * noise + (1.0 - sigmas[index]) * images

    def step(self, velocity: Tensor, latents: Tensor, sigmas: Tensor, index: int) -> Tensor:
        """Walk latents from noise level `sigmas[index]` to `sigmas[index + 1]`.

        Args:
            velocity: d latents / d sigma, float32, the shape of `latents`.
            latents: float32.
            sigmas: as `sigmas()` returns them, on the CPU or on the device of `latents`.
            index: step number, from 0.
        """
        return latents + (sigmas[index + 1] - sigmas[index]) * velocity


_OPTIONS_OF_OTHER_MODELS = (
    "invert_sigmas",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)
