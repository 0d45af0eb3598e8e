"""From a checkpoint to models in memory.

Models are made empty on the meta device; their tensors are read from memory-mapped files, piece by
piece and a few files at once, cast, and put in place. So memory never holds a second copy of the
weights, and nothing is initialised that is then overwritten. Whether the checkpoint is right is
found out before, by `checkpoint`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.attention import choose_backend
from zimage_core.checkpoint import Part, checkpoint_files, open_checkpoint
from zimage_core.compilation import check_compile, compile_blocks
from zimage_core.component import Component
from zimage_core.config import CheckpointError, TransformerConfig
from zimage_core.float16 import keep_in_range, weights_dtype
from zimage_core.fused_weights import fuse
from zimage_core.offload import OFFLOAD_MODES, place, use
from zimage_core.quantization import check_quantization, is_quantized, to_int8
from zimage_core.stored_tensor import Weight, WeightReader
from zimage_core.text_encoder import check_edit_tokens, load_tokenizer
from zimage_core.tiling import enable_tiling
from zimage_core.vision import VisionProcessor
from zimage_core.weight_reading import MAX_READERS, read_weights

__all__ = ["CheckpointSummary", "check_checkpoint", "checkpoint_files", "load_from_local_dir"]

_log = logging.getLogger(__name__)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class CheckpointSummary:
    """What a checkpoint holds, from its headers.

    Attributes:
        num_parameters: elements that loading puts in memory, for `transformer`, `vae`,
            `text_encoder` and, where there is one, `siglip`; times the bytes of the dtype, that is
            the memory of the weights (the autoencoder's in float32 where the others are in
            float16).
        num_bytes: size on disk of `files`.
        files: every file that loading reads, sorted.
        transformer: architecture of the transformer.
        notes: what a user should know, a sentence each: tensors that are left out, a configuration
            that is the published one for want of another.
    """

    num_parameters: Mapping[str, int]
    num_bytes: int
    files: tuple[Path, ...]
    transformer: TransformerConfig
    notes: tuple[str, ...] = ()


def check_checkpoint(
    model_dir: Path | str,
    *,
    transformer: Part = None,
    vae: Part = None,
    text_encoder: Part = None,
) -> CheckpointSummary:
    """Check all that loading checks, without reading weights or importing transformers.

    Args:
        model_dir: as for `load_from_local_dir`, like all the others.
        transformer: see `model_dir`.
        vae: see `model_dir`.
        text_encoder: see `model_dir`.

    Raises:
        CheckpointError: see `load_from_local_dir`; all problems at once, one a line.
    """
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    checkpoint = open_checkpoint(model_dir, **parts)
    files = tuple(checkpoint_files(model_dir, **parts))
    return CheckpointSummary(
        num_parameters={
            name: component.num_parameters for name, component in checkpoint.components.items()
        },
        num_bytes=sum(path.stat().st_size for path in files),
        files=files,
        transformer=checkpoint.transformer_config,
        notes=checkpoint.notes,
    )


def load_from_local_dir(
    model_dir: Path | str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    compile: bool = False,
    attention: str | None = None,
    offload: str = "none",
    quantization: str = "none",
    fuse_weights: bool | None = None,
    transformer: Part = None,
    vae: Part = None,
    text_encoder: Part = None,
) -> dict[str, Any]:
    """Load a checkpoint in diffusers' layout, ready for `generate(**components, prompt=...)`.

    Args:
        model_dir: folder with `model_index.json`. Weights are safetensors in float32, float16,
            bfloat16 or float8, in one file or in shards with an index.
        device: where the models go.
        dtype: bfloat16, float16 or float32, for all models; weights are cast to it. In
            float16 the autoencoder is loaded in float32, and the others scale what would overflow:
            see `float16`.
        compile: compile the main blocks of the transformer now, each by itself (one compilation
            serves all): see `zimage_core.compilation`.
        attention: backend of the transformer, or `auto` for the best one that can run (or the one
            named in `ZIMAGE_ATTENTION`); None leaves the choice to `set_attention_backend()` and
            `ZIMAGE_ATTENTION`.
        offload: "none", or how the models take turns on a device that is too small for all of
            them: "phase", "model" or "block", see `zimage_core.offload`. Images of more than 1024 x
            1024 pixels are then decoded in bands, see `zimage_core.tiling`.
        quantization: "none", or "int8" for 8-bit weights in the blocks of the transformer and the
            text encoder, made one by one while they are read: see `zimage_core.quantization`.
        fuse_weights: join the transformer's linear layers that read the same input (queries, keys
            and values; both halves of SwiGLU), see `zimage_core.fused_weights`. None is on CUDA
            only: elsewhere nothing is gained.
        transformer: a file or folder that replaces the folder's transformer, which then need not be
            there. A file is safetensors (diffusers' names or ComfyUI's, float8 with or without
            scales) or GGUF; its configuration is the folder's `transformer/config.json` or, where
            there is none, the published one if all shapes agree with it. See docs/checkpoints.md.
        vae: the same for the autoencoder (diffusers' names or those of FLUX.1's `ae.safetensors`).
        text_encoder: the same for the text encoder; the tokenizer is always the folder's.

    Returns:
        `transformer`, `vae`, `text_encoder` in evaluation mode without gradients, `tokenizer` of
        transformers, `scheduler`. Of a checkpoint that takes pictures (`siglip_feat_dim` in
        `transformer/config.json`) also `siglip`, a `vision.VisionEncoder`, and `siglip_processor`.

    Raises:
        CheckpointError: the folder is incomplete or its parts do not fit: each missing, unexpected
            or mis-shaped tensor is named with its file, and so is each truncated or corrupt file,
            pickle, unknown key.
        AttentionBackendError: the backend cannot run here; raised before weights are read.
        QuantizationError: nor can 8-bit weights: MPS, or no torchao that works.
        ValueError: `dtype`, `device`, `attention`, `offload` or `quantization` is none that exists,
            or `compile` with offload "block".
        CompileError: blocks cannot be compiled here: MPS, no compiler.
    """
    device = torch.device(device)
    _check_target(device, dtype, compile)
    check_quantization(quantization, device)
    if offload not in OFFLOAD_MODES:
        raise ValueError(f"offload is {offload!r}; allowed: {', '.join(OFFLOAD_MODES)}")
    if compile and offload == "block":
        raise ValueError(
            "compile is not possible with offload 'block', whose hooks change the weights between "
            "two blocks; allowed: compile=False, or offload 'none', 'phase' or 'model'"
        )
    checkpoint = open_checkpoint(
        model_dir, transformer=transformer, vae=vae, text_encoder=text_encoder
    )
    for note in checkpoint.notes:
        _log.warning(note)
    config = checkpoint.transformer_config
    backend = choose_backend(attention, device, dtype, config.dim // config.n_heads)

    tokenizer = load_tokenizer(Path(model_dir) / "tokenizer")
    vocab_size = checkpoint.text_encoder_config.vocab_size
    if len(tokenizer) > vocab_size:
        raise CheckpointError(
            f"{Path(model_dir) / 'tokenizer' / 'tokenizer.json'}: holds {len(tokenizer)} tokens, "
            f"but the text encoder's vocab_size is {vocab_size}"
        )
    vision: dict[str, Any] = {}
    if checkpoint.processor_config is not None:
        check_edit_tokens(tokenizer, Path(model_dir) / "tokenizer" / "tokenizer.json")
        vision["siglip_processor"] = VisionProcessor(checkpoint.processor_config)
    models = _fill(
        checkpoint.components,
        device if offload == "none" else torch.device("cpu"),
        dtype,
        quantize=quantization == "int8",
    )
    if dtype == torch.float16:
        for model in models.values():
            keep_in_range(model)
    loaded: Any = models["transformer"]
    if fuse_weights or (fuse_weights is None and device.type == "cuda"):
        fuse(loaded)
    place(models, device, offload)
    use(loaded)
    if offload != "none":
        autoencoder: Any = models["vae"]
        enable_tiling(autoencoder)
    if attention is not None:
        loaded.set_attention_backend(backend)
    if compile:
        compile_blocks(loaded, device)
    return {**models, **vision, "tokenizer": tokenizer, "scheduler": checkpoint.scheduler}


def _check_target(device: torch.device, dtype: torch.dtype, compile: bool) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; allowed: {', '.join(map(str, _DTYPES))}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but torch finds no CUDA GPU here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device is {str(device)!r}, but torch finds no MPS here")
    if compile:
        check_compile(device)


def _fill(
    components: Mapping[str, Component], device: torch.device, dtype: torch.dtype, *, quantize: bool
) -> dict[str, nn.Module]:
    """Make the modules of components and read their tensors into them, all files at once.

    Args:
        quantize: give 8 bits to the weights that quantisation takes.
    """
    device = torch.empty(0, device=device).device  # by number: "cuda" is each thread's current one
    modules = {name: component.make_module() for name, component in components.items()}
    dtypes = {name: weights_dtype(module, dtype) for name, module in modules.items()}

    def read(reader: WeightReader, place: tuple[str, str], weight: Weight) -> Tensor:
        name, key = place
        tensor = reader.read(weight, dtypes[name], device)
        return to_int8(tensor) if quantize and is_quantized(name, key) else tensor

    weights = {
        (name, key): weight
        for name, component in components.items()
        for key, weight in component.weights.items()
    }
    # torchao is one for all threads
    tensors = read_weights(weights, read, readers=1 if quantize else MAX_READERS)
    for name, module in modules.items():
        state = {key: tensors.pop((name, key)) for key in components[name].weights}
        module.load_state_dict(state, strict=True, assign=True)
        module.requires_grad_(False).eval()
    return modules
