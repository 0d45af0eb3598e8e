"""What the driver resolves once: every `auto` of a job, and what this version cannot do yet."""

from __future__ import annotations

import os
from collections.abc import Mapping

from jobs.config import JobConfig, ModelConfig
from jobs.errors import InputError
from jobs.executor import Settings, WorkerInfo

_MEGAPIXEL = 1024 * 1024
_MAX_AUTO_BATCH = 8


def refuse_unavailable(config: JobConfig) -> None:
    """Name the keys of the format that this version does not carry out yet."""
    if config.output.layout != "files":
        raise InputError(
            f"{config.place('output.layout')}: {config.output.layout!r} is not available yet; "
            "allowed: 'files'"
        )
    model = config.model
    if model.quantization != "none" and model.loras:
        raise InputError(
            f"{config.place('model.quantization')}: {model.quantization!r}: adapters "
            "(model.loras) cannot be put into 8-bit weights; allowed: 'none', or model.loras: null"
        )
    if config.model.offload not in ("auto", "none"):
        raise InputError(
            f"{config.place('model.offload')}: {config.model.offload!r} is not available yet; "
            "allowed: 'auto', 'none'"
        )


def resolve(
    config: JobConfig, info: WorkerInfo, fingerprint: str, loras: Mapping[str, str]
) -> Settings:
    """Resolve every `auto`, from the job and the kind of device alone: never from their number.

    Args:
        fingerprint: of the model's weights.
        loras: fingerprints of the job's adapters, by name.
    """
    model, sampling = config.model, config.sampling
    dtype = model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if info.device_type == "cuda" else "float32"
    if sampling.batch_size == "auto":
        # From 1024 x 1024 on one image fills a GPU; smaller ones share the launches.
        images = _MEGAPIXEL // (sampling.width * sampling.height)
        batch_size = max(1, min(_MAX_AUTO_BATCH, images))
    else:
        batch_size = sampling.batch_size
    return Settings(
        device_type=info.device_type,
        dtype=dtype,
        attention=os.environ.get("ZIMAGE_ATTENTION") or "native"
        if model.attention == "auto"
        else model.attention,
        compile=False if model.compile == "auto" else model.compile,
        offload="none" if model.offload == "auto" else model.offload,
        batch_size=batch_size,
        threads_per_worker=config.run.threads_per_worker,
        model=_model_name(model),
        model_fingerprint=fingerprint,
        loras=dict(loras),
    )


def _model_name(model: ModelConfig) -> str:
    """What rows call the model: its repository or folder, what replaces parts of it, its bits."""
    replaced = [f"{name} {path.name}" for name, path in model.parts.items()]
    if model.quantization != "none":
        replaced.append(f"{model.quantization} weights")
    name = model.repo or model.folder.name
    return f"{name} with {', '.join(replaced)}" if replaced else name
