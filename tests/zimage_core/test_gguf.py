"""GGUF files written by gguf's writer load to what gguf's own dequantiser makes of them."""

import builtins
import struct

import foreign_layouts as foreign
import gguf
import numpy as np
import pytest
import torch

from zimage_core.config import CheckpointError
from zimage_core.gguf_file import QUANTISED_DTYPES, read_gguf_header
from zimage_core.loader import check_checkpoint, load_from_local_dir
from zimage_core.stored_tensor import Weight, WeightReader
from zimage_core.tiny.make import make_checkpoint

Type = gguf.GGMLQuantizationType
# Rows of 256, the block of the K types.
SIZES = {
    "dim": 256,
    "heads": 8,
    "layers": 1,
    "text_dim": 256,
    "text_mlp": 512,
    "text_layers": 2,
    "text_heads": 8,
    "text_head_dim": 32,
    "vocab_size": 320,
    "vae_channels": (8, 8, 8, 8),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("base") / "tiny", dtype=torch.bfloat16, seed=4, **SIZES
    )


def load(base, **options):
    return load_from_local_dir(base, **{"device": "cpu", "dtype": torch.float32, **options})


def as_comfy(kind):
    """As ComfyUI-GGUF's converter chooses: vectors and small tensors float32, odd rows float16."""
    block = gguf.GGML_QUANT_SIZES[kind][0]

    def choose(name, tensor):
        if tensor.ndim == 1 or tensor.numel() <= 1024:
            return Type.F32
        return kind if tensor.shape[-1] % block == 0 else Type.F16

    return choose


def comfy(base):
    state = foreign.comfy_transformer(foreign.transformer_state(base))
    for key in ("x_pad_token", "cap_pad_token"):
        state[key] = state[key][0]  # as GGUF files have them
    return state


def assert_transformer(model, values):
    for key, tensor in model.state_dict().items():
        name, part = key, None
        if ".attention.to_" in key and "to_out" not in key:
            block, letter = key.split(".to_")
            name, part = f"{block}.qkv.weight", "qkv".index(letter[0])
        for ours, theirs in (
            ("attention.to_out.0.", "attention.out."),
            ("norm_q.", "q_norm."),
            ("norm_k.", "k_norm."),
            ("all_x_embedder.2-1.", "x_embedder."),
            ("all_final_layer.2-1.", "final_layer."),
        ):
            name = name.replace(ours, theirs)
        value = torch.from_numpy(values[name])
        if part is not None:
            value = value.chunk(3)[part]
        assert torch.equal(tensor, value.reshape(tensor.shape).to(tensor.dtype)), key


@pytest.mark.parametrize(
    ("kind", "arch"),
    [
        *[(kind, "lumina2") for kind in (Type.Q4_K, Type.Q6_K, Type.Q5_K, Type.Q8_0, Type.Q4_0)],
        *[(kind, "lumina2") for kind in (Type.F16, Type.BF16)],
        (Type.Q8_0, None),  # as stable-diffusion.cpp writes it
    ],
    ids=str,
)
def test_transformer(base, tmp_path, kind, arch):
    path = tmp_path / "t.gguf"
    values = foreign.write_gguf(path, comfy(base), as_comfy(kind), arch=arch)
    assert_transformer(load(base, transformer=path)["transformer"], values)
    header = read_gguf_header(path)
    assert header.metadata.get("general.architecture") == arch
    used = header.tensors["layers.0.attention.qkv.weight"]
    assert used.dtype == kind.name and used.shape == (768, 256)


def test_transformer_in_bfloat16_is_rounded_once(base, tmp_path):
    path = tmp_path / "t.gguf"
    values = foreign.write_gguf(path, comfy(base), as_comfy(Type.Q8_0))
    assert_transformer(load(base, transformer=path, dtype=torch.bfloat16)["transformer"], values)


def test_transformer_equals_what_diffusers_makes_of_the_file(base, tmp_path):
    """diffusers has a dequantiser of its own, in torch."""
    from diffusers import GGUFQuantizationConfig, ZImageTransformer2DModel
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    path = tmp_path / "t.gguf"
    state = comfy(base)
    for key in ("x_pad_token", "cap_pad_token"):
        state[key] = state[key][None]  # diffusers takes no other shape
    foreign.write_gguf(path, state, as_comfy(Type.Q4_K))
    theirs = ZImageTransformer2DModel.from_single_file(
        str(path),
        config=str(base / "transformer"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    ).state_dict()
    for key, tensor in load(base, transformer=path)["transformer"].state_dict().items():
        value = theirs[key]
        if getattr(value, "quant_type", None) is not None:
            value = dequantize_gguf_tensor(value)
        value = value.as_subclass(torch.Tensor).float()
        # It computes in float16, which has 11 bits.
        assert (tensor - value).abs().max() <= tensor.abs().max() * 2**-9, key


def test_text_encoder_with_names_of_llama_cpp(base, tmp_path):
    path = tmp_path / "qwen3.gguf"
    state = foreign.llama_cpp(foreign.text_state(base))
    assert "blk.1.attn_q_norm.weight" in state and "token_embd.weight" in state
    values = foreign.write_gguf(path, state, as_comfy(Type.Q6_K), arch="qwen3")
    model = load(base, text_encoder=path)["text_encoder"]
    names = foreign.llama_cpp({f"model.{key}": torch.zeros(0) for key in model.state_dict()})
    for (key, tensor), name in zip(model.state_dict().items(), names, strict=True):
        assert torch.equal(tensor, torch.from_numpy(values[name]).reshape(tensor.shape)), key


@pytest.mark.parametrize("arch", ["qwen3vl", "llama"])
def test_text_encoder_of_another_architecture_is_refused(base, tmp_path, arch):
    """Qwen3-VL has the same shapes, and Llama's rows are in another order."""
    path = tmp_path / "x.gguf"
    state = foreign.llama_cpp(foreign.text_state(base))
    foreign.write_gguf(path, state, as_comfy(Type.F16), arch=arch)
    with pytest.raises(CheckpointError, match=f"general.architecture is '{arch}'; allowed"):
        check_checkpoint(base, text_encoder=path)


def test_original_shape(base, tmp_path):
    """Tensors whose rows are no whole blocks are stored in rows of 256."""
    name = "x_embedder.weight"
    state = comfy(base)
    shape = tuple(state[name].shape)
    state[name] = state[name].reshape(-1, 256)
    assert tuple(state[name].shape) != shape
    path = tmp_path / "t.gguf"
    values = foreign.write_gguf(path, state, as_comfy(Type.Q8_0), original_shapes={name: shape})
    assert_transformer(load(base, transformer=path)["transformer"], values)
    foreign.write_gguf(path, state, as_comfy(Type.Q8_0), original_shapes={name: (3, 5)})
    refused(base, path, f"tensor '{name}' of shape", "cannot have had the shape [3, 5]")


@pytest.mark.parametrize("name", QUANTISED_DTYPES)
def test_every_type_in_pieces(tmp_path, name, monkeypatch):
    """Cut into pieces, a tensor comes to what it comes to whole."""
    monkeypatch.setattr("zimage_core.stored_tensor._QUANTISED_PIECE", 1024)
    kind = Type[name]
    path = tmp_path / "t.gguf"
    values = foreign.write_gguf(path, {"a": torch.randn(7, 768)}, lambda *_: kind, arch="x")
    stored = read_gguf_header(path).tensors["a"]
    with WeightReader() as reader:
        whole = reader.read(Weight(stored, (7, 768)), torch.float32, "cpu")
        part = reader.read(Weight(stored, (2, 768), 768 * 3), torch.float32, "cpu")
    expected = torch.from_numpy(values["a"])
    assert torch.equal(whole.nan_to_num(), expected.nan_to_num())
    assert torch.equal(part.nan_to_num(), expected[3:5].nan_to_num())


def refused(base, path, *parts):
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(base, transformer=path)
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_and_misshaped_tensors_have_the_files_own_name(base, tmp_path):
    path, state = tmp_path / "t.gguf", comfy(base)
    lost = "layers.0.attention.qkv.weight"
    foreign.write_gguf(path, {k: t for k, t in state.items() if k != lost}, as_comfy(Type.Q8_0))
    refused(base, path, f"missing tensor '{lost}' of shape [768, 256]")
    state[lost] = torch.zeros(512, 256)
    foreign.write_gguf(path, state, as_comfy(Type.Q8_0))
    refused(base, path, f"tensor '{lost}' has shape [512, 256], but")


@pytest.fixture
def whole(base, tmp_path):
    path = tmp_path / "t.gguf"
    foreign.write_gguf(path, comfy(base), as_comfy(Type.Q8_0))
    return path


def test_truncated(base, whole):
    content = whole.read_bytes()
    for length in (len(content) - 4096, len(content) // 2):
        whole.write_bytes(content[:length])
        refused(base, whole, "is truncated", "do not hold tensor '")
    for length in (5, 30, 200, 2000):
        whole.write_bytes(content[:length])
        refused(base, whole, "is truncated or corrupt", "do not hold its header")


def test_every_length_and_every_changed_byte_of_a_header_is_an_error_or_harmless(tmp_path):
    """Nothing but a CheckpointError, nothing without end, whatever the header says."""
    path = tmp_path / "t.gguf"
    foreign.write_gguf(path, {"a": torch.zeros(2, 32)}, lambda *_: Type.Q8_0)
    content = path.read_bytes()
    header = content.index(b"a", 40) + 60
    for at in range(header):
        changed = bytearray(content)
        changed[at] ^= 0xFF
        for damaged in (content[:at], bytes(changed)):
            path.write_bytes(damaged)
            try:
                read_gguf_header(path)
            except CheckpointError as error:
                assert str(path) in str(error)


def test_headers_that_cannot_be(base, whole):
    content = whole.read_bytes()
    whole.write_bytes(content[:4] + struct.pack("<I", 1) + content[8:])
    refused(base, whole, "is GGUF of version 1; allowed: 2, 3")
    whole.write_bytes(content[:4] + struct.pack(">I", 3) + content[8:])
    refused(base, whole, "big-endian")
    whole.write_bytes(content[:8] + struct.pack("<Q", 2**60) + content[16:])
    refused(base, whole, "is corrupt: it says that it holds 1,152,921,504,606,846,976 tensors")
    whole.write_bytes(b"GGML" + content[4:])
    refused(base, whole, "is no GGUF file")


def test_type_that_cannot_be_dequantised(base, tmp_path):
    path, state = tmp_path / "t.gguf", comfy(base)
    writer = gguf.GGUFWriter(path, "lumina2")
    for name, tensor in state.items():
        data = tensor.float().numpy()
        if name == "layers.0.feed_forward.w1.weight":
            data = np.zeros(data.shape, np.int8)
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(base, path, "tensor 'layers.0.feed_forward.w1.weight' is stored as I8; allowed: F32")


def test_split_file(base, tmp_path):
    path = tmp_path / "t-00001-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "lumina2")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("a", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(base, path, "is a part of a file that was split into 3")


def test_package_that_is_not_installed(base, whole, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(base, whole, "needs the package gguf: pip install 'zimage-batch[gguf]'")


def test_vocabulary_costs_nothing(tmp_path):
    """A text encoder's file begins with some 300,000 strings."""
    path = tmp_path / "t.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_token_list([f"token {i}" for i in range(20_000)])
    writer.add_token_types([1] * 20_000)
    writer.add_tensor("a", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(path)
    assert header.metadata["tokenizer.ggml.tokens"] is None
    assert header.metadata["general.architecture"] == "qwen3"
    assert list(header.tensors) == ["a"]
