"""Muon for matrices and AdamW for the rest, all in float32.

Muon (Jordan, 2024): the momentum of a matrix is replaced by the nearest orthogonal matrix, found by
a few Newton-Schulz steps. `torch.optim.Muon` takes these in bfloat16, which many CPUs lack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zimage_core.tiny.parallel import Threads

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


class MuonAdamW:
    """The optimizer of all stages.

    Args:
        matrices: weights of linear layers and convolutions, for Muon; a convolution's weight counts
            as a matrix of its outputs.
        others: all other parameters, for AdamW.
        threads: where the Newton-Schulz steps run.
        matrix_lr: learning rate of Muon, before a factor of 0.2 sqrt(larger side), which makes
            updates as large as AdamW's.
        lr: learning rate of AdamW.
        momentum: of Muon, with Nesterov's lookahead.
        betas: of AdamW.
        weight_decay: of Muon, times the learning rate.
        clip: largest norm of the gradient over all parameters.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        threads: Threads,
        *,
        matrix_lr: float,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
        clip: float = 2.0,
    ) -> None:
        self.matrices, self.others = list(matrices), list(others)
        self.threads = threads
        self.matrix_lr, self.lr = matrix_lr, lr
        self.momentum, self.betas = momentum, betas
        self.weight_decay, self.clip = weight_decay, clip
        self._buffers = [torch.zeros_like(p) for p in self.matrices]
        self._means = [torch.zeros_like(p) for p in self.others]
        self._squares = [torch.zeros_like(p) for p in self.others]
        self._steps = 0

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters, matrices first."""
        return [*self.matrices, *self.others]

    @torch.no_grad()
    def step(self, factor: float) -> float:
        """Take a step with all learning rates times `factor`; return the gradient's norm."""
        self._steps += 1
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm} in step {self._steps}")
        if norm > self.clip:
            torch._foreach_mul_(gradients, self.clip / norm)
        # Large and small matrices in turn, so that the threads have about the same work.
        self.threads.map(lambda i: self._matrix_step(i, factor), range(len(self.matrices)))
        for i in range(len(self.others)):
            self._other_step(i, factor)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """What a resumed optimizer needs."""
        return {
            "steps": self._steps,
            "buffers": self._buffers,
            "means": self._means,
            "squares": self._squares,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of the same parameters."""
        self._steps = state["steps"]
        self._buffers = state["buffers"]
        self._means, self._squares = state["means"], state["squares"]

    def _matrix_step(self, i: int, factor: float) -> None:
        parameter, buffer = self.matrices[i], self._buffers[i]
        if parameter.grad is None:
            return
        with torch.no_grad():  # a thread has a mode of its own
            buffer.mul_(self.momentum).add_(parameter.grad)
            ahead = parameter.grad.add(buffer, alpha=self.momentum)
            update = orthogonalize(ahead.flatten(1)).view_as(parameter)
            lr = self.matrix_lr * factor
            parameter.mul_(1 - lr * self.weight_decay)
            parameter.add_(update, alpha=-lr * 0.2 * math.sqrt(max(update.flatten(1).shape)))

    def _other_step(self, i: int, factor: float) -> None:
        parameter = self.others[i]
        if parameter.grad is None:
            return
        first, second = self.betas
        mean, square = self._means[i], self._squares[i]
        mean.lerp_(parameter.grad, 1 - first)
        square.mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
        root = (square / (1 - second**self._steps)).sqrt_().add_(1e-8)
        parameter.addcdiv_(mean, root, value=-self.lr * factor / (1 - first**self._steps))


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring a matrix's singular values near 1 by Newton-Schulz steps, (rows, columns) float32."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


class MovingAverage:
    """Exponential moving average of parameters, with a warm-up.

    Args:
        parameters: averaged in place over the steps, by name.
        decay: of the average; less in the first steps.
    """

    def __init__(self, parameters: dict[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._parameters = parameters
        self.values = {name: tensor.detach().clone() for name, tensor in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(
            list(self.values.values()), [p.detach() for p in self._parameters.values()], 1 - decay
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed average needs."""
        return {"steps": self.steps, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of the same parameters."""
        self.steps = state["steps"]
        self.values = {name: state["values"][name] for name in self.values}
