"""Layers of Qwen3 (arXiv 2505.09388): what the text encoder is made of.

Attribute names are the keys of transformers' `Qwen3Model`, which the tests compare with. Letters in
shapes: B prompts, L tokens, D hidden size, H heads, E channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage_core.config import TextEncoderConfig


class DecoderLayer(nn.Module):
    """Attention and gated MLP, each on a normed copy of the stream and added to it."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = CausalAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None) -> Tensor:
        """Map (B, L, D) to the same shape; see `CausalAttention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class CausalAttention(nn.Module):
    """Attention to earlier tokens; queries and keys are normed, and several queries share a key."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.queries_per_key = config.num_attention_heads // config.num_key_value_heads
        width, bias = config.hidden_size, config.attention_bias
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=bias)
        self.k_proj = nn.Linear(width, key_width, bias=bias)
        self.v_proj = nn.Linear(width, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, width, bias=bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None) -> Tensor:
        """Mix tokens.

        Args:
            x: (B, L, D).
            rotary: of `rotary_table`, in the dtype of `x`.
            mask: of `causal_mask`; None is causal attention to all tokens.

        Returns:
            (B, L, D).
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        q = _rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), rotary)
        k = _rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), rotary)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        # Repeated by hand: `enable_gqa` would leave some devices without a fused kernel.
        k = k.repeat_interleave(self.queries_per_key, dim=1)
        v = v.repeat_interleave(self.queries_per_key, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected


class GatedMLP(nn.Module):
    """SwiGLU: `down_proj(silu(gate_proj x) * up_proj x)`."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, D) to the same shape."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and sines for positions 0 to L - 1, (2, L, E) float32.

    Computed and not stored: no checkpoint holds the frequencies, and a cast of the model to
    bfloat16 would turn far tokens by a wrong angle.
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    frequencies = torch.pow(theta, channels / head_dim).reciprocal()
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin()))


def causal_mask(attention_mask: Tensor) -> Tensor:
    """Where a token may look: at itself, and at real tokens before it.

    Args:
        attention_mask: (B, L), not zero where a token is real.

    Returns:
        (B, 1, L, L) bool. Padding sees itself too, since a softmax over nothing is NaN.
    """
    length = attention_mask.shape[1]
    square = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device)
    allowed = square.tril() & (attention_mask != 0)[:, None, None, :]
    return allowed | torch.eye(length, dtype=torch.bool, device=attention_mask.device)


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate channel i of (B, H, L, E) with channel i + E / 2, by its position's angle."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    rotated: Tensor = x * cos + torch.cat((-second, first), dim=-1) * sin
    return rotated
