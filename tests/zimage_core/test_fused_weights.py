"""Layers that are joined: the same numbers, and parameters that everybody else finds as before."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from zimage_core import ZImagePipeline, load_from_local_dir
from zimage_core.fused_weights import fuse, fused_rows, separate
from zimage_core.lora_switcher import LoraSwitcher
from zimage_core.tiny.make import make_checkpoint
from zimage_core.upcasting import in_float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("fused") / "model", seed=0)


def load(folder: Path, **arguments: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "fuse_weights": True}
    return load_from_local_dir(folder, **(chosen | arguments))


def denoise(components: dict[str, Any]) -> Tensor:
    """Latents of two images whose captions differ in length."""
    pipeline, draw = ZImagePipeline(**components), Generator().manual_seed(1)
    width = pipeline.transformer.config.cap_feat_dim
    return pipeline.denoise(
        [torch.randn(n, width, generator=draw) for n in (20, 40)],
        height=64,
        width=96,
        num_inference_steps=2,
        generators=[Generator().manual_seed(i) for i in range(2)],
    )


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).abs().max() / expected.abs().max()).item()


def share_memory(model: Any) -> bool:
    """Whether every joined weight is what its layers' parameters lie in."""
    return all(
        joined.weight.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()
        for joined in fused_rows(model)
        for layer in joined.layers
    )


def test_what_is_joined(folder: Path) -> None:
    model = load(folder)["transformer"]
    blocks = [*model.noise_refiner, *model.context_refiner, *model.layers]
    assert len(fused_rows(model)) == 2 * len(blocks)
    assert share_memory(model)
    assert fused_rows(load(folder, fuse_weights=None)["transformer"]) == []


def test_same_latents(folder: Path) -> None:
    plain = load(folder, fuse_weights=False)
    joined = load(folder)
    assert distance(denoise(joined), denoise(plain)) < 1e-6
    # They are what computes: without them it would be something else.
    with torch.no_grad():
        for rows in fused_rows(joined["transformer"]):
            rows.weight.copy_(rows.weight.flip(0))
    assert distance(denoise(joined), denoise(plain)) > 1e-3


def test_saved_as_before(folder: Path, tmp_path: Path) -> None:
    plain = load(folder, fuse_weights=False)["transformer"].state_dict()
    save_file(load(folder)["transformer"].state_dict(), tmp_path / "joined.safetensors")
    saved = load_file(tmp_path / "joined.safetensors")
    assert saved.keys() == plain.keys()
    assert all(torch.equal(saved[key], plain[key]) for key in plain)


class Mirroring:
    """An adapter that adds the rows of some weights in reverse: norms do not undo that."""

    parameters = ("layers.0.attention.to_v.weight", "layers.1.feed_forward.w3.weight")

    def delta(self, parameter: str, weight: Tensor) -> Tensor:
        return weight.flip(0)


@pytest.mark.parametrize("offload", ["none", "model", "block"])
def test_adapters_write_into_what_is_joined(folder: Path, offload: str) -> None:
    joined, plain = load(folder, offload=offload), load(folder, fuse_weights=False)
    before = denoise(joined)
    switchers = [LoraSwitcher(c["transformer"], {"mirror": Mirroring()}) for c in (joined, plain)]
    for switcher in switchers:
        switcher.apply({"mirror": 1.0})
    changed = denoise(joined)
    assert distance(changed, before) > 1e-3
    assert distance(changed, denoise(plain)) < 1e-6
    for switcher in switchers:
        switcher.apply({})
    assert torch.equal(denoise(joined), before)


@pytest.mark.parametrize("offload", ["phase", "model", "block"])
def test_offloading_is_bit_equal(folder: Path, offload: str) -> None:
    assert torch.equal(denoise(load(folder, offload=offload)), denoise(load(folder)))


def test_cast_and_loaded_anew(folder: Path) -> None:
    components = load(folder)
    model, first = components["transformer"], denoise(components)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.double()
    assert share_memory(model) and fused_rows(model)[0].weight.dtype == torch.float64
    model.float()
    assert torch.equal(denoise(components), first)
    with torch.no_grad():
        model.layers[0].attention.to_v.weight.zero_()
    assert distance(denoise(components), first) > 1e-3
    model.load_state_dict(state)
    assert torch.equal(denoise(components), first)


def test_float32_for_a_while(folder: Path) -> None:
    components = load(folder, dtype=torch.bfloat16)
    model, first = components["transformer"], denoise(components)
    upcast, plain = load(folder, dtype=torch.bfloat16), load(folder, fuse_weights=False)
    with in_float32(upcast["transformer"]):
        assert distance(denoise(upcast), denoise(plain)) < 0.05
    assert share_memory(upcast["transformer"])
    assert torch.equal(denoise(upcast), first)
    assert model.dtype == torch.bfloat16


def test_layers_that_scale_their_input_stay_apart(folder: Path) -> None:
    """In float16 `w3` is given less than `w1`."""
    model = load(folder, dtype=torch.float16)["transformer"]
    assert {len(joined.layers) for joined in fused_rows(model)} == {3}


def test_weights_in_8_bits_stay_apart(folder: Path) -> None:
    model = load(folder, quantization="int8")["transformer"]
    assert [fused_rows(block) for block in model.layers] == [[]] * len(model.layers)
    assert fused_rows(model.noise_refiner)


def test_apart_for_a_while(folder: Path) -> None:
    model = load(folder)["transformer"]
    joined = fused_rows(model)
    with separate(model):
        assert fused_rows(model) == []
    assert fused_rows(model) == joined
    fuse(model)  # again: no layer is lost
    assert len(fused_rows(model)) == len(joined) and share_memory(model)
