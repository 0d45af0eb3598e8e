"""Edits of pictures, against diffusers' ZImageOmniPipeline on the same weights, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from pipeline_pair import PipelinePair, distance, picture, seeded
from torch import Tensor

from zimage_core import generate, load_from_local_dir
from zimage_core.pictures import prepare_picture
from zimage_core.tiny.make import make_checkpoint

DATA = Path(__file__).parents[2] / "data"
TRAINED = DATA / "checkpoints" / "z-image-tiny-edit"
DRAWING = DATA / "profiles" / "edit" / "cap.png"
LONG = "a very long sentence about a castle near the sea, " * 10
PROMPT = "make the background red"
STEPS: dict[str, Any] = {"num_inference_steps": 2}


SMALL, TALL, ODD = picture(0), picture(1, (64, 112)), picture(2, (101, 77))


class Pair(PipelinePair):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, diffusers.ZImageOmniPipeline, STEPS)

    def theirs(self, **arguments: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            # It encodes pictures in bfloat16 whatever the autoencoder's dtype is, and laid out with
            # the channels last, for which PyTorch has norms that are 1.8e-4 from float64 at 1024 x
            # 1024 pixels; otherwise both are 1e-6 from it.
            patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.contiguous)
            return super().theirs(**arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "edit"
    return make_checkpoint(path, dtype=torch.float32, layers=2, siglip_dim=24)


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return Pair(folder)


GUIDED: dict[str, Any] = {"guidance_scale": 3.0, "negative_prompt": "blurry"}
CASES: dict[str, tuple[list[Image.Image], dict[str, Any]]] = {
    "no picture": ([], {"height": 64, "width": 96}),
    "one": ([SMALL], {}),
    "one, cropped": ([ODD], {}),
    "two, of other sizes": ([SMALL, TALL], {}),
    "three": ([TALL, SMALL, ODD], {"height": 80, "width": 64}),
    "another height": ([SMALL], {"height": 112}),
    "guidance": ([TALL, SMALL], GUIDED),
    "guidance, no picture": ([], {"height": 64, "width": 64, **GUIDED}),
    "truncation and normalisation": (
        [SMALL],
        {**GUIDED, "cfg_truncation": 0.4, "cfg_normalization": True, "num_inference_steps": 4},
    ),
    "longer than allowed": ([SMALL, SMALL], {"prompt": LONG, "max_sequence_length": 24}),
    "segments longer than allowed": ([SMALL], {"max_sequence_length": 2, **GUIDED}),
    # Above 1024 * 1024 pixels: brought to the area of the result.
    "large": ([picture(3, (1100, 1000)), SMALL], {"height": 96, "width": 80}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(pair: Pair, case: str) -> None:
    pictures, arguments = CASES[case]
    arguments = {"prompt": PROMPT, **arguments}
    expected = pair.theirs(image=pictures or None, generator=seeded(1), **arguments)
    found = pair.ours(
        images=pictures or None, generator=seeded(1), aligned_positions=False, **arguments
    )
    assert distance(found, expected) < 1e-5


def test_trained_weights_equal_diffusers() -> None:
    trained = Pair(TRAINED)
    with Image.open(DRAWING) as given:
        drawing = given.convert("RGB")
    arguments: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 8, "guidance_scale": 1.0}
    expected = trained.theirs(image=[drawing], generator=seeded(1), **arguments)
    found = trained.ours(images=drawing, generator=seeded(1), aligned_positions=False, **arguments)
    assert distance(found, expected) < 1e-5


@pytest.mark.slow  # images of 1024 * 1024 pixels
@pytest.mark.parametrize("size", [(1100, 1000), (420, 2700)])
def test_a_large_picture_equals_diffusers(pair: Pair, size: tuple[int, int]) -> None:
    """The result has about 1024 * 1024 pixels, in the shape of the picture."""
    arguments: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 1}
    given = picture(0, size)
    expected = pair.theirs(image=[given], generator=seeded(1), **arguments)
    assert expected.shape[2] * expected.shape[3] > 0.95 * 128 * 128
    found = pair.ours(images=given, generator=seeded(1), aligned_positions=False, **arguments)
    assert distance(found, expected) < 1e-5


def test_a_batch_equals_diffusers(pair: Pair) -> None:
    """Prompts of different lengths, two images of each, and the same pictures for all."""
    arguments: dict[str, Any] = {
        "prompt": [PROMPT, LONG, "a donut"],
        "guidance_scale": 2.0,
        "negative_prompt": ["blurry", "", LONG],
        "num_images_per_prompt": 2,
    }
    expected = pair.theirs(image=[SMALL, TALL], generator=seeded(6), **arguments)
    found = pair.ours(
        images=[SMALL, TALL], generator=seeded(6), aligned_positions=False, **arguments
    )
    assert distance(found, expected) < 1e-5


def test_pixels_equal_diffusers(pair: Pair) -> None:
    arguments: dict[str, Any] = {"prompt": PROMPT, **STEPS}
    expected = pair.theirs(image=[SMALL], generator=seeded(1), output_type="np", **arguments)
    found: Any = generate(
        **pair.components,
        images=SMALL,
        generator=seeded(1),
        output_type="np",
        aligned_positions=False,
        **arguments,
    )
    assert np.abs(found - np.asarray(expected)).max() < 1e-5


def test_positions_are_aligned_unless_asked_otherwise(pair: Pair) -> None:
    def made(**arguments: Any) -> Tensor:
        return pair.ours(prompt=PROMPT, images=[SMALL], generator=seeded(1), **arguments)

    assert torch.equal(made(), made(aligned_positions=True))
    assert distance(made(aligned_positions=False), made()) > 1e-4


@pytest.mark.parametrize("guided", [False, True])
def test_a_batch_of_different_numbers_of_pictures_equals_its_images(
    pair: Pair, guided: bool
) -> None:
    prompts, lists = [PROMPT, "a donut", LONG], [[SMALL, ODD], [], [TALL]]
    arguments = {"height": 64, "width": 80, **(GUIDED if guided else {})}
    batch = pair.ours(prompt=prompts, images=lists, generator=seeded(3), **arguments)
    for i, generator in enumerate(seeded(3)):
        alone = pair.ours(
            prompt=prompts[i], images=lists[i] or None, generator=generator, **arguments
        )
        assert torch.equal(batch[i : i + 1], alone)


def test_pictures_in_other_forms_and_places(pair: Pair) -> None:
    array = np.asarray(SMALL)
    expected = pair.ours(prompt=PROMPT, images=[SMALL], generator=seeded(1))
    for same in (
        SMALL,
        [[SMALL]],
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        torch.from_numpy(array.copy()).permute(2, 0, 1)[None] / 255.0,
        SMALL.convert("RGBA"),
    ):
        assert torch.equal(pair.ours(prompt=PROMPT, images=same, generator=seeded(1)), expected)
    twice = pair.ours(prompt=[PROMPT] * 2, images=SMALL, generator=seeded(1) * 2)
    assert twice.shape == (2, *expected.shape[1:])


def test_arguments_stay_as_they_are_and_pictures_are_encoded_once(pair: Pair) -> None:
    seen: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        for name, module in (
            ("siglip", pair.components["siglip"]),
            ("vae", pair.components["vae"].encoder),
        )
    ]
    own, prompts = picture(4), [PROMPT, "a donut"]
    before, lists = own.copy(), [[own, SMALL], [own]]
    try:
        pair.ours(
            prompt=prompts, images=lists, num_images_per_prompt=2, height=64, width=64, **GUIDED
        )
    finally:
        for hook in hooks:
            hook.remove()
    assert sorted(seen) == ["siglip", "siglip", "vae", "vae"]
    assert lists == [[own, SMALL], [own]] and own == before
    assert prompts == [PROMPT, "a donut"]


@pytest.mark.parametrize(
    "size",
    [(64, 64), (65, 512), (1024, 1024), (1025, 1024), (3000, 400), (700, 2500), (1023, 1031)],
)
@pytest.mark.parametrize("area", [None, 640 * 480])
def test_sizes_are_those_of_diffusers(size: tuple[int, int], area: int | None) -> None:
    given = picture(0, size)
    processor, resized = Flux2ImageProcessor(vae_scale_factor=16), given
    if size[0] * size[1] > 1024 * 1024:
        resized = processor._resize_to_target_area(given, area or 1024 * 1024)
    width, height = (side // 16 * 16 for side in resized.size)
    expected = processor.preprocess(resized, height=height, width=width, resize_mode="crop")
    found = prepare_picture(given, multiple=16, area=area)
    assert found.seen == resized
    pixels = torch.from_numpy(np.array(found.cropped)).permute(2, 0, 1)[None] / 255.0
    assert torch.equal(2.0 * pixels - 1.0, expected)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"images": [picture(0, (63, 200))]}, "picture of 63 x 200; allowed: 64 pixels or more"),
    ({"images": [picture(0, (600, 70))]}, "picture of 600 x 70; allowed: one side at most 8 times"),
    (
        {"images": [picture(0, (3000, 400))], "height": 16, "width": 64},
        "3000 x 400 would become 87 x 11",
    ),
    ({"images": [SMALL], "height": 40}, "height: 40 must be a multiple of 16"),
    ({"images": [SMALL], "height": 0}, "height: 0 must be a multiple of 16"),
    ({"images": ["cat.png"]}, "images: str; allowed: a PIL image"),
    ({"images": torch.zeros(2, 3, 64, 64)}, "images: 2 in one tensor or array; allowed: one"),
    ({"images": torch.full((3, 64, 64), 2.0)}, "images: values from 2 to 2; allowed: 0 to 1"),
    ({"images": [SMALL, [SMALL]]}, "pictures beside lists; allowed: a list for each prompt"),
    ({"images": [[SMALL], [SMALL]]}, "images: 2 lists for 1 prompts; allowed: one for each"),
    (
        {"prompt": ["a", "b"], "images": [SMALL, TALL]},
        "2 pictures for 2 prompts, each for one or all for each; allowed: a list of pictures for",
    ),
    (
        {"prompt": ["a", "b"], "images": [[SMALL], [TALL]]},
        "different sizes, 96 x 64, 64 x 112, by the last picture of each",
    ),
    ({"images": [SMALL], "image": SMALL}, "images: cannot be edited together with an image to"),
    ({"images": [SMALL], "siglip": None}, "siglip and siglip_processor are needed"),
    ({"images": [SMALL], "max_sequence_length": 0}, "max_sequence_length is 0; must be 1"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_edited_is_refused(
    pair: Pair, arguments: dict[str, Any], message: str
) -> None:
    arguments = {"prompt": PROMPT, **STEPS, **pair.components, **arguments}
    with pytest.raises(ValueError, match=message):
        generate(**arguments)


def test_starting_images_work_on_such_a_checkpoint_too(pair: Pair) -> None:
    made = pair.ours(prompt=PROMPT, image=SMALL, height=64, width=96, generator=seeded(1))
    assert made.shape == (1, 16, 8, 12) and torch.isfinite(made).all()


@pytest.mark.parametrize("offload", ["model", "block"])
def test_offload_changes_no_bit(pair: Pair, folder: Path, offload: str) -> None:
    components = load_from_local_dir(folder, device="cpu", dtype=torch.float32, offload=offload)
    arguments: dict[str, Any] = {"prompt": PROMPT, "images": [SMALL, TALL], **STEPS, **GUIDED}
    found = generate(**components, generator=seeded(1), output_type="latent", **arguments)
    assert isinstance(found, Tensor)
    assert torch.equal(found, pair.ours(generator=seeded(1), **arguments))
