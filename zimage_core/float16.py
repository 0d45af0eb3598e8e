"""Float16 without overflow: activations that may leave its range are made smaller on their way.

Float16 ends at 65504. In Z-Image the product `silu(w1 x) * w3 x`, what `w2` makes of it, and the
output projection of attention pass that in some tokens, and the image turns black: reported for
V100, T4 and RTX 20 (https://github.com/Tongyi-MAI/Z-Image/issues/15). All three end in an RMSNorm,
which divides by the length of what it is given. So `w3` and that projection are given inputs 2^-k
times as large, and the norm's eps is made 4^-k times as large: the norm then gives the same
numbers, bit for bit, as long as nothing on the way falls below 2^-14, where float16 has fewer bits.
What is lost there is at most 2^(k - 25) of a value: beside values of 1, a 128th of float16's
rounding for k = 7. Of the norm's input it matters at most 1.2e-3 of the norm's unit, less than a
rounding to bfloat16, since eps keeps the norm from dividing by less than sqrt(1e-5).

Activations are scaled and not weights: a weight of 0.02 divided by 128 would itself be too small.
All is done by hooks and by `eps`, so that no forward knows of it and no key or value of a state
dict changes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.autoencoder import AutoencoderKL
from zimage_core.layers import CaptionBlock, ModulatedBlock
from zimage_core.qwen3 import DecoderLayer

# Both as published: https://github.com/leejet/stable-diffusion.cpp/pull/1034
FEED_FORWARD_SCALE = 2.0**-7
ATTENTION_SCALE = 2.0**-4
TEXT_MLP_SCALE = 2.0**-5
"""No value is published for Qwen3: room for products of two million, at a 32nd of the precision
below 2^-9."""


def weights_dtype(model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a model is loaded where `dtype` is asked for.

    It is `dtype`, but for an autoencoder whose configuration says `force_upcast`, as that of FLUX.1
    does: its decoder overflows in float16 (https://github.com/invoke-ai/InvokeAI/pull/7213), and
    there is no norm behind its residual stream. It is then float32.
    """
    upcast = isinstance(model, AutoencoderKL) and model.config.force_upcast
    return torch.float32 if upcast and dtype == torch.float16 else dtype


def keep_in_range(model: nn.Module) -> None:
    """Scale down what overflows in a transformer or a text encoder, once after loading it.

    Of the text encoder only the products in its MLPs are protected: its stream has no norm behind
    it, so that `down_proj` gives the true numbers again. Another model is left as it is.

    Args:
        model: in float16. In another dtype the numbers would stay the same too, for nothing.
    """
    for module in model.modules():
        if isinstance(module, CaptionBlock | ModulatedBlock):
            _scale_input(module.feed_forward.w3, FEED_FORWARD_SCALE)
            _scale_eps(module.ffn_norm2, FEED_FORWARD_SCALE)
            _scale_input(module.attention.to_out[0], ATTENTION_SCALE)
            _scale_eps(module.attention_norm2, ATTENTION_SCALE)
        elif isinstance(module, DecoderLayer):
            _scale_input(module.mlp.up_proj, TEXT_MLP_SCALE)
            _scale_output(module.mlp.down_proj, 1 / TEXT_MLP_SCALE)


def _scale_output(module: nn.Module, scale: float) -> None:
    module.register_forward_hook(partial(_scaled_output, scale))


def _scale_input(module: nn.Module, scale: float) -> None:
    module.register_forward_pre_hook(partial(_scaled_input, scale))


def _scale_eps(norm: nn.RMSNorm, scale: float) -> None:
    assert norm.eps is not None
    norm.eps *= scale**2


def _scaled_output(scale: float, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * scale


def _scaled_input(scale: float, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] * scale,)
