"""A model in float32 for a while: for an image whose numbers left the range of 16 bits.

The 16-bit weights stay where they are and beside them a copy in float32 is used, so that what is
restored afterwards is the very same memory. That takes four bytes for each parameter: 23 GiB for
the published transformer, 0.3 GiB for its autoencoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from zimage_core.compilation import uncompiled
from zimage_core.fused_weights import separate
from zimage_core.layers import Attention
from zimage_core.offload import is_streamed, use
from zimage_core.transformer import ZImageTransformer2DModel

_SMALLER = (torch.bfloat16, torch.float16)


class UpcastError(RuntimeError):
    """A model cannot be run in float32 beside its own weights; the message says why."""


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32 while the context lasts.

    A transformer's blocks are not compiled meanwhile, and its attention is `native`, since the
    other backends know 16 bits only. No other model that shares the device by offloading may be
    used within the context.

    Raises:
        UpcastError: weights are in 8 bits, or are streamed block by block.
        torch.OutOfMemoryError: there is no room for the copy; the model is as it was.
    """
    if is_streamed(model):
        raise UpcastError("with offload 'block' there is no whole copy of the weights to change")
    use(model)
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    if any(type(tensor.data) is not Tensor for tensor in tensors):
        raise UpcastError("weights in 8 bits have no float32 form")
    own = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in _SMALLER]
    with ExitStack() as stack:
        if isinstance(model, ZImageTransformer2DModel):
            stack.enter_context(uncompiled(model))
            stack.enter_context(_native_attention(model))
        stack.enter_context(separate(model))
        try:
            for tensor, data in own:
                tensor.data = data.float()
            yield
        finally:
            for tensor, data in own:
                tensor.data = data


@contextmanager
def _native_attention(transformer: ZImageTransformer2DModel) -> Iterator[None]:
    modules = [module for module in transformer.modules() if isinstance(module, Attention)]
    names = [module.backend for module in modules]
    try:
        for module in modules:
            module.backend = "native"
        yield
    finally:
        for module, name in zip(modules, names, strict=True):
            module.backend = name
