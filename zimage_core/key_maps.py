"""Names that checkpoints in other layouts give to the tensors of a model.

A map goes from a key of the model's state dict to where a layout keeps it. The names here are
without the prefix that a file may put in front of all of them.

Layouts: diffusers (the model's own keys), ComfyUI's transformer (queries, keys and values fused in
one tensor), the autoencoder as latent-diffusion and FLUX.1 publish it, Qwen3 as llama.cpp names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple


class Place(NamedTuple):
    """Where a layout keeps a tensor.

    Attributes:
        name: of the stored tensor.
        part: which of the `parts` equal parts it is, along the first dimension.
        parts: into which the stored tensor is divided.
        pointwise: it may be stored as a 1x1 convolution, with two more dimensions of size 1.
    """

    name: str
    part: int = 0
    parts: int = 1
    pointwise: bool = False


Layout = Callable[[str], Place]


def diffusers(key: str) -> Place:
    """The model's own keys."""
    return Place(key)


_COMFY_TRANSFORMER = (
    (re.compile(r"all_(x_embedder|final_layer)\.\d+-\d+\."), r"\1."),
    (re.compile(r"\.attention\.to_out\.0\."), ".attention.out."),
    (re.compile(r"\.attention\.norm_([qk])\."), r".attention.\1_norm."),
)
_PROJECTION = re.compile(r"\.attention\.to_([qkv])\.")


def comfy_transformer(key: str) -> Place:
    """ComfyUI's single file (Comfy-Org/z_image_turbo), and GGUF files made from it."""
    projection = _PROJECTION.search(key)
    if projection is not None:
        return Place(_PROJECTION.sub(".attention.qkv.", key), "qkv".index(projection[1]), 3)
    for pattern, name in _COMFY_TRANSFORMER:
        key = pattern.sub(name, key)
    return Place(key)


_LDM_RESNETS = (
    (re.compile(r"\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\."), r".\1.\2.block.\3."),
    (re.compile(r"\.down_blocks\.(\d+)\.downsamplers\.0\."), r".down.\1.downsample."),
    (re.compile(r"\.up_blocks\.(\d+)\.upsamplers\.0\."), r".up.\1.upsample."),
    (re.compile(r"\.mid_block\.resnets\.0\."), ".mid.block_1."),
    (re.compile(r"\.mid_block\.resnets\.1\."), ".mid.block_2."),
    (re.compile(r"\.conv_shortcut\."), ".nin_shortcut."),
    (re.compile(r"\.conv_norm_out\."), ".norm_out."),
)
_LDM_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_ATTENTION = re.compile(r"\.mid_block\.attentions\.0\.(.+)\.(weight|bias)$")
_UP_BLOCK = re.compile(r"(?<=\.up_blocks\.)\d+")


def ldm_autoencoder(stages: int) -> Layout:
    """FLUX.1's `ae.safetensors`, with `stages` resolutions; its decoder counts them from the end.

    Its attention is made of 1x1 convolutions.
    """

    def place(key: str) -> Place:
        attention = _ATTENTION.search(key)
        if attention is not None:
            layer, kind = _LDM_ATTENTION[attention[1]], attention[2]
            name = f"{key[: attention.start()]}.mid.attn_1.{layer}.{kind}"
            return Place(name, pointwise=layer != "norm" and kind == "weight")
        key = _UP_BLOCK.sub(lambda match: str(stages - 1 - int(match[0])), key)
        for pattern, name in _LDM_RESNETS:
            key = pattern.sub(name, key)
        return Place(key)

    return place


_LLAMA_CPP = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_QWEN_KEY = re.compile(r"(?:layers\.(\d+)\.)?(.+)\.(weight|bias)$")


def llama_cpp_qwen3(key: str) -> Place:
    """Qwen3 in GGUF; its rows keep their order, unlike those of Llama."""
    match = _QWEN_KEY.match(key)
    assert match is not None, key
    layer, module, kind = match.groups()
    block = "" if layer is None else f"blk.{layer}."
    return Place(f"{block}{_LLAMA_CPP[module]}.{kind}")
