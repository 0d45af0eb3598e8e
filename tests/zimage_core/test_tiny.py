"""The maker of tiny checkpoints: same arguments, same bytes; diffusers loads what it writes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from zimage_core.tiny.make import Sizes, main, make_checkpoint
from zimage_core.tiny.tokenizer import captions, train_tokenizer

SMALL = {"layers": 1, "text_layers": 2, "vocab_size": 320, "vae_channels": (8, 8, 8, 8)}


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_same_arguments_give_the_same_bytes(tmp_path):
    first = contents(make_checkpoint(tmp_path / "a", seed=3, **SMALL))
    assert first == contents(make_checkpoint(tmp_path / "b", seed=3, **SMALL))
    other = contents(make_checkpoint(tmp_path / "c", seed=4, **SMALL))
    assert {name for name in first if first[name] != other[name]} == {
        "text_encoder/model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_diffusers_loads_it_and_makes_a_picture(tmp_path):
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(make_checkpoint(tmp_path / "a"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red apple",
        height=64,
        width=96,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert image.shape == (1, 3, 64, 96)
    assert image.isfinite().all()
    # Not saturated and not flat, or what is made with it would count as broken images.
    assert image.std() > 0.05
    assert ((image > 0) & (image < 1)).float().mean() > 0.5


def test_every_weight_is_random(tmp_path):
    folder = make_checkpoint(tmp_path / "a", dtype=torch.float32, **SMALL)
    for path in folder.rglob("*.safetensors"):
        for key, tensor in load_file(path).items():
            # A tensor of zeros or ones would hide that it is misplaced or left out.
            assert tensor.dtype == torch.float32
            assert tensor.std() > 0.01, key


def test_shards_hold_the_same_tensors(tmp_path):
    whole = make_checkpoint(tmp_path / "a", **SMALL)
    parts = make_checkpoint(tmp_path / "b", shard_size=40_000, **SMALL)
    for component in ("transformer", "text_encoder", "vae"):
        (file,) = (whole / component).glob("*.safetensors")
        reference = load_file(file)
        (index,) = (parts / component).glob("*.index.json")
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(path.name for path in (parts / component).glob("*.safetensors"))
        assert len(shards) > 1
        assert sorted(set(weight_map.values())) == shards
        assert shards[0].endswith(f"-00001-of-{len(shards):05d}.safetensors")
        found = {k: v for name in shards for k, v in load_file(parts / component / name).items()}
        assert found.keys() == reference.keys() == weight_map.keys()
        assert all(torch.equal(found[key], reference[key]) for key in reference)


def test_command_line(tmp_path, capsys):
    arguments = "--dim 32 --heads 4 --axes-dims 2,2,4 --layers 1 --text-layers 2 --dtype bfloat16"
    main([str(tmp_path / "a"), *arguments.split(), "--shift", "6", "--dynamic-shift"])
    assert "MB" in capsys.readouterr().out
    config = json.loads((tmp_path / "a/transformer/config.json").read_text())
    assert (config["dim"], config["axes_dims"], config["n_kv_heads"]) == (32, [2, 2, 4], 4)
    scheduler = json.loads((tmp_path / "a/scheduler/scheduler_config.json").read_text())
    assert (scheduler["shift"], scheduler["use_dynamic_shifting"]) == (6.0, True)
    (file,) = (tmp_path / "a/vae").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_refusals(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full: folder is not empty"):
        make_checkpoint(tmp_path / "full")
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; allowed: float16"):
        make_checkpoint(tmp_path / "a", dtype=torch.int8)
    with pytest.raises(ValueError, match="vocab_size is 200; must be 261 or more"):
        train_tokenizer(200)
    with pytest.raises(TypeError, match="depth"):
        make_checkpoint(tmp_path / "a", depth=3)


def test_tokenizer_knows_its_words_and_any_bytes():
    tokenizer = train_tokenizer(Sizes().vocab_size)
    # Lower-cased but else lossless, whatever the script.
    for text in ("Portrait avatar of a woman", "日本語 🦊\r\n\x00 ümlaut 12345"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text.lower()
    assert len(tokenizer.encode("portrait avatar of a woman with red hair").tokens) == 8
    start = tokenizer.encode("<|im_start|>user")
    assert start.tokens == ["<|im_start|>", "user"]
    assert len(set(captions(3000))) > 2400
