"""Pictures that an edit is asked of: from what is given to what the two encoders take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from zimage_core import images as pixels
from zimage_core.autoencoder import DiagonalGaussian
from zimage_core.picture_sizes import picture_sizes

if TYPE_CHECKING:
    from PIL.Image import Image

    from zimage_core.autoencoder import AutoencoderKL


@dataclass(frozen=True)
class Picture:
    """A picture as it is encoded.

    Attributes:
        seen: RGB, what the vision encoder is shown.
        cropped: the middle of it, what the autoencoder encodes; its sides are multiples of a patch.
    """

    seen: Image
    cropped: Image


@dataclass(frozen=True)
class EncodedPicture:
    """What `ZImagePipeline.encode_picture` returns.

    Attributes:
        latents: (F, h, w) float32.
        visual: what is seen in it, (rows, columns, siglip_feat_dim).
    """

    latents: Tensor
    visual: Tensor


def check_vision(takes_pictures: bool, siglip: object, siglip_processor: object) -> None:
    """Raise ValueError unless a checkpoint takes pictures, and has what sees them."""
    if not takes_pictures:
        raise ValueError(
            "images: this checkpoint takes no pictures to edit (its siglip_feat_dim is null); "
            "allowed: an Edit or Omni checkpoint, or image= to start from"
        )
    if siglip is None or siglip_processor is None:
        raise ValueError(
            "images: siglip and siglip_processor are needed, which load_from_local_dir returns"
        )


def prepare_picture(given: Any, *, multiple: int, area: int | None = None) -> Picture:
    """Check a picture and bring it to the sizes that are encoded.

    Args:
        given: one picture in a form that `images.to_rgb_images` accepts; a `Picture` is returned as
            it is.
        multiple: of what the sides are encoded in, `ZImagePipeline.size_multiple`.
        area: pixels to which a large picture is resized, see `picture_sizes`.

    Raises:
        ValueError: it is none, or of a size that `picture_sizes` refuses.
    """
    from PIL import Image as PilImage

    if isinstance(given, Picture):
        return given
    found = pixels.to_rgb_images(given, name="images")
    if len(found) != 1:
        raise ValueError(f"images: {len(found)} in one tensor or array; allowed: one picture each")
    picture = found[0]
    try:
        seen, (width, height) = picture_sizes(*picture.size, multiple=multiple, area=area)
    except ValueError as error:
        raise ValueError(f"images: {error}") from error
    if seen != picture.size:
        picture = picture.resize(seen, PilImage.Resampling.LANCZOS)
    left, top = (seen[0] - width) // 2, (seen[1] - height) // 2
    return Picture(picture, picture.crop((left, top, left + width, top + height)))


def arrange_pictures(images: Any, num_prompts: int) -> list[list[Any]]:
    """Give each prompt its pictures, in the form in which they were given.

    Args:
        images: None for none; one picture, for every prompt; a list of pictures, for the one
            prompt or, if they are not as many as prompts, for every prompt; or a list with a list
            for each prompt.
        num_prompts: how many.

    Raises:
        ValueError: it cannot be told which picture belongs to which prompt.
    """
    if images is None:
        return [[] for _ in range(num_prompts)]
    if not isinstance(images, list | tuple):
        return [[images] for _ in range(num_prompts)]
    nested = [isinstance(item, list | tuple) for item in images]
    if any(nested):
        if not all(nested):
            raise ValueError("images: pictures beside lists; allowed: a list for each prompt")
        if len(images) != num_prompts:
            raise ValueError(
                f"images: {len(images)} lists for {num_prompts} prompts; allowed: one for each"
            )
        return [list(item) for item in images]
    if len(images) == num_prompts > 1:
        raise ValueError(
            f"images: {len(images)} pictures for {num_prompts} prompts, each for one or all for "
            "each; allowed: a list of pictures for each prompt"
        )
    return [list(images) for _ in range(num_prompts)]


def output_size(
    pictures: Sequence[Sequence[Picture]], height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width of the images that are made: those that are given, or of the last pictures.

    Args:
        pictures: of each prompt.
        height: in pixels, or None for that of the prompt's last picture, 1024 where it has none.
        width: see `height`.

    Raises:
        ValueError: prompts of one call would have images of different sizes.
    """
    sizes: dict[tuple[int, int], None] = {}
    for of_prompt in pictures:
        columns, rows = of_prompt[-1].cropped.size if of_prompt else (1024, 1024)
        # Of what is given nothing is replaced, not even 0, which is refused later.
        size = rows if height is None else height, columns if width is None else width
        sizes[size] = None
    if len(sizes) > 1:
        found = ", ".join(f"{columns} x {rows}" for rows, columns in sizes)
        raise ValueError(
            f"images: the results would have different sizes, {found}, by the last picture of each "
            "prompt; allowed: one size, or give height and width"
        )
    return next(iter(sizes))


def sample_latents(
    vae: AutoencoderKL, images: Tensor, generators: Generator | Sequence[Generator] | None
) -> Tensor:
    """Latents of starting images, drawn: see `ZImagePipeline.encode_image`; (N, F, h, w)."""
    encoded = _encode(vae, images)
    share = 1
    if isinstance(generators, Sequence):
        share, rest = divmod(len(generators), len(encoded))
        if rest or not share:
            raise ValueError(
                f"generators: {len(generators)} for {len(encoded)} images; allowed: a multiple"
            )
    mean = torch.cat([gaussian.mean for gaussian in encoded]).float()
    logvar = torch.cat([gaussian.logvar for gaussian in encoded]).float()
    latents = DiagonalGaussian(
        mean.repeat_interleave(share, 0), logvar.repeat_interleave(share, 0)
    ).sample(generators)
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def picture_latents(vae: AutoencoderKL, picture: Image) -> Tensor:
    """Latents of a picture, nothing drawn; (F, h, w) float32 where the autoencoder is."""
    (encoded,) = _encode(vae, pixels.from_rgb(picture))
    return ((encoded.mean.float() - vae.config.shift_factor) * vae.config.scaling_factor)[0]


def _encode(vae: AutoencoderKL, images: Tensor) -> list[DiagonalGaussian]:
    """One image after the other: latents do not depend on neighbours, nor memory on the number."""
    weight = next(vae.parameters())
    signed = pixels.to_signed(images).to(weight.device, weight.dtype)
    return [vae.encode(image) for image in torch.split(signed, 1)]
