"""Training on a few cores: each thread computes a part of the batch, with one core to itself.

Operators on small tensors hardly gain from several cores, and lose badly where other processes use
some of them, since every operator waits for the slowest core. Here the cores meet once a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


class Threads:
    """A fixed number of threads, each of which runs torch's operators on one core.

    The parts of a batch and the order of sums depend on the number of threads: so do last bits.

    Args:
        count: number of threads.
    """

    def __init__(self, count: int) -> None:
        torch.set_num_threads(1)
        self.count = count
        self._pool = ThreadPoolExecutor(count)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Results in the order of the items; the first error is raised."""
        return list(self._pool.map(function, items))

    def slices(self, size: int) -> list[slice]:
        """Cut `size` items into a slice for each thread, of about the same length."""
        bounds = [size * i // self.count for i in range(self.count + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(bounds) if b > a]

    def gradients(
        self,
        loss: Callable[[slice, int], Tensor],
        size: int,
        parameters: Sequence[Tensor],
    ) -> float:
        """Compute the gradient of the mean loss over a batch and leave it in `.grad`.

        Args:
            loss: for a slice of the batch and the number of its thread, the mean loss of the slice.
            size: items of the batch.
            parameters: what to differentiate by; those that a loss does not reach get None.

        Returns:
            The mean loss.
        """
        parts = self.slices(size)

        def differentiate(i: int) -> tuple[float, tuple[Tensor | None, ...]]:
            with torch.enable_grad():
                value = loss(parts[i], i) * ((parts[i].stop - parts[i].start) / size)
                found = torch.autograd.grad(value, list(parameters), allow_unused=True)
            return value.item(), found

        results = self.map(differentiate, range(len(parts)))
        for parameter, *gradients in zip(parameters, *(grads for _, grads in results), strict=True):
            present = [gradient for gradient in gradients if gradient is not None]
            parameter.grad = sum(present[1:], start=present[0]) if present else None
        return sum(value for value, _ in results)
