"""Stages and `generate` against diffusers' pipeline on the same weights, in float32."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from flash_packages import BACKENDS, MODULES, install
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zimage_core import attention as attention_module
from zimage_core import layers
from zimage_core.config import TransformerConfig
from zimage_core.generation import generate
from zimage_core.loader import load_from_local_dir
from zimage_core.padding import Padding
from zimage_core.pipeline import ZImagePipeline
from zimage_core.scheduler import FlowMatchEulerDiscreteScheduler
from zimage_core.tiny.make import make_checkpoint
from zimage_core.transformer import ZImageTransformer2DModel

TINY = TransformerConfig(
    all_patch_size=(2,),
    all_f_patch_size=(1,),
    in_channels=16,
    dim=64,
    n_layers=3,
    n_refiner_layers=2,
    n_heads=2,
    n_kv_heads=2,
    norm_eps=1e-5,
    qk_norm=True,
    cap_feat_dim=48,
    rope_theta=256.0,
    t_scale=1000.0,
    axes_dims=(8, 12, 12),
    axes_lens=(1024, 512, 512),
)
OTHER_SHAPES: list[dict[str, Any]] = [
    {"n_heads": 4, "n_kv_heads": 4, "axes_dims": (4, 6, 6), "n_refiner_layers": 1},
    {"axes_dims": (16, 8, 8), "axes_lens": (1536, 64, 32), "qk_norm": False},
    {"dim": 384, "n_heads": 3, "n_kv_heads": 3, "axes_dims": (32, 48, 48), "n_layers": 1},
]


def make_pipeline(shift: dict[str, Any] | None = None, **shape: Any) -> ZImagePipeline:
    """Random transformer and no text encoder: enough for `denoise`."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(dataclasses.replace(TINY, **shape)).eval()
    for name, parameter in transformer.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.8, std=0.3)
    vae: Any = SimpleNamespace(config=SimpleNamespace(block_out_channels=(1, 1, 1, 1)))
    nothing: Any = None
    scheduler = FlowMatchEulerDiscreteScheduler(**(shift or {"shift": 3.0}))
    return ZImagePipeline(transformer, vae, nothing, nothing, scheduler)


def make_reference(pipeline: ZImagePipeline) -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        **dataclasses.asdict(pipeline.transformer.config)
    )
    transformer.load_state_dict(pipeline.transformer.state_dict(), strict=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**dataclasses.asdict(pipeline.scheduler))
    reference = diffusers.ZImagePipeline(
        scheduler=scheduler,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.to(pipeline.dtype).eval(),
    )
    reference.set_progress_bar_config(disable=True)
    return reference


def features(lengths: Sequence[int], seed: int = 1) -> list[Tensor]:
    generator = Generator().manual_seed(seed)
    return [3 * torch.randn(n, TINY.cap_feat_dim, generator=generator) for n in lengths]


def seeded(num_images: int, first: int = 100) -> list[Generator]:
    return [Generator().manual_seed(first + i) for i in range(num_images)]


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((actual.float() - expected.float()).abs().max() / expected.abs().max()).item()


def run_reference(
    reference: Any, positive: list[Tensor], negative: list[Tensor] | None, **arguments: Any
) -> Tensor:
    dtype = reference.transformer.dtype
    images: Tensor = reference(
        prompt_embeds=[embeds.to(dtype) for embeds in positive],
        negative_prompt_embeds=negative and [embeds.to(dtype) for embeds in negative],
        generator=seeded(len(positive)),
        output_type="latent",
        **arguments,
    ).images
    return images


GUIDED = {"guidance_scale": 4.0, "num_inference_steps": 4, "height": 128, "width": 96}


@pytest.mark.parametrize(
    ("lengths", "negative_lengths", "arguments"),
    [
        ([31], None, {"num_inference_steps": 8, "height": 128, "width": 128}),
        ([32], None, {"num_inference_steps": 1, "height": 64, "width": 64}),
        ([33, 31, 32], None, {"num_inference_steps": 5, "height": 80, "width": 208}),
        ([500, 700], None, {"num_inference_steps": 3, "height": 208, "width": 48}),
        ([20], [20], GUIDED),
        ([40], [10], GUIDED),
        ([40, 20, 700, 64], [10, 10, 33, 70], GUIDED),
        ([40, 20], [10, 33], {**GUIDED, "cfg_normalization": True}),
        ([40, 20], [10, 33], {**GUIDED, "cfg_normalization": 0.6}),
        ([40, 20], [10, 33], {**GUIDED, "cfg_normalization": 50.0}),
        ([40, 20], [10, 33], {**GUIDED, "cfg_truncation": 0.2}),
        ([40, 20], [10, 33], {**GUIDED, "cfg_truncation": 0.0}),
        ([40, 20], [10, 33], {**GUIDED, "cfg_truncation": -1.0}),
        ([40, 20], [10, 33], {**GUIDED, "cfg_truncation": None}),
        ([40, 20], [10, 33], {**GUIDED, "cfg_truncation": 0.2, "cfg_normalization": True}),
        ([40, 20], [10, 33], {**GUIDED, "guidance_scale": 0.7}),
    ],
    ids=str,
)
def test_denoise_equals_diffusers(
    lengths: list[int], negative_lengths: list[int] | None, arguments: dict[str, Any]
) -> None:
    pipeline = make_pipeline()
    positive = features(lengths)
    negative = None if negative_lengths is None else features(negative_lengths, seed=2)
    arguments = {"guidance_scale": 0.0, **arguments}
    expected = run_reference(make_reference(pipeline), positive, negative, **arguments)
    actual = pipeline.denoise(
        positive, negative_prompt_embeds=negative, generators=seeded(len(lengths)), **arguments
    )
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    assert distance(actual, expected) < 1e-5


@pytest.mark.parametrize(
    "shift",
    [
        {"shift": 1.0},
        {"shift": 6.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "base_shift": 0.2, "max_shift": 3.0, "shift": 3.0},
    ],
    ids=str,
)
def test_schedules_equal_diffusers(shift: dict[str, Any]) -> None:
    pipeline = make_pipeline(shift)
    positive, negative = features([40, 20]), features([10, 33], seed=2)
    expected = run_reference(make_reference(pipeline), positive, negative, **GUIDED)
    actual = pipeline.denoise(
        positive, negative_prompt_embeds=negative, generators=seeded(2), **GUIDED
    )
    assert distance(actual, expected) < 1e-5


@pytest.mark.parametrize("shape", OTHER_SHAPES, ids=str)
def test_architectures_equal_diffusers(shape: dict[str, Any]) -> None:
    pipeline = make_pipeline(**shape)
    positive, negative = features([31, 65]), features([32, 10], seed=2)
    expected = run_reference(make_reference(pipeline), positive, negative, **GUIDED)
    actual = pipeline.denoise(
        positive, negative_prompt_embeds=negative, generators=seeded(2), **GUIDED
    )
    assert distance(actual, expected) < 1e-5


def test_guidance_options_change_the_result() -> None:
    """Parity of options that do nothing would prove nothing."""
    pipeline = make_pipeline()
    positive, negative = features([40, 20]), features([10, 33], seed=2)

    def run(**changes: Any) -> Tensor:
        return pipeline.denoise(
            positive,
            negative_prompt_embeds=negative,
            generators=seeded(2),
            **{**GUIDED, **changes},
        )

    plain = run()
    for changes in (
        {"guidance_scale": 0.0},
        {"guidance_scale": 3.0},
        {"cfg_normalization": True},
        {"cfg_normalization": 0.6},
        {"cfg_truncation": 0.2},
    ):
        assert distance(run(**changes), plain) > 1e-3, changes
    assert torch.equal(run(cfg_normalization=50.0), plain)
    assert torch.equal(run(cfg_truncation=None), plain)
    assert torch.equal(run(cfg_truncation=2.0), plain)


def test_a_batch_equals_its_images() -> None:
    pipeline = make_pipeline()
    positive = features([31, 33, 500, 20, 64])
    negative = features([10, 10, 10, 40, 700], seed=2)
    generators = seeded(5)
    together = pipeline.denoise(
        positive, negative_prompt_embeds=negative, generators=generators, **GUIDED
    )
    for i, generator in enumerate(seeded(5)):
        alone = pipeline.denoise(
            positive[i : i + 1],
            negative_prompt_embeds=negative[i : i + 1],
            generators=[generator],
            **GUIDED,
        )
        assert distance(together[i : i + 1], alone) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_attention_is_masked(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Whatever the lengths of captions: groups of one length, so that no kernel packs or masks."""
    install(monkeypatch)
    masks: list[Padding | None] = []

    def spy(
        q: Tensor, k: Tensor, v: Tensor, padding: Padding | None = None, backend: str | None = None
    ) -> Tensor:
        masks.append(padding)
        return attention_module.attention(q, k, v, padding, backend)

    monkeypatch.setattr(layers, "attention", spy)
    pipeline = make_pipeline()
    pipeline.transformer.set_attention_backend(backend)
    positive, negative = features([31, 33, 20]), features([10, 70, 40], seed=2)
    actual = pipeline.denoise(
        positive, negative_prompt_embeds=negative, generators=seeded(3), **GUIDED
    )
    assert masks
    assert all(mask is None for mask in masks)
    expected = run_reference(make_reference(pipeline), positive, negative, **GUIDED)
    assert distance(actual, expected) < 1e-5


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Record the first argument of each call of a method."""
    calls: list[Any] = []
    original: Callable[..., Any] = getattr(owner, name)

    def spy(first: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(first)
        return original(first, *args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    return calls


def test_nothing_is_computed_more_often_than_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make_pipeline()
    transformer = pipeline.transformer
    refined = count_calls(monkeypatch, transformer.context_refiner[0], "forward")
    times = count_calls(monkeypatch, transformer.t_embedder, "forward")
    modulated = count_calls(monkeypatch, transformer.layers[0], "modulation")
    angles = count_calls(monkeypatch, transformer._rotaries, "of")
    one, negative = features([20])[0], features([10], seed=2)[0]

    def denoise(**changes: Any) -> Tensor:
        arguments = GUIDED | changes
        return pipeline.denoise(
            [one] * 3, negative_prompt_embeds=[negative] * 3, generators=seeded(3), **arguments
        )

    first = denoise()
    # Two distinct captions of one length for six entries and four steps; one time for each step.
    assert [x.shape[0] for x in refined] == [2]
    assert [time.shape for time in times] == [(1,)] * 4
    assert [embedded.shape[0] for embedded in modulated] == [1] * 4
    # Positions of captions, of the image behind them, and of both.
    assert len(angles) == 3
    # Of the next batch only what depends on its prompts.
    assert torch.equal(denoise(), first)
    assert len(times) == len(modulated) == 4
    assert len(refined) == 2 and len(angles) == 4
    denoise(num_inference_steps=3)
    assert len(times) == len(modulated) == 7


@pytest.mark.parametrize(
    "name",
    [
        "t_embedder.mlp.0.weight",
        "noise_refiner.0.adaLN_modulation.0.bias",
        "layers.1.adaLN_modulation.0.weight",
        "layers.1.attention_norm1.weight",
        "layers.0.attention_norm2.weight",
        "layers.0.ffn_norm1.weight",
        "layers.0.ffn_norm2.weight",
        "all_final_layer.2-1.adaLN_modulation.1.weight",
    ],
)
def test_a_weight_that_changes_changes_the_next_image(name: str) -> None:
    """As an adapter that is put in and taken out: nothing of the old weights is remembered."""
    pipeline = make_pipeline()

    def denoise() -> Tensor:
        return pipeline.denoise(
            features([20]), generators=seeded(1), num_inference_steps=2, height=64, width=64
        )

    weight = pipeline.transformer.get_parameter(name)
    own, first = weight.clone(), denoise()
    with torch.no_grad():
        weight.mul_(1.5)
    changed = denoise()
    assert not torch.equal(changed, first)
    pipeline.transformer.forget()
    assert torch.equal(denoise(), changed)
    with torch.no_grad():
        weight.copy_(own)
    assert torch.equal(denoise(), first)


class Operators(TorchDispatchMode):
    """Records the operators that run between the first step and the last."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.names is not None:
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loop_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Guided, with captions of four lengths; the arithmetic of stand-ins is not looked into."""
    install(monkeypatch)
    pipeline = make_pipeline()
    pipeline.transformer.set_attention_backend(backend)
    steps: list[int] = []
    with Operators() as operators:

        def on_step(step: int) -> None:
            steps.append(step)
            operators.names = set() if operators.names is None else operators.names

        pipeline.denoise(
            features([40, 20]),
            negative_prompt_embeds=features([10, 33], seed=2),
            generators=seeded(2),
            cfg_normalization=0.6,
            cfg_truncation=0.2,
            on_step=on_step,
            **GUIDED,
        )
    assert steps == [0, 1, 2, 3]
    assert operators.names is not None
    own = {"_native_flash": "native_flash", "flash": "flash", "_flash_3": "flash_3"}
    assert own.get(backend, "_scaled_dot_product_flash_attention_for_cpu") in operators.names
    # Reading a number back, sizes that depend on data, and tensors made of Python numbers.
    waiting = {"_local_scalar_dense", "item", "equal", "nonzero", "masked_select", "lift_fresh"}
    assert operators.names & waiting == set()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loop_runs_on_tensors_without_memory(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Whatever reads a number back from the device raises here."""
    install(monkeypatch)
    pipeline = make_pipeline()
    pipeline.transformer.set_attention_backend(backend)
    pipeline.transformer.to("meta")
    latents = pipeline.denoise(
        features([40, 20]),
        negative_prompt_embeds=features([10, 33], seed=2),
        generators=seeded(2),
        cfg_normalization=0.6,
        cfg_truncation=0.2,
        **GUIDED,
    )
    assert latents.device.type == "meta"
    assert latents.shape == (2, 16, 16, 12)


def test_bfloat16_stays_near_float32() -> None:
    pipeline = make_pipeline()
    positive, negative = features([40, 20]), features([10, 33], seed=2)

    def run() -> Tensor:
        return pipeline.denoise(
            positive, negative_prompt_embeds=negative, generators=seeded(2), **GUIDED
        )

    exact = run()
    pipeline.transformer.bfloat16()
    rounded = run()
    assert rounded.dtype == torch.float32
    expected = run_reference(make_reference(pipeline), positive, negative, **GUIDED)
    error = (rounded - exact).norm() / exact.norm()
    assert error < 0.02
    assert error < 1.2 * (expected - exact).norm() / exact.norm()


def test_noise_may_be_given() -> None:
    pipeline = make_pipeline()
    noise = torch.cat([torch.randn(1, 16, 16, 12, generator=g) for g in seeded(2)])
    before = noise.clone()
    arguments: dict[str, Any] = {"height": 128, "width": 96}
    actual = pipeline.denoise(features([20, 40]), latents=noise, **arguments)
    assert torch.equal(noise, before)
    expected = pipeline.denoise(features([20, 40]), generators=seeded(2), **arguments)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 100}, "height: 100 must be a multiple of 16; nearest: 96 or 112"),
        ({"width": 1030}, "width: 1030 must be a multiple of 16; nearest: 1024 or 1040"),
        ({"width": 7}, "width: 7 must be a multiple of 16; nearest: 16"),
        ({"height": 0}, "height: 0 must be a multiple of 16; nearest: 16"),
        ({"height": 128 * 80}, "positions for 512x512"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0 must be at least 1"),
        ({"guidance_scale": -1.0}, r"guidance_scale: -1.0 must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale: nan must be"),
        ({"guidance_scale": 1.0}, "negative_prompt_embeds: needed where guidance_scale is 1.0"),
        (
            {"guidance_scale": 1.0, "negative_prompt_embeds": features([5])},
            "negative_prompt_embeds: 1 for 2 prompt_embeds",
        ),
        ({"cfg_normalization": -0.5}, "cfg_normalization: -0.5 must be a number of at least 0"),
        ({"generators": seeded(3)}, "3 generators for 2 images"),
        ({"generators": None}, "exactly one of the two is needed"),
        ({"latents": torch.zeros(2, 16, 16, 16)}, "exactly one of the two is needed"),
        (
            {"generators": None, "latents": torch.zeros(2, 16, 16, 12)},
            r"latents: shape \(2, 16, 16, 12\) must be \(2, 16, 16, 16\)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_denoise_refuses(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"height": 128, "width": 128, "generators": seeded(2), **changes}
    with pytest.raises(ValueError, match=message):
        make_pipeline().denoise(features([20, 40]), **arguments)


def test_denoise_refuses_captions_that_do_not_fit() -> None:
    pipeline = make_pipeline(axes_lens=(128, 64, 64))
    with pytest.raises(ValueError, match="97 tokens; this model takes 1 to 96"):
        pipeline.denoise(features([97]), height=64, width=64, generators=seeded(1))
    with pytest.raises(ValueError, match="prompt_embeds: at least one"):
        pipeline.denoise([], height=64, width=64, generators=[])


# From here on with a text encoder, a tokenizer and an autoencoder: `generate` as users call it.

# 729 tokens: longer than the default limit of 512.
LONG = "a very long sentence about a castle near the sea, " * 30
PROMPTS = ["a donut", "portrait of a smiling man with a red hat and round glasses", LONG]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "tiny", dtype=torch.float32, layers=2, refiners=2
    )


@pytest.fixture(scope="module")
def components(folder: Path) -> dict[str, Any]:
    return load_from_local_dir(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    pipeline = diffusers.ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SMALL: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 3}


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": PROMPTS[0]},
        {"prompt": PROMPTS},
        {"prompt": PROMPTS, "max_sequence_length": 1000},
        {"prompt": PROMPTS, "max_sequence_length": 20},
        {"prompt": PROMPTS, "num_images_per_prompt": 2},
        {"prompt": PROMPTS[:2], "guidance_scale": 3.0},
        {"prompt": PROMPTS[0], "guidance_scale": 3.0, "negative_prompt": "blurry"},
        {
            "prompt": PROMPTS,
            "guidance_scale": 3.0,
            "negative_prompt": [LONG, "", "a hat"],
            "num_images_per_prompt": 2,
            "cfg_normalization": True,
            "cfg_truncation": 0.4,
        },
    ],
    ids=lambda a: "-".join(key for key in a),
)
@pytest.mark.parametrize("one_generator", [True, False], ids=["one-generator", "list"])
def test_generate_equals_diffusers(
    components: dict[str, Any], reference: Any, arguments: dict[str, Any], one_generator: bool
) -> None:
    num_prompts = 1 if isinstance(arguments["prompt"], str) else len(arguments["prompt"])
    num_images = num_prompts * arguments.get("num_images_per_prompt", 1)

    def source() -> Generator | list[Generator]:
        return Generator().manual_seed(7) if one_generator else seeded(num_images)

    arguments = {"guidance_scale": 0.0, **SMALL, **arguments}
    # diffusers writes its template into the caller's list of prompts.
    expected = reference(
        **copy.deepcopy(arguments), generator=source(), output_type="latent"
    ).images
    before = copy.deepcopy(arguments)
    actual = generate(**components, **arguments, generator=source(), output_type="latent")
    assert arguments == before
    assert isinstance(actual, Tensor)
    assert actual.shape == expected.shape
    assert distance(actual, expected) < 1e-5


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_pixels_equal_diffusers(
    components: dict[str, Any], reference: Any, output_type: Any
) -> None:
    arguments: dict[str, Any] = {**SMALL, "guidance_scale": 0.0, "output_type": output_type}
    expected = reference(prompt=PROMPTS[:2], generator=seeded(2), **arguments).images
    actual = generate(**components, prompt=PROMPTS[:2], generator=seeded(2), **arguments)
    if output_type == "pil":
        assert [(image.mode, image.size) for image in actual] == [("RGB", (96, 64))] * 2
        for image, other in zip(actual, expected, strict=True):
            assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1
    else:
        assert type(actual) is type(expected)
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=1e-5)


def test_an_image_does_not_depend_on_its_neighbours(components: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {**SMALL, "guidance_scale": 3.0, "output_type": "latent"}
    together = generate(**components, prompt=PROMPTS, generator=seeded(3), **arguments)
    assert isinstance(together, Tensor)
    for i, generator in enumerate(seeded(3)):
        alone = generate(**components, prompt=PROMPTS[i], generator=[generator], **arguments)
        assert isinstance(alone, Tensor)
        assert distance(together[i : i + 1], alone) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_generate_with_every_backend(
    monkeypatch: pytest.MonkeyPatch, folder: Path, components: dict[str, Any], backend: str
) -> None:
    """Prompts of different lengths, guided: together with a backend as alone with the default."""
    calls = install(monkeypatch)
    others = load_from_local_dir(folder, device="cpu", dtype=torch.float32, attention=backend)
    arguments: dict[str, Any] = {**SMALL, "guidance_scale": 3.0, "output_type": "latent"}
    together = generate(**others, prompt=PROMPTS, generator=seeded(3), **arguments)
    assert isinstance(together, Tensor)
    assert {module for module, _, _ in calls.made} == {MODULES[b] for b in MODULES if b == backend}
    for i, generator in enumerate(seeded(3)):
        alone = generate(**components, prompt=PROMPTS[i], generator=[generator], **arguments)
        assert isinstance(alone, Tensor)
        assert distance(together[i : i + 1], alone) < 1e-5


def test_the_three_stages_are_generate(components: dict[str, Any]) -> None:
    pipeline = ZImagePipeline(**components)
    embeds = pipeline.encode(PROMPTS)
    latents = pipeline.denoise(embeds, generators=seeded(3), **SMALL)
    images = pipeline.decode(latents)
    assert images.dtype == torch.float32
    assert images.shape == (3, 3, 64, 96)
    assert 0.0 <= images.min() < images.max() <= 1.0
    expected = generate(
        **components, prompt=PROMPTS, generator=seeded(3), output_type="pt", **SMALL
    )
    assert isinstance(expected, Tensor)
    assert torch.equal(images, expected)


def test_encode_encodes_equal_prompts_once(components: dict[str, Any]) -> None:
    pipeline = ZImagePipeline(**components)
    encoded = pipeline.encode(["a donut", "a hat", "a donut"])
    assert encoded[0] is encoded[2]
    assert encoded[0] is not encoded[1]
    assert pipeline.encode([]) == []
    for embeds, prompt in zip(pipeline.encode(PROMPTS), PROMPTS, strict=True):
        alone = pipeline.encode([prompt])[0]
        assert embeds.shape == alone.shape
        assert distance(embeds, alone) < 1e-5


def test_caption_lengths_are_those_of_encode(components: dict[str, Any]) -> None:
    pipeline = ZImagePipeline(**components)
    assert pipeline.caption_lengths([LONG], 1000)[0] > 700
    for limit in (16, 512, 1000):
        lengths = pipeline.caption_lengths(PROMPTS, limit)
        encoded = pipeline.encode(PROMPTS, max_sequence_length=limit)
        assert lengths == [len(embeds) for embeds in encoded]
        assert max(lengths) <= limit


def test_the_default_noise_is_the_default_generator(components: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {**SMALL, "prompt": "a donut", "output_type": "latent"}
    torch.manual_seed(5)
    first = generate(**components, **arguments)
    second = generate(**components, **arguments)
    torch.manual_seed(5)
    again = generate(**components, **arguments)
    assert isinstance(first, Tensor)
    assert isinstance(again, Tensor)
    assert isinstance(second, Tensor)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 100}, "height: 100 must be a multiple of 16; nearest: 96 or 112"),
        ({"prompt": []}, "prompt: the list is empty"),
        ({"negative_prompt": ["a"]}, "negative_prompt: 1 for 2 prompts"),
        ({"generator": seeded(3)}, "3 generators for 2 images"),
        ({"generator": seeded(2), "num_images_per_prompt": 2}, "2 generators for 4 images"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: 0 must be at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0 must be at least 1"),
        ({"guidance_scale": -2.0}, "guidance_scale: -2.0 must be"),
        ({"cfg_normalization": float("inf")}, "cfg_normalization: inf must be"),
        ({"max_sequence_length": 0}, "max_sequence_length: 0 must be at least 1"),
        ({"output_type": "jpeg"}, "output_type: 'jpeg' must be one of pil, np, pt, latent"),
        ({"images": object()}, "images: this checkpoint takes no pictures to edit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_generate_refuses(
    components: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"prompt": ["a donut", "a hat"], **SMALL, **changes}
    with pytest.raises(ValueError, match=message):
        generate(**components, **arguments)


def test_importing_the_package_is_cheap_and_every_name_resolves() -> None:
    program = """
import sys, zimage_core
assert "torch" not in sys.modules
assert all(getattr(zimage_core, name).__name__ == name for name in zimage_core.__all__)
assert sorted(zimage_core.__all__) == dir(zimage_core)
try:
    zimage_core.Pipeline
except AttributeError as error:
    assert "no attribute 'Pipeline'" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_copy_of_a_model_has_a_memory_of_its_own() -> None:
    pipeline = make_pipeline()
    arguments: dict[str, Any] = {"num_inference_steps": 1, "height": 64, "width": 64}
    first = pipeline.denoise(features([20]), generators=seeded(1), **arguments)
    copied = make_pipeline()
    copied.transformer = pickle.loads(pickle.dumps(copy.deepcopy(pipeline.transformer)))
    with torch.no_grad():
        pipeline.transformer.get_parameter("layers.0.adaLN_modulation.0.weight").mul_(2)
    assert torch.equal(copied.denoise(features([20]), generators=seeded(1), **arguments), first)
