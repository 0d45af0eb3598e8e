"""`zimage generate --image`: edits of pictures from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_calls import CHECKPOINT, CommandLine
from PIL import Image

from zimage_core import generate, load_from_local_dir
from zimage_core.tiny.make import make_checkpoint

PROMPT = "make the background red"
ASKED = ["--prompt", PROMPT, "--steps", 2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "edit"
    return make_checkpoint(path, dtype=torch.float32, layers=1, siglip_dim=24)


@pytest.fixture
def command(zimage: CommandLine) -> CommandLine:
    noise = np.random.default_rng(0).integers(0, 256, (100, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(zimage.folder / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(noise[:80]).save(zimage.folder / "b.jpg", exif=turned)
    Image.new("RGB", (70, 20)).save(zimage.folder / "small.png")
    Image.new("RGB", (700, 70)).save(zimage.folder / "long.png")
    content = (zimage.folder / "a.png").read_bytes()
    (zimage.folder / "cut.png").write_bytes(content[:-600])
    return zimage


def test_pictures_are_edited(command: CommandLine, checkpoint: Path) -> None:
    model = ["generate", "--model", checkpoint, *ASKED]
    files = ["--image", "a.png", "--image", "b.jpg"]
    said = command(*model, *files, "-o", "one.png", code=0).err
    assert "one.png: 80x64, seed 42" in said  # the last one, turned, in multiples of 16
    expected = generate(
        **load_from_local_dir(checkpoint, device="cpu", dtype=torch.float32),
        prompt=PROMPT,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(42),
        images=[
            Image.open(command.folder / "a.png"),
            Image.open(command.folder / "b.jpg").transpose(Image.Transpose.ROTATE_270),
        ],
    )
    made = Image.open(command.folder / "one.png")
    assert np.array_equal(np.asarray(made), np.asarray(expected[0]))
    command(*model, *files, "--width", 48, "-o", "two.png", code=0)
    assert Image.open(command.folder / "two.png").size == (48, 64)
    command(*model, "--width", 64, "--height", 48, "-o", "three.png", code=0)  # none to edit
    assert Image.open(command.folder / "three.png").size == (64, 48)


REFUSED = {
    "no such file": (["--image", "x.png"], "--image: x.png: no such file"),
    "the second": (["--image", "a.png", "--image", "x.png"], "--image: x.png: no such file"),
    "no image": (["--image", "job.yaml"], "--image: job.yaml: not an image, or damaged"),
    "cut off": (["--image", "cut.png"], "--image: cut.png: damaged or cut off"),
    "too small": (
        ["--image", "small.png"],
        "--image: small.png: a picture of 70 x 20; allowed: 64 pixels or more a side",
    ),
    "too long": (
        ["--image", "long.png"],
        "--image: long.png: a picture of 700 x 70; allowed: one side at most 8 times the other",
    ),
    "size": (["--image", "a.png", "--width", "50"], "--width: 50: not divisible by 16"),
    "text to image": (
        ["--image", "a.png", "--model", str(CHECKPOINT)],
        "takes no pictures to edit (model_index.json names no siglip); allowed: an Edit or Omni "
        "checkpoint, or --init-image to start from a picture",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_edited_is_refused(command: CommandLine, case: str) -> None:
    flags, words = REFUSED[case]
    known = ["generate", "--model", command.folder, *ASKED, "-o", "x.png"]
    assert words in command(*known, *flags, code=2).err
