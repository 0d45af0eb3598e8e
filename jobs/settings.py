"""What the driver resolves once: every `auto` of a job, and what this version cannot do yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jobs.capabilities import resolve_attention, resolve_compile
from jobs.config import JobConfig, ModelConfig
from jobs.errors import InputError
from jobs.executor import Settings, WorkerInfo
from jobs.memory_needs import AUTO_OFFLOAD
from jobs.quantities import memory_size

_MEGAPIXEL = 1024 * 1024
_MAX_AUTO_BATCH = 8


def refuse_unavailable(config: JobConfig) -> None:
    """Name the keys of the format that this version does not carry out yet."""
    model = config.model
    if model.quantization != "none" and model.loras:
        raise InputError(
            f"{config.place('model.quantization')}: {model.quantization!r}: adapters "
            "(model.loras) cannot be put into 8-bit weights; allowed: 'none', or model.loras: null"
        )


def resolve(
    config: JobConfig,
    info: WorkerInfo,
    fingerprint: str,
    loras: Mapping[str, str],
    memory_needed: Callable[[], Mapping[str, int]],
    num_samples: int,
    takes_pictures: bool = False,
) -> Settings:
    """Resolve every `auto`, from the job and the kind of device alone: never from their number.

    Args:
        fingerprint: of the model's weights.
        loras: fingerprints of the job's adapters, by name.
        memory_needed: `Executor.memory_needed`, asked only where it has a say.
        num_samples: of the plan as it is first made.
        takes_pictures: `Executor.takes_pictures`.

    Raises:
        InputError: keys that do not go together on this device.
    """
    model = config.model
    offload = _offload(config, info, memory_needed)
    return Settings(
        device_type=info.device_type,
        dtype=resolve_dtype(config, info.device_type),
        attention=resolve_attention(config, info),
        compile=resolve_compile(config, info, offload, num_samples),
        offload=offload,
        batch_size=resolve_batch_size(config),
        threads_per_worker=config.run.threads_per_worker,
        model=_model_name(model),
        model_fingerprint=fingerprint,
        loras=dict(loras),
        takes_pictures=takes_pictures,
    )


def resolve_dtype(config: JobConfig, device_type: str) -> str:
    """What `model.dtype` stands for on a kind of device."""
    if config.model.dtype != "auto":
        return config.model.dtype
    return "bfloat16" if device_type == "cuda" else "float32"


def resolve_batch_size(config: JobConfig) -> int:
    """What `sampling.batch_size` stands for."""
    sampling = config.sampling
    if sampling.batch_size != "auto":
        return sampling.batch_size
    # From 1024 x 1024 on one image fills a GPU; smaller ones share the launches.
    images = _MEGAPIXEL // (sampling.width * sampling.height)
    return max(1, min(_MAX_AUTO_BATCH, images))


def _offload(
    config: JobConfig, info: WorkerInfo, memory_needed: Callable[[], Mapping[str, int]]
) -> str:
    """The first way of offloading whose memory is free; off CUDA there is nothing to gain."""
    model = config.model
    if model.offload != "auto":
        return model.offload
    if info.device_type != "cuda":
        return "none"
    # Workers that share a GPU find it free before any of them has loaded.
    free = info.free_memory * min(1.0, config.run.gpus_per_worker)
    needed = memory_needed()
    for offload in AUTO_OFFLOAD:
        if offload == "block" and model.compile is True:
            break
        if needed[offload] <= free:
            return offload
    if model.compile is True:
        raise InputError(
            f"{config.place('model.compile')}: true: {info.device} has {memory_size(free)} free, "
            f"and without model.offload: block, which excludes it, the job needs "
            f"{memory_size(min(needed[mode] for mode in AUTO_OFFLOAD[:-1]))}; allowed: auto, false"
        )
    # The least there is. It may still do: what the account adds for safety is assumed.
    return AUTO_OFFLOAD[-1]


def _model_name(model: ModelConfig) -> str:
    """What rows call the model: its repository or folder, what replaces parts of it, its bits."""
    replaced = [f"{name} {path.name}" for name, path in model.parts.items()]
    if model.quantization != "none":
        replaced.append(f"{model.quantization} weights")
    name = model.repo or model.folder.name
    return f"{name} with {', '.join(replaced)}" if replaced else name
