"""`zimage generate`: one picture from a checkpoint, without a job."""

from __future__ import annotations

import argparse
import io
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from jobs.config import pixels_fault
from jobs.errors import EXIT_OK, InputError, ModelError
from jobs.fingerprint import adapter_fingerprint, node_fingerprint
from jobs.generate_flags import STRENGTH, check_given, fill_defaults
from jobs.generate_inputs import (
    GenerateInputs,
    check_cache,
    check_takes_pictures,
    read_inputs,
    read_loras,
)
from jobs.image_metadata import with_metadata
from jobs.writers import ImageFormat, Pixels

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

_FORMATS: dict[str, ImageFormat] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
}
_OPTIONS: dict[ImageFormat, dict[str, Any]] = {
    "png": {},
    "jpeg": {"quality": 95},
    "webp": {"quality": 95},
}


def generate_file(args: argparse.Namespace) -> int:
    """Make the picture that the flags ask for and write it to `args.output`.

    With `args.source`, make that image again and say how the two compare: exit code 1 where they
    differ though no flag asked for another image.

    Raises:
        InputError: a flag that does not fit, an image of `--from` that does not say how it was
            made, or an output that cannot be written.
        ModelError: the checkpoint cannot be loaded.
    """
    check_given(args)
    if args.output is not None:
        _check_output(args.output)
    remake = None
    if args.source is not None:
        from jobs.remake import Remake

        remake = Remake(args)
    for flag, pixels in (("--width", args.width), ("--height", args.height)):
        fault = None if pixels is None else pixels_fault(pixels)
        if fault is not None:
            raise InputError(f"{flag}: {pixels}: {fault}")
    loras = read_loras(args.lora or [], args.lora_scale or [])
    if loras and args.quantization not in (None, "none"):
        raise InputError(
            f"--quantization: {args.quantization!r}: --lora cannot be put into 8-bit weights; "
            "allowed: 'none', or no --lora"
        )
    fill_defaults(args)
    inputs = read_inputs(args)
    check_cache(args)
    if not args.model.is_dir():
        raise ModelError(f"--model: {args.model}: no such folder; allowed: a checkpoint folder")
    if inputs.pictures:
        check_takes_pictures(args.model)

    import torch

    from jobs.device import device_type
    from zimage_core import AttentionBackendError, CheckpointError, generate, load_from_local_dir
    from zimage_core.quantization import QuantizationError

    device = device_type()
    if remake is not None:
        remake.settle(device)
        remake.check_hashes(inputs.hashes)
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    started = time.perf_counter()
    fingerprint = None
    if remake is not None or args.embed_metadata == "full":
        fingerprint = _Fingerprint(args.model, _parts(args))
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
    if remake is not None and fingerprint is not None:
        remake.check_weights(fingerprint.result())
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
            cfg_normalization=args.cfg_normalization,
            cfg_truncation=args.cfg_truncation,
            max_sequence_length=args.max_sequence_length,
            image=inputs.start,
            mask_image=inputs.mask,
            images=inputs.pictures or None,
            strength=STRENGTH if args.strength is None else args.strength,
            cache=args.cache,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    image = cast("Image", images[0])
    made = time.perf_counter()
    making: dict[str, object] = {}
    if fingerprint is not None:
        making = {
            **_making(args, inputs, loras),
            "model_fingerprint": fingerprint.result(),
            "dtype": dtype,
            "attention": components["transformer"].attention_backend,
            "device_type": device,
            "threads": torch.get_num_threads(),
        }
    if args.output is not None:
        _write(args, image, making, from_picture=bool(inputs.hashes))
    print(
        f"{args.output or args.source}: {args.width}x{args.height}, seed {args.seed}, {dtype} on "
        f"{device}; loaded in {loaded - started:.1f} s, made in {made - loaded:.1f} s",
        file=sys.stderr,
    )
    if remake is None:
        return EXIT_OK
    return remake.compare(np.asarray(image), making, _encoded)


def _check_output(output: Path) -> None:
    if output.suffix.lower() not in _FORMATS:
        raise InputError(f"--output: {output}: allowed: {', '.join(_FORMATS)}")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output: {output}: no such folder: {output.parent}")


def _write(
    args: argparse.Namespace, image: Image, making: dict[str, object], *, from_picture: bool
) -> None:
    content = with_metadata(
        _encoded(np.asarray(image), _FORMATS[args.output.suffix.lower()]),
        args.embed_metadata,
        making,
        from_picture=from_picture,
    )
    try:
        args.output.write_bytes(content)
    except OSError as error:
        raise InputError(f"--output: {args.output}: cannot be written: {error}") from error


def _encoded(pixels: Pixels, form: ImageFormat) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **_OPTIONS[form])
    return buffer.getvalue()


def _making(
    args: argparse.Namespace, inputs: GenerateInputs, loras: list[tuple[Path, float]]
) -> dict[str, object]:
    """What the flags say of how the image was made, for `with_metadata`; no folder is named."""
    replaced = [f"{name} {path.name}" for name, path in _parts(args).items()]
    if args.quantization != "none":
        replaced.append(f"{args.quantization} weights")
    name = args.model.resolve().name
    return {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt or None,
        "seed": args.seed,
        "width": args.width,
        "height": args.height,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "cfg_normalization": args.cfg_normalization,
        "cfg_truncation": args.cfg_truncation,
        "max_sequence_length": args.max_sequence_length,
        "cache": args.cache,
        "strength": None
        if inputs.start is None
        else (STRENGTH if args.strength is None else args.strength),
        **inputs.hashes,
        "loras": [
            {"name": file.name, "scale": scale, "fingerprint": adapter_fingerprint(file)}
            for file, scale in loras
        ]
        or None,
        "model": f"{name} with {', '.join(replaced)}" if replaced else name,
        "compile": False,
        "quantization": args.quantization,
    }


def _parts(args: argparse.Namespace) -> dict[str, Path]:
    given = {name: getattr(args, name) for name in ("transformer", "vae", "text_encoder")}
    return {name: path for name, path in given.items() if path is not None}


class _Fingerprint:
    """Of a checkpoint, computed while it is loaded and used; a process ends without it."""

    def __init__(self, model: Path, parts: dict[str, Path]) -> None:
        self._found: str | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(model, parts), daemon=True)
        self._thread.start()

    def result(self) -> str:
        """Waits for it. Raises ModelError where it cannot be computed."""
        self._thread.join()
        if self._found is None:
            raise ModelError(f"--model: {self._error}") from self._error
        return self._found

    def _run(self, model: Path, parts: dict[str, Path]) -> None:
        try:
            self._found = node_fingerprint(model, **parts)
        except Exception as error:  # noqa: BLE001 - raised where the result is asked for
            self._error = error


def _offload(args: argparse.Namespace, device: str, dtype: str) -> str:
    """What `auto` stands for: the first way whose memory is free, and the last where none is."""
    if device != "cuda":
        return "none"
    import torch

    from jobs.memory_needs import AUTO_OFFLOAD, first_fitting, image_memory, memory_model

    needed = image_memory(
        memory_model(args.model, _parts(args), dtype, args.quantization),
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
