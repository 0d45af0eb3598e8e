"""PNG files: what the specification says of them, and that every pixel comes back."""

import io
import json
import struct
import threading
import zlib
from importlib.metadata import version

import numpy as np
import pytest
from cli_calls import CommandLine
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from jobs.config import OutputConfig
from jobs.png import encode_png
from jobs.writers import WRITERS, Pixels, decode_image, job_writer

SIZES = [(1, 1), (1, 64), (64, 1), (17, 33), (31, 2), (128, 128), (257, 511)]


def noise(height: int, width: int) -> Pixels:
    rng = np.random.default_rng(height * 1000 + width)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(height: int, width: int) -> Pixels:
    """Smooth, as pictures are: what filters are for."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (9 + c)) + np.cos(y / (13 - c)) for c in range(3)]
    return ((np.stack(waves, -1) + 2) * 63.7).round().astype(np.uint8)


def chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Kinds and data of a PNG's chunks, read by the specification, checksums checked."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = [], 8
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        data = content[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack(">I", content[at + 8 + length : at + 12 + length])
        assert checksum == zlib.crc32(kind + data), kind
        found.append((kind, data))
        at += 12 + length
    assert at == len(content)
    return found


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("size", SIZES)
def test_every_pixel_comes_back(size: tuple[int, int], level: int) -> None:
    for pixels in (noise(*size), picture(*size)):
        content = encode_png(pixels, level)
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", size[::-1])
            assert np.array_equal(np.asarray(image), pixels)
        assert encode_png(pixels.copy(), level) == content


@given(
    arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))),
    st.integers(0, 3),
)
def test_any_pixels_come_back(pixels: Pixels, level: int) -> None:
    content = encode_png(pixels, level)
    assert np.array_equal(decode_image(content), pixels)
    (_, header), (_, data), _ = chunks(content)
    assert len(zlib.decompress(data)) == pixels.shape[0] * (1 + 3 * pixels.shape[1])
    assert header[:8] == struct.pack(">II", pixels.shape[1], pixels.shape[0])


def test_a_file_holds_what_the_specification_asks_for_and_nothing_else() -> None:
    pixels = picture(17, 33)
    (_kind, header), (_, data), (_, end) = found = chunks(encode_png(pixels))
    assert [kind for kind, _ in found] == [b"IHDR", b"IDAT", b"IEND"]
    assert header == struct.pack(">IIBBBBB", 33, 17, 8, 2, 0, 0, 0) and end == b""
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(17, 1 + 3 * 33)
    assert (rows[:, 0] == 2).all()
    restored = np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8)  # the sum of differences, mod 256
    assert np.array_equal(restored.reshape(pixels.shape), pixels)


def test_pixels_need_not_be_contiguous() -> None:
    pixels = noise(40, 60)
    for view in (pixels[::2, ::3], pixels[:, :, ::-1], pixels.transpose(1, 0, 2), pixels[5:, 7:]):
        assert np.array_equal(decode_image(encode_png(view)), view)


def test_other_threads_run_meanwhile() -> None:
    # Of 25 MB of noise the compression alone takes many times as long as a count waits for its
    # turn, so that counting stands still only if the lock is held.
    pixels = noise(2048, 4096)
    counts = []
    done = threading.Event()

    def encode() -> None:
        encode_png(pixels)
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    while not done.wait(0.001):
        counts.append(1)
    thread.join()
    assert len(counts) > 5


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
    ],
    ids=lambda pixels: f"{pixels.dtype} {pixels.shape}",
)
def test_what_is_no_image_is_refused(pixels: Pixels) -> None:
    with pytest.raises(ValueError, match=r"allowed: uint8 \(H, W, 3\)"):
        encode_png(pixels)


@pytest.mark.parametrize("level", [-1, 4, 9])
def test_levels_of_others_are_refused(level: int) -> None:
    with pytest.raises(ValueError, match=f"level {level}; allowed: 0 to 3"):
        encode_png(noise(4, 4), level)


def test_a_job_has_the_level_that_it_asks_for() -> None:
    pixels = picture(200, 300)
    files = {
        level: job_writer(OutputConfig(uri="out", png_level=level)).encode(pixels)
        for level in range(10)
    }
    for level, content in files.items():
        assert np.array_equal(decode_image(content), pixels), level
    assert all(files[level] == encode_png(pixels, level) for level in range(4))
    with io.BytesIO() as buffer:
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=9)
        assert files[9] == buffer.getvalue()
    assert len(files[9]) < len(files[4])
    assert job_writer(OutputConfig(uri="out")).encode(pixels) == files[1]
    assert WRITERS["png"].encode(pixels) == files[1]


def test_a_level_is_pinned_and_stands_for_1_in_older_records(zimage: CommandLine) -> None:
    level_9 = ("--set", "output.png_level=9")
    zimage.run("--count", 1, code=0)
    zimage.run("--count", 1, *level_9, "--output", "small", code=0)
    (row,), (small,) = zimage.rows(), zimage.rows("small")
    assert row["pixels_sha256"] == small["pixels_sha256"] and row["sha256"] != small["sha256"]
    record = zimage.folder / "out" / "job.json"
    content = json.loads(record.read_text())
    assert content["versions"]["isal"] == version("isal")
    del content["job"]["output"]["png_level"]
    record.write_text(json.dumps(content))
    assert "output.png_level: was 1, now 9" in zimage.run(*level_9, code=2).err
    zimage.run("--count", 2, code=0)
    assert zimage.rows()[0] == row
    assert json.loads(record.read_text())["job"]["output"]["png_level"] == 1


def test_a_level_without_png_is_one_clear_error(zimage: CommandLine) -> None:
    wrong = ["--set", "output.format=webp", "--set", "output.png_level=6"]
    (line,) = zimage.run(*wrong, code=2).err.splitlines()
    assert "--set: output.png_level: value 6: without meaning for output.format webp;" in line
    assert "allowed: a whole number from 0 to 9, other than 1 where output.format is png" in line


def test_a_tar_holds_the_same_files(zimage: CommandLine) -> None:
    zimage.run("--count", 2, code=0)
    zimage.run("--count", 2, "--set", "output.layout=webdataset", "--output", "tars", code=0)
    files, tars = zimage.rows(), zimage.rows("tars")
    assert [row["sha256"] for row in files] == [row["sha256"] for row in tars]
    for file, row in zip(files, tars, strict=True):
        tar = (zimage.folder / "tars" / row["tar"]).read_bytes()
        content = tar[row["tar_offset"] : row["tar_offset"] + row["bytes"]]
        assert content == (zimage.folder / "out" / file["file_name"]).read_bytes()
        chunks(content)


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_other_formats_have_writers_of_their_own(form: str) -> None:
    output = OutputConfig.model_validate({"uri": "out", "format": form})
    writer = job_writer(output)
    with Image.open(io.BytesIO(writer.encode(picture(32, 48)))) as image:
        assert image.format == form.upper()
