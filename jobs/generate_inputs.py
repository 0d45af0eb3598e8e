"""What `zimage generate` makes a picture from besides a prompt; read before a model is loaded."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.config import PIXEL_MULTIPLE
from jobs.errors import InputError, ModelError
from jobs.generate_flags import STRENGTH

if TYPE_CHECKING:
    from PIL.Image import Image

    from zimage_core.pictures import Picture

_SIDE = 1024
_LATENT_PIXELS = PIXEL_MULTIPLE // 2  # latents are cut into patches of two by two


@dataclass
class GenerateInputs:
    """Images that one is made from.

    Args:
        hashes: of their files, by the key that a file's metadata has for them.
    """

    pictures: list[Picture] = field(default_factory=list)
    start: Image | None = None
    mask: Image | None = None
    hashes: dict[str, str | list[str]] = field(default_factory=dict)


def read_inputs(args: argparse.Namespace) -> GenerateInputs:
    """Read the images that the flags name; sets `args.height` and `args.width`.

    Raises:
        InputError: a flag or file that does not fit.
    """
    inputs = GenerateInputs()
    args.height, args.width = _read_pictures(args, inputs)
    _read_start(args, inputs)
    _read_mask(args, inputs)
    return inputs


def _read_pictures(args: argparse.Namespace, inputs: GenerateInputs) -> tuple[int, int]:
    """The pictures of `--image`; height and width to make."""
    files: list[Path] = args.image or []
    if not files:
        return args.height or _SIDE, args.width or _SIDE
    from zimage_core.image_files import read_image
    from zimage_core.pictures import output_size, prepare_picture

    if args.init_image is not None:
        raise InputError(
            f"--image: {files[0]}: edited, and --init-image started from; allowed: one of the two"
        )
    area = args.width * args.height if args.width and args.height else None
    hashes = []
    for file in files:
        try:
            read = read_image(file)
            image = read.decode()
        except ValueError as error:  # begins with the file's name
            raise InputError(f"--image: {error}") from error
        hashes.append(read.sha256)
        try:
            inputs.pictures.append(prepare_picture(image, multiple=PIXEL_MULTIPLE, area=area))
        except ValueError as error:
            reason = str(error).removeprefix("images: ")
            raise InputError(f"--image: {file}: {reason}") from error
    inputs.hashes["images_sha256"] = hashes
    return output_size([inputs.pictures], args.height, args.width)


def check_takes_pictures(model: Path) -> None:
    """Raise InputError for a checkpoint that edits no pictures, ModelError for none at all."""
    from zimage_core import CheckpointError
    from zimage_core.model_index import check_model_index

    try:
        takes = check_model_index(model)
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    if not takes:
        raise InputError(
            f"--image: {model}: takes no pictures to edit (model_index.json names no siglip); "
            "allowed: an Edit or Omni checkpoint, or --init-image to start from a picture"
        )


def _read_start(args: argparse.Namespace, inputs: GenerateInputs) -> None:
    """The picture of `--init-image`."""
    from zimage_core.image_files import ImageFileError, read_image
    from zimage_core.strength import first_step

    if args.init_image is None:
        if args.strength is not None:
            raise InputError(f"--strength: {args.strength:g}: no --init-image is given")
        return
    try:
        first_step(args.steps, STRENGTH if args.strength is None else args.strength)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    try:
        file = read_image(args.init_image)
        inputs.start = file.decode()
    except ImageFileError as error:
        raise InputError(f"--init-image: {error}") from error
    inputs.hashes["init_image_sha256"] = file.sha256
    _note_stretched(args.init_image, inputs.start, args)


def _read_mask(args: argparse.Namespace, inputs: GenerateInputs) -> None:
    """The picture of `--mask`."""
    if args.mask is None:
        return
    from zimage_core.image_files import ImageFileError, read_image
    from zimage_core.inpainting import check_inpainting, from_input, opaque, to_latent_size

    if args.init_image is None:
        raise InputError(f"--mask: {args.mask}: no --init-image is given, to which it belongs")
    try:
        check_inpainting(has_image=True, cache=args.cache)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    try:
        file = read_image(args.mask)
        inputs.mask = file.decode(opaque)
    except ImageFileError as error:
        raise InputError(f"--mask: {error}") from error
    white = from_input(inputs.mask, height=args.height, width=args.width)
    if not to_latent_size(white, _LATENT_PIXELS).any():
        reason = "black everywhere"
        if white.any():
            reason = f"no white area of {_LATENT_PIXELS} x {_LATENT_PIXELS} pixels"
        raise InputError(
            f"--mask: {args.mask}: {reason} at {args.width}x{args.height}: nothing would be made "
            "anew; allowed: white where the picture is to change"
        )
    inputs.hashes["mask_sha256"] = file.sha256
    _note_stretched(args.mask, inputs.mask, args)


def _note_stretched(file: Path, image: Image, args: argparse.Namespace) -> None:
    if image.width * args.height != image.height * args.width:
        print(
            f"note: {file} is {image.width}x{image.height} and is stretched to "
            f"{args.width}x{args.height}",
            file=sys.stderr,
        )


def check_cache(args: argparse.Namespace) -> None:
    """Raise InputError for a `--cache` without use for the steps that are left."""
    from zimage_core.step_cache import check_cache
    from zimage_core.strength import first_step

    first = 0
    if args.init_image is not None:
        first = first_step(args.steps, STRENGTH if args.strength is None else args.strength)
    try:
        check_cache(args.cache, args.steps - first)
    except ValueError as error:
        raise InputError(f"--{error}") from error


def read_loras(files: list[Path], scales: list[float]) -> list[tuple[Path, float]]:
    """Each `--lora` with its strength; the files are looked at, not loaded."""
    from zimage_core.lora_file import open_lora

    if scales and len(scales) not in (1, len(files)):
        raise InputError(
            f"--lora-scale: {len(scales)} given for {len(files)} --lora; allowed: one for all, or "
            "one for each"
        )
    if scales and not files:
        raise InputError(f"--lora-scale: {scales[0]:g}: no --lora is given")
    for scale in scales:
        if not math.isfinite(scale):
            raise InputError(f"--lora-scale: {scale}: allowed: a finite number")
    for file in files:
        if files.count(file) > 1:
            raise InputError(f"--lora: {file}: given twice")
        try:
            open_lora(file)
        except ValueError as error:
            raise InputError(f"--lora: {error}") from error
    every = scales or [1.0]
    return list(zip(files, every if len(every) == len(files) else every * len(files), strict=True))
