"""How an image and a caption become one sequence of tokens: patches, padding, positions.

A caption's tokens come in multiples of 32: the last ones are a learned pad token, which is attended
to like any other. An image's tokens are padded in the same way with a pad token of their own. The
sequence is [image, caption]. Positions have three axes (frame, row, column): captions count along
the first from 1, pads included; the image sits in the frame after its caption's padded end; pads of
the image are at the origin.

Letters in shapes: B batch, S tokens, F channels of latents, h and w latents' height and width
(1/8 of the image's), p the patch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

TOKEN_MULTIPLE = 32


def padded_length(num_tokens: int) -> int:
    """Round a number of tokens up to the multiple of 32 that the model was trained on."""
    return -(-num_tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def pad_tokens(tokens: Tensor, pad: Tensor) -> Tensor:
    """Put a pad token (1, C) behind tokens (n, C) as often as a multiple of 32 needs."""
    return torch.cat((tokens, pad.expand(padded_length(len(tokens)) - len(tokens), -1)))


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Cut latents (B, F, h, w) into patches (B, h/p * w/p, p * p * F), channels innermost."""
    B, F, h, w = latents.shape
    p = patch_size
    patches = latents.view(B, F, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(B, (h // p) * (w // p), p * p * F)


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Put patches (B, h/p * w/p, p * p * F) together to latents (B, F, h, w); inverse of patchify.

    Args:
        patches: as `patchify` returns them.
        patch_size: p.
        height: h of the latents.
        width: w of the latents.
    """
    p = patch_size
    B = patches.shape[0]
    grid = patches.reshape(B, height // p, width // p, p, p, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, height, width)


def caption_positions(num_tokens: int) -> Tensor:
    """Positions of a padded caption, (S, 3) int64 on the CPU: 1..S along the first axis."""
    positions = torch.zeros(num_tokens, 3, dtype=torch.int64)
    positions[:, 0] = torch.arange(1, num_tokens + 1)
    return positions


def image_positions(caption_length: int, rows: int, columns: int) -> Tensor:
    """Positions of an image's tokens behind a caption, (S, 3) int64 on the CPU, pads at the origin.

    Args:
        caption_length: the caption's padded number of tokens.
        rows: patches from top to bottom.
        columns: patches from left to right.
    """
    positions = torch.zeros(padded_length(rows * columns), 3, dtype=torch.int64)
    grid = positions[: rows * columns].view(rows, columns, 3)
    grid[..., 0] = caption_length + 1
    grid[..., 1] = torch.arange(rows)[:, None]
    grid[..., 2] = torch.arange(columns)[None, :]
    return positions


def rotary_angles(
    positions: Tensor, *, axes_dims: Sequence[int], axes_lens: Sequence[int], theta: float
) -> Tensor:
    """Rotary angles of tokens, (S, D / 2) float32 in radians on the CPU.

    Args:
        positions: (S, 3) int64, each axis within `axes_lens`.
        axes_dims: channels of a head that turn with each axis; their sum is D.
        axes_lens: number of positions of each axis.
        theta: base of the frequencies.
    """
    tables = [
        _axis_angles(dim, length, theta) for dim, length in zip(axes_dims, axes_lens, strict=True)
    ]
    return torch.cat([table[positions[:, axis]] for axis, table in enumerate(tables)], dim=-1)


@lru_cache(maxsize=16)
def _axis_angles(dim: int, length: int, theta: float) -> Tensor:
    # Products in float64, then one rounding: what the model was trained with.
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(torch.arange(length, dtype=torch.float64), frequencies).float()
