"""The stages of a batch on a checkpoint, without a worker around them."""

from pathlib import Path
from typing import Any

import torch
from cli_calls import CHECKPOINT

from jobs.batch_stages import BatchStages
from jobs.config import SamplingConfig
from zimage_core import LoraSwitcher, ZImagePipeline, load_from_local_dir


def load(checkpoint: Path = CHECKPOINT, dtype: torch.dtype = torch.float32) -> ZImagePipeline:
    """The pipeline of a checkpoint, on the CPU."""
    return ZImagePipeline(**load_from_local_dir(checkpoint, device="cpu", dtype=dtype))


def make_stages(pipeline: ZImagePipeline, sampling: SamplingConfig, **options: Any) -> BatchStages:
    """Without adapters; what is not in `options` says nothing to anybody."""
    silent: dict[str, Any] = {"images_root": None, "on_step": _nothing, "log": _nothing}
    loras = LoraSwitcher(pipeline.transformer, {})
    return BatchStages(pipeline, loras=loras, scales={}, sampling=sampling, **silent | options)


def _nothing(_: object) -> None:
    pass
