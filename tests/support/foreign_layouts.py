"""Checkpoints rewritten as other programs lay them out, from a known folder.

Written from the layouts' descriptions and not from the code under test, so that a mistake in a map
shows.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"


def transformer_state(folder: Path) -> State:
    return load_file(folder / TRANSFORMER)


def vae_state(folder: Path) -> State:
    return load_file(folder / VAE)


def text_state(folder: Path) -> State:
    """Keys as in the causal model, `model.layers...`."""
    return load_file(folder / TEXT_ENCODER)


def save(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    contiguous = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(contiguous, path, metadata=metadata)
    return path


def prefixed(state: Mapping[str, Tensor], prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def comfy_transformer(state: Mapping[str, Tensor]) -> State:
    """Fused queries, keys and values; shorter names for the embedder and the last layer."""
    out: State = {}
    for key, tensor in state.items():
        if key.endswith("attention.to_q.weight"):
            block = key.removesuffix("to_q.weight")
            parts = [state[f"{block}to_{letter}.weight"] for letter in "qkv"]
            out[f"{block}qkv.weight"] = torch.cat(parts)
        elif key.endswith(("attention.to_k.weight", "attention.to_v.weight")):
            continue
        elif key.endswith("attention.to_out.0.weight"):
            out[key.removesuffix("to_out.0.weight") + "out.weight"] = tensor
        elif key.endswith("attention.norm_q.weight"):
            out[key.removesuffix("norm_q.weight") + "q_norm.weight"] = tensor
        elif key.endswith("attention.norm_k.weight"):
            out[key.removesuffix("norm_k.weight") + "k_norm.weight"] = tensor
        elif key.startswith("all_x_embedder.2-1."):
            out["x_embedder." + key.removeprefix("all_x_embedder.2-1.")] = tensor
        elif key.startswith("all_final_layer.2-1."):
            out["final_layer." + key.removeprefix("all_final_layer.2-1.")] = tensor
        else:
            out[key] = tensor
    return out


def ldm_autoencoder(state: Mapping[str, Tensor], stages: int = 4, layers: int = 1) -> State:
    """FLUX.1's `ae.safetensors`: mid, down and up blocks by other names, up blocks from the end."""
    names = {}
    for half, blocks, count in (("encoder", "down", layers), ("decoder", "up", layers + 1)):
        names |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        resnets = {f"mid_block.resnets.{i}": f"mid.block_{i + 1}" for i in (0, 1)}
        for i in range(stages):
            stage = i if half == "encoder" else stages - 1 - i
            for j in range(count):
                resnets[f"{blocks}_blocks.{i}.resnets.{j}"] = f"{blocks}.{stage}.block.{j}"
            sampler = "downsample" if half == "encoder" else "upsample"
            names[f"{half}.{blocks}_blocks.{i}.{sampler}rs.0.conv"] = (
                f"{half}.{blocks}.{stage}.{sampler}.conv"
            )
        for ours, theirs in resnets.items():
            for layer in ("norm1", "conv1", "norm2", "conv2"):
                names[f"{half}.{ours}.{layer}"] = f"{half}.{theirs}.{layer}"
            names[f"{half}.{ours}.conv_shortcut"] = f"{half}.{theirs}.nin_shortcut"
        attention = f"{half}.mid_block.attentions.0"
        for ours, theirs in (("group_norm", "norm"), ("to_out.0", "proj_out")):
            names[f"{attention}.{ours}"] = f"{half}.mid.attn_1.{theirs}"
        for letter in "qkv":
            names[f"{attention}.to_{letter}"] = f"{half}.mid.attn_1.{letter}"
    out: State = {}
    for key, tensor in state.items():
        module, kind = key.rsplit(".", 1)
        pointwise = ".attentions." in key and kind == "weight" and tensor.ndim == 2
        out[f"{names[module]}.{kind}"] = tensor[:, :, None, None] if pointwise else tensor
    return out


def llama_cpp(state: Mapping[str, Tensor]) -> State:
    """Qwen3 as `convert_hf_to_gguf` of llama.cpp names it, by gguf's own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 64)
    out = {}
    for key, tensor in state.items():
        name = table.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        out[name] = tensor
    return out


Quantise = Callable[[str, Tensor], gguf.GGMLQuantizationType]


def write_gguf(
    path: Path,
    state: Mapping[str, Tensor],
    quantise: Quantise,
    *,
    arch: str | None = "lumina2",
    original_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, np.ndarray]:
    """Write a GGUF file with gguf's own writer and quantiser.

    Args:
        quantise: type of a tensor by its name; a type that gguf cannot make gets random blocks.
        arch: None leaves `general.architecture` out, as stable-diffusion.cpp does.
        original_shapes: of tensors that are stored in another shape.

    Returns:
        What gguf's own dequantiser makes of each tensor, float32.
    """
    writer = gguf.GGUFWriter(path, arch or "")  # which leaves an empty text out
    for name, shape in (original_shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    values = {}
    for name, tensor in state.items():
        kind = quantise(name, tensor)
        data = tensor.float().numpy()
        try:
            raw = gguf.quantize(data, kind)
        except NotImplementedError:
            raw = random_blocks(data.shape, kind)
        values[name] = gguf.dequantize(raw, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def random_blocks(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Blocks of any bits with scales that are small and finite."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(shape[-1]).integers(
        0, 256, (*shape[:-1], shape[-1] // elements, size), np.uint8
    )
    scales = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,)}
    for at in scales.get(kind.name, (0,)):
        rows[..., at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return rows.reshape(*shape[:-1], -1)


def scaled_fp8(
    state: Mapping[str, Tensor],
    *,
    old: bool,
    rowwise: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
    marker: str = "tensors",
    skip: tuple[str, ...] = ("embedder", "final_layer", "embed_tokens"),
) -> tuple[State, dict[str, str], State]:
    """Quantise two-dimensional weights to float8 with scales, as ComfyUI's files have them.

    Args:
        old: `scaled_fp8` and `.scale_weight`, else `.weight_scale`.
        marker: how new files say so: "tensors" (`.comfy_quant`), "metadata" or "none".

    Returns:
        Tensors, metadata, and what the weights come to in float32.
    """
    out, layers, values = {}, {}, {}
    name = "float8_e5m2" if dtype == torch.float8_e5m2 else "float8_e4m3fn"
    for key, tensor in state.items():
        weight = tensor.float()
        if not key.endswith(".weight") or tensor.ndim != 2 or any(part in key for part in skip):
            out[key], values[key] = tensor, weight
            continue
        largest = weight.abs().amax(1) if rowwise else weight.abs().max()
        scale = largest / torch.finfo(dtype).max
        rows = scale[:, None] if rowwise else scale
        out[key] = (weight / rows).to(dtype)
        values[key] = out[key].float() * rows
        layer = key.removesuffix(".weight")
        out[f"{layer}.scale_weight" if old else f"{layer}.weight_scale"] = scale
        layers[layer] = {"format": name}
        if old:
            out[f"{layer}.scale_input"] = torch.tensor(0.5)
        elif marker == "tensors":
            text = json.dumps(layers[layer]).encode()
            out[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    metadata = {}
    if old:
        out["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    elif marker == "metadata":
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    return out, metadata, values
