"""Weights in 8 bits: half of the memory of bfloat16, by torchao, for what bears it.

A weight is rounded to whole numbers from -128 to 127 times a scale for each row (output channel),
the largest of the row over 127.5; products are made in the dtype of the activations and multiplied
by the scales. In float16 such a product, of whole numbers, would pass 65504: there a row has a
scale for every 128 columns or fewer, and weights are multiplied out before each product.

Quantised are the linear layers of the transformer's main blocks and of the text encoder's, which
are seven eighths of all weights. Kept as they are: the embedders of time, captions and patches, the
final layer, modulation, the refiners, norms, pad tokens, the embedding of text, and the
autoencoder. Few weights, and what others found to be sensitive: docs/quantization.md has sources
and measurements.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

QUANTIZATIONS = ("none", "int8")
INSTALL = "pip install 'zimage-batch[int8]'"
_MINIMUM = "0.18"
_GROUP = 128
_QUANTIZED = {
    "transformer": r"layers\.\d+\.(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])\.weight",
    "text_encoder": r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight",
}
# Both complain on import: of kernels that are not used here, and of each other.
_CHATTY = ("torchao", "torch.utils._pytree")


class QuantizationError(ValueError):
    """Weights cannot be quantised here; the message says what to do."""


def check_quantization(quantization: str, device: torch.device) -> None:
    """See that weights can be quantised so on a device.

    Raises:
        ValueError: `quantization` is none that exists.
        QuantizationError: the device is MPS, or torchao is missing, too old, or not to be imported.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization is {quantization!r}; allowed: {', '.join(QUANTIZATIONS)}")
    if quantization == "none":
        return
    if device.type == "mps":
        raise QuantizationError("'int8' is not possible on MPS; allowed there: 'none'")
    _config(torch.bfloat16, _GROUP)


def is_quantized(model: str, key: str) -> bool:
    """Whether a weight is one that quantisation takes.

    Args:
        model: "transformer", "text_encoder" or "vae".
        key: of its state dict.
    """
    return model in _QUANTIZED and re.fullmatch(_QUANTIZED[model], key) is not None


@torch.no_grad()
def to_int8(weight: Tensor) -> Tensor:
    """Quantise the weight (out, in) of a linear layer; the dtype of products is that of `weight`.

    Raises:
        QuantizationError: see `check_quantization`.
    """
    config = _config(weight.dtype, weight.shape[1])
    from torchao.quantization import quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(layer, config)
    return layer.weight.data


def int8_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of a quantised weight (out, in): a byte each, and five for each scale."""
    rows, columns = shape
    groups = columns // _group_size(columns) if dtype == torch.float16 else 1
    return rows * columns + 5 * rows * groups


def plain_tensors(weight: Tensor) -> list[Tensor]:
    """The tensors that a quantised weight is made of; a plain one is its own only part."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in plain_tensors(getattr(weight, name))]


def weight_bytes(module: nn.Module) -> int:
    """Bytes that a module's parameters take; torch's own `nbytes` takes 8 bits for more."""
    return sum(part.nbytes for weight in module.parameters() for part in plain_tensors(weight))


def _group_size(columns: int) -> int:
    """The largest part of a row, up to 128 columns, that divides it into several."""
    return max(n for n in range(1, min(_GROUP, columns - 1) + 1) if columns % n == 0)


def _config(dtype: torch.dtype, columns: int) -> Any:
    """How torchao shall quantise a weight with so many columns."""
    try:
        with _quiet():
            from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow
        rows = PerGroup(_group_size(columns)) if dtype == torch.float16 else PerRow()
        # torchao would also set global switches of torch, among them TF32.
        return Int8WeightOnlyConfig(granularity=rows, set_inductor_config=False)
    except Exception as error:  # whatever an extension raises that was built for another torch
        try:
            found = f"is {version('torchao')}"
        except PackageNotFoundError:
            raise QuantizationError(f"'int8' needs torchao, which is missing: {INSTALL}") from None
        raise QuantizationError(
            f"'int8' needs torchao {_MINIMUM} or newer, and one that works with torch "
            f"{torch.__version__}; here it {found}: {type(error).__name__}: {error}; {INSTALL}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
