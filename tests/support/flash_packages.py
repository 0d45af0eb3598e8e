"""Stand-ins for FlashAttention 2 and 3: they check every argument and compute by hand."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage_core import attention as attention_module

BACKENDS = ("native", "_native_flash", "flash", "_flash_3")
MODULES = {"flash": "flash_attn", "_flash_3": "flash_attn_interface"}


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention written out; `mask` (B, S) is true where a key is real."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@dataclass
class Calls:
    """What the stand-ins were asked: (module, "dense" or "varlen", shape of the queries)."""

    made: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)


def install(
    monkeypatch: pytest.MonkeyPatch, *, runnable: bool = True, returns_lse: bool = False
) -> Calls:
    """Put both packages in place; with `runnable` as if this machine could run them.

    Args:
        returns_lse: FlashAttention 3 gives the log-sum-exp beside the output, as it once did.
    """
    calls = Calls()
    for backend, name in MODULES.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        tuples = returns_lse and backend == "_flash_3"
        _fill(module, calls, returns_tuple=tuples)
        monkeypatch.setitem(sys.modules, name, module)
        if runnable:
            known = attention_module._BACKENDS[backend]
            usable = known._replace(missing=lambda device, dtype, head_dim: None)
            monkeypatch.setitem(attention_module._BACKENDS, backend, usable)
    return calls


def _fill(module: Any, calls: Calls, *, returns_tuple: bool) -> None:
    def result(out: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (out, out[..., 0].float()) if returns_tuple else out

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        _check(q, k, v, ndim=4)
        calls.made.append((module.__name__, "dense", tuple(q.shape)))
        return result(by_hand(q, k, v))

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> Tensor | tuple[Tensor, Tensor]:
        _check(q, k, v, ndim=3)
        for cu_seqlens, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
            assert cu_seqlens.dtype == torch.int32
            assert cu_seqlens.is_contiguous()
            assert cu_seqlens.device == q.device
            assert type(longest) is int
            bounds = cu_seqlens.tolist()
            assert bounds[0] == 0
            assert bounds[-1] == len(q)
            lengths = [stop - start for start, stop in pairwise(bounds)]
            assert min(lengths) > 0
            assert max(lengths) == longest
        calls.made.append((module.__name__, "varlen", tuple(q.shape)))
        bounds = cu_seqlens_q.tolist()
        parts = [slice(start, stop) for start, stop in pairwise(bounds)]
        return result(torch.cat([by_hand(q[None, p], k[None, p], v[None, p])[0] for p in parts]))

    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func


def _check(q: Tensor, k: Tensor, v: Tensor, *, ndim: int) -> None:
    for x in (q, k, v):
        assert x.ndim == ndim
        assert x.shape == q.shape
        assert x.dtype == q.dtype
        assert x.is_contiguous()
