"""What a job's checkpoint does with the images of its prompts: starts from one, or edits them."""

from __future__ import annotations

from pathlib import Path

from jobs.config import JobConfig


def takes_pictures(folder: Path, transformer: Path | None = None) -> bool:
    """Whether a checkpoint edits pictures, as its transformer's configuration says.

    Args:
        folder: of the checkpoint.
        transformer: what replaces its transformer.

    Raises:
        CheckpointError: there is no such configuration, or it cannot be used.
    """
    from zimage_core.checkpoint import find_source
    from zimage_core.model_kind import KINDS

    config = find_source(KINDS["transformer"], folder, transformer).read_config()
    return config.siglip_feat_dim is not None


def takes_pictures_here(config: JobConfig) -> bool | None:
    """Whether a job's checkpoint edits the images of its prompts, as far as this machine can tell.

    Returns:
        None where the checkpoint is not here, so that only a worker knows, or is broken, which
        whoever loads it says. Without `prompts.images_root` nothing is looked at: there are none.
    """
    if config.prompts.images_root is None:
        return False
    try:
        return takes_pictures(config.model.folder, config.model.transformer)
    except (ValueError, OSError):
        return None
