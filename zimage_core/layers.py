"""Layers of the Z-Image transformer: norms, rotary positions, attention, feed-forward, blocks.

Attribute names are the keys of the checkpoint; renaming one breaks loading. Letters in shapes:
B batch, S tokens, C channels of a token (`dim`), H heads, D channels of one head (C = H * D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage_core.attention import attention
from zimage_core.fused_weights import Fusable
from zimage_core.modulation import Modulation
from zimage_core.normalization import RMSNorm, rms_norm
from zimage_core.padding import Padding

# Width of the time embedding that drives the modulation of every block.
MODULATION_DIM = 256
TIME_FREQUENCIES = 256
TIME_HIDDEN = 1024
# Fixed by the released models: their `norm_eps` has the same value and never reaches these norms.
QK_NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate neighbouring pairs of channels by the token's angles, in float32.

    A complex multiplication is one pass over memory. Where it cannot be (compiled, since Inductor
    has no code for complex numbers; on MPS) it is the same products and sums in real numbers.

    Args:
        x: queries or keys, (B, S, H, D).
        rotary: cosine and sine of the angle of each pair in turn, (B or 1, S, 1, D) float32.

    Returns:
        (B, S, H, D) in the dtype of `x`.
    """
    pairs = torch.unflatten(x, -1, (-1, 2)).float()
    turns = torch.unflatten(rotary, -1, (-1, 2))
    if torch.compiler.is_compiling() or x.device.type == "mps":
        (even, odd), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:
        numbers, turn = torch.view_as_complex(pairs), torch.view_as_complex(turns)
        # What was cast is a copy, and can be overwritten.
        product = numbers * turn if x.dtype == torch.float32 else numbers.mul_(turn)
        rotated = torch.view_as_real(product)
    return rotated.flatten(-2).type_as(x)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the scaled model time and the MLP behind them."""

    def __init__(self, out_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FREQUENCIES, TIME_HIDDEN), nn.SiLU(), nn.Linear(TIME_HIDDEN, out_dim)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    def forward(self, time: Tensor) -> Tensor:
        """Embed times (B,), float32 in [0, t_scale], as (B, out_dim) in the weights' dtype."""
        half = TIME_FREQUENCIES // 2
        index = torch.arange(half, dtype=torch.float32, device=time.device)
        # Angles reach 1000 rad, where one float32 rounding is 6e-5: the order of these operations
        # is part of the trained model.
        angles = time.float()[:, None] * torch.exp(-math.log(10000.0) * index / half)
        features = torch.cat((angles.cos(), angles.sin()), dim=-1)
        embedded: Tensor = self.mlp(features.to(self.dtype))
        return embedded


class Attention(Fusable):
    """Multi-head self-attention with RMS-normalised queries and keys and rotary positions."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.backend: str | None = None
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])
        self.norm_q = RMSNorm(head_dim, eps=QK_NORM_EPS) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head_dim, eps=QK_NORM_EPS) if qk_norm else nn.Identity()

    def fusable(self) -> Sequence[nn.Module]:
        """See `Fusable.fusable`."""
        return self.to_q, self.to_k, self.to_v

    def forward(self, x: Tensor, rotary: Tensor, padding: Padding | None) -> Tensor:
        """Mix tokens (B, S, C); `padding` says which are real, None where all are."""
        q, k, v = (torch.unflatten(y, -1, (self.num_heads, -1)) for y in self.project(x))
        q = apply_rotary(self.norm_q(q), rotary)
        k = apply_rotary(self.norm_k(k), rotary)
        out: Tensor = self.to_out[0](attention(q, k, v, padding, self.backend).flatten(-2))
        return out


class FeedForward(Fusable):
    """SwiGLU: `w2(silu(w1 x) * w3 x)`."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def fusable(self) -> Sequence[nn.Module]:
        """See `Fusable.fusable`."""
        return self.w1, self.w3

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, S, C) to (B, S, C)."""
        gate, up = self.project(x)
        out: Tensor = self.w2(F.silu(gate).mul_(up))
        return out


class _Block(nn.Module):
    """Parameters that both kinds of block have: attention and SwiGLU, each normed on both sides."""

    def __init__(self, dim: int, num_heads: int, *, norm_eps: float, qk_norm: bool) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads, qk_norm=qk_norm)
        self.feed_forward = FeedForward(dim, int(dim / 3 * 8))
        self.attention_norm1 = RMSNorm(dim, eps=norm_eps)
        self.ffn_norm1 = RMSNorm(dim, eps=norm_eps)
        self.attention_norm2 = RMSNorm(dim, eps=norm_eps)
        self.ffn_norm2 = RMSNorm(dim, eps=norm_eps)


class CaptionBlock(_Block):
    """Block of the context refiner: caption tokens only, without modulation by time."""

    def forward(self, x: Tensor, rotary: Tensor, padding: Padding | None) -> Tensor:
        """Refine tokens (B, S, C)."""
        x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rotary, padding))
        out: Tensor = x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        return out


class ModulatedBlock(_Block):
    """Block of the noise refiner and of the main stack: scaled and gated by the time embedding."""

    def __init__(self, dim: int, num_heads: int, *, norm_eps: float, qk_norm: bool) -> None:
        super().__init__(dim, num_heads, norm_eps=norm_eps, qk_norm=qk_norm)
        self.adaLN_modulation = nn.Sequential(nn.Linear(min(dim, MODULATION_DIM), 4 * dim))

    def modulation(self, time: Tensor) -> Modulation:
        """What a time embedding (B or 1, 256) makes of this block; independent of the tokens.

        Computed on the device of `time`, wherever the block's weights are.
        """
        attention_scale, attention_gate, ffn_scale, ffn_gate = (
            _modulated(self.adaLN_modulation[0], time).unsqueeze(1).chunk(4, dim=-1)
        )

        def weight(norm: RMSNorm) -> Tensor:
            return norm.weight.to(time.device)

        return Modulation(
            weight(self.attention_norm1) * (1.0 + attention_scale),
            weight(self.attention_norm2) * attention_gate.tanh(),
            weight(self.ffn_norm1) * (1.0 + ffn_scale),
            weight(self.ffn_norm2) * ffn_gate.tanh(),
        )

    def modulating_parameters(self) -> list[nn.Parameter]:
        """What `modulation` depends on."""
        norms = self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2
        return [*self.adaLN_modulation.parameters(), *(norm.weight for norm in norms)]

    def forward(
        self, x: Tensor, rotary: Tensor, padding: Padding | None, modulation: Modulation
    ) -> Tensor:
        """Refine tokens (B, S, C) under what `modulation` returned."""
        normed = rms_norm(x, modulation.attention_in, self._eps(self.attention_norm1))
        mixed = self.attention(normed, rotary, padding)
        normed = rms_norm(mixed, None, self._eps(self.attention_norm2))
        x = torch.addcmul(x, modulation.attention_out, normed)

        normed = rms_norm(x, modulation.ffn_in, self._eps(self.ffn_norm1))
        normed = rms_norm(self.feed_forward(normed), None, self._eps(self.ffn_norm2))
        return torch.addcmul(x, modulation.ffn_out, normed)

    @staticmethod
    def _eps(norm: RMSNorm) -> float:
        assert norm.eps is not None
        return norm.eps


class FinalLayer(nn.Module):
    """Norm, scale by time, and projection of image tokens to patches."""

    def __init__(self, dim: int, patch_dim: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=FINAL_NORM_EPS)
        self.linear = nn.Linear(dim, patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(dim, MODULATION_DIM), dim))

    def scale(self, time: Tensor) -> Tensor:
        """Scale of the norm under a time embedding (B or 1, 256), (B or 1, 1, C)."""
        modulation: Tensor = self.adaLN_modulation(time)
        return 1.0 + modulation.unsqueeze(1)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """Project tokens (B, S, C) to patches (B, S, patch_dim)."""
        patches: Tensor = self.linear(self.norm_final(x) * scale)
        return patches


def _modulated(linear: nn.Module, time: Tensor) -> Tensor:
    """Call a linear layer on the device of `time`: it may belong to a block that is offloaded."""
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    return F.linear(time, weight.to(time.device), bias.to(time.device))
