"""`zimage generate --mask`: a part of a picture made anew, and the example of the documents."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_calls import CHECKPOINT, CommandLine
from job_runs import ROOT
from PIL import Image

from zimage_core import generate, load_from_local_dir
from zimage_core.tiny.make import make_checkpoint

ASKED = ["--prompt", "a cat", "--steps", 4, "--width", 48, "--height", 32, "--strength", 1.0]
START = ["--init-image", "a.png"]


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 48, 3), np.uint8))


def half_white() -> Image.Image:
    mask = Image.new("L", (48, 32))
    mask.paste(255, (0, 0, 24, 32))
    return mask


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", layers=1)


@pytest.fixture
def command(zimage: CommandLine) -> CommandLine:
    picture().save(zimage.folder / "a.png")
    return zimage


def test_a_part_of_a_picture_is_made_anew(command: CommandLine, checkpoint: Path) -> None:
    model = ["generate", "--model", checkpoint, *ASKED, *START]
    half_white().convert("1").resize((96, 64)).save(command.folder / "mask.png")
    assert "note:" not in command(*model, "--mask", "mask.png", "-o", "one.png", code=0).err
    (expected,) = generate(
        **load_from_local_dir(checkpoint, device="cpu", dtype=torch.float32),
        prompt="a cat",
        num_inference_steps=4,
        width=48,
        height=32,
        image=picture(),
        mask_image=half_white(),
        strength=1.0,
        generator=torch.Generator().manual_seed(42),
    )
    one = np.asarray(Image.open(command.folder / "one.png"))
    assert np.array_equal(one, np.asarray(expected))

    white = Image.new("RGB", (50, 20), "white").convert("P")
    white.save(command.folder / "wide.gif")  # everywhere: as without a mask
    said = command(*model, "--mask", "wide.gif", "-o", "two.png", code=0).err
    assert "note: wide.gif is 50x20 and is stretched to 48x32" in said
    command(*model, "-o", "three.png", code=0)
    two, three = (
        np.asarray(Image.open(command.folder / name)) for name in ("two.png", "three.png")
    )
    assert np.array_equal(two, three)
    assert not np.array_equal(one, two)


MASKS: dict[str, tuple[Image.Image, list[object], str]] = {
    "black": (
        Image.new("L", (48, 32), 127),
        START,
        "--mask: mask.png: black everywhere at 64x64: nothing would be made anew; allowed: white",
    ),
    "thin": (
        Image.fromarray(np.eye(64, k=3, dtype=np.uint8) * 255),
        START,
        "--mask: mask.png: no white area of 8 x 8 pixels at 64x64: nothing would be made anew",
    ),
    "transparent": (
        Image.new("RGBA", (48, 32), (255, 255, 255, 0)),
        START,
        "--mask: mask.png: a mask with transparent pixels; allowed: white where",
    ),
    "mode": (
        Image.new("LA", (48, 32), (255, 254)),
        START,
        "--mask: mask.png: a mask with transparent pixels; allowed: white where",
    ),
    "cache": (
        half_white(),
        [*START, "--steps", 50, "--cache", 2],
        "--cache: 2 together with a mask is not supported; allowed: None, or no mask",
    ),
    "no image": (
        half_white(),
        [],
        "--mask: mask.png: no --init-image is given, to which it belongs",
    ),
    "an edit": (
        half_white(),
        ["--image", "big.png"],
        "--mask: mask.png: no --init-image is given, to which it belongs",
    ),
    "no such file": (half_white(), [*START, "--mask", "x.png"], "--mask: x.png: no such file"),
    "no picture": (
        half_white(),
        [*START, "--mask", "job.yaml"],
        "--mask: job.yaml: not an image, or damaged",
    ),
}


@pytest.mark.parametrize("case", MASKS)
def test_a_mask_is_refused(command: CommandLine, case: str) -> None:
    image, flags, words = MASKS[case]
    image.save(command.folder / "mask.png")
    picture().resize((64, 64)).save(command.folder / "big.png")
    known = ["generate", "--model", "nope", "--prompt", "a cat", "-o", "x.png"]
    known += ["--width", 64, "--height", 64, "--mask", "mask.png"]
    assert words in command(*known, *flags, code=2).err


def test_the_example_of_the_documents(command: CommandLine) -> None:
    text = (ROOT / "docs/img2img.md").read_text(encoding="utf-8")
    section = text.split("\n## Inpainting\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert [language for language, _ in blocks] == ["sh", "python", "sh", "python"]
    (command.folder / "data").symlink_to(ROOT / "data")
    names = {
        "Image": Image,
        "generate": generate,
        "torch": torch,
        "components": load_from_local_dir(CHECKPOINT, device="cpu", dtype=torch.float32),
    }
    for language, body in blocks:
        if language == "python":
            exec(body, names)
            continue
        program, *arguments = shlex.split(body.replace("\\\n", " "))
        assert program == "zimage"
        command(*arguments, code=0)
    before, after, pasted = (
        np.asarray(Image.open(command.folder / name)).astype(int)
        for name in ("cap.png", "hat.png", "pasted.png")
    )
    change = np.abs(after - before)
    assert change[:40].mean() > 20  # a hat of another colour and shape
    assert change[64:].mean() < 3  # what the autoencoder costs, far from the mask
    assert np.array_equal(pasted[48:], before[48:])
    assert np.abs(pasted - before)[:40].mean() > 20
