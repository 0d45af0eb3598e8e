"""The autoencoder's attention over all pixels of an activation, some queries and keys at a time.

At 2048 x 2048 pixels it has 65 536 tokens, whose scores would be 16 GiB in float32. A row of a
softmax is computed from blocks of its scores with a running maximum and sum (Milakov and
Gimelshein 2018, the scheme of FlashAttention), which is exact but for rounding. Written out instead
of asked from `scaled_dot_product_attention`, because its kernel for heads as wide as 512 depends on
device and dtype, and with it whether the scores are ever in memory.

Letters: T tokens, C channels.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from zimage_core.autoencoder import AttentionBlock
from zimage_core.group_moments import GroupMoments
from zimage_core.row_bands import Activation, RowBands


def attend(block: AttentionBlock, x: Activation, bands: RowBands) -> Activation:
    """Run an attention block on an activation in a store; `x` is used up.

    Scores and sums are float32, or float64 if that is the dtype of `x`.
    """
    tokens = x.rows.view(-1, x.channels)
    precise = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    device = block.to_q.weight.device
    step = _chunk(len(tokens), x.channels, tokens.element_size(), precise.itemsize, bands)

    def normalised(start: int) -> Tensor:
        chunk = tokens[start : start + step].to(device)
        return x.moments.normalise(chunk, block.group_norm)

    keys, values = (bands.store(tuple(tokens.shape), tokens.dtype) for _ in range(2))
    starts = range(0, len(tokens), step)
    for start in starts:
        chunk = normalised(start)
        keys[start : start + step].copy_(block.to_k(chunk))
        values[start : start + step].copy_(block.to_v(chunk))
        del chunk

    moments = GroupMoments(bands.groups)
    for start in starts:
        queries = block.to_q(normalised(start)).to(precise) * x.channels**-0.5
        attended = _attended(queries, keys, values, step).to(tokens.dtype)
        del queries
        updated = block.to_out[0](attended)
        del attended
        # Nobody reads these tokens again: keys and values of all are there.
        updated.add_(tokens[start : start + step].to(device))
        moments.add(updated)
        tokens[start : start + step].copy_(updated)
        del updated
    return Activation(x.rows, moments.merged(x.channels))


def _attended(queries: Tensor, keys: Tensor, values: Tensor, step: int) -> Tensor:
    """Attend with scaled queries (T', C) to keys and values (T, C) in the store, `step` a time."""
    highest = queries.new_full((len(queries), 1), -torch.inf)
    total = torch.zeros_like(highest)
    summed = torch.zeros_like(queries)
    for start in range(0, len(keys), step):
        scores = queries @ keys[start : start + step].to(queries).mT
        higher = torch.maximum(highest, scores.amax(1, keepdim=True))
        weights = scores.sub_(higher).exp_()
        shrink = (highest - higher).exp_()
        total = total.mul_(shrink).add_(weights.sum(1, keepdim=True))
        summed.mul_(shrink).addmm_(weights, values[start : start + step].to(queries))
        highest = higher
        del scores, weights
    return summed.div_(total)


def _chunk(count: int, channels: int, size: int, precise: int, bands: RowBands) -> int:
    """How many queries, and how many keys, are computed with at a time."""

    def num_bytes(chunk: int) -> int:
        # Scores; queries and their sums; keys or values as stored and as computed with.
        return precise * chunk**2 + chunk * channels * (3 * precise + size)

    return max(1, bisect_right(range(1, count + 1), bands.band_bytes, key=num_bytes))
