"""Step caching: off it is nothing, on it is pure, counted, near, and refused where it is no use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_files import FORMATS, train, write
from torch import Generator, Tensor

from zimage_core import LoraSwitcher, ZImagePipeline, generate, load_from_local_dir, step_cache
from zimage_core.batching import CaptionGroups
from zimage_core.guidance import Guidance
from zimage_core.lora import load_lora
from zimage_core.noise import draw_noise
from zimage_core.patchify import patchify, unpatchify
from zimage_core.step_cache import INTERVALS, MIN_STEPS, StepCache, computed_steps
from zimage_core.tiny.fidelity import compare
from zimage_core.tiny.make import make_checkpoint
from zimage_core.tiny.score import Question, make_questions, score_pictures
from zimage_core.tiny.vocabulary import load_vocabulary

TRAINED = Path(__file__).parents[2] / "data" / "checkpoints" / "z-image-tiny"
LONG = "a very long sentence about a castle near the sea, " * 3  # of another caption bucket
PROMPTS = ["a donut", LONG, "portrait of a smiling man with a red hat"]
STEPS = 24
SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": STEPS}
GUIDED: dict[str, Any] = {"guidance_scale": 3.0, "negative_prompt": ["blurry", LONG, ""]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step-cache") / "small"
    return make_checkpoint(
        folder, dtype=torch.float32, layers=2, dim=48, heads=2, axes_dims=(8, 8, 8)
    )


@pytest.fixture(scope="module")
def components(checkpoint: Path) -> dict[str, Any]:
    return load_from_local_dir(checkpoint, device="cpu", dtype=torch.float32)


def seeded(indices: range) -> list[Generator]:
    return [Generator().manual_seed(100 + i) for i in indices]


def latents(components: dict[str, Any], prompts: list[str] = PROMPTS, **arguments: Any) -> Tensor:
    arguments = {"generator": seeded(range(len(prompts))), **SMALL, **arguments}
    made = generate(**components, prompt=prompts, output_type="latent", **arguments)
    assert isinstance(made, Tensor)
    return made


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture
def ran(components: dict[str, Any]) -> Any:
    """Images that each main block has computed, by its number."""
    transformer, counts = components["transformer"], {}
    hooks = []
    for number, block in enumerate(transformer.layers):
        counts[number] = 0

        def count(_: Any, arguments: Any, number: int = number) -> None:
            counts[number] += len(arguments[0])

        hooks.append(block.register_forward_pre_hook(count))
    yield counts
    for hook in hooks:
        hook.remove()


def every_step(components: dict[str, Any], scale: float) -> Tensor:
    """Denoising written out, in which nothing can be left out."""
    pipeline = ZImagePipeline(**components)
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    shape = pipeline.latents_shape(len(PROMPTS), 32, 48)
    encoded = pipeline.encode([*PROMPTS, *GUIDED["negative_prompt"]])
    with torch.no_grad():
        captions = transformer.embed_captions(encoded)
        groups = CaptionGroups(transformer, captions, [0, 1, 2] * 2, *shape[-2:])
        sigmas = scheduler.sigmas(STEPS, image_seq_len=6)
        modulations = transformer.modulations(scheduler.model_times(sigmas))
        patches = patchify(draw_noise(shape, seeded(range(3))), transformer.patch_size)
        for i in range(STEPS):
            velocity = groups.velocity(patches, modulations[i])
            velocity = Guidance(scale=scale).combine(*velocity.chunk(2))
            patches = scheduler.step(-velocity, patches, sigmas, i)
    return unpatchify(patches, transformer.patch_size, *shape[-2:])


def test_off_is_bit_equal_to_evaluating_every_step(components: dict[str, Any]) -> None:
    expected = every_step(components, 3.0)
    assert torch.equal(latents(components, **GUIDED), expected)
    assert torch.equal(latents(components, cache=None, **GUIDED), expected)
    assert not torch.equal(latents(components, cache=2, **GUIDED), expected)


def test_a_plan_that_reuses_nothing_is_bit_equal_to_off(
    components: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = latents(components, **GUIDED)
    monkeypatch.setattr(step_cache, "_HEAD", 1.0)
    assert all(computed_steps([True] * STEPS, 2))
    assert torch.equal(latents(components, cache=2, **GUIDED), expected)


@pytest.mark.parametrize("cache", [2, 4])
@pytest.mark.parametrize("guidance", [{}, GUIDED], ids=["plain", "guided"])
def test_a_batch_equals_its_images_made_one_by_one(
    components: dict[str, Any], cache: int, guidance: dict[str, Any]
) -> None:
    together = latents(components, cache=cache, **guidance)
    for i, prompt in enumerate(PROMPTS):
        own = {**guidance}
        if guidance:
            own["negative_prompt"] = guidance["negative_prompt"][i]
        alone = latents(components, [prompt], cache=cache, generator=seeded(range(i, i + 1)), **own)
        difference = (together[i] - alone[0]).abs().max() / alone.abs().max()
        assert difference < 1e-5


def test_the_same_again_is_bit_equal(components: dict[str, Any]) -> None:
    """Nothing of one call is left for the next, whatever it was."""
    first = latents(components, cache=3, **GUIDED)
    latents(components, PROMPTS[:2], cache=2)
    assert torch.equal(latents(components, cache=3, **GUIDED), first)


@pytest.mark.parametrize("cache", INTERVALS)
def test_blocks_run_on_the_planned_steps_alone(
    components: dict[str, Any], ran: dict[int, int], cache: int
) -> None:
    planned = sum(computed_steps([True] * STEPS, cache))
    latents(components, cache=cache, **GUIDED)
    assert ran == {0: 2 * 3 * planned, 1: 2 * 3 * planned}
    assert planned < {2: 0.75, 3: 0.65, 4: 0.6}[cache] * STEPS


def test_every_step_is_reported(components: dict[str, Any]) -> None:
    pipeline, reported = ZImagePipeline(**components), []
    pipeline.denoise(
        pipeline.encode(["a donut"]),
        generators=seeded(range(1)),
        cache=4,
        on_step=reported.append,
        **SMALL,
    )
    assert reported == list(range(STEPS))


def test_where_guidance_ends_two_steps_are_computed_again(
    components: dict[str, Any], ran: dict[int, int]
) -> None:
    pipeline = ZImagePipeline(**components)
    sigmas = pipeline.scheduler.sigmas(STEPS, image_seq_len=6)
    times = pipeline.scheduler.model_times(sigmas).tolist()
    guided = [time <= 0.3 for time in times]
    computed = computed_steps(guided, 3)
    assert 8 < sum(guided) < STEPS - 8
    first = guided.index(False)
    assert computed[first] and computed[first + 1] and not all(computed)
    latents(components, cache=3, cfg_truncation=0.3, **GUIDED)
    expected = sum(3 * (1 + g) for g, c in zip(guided, computed, strict=True) if c)
    assert ran == {0: expected, 1: expected}


@pytest.mark.parametrize("cache", INTERVALS)
@pytest.mark.parametrize("steps", [MIN_STEPS, 28, 50, 101])
def test_first_and_last_steps_are_always_computed(cache: int, steps: int) -> None:
    for switch in range(steps + 1):  # wherever guidance ends
        computed = computed_steps([i < switch for i in range(steps)], cache)
        assert len(computed) == steps
        assert all(computed[:4]) and all(computed[-3:]) and not all(computed)
    assert all(computed_steps([True] * steps, None))


def test_a_reused_step_goes_on_by_half_of_the_slope() -> None:
    entries = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    velocities = [entries, entries + 1.0, entries - 7.0]
    cache = StepCache([True, True, False, False, True], [0.0, 0.1, 0.3, 0.5, 0.6])
    for step in (0, 1):
        assert cache.velocity(step, lambda step=step: velocities[step]) is velocities[step]

    def evaluate() -> Tensor:
        raise AssertionError("the transformer is run")

    assert torch.allclose(cache.velocity(2, evaluate), entries + 2.0)
    assert torch.allclose(cache.velocity(3, evaluate), entries + 3.0)
    assert cache.velocity(4, lambda: velocities[2]) is velocities[2]


def test_adapters_act_on_reused_steps_too(components: dict[str, Any], tmp_path: Path) -> None:
    model = components["transformer"]
    modules = ("layers.0.attention.to_q", "layers.1.feed_forward.w2")
    tensors = FORMATS["kohya, musubi-tuner"][0](train(model, modules, seed=1))
    file = write(tmp_path / "lora.safetensors", tensors)
    plain, cached = latents(components), latents(components, cache=2)
    switcher = LoraSwitcher(model, {"ink": load_lora(file, model)})
    switcher.apply({"ink": 1.0})
    changed, changed_cached = latents(components), latents(components, cache=2)
    switcher.apply({})
    assert distance(changed_cached, changed) < distance(changed_cached, plain)
    assert torch.equal(latents(components, cache=2), cached)
    assert not torch.equal(changed_cached, cached)


def test_a_starting_image_leaves_out_steps_before_the_head(
    components: dict[str, Any], ran: dict[int, int]
) -> None:
    image = torch.rand(1, 3, 32, 48, generator=Generator().manual_seed(2))
    arguments = {"num_inference_steps": 40, "image": image, "strength": 0.6, "cache": 2}
    made = latents(components, PROMPTS[:1], **arguments)
    planned = sum(computed_steps([False] * 24, 2))
    assert ran == {0: planned, 1: planned}
    assert (
        0 < distance(made, latents(components, PROMPTS[:1], **{**arguments, "cache": None})) < 0.1
    )
    message = r"cache: 2 for a run of 16 steps; allowed: None below 20 steps"
    with pytest.raises(ValueError, match=message):
        latents(components, PROMPTS[:1], **{**arguments, "strength": 0.4})


def test_blocks_that_are_streamed_give_the_same_bits(
    components: dict[str, Any], checkpoint: Path
) -> None:
    streamed = load_from_local_dir(checkpoint, device="cpu", dtype=torch.float32, offload="block")
    assert torch.equal(latents(streamed, cache=2, **GUIDED), latents(components, cache=2, **GUIDED))


@pytest.mark.parametrize(
    ("cache", "steps", "message"),
    [
        (2, 8, "cache: 2 for a run of 8 steps; allowed: None below 20 steps"),
        (2, MIN_STEPS - 1, "cache: 2 for a run of 19 steps; allowed: None below 20 steps"),
        (1, 28, "cache: 1 must be None or one of 2, 3, 4"),
        (5, 28, "cache: 5 must be None or one of 2, 3, 4"),
        (True, 28, "cache: True must be None or one of 2, 3, 4"),
    ],
)
def test_what_is_no_use_is_refused_before_any_work(
    components: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    cache: int,
    steps: int,
    message: str,
) -> None:
    monkeypatch.setattr(ZImagePipeline, "encode", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(ValueError, match=message):
        latents(components, num_inference_steps=steps, cache=cache)


def test_denoise_refuses_too(components: dict[str, Any]) -> None:
    pipeline = ZImagePipeline(**components)
    embeds = pipeline.encode(["a donut"])
    with pytest.raises(ValueError, match="cache: 2 for a run of 8 steps"):
        pipeline.denoise(
            embeds, generators=seeded(range(1)), height=32, width=48, num_inference_steps=8, cache=2
        )


@pytest.fixture(scope="module")
def draw() -> Callable[..., list[Any]]:
    """Pictures of the trained checkpoint."""
    trained = load_from_local_dir(TRAINED, device="cpu", dtype=torch.float32)

    def pictures(prompts: list[str], *, steps: int, cache: int | None) -> list[Any]:
        made = generate(
            **trained,
            prompt=prompts,
            height=128,
            width=128,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=seeded(range(len(prompts))),
            cache=cache,
        )
        return [np.asarray(image) for image in made]

    return pictures


def test_pictures_of_trained_weights_stay_near(draw: Callable[..., list[Any]]) -> None:
    prompts = ["portrait of a woman with red hair"]
    exact = draw(prompts, steps=28, cache=None)
    found = compare(draw(prompts, steps=28, cache=2), exact)
    assert found["psnr_worst"] > 35
    assert found["ssim_worst"] > 0.98


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_score_stays(draw: Callable[..., list[Any]]) -> None:
    questions: list[Question] = make_questions(load_vocabulary(), 24, seed="cache")
    prompts = [question.prompt for question in questions]
    scores = [
        score_pictures(questions, draw(prompts, steps=28, cache=cache)).overall
        for cache in (None, 2)
    ]
    assert scores[0] > 0.96
    assert scores[1] > scores[0] - 0.015  # 2 of some 150 attributes
