"""What a model time does to the transformer's blocks: vectors, and a table of them for a schedule.

They depend on the time and the weights alone, neither on the image nor on its prompt. So those of a
schedule are computed once and serve every image of a job.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zimage_core.transfer import to_device


class Modulation(NamedTuple):
    """One block at one time: what its norms multiply by, (B or 1, 1, C) each.

    The weights of the norms are multiplied in, which saves the blocks a pass over all tokens.
    """

    attention_in: Tensor
    """Weight of the norm in front of attention times (1 + scale)."""
    attention_out: Tensor
    """Weight of the norm behind attention times tanh(gate)."""
    ffn_in: Tensor
    ffn_out: Tensor


class StepModulation(NamedTuple):
    """The whole transformer at one time."""

    refiner: Iterable[Modulation]
    layers: Iterable[Modulation]
    final: Tensor
    """Scale of the final layer, (B or 1, 1, C)."""


class MixedModulation(Iterable[Modulation]):
    """Blocks whose tokens are of two times, such as a noisy image and clean pictures beside it.

    What a block needs is made when it is its turn: for all blocks at once it would be gigabytes.

    Args:
        noisy: blocks at the time of the image.
        clean: the same blocks at the time of what has no noise.
        is_noisy: which of the two each token has, (B or 1, S, 1) bool.
    """

    def __init__(
        self, noisy: Iterable[Modulation], clean: Iterable[Modulation], is_noisy: Tensor
    ) -> None:
        self._noisy, self._clean, self._is_noisy = noisy, clean, is_noisy

    def __iter__(self) -> Iterator[Modulation]:
        for noisy, clean in zip(self._noisy, self._clean, strict=True):
            pairs = zip(noisy, clean, strict=True)
            yield Modulation(*(torch.where(self._is_noisy, n, c) for n, c in pairs))


class ModulationTable:
    """Remembers the modulations of the last schedule.

    They are forgotten when a weight that they depend on is written to, as adapters do, or is
    another one. That a weight is moved to another device and back, as by offloading, is no change.

    Args:
        weights: what they depend on.
    """

    def __init__(self, weights: Callable[[], Sequence[nn.Parameter]]) -> None:
        self._weights = weights
        self._key: tuple[object, ...] | None = None
        self._of: list[weakref.ref[nn.Parameter]] = []
        self._rows: list[StepModulation] = []

    def get(
        self, times: Tensor, device: torch.device, compute: Callable[[Tensor], StepModulation]
    ) -> list[StepModulation]:
        """The modulation of each time.

        Args:
            times: (n,) float32 on the CPU.
            device: where they are needed.
            compute: from one time, (1,) float32 on that device.
        """
        weights = self._weights()
        written = tuple((weight._version, weight.dtype) for weight in weights)
        key = (tuple(times.tolist()), device, written)
        same = len(weights) == len(self._of) and all(
            known() is weight for known, weight in zip(self._of, weights, strict=True)
        )
        if key != self._key or not same:
            self.clear()
            self._rows = [compute(time) for time in torch.split(to_device(times, device), 1)]
            self._key, self._of = key, [weakref.ref(weight) for weight in weights]
        return self._rows

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._weights,)  # a copy of the model has other weights

    def clear(self) -> None:
        """Forget everything."""
        self._key, self._rows = None, []
