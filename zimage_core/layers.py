"""Layers of the Z-Image transformer: norms, rotary positions, attention, feed-forward, blocks.

Attribute names are the keys of the checkpoint; renaming one breaks loading. Letters in shapes:
B batch, S tokens, C channels of a token (`dim`), H heads, D channels of one head (C = H * D).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage_core.attention import attention
from zimage_core.padding import Padding

# Width of the time embedding that drives the modulation of every block.
MODULATION_DIM = 256
TIME_FREQUENCIES = 256
TIME_HIDDEN = 1024
# Fixed by the released models: their `norm_eps` has the same value and never reaches these norms.
QK_NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6


class Rotary(NamedTuple):
    """Cosines and sines of the rotary angles of tokens, (B or 1, S, 1, D / 2) float32 each."""

    cos: Tensor
    sin: Tensor


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate neighbouring pairs of channels by the token's angles, in float32.

    Real arithmetic: the same products and sums as a complex multiplication, but they fuse under
    `torch.compile` and run on devices without complex numbers.

    Args:
        x: queries or keys, (B, S, H, D).
        rotary: angles, broadcast over heads (and over the batch where its first axis is 1).

    Returns:
        (B, S, H, D) in the dtype of `x`.
    """
    pairs = torch.unflatten(x, -1, (-1, 2))
    even, odd = pairs.float().unbind(-1)
    # Filled in place: twice as fast on a CPU as stacking the two halves, and rounded on the way.
    rotated = torch.empty_like(pairs)
    rotated[..., 0] = even * rotary.cos - odd * rotary.sin
    rotated[..., 1] = even * rotary.sin + odd * rotary.cos
    return rotated.flatten(-2)


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


class Attention(nn.Module):
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
        self.norm_q = nn.RMSNorm(head_dim, eps=QK_NORM_EPS) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(head_dim, eps=QK_NORM_EPS) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: Rotary, padding: Padding | None) -> Tensor:
        """Mix tokens (B, S, C); `padding` says which are real, None where all are."""
        q = torch.unflatten(self.to_q(x), -1, (self.num_heads, -1))
        k = torch.unflatten(self.to_k(x), -1, (self.num_heads, -1))
        v = torch.unflatten(self.to_v(x), -1, (self.num_heads, -1))
        q = apply_rotary(self.norm_q(q), rotary)
        k = apply_rotary(self.norm_k(k), rotary)
        out: Tensor = self.to_out[0](attention(q, k, v, padding, self.backend).flatten(-2))
        return out


class FeedForward(nn.Module):
    """SwiGLU: `w2(silu(w1 x) * w3 x)`."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, S, C) to (B, S, C)."""
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class _Block(nn.Module):
    """Parameters that both kinds of block have: attention and SwiGLU, each normed on both sides."""

    def __init__(self, dim: int, num_heads: int, *, norm_eps: float, qk_norm: bool) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads, qk_norm=qk_norm)
        self.feed_forward = FeedForward(dim, int(dim / 3 * 8))
        self.attention_norm1 = nn.RMSNorm(dim, eps=norm_eps)
        self.ffn_norm1 = nn.RMSNorm(dim, eps=norm_eps)
        self.attention_norm2 = nn.RMSNorm(dim, eps=norm_eps)
        self.ffn_norm2 = nn.RMSNorm(dim, eps=norm_eps)


class CaptionBlock(_Block):
    """Block of the context refiner: caption tokens only, without modulation by time."""

    def forward(self, x: Tensor, rotary: Rotary, padding: Padding | None) -> Tensor:
        """Refine tokens (B, S, C)."""
        x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rotary, padding))
        out: Tensor = x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        return out


class ModulatedBlock(_Block):
    """Block of the noise refiner and of the main stack: scaled and gated by the time embedding."""

    def __init__(self, dim: int, num_heads: int, *, norm_eps: float, qk_norm: bool) -> None:
        super().__init__(dim, num_heads, norm_eps=norm_eps, qk_norm=qk_norm)
        self.adaLN_modulation = nn.Sequential(nn.Linear(min(dim, MODULATION_DIM), 4 * dim))

    def forward(self, x: Tensor, rotary: Rotary, padding: Padding | None, time: Tensor) -> Tensor:
        """Refine tokens (B, S, C) under a time embedding (B or 1, 256)."""
        modulation = self.adaLN_modulation(time).unsqueeze(1)
        attention_scale, attention_gate, ffn_scale, ffn_gate = modulation.chunk(4, dim=-1)

        mixed = self.attention(self.attention_norm1(x) * (1.0 + attention_scale), rotary, padding)
        x = torch.addcmul(x, attention_gate.tanh(), self.attention_norm2(mixed))

        mapped = self.feed_forward(self.ffn_norm1(x) * (1.0 + ffn_scale))
        return torch.addcmul(x, ffn_gate.tanh(), self.ffn_norm2(mapped))


class FinalLayer(nn.Module):
    """Norm, scale by time, and projection of image tokens to patches."""

    def __init__(self, dim: int, patch_dim: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=FINAL_NORM_EPS)
        self.linear = nn.Linear(dim, patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(dim, MODULATION_DIM), dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Project tokens (B, S, C) to patches (B, S, patch_dim)."""
        scale = 1.0 + self.adaLN_modulation(time).unsqueeze(1)
        patches: Tensor = self.linear(self.norm_final(x) * scale)
        return patches
