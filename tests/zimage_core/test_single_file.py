"""Single files in other layouts load to the very tensors of the folder they were made from."""

import json
import random
import shutil

import foreign_layouts as foreign
import pytest
import torch
from safetensors.torch import load_file

from zimage_core.checkpoint import PUBLISHED, find_source
from zimage_core.config import (
    AutoencoderConfig,
    CheckpointError,
    TextEncoderConfig,
    TransformerConfig,
)
from zimage_core.empty_module import make_empty
from zimage_core.loader import check_checkpoint, checkpoint_files, load_from_local_dir
from zimage_core.model_kind import KINDS
from zimage_core.stored_tensor import WeightReader
from zimage_core.text_encoder import full_model_shapes
from zimage_core.tiny.make import make_checkpoint
from zimage_core.transformer import ZImageTransformer2DModel

SMALL = {"layers": 2, "text_layers": 3, "vocab_size": 320, "vae_channels": (8, 8, 16, 16)}
MODELS = ("transformer", "vae", "text_encoder")


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """The folder whose tensors are known."""
    return make_checkpoint(
        tmp_path_factory.mktemp("origin") / "tiny", dtype=torch.bfloat16, seed=1, **SMALL
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of the same architecture with other weights."""
    return make_checkpoint(
        tmp_path_factory.mktemp("base") / "tiny", dtype=torch.bfloat16, seed=2, **SMALL
    )


def load(folder, **options):
    return load_from_local_dir(folder, **{"device": "cpu", "dtype": torch.bfloat16, **options})


def assert_model_equal(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key


def assert_taken(base, origin, name, path):
    """Loading `base` with `path` for a model gives that of `origin`, and leaves the others."""
    loaded, own, other = load(base, **{name: path}), load(base), load(origin)
    for model in MODELS:
        assert_model_equal(loaded[model], (other if model == name else own)[model])


def refused(base, name, path, *parts):
    """Loading and checking refuse with the same message, which holds all `parts`."""
    with pytest.raises(CheckpointError) as loading:
        load(base, **{name: path})
    with pytest.raises(CheckpointError) as checking:
        check_checkpoint(base, **{name: path})
    assert str(loading.value) == str(checking.value)
    for part in (str(path), *parts):
        assert part in str(loading.value)
    return str(loading.value)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("fused", [True, False])
def test_transformer_file(base, origin, tmp_path, prefix, fused):
    state = foreign.transformer_state(origin)
    state = foreign.comfy_transformer(state) if fused else state
    path = foreign.save(foreign.prefixed(state, prefix), tmp_path / "t.safetensors")
    assert_taken(base, origin, "transformer", path)


def test_transformer_file_equals_what_diffusers_loads(base, origin, tmp_path):
    from diffusers import ZImageTransformer2DModel

    state = foreign.comfy_transformer(foreign.transformer_state(origin))
    path = foreign.save(
        foreign.prefixed(state, "model.diffusion_model."), tmp_path / "t.safetensors"
    )
    theirs = ZImageTransformer2DModel.from_single_file(
        str(path), config=str(origin / "transformer"), torch_dtype=torch.bfloat16
    )
    assert_model_equal(load(base, transformer=path)["transformer"], theirs)


def test_autoencoder_file_equals_what_diffusers_loads(base, origin, tmp_path):
    from diffusers import AutoencoderKL

    path = foreign.save(
        foreign.ldm_autoencoder(foreign.vae_state(origin)), tmp_path / "ae.safetensors"
    )
    theirs = AutoencoderKL.from_single_file(
        str(path), config=str(origin / "vae"), torch_dtype=torch.bfloat16
    )
    assert_model_equal(load(base, vae=path)["vae"], theirs)
    assert_taken(base, origin, "vae", path)


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_autoencoder_file_with_diffusers_keys_or_prefix(base, origin, tmp_path, prefix):
    state = foreign.vae_state(origin)
    state = state if not prefix else foreign.ldm_autoencoder(state)
    path = foreign.save(foreign.prefixed(state, prefix), tmp_path / "vae.safetensors")
    assert_taken(base, origin, "vae", path)


@pytest.mark.parametrize("stripped", [True, False])
def test_text_encoder_file(base, origin, tmp_path, stripped):
    state = foreign.text_state(origin)
    if stripped:
        state = {key.removeprefix("model."): tensor for key, tensor in state.items()}
        state["lm_head.weight"] = state["embed_tokens.weight"].clone()
    path = foreign.save(state, tmp_path / "qwen.safetensors")
    assert_taken(base, origin, "text_encoder", path)


@pytest.mark.parametrize("name", MODELS)
def test_folder_of_a_model_or_of_a_checkpoint(base, origin, name):
    assert_taken(base, origin, name, origin / name)
    assert_taken(base, origin, name, origin)


@pytest.fixture(scope="module")
def all_in_one(origin, tmp_path_factory):
    """One file with all three models, as ComfyUI saves a checkpoint."""
    text = foreign.prefixed(foreign.text_state(origin), "text_encoders.qwen3_4b.transformer.")
    state = {
        **foreign.prefixed(
            foreign.comfy_transformer(foreign.transformer_state(origin)), "model.diffusion_model."
        ),
        **foreign.prefixed(foreign.ldm_autoencoder(foreign.vae_state(origin)), "vae."),
        **text,
        "text_encoders.qwen3_4b.logit_scale": torch.tensor(4.6),
    }
    return foreign.save(state, tmp_path_factory.mktemp("all") / "all.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_a_file_with_all_models_gives_the_one_that_is_asked_for(base, origin, all_in_one, name):
    assert_taken(base, origin, name, all_in_one)


def test_weights_of_what_is_replaced_need_not_be_there(base, origin, all_in_one, tmp_path):
    folder = shutil.copytree(base, tmp_path / "partial")
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    loaded = load(folder, **dict.fromkeys(MODELS, all_in_one))
    other = load(origin)
    for name in MODELS:
        assert_model_equal(loaded[name], other[name])
    summary = check_checkpoint(folder, **dict.fromkeys(MODELS, all_in_one))
    assert summary.files == tuple(checkpoint_files(folder, **dict.fromkeys(MODELS, all_in_one)))
    assert summary.files.count(all_in_one) == 1
    assert summary.num_parameters == check_checkpoint(origin).num_parameters


def test_files_are_those_that_are_read(base, origin, tmp_path):
    path = foreign.save(foreign.transformer_state(origin), tmp_path / "t.safetensors")
    files = checkpoint_files(base, transformer=path, vae=origin / "vae")
    assert path in files and origin / foreign.VAE in files
    assert origin / "vae" / "config.json" in files
    assert base / "transformer" / "config.json" in files
    assert base / foreign.TRANSFORMER not in files and base / foreign.VAE not in files
    assert files == sorted(files)


def test_pad_token_without_its_leading_one(base, origin, tmp_path):
    state = foreign.transformer_state(origin)
    for key in ("x_pad_token", "cap_pad_token"):
        state[key] = state[key][0]
    assert_taken(base, origin, "transformer", foreign.save(state, tmp_path / "t.safetensors"))


def test_stray_norm_and_empty_tensors_are_left_out_and_said(base, origin, tmp_path, caplog):
    state = foreign.comfy_transformer(foreign.transformer_state(origin))
    state["norm_final.weight"] = torch.full((64,), torch.nan)
    state["layers.0.empty"] = torch.zeros(0)
    path = foreign.save(state, tmp_path / "t.safetensors")
    assert_taken(base, origin, "transformer", path)
    notes = check_checkpoint(base, transformer=path).notes
    assert {note.split("'")[1] for note in notes} == {"norm_final.weight", "layers.0.empty"}
    assert all(note in caplog.text for note in notes)
    assert check_checkpoint(base).notes == ()


def test_missing_unexpected_and_misshaped_tensors_have_the_files_own_name(base, origin, tmp_path):
    path = tmp_path / "t.safetensors"
    state = foreign.prefixed(
        foreign.comfy_transformer(foreign.transformer_state(origin)), "model.diffusion_model."
    )
    name = "model.diffusion_model.layers.1.attention.qkv.weight"
    lacking = {key: tensor for key, tensor in state.items() if key != name}
    text = refused(
        base,
        "transformer",
        foreign.save(lacking, path),
        f"missing tensor '{name}' of shape [192, 64]",
    )
    assert len(text.splitlines()) == 1  # three of our keys, one of the file's
    foreign.save({**state, name: torch.zeros(128, 64)}, path)
    place = base / "transformer" / "config.json"
    refused(
        base,
        "transformer",
        path,
        f"tensor '{name}' has shape [128, 64], but {place} asks for [192, 64]",
    )
    foreign.save({**state, "model.diffusion_model.layers.2.ffn_norm1.weight": torch.ones(64)}, path)
    refused(
        base,
        "transformer",
        path,
        "unexpected tensor 'model.diffusion_model.layers.2.ffn_norm1.weight' of shape [64]",
    )
    foreign.save({**state, "other.weight": torch.ones(64)}, path)
    refused(base, "transformer", path, "unexpected tensor 'other.weight'")
    query = "model.diffusion_model.layers.1.attention.to_q.weight"
    foreign.save({**state, query: torch.ones(64, 64)}, path)
    refused(base, "transformer", path, f"unexpected tensor '{query}'")


def test_autoencoder_errors_have_the_files_own_name(base, origin, tmp_path):
    path = tmp_path / "ae.safetensors"
    state = foreign.ldm_autoencoder(foreign.vae_state(origin))
    name = "decoder.mid.attn_1.proj_out.weight"
    foreign.save({key: tensor for key, tensor in state.items() if key != name}, path)
    refused(base, "vae", path, f"missing tensor '{name}' of shape [16, 16]")
    foreign.save({**state, name: torch.zeros(16, 16, 3, 3)}, path)
    refused(base, "vae", path, f"tensor '{name}' has shape [16, 16, 3, 3]")


def test_a_file_of_another_kind_says_what_it_is(base, origin, tmp_path):
    transformer = foreign.save(foreign.transformer_state(origin), tmp_path / "t.safetensors")
    vae = foreign.save(foreign.vae_state(origin), tmp_path / "v.safetensors")
    text = foreign.save(foreign.text_state(origin), tmp_path / "q.safetensors")
    refused(base, "transformer", vae, "holds no transformer of Z-Image", "it is an autoencoder")
    refused(base, "transformer", text, "it is a language model")
    refused(base, "vae", transformer, "holds no autoencoder", "a transformer of Z-Image")
    refused(base, "text_encoder", vae, "holds no text encoder")
    lora = {"diffusion_model.layers.0.attention.to_q.lora_A.weight": torch.ones(4, 64)}
    path = foreign.save(lora, tmp_path / "lora.safetensors")
    refused(base, "transformer", path, "a LoRA adapter, which belongs under loras")
    path = foreign.save({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    refused(base, "transformer", path, "nothing known")


@pytest.mark.parametrize(
    ("name", "dtype", "what"),
    [
        ("layers.0.attention.qkv.weight_scale_2", torch.float32, "nvfp4"),
        ("layers.0.attention.to_qkv.wscales", torch.float16, "nunchaku (SVDQuant)"),
        ("layers.0.feed_forward.w1.weight.absmax", torch.uint8, "bitsandbytes"),
        ("layers.0.feed_forward.w1.weight.quant_state.bitsandbytes__nf4", torch.uint8, "bitsandb"),
        ("layers.0.feed_forward.w1.zero_point", torch.uint8, "SDNQ"),
        ("layers.0.feed_forward.w1.svd_up", torch.float16, "SDNQ"),
        ("layers.0.feed_forward.w1.qweight", torch.int32, "GPTQ or AWQ"),
        ("layers.0.feed_forward.w1.weight._data", torch.int8, "optimum-quanto"),
        ("layers.0.feed_forward.w1.biases", torch.float16, "MLX"),
    ],
)
def test_formats_that_are_not_supported_are_refused_by_name(
    base, origin, tmp_path, name, dtype, what
):
    state = {**foreign.transformer_state(origin), name: torch.ones(4).to(dtype)}
    path = foreign.save(state, tmp_path / "t.safetensors")
    text = refused(base, "transformer", path, f"is quantised with {what}", repr(name))
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_a_quantised_folder_is_refused_by_name(base, tmp_path, name):
    folder = shutil.copytree(base, tmp_path / "quantised")
    path = folder / name / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "sdnq", "weights_dtype": "int8"}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(folder)
    assert str(caught.value) == (
        f"{path}: quantization_config: is quantised with sdnq, which is not supported"
    )


def test_integer_weights_are_refused_once(base, origin, tmp_path):
    state = foreign.transformer_state(origin)
    state = {key: t.to(torch.int8) if t.ndim == 2 else t for key, t in state.items()}
    path = foreign.save(state, tmp_path / "t.safetensors")
    text = refused(base, "transformer", path, "is stored as I8, which is no supported type")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".ckpt", b"PK\x03\x04", "is a pickle"),
        (".safetensors", b"", "is truncated"),
        (".safetensors", b"PK\x03\x04\x14\0\x08\0\0\0", "is a ZIP file, as pickles are"),
        (".safetensors", b"version https://git-lfs", "is a Git LFS pointer"),
        (".gguf", b"\x08\0\0\0\0\0\0\0", "is no GGUF file"),
        (".gguf", b"", "cannot be read"),
    ],
)
def test_file_that_is_none(base, tmp_path, suffix, content, message):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    refused(base, "transformer", path, message)


def test_damaged_headers_are_refused_by_name(base, origin, tmp_path):
    """Whatever three bytes of a header become: an error that names the file, or the same model."""
    state = foreign.comfy_transformer(foreign.transformer_state(origin))
    path = foreign.save(state, tmp_path / "t.safetensors")
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    chance = random.Random(0)
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[chance.randrange(header)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            check_checkpoint(base, transformer=path)
        except CheckpointError as error:
            assert str(path) in str(error)


def test_truncated_and_missing_file(base, origin, tmp_path):
    path = foreign.save(foreign.transformer_state(origin), tmp_path / "t.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    refused(base, "transformer", path, "is truncated")
    refused(base, "vae", tmp_path / "nowhere", "no such autoencoder")


def test_file_that_shrinks_between_check_and_read(origin, tmp_path):
    """Reading on would end the process with a bus error."""
    path = foreign.save(foreign.transformer_state(origin), tmp_path / "t.safetensors")
    source = find_source(KINDS["transformer"], origin, path)
    weights = source.open(source.read_config()).weights
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with (
        WeightReader() as reader,
        pytest.raises(CheckpointError, match=r"is truncated: .* do not hold tensor 'x_pad_token'"),
    ):
        reader.read(weights["x_pad_token"], torch.float32, "cpu")


def test_without_a_configuration_only_the_published_shapes_pass(
    base, origin, tmp_path, monkeypatch
):
    folder = shutil.copytree(base, tmp_path / "bare")
    (folder / "transformer" / "config.json").unlink()
    path = foreign.save(foreign.transformer_state(origin), tmp_path / "t.safetensors")
    refused(
        folder,
        "transformer",
        path,
        "'x_pad_token' has shape [1, 64], but the published configuration asks for [1, 3840]",
        "was compared with the published configuration of Z-Image",
    )
    # Where this architecture is the published one, it is taken, and that is said.
    published = tmp_path / "published"
    published.mkdir()
    shutil.copy(base / "transformer" / "config.json", published / "transformer.json")
    monkeypatch.setattr("zimage_core.checkpoint.PUBLISHED", published)
    assert_model_equal(load(folder, transformer=path)["transformer"], load(origin)["transformer"])
    (note,) = check_checkpoint(folder, transformer=path).notes
    assert str(path) in note and "the published configuration of Z-Image is used" in note
    assert published / "transformer.json" in checkpoint_files(folder, transformer=path)


def test_published_configurations_are_those_of_the_papers_model():
    transformer = TransformerConfig.from_json(PUBLISHED / "transformer.json")
    assert (transformer.dim, transformer.n_layers, transformer.axes_lens) == (
        3840,
        30,
        (1536, 512, 512),
    )
    state = make_empty(ZImageTransformer2DModel, transformer).state_dict()
    # The size of the published shards and of their index.
    assert sum(tensor.numel() for tensor in state.values()) == 6_154_908_736
    assert len(state) == 521
    vae = AutoencoderConfig.from_json(PUBLISHED / "vae.json")
    assert (vae.scaling_factor, vae.shift_factor) == (0.3611, 0.1159)
    text = TextEncoderConfig.from_json(PUBLISHED / "text_encoder.json")
    sizes = [torch.Size(shape).numel() for shape in full_model_shapes(text).values()]
    assert sum(sizes) == 4_022_468_096
    assert json.loads((PUBLISHED / "transformer.json").read_text())["_class_name"]


def test_float32_file_is_cast_to_the_dtype_asked_for(base, origin, tmp_path):
    state = {k: t.float() * 1.001 for k, t in foreign.transformer_state(origin).items()}
    path = foreign.save(foreign.comfy_transformer(state), tmp_path / "t.safetensors")
    model = load(base, transformer=path)["transformer"]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key].bfloat16()), key
    assert load_file(path)["x_pad_token"].dtype == torch.float32
