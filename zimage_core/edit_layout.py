"""Where the tokens of an edit stand: text in segments, pictures between them, what is seen in them.

The text of an edit is cut where a picture goes. Segment k is followed by image k, and the last
segment by nothing: with N pictures there are N + 2 segments, the images being the pictures and then
the one that is made (with no picture there is one segment, and the image behind it). Along the
first axis of positions the segments follow each other; behind each are two places, one for its
image's latents and one for its visual features. The latents have rows and columns of their own;
visual features, of which there are fewer, are spread over the rows and columns of the latents'
elements (not of their patches, so that they reach twice as far).

Each segment, image and set of features is padded to a multiple of 32 tokens. Pads of a segment go
on counting, into places that the following ones have too; all other pads are at the origin.

The description is that of diffusers' `ZImageOmniPipeline`, which departs from it in one place: in
its version 0.42 the positions of all segments but the first are late by the pads before them
(huggingface/diffusers#13574). `aligned=False` does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_core.patchify import TOKEN_MULTIPLE, padded_length

Size = tuple[int, int]


@dataclass(frozen=True)
class EditLayout:
    """Positions (S, 3) int64 and noisiness (S,) bool of the tokens of one edit, on the CPU.

    Attributes:
        text: of all segments.
        images: of the pictures' latents and then the image's.
        visual: of the pictures' features and the pads in place of the image's; empty without
            pictures.
        text_noisy: whether a token is modulated by the time of the image that is made; all
            others by the time of what has no noise.
        images_noisy: see `text_noisy`.
        visual_noisy: see `text_noisy`.
    """

    text: Tensor
    images: Tensor
    visual: Tensor
    text_noisy: Tensor
    images_noisy: Tensor
    visual_noisy: Tensor

    @property
    def positions(self) -> Tensor:
        """Of the whole sequence [text, images, visual], (S, 3)."""
        return torch.cat((self.text, self.images, self.visual))

    @property
    def noisy(self) -> Tensor:
        """Noisiness of the whole sequence, (S,)."""
        return torch.cat((self.text_noisy, self.images_noisy, self.visual_noisy))


def edit_layout(
    segments: Sequence[int],
    images: Sequence[Size],
    visual: Sequence[Size],
    *,
    patch_size: int = 2,
    aligned: bool = True,
) -> EditLayout:
    """Lay out one edit.

    Args:
        segments: tokens of each, not padded; for N pictures N + 2, or 1 where there is none.
        images: rows and columns of the latents of the pictures, and last of the image.
        visual: rows and columns of each picture's features, N.
        patch_size: latents' elements of a patch along one side.
        aligned: whether every segment has its own positions; see the module.

    Raises:
        ValueError: the numbers of segments, images and features do not fit together.
    """
    num_pictures = len(images) - 1
    wanted = num_pictures + 2 if num_pictures else 1
    if len(visual) != num_pictures or len(segments) != wanted:
        raise ValueError(
            f"{len(segments)} segments and {len(visual)} sets of features for {num_pictures} "
            f"pictures; allowed: {wanted} and {num_pictures}"
        )
    text, ends, place = [], [], 1
    for length in segments:
        padded = padded_length(length)
        text.append(_line(place, padded))
        if not aligned:
            text.append(torch.zeros(padded - length, 3, dtype=torch.int64))
        ends.append(place + length)
        place += length + 2

    latents = [
        _padded(_grid(end, rows // patch_size, columns // patch_size))
        for end, (rows, columns) in zip(ends, images, strict=False)
    ]
    features = [
        _padded(_spread(end + 1, seen, of))
        for end, seen, of in zip(ends, visual, images, strict=False)
    ]
    if features:
        features.append(torch.zeros(TOKEN_MULTIPLE, 3, dtype=torch.int64))
    else:
        features.append(torch.zeros(0, 3, dtype=torch.int64))
    lengths = [padded_length(length) for length in segments]
    return EditLayout(
        text=torch.cat(text)[: sum(lengths)],
        images=torch.cat(latents),
        visual=torch.cat(features),
        text_noisy=_from(num_pictures, lengths),
        images_noisy=_from(num_pictures, [len(tokens) for tokens in latents]),
        visual_noisy=_from(num_pictures, [len(tokens) for tokens in features]),
    )


def _line(first: int, length: int) -> Tensor:
    positions = torch.zeros(length, 3, dtype=torch.int64)
    positions[:, 0] = torch.arange(first, first + length)
    return positions


def _grid(place: int, rows: int, columns: int) -> Tensor:
    grid = torch.empty(rows, columns, 3, dtype=torch.int64)
    grid[..., 0] = place
    grid[..., 1] = torch.arange(rows)[:, None]
    grid[..., 2] = torch.arange(columns)[None, :]
    return grid.flatten(0, 1)


def _spread(place: int, seen: Size, of: Size) -> Tensor:
    """A grid of `seen` rows and columns, spread over one of `of`, towards zero in float32."""
    positions = _grid(place, *seen)
    for axis in (0, 1):
        steps = positions[:, axis + 1].float() / max(seen[axis] - 1, 1) * (of[axis] - 1)
        positions[:, axis + 1] = steps.to(torch.int64)
    return positions


def _padded(positions: Tensor) -> Tensor:
    missing = padded_length(len(positions)) - len(positions)
    return torch.cat((positions, torch.zeros(missing, 3, dtype=torch.int64)))


def _from(first: int, lengths: Sequence[int]) -> Tensor:
    """(S,) bool for parts of some lengths: true from the part `first` on."""
    return torch.cat([torch.full((length,), k >= first) for k, length in enumerate(lengths)])
