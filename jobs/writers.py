"""Writers: pixels to an image file's bytes, and the hashes that identify both."""

from __future__ import annotations

import hashlib
import io
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs import png
from jobs.config import OutputConfig

Pixels = NDArray[np.uint8]
ImageFormat = Literal["png", "jpeg", "webp"]


class Writer(Protocol):
    """Encodes one image; the same pixels always give the same bytes."""

    extension: str

    def encode(self, pixels: Pixels) -> bytes:
        """The file's bytes for `pixels`, a uint8 array (H, W, 3)."""
        ...


class PNGWriter:
    """Lossless.

    Args:
        level: 0 to 3 are ISA-L's, which take a tenth of zlib's time; 4 to 9 are zlib's, with
            filters chosen for each row.
    """

    extension = "png"

    def __init__(self, level: int = 1) -> None:
        self.level = level

    def encode(self, pixels: Pixels) -> bytes:
        """See `Writer.encode`."""
        if self.level in png.LEVELS:
            return png.encode_png(pixels, self.level)
        return _encode(pixels, "PNG", compress_level=self.level)


class JPEGWriter:
    """Quality 95 without chroma subsampling."""

    extension = "jpg"

    def encode(self, pixels: Pixels) -> bytes:
        """See `Writer.encode`."""
        return _encode(pixels, "JPEG", quality=95, subsampling=0)


class WebPWriter:
    """Lossy, quality 95."""

    extension = "webp"

    def encode(self, pixels: Pixels) -> bytes:
        """See `Writer.encode`."""
        return _encode(pixels, "WEBP", quality=95, method=4)


WRITERS: dict[ImageFormat, Writer] = {
    "png": PNGWriter(),
    "jpeg": JPEGWriter(),
    "webp": WebPWriter(),
}


def job_writer(output: OutputConfig) -> Writer:
    """The writer of a job's images."""
    return PNGWriter(output.png_level) if output.format == "png" else WRITERS[output.format]


def sha256(content: bytes) -> str:
    """Hex digest of a file's bytes."""
    return hashlib.sha256(content).hexdigest()


def pixels_sha256(pixels: Pixels) -> str:
    """Hex digest of a uint8 array (H, W, 3) in C order; equal images, whatever their format."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def decode_image(content: bytes) -> Pixels:
    """An image file's pixels as uint8 (H, W, 3). Raises OSError for a damaged file."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def _encode(pixels: Pixels, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()
