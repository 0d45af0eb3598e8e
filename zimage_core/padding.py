"""Sequences of different lengths in one tensor: which tokens are real and which only fill it up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Padding(NamedTuple):
    """The real tokens of B sequences that stand in (B, S, ...), S as long as the longest.

    Every form that an attention backend asks for, made once for a batch, so that no layer has to
    wait for the device. All are tensors: a number here would be a constant of a compiled graph.
    """

    mask: Tensor
    """Bool, (B, S), true where a token is real."""
    lengths: Tensor
    """Int32, (B,), real tokens of each sequence, on the CPU: read without waiting for a device."""
    cu_seqlens: Tensor
    """Int32, (B + 1,), where each sequence begins in the packed tokens, and their number."""
    indices: Tensor
    """Int64, (T,), where the T real tokens of all sequences lie among the B * S."""

    def pack(self, x: Tensor) -> Tensor:
        """Take the real tokens: (B, S, H, D) to (T, H, D), one sequence behind the other."""
        return x.flatten(0, 1).index_select(0, self.indices)

    def unpack(self, packed: Tensor) -> Tensor:
        """Put real tokens back: (T, H, D) to (B, S, H, D), with zeros where none is."""
        B, S = self.mask.shape
        tokens = packed.new_zeros(B * S, *packed.shape[1:])
        return torch.unflatten(tokens.index_copy(0, self.indices, packed), 0, (B, S))


def padding_of(lengths: Sequence[int], device: torch.device) -> Padding:
    """Lay out sequences of some lengths; computed on the CPU, then sent to `device`."""
    counts = torch.tensor(lengths, dtype=torch.int32)
    mask = torch.arange(max(lengths)) < counts[:, None]
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = counts.cumsum(0)
    return Padding(
        mask=mask.to(device),
        lengths=counts,
        cu_seqlens=cu_seqlens.to(device),
        indices=mask.flatten().nonzero().flatten().to(device),
    )
