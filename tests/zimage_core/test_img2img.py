"""Starting images, against diffusers' ZImageImg2ImgPipeline on the same weights, in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_pair import PipelinePair, distance, picture, seeded
from torch import Generator, Tensor

from zimage_core import ZImagePipeline, generate, load_from_local_dir
from zimage_core.images import from_input
from zimage_core.strength import first_step
from zimage_core.tiny.make import make_checkpoint

LONG = "a very long sentence about a castle near the sea, " * 10
PROMPTS = ["a donut", LONG, "portrait of a smiling man with a red hat"]
SMALL: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 4}
SHIFTS: dict[str, dict[str, Any]] = {
    "shift": {"shift": 3.0},
    "dynamic-shift": {"use_dynamic_shifting": True},
}


class Pair(PipelinePair):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, diffusers.ZImageImg2ImgPipeline, SMALL)
        self.pipeline = ZImagePipeline(**self.components)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / name
            shift: Any = {"dynamic_shift": True} if name == "dynamic-shift" else {"shift": 3.0}
            make_checkpoint(folder, dtype=torch.float32, layers=2, **shift)
            made[name] = Pair(folder)
        return made[name]

    return pair


@pytest.fixture(scope="module")
def pair(pairs: Callable[[str], Pair]) -> Pair:
    return pairs("shift")


GUIDED: dict[str, Any] = {
    "guidance_scale": 3.0,
    "negative_prompt": ["blurry", LONG, ""],
    "cfg_normalization": True,
    "cfg_truncation": 0.5,
}
CASES: dict[str, dict[str, Any]] = {
    "0.2": {"prompt": PROMPTS[0], "image": picture(), "strength": 0.2},
    "0.6": {"prompt": PROMPTS[0], "image": picture(), "strength": 0.6},
    "1.0": {"prompt": PROMPTS[0], "image": picture(), "strength": 1.0},
    "one image for three prompts": {"prompt": PROMPTS, "image": picture()},
    "an image for each prompt": {"prompt": PROMPTS, "image": [picture(i) for i in range(3)]},
    "guidance": {"prompt": PROMPTS, "image": [picture(i) for i in range(3)], **GUIDED},
    "guidance from the start": {"prompt": PROMPTS[0], "image": picture(), "guidance_scale": 2.0},
    "two images of one prompt": {
        "prompt": PROMPTS[1],
        "image": picture(),
        "num_images_per_prompt": 2,
    },
    "an image for each result": {
        "prompt": PROMPTS[:2],
        "image": [picture(i) for i in range(4)],
        "num_images_per_prompt": 2,
    },
    "upright": {"prompt": PROMPTS[0], "image": picture(1, (48, 112)), "height": 112, "width": 48},
    "resized": {"prompt": PROMPTS[:2], "image": [picture(0, (107, 71)), picture(1, (40, 40))]},
    "tensor": {
        "prompt": PROMPTS[0],
        "image": torch.rand(1, 3, 64, 96, generator=Generator().manual_seed(2)),
    },
    "resized tensor": {
        "prompt": PROMPTS[:2],
        "image": torch.rand(2, 3, 75, 110, generator=Generator().manual_seed(2)),
    },
    "float array": {
        "prompt": PROMPTS[0],
        "image": np.random.default_rng(3).random((1, 64, 96, 3), np.float32),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_one_generator_equals_diffusers(pair: Pair, case: str) -> None:
    def source() -> Generator:
        return Generator().manual_seed(7)

    expected = pair.theirs(**CASES[case], generator=source())
    actual = pair.ours(**CASES[case], generator=source())
    assert actual.dtype == torch.float32
    assert distance(actual, expected) < 1e-5


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
def test_a_generator_for_each_image_equals_diffusers(
    pairs: Callable[[str], Pair], shift: str, strength: float
) -> None:
    # As many images as generators: with fewer diffusers draws from the first generators alone.
    pair = pairs(shift)
    arguments = {"prompt": PROMPTS, "strength": strength, **GUIDED}
    pictures = [picture(i) for i in range(3)]
    expected = pair.theirs(**arguments, image=pictures, generator=seeded(3))
    actual = pair.ours(**arguments, image=pictures, generator=seeded(3))
    assert distance(actual, expected) < 1e-5


def test_images_stay_with_their_prompts(pair: Pair) -> None:
    # diffusers would pair the second prompt's first image with the first prompt's picture.
    pictures = [picture(0), picture(1)]
    twice = [pictures[0], pictures[0], pictures[1], pictures[1]]
    arguments = {"prompt": PROMPTS[:2], "num_images_per_prompt": 2, "strength": 0.5}
    expected = pair.theirs(**arguments, image=twice, generator=seeded(4))
    actual = pair.ours(**arguments, image=pictures, generator=seeded(4))
    assert distance(actual, expected) < 1e-5

    # with one generator, that draws the latents of each picture once
    generator = Generator().manual_seed(5)
    starts = pair.pipeline.encode_image(from_input(pictures, height=64, width=96), generator)
    embeds = pair.pipeline.encode(PROMPTS[:2])
    by_hand = pair.pipeline.denoise(
        [embeds[0], embeds[0], embeds[1], embeds[1]],
        **SMALL,
        latents=torch.randn((4, *starts.shape[1:]), generator=generator),
        image_latents=torch.stack([starts[0], starts[0], starts[1], starts[1]]),
        strength=0.5,
    )
    actual = pair.ours(**arguments, image=pictures, generator=Generator().manual_seed(5))
    assert torch.equal(actual, by_hand)


@pytest.mark.parametrize("image", [picture(), [picture(i) for i in range(3)]], ids=["one", "list"])
def test_a_batch_equals_its_images_made_one_by_one(pair: Pair, image: Any) -> None:
    arguments: dict[str, Any] = {"strength": 0.7, "guidance_scale": 2.0}
    together = pair.ours(prompt=PROMPTS, image=image, generator=seeded(3), **arguments)
    for i, generator in enumerate(seeded(3)):
        one = image[i] if isinstance(image, list) else image
        alone = pair.ours(prompt=PROMPTS[i], image=one, generator=[generator], **arguments)
        assert distance(together[i : i + 1], alone) < 1e-5
    again = pair.ours(prompt=PROMPTS, image=image, generator=seeded(3), **arguments)
    assert torch.equal(together, again)


def test_pixels_equal_diffusers(pair: Pair) -> None:
    arguments = {"prompt": PROMPTS[0], "image": picture(), "strength": 0.4, "output_type": "np"}
    expected = pair.theirs(**arguments, generator=seeded(1))
    images = generate(**pair.components, **SMALL, **arguments, generator=seeded(1))
    np.testing.assert_allclose(np.asarray(images), np.asarray(expected), atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 9, 25, 50])
def test_the_steps_are_those_of_diffusers(steps: int) -> None:
    timesteps = torch.arange(steps)
    scheduler = SimpleNamespace(timesteps=timesteps, order=1)
    pipeline = SimpleNamespace(scheduler=scheduler)
    get_timesteps = diffusers.ZImageImg2ImgPipeline.get_timesteps
    for strength in [i / 200 for i in range(1, 201)] + [1 / 3, 2 / 3, 0.1 + 0.2, 1e-9]:
        left, number = get_timesteps(pipeline, steps, strength, "cpu")
        assert first_step(steps, strength) == left[0] == steps - number


def test_forwards_are_as_documented(pair: Pair) -> None:
    pipeline = pair.pipeline
    embeds = pipeline.encode(PROMPTS[:1])
    start = torch.zeros(pipeline.latents_shape(1, 64, 96))
    for strength, steps in ((0.6, [3, 4, 5, 6, 7]), (1.0, list(range(8))), (0.01, [7])):
        done: list[int] = []
        calls: list[Any] = []
        block = pipeline.transformer.layers[0]
        hook = block.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        pipeline.denoise(
            embeds,
            **{**SMALL, "num_inference_steps": 8},
            generators=seeded(1),
            image_latents=start,
            strength=strength,
            on_step=done.append,
        )
        hook.remove()
        assert done == steps
        assert len(calls) == len(steps)


def test_stages_are_generate(pair: Pair) -> None:
    pictures = torch.rand(3, 3, 64, 96, generator=Generator().manual_seed(1))
    pipeline, generators = pair.pipeline, seeded(3)
    embeds = pipeline.encode(PROMPTS)
    starts = pipeline.encode_image(pictures, generators)
    assert starts.dtype == torch.float32
    assert starts.shape == pipeline.latents_shape(3, 64, 96)
    latents = pipeline.denoise(
        embeds, **SMALL, generators=generators, image_latents=starts, strength=0.5
    )
    expected = pair.ours(prompt=PROMPTS, image=pictures, generator=seeded(3), strength=0.5)
    assert torch.equal(latents, expected)


def test_a_generator_draws_the_latents_and_then_the_noise(pair: Pair) -> None:
    pictures = torch.rand(1, 3, 64, 96, generator=Generator().manual_seed(1))
    config = pair.pipeline.vae.config
    with torch.no_grad():
        gaussian = pair.pipeline.vae.encode(2 * pictures - 1)
    by_hand = Generator().manual_seed(100)
    drawn = torch.randn(gaussian.mean.shape, generator=by_hand)
    noise = torch.randn(gaussian.mean.shape, generator=by_hand)
    latents = gaussian.mean + torch.exp(0.5 * gaussian.logvar) * drawn
    latents = (latents - config.shift_factor) * config.scaling_factor
    actual = pair.pipeline.encode_image(pictures, seeded(1))
    assert distance(actual, latents) < 1e-6

    embeds = pair.pipeline.encode(PROMPTS[:1])
    expected = pair.pipeline.denoise(embeds, **SMALL, latents=noise)
    full = pair.ours(prompt=PROMPTS[0], image=pictures, strength=1.0, generator=seeded(1))
    assert distance(full, expected) < 1e-6  # of the image nothing is left


def test_a_small_strength_stays_near_the_image(pair: Pair) -> None:
    pictures = torch.rand(1, 3, 64, 96, generator=Generator().manual_seed(1))
    start = pair.pipeline.encode_image(pictures, seeded(1))
    distances = []
    for strength in (0.01, 0.5, 1.0):
        arguments: dict[str, Any] = {"num_inference_steps": 50, "strength": strength}
        made = pair.ours(prompt=PROMPTS[0], image=pictures, generator=seeded(1), **arguments)
        distances.append((made - start).norm().item())
    assert distances[0] < 0.3 * distances[1] < 0.3 * distances[2]


def test_latents_do_not_depend_on_how_the_picture_is_given(pair: Pair) -> None:
    array = np.asarray(picture())
    unit = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms: list[Any] = [
        picture(),
        [picture()],
        array,
        array[None],
        array.astype(np.float32) / 255,
        unit,
        unit[None],
        unit.float() / 255,
        (unit[None],),
    ]
    arguments: dict[str, Any] = {"prompt": PROMPTS[0], "strength": 0.5}
    expected = pair.ours(image=forms[0], generator=seeded(1), **arguments)
    for form in forms[1:]:
        assert torch.equal(pair.ours(image=form, generator=seeded(1), **arguments), expected)


def test_the_callers_arguments_are_not_changed(pair: Pair) -> None:
    given: dict[str, Any] = {"prompt": PROMPTS[:2], "image": [picture(), picture(1, (50, 40))]}
    kept = copy.deepcopy(given)
    pair.ours(**given, generator=seeded(2))
    assert given == kept
    array = np.asarray(picture(1, (50, 40)), np.float32) / 255
    before = array.copy()
    pair.ours(prompt="a donut", image=array, generator=seeded(1))
    assert np.array_equal(array, before)


def test_bfloat16_runs_in_float32_latents(
    pair: Pair, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = make_checkpoint(
        tmp_path_factory.mktemp("half") / "c", dtype=torch.float32, layers=2, shift=3.0
    )
    components = load_from_local_dir(folder, device="cpu", dtype=torch.bfloat16)
    arguments: dict[str, Any] = {"prompt": PROMPTS[0], "image": picture(), "strength": 0.5}
    made = generate(**components, **SMALL, **arguments, generator=seeded(1), output_type="latent")
    assert isinstance(made, Tensor)
    assert made.dtype == torch.float32
    expected = pair.ours(**arguments, generator=seeded(1))
    assert ((made - expected).norm() / expected.norm()).item() < 0.03


TWO: dict[str, Any] = {"prompt": ["a donut", "a hat"], "image": picture()}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no strength": ({"strength": 0.0}, "strength: 0.0 must be above 0 and at most 1"),
    "negative": ({"strength": -0.1}, "strength: -0.1 must be above 0"),
    "over 1": ({"strength": 1.01}, "strength: 1.01 must be above 0"),
    "nan": ({"strength": float("nan")}, "strength: nan must be above 0"),
    "no step": (
        {"strength": 1e-17},
        "strength: 1e-17 leaves no step of num_inference_steps 4 to run",
    ),
    "empty": ({"image": []}, "image: the list is empty"),
    "three": (
        {"image": [picture()] * 3, "num_images_per_prompt": 3},
        "image: 3 images for 2 prompts with 3 images each; allowed: 1, 2 or 6",
    ),
    "path": ({"image": Path("a.png")}, "image: PosixPath; allowed: a PIL image"),
    "text": ({"image": "a.png"}, "image: str; allowed: a PIL image"),
    "shape": ({"image": torch.rand(2, 64, 96)}, r"image: Tensor of shape \(2, 64, 96\)"),
    "grey": ({"image": np.zeros((64, 96), np.uint8)}, r"image: ndarray of shape \(64, 96\)"),
    "signed": ({"image": torch.full((3, 8, 8), -0.5)}, "image: values from -0.5 to -0.5"),
    "not finite": ({"image": torch.full((3, 8, 8), float("nan"))}, "image: values from nan"),
    "bytes as float": ({"image": np.full((8, 8, 3), 255.0)}, "image: values from 255 to 255"),
    "integers": ({"image": np.zeros((8, 8, 3), np.int64)}, "image: dtype int64; allowed: float"),
    "integer tensor": (
        {"image": torch.zeros(3, 8, 8, dtype=torch.int32)},
        "image: dtype torch.int32; allowed: float",
    ),
    "mode": ({"image": Image.new("F", (8, 8))}, "image of mode 'F'; allowed: 8-bit grey"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_generate_refuses(pair: Pair, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        pair.ours(**{**TWO, **changes})


def test_stages_refuse(pair: Pair) -> None:
    with pytest.raises(ValueError, match="generators: 3 for 2 images; allowed: a multiple"):
        pair.pipeline.encode_image(torch.rand(2, 3, 64, 96), seeded(3))
    embeds: Sequence[Tensor] = pair.pipeline.encode(PROMPTS[:1])
    for shape in ((1, 16, 8, 8), (2, 16, 8, 12)):
        with pytest.raises(ValueError, match=r"image_latents: shape .* must be \(1, 16, 8, 12\)"):
            pair.pipeline.denoise(
                embeds, **SMALL, generators=seeded(1), image_latents=torch.zeros(shape)
            )
