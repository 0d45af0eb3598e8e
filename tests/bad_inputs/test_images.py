"""Images to start from that are none: one failed row each, and the job goes on."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from bounds import Refuser, bounded
from cli_calls import CHECKPOINT
from PIL import Image

from jobs.input_images import find_images
from zimage_core.image_files import ImageFileError, read_image

JOB = f"""
name: t
model: {{path: {CHECKPOINT}, dtype: float32}}
prompts: {{generator: table, profiles: t.csv, images_root: pics, options: {{image_column: photo}}}}
sampling: {{width: 32, height: 32, num_inference_steps: 2, strength: 0.5}}
output: {{uri: out, shard_size: 64}}
run: {{max_failure_rate: 1.0}}
"""


def saved(kind: str, size: tuple[int, int] = (32, 32), **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A compressed comment of 64 MB."""
    comment = b"a\0\0" + zlib.compress(bytes(64 * 2**20))
    return png(32, 32, chunk(b"zTXt", comment), chunk(b"IDAT", zlib.compress(bytes(97 * 32))))


def frames() -> bytes:
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:])
    return buffer.getvalue()


IDAT = chunk(b"IDAT", zlib.compress(bytes(97 * 32)))
FILES: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "empty.png": (b"", "the file is empty"),
    "text.png": (b"not an image", "not an image, or damaged; allowed: PNG, JPEG, WEBP"),
    "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image, or damaged"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image, or"),
    "icns.png": (b"icns" + bytes(64), "not an image, or damaged"),
    "magic.png": (b"\x89PNG\r\n\x1a\n", "damaged"),
    "cut.png": (saved("PNG", (256, 256))[:500], "damaged or cut off"),
    "cut.jpg": (saved("JPEG", (256, 256))[:500], "damaged: Truncated File Read"),
    "half.jpg": (saved("JPEG", (256, 256))[:-500], "damaged or cut off"),
    "cut.webp": (saved("WEBP", (256, 256))[:300], "damaged"),
    "cut.gif": (saved("GIF", (256, 256))[:900], "damaged or cut off"),
    "cut.tif": (saved("TIFF", (256, 256))[:500], "damaged"),
    "cut.bmp": (saved("BMP", (256, 256))[:500], "damaged or cut off"),
    "bomb.png": (png(60_000, 60_000, IDAT), "far too large; allowed: at most 67,108,864 pixels"),
    "large.png": (png(9000, 9000, IDAT), "9000 x 9000 pixels; allowed: at most 67,108,864"),
    "long.png": (png(2**31 - 1, 1, IDAT), "allowed: at most 67,108,864 pixels"),
    "nothing.png": (png(0, 0, IDAT), ""),
    "no pixels.png": (png(32, 32), "damaged or cut off"),
    "too many pixels.png": (png(8192, 8192, IDAT), "damaged or cut off"),
    "text bomb.png": (text_bomb, "damaged"),
    "not packed.png": (png(32, 32, chunk(b"IDAT", bytes(97 * 32))), "damaged or cut off"),
    "frames.gif": (frames, "GIF of more than one frame; allowed: a still image"),
    "float.tif": (lambda: _mode("F"), "image of mode 'F'; allowed: 8-bit grey, colour"),
    "numbers.tif": (lambda: _mode("I"), "image of mode 'I'; allowed: 8-bit grey, colour"),
    "bomb.bmp": (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, *[0] * 6),
        "far too large",
    ),
}


def _mode(mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 8)).save(buffer, "TIFF")
    return buffer.getvalue()


def content_of(name: str) -> bytes:
    made = FILES[name][0]
    return made if isinstance(made, bytes) else made()


@pytest.mark.parametrize("name", FILES)
def test_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content_of(name))
    with bounded(tmp_path), pytest.raises(ImageFileError) as error:
        file = read_image(path, name=name)
        file.check()
        file.decode()
    assert str(error.value).startswith(f"{name}: ")
    assert FILES[name][1] in str(error.value)


def hostile_names(folder: Path) -> dict[str, str]:
    """Names as a table may give them for images below `pics`, and the words of their errors."""
    pics = folder / "pics"
    (pics / "people").mkdir(parents=True)
    (folder / "secret.png").write_bytes(saved("PNG"))
    for name, target in {
        "out.png": folder / "secret.png",
        "up": folder,
        "loop.png": "loop.png",
        "gone link.png": "nothing",
        "zero.png": "/dev/zero",
        "passwd.png": "/etc/passwd",
    }.items():
        (pics / name).symlink_to(target)
    os.mkfifo(pics / "pipe.png")
    with (pics / "sparse.png").open("wb") as file:
        file.truncate(2**35)
    return {
        "../secret.png": "allowed: a path relative to",
        "people/../../secret.png": "allowed: a path relative to",
        "./../secret.png": "allowed: a path relative to",
        str(folder / "secret.png"): "allowed: a path relative to",
        "/etc/passwd": "allowed: a path relative to",
        "out.png": "a link leads out of",
        "up/secret.png": "a link leads out of",
        "passwd.png": "a link leads out of",
        "zero.png": "a link leads out of",
        "loop.png": "cannot be found below",
        "gone link.png": "no such file below",
        "gone.png": "no such file below",
        "people": "a folder, pipe or device; allowed: a file",
        "pipe.png": "a folder, pipe or device; allowed: a file",
        "sparse.png": "over 256 MiB, which is the most allowed",
        "a" * 300: "cannot be found below",
        "https://example.org/a.png": "no such file below",
        "file:///etc/passwd": "no such file below",
        "~/a.png": "no such file below",
        "$HOME/a.png": "no such file below",
        "\u202egnp.a": "no such file below",
    }


def test_name(tmp_path: Path) -> None:
    for name, words in hostile_names(tmp_path).items():
        with bounded(tmp_path), pytest.raises(ImageFileError) as error:
            find_images(tmp_path / "pics", (name,))
        assert str(error.value).startswith(f"{name}: ")
        assert words in str(error.value)
    with pytest.raises(ImageFileError, match="allowed: a path relative to"):
        find_images(tmp_path / "pics", ("a\0.png",))


def test_each_is_one_failed_row(refuse: Refuser) -> None:
    """What is in the table before and after them is made."""
    folder = refuse.folder
    words = hostile_names(folder)
    for name, (_, said) in FILES.items():
        (folder / "pics" / name).write_bytes(content_of(name))
        words[name] = said
    (folder / "pics/good.png").write_bytes(saved("PNG"))
    lines = [f'"a cat","{name}"' for name in ("good.png", *words, "good.png")]
    refuse.zimage.write("job.yaml", JOB)
    refuse.zimage.write("t.csv", "\n".join(["prompt,photo", *lines]))
    with bounded(folder, may_write=["out"], seconds=40, megabytes=1200):
        ended = refuse.zimage.run(code=3)
    assert f"2 of {len(words) + 2} images" in ended.err
    first, *bad, last = refuse.zimage.rows()
    assert first["status"] == last["status"] == "ok"
    for row, (name, said) in zip(bad, words.items(), strict=True):
        assert (row["status"], row["error_type"], row["file_name"]) == (
            "failed",
            "prompt_error",
            None,
        ), name
        assert name in row["error_message"] and said in row["error_message"]
        assert "Traceback" not in row["error_message"]
    images = [p.name for p in (folder / "out").rglob("*.png")]
    assert sorted(images) == ["t_00000000.png", f"t_{len(words) + 1:08d}.png"]


def test_generate_names_the_flag(refuse: Refuser) -> None:
    (refuse.folder / "cut.png").write_bytes(content_of("cut.png"))
    os.mkfifo(refuse.folder / "pipe.png")
    generate = ["generate", "--model", CHECKPOINT, "--prompt", "a cat", "-o", "x.png"]
    generate += ["--width", 32, "--height", 32, "--steps", 2]
    for name, words in (("cut.png", "damaged or cut off"), ("pipe.png", "a folder, pipe or devi")):
        words = f"--init-image: {name}: {words}"
        refuse(*generate, "--init-image", name, code=2, words=[words])
