"""Masks, against diffusers' ZImageInpaintPipeline on the same weights, in float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from pipeline_pair import PipelinePair, distance, picture, seeded
from torch import Generator, Tensor

from zimage_core import ZImagePipeline
from zimage_core.inpainting import from_input, to_latent_size
from zimage_core.tiny.make import make_checkpoint

LONG = "a very long sentence about a castle near the sea, " * 5
PROMPTS = ["a donut", LONG, "portrait of a smiling man with a red hat"]
SMALL: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 4, "strength": 0.8}


def shapes(seed: int = 0, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A mask of soft grey spots, no two seeds alike: between 20 and 80 % of it are white."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


class Pair(PipelinePair):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, diffusers.ZImageInpaintPipeline, SMALL)
        self.pipeline = ZImagePipeline(**self.components)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("checkpoint") / "random"
    return Pair(make_checkpoint(folder, dtype=torch.float32, layers=2, shift=3.0))


@pytest.fixture
def dynamic(pair: Pair) -> Iterator[Pair]:
    """The same with a dynamic shift."""
    ours, theirs = pair.components["scheduler"], pair.reference.scheduler
    pair.components["scheduler"] = replace(ours, use_dynamic_shifting=True)
    pair.reference.scheduler = type(theirs).from_config(theirs.config, use_dynamic_shifting=True)
    yield pair
    pair.components["scheduler"], pair.reference.scheduler = ours, theirs


PICTURES = [picture(i) for i in range(3)]
MASKS = [shapes(i) for i in range(3)]
GUIDED: dict[str, Any] = {
    "guidance_scale": 3.0,
    "negative_prompt": ["blurry", LONG, ""],
    "cfg_normalization": True,
    "cfg_truncation": 0.5,
}
ONE: dict[str, Any] = {"prompt": PROMPTS[0], "image": PICTURES[0], "mask_image": MASKS[0]}
CASES: dict[str, dict[str, Any]] = {
    "one step": {**ONE, "strength": 0.2},
    "full strength": {**ONE, "strength": 1.0},
    "one mask for three prompts": {**ONE, "prompt": PROMPTS},
    "a mask for each prompt": {**ONE, "prompt": PROMPTS, "mask_image": MASKS},
    "guidance": {"prompt": PROMPTS, "image": PICTURES, "mask_image": MASKS, **GUIDED},
    "two images of one prompt": {**ONE, "num_images_per_prompt": 2},
    "a mask for each result": {
        **ONE,
        "prompt": PROMPTS[1],
        "mask_image": MASKS[:2],
        "num_images_per_prompt": 2,
    },
    "mask of another size": {**ONE, "mask_image": [shapes(3, (107, 71)), shapes(4, (40, 40))]}
    | {"prompt": PROMPTS[:2]},
    "mask as tensor": {
        **ONE,
        "mask_image": torch.rand(1, 1, 75, 110, generator=Generator().manual_seed(2)),
    },
    "nothing but black": {**ONE, "mask_image": Image.new("L", (96, 64))},
}


@pytest.mark.parametrize("case", CASES)
def test_one_generator_equals_diffusers(pair: Pair, case: str) -> None:
    expected = pair.theirs(**CASES[case], generator=Generator().manual_seed(7))
    actual = pair.ours(**CASES[case], generator=Generator().manual_seed(7))
    assert actual.dtype == torch.float32
    assert distance(actual, expected) < 1e-5


def test_a_generator_for_each_image_equals_diffusers(dynamic: Pair) -> None:
    arguments = {"prompt": PROMPTS, "image": PICTURES, "mask_image": MASKS, **GUIDED}
    expected = dynamic.theirs(**arguments, generator=seeded(3))
    actual = dynamic.ours(**arguments, generator=seeded(3))
    assert distance(actual, expected) < 1e-5


def test_pixels_equal_diffusers(pair: Pair) -> None:
    arguments = {**ONE, "output_type": "pt"}
    expected = pair.theirs(**arguments, generator=seeded(1))
    assert torch.allclose(pair.ours(**arguments, generator=seeded(1)), expected, atol=1e-5)


def test_black_keeps_the_image_and_white_is_as_without_a_mask(pair: Pair) -> None:
    made = pair.ours(**ONE, generator=seeded(1))
    unmasked = pair.ours(**{**ONE, "mask_image": None}, generator=seeded(1))
    pixels = torch.from_numpy(np.array(PICTURES[0])).permute(2, 0, 1)[None] / 255
    image = pair.pipeline.encode_image(pixels, seeded(1))
    anew = to_latent_size(from_input(MASKS[0], height=64, width=96), 8).expand_as(image)
    assert 0.2 < anew.float().mean() < 0.8
    assert torch.equal(made[~anew], image[~anew])
    for expected in (image, unmasked):  # what is made anew sees what is kept
        assert ((made - expected)[anew].abs() > 1e-3).float().mean() > 0.9
    white = pair.ours(**{**ONE, "mask_image": Image.new("L", (8, 8), 255)}, generator=seeded(1))
    assert torch.equal(white, unmasked)


def test_masks_stay_with_their_prompts(pair: Pair) -> None:
    # diffusers would give the second prompt's mask to the first prompt's second image.
    arguments = {"prompt": PROMPTS[:2], "num_images_per_prompt": 2}
    twice = {
        "image": [PICTURES[0], PICTURES[0], PICTURES[1], PICTURES[1]],
        "mask_image": [MASKS[0], MASKS[0], MASKS[1], MASKS[1]],
    }
    expected = pair.theirs(**arguments, **twice, generator=seeded(4))
    once = {"image": PICTURES[:2], "mask_image": MASKS[:2]}
    actual = pair.ours(**arguments, **once, generator=seeded(4))
    assert distance(actual, expected) < 1e-5


@pytest.mark.parametrize("masks", [MASKS[0], MASKS], ids=["one", "list"])
def test_a_batch_equals_its_images_made_one_by_one(pair: Pair, masks: Any) -> None:
    arguments: dict[str, Any] = {"guidance_scale": 2.0, "image": PICTURES[0]}
    together = pair.ours(prompt=PROMPTS, mask_image=masks, generator=seeded(3), **arguments)
    for i, generator in enumerate(seeded(3)):
        mask = masks[i] if isinstance(masks, list) else masks
        alone = pair.ours(prompt=PROMPTS[i], mask_image=mask, generator=[generator], **arguments)
        assert distance(together[i : i + 1], alone) < 1e-5


def test_stages_are_generate(pair: Pair) -> None:
    pictures = torch.rand(3, 3, 64, 96, generator=Generator().manual_seed(1))
    pipeline, generators = pair.pipeline, seeded(3)
    masks = to_latent_size(from_input(MASKS, height=64, width=96), pipeline.vae_scale_factor)
    latents = pipeline.denoise(
        pipeline.encode(PROMPTS),
        **SMALL,
        image_latents=pipeline.encode_image(pictures, generators),
        generators=generators,
        mask=masks,
    )
    arguments = {"prompt": PROMPTS, "image": pictures, "mask_image": MASKS}
    assert torch.equal(latents, pair.ours(**arguments, generator=seeded(3)))


def reference_mask(given: Any) -> Tensor:
    processor = VaeImageProcessor(
        vae_scale_factor=16, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    mask: Tensor = processor.preprocess(copy.deepcopy(given), height=64, width=96)
    return mask


SIZES = [(96, 64), (107, 71), (50, 200)]
FLOATS = np.random.default_rng(5).random((2, 70, 50), np.float32)
FORMS: dict[str, Any] = {
    **{
        f"{mode} {w}x{h}": image.convert(mode)
        for image in (shapes(6, size) for size in SIZES)
        for mode in ("L", "RGB", "1", "P", "RGBA", "CMYK")
        for w, h in [image.size]
    },
    "colours": picture(3, (107, 71)),
    "list of images": [shapes(1, (107, 71)), shapes(2, (30, 20)).convert("RGB")],
    "array H W": FLOATS[0],
    "array H W 1": FLOATS[0][..., None],
    "array N H W": FLOATS,
    "array N H W 1": FLOATS[..., None],
    "tensor H W": torch.from_numpy(FLOATS[0]),
    "tensor 1 H W": torch.from_numpy(FLOATS[:1]),
    "tensor N H W": torch.from_numpy(FLOATS),
    "tensor N 1 H W": torch.from_numpy(FLOATS[:, None]),
    "list of arrays": [FLOATS[0], FLOATS[1]],
    "list of tensors": [torch.from_numpy(FLOATS[:1]), torch.from_numpy(FLOATS[1:])],
    "one half is white": np.full((64, 96), 0.5, np.float32),
    "float64 below one half": np.full((64, 96), 0.4999999),
}


@pytest.mark.parametrize("form", FORMS)
def test_masks_are_prepared_as_in_diffusers(form: str) -> None:
    mask = from_input(FORMS[form], height=64, width=96)
    assert mask.dtype == torch.bool
    assert torch.equal(mask.float(), reference_mask(FORMS[form]).float())
    small = torch.nn.functional.interpolate(reference_mask(FORMS[form]).float(), size=(8, 12))
    assert torch.equal(to_latent_size(mask, 8).float(), small)


def test_forms_that_diffusers_does_not_know() -> None:
    grey = np.array(shapes(1, (107, 71)))
    expected = from_input(grey.astype(np.float32) / 255, height=64, width=96)
    white = grey >= 128
    colour = np.stack([grey] * 3, -1)
    forms: list[Any] = [
        grey,
        torch.from_numpy(grey),
        white,
        torch.from_numpy(white),
        white[None, ..., None],
        colour,
        colour[None],
        torch.from_numpy(colour).permute(2, 0, 1)[None],
        (colour.astype(np.float64) / 255,),
    ]
    for form in forms:
        assert torch.equal(from_input(form, height=64, width=96), expected)
    half = torch.full((1, 3, 8, 8), 0.5)  # grey of grey is the same grey
    assert from_input(half, height=64, width=96).all()
    red, green = np.zeros((2, 8, 8, 3), np.uint8)
    red[..., 0] = green[..., 1] = 255
    assert not from_input(red, height=64, width=96).any()
    assert from_input(green, height=64, width=96).all()


def test_16_bit_masks_are_rounded_and_not_cut() -> None:
    values = np.array([[0, 300, 32000, 33000, 65535]], np.uint16)
    mask = from_input(Image.fromarray(values), height=1, width=5)
    assert mask.flatten().tolist() == [False, False, False, True, True]


def test_the_callers_arguments_are_not_changed(pair: Pair) -> None:
    given: dict[str, Any] = {"image": [PICTURES[0]], "mask_image": [shapes(1, (50, 40))]}
    kept = copy.deepcopy(given)
    pair.ours(prompt="a donut", **given, generator=seeded(1))
    assert given == kept
    array = FLOATS[0].copy()
    pair.ours(prompt="a donut", image=PICTURES[0], mask_image=array, generator=seeded(1))
    assert np.array_equal(array, FLOATS[0])


TRANSPARENT = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"image": None}, "mask_image: no image is given"),
    "picture to edit": (
        {"image": None, "images": [PICTURES[0]]},
        "images: cannot be edited with a mask; allowed: image= and mask_image=, or images=",
    ),
    "cache": (
        {"cache": 2, "num_inference_steps": 50},
        "cache: 2 together with a mask is not supported; allowed: None, or no mask",
    ),
    "empty": ({"mask_image": []}, "mask_image: the list is empty"),
    "three": (
        {"mask_image": MASKS, "num_images_per_prompt": 2},
        "mask_image: 3 masks for 2 prompts with 2 images each; allowed: 1, 2 or 4",
    ),
    "path": ({"mask_image": Path("a.png")}, "mask_image: PosixPath; allowed: a PIL image without"),
    "text": ({"mask_image": "a.png"}, "mask_image: str; allowed: a PIL image without"),
    "one dimension": ({"mask_image": torch.rand(96)}, r"mask_image: Tensor of shape \(96,\)"),
    "two channels": (
        {"mask_image": torch.rand(1, 2, 8, 8)},
        r"mask_image: Tensor of shape \(1, 2, 8, 8\); allowed: a PIL image without",
    ),
    "channels first": (
        {"mask_image": np.zeros((1, 1, 64, 96), np.uint8)},
        r"mask_image: ndarray of shape \(1, 1, 64, 96\); allowed: a PIL image without",
    ),
    "no pixels": ({"mask_image": np.zeros((0, 96))}, r"mask_image: ndarray of shape \(0, 96\)"),
    "three or one": (
        {"mask_image": torch.rand(3, 8, 8)},
        r"mask_image: Tensor of shape \(3, 8, 8\): three masks, or one in colour; allowed: \(3, 1",
    ),
    "signed": ({"mask_image": torch.full((8, 8), -0.5)}, "mask_image: values from -0.5 to -0.5"),
    "not finite": ({"mask_image": np.full((8, 8), np.nan)}, "mask_image: values from nan"),
    "bytes as float": ({"mask_image": np.full((8, 8), 255.0)}, "mask_image: values from 255"),
    "integers": ({"mask_image": np.zeros((8, 8), int)}, "mask_image: dtype int64; allowed: float"),
    "ones as bytes": (
        {"mask_image": np.eye(8, dtype=np.uint8)},
        "mask_image: uint8 with 1 as its largest value, which is nearly black; allowed: 0 to 255",
    ),
    "transparent": (
        {"mask_image": TRANSPARENT},
        "mask_image: a mask with transparent pixels; allowed: white where the image is made anew",
    ),
    "mode": ({"mask_image": Image.new("F", (8, 8))}, "mask_image: image of mode 'F'; allowed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_generate_refuses(pair: Pair, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        pair.ours(**{**ONE, "prompt": PROMPTS[:2], **changes})


def test_denoise_refuses(pair: Pair) -> None:
    start = torch.zeros(1, 16, 8, 12)
    mask = torch.ones(1, 1, 8, 12, dtype=torch.bool)
    for changes, message in (
        ({"mask": mask.float()}, r"mask: torch\.float32 of shape \(1, 1, 8, 12\) must be torch\.b"),
        ({"mask": mask[:, :, :4]}, r"mask: torch\.bool of shape .* of \(1, 1, 8, 12\)$"),
        ({"mask": mask.expand(2, -1, -1, -1)}, r"mask: .* of \(1, 1, 8, 12\)$"),
        ({"mask": mask, "image_latents": None}, "mask_image: no image is given"),
        ({"mask": mask, "cache": 2}, "cache: 2 together with a mask is not supported"),
    ):
        arguments: dict[str, Any] = {**SMALL, "image_latents": start, **changes}
        with pytest.raises(ValueError, match=message):
            pair.pipeline.denoise(
                pair.pipeline.encode(PROMPTS[:1]), generators=seeded(1), **arguments
            )
