"""What an image file says of how it was made, read from files that anybody may have written.

Nothing in it is trusted: every value's type and range is looked at, a key that is not known is an
error, and nothing in it is opened, fetched or run.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from jobs.config import MAX_INT64, Fraction, Name, Seed, pixels_fault
from jobs.errors import InputError
from jobs.image_metadata import MAX_LORAS, MAX_NAME, MAX_PICTURES, MAX_PROMPT, SCHEMA_VERSION
from jobs.metadata_chunks import MAX_TEXT, read_text
from jobs.writers import ImageFormat, Pixels, decode_image
from zimage_core.image_files import MAX_PIXELS, ImageFileError, read_image
from zimage_core.step_cache import INTERVALS

_MAX_STEPS = 1000
_KINDS: tuple[tuple[bytes, ImageFormat], ...] = (
    (b"\x89PNG", "png"),
    (b"\xff\xd8", "jpeg"),
    (b"RIFF", "webp"),
)


def _side(pixels: int) -> int:
    fault = pixels_fault(pixels)
    if fault is not None:
        raise ValueError(fault)
    return pixels


_Short = Annotated[str, Field(max_length=100)]
_Long = Annotated[str, Field(max_length=MAX_NAME)]
_Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]
_Side = Annotated[int, Field(ge=1, le=MAX_PIXELS), AfterValidator(_side)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Scale = Annotated[_Finite, Field(ge=0, le=1e6)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Fingerprint = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Header(BaseModel):
    """What also `output.embed_metadata: minimal` writes."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    schema_version: int
    program: _Short
    version: _Short
    prompt: Any = None


class RecordedLora(BaseModel):
    """An adapter: its name in the job or of its file, its scale and what it holds."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    name: _Long
    scale: _Finite
    fingerprint: _Fingerprint | None = None


class RecordedMaking(BaseModel):
    """How an image was made. `docs/provenance.md` says what the keys mean."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    schema_version: Literal[1]
    program: _Short
    version: _Short
    digital_source_type: _Long
    prompt: _Prompt
    negative_prompt: _Prompt = ""
    seed: Seed
    width: _Side
    height: _Side
    num_inference_steps: Annotated[int, Field(ge=1, le=_MAX_STEPS)]
    guidance_scale: _Scale
    cfg_normalization: bool | _Scale
    cfg_truncation: Fraction
    max_sequence_length: Annotated[int, Field(ge=1, le=MAX_PROMPT)]
    cache: Annotated[int, Field(ge=min(INTERVALS), le=max(INTERVALS))] | None = None
    strength: Fraction | None = None
    init_image_sha256: _Sha256 | None = None
    mask_sha256: _Sha256 | None = None
    images_sha256: Annotated[list[_Sha256], Field(max_length=MAX_PICTURES)] = []
    loras: Annotated[list[RecordedLora], Field(max_length=MAX_LORAS)] = []
    model: _Long
    model_fingerprint: _Fingerprint
    dtype: Literal["bfloat16", "float16", "float32"]
    attention: Literal["native", "_native_flash", "flash", "_flash_3"]
    compile: bool
    quantization: Literal["none", "int8"]
    device_type: Literal["cpu", "cuda", "mps"]
    threads: Annotated[int, Field(ge=1, le=4096)]
    job: Name | None = None
    index: Annotated[int, Field(ge=0, le=MAX_INT64)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=MAX_INT64)] = 1
    batch_mode: Literal["planned", "halved", "single"] = "planned"
    cut: list[Literal["prompt", "negative_prompt", "model", "loras", "images_sha256"]] = []

    @field_validator("height")
    @classmethod
    def _is_bounded(cls, height: int, info: ValidationInfo) -> int:
        if info.data.get("width", 1) * height > MAX_PIXELS:
            raise ValueError(f"over {MAX_PIXELS:,} pixels")
        return height


@dataclass(frozen=True)
class SourceImage:
    """An image file that says how it was made.

    Args:
        pixels: uint8 (H, W, 3), as `making` says.
    """

    path: Path
    form: ImageFormat
    pixels: Pixels
    making: RecordedMaking


def read_source(path: Path, place: str) -> SourceImage:
    """Read an image file and how it was made.

    Args:
        place: how messages begin, such as a flag.

    Raises:
        InputError: no such file, no image, no metadata, or what is wrong with it.
    """
    try:
        file = read_image(path)
        file.check()
    except ImageFileError as error:
        raise InputError(f"{place}: {error}") from error
    where = f"{place}: {path}"
    form = next((form for start, form in _KINDS if file.content.startswith(start)), None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of Exif data that is none
            text = read_text(file.content)
            pixels = decode_image(file.content)
    except OSError as error:
        words = "damaged or cut off" if form else "an image of another kind"
        raise InputError(f"{where}: {words}; allowed: a PNG, JPEG or WebP file") from error
    if text is None or form is None:
        raise InputError(
            f"{where}: does not say how it was made; allowed: an image of zimage with "
            "output.embed_metadata: full, whose metadata no other program has removed"
        )
    making = _checked(text, where)
    height, width, _ = pixels.shape
    if (width, height) != (making.width, making.height):
        raise InputError(
            f"{where}: has {width} x {height} pixels, and its metadata says {making.width} x "
            f"{making.height}; allowed: an image that was not resized since"
        )
    return SourceImage(path, form, pixels, making)


def _checked(text: str, where: str) -> RecordedMaking:
    where = f"{where}: metadata"
    if len(text) > MAX_TEXT:
        raise InputError(f"{where}: {len(text):,} characters; allowed: up to {MAX_TEXT:,}")
    try:
        header = _Header.model_validate_json(text)
        if header.schema_version != SCHEMA_VERSION:
            raise InputError(
                f"{where}: schema_version: {header.schema_version}; allowed: {SCHEMA_VERSION} "
                "(another version of this program wrote it)"
            )
        if header.prompt is None:
            raise InputError(
                f"{where}: says no more than that {header.program} {header.version} made it "
                "(output.embed_metadata: minimal)"
            )
        return RecordedMaking.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{where}: {_words(error)}") from error


def _words(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return f"no JSON document: {first['msg']}"
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{key}: missing"
    if first["type"] == "extra_forbidden":
        return f"{key[:80]!r}: no key of it; another version of this program may have written it"
    return ": ".join(filter(None, (key, f"{first['input']!r:.80}", first["msg"])))
