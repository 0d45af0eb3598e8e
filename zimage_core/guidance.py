"""Classifier-free guidance: when it acts and how it combines the two branches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from zimage_core.entries import Condition


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Strength of guidance, and the two limits that may be put on it.

    Args:
        scale: s in `pos + s * (pos - neg)`; 0 is off.
        normalization: k > 0 limits the norm of an image's guided velocity to k times the norm of
            its positive branch; True is 1.0, False and 0 are no limit.
        truncation: guidance stops once the model time 1 - sigma exceeds it; None, or 1 and more, is
            never.

    Raises:
        ValueError: `scale` or `normalization` is negative or not finite.
    """

    scale: float
    normalization: bool | float = False
    truncation: float | None = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.scale < math.inf:
            raise ValueError(f"guidance_scale: {self.scale} must be a number of at least 0")
        if not 0.0 <= float(self.normalization) < math.inf:
            raise ValueError(
                f"cfg_normalization: {self.normalization} must be a number of at least 0"
            )

    @property
    def is_on(self) -> bool:
        """Whether a negative branch is needed at all."""
        return self.scale > 0.0

    def negatives(
        self, negative_prompt_embeds: Sequence[Condition] | None, num_images: int
    ) -> Sequence[Condition]:
        """Conditions of the negative branch: one for each image, or none where guidance is off.

        Raises:
            ValueError: guidance is on and they are not given, or are not one for each image.
        """
        if not self.is_on:
            return ()
        if negative_prompt_embeds is None:
            raise ValueError(f"negative_prompt_embeds: needed where guidance_scale is {self.scale}")
        if len(negative_prompt_embeds) != num_images:
            raise ValueError(
                f"negative_prompt_embeds: {len(negative_prompt_embeds)} for {num_images} "
                "prompt_embeds"
            )
        return negative_prompt_embeds

    def acts_at(self, time: float) -> bool:
        """Whether the step at a model time, in [0, 1), is guided."""
        return self.is_on and (self.truncation is None or time <= self.truncation)

    def combine(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Guide velocities (B, ...) float32; a norm is taken over the whole image."""
        guided = positive + self.scale * (positive - negative)
        if not self.normalization:
            return guided
        image = tuple(range(1, guided.ndim))
        norm = torch.linalg.vector_norm(guided, dim=image, keepdim=True)
        limit = torch.linalg.vector_norm(positive, dim=image, keepdim=True)
        limit = limit * float(self.normalization)
        # Selected on the device: to ask which images exceed their limit is to wait for them.
        return guided * torch.where(norm > limit, limit / norm, 1.0)
