"""Checkpoints that take pictures: their files, what is loaded of them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from zimage_core import load_from_local_dir
from zimage_core.checkpoint import open_checkpoint
from zimage_core.config import CheckpointError
from zimage_core.conversion import convert_checkpoint
from zimage_core.download import needed_files
from zimage_core.loader import check_checkpoint, checkpoint_files
from zimage_core.memory import MemoryModel, Workload
from zimage_core.tiny.make import make_checkpoint
from zimage_core.weights import weights_fingerprint

FLOAT32: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
OWN = (
    "siglip/config.json",
    "siglip/model.safetensors",
    "siglip_processor/preprocessor_config.json",
)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "edit"
    return make_checkpoint(path, dtype=torch.float32, layers=1, siglip_dim=24)


@pytest.fixture
def folder(origin: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(origin, tmp_path / "edit"))


def edit_json(path: Path, **changes: Any) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def refused(folder: Path, *messages: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(folder)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize("size", [(96, 64), (64, 512), (333, 257), (1500, 900)])
def test_what_is_seen_equals_transformers(origin: Path, size: tuple[int, int]) -> None:
    """Processor and encoder, which here neither pads nor masks."""
    components = load_from_local_dir(origin, **FLOAT32)
    theirs = Siglip2VisionModel.from_pretrained(origin / "siglip").eval()
    processor = Siglip2ImageProcessorPil.from_pretrained(origin / "siglip_processor")
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    given = processor(images=[Image.fromarray(noise)], return_tensors="pt")
    rows, columns = given.spatial_shapes[0].tolist()
    patches = components["siglip_processor"](Image.fromarray(noise))
    assert patches.shape[:2] == (rows, columns)
    expected = given.pixel_values[0, : rows * columns].view_as(patches)
    assert (patches - expected).abs().max() < 1e-5
    with torch.no_grad():
        seen = components["siglip"](patches)
        states = theirs(**given).last_hidden_state[0, : rows * columns]
    expected = states.view(rows, columns, -1)
    assert (seen - expected).abs().max() / expected.abs().max() < 1e-5


def test_the_grid_is_that_of_transformers_for_many_sizes(origin: Path) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import (
        get_image_size_for_max_num_patches as reference,
    )

    processor = load_from_local_dir(origin, **FLOAT32)["siglip_processor"]
    sizes = np.random.default_rng(0).integers(16, 4000, (60, 2)).tolist()
    for height, width in sizes:
        rows, columns = processor.grid(height, width)
        assert (16 * rows, 16 * columns) == reference(height, width, 16, 64)


def test_files_count_and_the_pooling_head_is_not_loaded(origin: Path, folder: Path) -> None:
    files = {path.relative_to(origin).as_posix() for path in checkpoint_files(origin)}
    assert files >= set(OWN)
    assert set(needed_files([*files, "siglip/pytorch_model.bin"])) == files
    path = folder / "siglip" / "model.safetensors"
    state = load_file(path)
    without = {key: x for key, x in state.items() if not key.startswith("head.")}
    assert len(without) < len(state)
    loaded = load_from_local_dir(folder, **FLOAT32)["siglip"].state_dict()
    assert set(loaded) == set(without)
    assert all(torch.equal(loaded[key], without[key]) for key in without)
    summary = check_checkpoint(folder)
    assert summary.num_parameters["siglip"] == sum(x.numel() for x in without.values())
    # As transformers 4 names the tensors, and without the head.
    save_file({f"vision_model.{key}": x for key, x in without.items()}, path)
    again = load_from_local_dir(folder, **FLOAT32)["siglip"].state_dict()
    assert all(torch.equal(again[key], without[key]) for key in without)


@pytest.mark.parametrize("name", OWN)
def test_files_are_needed_and_part_of_the_fingerprint(folder: Path, name: str) -> None:
    before = weights_fingerprint(folder)
    path = folder / name
    path.write_bytes(path.read_bytes() + b" ")
    assert weights_fingerprint(folder) != before
    path.unlink()
    refused(folder, str(path.parent if path.suffix == ".safetensors" else path))
    with pytest.raises(CheckpointError, match="siglip"):
        checkpoint_files(folder)


def test_parts_that_do_not_fit(folder: Path) -> None:
    index, config = folder / "model_index.json", folder / "transformer" / "config.json"
    vision, processor = folder / OWN[0], folder / OWN[2]
    edit_json(index, _class_name="ZImagePipeline")
    check_checkpoint(folder)  # what it is called does not matter
    edit_json(index, siglip=...)
    refused(folder, f"{index}: siglip is None; allowed: Siglip2VisionModel")
    edit_json(index, siglip_processor=...)
    refused(folder, f"{config}: siglip_feat_dim is 24, but {index} does not name siglip")
    edit_json(
        index,
        siglip=["transformers", "Siglip2VisionModel"],
        siglip_processor=["transformers", "Siglip2ImageProcessorFast"],
    )
    check_checkpoint(folder)
    edit_json(processor, patch_size=8)
    refused(folder, f"{processor}: patch_size is 8, but {vision} has 16")
    edit_json(processor, patch_size=16)
    edit_json(vision, hidden_size=32)
    refused(
        folder,
        f"{vision}: hidden_size is 32, but the transformer's siglip_feat_dim is 24",
        "has shape [24, 768], but config.json asks for [32, 768]",
    )


def test_a_plain_transformer_beside_an_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", dtype=torch.float32, layers=1)
    shutil.rmtree(folder / "transformer")
    shutil.copytree(plain / "transformer", folder / "transformer")
    refused(folder, "siglip_feat_dim is None, but", "names siglip, which sees the pictures")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (OWN[0], {"colour": 1}, "unknown key 'colour' with value 1"),
        (OWN[0], {"num_patches": 15}, "num_patches is 15, but must be a square"),
        (
            OWN[0],
            {"num_attention_heads": 5},
            "hidden_size 24 must be a multiple of num_att",
        ),
        (OWN[0], {"hidden_act": "relu"}, "hidden_act is 'relu'; allowed: \"gelu_pytorch_tanh\""),
        (
            OWN[0],
            {"model_type": "siglip_vision_model"},
            "model_type is 'siglip_vision_model'",
        ),
        (OWN[0], {"hidden_size": ...}, "missing key 'hidden_size'"),
        (OWN[2], {"auto_map": {"AutoImageProcessor": "x.Y"}}, "unknown key 'auto_map'"),
        (OWN[2], {"image_processor_type": "Mine"}, "image_processor_type is 'Mine'; allowed"),
        (
            OWN[2],
            {"image_std": [0.5, 0.5, 0]},
            "image_std is [0.5, 0.5, 0]; allowed: a list of",
        ),
        (OWN[2], {"resample": 9}, "resample is 9; allowed: 0 or 1 or 2"),
        (OWN[2], {"do_normalize": False}, "do_normalize is False; allowed: true"),
        (OWN[2], {"max_num_patches": "many"}, "max_num_patches is 'many'; allowed: a whole"),
        (
            OWN[2],
            {"max_num_patches": 10**7},
            "max_num_patches is 10000000; allowed: a",
        ),
    ],
)
def test_configurations_are_read_strictly(
    folder: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    edit_json(folder / name, **changes)
    refused(folder, f"{folder / name}: {message}")


def test_configurations_as_transformers_writes_them(folder: Path) -> None:
    """With all that has no effect here."""
    Siglip2VisionModel.from_pretrained(folder / "siglip").config.save_pretrained(folder / "siglip")
    Siglip2ImageProcessorPil.from_pretrained(folder / "siglip_processor").save_pretrained(
        folder / "siglip_processor"
    )
    check_checkpoint(folder)


def test_tensors_are_missing_unexpected_or_a_pickle(folder: Path) -> None:
    path = folder / OWN[1]
    state = load_file(path)
    state["head.extra"] = torch.zeros(1)
    state["head.probe"] = torch.zeros(1, 1, 5)
    del state["encoder.layers.1.mlp.fc2.bias"]
    save_file(state, path)
    refused(
        folder,
        f"{path}: missing tensor 'encoder.layers.1.mlp.fc2.bias' of shape [24]",
        f"{path}: unexpected tensor 'head.extra'",
        f"{path}: tensor 'head.probe' has shape [1, 1, 5], but config.json asks for [1, 1, 24]",
    )
    path.rename(path.with_name("pytorch_model.bin"))
    refused(folder, "pickle")


def test_a_tokenizer_without_marks_of_pictures_is_refused(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|vision_end|>", "<|vision_stop|>"))
    with pytest.raises(CheckpointError, match=r"lacks <\|vision_end\|>, between which pictures"):
        load_from_local_dir(folder, **FLOAT32)


def test_converting_keeps_what_takes_pictures(folder: Path, tmp_path: Path) -> None:
    out = convert_checkpoint(folder, tmp_path / "out", dtype=torch.float16).out
    loaded, origin = (load_from_local_dir(path, **FLOAT32) for path in (out, folder))
    assert loaded["siglip_processor"].config == origin["siglip_processor"].config
    expected = {key: x.half().float() for key, x in origin["siglip"].state_dict().items()}
    assert all(torch.equal(x, expected[k]) for k, x in loaded["siglip"].state_dict().items())
    assert set(load_file(out / OWN[1])) == set(load_file(folder / OWN[1]))


def test_memory_counts_encoder_and_pictures(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    configs = (
        checkpoint.transformer_config,
        checkpoint.autoencoder_config,
        checkpoint.text_encoder_config,
    )
    model = MemoryModel(*configs, torch.float32, vision=checkpoint.vision_config)
    plain, edit = (
        model.account(Workload(64, 64, caption_tokens=32, num_pictures=n), "none") for n in (0, 2)
    )
    num_bytes = 4 * sum(check_checkpoint(folder).num_parameters.values())
    assert {stage.weights for stage in (*plain.stages, *edit.stages)} == {num_bytes}
    assert [stage.name for stage in edit.stages] == ["encode", "see", "start", "denoise", "decode"]
    of = {stage.name: stage.activations for stage in edit.stages}
    assert (
        of["denoise"] > 10 * plain.stages[1].activations
    )  # pictures of 1024 x 1024 beside 64 x 64
    with pytest.raises(ValueError, match="these models take no pictures"):
        MemoryModel(*configs, torch.float32).account(Workload(64, 64, num_pictures=1), "none")
