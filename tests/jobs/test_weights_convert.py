"""`zimage weights convert`: folders that hold the very tensors of the files they came from."""

import hashlib
import json
import shutil

import foreign_layouts as foreign
import pytest
import torch
from cli_calls import CommandLine
from safetensors.torch import load_file

from zimage_core import conversion
from zimage_core.config import CheckpointError
from zimage_core.conversion import convert_checkpoint
from zimage_core.loader import check_checkpoint, load_from_local_dir
from zimage_core.tiny.make import make_checkpoint

SMALL = {"layers": 1, "text_layers": 3, "vocab_size": 320, "vae_channels": (8, 8, 16, 16)}
MODELS = ("transformer", "vae", "text_encoder")


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("origin") / "tiny", dtype=torch.bfloat16, seed=1, **SMALL
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("base") / "tiny", dtype=torch.bfloat16, seed=2, **SMALL
    )


@pytest.fixture
def comfy(origin, tmp_path):
    state = foreign.comfy_transformer(foreign.transformer_state(origin))
    return foreign.save(state, tmp_path / "comfy.safetensors")


def weights(folder, name):
    """All tensors of a model's folder, as safetensors' own reader finds them."""
    state = {}
    for path in sorted((folder / name).glob("*.safetensors")):
        state |= load_file(path)
    return state


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key


def test_command_writes_a_whole_checkpoint(zimage: CommandLine, origin, base, comfy):
    ended = zimage("weights", "convert", comfy, "out/new", "--base", base, code=0)
    out = zimage.folder / "out" / "new"
    assert_same(weights(out, "transformer"), weights(origin, "transformer"))
    for name in ("vae", "text_encoder"):
        assert_same(weights(out, name), weights(base, name))
    for file in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
        assert (out / file).read_bytes() == (base / file).read_bytes()
    assert f"transformer: bfloat16, 1.1 MB, from {comfy}" in ended.out
    assert "out/new: written; it is a whole checkpoint" in ended.out
    assert [path.name for path in (zimage.folder / "out").iterdir()] == ["new"]
    check_checkpoint(out)


def test_folder_loads_in_diffusers_and_here(origin, base, comfy, tmp_path):
    from diffusers import ZImagePipeline

    ae = foreign.save(
        foreign.ldm_autoencoder(foreign.vae_state(origin)), tmp_path / "ae.safetensors"
    )
    text = foreign.save(foreign.text_state(origin), tmp_path / "qwen.safetensors")
    out = tmp_path / "out"
    convert_checkpoint(comfy, out, base=base, vae=ae, text_encoder=text, shard_bytes=100_000)
    assert len(list(out.rglob("*-of-*.safetensors"))) > 6
    theirs = ZImagePipeline.from_pretrained(out, dtype=torch.bfloat16)
    ours = load_from_local_dir(out, device="cpu", dtype=torch.bfloat16)
    for name in MODELS:
        state = weights(origin, name)
        for model in (ours[name].state_dict(), getattr(theirs, name).state_dict()):
            for key, tensor in model.items():
                assert torch.equal(tensor, state["model." * (name == "text_encoder") + key]), key
    assert len(theirs.text_encoder.layers) == 3  # also the layer that is not used here


def test_same_tensors_give_the_same_bytes(origin, base, comfy, tmp_path):
    def digest(folder):
        return [
            (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]

    whole = foreign.save(foreign.transformer_state(origin), tmp_path / "diffusers.safetensors")
    digests = []
    for i, source in enumerate((comfy, whole, origin / "transformer")):
        convert_checkpoint(source, tmp_path / str(i), base=base)
        digests.append(digest(tmp_path / str(i)))
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, None])
def test_float32_checkpoint_to_another_dtype(tmp_path, dtype):
    """What shrinks the published Turbo from 33 to 20 GB."""
    source = make_checkpoint(tmp_path / "wide", dtype=torch.float32, seed=5, **SMALL)
    convert_checkpoint(source, tmp_path / "out", dtype=dtype)
    for name in MODELS:
        wide = weights(source, name)
        assert_same(
            weights(tmp_path / "out", name), {k: t.to(dtype or t.dtype) for k, t in wide.items()}
        )
    config = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype or torch.float32).removeprefix("torch.")


@pytest.mark.parametrize("form", ["float8", "scaled", "gguf"])
def test_quantised_becomes_bfloat16(origin, base, tmp_path, form):
    state = foreign.comfy_transformer(foreign.transformer_state(origin))
    path = tmp_path / ("t.gguf" if form == "gguf" else "t.safetensors")
    if form == "float8":
        foreign.save({key: t.to(torch.float8_e4m3fn) for key, t in state.items()}, path)
    elif form == "scaled":
        tensors, metadata, _ = foreign.scaled_fp8(state, old=False, skip=())
        foreign.save(tensors, path, metadata)
    else:
        import gguf

        kinds = {1: gguf.GGMLQuantizationType.F32}
        q8 = gguf.GGMLQuantizationType.Q8_0
        odd = gguf.GGMLQuantizationType.F16
        foreign.write_gguf(
            path, state, lambda _, t: kinds.get(t.ndim, odd if t.shape[-1] % 32 else q8)
        )
    done = convert_checkpoint(path, tmp_path / "out", base=base)
    assert done.models["transformer"].dtype == "bfloat16"
    ours = load_from_local_dir(base, device="cpu", dtype=torch.bfloat16, transformer=path)
    assert_same(weights(tmp_path / "out", "transformer"), dict(ours["transformer"].state_dict()))


def test_all_in_one_file_gives_all_models(origin, base, tmp_path):
    prefix = "text_encoders.qwen3_4b.transformer."
    state = {
        **foreign.prefixed(
            foreign.comfy_transformer(foreign.transformer_state(origin)), "model.diffusion_model."
        ),
        **foreign.prefixed(foreign.ldm_autoencoder(foreign.vae_state(origin)), "vae."),
        **foreign.prefixed(foreign.text_state(origin), prefix),
    }
    path = foreign.save(state, tmp_path / "all.safetensors")
    convert_checkpoint(path, tmp_path / "out", base=base)
    for name in MODELS:
        assert_same(weights(tmp_path / "out", name), weights(origin, name))


def test_without_a_base_only_models_are_written(
    zimage: CommandLine, origin, comfy, tmp_path, monkeypatch
):
    ended = zimage("weights", "convert", comfy, "out", code=5)
    assert f"{comfy}: was compared with the published configuration of Z-Image" in ended.err
    assert not (zimage.folder / "out").exists()
    published = tmp_path / "published"
    published.mkdir()
    for name in MODELS:
        shutil.copy(origin / name / "config.json", published / f"{name}.json")
    monkeypatch.setattr("zimage_core.checkpoint.PUBLISHED", published)
    ended = zimage("weights", "convert", comfy, "out", code=0)
    assert "the published configuration of Z-Image is used" in ended.err
    assert "it lacks model_index.json, scheduler, tokenizer, vae, text_encoder" in ended.out
    assert [path.name for path in (zimage.folder / "out").iterdir()] == ["transformer"]
    assert_same(weights(zimage.folder / "out", "transformer"), weights(origin, "transformer"))


def test_existing_out_is_refused_before_anything_is_read(zimage: CommandLine, base, tmp_path):
    (zimage.folder / "out").mkdir()
    ended = zimage("weights", "convert", "nowhere.safetensors", "out", "--base", base, code=2)
    assert "zimage weights: out: exists already; allowed: a folder that is yet to be made" in (
        ended.err
    )


def test_errors_of_the_source(zimage: CommandLine, base, origin, comfy):
    def refused(*arguments, code=5):
        ended = zimage("weights", "convert", *arguments, "--base", base, code=code)
        assert not (zimage.folder / "out").exists()
        return ended.err

    assert "nowhere.safetensors: file is missing" in refused("nowhere.safetensors", "out")
    comfy.write_bytes(comfy.read_bytes()[:-1])
    assert f"{comfy}: is truncated" in refused(comfy, "out")
    lora = foreign.save({"a.lora_A.weight": torch.ones(2, 2)}, zimage.folder / "l.safetensors")
    assert f"{lora}: holds no model of Z-Image" in refused(lora, "out")
    text = f"base is {str(base)!r}, but {origin} is a whole checkpoint, which needs none"
    assert text in refused(origin, "out", code=2)
    ae = foreign.save(foreign.vae_state(origin), zimage.folder / "ae.safetensors")
    assert "holds only vae, which another file gives" in refused(ae, "out", "--vae", ae, code=2)
    missing = zimage.folder / "none.safetensors"
    comfy.unlink()
    foreign.save(foreign.transformer_state(origin), comfy)
    assert f"{missing}: no such autoencoder" in refused(comfy, "out", "--vae", missing)


def test_disk_that_is_too_small(zimage: CommandLine, base, comfy, monkeypatch):
    free = type("Usage", (), {"free": 64 * 2**20})
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: free)
    ended = zimage("weights", "convert", comfy, "out", "--base", base, code=5)
    assert "1.5 MB are to be written, but only 67.1 MB are free" in ended.err
    assert not (zimage.folder / "out").exists()


def test_nothing_is_left_of_a_conversion_that_fails(base, comfy, tmp_path, monkeypatch):
    """A file that breaks while it is read, and Ctrl-C."""
    for error in (CheckpointError("broken"), KeyboardInterrupt()):

        def fail(*arguments, error=error, **keywords):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(conversion, "write_weights", fail)
            with pytest.raises(type(error)):
                convert_checkpoint(comfy, tmp_path / "sub" / "out", base=base)
        assert list((tmp_path / "sub").iterdir()) == []
