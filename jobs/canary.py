"""The canary: two fixed prompts that every worker makes when it has loaded, alone and together.

A batch must give what its images give alone, within the rounding of the dtype. Where it does not
(a kernel that is wrong for some shapes, a mask that is dropped), or where two workers' canaries
differ, something computes wrongly that no exception will ever tell of.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from jobs.canaries import CanaryReport
from jobs.device import DeviceError, empty_cache, is_device_failure, is_out_of_memory
from zimage_core import ZImagePipeline

# Captions of one bucket, as in every batch of a job, but not of one length.
PROMPTS = (
    "a red apple on a wooden table",
    "a portrait of an old man with a grey beard, smiling",
)
SIDE = 64  # pixels
STEPS = 2
# Relative. On CPUs, with the tiny checkpoint and with random weights, batches came within 1e-6 in
# float32, 4e-3 in float16 and 3e-2 in bfloat16 of their images made alone; another prompt is at 1
# to 2.3. A false alarm costs speed, an error that shows in pictures is far above.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.15}


def fly_canary(pipeline: ZImagePipeline, on_step: Callable[[int], None]) -> CanaryReport:
    """Make the canary: each prompt alone, then both in one batch; no image is kept.

    One stage for all before the next, so that models that take turns on a device do so once. What
    goes wrong is reported and no more: the job's own images will show whether it matters.

    Args:
        pipeline: with no adapters in its weights.
        on_step: called with every step of work.

    Raises:
        DeviceError: the device failed in a way that only a new process mends.
    """
    tolerance = TOLERANCES[pipeline.dtype]
    try:
        latents, images = _make(pipeline, on_step)
    except Exception as error:
        if is_device_failure(error):
            raise DeviceError(str(error)) from error
        if is_out_of_memory(error):
            empty_cache()
        return CanaryReport(None, tolerance, fault=f"{type(error).__name__}: {error}")
    alone = torch.cat(latents[:2])
    reported = alone.cpu().contiguous().numpy().tobytes()
    if not (torch.isfinite(alone).all() and torch.isfinite(torch.cat(images[:2])).all()):
        # No reason for singles: they are not finite either.
        fault = "images made alone have values that are not finite"
        return CanaryReport(None, tolerance, reported, fault)
    difference = max(
        _relative(together[i], single[0])
        for *singles, together in (latents, images)
        for i, single in enumerate(singles)
    )
    return CanaryReport(difference, tolerance, reported)


def _make(
    pipeline: ZImagePipeline, on_step: Callable[[int], None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Latents (B, F, h, w) and images (B, 3, H, W) of the first prompt, the second, and both."""
    everybody = ((0,), (1,), (0, 1))
    prompts = [pipeline.encode([PROMPTS[i] for i in batch]) for batch in everybody]
    latents = [
        pipeline.denoise(
            embeds,
            height=SIDE,
            width=SIDE,
            num_inference_steps=STEPS,
            generators=[torch.Generator("cpu").manual_seed(i) for i in batch],
            on_step=on_step,
        )
        for embeds, batch in zip(prompts, everybody, strict=True)
    ]
    images = [pipeline.decode(each) for each in latents]
    on_step(0)
    return latents, images


def _relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to what is expected; infinite for NaN."""
    wide, right = found.cpu().double(), expected.cpu().double()
    ratio = float(torch.dist(wide, right) / right.norm())
    return ratio if math.isfinite(ratio) else math.inf
