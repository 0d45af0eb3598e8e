"""`zimage generate --from`: images made again from what they say, and what they must not say."""

import io
import json
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import bounded
from cli_calls import CHECKPOINT, CommandLine
from lora_files import FORMATS, train, write
from PIL import Image
from safetensors.torch import load_file, save_file

from jobs import png
from jobs.errors import InputError
from jobs.metadata_chunks import add_metadata
from jobs.recorded_making import read_source
from jobs.writers import WRITERS, ImageFormat

SIZE = ("--width", 32, "--height", 32)
MAKE = ("generate", "--model", CHECKPOINT)
FROM = (*MAKE, "--from")
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def test_an_image_in_an_output_needs_no_model(zimage: CommandLine) -> None:
    zimage.run("--set", "sampling.batch_size=1", code=0)
    (image,) = zimage.folder.glob("out/images/*/t_00000005.png")
    ended = zimage("generate", "--from", image, code=0)
    assert ended.out == f"{image}: made again with equal pixels\n"
    record = zimage.folder / "out/job.json"
    assert ended.err.startswith(f"zimage generate: --model {CHECKPOINT}, as {record} says\n")

    lonely = zimage.write("elsewhere/image.png", "").parent / "image.png"
    shutil.copy(image, lonely)
    error = zimage("generate", "--from", lonely, code=2).err
    assert f"--model: not given, and {lonely} is in no output" in error
    assert "allowed: the folder of its checkpoint, 'z-image-tiny'" in error
    error = zimage("generate", "--prompt", "a cat", "-o", "a.png", code=2).err
    assert error == "zimage generate: --model: not given; required without --from\n"


def test_an_image_is_made_again(zimage: CommandLine) -> None:
    sampling = ("--seed", 5, "--steps", 3, "--guidance", 2, "--negative-prompt", "blue")
    zimage(*MAKE, *SIZE, *sampling, "--prompt", "a red äpple <&>", "-o", "a.png", code=0)
    ended = zimage(*FROM, "a.png", "-o", "b.png", code=0)
    assert ended.out == "a.png: made again with equal pixels\n"
    content = (zimage.folder / "a.png").read_bytes()
    assert (zimage.folder / "b.png").read_bytes() == content

    ended = zimage(*FROM, "a.png", "--seed", 6, "--steps", 3, "-o", "c.jpg", code=0)
    assert "a.png: different: by up to " in ended.out and " PSNR " in ended.out
    assert ended.out.endswith("\nother than it was made: --seed\n")
    with Image.open(zimage.folder / "c.jpg") as image:
        assert image.size == (32, 32)
    ended = zimage(*FROM, "a.png", "--width", 48, code=0)
    assert "a.png: different: 48x32 pixels\nother than it was made: --width\n" in ended.out

    # Pixels that another program changed.
    with Image.open(zimage.folder / "a.png") as image:
        text, changed = image.info["zimage"], np.array(image)
    changed[:4] = 0
    again = add_metadata(
        WRITERS["png"].encode(changed), document=json.loads(text), xmp="", software="x"
    )
    (zimage.folder / "changed.png").write_bytes(again)
    ended = zimage(*FROM, "changed.png", code=1)
    assert "nothing that the file says has changed" in ended.out

    error = zimage(*FROM, "a.png", "-o", "a.png", code=2).err
    assert "--output: a.png: is the image of --from; allowed: another" in error
    assert (zimage.folder / "a.png").read_bytes() == content


@pytest.mark.parametrize("form", ["png", "webp"])
def test_an_image_of_a_job_is_made_again(zimage: CommandLine, form: str) -> None:
    sets = ("--set", f"output.format={form}", "--set", "sampling.guidance_scale=2")
    zimage.run("--count", 1, *sets, code=0)
    zimage("verify", "out", code=0)
    (row,) = zimage.rows()
    file = f"out/{row['file_name']}"
    assert zimage(*FROM, file, code=0).out == f"{file}: made again with equal pixels\n"


def test_other_weights_are_named(zimage: CommandLine) -> None:
    zimage(*MAKE, *SIZE, "--prompt", "a red apple", "--steps", 1, "-o", "a.png", code=0)
    other = zimage.folder / "other"
    shutil.copytree(CHECKPOINT, other)
    tensors = load_file(other / TRANSFORMER)
    save_file({name: tensor * 0.9 for name, tensor in tensors.items()}, other / TRANSFORMER)
    ended = zimage("generate", "--model", other, "--from", "a.png", code=1)
    (before,) = (line for line in ended.err.splitlines() if line.startswith("warning: "))
    assert before.startswith("warning: model weights: were sha256:")
    assert "(z-image-tiny), now sha256:" in before and before.endswith(f"({other})")
    assert ended.out.splitlines()[1] == "what is not as it was:"
    assert ended.out.splitlines()[2].strip() == before.removeprefix("warning: ")


def test_pictures_and_adapters_are_asked_for(zimage: CommandLine) -> None:
    import torch

    from zimage_core import load_from_local_dir

    parts = load_from_local_dir(CHECKPOINT, device="cpu", dtype=torch.float32)
    for seed, name in enumerate(("ink", "pixel")):
        modules = ("layers.0.attention.to_q", "layers.0.feed_forward.w1")
        pairs = train(parts["transformer"], modules, strength=2.0, seed=seed)
        write(zimage.folder / f"{name}.safetensors", FORMATS["ai-toolkit"][0](pairs))
    Image.radial_gradient("L").resize((32, 32)).convert("RGB").save(zimage.folder / "g.png")
    start = ("--init-image", "g.png", "--strength", 0.5)
    first = ("--lora", "ink.safetensors", "--lora-scale", 0.75)
    second = ("--lora", "pixel.safetensors", "--lora-scale", -0.5)
    known = (*MAKE, *SIZE, "--prompt", "a red apple", "--steps", 2)
    zimage(*known, *start, *first, *second, "-o", "a.webp", code=0)
    with Image.open(zimage.folder / "a.webp") as image:
        assert b"compositeWithTrainedAlgorithmicMedia" in image.info["xmp"]
    error = zimage(*FROM, "a.webp", code=2).err
    assert "--init-image: not given; a.webp was started from a picture, sha256 " in error
    error = zimage(*FROM, "a.webp", "--init-image", "g.png", code=2).err
    assert "--lora: not given; a.webp was made with ink.safetensors (sha256:" in error
    assert ") at 0.75, pixel.safetensors (sha256:" in error and ") at -0.5" in error
    files = ("--lora", "pixel.safetensors", "--lora", "ink.safetensors")
    ended = zimage(*FROM, "a.webp", "--init-image", "g.png", *files, code=0)
    assert ended.out == "a.webp: made again with equal pixels\n"

    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(zimage.folder / "h.png")
    ended = zimage(*FROM, "a.webp", "--init-image", "h.png", *files, code=1)
    assert "warning: --init-image: sha256 was " in ended.err
    assert "\n  --init-image: sha256 was " in ended.out


def file_with(text: bytes, form: ImageFormat = "png", size: int = 32) -> bytes:
    """An image whose document is any bytes."""
    plain = WRITERS[form].encode(
        np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)
    )
    if form == "png":
        added = b"".join(png.chunk(b"iTXt", b"zimage\0\0\0\0\0" + text))
        return plain[:33] + added + plain[33:]
    mark = "X" * len(text)
    whole = add_metadata(plain, document={"x": mark}, xmp="", software="x")
    return whole.replace(b'{"x": "' + mark.encode() + b'"}', text + b" " * 9)


GOOD: dict[str, Any] = {
    "schema_version": 1,
    "program": "zimage-batch",
    "version": "0.1.0",
    "digital_source_type": "x",
    "prompt": "a cat",
    "seed": 1,
    "width": 32,
    "height": 32,
    "num_inference_steps": 2,
    "guidance_scale": 0.0,
    "cfg_normalization": False,
    "cfg_truncation": 1.0,
    "max_sequence_length": 512,
    "model": "/etc/passwd",
    "model_fingerprint": "sha256:" + "0" * 64,
    "dtype": "float32",
    "attention": "native",
    "compile": False,
    "quantization": "none",
    "device_type": "cpu",
    "threads": 1,
}
LORA = {"name": "../x", "scale": 1.0, "fingerprint": None}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"schema_version": 2}, "schema_version: 2; allowed: 1 (another version"),
    "version as text": ({"schema_version": "1"}, "schema_version: '1': "),
    "no prompt": ({"prompt": None}, "says no more than that zimage-batch 0.1.0 made it"),
    "prompt": ({"prompt": ["a"]}, "prompt: ['a']: "),
    "long prompt": ({"prompt": "a" * 16_385}, "at most 16384 characters"),
    "long": ({"prompt": "a" * 60_000}, " characters; allowed: up to 60,000"),
    "seed": ({"seed": -1}, "seed: -1: "),
    "large seed": ({"seed": 2**63}, "seed: 9223372036854775808: "),
    "huge seed": ({"seed": 10**4000}, "seed: 1000"),
    "seed as fraction": ({"seed": 1.5}, "seed: 1.5: "),
    "boolean": ({"threads": True}, "threads: True: "),
    "threads": ({"threads": 100_000}, "threads: 100000: "),
    "side": ({"width": 33}, "width: 33: "),
    "large sides": ({"width": 2**20, "height": 2**20}, "over 67,108,864 pixels"),
    "other size": ({"height": 48}, "has 32 x 32 pixels, and its metadata says 32 x 48"),
    "steps": ({"num_inference_steps": 10**9}, "num_inference_steps: 1000000000: "),
    "no number": ({"guidance_scale": float("nan")}, "guidance_scale: nan: "),
    "infinite": ({"guidance_scale": float("inf")}, "guidance_scale: inf: "),
    "strength": ({"strength": 2.0}, "strength: 2.0: "),
    "cache": ({"cache": 100}, "cache: 100: "),
    "dtype": ({"dtype": "float64"}, "dtype: 'float64': "),
    "attention": ({"attention": "os.system"}, "attention: 'os.system': "),
    "fingerprint": ({"model_fingerprint": "sha256:../x"}, "model_fingerprint: 'sha256:../x': "),
    "line end": ({"model_fingerprint": "sha256:" + "0" * 64 + "\n"}, "model_fingerprint: "),
    "hash": ({"init_image_sha256": "/etc/passwd"}, "init_image_sha256: '/etc/passwd': "),
    "hashes": ({"images_sha256": ["0" * 64] * 65}, "images_sha256: "),
    "loras": ({"loras": [LORA] * 65}, "loras: "),
    "lora": ({"loras": [{**LORA, "path": "x"}]}, "'loras.0.path': no key of it"),
    "lora scale": ({"loras": [{**LORA, "scale": float("inf")}]}, "loras.0.scale: inf: "),
    "job": ({"job": "../x"}, "job: '../x': "),
    "key": ({"model_path": "/etc/passwd"}, "'model_path': no key of it"),
    "terminal": ({"\x1b[2J": 1}, "no key of it; another version of this program may have written"),
}
TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no JSON document: "),
    "text": (b"a cat, steps: 8", "no JSON document: "),
    "list": (b"[]", "metadata: []: "),
    "deep": (b"[" * 50_000, "no JSON document: "),
    "missing": (b"{}", "schema_version: missing"),
    "cut": (json.dumps(GOOD).encode()[:-9], "no JSON document: "),
    "python": (b"__import__('os').system('x')", "no JSON document: "),
}


def refused(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with bounded(tmp_path, seconds=20), pytest.raises(InputError) as caught:
        read_source(path, "--from")
    words = str(caught.value)
    assert words.startswith(f"--from: {path}: ") and "\n" not in words
    assert len(words) < 400
    return words


def test_what_is_changed_below_is_good(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(file_with(json.dumps(GOOD).encode()))
    assert read_source(tmp_path / "a.png", "--from").making.prompt == "a cat"


@pytest.mark.parametrize("form", ["png", "jpeg"])
@pytest.mark.parametrize("case", BAD)
def test_documents_that_cannot_be_are_refused(tmp_path: Path, case: str, form: ImageFormat) -> None:
    changes, words = BAD[case]
    text = json.dumps({**GOOD, **changes}).encode()
    if form == "png" or len(text) < 60_000:
        assert words in refused(tmp_path, file_with(text, form))


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_are_no_document_are_refused(tmp_path: Path, case: str) -> None:
    text, words = TEXTS[case]
    assert words in refused(tmp_path, file_with(text))


def bomb() -> bytes:
    """A compressed document of 64 MB."""
    plain = WRITERS["png"].encode(np.zeros((32, 32, 3), np.uint8))
    text = b"zimage\0\1\0\0\0" + zlib.compress(bytes(64 * 2**20))
    return plain[:33] + b"".join(png.chunk(b"iTXt", text)) + plain[33:]


def webp_of_lies() -> bytes:
    content = bytearray(file_with(json.dumps(GOOD).encode(), "webp"))
    at = content.index(b"EXIF")
    content[at + 4 : at + 8] = struct.pack("<I", 2**31)
    return bytes(content)


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "plain": (lambda: WRITERS["png"].encode(np.zeros((8, 8, 3), np.uint8)), "does not say how"),
    "jpeg": (lambda: WRITERS["jpeg"].encode(np.zeros((8, 8, 3), np.uint8)), "does not say how"),
    "empty": (lambda: b"", "the file is empty"),
    "no image": (lambda: b"%PDF-1.7", "not an image, or damaged"),
    "cut off": (lambda: file_with(json.dumps(GOOD).encode())[:-900], "damaged or cut off"),
    "bomb": (bomb, "a.png: "),
    "lengths": (webp_of_lies, "a.png: "),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_say_nothing_are_refused(tmp_path: Path, case: str) -> None:
    make, words = FILES[case]
    assert words in refused(tmp_path, make())


def test_other_images_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "GIF")
    assert "an image of another kind; allowed: a PNG" in refused(tmp_path, buffer.getvalue())


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_bytes_changed_at_random_are_read_or_refused(tmp_path: Path, form: ImageFormat) -> None:
    good = file_with(json.dumps(GOOD).encode(), form)
    place, chance = good.index(b"schema_version") - 60, random.Random(0)
    outcomes = set()
    for _ in range(80):
        content = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            content[place + chance.randrange(120)] = chance.randrange(256)
        (tmp_path / "a.png").write_bytes(content)
        try:
            outcomes.add(read_source(tmp_path / "a.png", "--from").making.prompt)
        except InputError as error:
            outcomes.add(type(error).__name__)
            assert "\n" not in str(error)
    assert "InputError" in outcomes


def test_hostile_files_end_in_one_line(zimage: CommandLine) -> None:
    (zimage.folder / "a.png").write_bytes(file_with(json.dumps({**GOOD, "\x1b[2J": 1}).encode()))
    for flags in (["a.png"], ["nope.png"], ["job.yaml"], ["."]):
        error = zimage(*FROM, *flags, code=2).err
        assert error.startswith(f"zimage generate: --from: {flags[0]}: ") and error.count("\n") == 1
        assert "\x1b" not in error
    long = {**GOOD, "prompt": "a", "cut": ["prompt"]}
    (zimage.folder / "a.png").write_bytes(file_with(json.dumps(long).encode()))
    error = zimage(*FROM, "a.png", code=2).err
    assert (
        "--from: a.png: its prompt was too long to be written whole; give it with --prompt" in error
    )
    for flag in ("--prompt", "--output"):
        given = ["--prompt", "x", "-o", "x.png"]
        del given[2 * (flag == "--output") : 2 * (flag == "--output") + 2]
        error = zimage(*MAKE, *given, code=2).err
        assert f"{flag}: not given; required without --from" in error
