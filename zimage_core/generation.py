"""From prompts to images in one call: `generate`, the stages of `ZImagePipeline` in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Generator, Tensor

from zimage_core import images as pixels
from zimage_core import inpainting
from zimage_core.editing import Edit
from zimage_core.entries import Condition
from zimage_core.guidance import Guidance
from zimage_core.noise import check_generators, draw_noise
from zimage_core.pictures import (
    EncodedPicture,
    arrange_pictures,
    check_vision,
    output_size,
    prepare_picture,
)
from zimage_core.pipeline import ZImagePipeline
from zimage_core.step_cache import check_cache
from zimage_core.strength import first_step

if TYPE_CHECKING:
    from PIL.Image import Image

    from zimage_core.autoencoder import AutoencoderKL
    from zimage_core.scheduler import FlowMatchEulerDiscreteScheduler
    from zimage_core.text_encoder import TextEncoder
    from zimage_core.transformer import ZImageTransformer2DModel
    from zimage_core.vision import VisionEncoder, VisionProcessor

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def generate(
    transformer: ZImageTransformer2DModel,
    vae: AutoencoderKL,
    text_encoder: TextEncoder,
    tokenizer: Any,
    scheduler: FlowMatchEulerDiscreteScheduler,
    *,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 8,
    guidance_scale: float = 0.0,
    num_images_per_prompt: int = 1,
    generator: Generator | Sequence[Generator] | None = None,
    cfg_normalization: bool | float = False,
    cfg_truncation: float | None = 1.0,
    cache: int | None = None,
    max_sequence_length: int = 512,
    output_type: OutputType = "pil",
    image: Any = None,
    mask_image: Any = None,
    strength: float = 0.6,
    images: Any = None,
    aligned_positions: bool = True,
    siglip: VisionEncoder | None = None,
    siglip_processor: VisionProcessor | None = None,
) -> list[Image] | NDArray[np.float32] | Tensor:
    """Generate images for prompts: `generate(**load_from_local_dir(...), prompt=...)`.

    No argument is changed. The images of a prompt are neighbours in the result.

    Args:
        transformer: component, as are the four that follow.
        vae: see `transformer`.
        text_encoder: see `transformer`.
        tokenizer: see `transformer`.
        scheduler: see `transformer`.
        prompt: one prompt or a list.
        negative_prompt: what to steer away from where `guidance_scale` > 0: one for all prompts or
            a list with one for each; None is the empty prompt.
        height: in pixels, a multiple of 16; None is that of the last of `images`, as it is encoded,
            and 1024 without any.
        width: see `height`.
        num_inference_steps: number of transformer evaluations.
        guidance_scale: s in `pos + s * (pos - neg)`; 0 is off.
        num_images_per_prompt: images of each prompt.
        generator: source of the noise. A list has one for each image, and an image then does not
            depend on the others; a single one draws the noise of the whole batch at once. None is
            torch's default CPU generator. With `image` its latents are drawn first, then the noise.
        cfg_normalization: see `Guidance.normalization`.
        cfg_truncation: see `Guidance.truncation`.
        cache: None evaluates the transformer on each step; 2, 3 or 4 on one step of so many in the
            middle of the schedule, for schedules of 20 steps and more. Quicker, and lossy.
        max_sequence_length: tokens that a prompt is cut to, template included.
        output_type: "pil" a list of images, "np" float32 (B, H, W, 3) in [0, 1], "pt" float32
            (B, 3, H, W) in [0, 1], "latent" float32 latents as the last step left them.
        image: image to start from, or a list: one for all, for each prompt, or for each image made.
            What is accepted, and how it is brought to `width` x `height`, says `images.from_input`.
        mask_image: inpainting: white where `image` is made anew, black where it is kept. One or a
            list: one for all, for each prompt, or for each image made. What is accepted says
            `inpainting.from_input`. Not together with `cache`.
        strength: of the change to `image`, above 0 and at most 1: of n steps the last n * strength
            are run, see `strength.first_step`. Without meaning where there is no `image`.
        images: pictures to edit, 0 to several for each prompt: a list with a list for each; or one
            picture or one list of them for all prompts, where no other meaning is possible. Each is
            in a form that `image` may have too; a tensor or array is rounded to 8 bits, and holds
            one. How they are brought to size says `pictures.prepare_picture`, with the area of
            `height` and `width` where both are given. Only for Edit and Omni checkpoints.
        aligned_positions: whether every segment of an edit's text has its own positions; False does
            as diffusers' `ZImageOmniPipeline`, see `edit_layout`. Only for such checkpoints.
        siglip: sees the `images`; a component, like `siglip_processor`, of such checkpoints.
        siglip_processor: see `siglip`.

    Raises:
        ValueError: an argument is out of range, lists differ in length, a picture cannot be used,
            the images of one call would differ in size, or the checkpoint takes no pictures.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: {output_type!r} must be one of {', '.join(OUTPUT_TYPES)}")
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt: {num_images_per_prompt} must be at least 1")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps: {num_inference_steps} must be at least 1")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("prompt: the list is empty")
    num_images = len(prompts) * num_images_per_prompt
    negatives = _negative_prompts(negative_prompt, len(prompts))

    pipeline = ZImagePipeline(
        transformer, vae, text_encoder, tokenizer, scheduler, siglip, siglip_processor
    )
    given = arrange_pictures(images, len(prompts))
    if any(given):
        if mask_image is not None:
            raise ValueError(
                "images: cannot be edited with a mask; allowed: image= and mask_image=, or images="
            )
        if image is not None:
            raise ValueError("images: cannot be edited together with an image to start from")
        check_vision(pipeline.takes_pictures, siglip, siglip_processor)
    area = height * width if height is not None and width is not None else None
    distinct = {id(picture): picture for of_prompt in given for picture in of_prompt}
    prepared = {
        key: prepare_picture(picture, multiple=pipeline.size_multiple, area=area)
        for key, picture in distinct.items()
    }
    height, width = output_size(
        [[prepared[id(picture)] for picture in of_prompt] for of_prompt in given], height, width
    )
    shape = pipeline.latents_shape(num_images, height, width)
    guided = Guidance(scale=guidance_scale, normalization=cfg_normalization).is_on
    if isinstance(generator, Sequence):
        check_generators(generator, num_images)
    starts = masks = None
    # What is refused is refused before any work is done.
    first = 0 if image is None else first_step(num_inference_steps, strength)
    check_cache(cache, num_inference_steps - first)
    if image is not None:
        starts = pixels.from_input(image, height=height, width=width)
        _check_number("image", "images", len(starts), len(prompts), num_images)
    if mask_image is not None:
        inpainting.check_inpainting(has_image=image is not None, cache=cache)
        masks = inpainting.from_input(mask_image, height=height, width=width)
        _check_number("mask_image", "masks", len(masks), len(prompts), num_images)
        masks = inpainting.to_latent_size(masks, pipeline.vae_scale_factor)
        masks = masks.repeat_interleave(num_images // len(masks), 0)

    texts = prompts + (negatives if guided else [])
    encoded: Sequence[Condition]
    if pipeline.takes_pictures:
        pictures = {}
        if any(given):
            seen = pipeline.encode_pictures(list(prepared.values()))
            pictures = dict(zip(prepared, seen, strict=True))
        of_prompts = [[pictures[id(picture)] for picture in of_prompt] for of_prompt in given]
        of_texts = of_prompts * (2 if guided else 1)
        encoded = _edits(pipeline, texts, of_texts, max_sequence_length)
    else:
        encoded = pipeline.encode(texts, max_sequence_length=max_sequence_length)
    for_images = [embeds for embeds in encoded for _ in range(num_images_per_prompt)]
    image_latents = None
    if starts is not None:
        image_latents = pipeline.encode_image(starts, generator)
        image_latents = image_latents.repeat_interleave(num_images // len(image_latents), 0)
    denoised = pipeline.denoise(
        for_images[:num_images],
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt_embeds=for_images[num_images:] if guided else None,
        latents=draw_noise(shape, generator),
        image_latents=image_latents,
        mask=masks,
        strength=strength,
        cfg_normalization=cfg_normalization,
        cfg_truncation=cfg_truncation,
        cache=cache,
        aligned_positions=aligned_positions,
    )
    if output_type == "latent":
        return denoised
    decoded = pipeline.decode(denoised)
    if output_type == "pt":
        return decoded
    return pixels.to_float(decoded) if output_type == "np" else pixels.to_pil(decoded)


def _check_number(argument: str, things: str, given: int, num_prompts: int, images: int) -> None:
    if given not in (1, num_prompts, images):
        raise ValueError(
            f"{argument}: {given} {things} for {num_prompts} prompts with "
            f"{images // num_prompts} images each; allowed: 1, {num_prompts} or {images}"
        )


def _edits(
    pipeline: ZImagePipeline,
    texts: Sequence[str],
    pictures: Sequence[Sequence[EncodedPicture]],
    max_sequence_length: int,
) -> list[Edit]:
    """An edit for each text with its pictures; equal ones are one."""
    made: dict[tuple[object, ...], Edit] = {}
    edits = []
    for text, of_text in zip(texts, pictures, strict=True):
        key = (text, *map(id, of_text))
        if key not in made:
            made[key] = Edit(
                pipeline.encode_edit_text(
                    text, len(of_text), max_sequence_length=max_sequence_length
                ),
                [picture.latents for picture in of_text],
                [picture.visual for picture in of_text],
            )
        edits.append(made[key])
    return edits


def _negative_prompts(negative_prompt: str | Sequence[str] | None, num_prompts: int) -> list[str]:
    if negative_prompt is None:
        return [""] * num_prompts
    if isinstance(negative_prompt, str):
        return [negative_prompt] * num_prompts
    if len(negative_prompt) != num_prompts:
        raise ValueError(f"negative_prompt: {len(negative_prompt)} for {num_prompts} prompts")
    return list(negative_prompt)
