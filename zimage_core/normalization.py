"""RMSNorm, in as few passes over memory as the device allows.

CUDA has one kernel for it. On a CPU PyTorch composes it of a power, a mean, a sum, a root and two
products, each of which goes through memory; here it is a norm and one or two products. The two
differ by the rounding of a root that is squared again: 1e-7 of a value.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide by the root of the mean square along the last axis, and multiply by weights.

    Squares are summed in float32 (in float64 where that is the dtype).

    Args:
        x: (..., C) of any floating dtype.
        weight: (C,), or what broadcasts against `x`; None is ones.
        eps: added to the mean square.

    Returns:
        The shape and dtype of `x`.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
        mean_square = torch.addcmul(_scalar(eps), norm, norm, value=1 / x.shape[-1])
        scaled = x * mean_square.rsqrt()
        if weight is not None:
            scaled = scaled.mul_(weight)
        out: Tensor = scaled.type_as(x)
        return out
    size = x.shape[-1:]
    if weight is None:
        return F.rms_norm(x, size, None, eps)
    if weight.numel() == x.shape[-1]:
        return F.rms_norm(x, size, weight.view(size), eps)
    return F.rms_norm(x, size, None, eps) * weight


@functools.cache
def _scalar(value: float) -> Tensor:
    return torch.tensor(value)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last axis, computed by `rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """Norm (..., C)."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)
