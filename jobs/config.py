"""What a job is: the keys of a job file with their types, defaults and limits.

These models are inert: they open no file, look at no device and resolve no `auto`. Reading files
and merging them is `jobs.job_file`; every key is described for users in `docs/job-file.md`, which
a test keeps equal to this module.

Types are strict, since YAML is generous: `"8"` is text, `yes` is a boolean, `1e-3` is text; each
of these where another type belongs is an error and never a conversion. A whole number is fine
where a fraction is allowed. Each field carries, next to its checks, an `Allowed` note that is
what an error message tells the user.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from jobs.layers import Layers
from jobs.terminal import without_credentials
from zimage_core.step_cache import INTERVALS, MIN_STEPS

MAX_INT64 = 2**63 - 1
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
URI_SCHEMES = ("s3", "gs", "az")
PNG_LEVEL = 1
EmbedMetadata = Literal["full", "minimal", "none"]
PIXEL_MULTIPLE = 16  # VAE stride 8 times the transformer's patch of 2


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a key accepts, in words: metadata of a field, read by the error messages."""

    text: str


def _fail(message: str) -> PydanticCustomError:
    # The message may hold braces from the user's value: it goes in as a value, not as a template.
    return PydanticCustomError("job", "{message}", {"message": message})


def _check_name(name: str) -> str:
    if not re.fullmatch(NAME_PATTERN, name):
        raise _fail("does not fit a file name, of which it becomes part")
    return name


def pixels_fault(pixels: int) -> str | None:
    """Return what is wrong with a width or height, with the nearest ones; None if nothing is."""
    below = pixels // PIXEL_MULTIPLE * PIXEL_MULTIPLE
    if pixels < PIXEL_MULTIPLE:
        return f"too small; nearest: {PIXEL_MULTIPLE}"
    if below != pixels:
        return f"not divisible by {PIXEL_MULTIPLE}; nearest: {below} or {below + PIXEL_MULTIPLE}"
    return None


def _check_pixels(pixels: int) -> int:
    fault = pixels_fault(pixels)
    if fault is not None:
        raise _fail(fault)
    return pixels


def _check_path(value: object) -> object:
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise _fail("not a path")
    return value


def _check_uri(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    if not uri.strip() or "\0" in uri:
        raise _fail("empty")
    if separator and scheme not in URI_SCHEMES:
        raise _fail(f"unknown scheme {scheme + separator}")
    if separator and not rest.strip("/"):
        raise _fail("no bucket is named")
    if without_credentials(uri) != uri:  # it would be written to job.json, and shown
        raise _fail("holds credentials, which belong into the environment")
    return uri


def _check_text(text: str) -> str:
    if not text.strip():
        raise _fail("empty")
    return text


def _check_gpus(gpus: float) -> float:
    if gpus > 1 and not gpus.is_integer():
        raise _fail("Ray shares one GPU or gives whole ones")
    return gpus


def _check_json(options: dict[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        json.dumps(options, allow_nan=False)
    except ValueError:
        raise _fail("infinity and NaN cannot be written to job.json") from None
    return options


def _empty_if_null(value: object) -> object:
    # Mappings merge, so null is the way to drop what an extended file brought.
    return {} if value is None else value


_WHOLE = "a whole number"
Text = Annotated[str, AfterValidator(_check_text), Allowed("text that is not empty")]
Name = Annotated[
    str,
    AfterValidator(_check_name),
    Allowed("1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit"),
]
Count = Annotated[int, Field(ge=1, le=MAX_INT64), Allowed(f"{_WHOLE}, 1 or more")]
Index = Annotated[int, Field(ge=0, le=MAX_INT64), Allowed(f"{_WHOLE}, 0 or more")]
Seed = Annotated[int, Field(ge=0, le=MAX_INT64), Allowed(f"{_WHOLE} from 0 to 2**63 - 1")]
Pixels = Annotated[
    int,
    Field(le=2**31 - 1),
    AfterValidator(_check_pixels),
    Allowed(f"{_WHOLE} of pixels divisible by {PIXEL_MULTIPLE}, {PIXEL_MULTIPLE} or more"),
]
Number = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), Allowed("a number from 0 to 1")]
InputPath = Annotated[Path, Field(strict=False), BeforeValidator(_check_path), Allowed("a path")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LoraConfig(_Section):
    """One adapter under `model.loras`, known to prompts by its name there."""

    path: InputPath
    scale: Annotated[Number, Allowed("a number")] = 1.0


class ModelConfig(_Section):
    """Which weights, and how they are run. `auto` is resolved once, by the driver."""

    path: Annotated[InputPath | None, Allowed("a path, or null where model.repo is given")] = None
    repo: Annotated[
        Text | None, Allowed("a repository such as Tongyi-MAI/Z-Image-Turbo, or null")
    ] = None
    source: Literal["huggingface", "modelscope"] = "huggingface"
    revision: Annotated[Text | None, Allowed("a branch, tag or commit as text, or null")] = None
    transformer: Annotated[InputPath | None, Allowed("a path of a file or folder, or null")] = None
    vae: Annotated[InputPath | None, Allowed("a path of a file or folder, or null")] = None
    text_encoder: Annotated[InputPath | None, Allowed("a path of a file or folder, or null")] = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    attention: Literal["auto", "native", "_native_flash", "flash", "_flash_3"] = "auto"
    compile: Annotated[Literal["auto"] | bool, Allowed("auto, true, false")] = "auto"
    offload: Literal["auto", "none", "phase", "model", "block"] = "auto"
    quantization: Literal["none", "int8"] = "none"
    loras: Annotated[
        dict[Name, LoraConfig],
        BeforeValidator(_empty_if_null),
        Allowed("a mapping NAME: {path: FILE, scale: NUMBER}"),
    ] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_weights(self) -> ModelConfig:
        if self.path is None and self.repo is None:
            raise _fail("no weights: neither model.path nor model.repo is given")
        return self

    @property
    def folder(self) -> Path:
        """The checkpoint folder on a node: `path`, else a place of its own in the user's cache."""
        if self.path is not None:
            return self.path
        assert self.repo is not None
        name = f"{self.repo}/{self.revision}" if self.revision else self.repo
        return Path.home() / ".cache" / "zimage" / name.replace("/", "--")

    @property
    def parts(self) -> dict[str, Path]:
        """What replaces models of the folder, by name: arguments of the loading functions."""
        parts = {
            "transformer": self.transformer,
            "vae": self.vae,
            "text_encoder": self.text_encoder,
        }
        return {name: path for name, path in parts.items() if path is not None}

    def key_of(self, message: str) -> str:
        """Which key a message about the weights concerns: `model.path` or that of a part."""
        for name, path in self.parts.items():
            if str(path) in message:
                return f"model.{name}"
        return "model.repo" if self.path is None else "model.path"


class PromptsConfig(_Section):
    """Where the prompts come from, and which of them belong to the job."""

    generator: Annotated[
        Text, Allowed("avatars, food, gaming, table, template or package.module:Class")
    ]
    profiles: Annotated[InputPath | None, Allowed("a path of a CSV or XLSX file, or null")] = None
    sheet: Annotated[Text | None, Allowed("the name of a sheet as text, or null")] = None
    start: Index = 0
    count: Annotated[
        Count | None, Allowed(f"{_WHOLE}, 1 or more, or null for all that the generator has")
    ] = None
    images_root: Annotated[InputPath | None, Allowed("a path of a folder, or null")] = None
    options: Annotated[
        dict[str, JsonValue],
        BeforeValidator(_empty_if_null),
        AfterValidator(_check_json),
        Allowed("a mapping of text, numbers, booleans, null, lists and mappings"),
    ] = Field(default_factory=dict)


class SamplingConfig(_Section):
    """How each image is made. The numbers mean what `zimage_core.generate` says."""

    width: Pixels = 1024
    height: Pixels = 1024
    num_inference_steps: Count = 8
    guidance_scale: Annotated[Number, Field(ge=0), Allowed("a number, 0 or more")] = 0.0
    negative_prompt: Annotated[str, Allowed("text")] = ""
    seed: Seed = 42
    images_per_prompt: Count = 1
    batch_size: Annotated[Literal["auto"] | Count, Allowed(f"auto or {_WHOLE}, 1 or more")] = "auto"
    max_sequence_length: Count = 512
    cfg_normalization: Annotated[
        bool | Annotated[Number, Field(ge=0)], Allowed("true, false or a number, 0 or more")
    ] = False
    cfg_truncation: Fraction = 1.0
    strength: Fraction = 0.6
    cache: Annotated[
        Annotated[int, Field(ge=min(INTERVALS), le=max(INTERVALS))] | None,
        Allowed(
            f"null, or {_WHOLE} from {min(INTERVALS)} to {max(INTERVALS)} where "
            f"sampling.num_inference_steps is {MIN_STEPS} or more"
        ),
    ] = None

    @field_validator("cache")
    @classmethod
    def _has_steps(cls, cache: int | None, info: ValidationInfo) -> int | None:
        steps = info.data.get("num_inference_steps")  # absent where it has an error of its own
        if cache is not None and steps is not None and steps < MIN_STEPS:
            raise _fail(f"without use for sampling.num_inference_steps {steps}")
        return cache


class OutputConfig(_Section):
    """Where the images go, and in which form."""

    uri: Annotated[
        str,
        AfterValidator(_check_uri),
        Allowed("a path, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"),
    ]
    format: Literal["png", "jpeg", "webp"] = "png"
    png_level: Annotated[
        int,
        Field(ge=0, le=9),
        Allowed(f"{_WHOLE} from 0 to 9, other than {PNG_LEVEL} where output.format is png"),
    ] = PNG_LEVEL
    embed_metadata: EmbedMetadata = "full"
    layout: Literal["files", "webdataset"] = "files"
    shard_size: Count = 64

    @field_validator("png_level")
    @classmethod
    def _is_of_png(cls, level: int, info: ValidationInfo) -> int:
        form = info.data.get("format", "png")  # absent where it has an error of its own
        if form != "png" and level != PNG_LEVEL:
            raise _fail(f"without meaning for output.format {form}")
        return level


class RunConfig(_Section):
    """How the work is spread, and when it is given up. Nothing here changes an image."""

    workers: Annotated[Literal["auto"] | Count, Allowed(f"auto or {_WHOLE}, 1 or more")] = "auto"
    gpus_per_worker: Annotated[
        Number,
        Field(gt=0),
        AfterValidator(_check_gpus),
        Allowed("a number above 0: a share of one GPU up to 1, a whole number above"),
    ] = 1.0
    threads_per_worker: Count = 1
    max_shard_attempts: Count = 3
    stall_timeout: Annotated[Number, Field(gt=0), Allowed("a number of seconds above 0")] = 600.0
    max_failure_rate: Fraction = 0.5


class JobConfig(_Section):
    """A whole job, merged and checked, with absolute input paths.

    `model_dump(mode="json")` holds every key in a fixed order, and validating it again gives an
    equal config: it is what `job.json` keeps. `files` and `source` say what was read; they are no
    part of the config's value.
    """

    name: Name
    model: ModelConfig
    prompts: PromptsConfig
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    output: OutputConfig
    run: RunConfig = Field(default_factory=RunConfig)

    _files: tuple[Path, ...] = PrivateAttr(default=())
    _source: Path | None = PrivateAttr(default=None)
    _layers: Layers | None = PrivateAttr(default=None)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that was read to make this config, each once, in order of precedence."""
        return self._files

    @property
    def source(self) -> Path | None:
        """The job file itself; None for a config that was not read from one."""
        return self._source

    def place(self, key: str) -> str:
        """Return `FILE: key`, or `--flag: key`: who set a dotted key, as an error begins."""
        keys = tuple(key.split("."))
        return key if self._layers is None else self._layers.origin(keys).place(keys)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, JobConfig):
            return NotImplemented
        return self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


SECTIONS: tuple[str, ...] = ("model", "prompts", "sampling", "output", "run")
