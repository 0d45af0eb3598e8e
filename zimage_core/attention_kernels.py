"""The calls behind the attention backends, each on (B, S, H, D).

Calls that PyTorch cannot trace are operators of our own, so that a compiled block holds them as
one node whether or not the package behind them registers any. Letters in shapes: B batch, S tokens,
H heads, D channels of one head, T real tokens of all sequences together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zimage_core.padding import Padding

# FlashAttention 2 and 3 take the same arguments by these names, and by default scale by
# 1 / sqrt(D) and mask nothing (https://github.com/Dao-AILab/flash-attention).
_DENSE = "(Tensor q, Tensor k, Tensor v) -> Tensor"
_PACKED = "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen) -> Tensor"
_BY_SEQUENCE = "(Tensor q, Tensor k, Tensor v, Tensor lengths) -> Tensor"


def native(q: Tensor, k: Tensor, v: Tensor, padding: Padding | None) -> Tensor:
    """PyTorch's attention with the kernel that PyTorch chooses."""
    if padding is None:
        return _sdpa(q, k, v)
    out = _sdpa(q, k, v, padding.mask[:, None, None, :])
    return out.masked_fill(~padding.mask[:, :, None, None], 0.0)


def native_flash(q: Tensor, k: Tensor, v: Tensor, padding: Padding | None) -> Tensor:
    """PyTorch's attention with its flash kernel and no other, sequence by sequence if padded."""
    if padding is None:
        out: Tensor = _native_flash(q, k, v)
    else:
        out = _native_flash_by_sequence(q, k, v, padding.lengths)
    return out


def flash(q: Tensor, k: Tensor, v: Tensor, padding: Padding | None) -> Tensor:
    """FlashAttention 2, of the package flash-attn."""
    if padding is None:
        out: Tensor = _flash(q, k, v)
        return out
    packed = _flash_varlen(*_packed(q, k, v, padding), padding.cu_seqlens, q.shape[1])
    return padding.unpack(packed)


def flash_3(q: Tensor, k: Tensor, v: Tensor, padding: Padding | None) -> Tensor:
    """FlashAttention 3, of the module flash_attn_interface."""
    if padding is None:
        out: Tensor = _flash_3(q, k, v)
        return out
    packed = _flash_3_varlen(*_packed(q, k, v, padding), padding.cu_seqlens, q.shape[1])
    return padding.unpack(packed)


def _packed(q: Tensor, k: Tensor, v: Tensor, padding: Padding) -> tuple[Tensor, Tensor, Tensor]:
    return padding.pack(q), padding.pack(k), padding.pack(v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2)


@torch.library.custom_op("zimage::native_flash", mutates_args=(), schema=_DENSE)
def _native_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(q, k, v).contiguous()


@torch.library.custom_op("zimage::native_flash_by_sequence", mutates_args=(), schema=_BY_SEQUENCE)
def _native_flash_by_sequence(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    out = q.new_zeros(q.shape)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for i, n in enumerate(lengths.tolist()):
            out[i : i + 1, :n] = _sdpa(q[i : i + 1, :n], k[i : i + 1, :n], v[i : i + 1, :n])
    return out


@torch.library.custom_op("zimage::flash", mutates_args=(), schema=_DENSE)
def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return _output(flash_attn_func(*_contiguous(q, k, v)))


@torch.library.custom_op("zimage::flash_varlen", mutates_args=(), schema=_PACKED)
def _flash_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return _output(
        flash_attn_varlen_func(*_contiguous(q, k, v), **_lengths(cu_seqlens, max_seqlen))
    )


@torch.library.custom_op("zimage::flash_3", mutates_args=(), schema=_DENSE)
def _flash_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    return _output(flash_attn_func(*_contiguous(q, k, v)))


@torch.library.custom_op("zimage::flash_3_varlen", mutates_args=(), schema=_PACKED)
def _flash_3_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    return _output(
        flash_attn_varlen_func(*_contiguous(q, k, v), **_lengths(cu_seqlens, max_seqlen))
    )


@_native_flash.register_fake
@_flash.register_fake
@_flash_3.register_fake
def _like_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@_native_flash_by_sequence.register_fake
def _like_queries_by_sequence(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@_flash_varlen.register_fake
@_flash_3_varlen.register_fake
def _like_packed_queries(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    return q.new_empty(q.shape)


def _contiguous(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.contiguous(), k.contiguous(), v.contiguous()


def _lengths(cu_seqlens: Tensor, max_seqlen: int) -> dict[str, Tensor | int]:
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": max_seqlen,
        "max_seqlen_k": max_seqlen,
    }


def _output(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    # Earlier releases of FlashAttention 3 return the log-sum-exp beside the output.
    return (out[0] if isinstance(out, tuple) else out).contiguous()
