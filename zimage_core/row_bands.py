"""Convolutions of an activation that the device sees only a band of rows at a time.

The activation of one image lies in a *store*, usually host memory, as (H, W, C): a band of rows is
then one block of memory, and on the device the channels-last layout that convolutions prefer. What
lies between two group norms is one pass over it: rows of a band, and those that the convolution
needs above and below, are brought to the device, normalised with the moments of the whole
activation, convolved, and brought back, while the moments for the next norm are gathered. So there
are no seams: every row is what it is in one piece, but for the order in which floats are added.

Letters: H and W pixels of an activation, C channels, N rows of a band.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage_core.autoencoder import Downsample, ResnetBlock, Upsample
from zimage_core.group_moments import GroupMoments, Moments

# Makes an uninitialised tensor of a shape and dtype, contiguous, where activations are to lie.
Store = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True)
class Activation:
    """The activation of one image: `rows` (H, W, C) in the store, and its groups' `moments`."""

    rows: Tensor
    moments: Moments

    @property
    def channels(self) -> int:
        """C."""
        return self.rows.shape[-1]


class RowBands:
    """Runs layers on activations in a store.

    Args:
        groups: of the group norm that comes next.
        band_bytes: what the tensors of one band may take on the device together; one row is
            computed at a time where it does not suffice for more.
        store: where activations lie.
    """

    def __init__(self, groups: int, band_bytes: int, store: Store) -> None:
        self.groups = groups
        self.band_bytes = band_bytes
        self.store = store

    def first(self, image: Tensor, conv: nn.Conv2d) -> Activation:
        """Convolve what the model is given, (C, H, W)."""
        return self._activation(_Pass(image.permute(1, 2, 0), conv))

    def resnet(
        self,
        block: ResnetBlock,
        x: Activation,
        resample: Downsample | Upsample | None = None,
    ) -> Activation:
        """Run a residual block and what changes the resolution behind it; `x` is used up."""
        hidden = self._activation(_Pass(x.rows, block.conv1, block.norm1, x.moments))
        last = _Pass(
            hidden.rows, block.conv2, block.norm2, hidden.moments, x.rows, block.conv_shortcut
        )
        if resample is not None:
            last.resample = resample
            return self._activation(last)
        # A band is written after its residual has been read, and rows do not grow: what is still
        # to be read lies behind.
        grows = block.conv2.out_channels > x.channels
        return self._activation(last, None if grows else x.rows)

    def last(self, x: Activation, norm: nn.GroupNorm, conv: nn.Conv2d, image: Tensor) -> None:
        """Normalise and convolve into `image`, (C, H, W)."""
        self._run(_Pass(x.rows, conv, norm, x.moments), image.permute(1, 2, 0), None)

    def _activation(self, work: _Pass, reused: Tensor | None = None) -> Activation:
        shape = work.shape
        if reused is None:
            rows = self.store(shape, work.source.dtype)
        else:
            rows = reused.view(-1)[: prod(shape)].view(shape)
        moments = GroupMoments(self.groups)
        self._run(work, rows, moments)
        return Activation(rows, moments.merged(shape[-1]))

    def _run(self, work: _Pass, rows: Tensor, moments: GroupMoments | None) -> None:
        height = work.shape[0]
        step = max(1, bisect_right(range(1, height + 1), self.band_bytes, key=work.num_bytes))
        for first in range(0, height, step):
            last = min(first + step, height)
            band = work.band(first, last)
            if moments is not None:
                moments.add(band)
            rows[first:last].copy_(band)
            del band  # or it would live on while the next one is made


@dataclass
class _Pass:
    """One 3x3 convolution with the norm before it, the residual and the resampling behind it.

    Attributes:
        source: (H, W, C) in the store.
        conv: its convolution.
        norm: with SiLU before `conv`, where there is one.
        moments: of `source`, for `norm`.
        residual: (H, W, C') in the store, is added.
        shortcut: brings `residual` to the channels of `conv`, where they differ.
        resample: what follows.
    """

    source: Tensor
    conv: nn.Conv2d
    norm: nn.GroupNorm | None = None
    moments: Moments | None = None
    residual: Tensor | None = None
    shortcut: nn.Conv2d | None = None
    resample: Downsample | Upsample | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the result."""
        height, width, _ = self.source.shape
        if isinstance(self.resample, Upsample):
            height, width = 2 * height, 2 * width
        elif isinstance(self.resample, Downsample):
            height, width = height // 2, width // 2
        return height, width, self.conv.out_channels

    def num_bytes(self, rows: int) -> int:
        """What the tensors of a band of the result take on the device, at most at one time."""
        width, channels = self.source.shape[1], self.conv.out_channels
        size = self.source.element_size()
        inner = rows
        if isinstance(self.resample, Upsample):
            inner = rows // 2 + 2
        elif isinstance(self.resample, Downsample):
            inner = 2 * rows + 1
        given = (inner + 2) * width * self.source.shape[2] * size
        convolved = (inner + 2) * width * channels * size
        result = rows * self.shape[1] * channels * size
        deviations = result * max(size, 4) // size  # of `GroupMoments`
        steps = [2 * given, given + convolved, max(result, convolved) + deviations]
        if self.residual is not None:
            added = inner * width * self.residual.shape[2] * size
            steps.append(2 * convolved + added if self.shortcut is not None else convolved + added)
        if isinstance(self.resample, Upsample):
            steps += [5 * convolved, 4 * convolved + result]
        elif isinstance(self.resample, Downsample):
            steps += [2 * convolved + inner * channels * size, convolved + result]
        return max(steps)

    def band(self, first: int, last: int) -> Tensor:
        """Compute rows `first` to `last` of the result, (N, W, C), on the weights' device."""
        height = self.source.shape[0]
        start, stop = self._inner(first, last)
        x = _convolve(
            self._given(max(start - 1, 0), min(stop + 1, height)),
            self.conv,
            above=start == 0,
            below=stop == height,
        )
        if self.residual is not None:
            residual = _fetch(self.residual, start, stop, self.conv.weight.device)
            x.add_(residual if self.shortcut is None else self.shortcut(residual))
            del residual
        if isinstance(self.resample, Upsample):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = x[:, :, max(first - 1, 0) - 2 * start : min(last + 1, 2 * height) - 2 * start]
            x = _convolve(
                x,
                self.resample.conv,
                above=first == 0,
                below=last == 2 * height,
            )
        elif isinstance(self.resample, Downsample):
            x = F.pad(x, (0, 1, 0, 2 * last + 1 - stop))
            x = self.resample.conv(x)
        return x[0].permute(1, 2, 0)

    def _inner(self, first: int, last: int) -> tuple[int, int]:
        """Rows before `resample` that rows `first` to `last` behind it are made of."""
        height = self.source.shape[0]
        if isinstance(self.resample, Upsample):
            return max(first - 1, 0) // 2, (min(last + 1, 2 * height) + 1) // 2
        if isinstance(self.resample, Downsample):
            return 2 * first, min(2 * last + 1, height)
        return first, last

    def _given(self, start: int, stop: int) -> Tensor:
        x = _fetch(self.source, start, stop, self.conv.weight.device)
        if self.norm is None:
            return x
        assert self.moments is not None
        return F.silu(self.moments.normalise(x, self.norm), inplace=True)


def _fetch(rows: Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    """Bring rows to the device as (1, C, N, W): a view of the store if that is where it lies."""
    return rows[start:stop].to(device).permute(2, 0, 1)[None]


def _convolve(x: Tensor, conv: nn.Conv2d, *, above: bool, below: bool) -> Tensor:
    """Convolve a band: zeros left and right, and above and below only at the image's own border.

    Elsewhere the band brings the row that is needed, and so has two more than the result.
    """
    if not (above or below):
        return F.conv2d(x, conv.weight, conv.bias, padding=(0, 1))
    # Padded on both sides, and the side that needed none cut off: one row computed for nothing,
    # instead of a copy of the band.
    x = F.conv2d(x, conv.weight, conv.bias, padding=1)
    return x[:, :, 0 if above else 1 : x.shape[2] - (0 if below else 1)]
