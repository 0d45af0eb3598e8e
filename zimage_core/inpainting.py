"""Inpainting: a mask says which part of a starting image is made anew; the rest is kept.

White is repainted and black is kept, as in diffusers' `ZImageInpaintPipeline`. What is kept is put
back after each step, at the noise level that the step led to, so that both parts are always equally
noisy where they meet.

Letters in shapes: N masks, B images, H and W pixels, F channels of latents, h and w their sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from zimage_core import images as pixels
from zimage_core.image_files import to_rgb
from zimage_core.patchify import patchify

if TYPE_CHECKING:
    from PIL.Image import Image

    from zimage_core.scheduler import FlowMatchEulerDiscreteScheduler

_WHITE = 0.5
"""From this value on a pixel is white."""
_ALLOWED = (
    "a PIL image without transparency; a tensor (H, W), (N, H, W), (N, 1, H, W) or (N, 3, H, W), "
    "or an array (H, W), (H, W, 1), (H, W, 3), (N, H, W), (N, H, W, 1) or (N, H, W, 3), of bool, "
    "float in [0, 1] or uint8; or a list of these"
)
# Weights of red, green and blue in Pillow's grey, which sum to 1 without rounding: grey stays grey.
_LUMA = torch.tensor([19595, 38470, 7471], dtype=torch.float64) / 65536


def check_inpainting(*, has_image: bool, cache: int | None) -> None:
    """Raise ValueError where a mask is given without an image, or with a step cache."""
    if not has_image:
        raise ValueError("mask_image: no image is given, of which a part would be made anew")
    if cache is not None:
        raise ValueError(
            f"cache: {cache} together with a mask is not supported; allowed: None, or no mask"
        )


def from_input(given: Any, *, height: int, width: int) -> Tensor:
    """Bring masks to one size, to black and white.

    A PIL image is resized by Lanczos' filter (one of mode "1" or "P" by the nearest pixel) and made
    grey; of a tensor or an array, which may hold many masks, the nearest pixel is taken. Grey from
    0.5 on is white. The aspect ratio is not kept. As diffusers does.

    Args:
        given: a PIL image without transparent pixels; a tensor (H, W), (N, H, W), (N, 1, H, W) or
            (N, 3, H, W), or an array (H, W), (H, W, 1), (H, W, 3), (N, H, W), (N, H, W, 1) or
            (N, H, W, 3), of bool, of float in [0, 1] or of uint8 in 0 to 255; or a list of these.
        height: in pixels, of the result.
        width: in pixels, of the result.

    Returns:
        (N, 1, height, width) bool on the CPU, True where the image is made anew.

    Raises:
        ValueError: a mask is none of these, or a value is out of range.
    """
    masks = list(given) if isinstance(given, Sequence) else [given]
    if not masks:
        raise ValueError("mask_image: the list is empty")
    return torch.cat([_from_one(mask, height, width) for mask in masks])


def to_latent_size(masks: Tensor, factor: int) -> Tensor:
    """Masks (N, 1, H, W) at the size of latents, (N, 1, H / factor, W / factor) bool.

    Of each square of pixels the one at its top left decides, as in diffusers: white that is thinner
    than a square may be lost.
    """
    size = masks.shape[-2] // factor, masks.shape[-1] // factor
    return F.interpolate(masks.float(), size=size, mode="nearest") > _WHITE


def opaque(image: Image) -> Image:
    """Refuse a mask with transparent pixels; another is returned as RGB, or in mode "1" or "P".

    Transparency could mean either: cut out to be filled, or not painted white.

    Raises:
        ValueError: a pixel is transparent, or see `image_files.to_rgb`.
    """
    if image.has_transparency_data:
        alpha = image.convert("LA" if image.mode == "La" else "RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            raise ValueError(
                "a mask with transparent pixels; allowed: white where the image is made anew, "
                "black where it is kept, no transparency"
            )
    # Pillow resizes these two by the nearest pixel, of which the reference makes grey.
    return image if image.mode in ("1", "P") else to_rgb(image)


class KeptImage:
    """What a mask keeps of starting images, at every noise level of a schedule.

    Args:
        masks: (B, 1, h, w) bool, True where the image is made anew.
        images: latents (B, F, h, w) float32.
        noise: that the images were noised with, shape, dtype and device of `images`.
        scheduler: see `sigmas`.
        sigmas: as `FlowMatchEulerDiscreteScheduler.sigmas` returns them.
        patch_size: of the patches that `restore` takes.

    Raises:
        ValueError: `masks` are not bool, or of another shape.
    """

    def __init__(
        self,
        masks: Tensor,
        images: Tensor,
        noise: Tensor,
        scheduler: FlowMatchEulerDiscreteScheduler,
        sigmas: Tensor,
        patch_size: int,
    ) -> None:
        shape = (len(images), 1, *images.shape[-2:])
        if masks.dtype != torch.bool or tuple(masks.shape) != shape:
            raise ValueError(
                f"mask: {masks.dtype} of shape {tuple(masks.shape)} must be torch.bool of {shape}"
            )
        anew = masks.to(images.device).expand_as(images)
        self._anew = patchify(anew, patch_size)
        self._images = patchify(images, patch_size)
        self._noise = patchify(noise, patch_size)
        self._scheduler = scheduler
        self._sigmas = sigmas

    def restore(self, patches: Tensor, index: int) -> Tensor:
        """Put what is kept back into patches at noise level `sigmas[index]`; 0 at the last one."""
        kept = self._scheduler.scale_noise(self._images, self._noise, self._sigmas, index)
        return torch.where(self._anew, patches, kept)


def _from_one(mask: object, height: int, width: int) -> Tensor:
    from PIL import Image as PilImage

    if isinstance(mask, PilImage.Image):
        try:
            resized = opaque(mask).resize((width, height), PilImage.Resampling.LANCZOS)
        except ValueError as error:
            raise ValueError(f"mask_image: {error}") from error
        grey = torch.from_numpy(np.array(to_rgb(resized).convert("L")))
        return (grey.float() / 255.0 >= _WHITE)[None, None]
    grey = _grey(mask).float()
    return F.interpolate(grey, size=(height, width), mode="nearest") >= _WHITE


def _grey(mask: object) -> Tensor:
    """A given tensor or array as (N, 1, H, W) float32 in [0, 1], of its own size, on the CPU."""
    if not isinstance(mask, np.ndarray | Tensor):
        raise ValueError(f"mask_image: {type(mask).__name__}; allowed: {_ALLOWED}")
    shape, is_array = tuple(mask.shape), isinstance(mask, np.ndarray)
    fault = f"mask_image: {type(mask).__name__} of shape {shape}"
    if not is_array and len(shape) == 3 and shape[0] == 3:
        raise ValueError(
            f"{fault}: three masks, or one in colour; allowed: (3, 1, H, W) or (1, 3, H, W)"
        )
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise ValueError(f"{fault}; allowed: {_ALLOWED}")
    has_channels = len(shape) == 4 or (is_array and len(shape) == 3 and shape[-1] in (1, 3))
    channel = -1 if is_array else 1
    if has_channels and shape[channel] not in (1, 3):
        raise ValueError(f"{fault}; allowed: {_ALLOWED}")
    values = _unit_values(mask)
    if not has_channels:
        return values.reshape(-1, 1, *shape[-2:])
    by_channel = values[None] if len(shape) == 3 else values
    by_channel = by_channel.movedim(channel, 1)
    if by_channel.shape[1] == 1:
        return by_channel
    return torch.einsum("nchw,c->nhw", by_channel.double(), _LUMA)[:, None].float()


def _unit_values(mask: NDArray[Any] | Tensor) -> Tensor:
    if mask.dtype in (np.bool_, torch.bool):
        return torch.as_tensor(mask).cpu().float()
    if mask.dtype in (np.uint8, torch.uint8) and mask.max() == 1:
        raise ValueError(
            "mask_image: uint8 with 1 as its largest value, which is nearly black; allowed: 0 to "
            "255, where 255 is white, or bool"
        )
    return pixels.to_unit(mask, "mask_image")
