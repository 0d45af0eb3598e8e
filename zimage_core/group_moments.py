"""Mean and variance of each group of channels, of an activation that is never in one piece.

For each band the mean and the sum of squared differences from it are computed, and those of all
bands are merged at the end (Chan, Golub and LeVeque 1979): sums of squares minus squares of sums,
which lose digits where the mean is large, appear nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """What a group norm divides by: `mean` and `variance` of each channel's group, (C,) each."""

    mean: Tensor
    variance: Tensor

    def normalise(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """Apply a group norm to a part of the activation, (1, C, H, W) or (pixels, C)."""
        # With statistics known beforehand a group norm is a batch norm in evaluation: one kernel,
        # that computes in float32 and rounds once where `x` has fewer bits.
        return F.batch_norm(
            x,
            self.mean,
            self.variance,
            norm.weight.to(self.mean.dtype),
            norm.bias.to(self.mean.dtype),
            eps=norm.eps,
        )


class GroupMoments:
    """Gathers the moments of an activation from its bands.

    Args:
        groups: number of groups that the channels are divided into.
    """

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._counts: list[int] = []
        self._means: list[Tensor] = []
        self._squares: list[Tensor] = []

    def add(self, band: Tensor) -> None:
        """Take a band (..., C) into account, in float32, or in float64 if that is its dtype."""
        channels = band.shape[-1]
        pixels = band.reshape(-1, channels)
        precise = torch.float64 if band.dtype == torch.float64 else torch.float32
        # By channel first: sums along the outer axis are the fast ones in this layout.
        means = pixels.mean(0, dtype=precise)
        squares = (pixels - means).square_().sum(0)
        means, squares = means.view(self._groups, -1), squares.view(self._groups, -1)
        mean = means.mean(1)
        self._counts.append(pixels.shape[0] * (channels // self._groups))
        self._means.append(mean)
        between = (means - mean[:, None]).square().sum(1) * pixels.shape[0]
        self._squares.append(squares.sum(1) + between)

    def merged(self, channels: int) -> Moments:
        """Return the moments of all bands together, for each of `channels`."""
        means, squares = torch.stack(self._means), torch.stack(self._squares)
        total = sum(self._counts)
        shares = [[count / total] for count in self._counts]
        weights = torch.tensor(shares, dtype=means.dtype, device=means.device)
        mean = (weights * means).sum(0)
        variance = squares.sum(0) / total + (weights * (means - mean).square()).sum(0)
        repeats = channels // self._groups
        return Moments(mean.repeat_interleave(repeats), variance.repeat_interleave(repeats))
