"""Image files that others made: found below a folder, read within limits, decoded to RGB.

Nothing in a file is trusted: neither its name, nor its size, nor what it says of itself. Whatever
is wrong with one is an `ImageFileError` that begins with the name it was asked for by.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What is decoded; Pillow's other readers are left alone, as some start other programs."""
MAX_BYTES = 256 * 2**20
"""Of a file."""
MAX_PIXELS = 2**26
"""Width times height: 8192 x 8192."""

_ORIENTATION = 0x0112  # of EXIF
_QUARTER_TURNS = (5, 6, 7, 8)
_CONVERTED = ("RGB", "1", "L", "P", "CMYK", "YCbCr", "RGBX")


class ImageFileError(ValueError):
    """An image file that cannot be used; the message names it and says what is allowed."""


@dataclass(frozen=True)
class ImageFile:
    """The bytes of a file, read once, so that the hash is of what is decoded.

    Args:
        name: how messages call it.
    """

    name: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Of the content, hex."""
        return hashlib.sha256(self.content).hexdigest()

    def check(self) -> None:
        """Look at the header alone; raises ImageFileError as `decode` does."""
        with _silently():
            self._open().close()

    def size(self) -> tuple[int, int]:
        """Width and height in pixels, turned as `decode` does, from the header alone.

        Of a PNG whose orientation stands behind its pixels they are those before it is turned.

        Raises:
            ImageFileError: as `check`.
        """
        with _silently(), self._open() as image:
            width, height = image.size
            try:
                # Pillow opens a TIFF with its sides turned already, and would decode a PNG to look
                # for EXIF data behind the pixels.
                asked = image.format != "TIFF"
                asked &= image.format != "PNG" or "exif" in image.info
                turned = asked and image.getexif().get(_ORIENTATION) in _QUARTER_TURNS
            except Exception:  # noqa: BLE001 - hostile EXIF data; `decode` says what it is worth
                turned = False
        return (height, width) if turned else (width, height)

    def decode(self, convert: Callable[[Image], Image] | None = None) -> Image:
        """Decode, turned as its EXIF orientation says. Colour profiles are not applied.

        Args:
            convert: what is made of the decoded image; a ValueError of it is one of the file. None
                is `to_rgb`: RGB, 8 bits a channel.

        Raises:
            ImageFileError: no image of `FORMATS`, too many pixels, more than one frame, damaged or
                cut off, or of a kind that `convert` refuses.
        """
        from PIL import ImageOps

        with _silently(), self._open() as image:
            try:
                image.load()
                upright = ImageOps.exif_transpose(image)
            except Exception as error:
                # On hostile bytes Pillow's decoders raise nearly anything.
                raise ImageFileError(f"{self.name}: damaged or cut off: {error}") from error
            # What kind of file it was tells what the numbers of mode "I" mean.
            upright.format = image.format
            try:
                return (convert or to_rgb)(upright)
            except Exception as error:
                raise ImageFileError(f"{self.name}: {error}") from error

    def _open(self) -> Image:
        from PIL import Image as PilImage
        from PIL import UnidentifiedImageError

        allowed = f"allowed: {', '.join(FORMATS)}"
        try:
            image = PilImage.open(io.BytesIO(self.content), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ImageFileError(f"{self.name}: not an image, or damaged; {allowed}") from error
        except PilImage.DecompressionBombError as error:
            raise ImageFileError(f"{self.name}: far too large; {_pixels_allowed()}") from error
        except Exception as error:
            raise ImageFileError(f"{self.name}: damaged: {error}; {allowed}") from error
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageFileError(f"{self.name}: {width} x {height} pixels; {_pixels_allowed()}")
        # A JPEG with further pictures in it (MPO), as phones write them, shows its first one.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise ImageFileError(
                f"{self.name}: {image.format} of more than one frame; allowed: a still image"
            )
        return image


@contextmanager
def _silently() -> Iterator[None]:
    """Without Pillow's warnings, several lines each, of damage that does not matter (EXIF data)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_image(path: Path, *, name: str | None = None) -> ImageFile:
    """Read a file.

    Args:
        path: the file.
        name: how messages call it; `path` if not given.

    Raises:
        ImageFileError: there is no such file, it is no regular file, empty, over `MAX_BYTES`, or
            cannot be read.
    """
    name = str(path) if name is None else name
    try:
        # Not to wait for a writer where the name is that of a pipe.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise ImageFileError(f"{name}: a folder, pipe or device; allowed: a file")
        with os.fdopen(handle, "rb") as file:
            # Not read to its end to find out; a size can lie, so that what is read is bounded too.
            large = os.fstat(file.fileno()).st_size > MAX_BYTES
            content = b"" if large else file.read(MAX_BYTES + 1)
    except ImageFileError:
        raise
    except FileNotFoundError as error:
        raise ImageFileError(f"{name}: no such file") from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise ImageFileError(f"{name}: cannot be read: {reason}") from error
    if not content and not large:
        raise ImageFileError(f"{name}: the file is empty")
    if large or len(content) > MAX_BYTES:
        raise ImageFileError(f"{name}: over {MAX_BYTES // 2**20} MiB, which is the most allowed")
    return ImageFile(name, content)


def path_below(root: Path, name: str) -> Path:
    """Resolve a name that came from elsewhere, such as a table, to a path below a folder.

    Args:
        root: the folder.
        name: relative to it, with `/` between folders; links are followed as long as they lead to
            something below it.

    Raises:
        ImageFileError: the name is absolute, holds `..` or a zero byte, leads out of the folder
            through a link, or there is no such file.
    """
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\0" in name or not parts.parts:
        raise ImageFileError(f"{name}: allowed: a path relative to {root}, without ..")
    try:
        base = root.resolve(strict=True)
        path = (base / parts).resolve(strict=True)
    except FileNotFoundError as error:
        raise ImageFileError(f"{name}: no such file below {root}") from error
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise ImageFileError(f"{name}: cannot be found below {root}: {error}") from error
    if not path.is_relative_to(base):
        raise ImageFileError(f"{name}: a link leads out of {root}, to {path}; allowed: below it")
    return path


def to_rgb(image: Image) -> Image:
    """Convert a PIL image to RGB, 8 bits a channel; one that is RGB already is returned as it is.

    Transparency, of whatever form, is laid on white. 16-bit grey is rounded to 8 bits, not cut.

    Raises:
        ValueError: the mode has no agreed range or no conversion (`F`, `LAB`, 32-bit integers).
    """
    from PIL import Image as PilImage

    # Older versions of Pillow open a 16-bit PNG as 32-bit integers.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _from_16_bit(image).convert("RGB")
    if image.has_transparency_data:
        # RGBA with colours that were multiplied by their alpha has its own way back.
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = PilImage.new("RGBA", rgba.size, "white")
        return PilImage.alpha_composite(white, rgba).convert("RGB")
    if image.mode not in _CONVERTED:
        raise ValueError(
            f"image of mode {image.mode!r}; allowed: 8-bit grey, colour or palette, with or "
            "without transparency, CMYK, 16-bit grey"
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bit(image: Image) -> Image:
    from PIL import Image as PilImage

    values = np.asarray(image).astype(np.int64)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = 65535  # the value that stands for nothing, on white
    return PilImage.fromarray(((values * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))


def _pixels_allowed() -> str:
    return f"allowed: at most {MAX_PIXELS:,} pixels, such as 8192 x 8192"
