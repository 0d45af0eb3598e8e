"""What a weight file is, told from its names: formats that are refused, models that differ."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from zimage_core.config import CheckpointError

# Tensors that only these formats have. Their numbers need code that is not here.
_UNSUPPORTED = (
    ("nvfp4", re.compile(r"\.weight_scale_2$")),
    ("a smoothed quantisation (pre_quant_scale)", re.compile(r"\.pre_quant_scale$")),
    ("nunchaku (SVDQuant)", re.compile(r"\.(wscales|wtscale|smooth_factor(_orig)?)$")),
    ("bitsandbytes", re.compile(r"\.(quant_state\.bitsandbytes__.+|(nested_)?absmax|SCB)$")),
    ("GPTQ or AWQ", re.compile(r"\.(qweight|qzeros|g_idx)$")),
    ("SDNQ", re.compile(r"\.(zero_point|svd_up|svd_down)$")),
    ("optimum-quanto", re.compile(r"\.weight\._(data|scale|shift)$")),
    ("MLX", re.compile(r"\.biases$")),
)
# What else a file may hold, and where it belongs.
_OTHERS = (
    (
        "a LoRA adapter, which belongs under loras",
        re.compile(r"\.lora_|lora_(unet|te)|\.(lokr|hada)_"),
    ),
    ("a ControlNet", re.compile(r"(^|\.)control_(layers|all_x_embedder|noise_refiner)\.")),
    ("a transformer of Z-Image", re.compile(r"(^|\.)cap_embedder\.1\.weight$")),
    ("a transformer of FLUX", re.compile(r"(^|\.)(double|single)_blocks\.0\.")),
    ("an autoencoder", re.compile(r"(^|\.)decoder\.conv_in\.weight$")),
    ("a language model", re.compile(r"(^|\.)(embed_tokens|token_embd)\.weight$")),
    ("a UNet of Stable Diffusion", re.compile(r"(^|\.)(input_blocks|down_blocks)\.1\.")),
)


def refuse_unsupported(file: Path, names: Iterable[str]) -> None:
    """Refuse a file whose tensors give away a quantisation that is not supported.

    Raises:
        CheckpointError: naming the format and the tensor.
    """
    found = list(names)
    for format_name, pattern in _UNSUPPORTED:
        for name in found:
            if pattern.search(name):
                raise CheckpointError(
                    f"{file}: is quantised with {format_name}, which is not supported: it holds "
                    f"tensor {name!r}"
                )


def describe(names: Iterable[str]) -> str:
    """Say what models a file seems to hold, "an autoencoder", or "nothing known"."""
    found = list(names)
    words = [what for what, pattern in _OTHERS if any(map(pattern.search, found))]
    return " and ".join(words) or "nothing known"
