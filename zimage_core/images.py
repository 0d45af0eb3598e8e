"""Pixels: from images that are given to tensors, from decoded tensors to arrays and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from zimage_core.image_files import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

    GivenImage = Image | NDArray[Any] | Tensor

_ALLOWED = (
    "a PIL image; a float tensor (3, H, W) or (B, 3, H, W), or a float array (H, W, 3) or "
    "(B, H, W, 3), in [0, 1]; the same as uint8 in 0 to 255; or a list of these"
)
_ALLOWED_TYPES = "allowed: float in [0, 1], or uint8"


def from_input(given: GivenImage | Sequence[GivenImage], *, height: int, width: int) -> Tensor:
    """Bring images to one size and to one form.

    A PIL image is converted by `image_files.to_rgb` (transparency lies on white) and resized by
    Lanczos' filter; of a tensor or an array, which may hold many images, the nearest pixel is
    taken: what diffusers' VaeImageProcessor does. The aspect ratio is not kept.

    Args:
        given: a PIL image; a float tensor (3, H, W) or (B, 3, H, W), or a float array (H, W, 3) or
            (B, H, W, 3), in [0, 1]; the same as uint8 in 0 to 255; or a list of these.
        height: in pixels, of the result.
        width: in pixels, of the result.

    Returns:
        (N, 3, height, width) float32 in [0, 1] on the CPU.

    Raises:
        ValueError: an image is none of these, or a value is out of range.
    """
    images = list(given) if isinstance(given, Sequence) else [given]
    if not images:
        raise ValueError("image: the list is empty")
    joined = torch.cat([_from_one(image, height, width) for image in images])
    # In one layout, whatever was given: the layout chooses among kernels that round differently.
    return joined.contiguous()


def to_rgb_images(given: GivenImage, *, name: str = "image") -> list[Image]:
    """Bring one of what `from_input` accepts to RGB images of their own size, rounded to 8 bits.

    Args:
        given: no list; a tensor or array may hold many images.
        name: the argument's, in messages.

    Raises:
        ValueError: see `from_input`.
    """
    from PIL import Image as PilImage

    if isinstance(given, PilImage.Image):
        try:
            return [to_rgb(given)]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return to_pil(_unit_tensor(given, name))


def from_rgb(image: Image) -> Tensor:
    """An RGB image as (1, 3, H, W) float32 in [0, 1] on the CPU."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return to_unit(pixels).contiguous()


def _from_one(image: object, height: int, width: int) -> Tensor:
    from PIL import Image as PilImage

    if isinstance(image, PilImage.Image):
        resized = to_rgb(image).resize((width, height), PilImage.Resampling.LANCZOS)
        return to_unit(torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None])
    return F.interpolate(_unit_tensor(image), size=(height, width), mode="nearest")


def _unit_tensor(image: object, argument: str = "image") -> Tensor:
    """A given tensor or array as (N, 3, H, W) float32 in [0, 1] on the CPU."""
    if not isinstance(image, np.ndarray | Tensor):
        raise ValueError(f"{argument}: {type(image).__name__}; allowed: {_ALLOWED}")
    shape, channels = tuple(image.shape), -1 if isinstance(image, np.ndarray) else -3
    if len(shape) not in (3, 4) or shape[channels] != 3 or 0 in shape:
        name = type(image).__name__
        raise ValueError(f"{argument}: {name} of shape {shape}; allowed: {_ALLOWED}")
    return to_unit(image, argument).reshape(-1, *shape[-3:]).movedim(channels, 1)


def to_unit(image: NDArray[Any] | Tensor, argument: str = "image") -> Tensor:
    """Float32 in [0, 1] on the CPU, in shape: of 8-bit values, or of floats in [0, 1].

    Args:
        image: not empty.
        argument: its name, in messages.

    Raises:
        ValueError: another dtype, or a value is out of range.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 and image.dtype.kind != "f":
            raise ValueError(f"{argument}: dtype {image.dtype}; {_ALLOWED_TYPES}")
        image = torch.from_numpy(image.astype(np.uint8 if image.dtype == np.uint8 else np.float32))
    image = image.cpu()
    if image.dtype == torch.uint8:
        return image.float() / 255.0
    if not image.is_floating_point():
        raise ValueError(f"{argument}: dtype {image.dtype}; {_ALLOWED_TYPES}")
    image = image.float()
    low, high = image.min().item(), image.max().item()
    if not (low >= 0.0 and high <= 1.0):  # NaN is not
        raise ValueError(f"{argument}: values from {low:g} to {high:g}; allowed: 0 to 1")
    return image


def check_side(name: str, value: int, multiple: int) -> None:
    """Raise ValueError, with the nearest allowed ones, unless a side is a multiple of a number."""
    if value < 1 or value % multiple:
        below = value // multiple * multiple
        nearest = " or ".join(str(size) for size in (below, below + multiple) if size > 0)
        if value < 1:
            nearest = str(multiple)
        raise ValueError(f"{name}: {value} must be a multiple of {multiple}; nearest: {nearest}")


def to_signed(images: Tensor) -> Tensor:
    """Map (B, 3, H, W) in [0, 1] to float32 in [-1, 1], what the autoencoder encodes."""
    return 2.0 * images.float() - 1.0


def from_signed(images: Tensor) -> Tensor:
    """Map what the autoencoder decodes, (B, 3, H, W) in about [-1, 1], to float32 in [0, 1]."""
    return (images.float() * 0.5 + 0.5).clamp(0.0, 1.0)


def to_float(images: Tensor) -> NDArray[np.float32]:
    """Bring (B, 3, H, W) in [0, 1] to the host as float32, (B, H, W, 3)."""
    array: NDArray[np.float32] = images.float().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Quantise (B, 3, H, W) in [0, 1] to 8-bit RGB, (B, H, W, 3), halves rounded to even.

    Works on the device of `images`, so a quarter of the bytes travel to the host. NaN has no 8-bit
    value: test for it before.
    """
    array: NDArray[np.uint8] = quantise(images).cpu().numpy()
    return array


def quantise(images: Tensor) -> Tensor:
    """What `to_uint8` brings to the host, (B, H, W, 3), contiguous, on the device of `images`."""
    scaled = (images.float() * 255.0).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous()


def to_pil(images: Tensor) -> list[Image]:
    """Turn (B, 3, H, W) in [0, 1] into B RGB images."""
    from PIL import Image as PilImage

    return [PilImage.fromarray(array) for array in to_uint8(images)]
