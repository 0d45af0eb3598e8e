"""Writers: pixels to an image file's bytes, and the hashes that identify both."""

from __future__ import annotations

import hashlib
import io
import warnings
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs import png
from jobs.config import OutputConfig

Pixels = NDArray[np.uint8]
ImageFormat = Literal["png", "jpeg", "webp"]


_DECODED = ("PNG", "JPEG", "WEBP")
_MAX_PIXELS = 2**27  # such as 16384 x 8192
# Sizes are checked here; and of threads that decode, none may change the warnings of all.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


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
    """An image file's pixels as uint8 (H, W, 3).

    Raises OSError for a file that is damaged, too large, or of a format that is not written here.
    """
    try:
        # Other readers of Pillow's are left alone: some start other programs.
        with Image.open(io.BytesIO(content), formats=_DECODED) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise OSError(
                    f"{image.width} x {image.height} pixels; allowed: up to {_MAX_PIXELS:,}"
                )
            return np.asarray(image.convert("RGB"))
    except OSError:
        raise
    except Exception as error:  # on hostile bytes decoders raise nearly anything
        raise OSError(f"damaged: {type(error).__name__}: {error}") from error


def _encode(pixels: Pixels, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()
