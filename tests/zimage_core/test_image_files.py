"""Files that others made: every way in which one may be wrong is one error that names it."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from zimage_core import image_files
from zimage_core.image_files import ImageFile, ImageFileError, path_below, read_image, to_rgb

RED, BLUE = (255, 0, 0), (0, 0, 255)


def drawing(size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Red, with a blue corner at the top left."""
    image = Image.new("RGB", size, RED)
    ImageDraw.Draw(image).rectangle((0, 0, size[0] // 4, size[1] // 4), fill=BLUE)
    return image


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray[Any, Any]:
    image = ImageFile("a", content).decode()
    assert image.mode == "RGB"
    return np.asarray(image)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int = 8, color: int = 0, data: bytes = b"") -> bytes:
    """A PNG by hand: its header may promise what its data does not hold."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


FRAMES = [drawing(), Image.new("RGB", (40, 24), BLUE)]
GOOD = saved(drawing())
JPEG = saved(drawing(), "JPEG", quality=95)
BAD: dict[str, tuple[bytes, str]] = {
    "text": (b"id,prompt\n1,a cat\n", "not an image, or damaged; allowed: PNG, JPEG, WEBP"),
    "web page": (b"<!DOCTYPE html><html></html>", "not an image, or damaged"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image, or damaged"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "a header alone": (GOOD[:20], "damaged: .*; allowed: PNG, JPEG"),
    "truncated png": (GOOD[:-40], "damaged or cut off"),
    "truncated jpeg": (JPEG[: -len(JPEG) // 10], "damaged or cut off"),
    "jpeg without its end": (JPEG[:-30], "damaged or cut off"),
    "truncated webp": (saved(drawing(), "WEBP")[:-20], "damaged"),
    "truncated bmp": (saved(drawing(), "BMP")[:-200], "damaged or cut off"),
    "truncated tiff": (saved(drawing(), "TIFF")[:-300], "damaged|not an image"),
    "garbage for data": (
        GOOD[:41] + b"\x00" * 20 + GOOD[61:],
        "damaged or cut off",
    ),
    "bomb": (png(30000, 30000), "far too large; allowed: at most 67,108,864 pixels"),
    "large": (png(9000, 9000), "9000 x 9000 pixels; allowed: at most 67,108,864 pixels"),
    "wide": (png(2**30, 3), "far too large"),
    "nothing in it": (png(64, 64), "damaged or cut off"),
    "no width": (png(0, 9), "damaged|not an image"),
    "gif": (
        saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
        "GIF of more than one frame; allowed: a still image",
    ),
    "png": (
        saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
        "PNG of more than one frame",
    ),
    "webp": (
        saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
        "WEBP of more than one frame",
    ),
    "tiff": (
        saved(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]),
        "TIFF of more than one frame",
    ),
    "floats": (saved(Image.new("F", (9, 9)), "TIFF"), "image of mode 'F'; allowed: 8-bit grey"),
    "32-bit integers": (saved(Image.new("I", (9, 9)), "TIFF"), "image of mode 'I'; allowed"),
    "lab": (saved(Image.new("LAB", (9, 9)), "TIFF"), "image of mode 'LAB'; allowed"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files(case: str) -> None:
    content, message = BAD[case]
    with pytest.raises(ImageFileError, match=message) as caught:
        ImageFile("faces/a.png", content).decode()
    assert str(caught.value).startswith("faces/a.png: ")


@pytest.mark.parametrize("case", ["text", "large", "bomb", "gif", "webp", "tiff"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_header_alone_is_enough_for(case: str) -> None:
    with pytest.raises(ImageFileError, match=BAD[case][1]):
        ImageFile("a", BAD[case][0]).check()


def test_check_reads_no_pixels() -> None:
    ImageFile("a", GOOD).check()
    ImageFile("a", GOOD[:-40]).check()  # what is cut off shows when it is decoded


def test_damage_never_escapes_as_another_error() -> None:
    rng = np.random.default_rng(0)
    options = {"TIFF": {"compression": "tiff_lzw"}}
    for kind in image_files.FORMATS:
        content = saved(drawing(), kind, **options.get(kind, {}))
        for _ in range(60):
            damaged = bytearray(content)
            for _ in range(rng.integers(1, 6)):
                damaged[rng.integers(len(damaged))] = rng.integers(256)
            try:
                assert ImageFile("a", bytes(damaged)).decode().mode == "RGB"
            except ImageFileError as error:
                assert str(error).startswith("a: ")


@pytest.mark.parametrize("kind", image_files.FORMATS)
def test_formats(kind: str) -> None:
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    pixels = decoded(saved(drawing(), kind, **options.get(kind, {})))
    np.testing.assert_allclose(pixels, np.asarray(drawing()), atol=3)


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise to be seen upright
    content = saved(drawing(), "JPEG", exif=exif, quality=95)
    image = ImageFile("a", content).decode()
    assert image.size == (24, 40)
    assert np.asarray(image)[3, 20, 2] > 200  # the blue corner is at the top right now
    assert ImageFile("a", saved(drawing(), exif=exif)).decode().size == (24, 40)


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_size_in_the_header_is_the_decoded_one(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = ImageFile("a", saved(drawing(), kind, exif=exif))
    assert file.size() == file.decode().size


def test_the_size_needs_no_pixels() -> None:
    cut = saved(drawing((4000, 3000)))[:200]
    assert ImageFile("a", cut).size() == (4000, 3000)
    turned = saved(drawing((400, 300)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1")
    assert ImageFile("a", turned).size() == (400, 300)
    with pytest.raises(ImageFileError, match="a: not an image"):
        ImageFile("a", b"no picture").size()


def test_a_phones_jpeg_with_a_second_picture_shows_the_first() -> None:
    content = saved(
        FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:], quality=95, subsampling=0
    )
    np.testing.assert_allclose(decoded(content), np.asarray(drawing()), atol=20)


def half_clear(mode: str) -> Image.Image:
    """Black, the left half transparent, and a column that is half of it."""
    image = Image.new("RGBA", (4, 1), (0, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 127))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
def test_transparency_lies_on_white(mode: str) -> None:
    if mode == "La":
        image = half_clear("RGBA").convert("LA").convert("La")
    else:
        image = half_clear(mode)
    pixels = np.asarray(to_rgb(image))[0, :, 0]
    assert pixels.tolist() == [255, 255, 128, 0]


def test_a_transparent_color_lies_on_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    assert decoded(saved(palette)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert decoded(saved(palette, transparency=0)).tolist() == [[[255] * 3, [0, 0, 255]]]
    assert decoded(saved(palette, "GIF", transparency=1)).tolist() == [[[255, 0, 0], [255] * 3]]
    keyed = Image.new("RGB", (2, 1), RED)
    keyed.putpixel((1, 0), BLUE)
    assert decoded(saved(keyed, transparency=RED)).tolist() == [[[255] * 3, [0, 0, 255]]]
    grey = Image.fromarray(np.array([[7, 9]], np.uint8))
    assert decoded(saved(grey, transparency=7))[0, :, 0].tolist() == [255, 9]


def test_16_bits_are_rounded_to_8() -> None:
    values = np.array([[0, 128, 129, 256, 257, 32768, 65407, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 1, 128, 255, 255]  # v / 257, rounded
    for kind in ("PNG", "TIFF"):
        assert decoded(saved(Image.fromarray(values), kind))[0, :, 1].tolist() == expected
    keyed = png(2, 1, depth=16, data=b"\0" + struct.pack(">HH", 300, 25700))
    keyed = keyed.replace(chunk(b"IEND", b""), b"")
    keyed = keyed[:33] + chunk(b"tRNS", struct.pack(">H", 300)) + keyed[33:] + chunk(b"IEND", b"")
    assert decoded(keyed)[0, :, 0].tolist() == [255, 100]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGBX"])
def test_other_modes_show_the_same(mode: str) -> None:
    source = drawing().convert(mode)
    pixels = np.asarray(to_rgb(source))
    assert pixels.shape == (24, 40, 3)
    if mode not in ("1", "L"):
        np.testing.assert_allclose(pixels, np.asarray(drawing()), atol=3)
    content = saved(source, "TIFF") if mode in ("CMYK", "YCbCr") else None
    if content is not None:
        np.testing.assert_allclose(decoded(content), pixels, atol=3)


def test_rgb_is_not_copied() -> None:
    image = drawing()
    assert to_rgb(image) is image


# --- finding and reading ------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "pics"
    (folder / "faces").mkdir(parents=True)
    (folder / "faces" / "a.png").write_bytes(GOOD)
    (tmp_path / "secret.png").write_bytes(GOOD)
    (tmp_path / "pics2").mkdir()
    (tmp_path / "pics2" / "b.png").write_bytes(GOOD)
    return folder


def test_names_below_a_folder(root: Path) -> None:
    (root / "link.png").symlink_to("faces/a.png")
    (root / "more").symlink_to(root / "faces")
    for name in ("faces/a.png", "./faces//a.png", "link.png", "more/a.png"):
        assert path_below(root, name) == (root / "faces" / "a.png").resolve()
    other = root.parent / "same"
    other.symlink_to(root)
    assert path_below(other, "faces/a.png") == (root / "faces" / "a.png").resolve()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.png", "allowed: a path relative to .*pics, without .."),
        ("faces/../../secret.png", "allowed: a path relative to"),
        ("faces/../faces/a.png", "allowed: a path relative to"),
        ("{root}/faces/a.png", "allowed: a path relative to"),
        ("a\0b.png", "allowed: a path relative to"),
        (".", "allowed: a path relative to"),
        ("nope.png", "nope.png: no such file below .*pics"),
        ("faces/a.png/b.png", "a.png/b.png: cannot be found below|no such file below"),
        ("out.png", "out.png: a link leads out of .*pics, to .*secret.png; allowed: below it"),
        ("sibling/b.png", "sibling/b.png: a link leads out of .*pics, to .*pics2/b.png"),
        ("loop.png", "loop.png: cannot be found below"),
        ("dangling.png", "dangling.png: no such file below"),
        ("x" * 300, "x: cannot be found below"),
    ],
)
def test_names_that_lead_elsewhere(root: Path, name: str, message: str) -> None:
    (root / "out.png").symlink_to("../secret.png")
    (root / "sibling").symlink_to("../pics2")
    (root / "loop.png").symlink_to("loop.png")
    (root / "dangling.png").symlink_to("gone.png")
    with pytest.raises(ImageFileError, match=message):
        path_below(root, name.format(root=root))


def test_reading(root: Path) -> None:
    file = read_image(root / "faces" / "a.png")
    assert file.content == GOOD
    assert file.name == str(root / "faces" / "a.png")
    found = subprocess.run(["sha256sum", file.name], capture_output=True, text=True, check=True)
    assert file.sha256 == found.stdout.split()[0]
    assert read_image(root / "faces" / "a.png", name="a").name == "a"


def test_what_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(root / "pipe.png")
    (root / "empty.png").touch()
    (root / "large.png").write_bytes(bytes(1001))
    cases = {"pipe.png": "a folder, pipe or device", "faces": "a folder, pipe or device"}
    cases |= {"empty.png": "the file is empty", "gone.png": "no such file"}
    cases["faces/a.png/b.png"] = "cannot be read: Not a directory"
    monkeypatch.setattr(image_files, "MAX_BYTES", 1000)
    cases["large.png"] = "over 0 MiB"
    for name, message in cases.items():
        with pytest.raises(ImageFileError, match=f"{name}: {message}"):
            read_image(root / name)
    with pytest.raises(ImageFileError, match="/dev/zero: a folder, pipe or device"):
        read_image(Path("/dev/zero"))
    # Of these files, not of all: what other tests left behind may be collected meanwhile.
    links = [str(x.readlink()) for x in Path("/proc/self/fd").iterdir() if x.is_symlink()]
    assert not [link for link in links if link.startswith((str(root), "/dev/zero"))]


def test_importing_needs_no_torch() -> None:
    program = "import sys, zimage_core.image_files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
