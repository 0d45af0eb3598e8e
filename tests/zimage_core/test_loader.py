"""Loading: what comes out equals diffusers' own loading; every kind of damage has its error."""

import json
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core import loader
from zimage_core.attention import AttentionBackendError
from zimage_core.config import CheckpointError
from zimage_core.loader import check_checkpoint, checkpoint_files, load_from_local_dir
from zimage_core.tiny.make import make_checkpoint
from zimage_core.tiny.writer import save_weights

SMALL = {"layers": 2, "text_layers": 2, "vocab_size": 320, "vae_channels": (8, 8, 8, 8)}
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
MODELS = ("transformer", "vae", "text_encoder")


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("origin") / "tiny", **SMALL)


@pytest.fixture
def folder(origin, tmp_path):
    return shutil.copytree(origin, tmp_path / "tiny")


def load(folder, **options):
    return load_from_local_dir(folder, **{"device": "cpu", "dtype": torch.float32, **options})


def edit(path, change):
    """Rewrite a safetensors file after `change(state)`."""
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(path, shard_size):
    """Replace a weight file by shards and return their index."""
    state = load_file(path)
    path.unlink()
    save_weights(path.parent, path.name.removesuffix(".safetensors"), state, shard_size)
    return path.with_name(path.name + ".index.json")


def states_equal(a, b):
    for name in MODELS:
        ours, theirs = a[name].state_dict(), b[name].state_dict()
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype
            assert torch.equal(ours[key], theirs[key]), f"{name} {key}"


def refused(folder, *parts):
    """Both loading and checking refuse the folder, with one message that holds all `parts`."""
    with pytest.raises(CheckpointError) as loading:
        load(folder)
    with pytest.raises(CheckpointError) as checking:
        check_checkpoint(folder)
    assert str(loading.value) == str(checking.value)
    for part in parts:
        assert part in str(loading.value)


def test_components_are_ready_to_run(origin):
    components = load(origin)
    assert set(components) == {*MODELS, "tokenizer", "scheduler"}
    for name in MODELS:
        assert not components[name].training
        for parameter in components[name].parameters():
            assert parameter.dtype == torch.float32 and parameter.device.type == "cpu"
            assert not parameter.requires_grad
    assert components["scheduler"].shift == 3.0
    assert components["tokenizer"].pad_token == "<|endoftext|>"


def test_weights_equal_those_that_diffusers_loads(origin):
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(origin, dtype=torch.float32)
    components = load(origin)
    for name in MODELS:
        theirs = getattr(pipeline, name).state_dict()
        ours = components[name].state_dict()
        if name != "text_encoder":
            assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), f"{name} {key}"
    left_out = pipeline.text_encoder.state_dict().keys() - components["text_encoder"].state_dict()
    assert left_out and all(key.startswith("layers.1.") or key == "norm.weight" for key in left_out)
    text = "<|im_start|>user\nA red Apple 🍎<|im_end|>\n"
    assert components["tokenizer"](text).input_ids == pipeline.tokenizer(text).input_ids


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_weights_are_cast_to_the_dtype_asked_for(tmp_path, stored, asked):
    folder = make_checkpoint(tmp_path / "tiny", dtype=stored, **SMALL)
    model = load(folder, dtype=asked)["transformer"]
    raw = load_file(folder / TRANSFORMER)
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == asked
        assert torch.equal(tensor, raw[key].to(asked))


def test_loaded_weights_do_not_depend_on_the_file_any_longer(tmp_path):
    folder = make_checkpoint(tmp_path / "tiny", dtype=torch.float32, **SMALL)
    model = load(folder)["vae"]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with (folder / VAE).open("r+b") as file:
        file.truncate(8)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_shards_give_identical_tensors(origin, folder):
    for name in (TRANSFORMER, TEXT_ENCODER, VAE):
        shard(folder / name, 50_000)
    assert len(list(folder.rglob("*.safetensors"))) > 6
    states_equal(load(folder), load(origin))
    summary, reference = check_checkpoint(folder), check_checkpoint(origin)
    assert summary.num_parameters == reference.num_parameters
    assert len(summary.files) > len(reference.files)


def test_text_encoder_keys_with_and_without_prefix(origin, folder):
    def strip(state):
        for key in list(state):
            state[key.removeprefix("model.")] = state.pop(key)

    edit(folder / TEXT_ENCODER, strip)
    states_equal(load(folder), load(origin))


def test_last_layer_norm_and_head_of_the_text_encoder_may_be_there_or_not(origin, folder):
    def trim(state):
        for key in [k for k in state if ".layers.1." in k or k == "model.norm.weight"]:
            del state[key]
        state["lm_head.weight"] = torch.zeros(320, 64, dtype=torch.float16)

    edit(folder / TEXT_ENCODER, trim)
    states_equal(load(folder), load(origin))
    edit(folder / TEXT_ENCODER, lambda s: s.update({"model.norm.weight": torch.zeros(3)}))
    refused(folder, "tensor 'model.norm.weight' has shape [3], but config.json asks for [64]")


@pytest.mark.parametrize(
    ("file", "key"),
    [
        (TRANSFORMER, "layers.1.feed_forward.w2.weight"),
        (VAE, "decoder.conv_in.bias"),
        (TEXT_ENCODER, "model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_missing_unexpected_and_misshaped_tensors_are_named(folder, file, key):
    path = folder / file
    tensor = load_file(path)[key]
    shape = list(tensor.shape)
    edit(path, lambda state: state.pop(key))
    refused(folder, f"{path}: missing tensor '{key}' of shape {shape}")
    edit(path, lambda state: state.update({key: tensor.new_zeros(3, 5)}))
    refused(folder, f"{path}: tensor '{key}' has shape [3, 5], but config.json asks for {shape}")
    edit(path, lambda state: state.update({key: tensor, "extra.weight": torch.zeros(2)}))
    refused(folder, f"{path}: unexpected tensor 'extra.weight' of shape [2]")


def test_all_models_are_checked_at_once_and_long_lists_are_cut(folder):
    for name in (TRANSFORMER, VAE):
        edit(folder / name, lambda state: [state.pop(key) for key in list(state)[:30]])
    refused(folder, str(folder / TRANSFORMER), str(folder / VAE), "... and 20 more")


@pytest.mark.parametrize("name", [TRANSFORMER, TEXT_ENCODER, VAE])
@pytest.mark.parametrize("size", [-1, -1000, 100, 4, 0])
def test_truncated_file(folder, name, size):
    path = folder / name
    with path.open("r+b") as file:
        file.truncate(size if size >= 0 else path.stat().st_size + size)
    refused(folder, f"{path}: is truncated")


def header(tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 400, "is corrupt, or no safetensors file"),
        (b"PK\x03\x04" + b"\x00" * 400, "is a ZIP file, as pickles are"),
        (b"PK\x03\x04\x14\x00\x08\x08\x00\x00", "is a ZIP file, as pickles are"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (header([]), "is corrupt"),
        (header({"a": {}}), "is corrupt"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}), "is corrupt"),
        (header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}), "is corrupt"),
        (header({"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}), "is corrupt"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}), "is corrupt"),
        (
            header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + b"\0" * 4,
            "cannot be those of tensor 'a', F32 [2]",
        ),
        (
            header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}) + b"\0" * 8,
            "bytes 4 to 8 cannot be those",
        ),
        (
            header({"a": {"dtype": "F9", "shape": [1], "data_offsets": [0, 1]}}) + b"\0",
            "tensor 'a' is stored as F9; allowed: F32, F16, BF16",
        ),
        (
            header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + b"\0" * 5,
            "is corrupt",
        ),
    ],
)
def test_corrupt_file(folder, content, message):
    (folder / VAE).write_bytes(content)
    refused(folder, f"{folder / VAE}: ", message)


def test_pickles_are_refused_by_name(folder):
    (folder / VAE).rename(folder / "vae" / "diffusion_pytorch_model.bin")
    refused(folder, str(folder / "vae" / "diffusion_pytorch_model.bin"), "is a pickle")


def test_pickle_beside_the_weights_is_never_read(folder):
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"boom")
    load(folder)


def test_index_that_names_a_pickle_or_another_folder(folder):
    index = shard(folder / VAE, 50_000)
    weight_map = json.loads(index.read_text())["weight_map"]
    for name in ("diffusion_pytorch_model-00001-of-00002.bin", "../transformer/x.safetensors"):
        edit_json(index, weight_map={**weight_map, "decoder.conv_in.bias": name})
        refused(folder, f"{index}: weight_map names '{name}'")
    edit_json(index, weight_map={})
    refused(folder, f"{index}: weight_map must map")


def test_missing_weight_file_and_missing_shard(folder):
    (folder / TRANSFORMER).unlink()
    refused(folder, f"{folder / TRANSFORMER}: file is missing, and so is")
    index = shard(folder / VAE, 50_000)
    first = sorted(index.parent.glob("*-00001-of-*.safetensors"))[0]
    first.unlink()
    refused(folder, f"{first}: file is missing, which {index.name} lists")


def test_orphan_shards_and_two_kinds_of_weights(folder):
    stray = folder / "vae" / "diffusion_pytorch_model-00009-of-00009.safetensors"
    shutil.copy(folder / VAE, stray)
    refused(folder, f"{stray}: is a shard that no index lists")
    stray.unlink()
    whole = (folder / VAE).read_bytes()
    index = shard(folder / VAE, 50_000)
    (folder / VAE).write_bytes(whole)
    refused(folder, f"has both diffusion_pytorch_model.safetensors and {index.name}")
    (folder / VAE).rename(stray)
    refused(folder, f"{stray}: is a shard that {index.name} does not list")


def test_tensor_that_is_not_in_its_shard(folder):
    index = shard(folder / VAE, 50_000)
    weight_map = json.loads(index.read_text())["weight_map"]
    key = "decoder.conv_in.weight"
    other = next(name for name in weight_map.values() if name != weight_map[key])
    edit_json(index, weight_map={**weight_map, key: other})
    refused(
        folder,
        f"{index.parent / other}: missing tensor '{key}', which the index lists there",
        f"{index.parent / weight_map[key]}: unexpected tensor '{key}'",
    )


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "transformer/config.json",
        "vae/config.json",
        "text_encoder/config.json",
    ],
)
def test_missing_and_broken_json(folder, name):
    path = folder / name
    path.write_text('{"half": ')
    refused(folder, f"{path}: cannot be read")
    path.unlink()
    refused(folder, str(path))


def test_model_index_of_another_pipeline(folder):
    path = folder / "model_index.json"
    edit_json(path, controlnet=["diffusers", "ZImageControlNetModel"])
    refused(folder, f"{path}: unknown component 'controlnet'")
    edit_json(path, controlnet=None, _class_name="FluxPipeline")
    refused(
        folder, "_class_name is 'FluxPipeline'; allowed: 'ZImagePipeline' or 'ZImageOmniPipeline'"
    )
    edit_json(path, _class_name="ZImagePipeline", vae=["diffusers", "AutoencoderTiny"])
    refused(folder, "vae is ['diffusers', 'AutoencoderTiny']; allowed: AutoencoderKL")
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        check_checkpoint(folder / "nowhere")


def test_parts_that_do_not_fit_each_other(folder, tmp_path):
    other = make_checkpoint(tmp_path / "other", latent_channels=8, text_dim=32, **SMALL)
    for name in ("vae", "text_encoder"):
        shutil.rmtree(folder / name)
        shutil.copytree(other / name, folder / name)
    refused(
        folder,
        "latent_channels is 8, but the transformer's in_channels is 16",
        "hidden_size is 32, but the transformer's cap_feat_dim is 64",
    )


def test_tokenizer_with_more_tokens_than_the_text_encoder(folder, tmp_path):
    other = make_checkpoint(tmp_path / "other", **{**SMALL, "vocab_size": 500})
    shutil.copy(other / "tokenizer" / "tokenizer.json", folder / "tokenizer" / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"holds 500 tokens, .* vocab_size is 320"):
        load(folder)


def test_tokenizer_as_published_and_as_transformers_5_saves_it(origin, folder, tmp_path):
    reference = load(origin)["tokenizer"]
    text = reference.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    edit_json(
        folder / "tokenizer" / "tokenizer_config.json",
        tokenizer_class="Qwen2Tokenizer",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        added_tokens_decoder={"0": {"content": "<|endoftext|>", "special": True}},
        pad_token={"__type": "AddedToken", "content": "<|endoftext|>", "special": True},
        errors="replace",
        split_special_tokens=False,
    )
    reference.save_pretrained(tmp_path / "saved")
    saved = shutil.copytree(folder, tmp_path / "five")
    shutil.rmtree(saved / "tokenizer")
    shutil.copytree(tmp_path / "saved", saved / "tokenizer")
    for path in (folder, saved):
        tokenizer = load(path)["tokenizer"]
        assert tokenizer(text).input_ids == reference(text).input_ids
        assert tokenizer.pad_token_id == 0
        assert text == tokenizer.apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
        )


def test_arguments_that_cannot_be(origin, monkeypatch):
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; allowed: torch\.bfloat16"):
        load(origin, dtype=torch.int8)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device is 'cuda:1', but torch finds no CUDA GPU"):
            load(origin, device="cuda:1")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="compile is not possible on MPS"):
        load(origin, device="mps", compile=True)


def test_attention_backend(origin, monkeypatch):
    assert load(origin, attention="_native_flash")["transformer"].attention_backend == (
        "_native_flash"
    )
    with pytest.raises(ValueError, match="unknown attention backend 'fast'"):
        load(origin, attention="fast")
    if not torch.cuda.is_available():
        with pytest.raises(AttentionBackendError):
            load(origin, attention="_flash_3")
        # One that the environment asks for is refused as early as one that is asked for here.
        monkeypatch.setenv("ZIMAGE_ATTENTION", "flash")
        with pytest.raises(AttentionBackendError):
            load(origin)


def test_compile_comes_last_and_is_asked_for(origin, monkeypatch):
    compiled = []

    def compile_blocks(transformer, device):
        compiled.append((transformer.attention_backend, device.type))

    monkeypatch.setattr(loader, "compile_blocks", compile_blocks)
    load(origin, attention="_native_flash")
    assert compiled == []
    load(origin, attention="_native_flash", compile=True)
    assert compiled == [("_native_flash", "cpu")]


def test_attention_auto_is_resolved_once(origin, monkeypatch):
    monkeypatch.delenv("ZIMAGE_ATTENTION", raising=False)
    transformer = load(origin, attention="auto")["transformer"]
    assert transformer.layers[0].attention.backend == "native"
    monkeypatch.setenv("ZIMAGE_ATTENTION", "_native_flash")
    assert load(origin, attention="auto")["transformer"].attention_backend == "_native_flash"
    assert load(origin)["transformer"].layers[0].attention.backend is None


def test_summary(origin):
    summary = check_checkpoint(str(origin))
    assert summary.files == tuple(checkpoint_files(origin))
    assert {path.relative_to(origin).as_posix() for path in summary.files} == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        TEXT_ENCODER,
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "transformer/config.json",
        TRANSFORMER,
        "vae/config.json",
        VAE,
    }
    assert summary.num_bytes == sum(path.stat().st_size for path in summary.files)
    components = load(origin)
    for name in MODELS:
        loaded = sum(parameter.numel() for parameter in components[name].parameters())
        assert summary.num_parameters[name] == loaded
    assert summary.transformer == components["transformer"].config


def test_check_reads_no_weights_and_imports_no_transformers(origin):
    program = (
        "import sys, zimage_core.loader as loader; loader.check_checkpoint(sys.argv[1]);"
        "print([name for name in ('transformers', 'diffusers', 'sympy') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(origin)], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
