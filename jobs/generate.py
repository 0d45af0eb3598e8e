"""`zimage generate`: one picture from a checkpoint, without a job."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jobs.config import PIXEL_MULTIPLE, pixels_fault
from jobs.errors import EXIT_OK, InputError, ModelError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from zimage_core.pictures import Picture

_STRENGTH = 0.6
_SIDE = 1024
_LATENT_PIXELS = PIXEL_MULTIPLE // 2  # latents are cut into patches of two by two
_SUFFIXES: dict[str, dict[str, Any]] = {
    ".png": {},
    ".jpg": {"quality": 95},
    ".jpeg": {"quality": 95},
    ".webp": {"quality": 95},
}


def generate_file(args: argparse.Namespace) -> int:
    """Make the picture that the flags ask for and write it to `args.output`.

    Raises:
        InputError: a flag that does not fit, or an output that cannot be written.
        ModelError: the checkpoint cannot be loaded.
    """
    suffix = args.output.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError(f"--output: {args.output}: allowed: {', '.join(_SUFFIXES)}")
    if not args.output.absolute().parent.is_dir():
        raise InputError(f"--output: {args.output}: no such folder: {args.output.parent}")
    for flag, pixels in (("--width", args.width), ("--height", args.height)):
        fault = None if pixels is None else pixels_fault(pixels)
        if fault is not None:
            raise InputError(f"{flag}: {pixels}: {fault}")
    loras = _loras(args.lora or [], args.lora_scale or [])
    if loras and args.quantization != "none":
        raise InputError(
            f"--quantization: {args.quantization!r}: --lora cannot be put into 8-bit weights; "
            "allowed: 'none', or no --lora"
        )
    pictures, (args.height, args.width) = _pictures(args)
    start, mask = _start(args), _mask(args)
    _check_cache(args)
    if not args.model.is_dir():
        raise ModelError(f"--model: {args.model}: no such folder; allowed: a checkpoint folder")
    if pictures:
        _check_takes_pictures(args.model)

    import torch

    from jobs.device import device_type
    from zimage_core import AttentionBackendError, CheckpointError, generate, load_from_local_dir
    from zimage_core.quantization import QuantizationError

    device = device_type()
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    started = time.perf_counter()
    try:
        components = load_from_local_dir(
            args.model,
            device=device,
            dtype=getattr(torch, dtype),
            attention=args.attention,
            offload=_offload(args, device, dtype) if args.offload == "auto" else args.offload,
            quantization=args.quantization,
            transformer=args.transformer,
            vae=args.vae,
            text_encoder=args.text_encoder,
        )
    except AttentionBackendError as error:
        raise InputError(f"--attention: {error}") from error
    except QuantizationError as error:
        raise InputError(f"--quantization: {error}") from error
    except (CheckpointError, OSError) as error:
        raise ModelError(str(error)) from error
    except ValueError as error:
        raise InputError(str(error)) from error
    _merge_loras(components["transformer"], loras)
    loaded = time.perf_counter()
    try:
        images = generate(
            **components,
            prompt=args.prompt,
            negative_prompt=args.negative_prompt,
            height=args.height,
            width=args.width,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=torch.Generator("cpu").manual_seed(args.seed),
            image=start,
            mask_image=mask,
            images=pictures or None,
            strength=_STRENGTH if args.strength is None else args.strength,
            cache=args.cache,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        cast("Image", images[0]).save(args.output, **_SUFFIXES[suffix])
    except OSError as error:
        raise InputError(f"--output: {args.output}: cannot be written: {error}") from error
    made = time.perf_counter()
    print(
        f"{args.output}: {args.width}x{args.height}, seed {args.seed}, {dtype} on {device}; "
        f"loaded in {loaded - started:.1f} s, made in {made - loaded:.1f} s",
        file=sys.stderr,
    )
    return EXIT_OK


def _pictures(args: argparse.Namespace) -> tuple[list[Picture], tuple[int, int]]:
    """The pictures of `--image`, read before a model is loaded, and height and width to make."""
    files: list[Path] = args.image or []
    if not files:
        return [], (args.height or _SIDE, args.width or _SIDE)
    from zimage_core.image_files import read_image
    from zimage_core.pictures import output_size, prepare_picture

    if args.init_image is not None:
        raise InputError(
            f"--image: {files[0]}: edited, and --init-image started from; allowed: one of the two"
        )
    area = args.width * args.height if args.width and args.height else None
    pictures = []
    for file in files:
        try:
            image = read_image(file).decode()
        except ValueError as error:  # begins with the file's name
            raise InputError(f"--image: {error}") from error
        try:
            pictures.append(prepare_picture(image, multiple=PIXEL_MULTIPLE, area=area))
        except ValueError as error:
            reason = str(error).removeprefix("images: ")
            raise InputError(f"--image: {file}: {reason}") from error
    return pictures, output_size([pictures], args.height, args.width)


def _check_takes_pictures(model: Path) -> None:
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


def _start(args: argparse.Namespace) -> Image | None:
    """The picture of `--init-image`, read before a model is loaded."""
    from zimage_core.image_files import ImageFileError, read_image
    from zimage_core.strength import first_step

    if args.init_image is None:
        if args.strength is not None:
            raise InputError(f"--strength: {args.strength:g}: no --init-image is given")
        return None
    try:
        first_step(args.steps, _STRENGTH if args.strength is None else args.strength)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    try:
        image = read_image(args.init_image).decode()
    except ImageFileError as error:
        raise InputError(f"--init-image: {error}") from error
    _note_stretched(args.init_image, image, args)
    return image


def _mask(args: argparse.Namespace) -> Image | None:
    """The picture of `--mask`, read before a model is loaded."""
    if args.mask is None:
        return None
    from zimage_core.image_files import ImageFileError, read_image
    from zimage_core.inpainting import check_inpainting, from_input, opaque, to_latent_size

    if args.init_image is None:
        raise InputError(f"--mask: {args.mask}: no --init-image is given, to which it belongs")
    try:
        check_inpainting(has_image=True, cache=args.cache)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    try:
        mask = read_image(args.mask).decode(opaque)
    except ImageFileError as error:
        raise InputError(f"--mask: {error}") from error
    white = from_input(mask, height=args.height, width=args.width)
    if not to_latent_size(white, _LATENT_PIXELS).any():
        reason = "black everywhere"
        if white.any():
            reason = f"no white area of {_LATENT_PIXELS} x {_LATENT_PIXELS} pixels"
        raise InputError(
            f"--mask: {args.mask}: {reason} at {args.width}x{args.height}: nothing would be made "
            "anew; allowed: white where the picture is to change"
        )
    _note_stretched(args.mask, mask, args)
    return mask


def _note_stretched(file: Path, image: Image, args: argparse.Namespace) -> None:
    if image.width * args.height != image.height * args.width:
        print(
            f"note: {file} is {image.width}x{image.height} and is stretched to "
            f"{args.width}x{args.height}",
            file=sys.stderr,
        )


def _check_cache(args: argparse.Namespace) -> None:
    from zimage_core.step_cache import check_cache
    from zimage_core.strength import first_step

    first = 0
    if args.init_image is not None:
        first = first_step(args.steps, _STRENGTH if args.strength is None else args.strength)
    try:
        check_cache(args.cache, args.steps - first)
    except ValueError as error:
        raise InputError(f"--{error}") from error


def _loras(files: list[Path], scales: list[float]) -> list[tuple[Path, float]]:
    """Each `--lora` with its strength; the files are looked at before a model is loaded."""
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


def _offload(args: argparse.Namespace, device: str, dtype: str) -> str:
    """What `auto` stands for: the first way whose memory is free, and the last where none is."""
    if device != "cuda":
        return "none"
    import torch

    from jobs.memory_needs import AUTO_OFFLOAD, first_fitting, image_memory, memory_model

    given = {name: getattr(args, name) for name in ("transformer", "vae", "text_encoder")}
    parts = {name: path for name, path in given.items() if path is not None}
    needed = image_memory(
        memory_model(args.model, parts, dtype, args.quantization),
        height=args.height,
        width=args.width,
        guided=args.guidance > 0,
        from_image=args.init_image is not None,
        num_pictures=len(args.image or []),
    )
    return first_fitting(needed, torch.cuda.mem_get_info()[0]) or AUTO_OFFLOAD[-1]


def _merge_loras(transformer: nn.Module, loras: list[tuple[Path, float]]) -> None:
    """Put adapters into the transformer's weights, and say what they change."""
    if not loras:
        return
    from zimage_core import LoraSwitcher, load_lora

    try:
        adapters = {str(file): load_lora(file, transformer) for file, _ in loras}
        LoraSwitcher(transformer, adapters).apply({str(file): scale for file, scale in loras})
    except ValueError as error:
        raise InputError(f"--lora: {error}") from error
    for file, scale in loras:
        report = adapters[str(file)].report
        print(f"{file} at {scale:g}: {report.words()}", file=sys.stderr)
        for warning in report.warnings():
            print(f"note: {file}: {warning}", file=sys.stderr)
