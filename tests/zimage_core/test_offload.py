"""Models that take turns on a device: the same bytes, one model's weights at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage_core import ZImagePipeline, generate, load_from_local_dir
from zimage_core.lora_switcher import LoraSwitcher
from zimage_core.offload import compute_device, put_away, streamed_blocks, use
from zimage_core.tiny.make import make_checkpoint
from zimage_core.weight_unit import WeightUnit

MODES = ("phase", "model", "block")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offload") / "model"
    return make_checkpoint(path, layers=3, refiners=2, text_layers=4, dtype=torch.float32)


def load(folder: Path, mode: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return load_from_local_dir(folder, device="cpu", dtype=dtype, offload=mode, **options)


def images(components: Any) -> Tensor:
    made = generate(
        **components,
        prompt=["a red fox", "a lighthouse at dusk, with a long description " * 4],
        negative_prompt="blurry",
        guidance_scale=2.0,
        num_inference_steps=3,
        height=64,
        width=96,
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
        output_type="pt",
    )
    assert isinstance(made, Tensor)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_bytes_are_those_without_offload(folder: Path, mode: str, dtype: torch.dtype) -> None:
    expected = images(load(folder, "none", dtype))
    components = load(folder, mode, dtype)
    assert torch.equal(images(components), expected)
    assert torch.equal(images(components), expected)  # and again, after all took their turn


@pytest.mark.parametrize("mode", MODES)
def test_one_model_at_a_time_is_on_the_device(folder: Path, mode: str) -> None:
    components = load(folder, mode)
    pipeline = ZImagePipeline(**components)
    models = [components[name] for name in ("text_encoder", "transformer", "vae")]
    at_home = {id(m): [p.data_ptr() for p in own(m, mode)] for m in models}
    seen = []
    for stage in (
        lambda: pipeline.encode(["a red fox"]),
        lambda: pipeline.denoise(
            [torch.zeros(5, 64)],
            height=64,
            width=64,
            num_inference_steps=1,
            generators=[torch.Generator().manual_seed(0)],
        ),
        lambda: pipeline.decode(torch.zeros(1, 16, 8, 8)),
    ):
        stage()
        seen.append([moved(m, at_home[id(m)], mode) for m in models])
    assert seen == [[True, False, False], [False, True, False], [False, False, True]]
    put_away(models[0])
    assert not any(moved(m, at_home[id(m)], mode) for m in models)


def own(model: Any, mode: str) -> list[torch.nn.Parameter]:
    """Parameters that are on the device as long as the model is."""
    put_away(model)
    if mode != "block":
        return list(model.parameters())
    blocks, _ = streamed_blocks(model)
    inner = {id(p) for block in blocks for p in block.parameters()}
    return [p for p in model.parameters() if id(p) not in inner]


def moved(model: Any, home: list[int], mode: str) -> bool:
    """Whether all of these weights are elsewhere; between home and elsewhere there is nothing."""
    places = [p.data_ptr() for p in model.parameters() if p.data_ptr() in home]
    assert len(places) in (0, len(home))
    return not places


def test_two_blocks_are_on_the_device_and_the_next_one_is_on_its_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = load(folder, "block")
    transformer = components["transformer"]
    blocks, restart = streamed_blocks(transformer)
    assert blocks == [
        *transformer.context_refiner,
        *transformer.noise_refiner,
        *transformer.layers,
    ]
    assert restart == 2
    number = {id(block): i for i, block in enumerate(blocks)}
    home = {i: block.attention.to_q.weight.data_ptr() for i, block in enumerate(blocks)}
    fetched: list[int] = []
    real = WeightUnit.copy_to

    def spy(unit: WeightUnit, buffer: Tensor) -> None:
        fetched.append(next((i for i, p in units.items() if p is unit._tensors[0]), -1))
        real(unit, buffer)

    units = {i: next(block.parameters()) for i, block in enumerate(blocks)}
    monkeypatch.setattr(WeightUnit, "copy_to", spy)
    order: list[tuple[int, list[int]]] = []
    slots: set[int] = set()
    for block in blocks:

        def inside(module: Any, arguments: Any) -> None:
            away = [
                i for i, b in enumerate(blocks) if b.attention.to_q.weight.data_ptr() != home[i]
            ]
            order.append((number[id(module)], away))
            slots.add(module.attention.to_q.weight.data_ptr())

        block.register_forward_pre_hook(inside)
    put_away(transformer)
    fetched.clear()
    pipeline = ZImagePipeline(**components)
    pipeline.denoise(
        [torch.zeros(5, 64)],
        height=64,
        width=64,
        num_inference_steps=2,
        generators=[torch.Generator().manual_seed(0)],
    )
    once = [0, 1, 2, 3, 4, 5, 6]
    assert [i for i, _ in order] == [*once, *once[2:]]
    assert all(away == [i] for i, away in order), "only the block that computes is away from home"
    assert len(slots) == 2
    streamed = [i for i in fetched if i >= 0]
    assert streamed == [*once, *once[2:], 2], "each once a pass, one ahead"


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_is_merged_wherever_the_weights_are(folder: Path, mode: str) -> None:
    class Ink:
        # The last one's block is fetched as soon as the transformer's turn begins.
        parameters = (
            "layers.0.attention.to_q.weight",
            "cap_embedder.1.weight",
            "context_refiner.0.attention.to_q.weight",
        )

        def delta(self, parameter: str, weight: Tensor) -> Tensor:
            return torch.full_like(weight, 0.25)

    plain = load(folder, "none")
    plain_switcher = LoraSwitcher(plain["transformer"], {"ink": Ink()})
    without = images(plain)
    plain_switcher.apply({"ink": 1.0})
    with_ink = images(plain)
    assert not torch.equal(without, with_ink)

    components = load(folder, mode)
    switcher = LoraSwitcher(components["transformer"], {"ink": Ink()})
    use(components["transformer"])
    switcher.apply({"ink": 1.0})  # while on the device
    assert torch.equal(images(components), with_ink)
    put_away(components["transformer"])
    switcher.apply({})  # while in host memory
    assert torch.equal(images(components), without)
    for scales in ({}, {"ink": 1.0}, {}):
        put_away(components["transformer"])
        use(components["transformer"])
        latents = []
        for owner, model in ((plain_switcher, plain), (switcher, components)):
            owner.apply(scales)
            latents.append(
                ZImagePipeline(**model).denoise(
                    [torch.ones(5, 64)],
                    height=64,
                    width=64,
                    num_inference_steps=2,
                    generators=[torch.Generator().manual_seed(0)],
                )
            )
        assert torch.equal(*latents)


@pytest.mark.parametrize("mode", MODES)
def test_an_error_leaves_the_weights_where_they_belong(folder: Path, mode: str) -> None:
    components = load(folder, mode)
    expected = images(components)
    block = components["transformer"].layers[1]
    hook = block.feed_forward.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="on purpose"):
        images(components)
    hook.remove()
    assert torch.equal(images(components), expected)


def fail(module: Any, arguments: Any) -> None:
    raise torch.OutOfMemoryError("on purpose")


def test_device_is_where_the_models_compute(folder: Path) -> None:
    components = load(folder, "phase")
    assert compute_device(components["vae"]) == CPU
    assert ZImagePipeline(**components).device == CPU
    assert compute_device(load(folder, "none")["vae"]) == CPU


def test_parameters_stay_the_same_objects(folder: Path) -> None:
    components = load(folder, "phase")
    transformer = components["transformer"]
    before = {name: id(p) for name, p in transformer.named_parameters()}
    images(components)
    assert {name: id(p) for name, p in transformer.named_parameters()} == before
    state = transformer.state_dict()
    plain = load(folder, "none")["transformer"].state_dict()
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[key], plain[key]) for key in state)


def test_wrong_modes_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="offload is 'disk'; allowed: none, phase, model, block"):
        load(folder, "disk")
    with pytest.raises(ValueError, match="compile is not possible with offload 'block'"):
        load(folder, "block", compile=True)


def test_tensor_classes_are_refused() -> None:
    class Quantised(Tensor):
        pass

    weight = torch.nn.Parameter(torch.zeros(2).as_subclass(Quantised), requires_grad=False)
    with pytest.raises(ValueError, match=r"a Quantised of shape .* cannot be offloaded"):
        WeightUnit([weight])
