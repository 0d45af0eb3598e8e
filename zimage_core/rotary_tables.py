"""Rotary angles of the sequences of a batch, made once for each size and caption bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zimage_core.patchify import caption_positions, image_positions, rotary_angles

if TYPE_CHECKING:
    from zimage_core.config import TransformerConfig

# Shapes whose angles are kept: 4 MB each for 1024 x 1024 pixels and the published heads.
_MAX_SHAPES = 16


class RotaryTables:
    """Cosines and sines of tokens, as `layers.apply_rotary` takes them: (B or 1, S, 1, D) float32.

    Args:
        config: of the transformer.
    """

    def __init__(self, config: TransformerConfig) -> None:
        self._config = config
        self._known: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def caption(self, length: int, device: torch.device) -> Tensor:
        """Of a caption alone, with so many tokens."""
        return self.of([caption_positions(length)], device)

    def sequences(
        self, lengths: Sequence[int], rows: int, columns: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Of images behind captions of some lengths: of the images alone, and of both.

        Args:
            lengths: of the captions; one serves a whole batch whose captions are equally long.
            rows: patches of each image from top to bottom.
            columns: patches from left to right.
            device: where they are needed.
        """
        key = (*lengths, rows, columns, device)
        if key in self._known:
            return self._known[key]
        image = [image_positions(length, rows, columns) for length in lengths]
        both = [
            torch.cat((positions, caption_positions(length)))
            for positions, length in zip(image, lengths, strict=True)
        ]
        tables = self.of(image, device), self.of(both, device)
        if len(lengths) == 1:  # mixed lengths seldom come again
            if len(self._known) >= _MAX_SHAPES:
                del self._known[next(iter(self._known))]
            self._known[key] = tables
        return tables

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()

    def of(self, positions: Sequence[Tensor], device: torch.device) -> Tensor:
        """Of sequences of positions (S_i, 3) int64, angle zero behind the shorter ones."""
        angles = [
            rotary_angles(
                p,
                axes_dims=self._config.axes_dims,
                axes_lens=self._config.axes_lens,
                theta=self._config.rope_theta,
            )
            for p in positions
        ]
        padded = pad_sequence(angles, batch_first=True).unsqueeze(2)
        turns = torch.stack((padded.cos(), padded.sin()), dim=-1).flatten(-2)
        # Copied: to compiled code, a view of something with an axis of 2 is another thing.
        return turns.to(device, copy=True)
