"""Linear layers that read the same input, as one product: queries, keys and values; SwiGLU's two.

Their weights become rows of one tensor, and stay what they are to everybody else: parameters under
the keys of the checkpoint, which adapters write into and `state_dict` lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The attribute by which a module knows its joined layers: it hides the method of that name.
_METHOD = "project"


class FusedRows:
    """Some linear layers as one. Their parameters are moved into the memory that they share.

    Args:
        layers: without bias, of one input width, dtype and device.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        self.sizes = [layer.out_features for layer in layers]
        self.weight = torch.cat([layer.weight.data for layer in layers])
        self.distribute()

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each layer makes of `x` (..., in): a view (..., out) each."""
        return torch.split(F.linear(x, self.weight), self.sizes, dim=-1)

    def distribute(self) -> None:
        """Let the layers' parameters be rows of `weight`, after it has changed its place."""
        for layer, rows in zip(self.layers, torch.split(self.weight, self.sizes), strict=True):
            layer.weight.data = rows


class Fusable(nn.Module):
    """A module with linear layers on one input, which `fuse` may join."""

    def fusable(self) -> Sequence[nn.Module]:
        """The layers, in the order in which `project` returns their results."""
        raise NotImplementedError

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each of the layers makes of `x`."""
        return tuple(layer(x) for layer in self.fusable())

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if fused_rows(self):  # every parameter has now memory of its own
            fuse(self)
        return module


def fuse(model: nn.Module) -> None:
    """Join what can be joined in a model. Not layers with a bias, with hooks or in 8 bits.

    Needs memory for one more copy of the largest of them.
    """
    for module in model.modules():
        if isinstance(module, Fusable):
            layers = [layer for layer in module.fusable() if isinstance(layer, nn.Linear)]
            if all(_is_plain(layer) for layer in layers) and len(layers) == len(module.fusable()):
                setattr(module, _METHOD, FusedRows(layers))


def fused_rows(model: nn.Module) -> list[FusedRows]:
    """What `fuse` joined in a model."""
    rows = (module.__dict__.get(_METHOD) for module in model.modules())
    return [found for found in rows if isinstance(found, FusedRows)]


@contextmanager
def separate(model: nn.Module) -> Iterator[None]:
    """Let each layer of a model compute by itself while the context lasts.

    Their parameters may be exchanged meanwhile, but must be the old ones again at the end.
    """
    taken = [(module, module.__dict__.pop(_METHOD, None)) for module in model.modules()]
    try:
        yield
    finally:
        for module, rows in taken:
            if rows is not None:
                setattr(module, _METHOD, rows)


def _is_plain(layer: nn.Linear) -> bool:
    hooks = {**layer._forward_pre_hooks, **layer._forward_hooks}
    has_bias = layer._parameters.get("bias") is not None
    return not hooks and not has_bias and type(layer.weight.data) is Tensor
