"""What a worker's device can run, and what `auto` makes of it for attention and compiling.

A worker finds out, and the driver decides once for the whole job, since it may have no GPU itself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple, get_args

from jobs.config import JobConfig, ModelConfig
from jobs.errors import InputError

if TYPE_CHECKING:
    from jobs.executor import WorkerInfo

ENVIRONMENT_VARIABLE = "ZIMAGE_ATTENTION"
AUTO = "auto"
DEFAULT_BACKEND = "native"
PUBLISHED_HEAD_DIM = 128  # channels of an attention head

# Computed from published numbers and measured by nobody here: a compiled step saves 0.5 s an image
# on an H100 and 1.2 s on an RTX 4090, and compiling takes about a minute, so that it pays after 50
# to 120 images on each GPU. A node is taken to have 8, since the number of workers may not count.
COMPILE_MIN_IMAGES = 1000


class Capabilities(NamedTuple):
    """What a device can run for a job."""

    attention: tuple[str, ...]
    """Attention backends in the job's dtype, the best first."""
    compiles: bool
    """Whether blocks can be compiled, and gain by it: CUDA with all that it takes."""


def device_capabilities(config: JobConfig, device_type: str, dtype: str) -> Capabilities:
    """Find out what this process' device can run; loads no model."""
    import torch

    from zimage_core.attention import usable_backends
    from zimage_core.compilation import can_compile

    attention = usable_backends(device_type, getattr(torch, dtype), _head_dim(config))
    return Capabilities(attention, device_type == "cuda" and can_compile(device_type))


def resolve_attention(config: JobConfig, info: WorkerInfo) -> str:
    """The backend of a job: the one it names, else that of `ZIMAGE_ATTENTION`, else the best.

    Raises:
        InputError: the environment names one that does not exist.
    """
    if config.model.attention != AUTO:
        return config.model.attention
    named = os.environ.get(ENVIRONMENT_VARIABLE) or AUTO
    known = get_args(ModelConfig.model_fields["attention"].annotation)
    if named not in known:
        raise InputError(f"{ENVIRONMENT_VARIABLE}: {named!r}; allowed: {', '.join(known)}")
    if named != AUTO:
        return named
    return info.attention[0] if info.attention else DEFAULT_BACKEND


def resolve_compile(config: JobConfig, info: WorkerInfo, offload: str, num_samples: int) -> bool:
    """Whether a job compiles: what it says, else whether its images pay for it.

    Args:
        offload: as it was resolved; blocks that are streamed are not compiled.
        num_samples: of the plan when it is first made.
    """
    asked = config.model.compile
    if isinstance(asked, bool):
        return asked
    return info.compiles and offload != "block" and num_samples >= COMPILE_MIN_IMAGES


def _head_dim(config: JobConfig) -> int:
    """Channels of an attention head, from the checkpoint; the published ones before it is there."""
    from zimage_core.config import CheckpointError, TransformerConfig

    path = config.model.folder / "transformer" / "config.json"
    if not path.is_file():
        return PUBLISHED_HEAD_DIM
    try:
        transformer = TransformerConfig.from_json(path)
    except CheckpointError:
        return PUBLISHED_HEAD_DIM  # loading says what is wrong with it
    return transformer.dim // transformer.n_heads
