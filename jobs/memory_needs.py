"""How much memory of a device a job or a checkpoint needs: computed, with no weight read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.checkpoint_kind import takes_pictures
from jobs.config import JobConfig

if TYPE_CHECKING:
    from zimage_core.memory import MemoryModel

# `model` needs what `phase` does and moves weights more often: it is for people to choose.
AUTO_OFFLOAD = ("none", "phase", "block")
SIDES = (512, 1024, 2048)
_GIB = 1024**3


def job_memory(config: JobConfig, folder: Path, *, dtype: str, batch_size: int) -> dict[str, int]:
    """Bytes that should be free on a GPU for a job, for each way of offloading.

    Prompts are taken to be as long as they may, images to have the job's own size, and pictures to
    edit to be as large as they are encoded at most, so many for each prompt as the option
    `image_column` names columns; one where another generator may bring some.

    Args:
        folder: where the checkpoint is on this node.
        dtype: what `model.dtype` was resolved to.
        batch_size: what `sampling.batch_size` was resolved to.

    Raises:
        CheckpointError: the checkpoint is none.
        ValueError: the model cannot make images of that size.
    """
    sampling = config.sampling
    num_images = _images_per_prompt(config)
    edits = num_images > 0 and takes_pictures(folder, config.model.transformer)
    return image_memory(
        memory_model(folder, config.model.parts, dtype, config.model.quantization),
        height=sampling.height,
        width=sampling.width,
        batch_size=batch_size,
        guided=sampling.guidance_scale > 0,
        caption_tokens=sampling.max_sequence_length,
        num_steps=sampling.num_inference_steps,
        from_image=num_images > 0 and not edits,
        num_pictures=num_images if edits else 0,
    )


def _images_per_prompt(config: JobConfig) -> int:
    """How many images a prompt may bring; 1 where only its generator knows."""
    if config.prompts.images_root is None:
        return 0
    columns = config.prompts.options.get("image_column")
    return len(columns) if isinstance(columns, list) and columns else 1


def image_memory(model: MemoryModel, *, caption_tokens: int = 512, **work: Any) -> dict[str, int]:
    """Bytes that should be free on a GPU for a `zimage_core.memory.Workload`.

    Raises:
        ValueError: the model cannot make images of that size.
    """
    from zimage_core.memory import Workload

    workload = Workload(caption_tokens=min(caption_tokens, model.max_caption_tokens), **work)
    return {mode: account.needed for mode, account in model.accounts(workload).items()}


def memory_report(folder: Path, parts: Mapping[str, Path], *, dtype: str) -> list[dict[str, Any]]:
    """What one image of common sizes needs, as `zimage doctor` shows it.

    Returns:
        For each size: `width`, `height`, `guidance`, and `needed_bytes` by way of offloading. Sizes
        that the model has no positions for are left out.
    """
    model = memory_model(folder, parts, dtype, "none")
    report = []
    for side in SIDES:
        if side > model.max_side:
            continue
        for guided in (False, True):
            needed = image_memory(model, height=side, width=side, guided=guided)
            needed = {mode: needed[mode] for mode in AUTO_OFFLOAD}
            report.append(
                {"width": side, "height": side, "guidance": guided, "needed_bytes": needed}
            )
    return report


def format_memory(report: list[dict[str, Any]], dtype: str, free_bytes: int | None) -> list[str]:
    """The report as lines for people, with what `auto` would take where so much is free."""
    if not report:
        return []
    columns = [*AUTO_OFFLOAD, *(["auto"] if free_bytes is not None else [])]
    lines = [
        f"memory     GiB that should be free on a GPU for one image, {dtype} (computed), by "
        "model.offload",
        f"           {'pixels':<12} {'guidance':<9}" + "".join(f"{name:>8}" for name in columns),
    ]
    for entry in report:
        needed = entry["needed_bytes"]
        cells = [f"{needed[mode] / _GIB:.1f}" for mode in AUTO_OFFLOAD]
        if free_bytes is not None:
            cells.append(first_fitting(needed, free_bytes) or "nothing")
        size = f"{entry['width']} x {entry['height']}"
        guidance = "yes" if entry["guidance"] else "no"
        lines.append(f"           {size:<12} {guidance:<9}" + "".join(f"{c:>8}" for c in cells))
    return lines


def first_fitting(needed: Mapping[str, int], free: float) -> str | None:
    """The way of offloading that moves least of those that fit in so many bytes."""
    return next((mode for mode in AUTO_OFFLOAD if needed[mode] <= free), None)


def smallest_need(report: list[dict[str, Any]]) -> int | None:
    """Bytes without which a model makes no image at all, of the sizes reported."""
    return min((min(entry["needed_bytes"].values()) for entry in report), default=None)


def memory_model(
    folder: Path, parts: Mapping[str, Path], dtype: str, quantization: str
) -> MemoryModel:
    """The models of a checkpoint without their weights.

    Raises:
        CheckpointError: the checkpoint is none.
    """
    import torch

    from zimage_core.checkpoint import open_checkpoint
    from zimage_core.memory import MemoryModel

    checkpoint = open_checkpoint(folder, **parts)
    return MemoryModel(
        checkpoint.transformer_config,
        checkpoint.autoencoder_config,
        checkpoint.text_encoder_config,
        getattr(torch, dtype),
        quantization,
        checkpoint.vision_config,
    )
