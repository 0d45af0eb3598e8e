"""The starting images of a batch, decoded and brought to its size, just before they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from jobs.init_images import decode_image
from jobs.plan import Sample
from zimage_core.image_files import ImageFileError
from zimage_core.images import from_input


@dataclass(frozen=True)
class BatchStarts:
    """What the samples of a batch start from, by index.

    Args:
        images: (1, 3, H, W) float32 in [0, 1] each, for samples that start from an image.
        faults: for those whose image cannot be used, why.
    """

    images: Mapping[int, Tensor] = field(default_factory=dict)
    faults: Mapping[int, str] = field(default_factory=dict)

    def of(self, samples: Sequence[Sample]) -> Tensor | None:
        """Images (B, 3, H, W) of some of the samples; None where they start from noise alone."""
        if samples[0].init_image is None:
            return None
        return torch.cat([self.images[sample.index] for sample in samples])


def read_starts(
    batch: Sequence[Sample], root: Path | None, on_image: Callable[[int], None]
) -> BatchStarts:
    """Read the images of a batch, one after the other, so that only one is large at a time.

    Args:
        batch: samples that start from an image, or samples that do not.
        root: the job's `prompts.images_root`.
        on_image: called with the index of each sample whose image was read.
    """
    images: dict[int, Tensor] = {}
    faults: dict[int, str] = {}
    for sample in batch:
        if sample.init_image is None:
            continue
        try:
            image = decode_image(root, sample.init_image)
            size = {"height": sample.height, "width": sample.width}
            images[sample.index] = from_input(image, **size)
        except ImageFileError as error:
            faults[sample.index] = str(error)
        except Exception as error:  # noqa: BLE001 - costs its own row, whatever it is
            faults[sample.index] = f"{sample.init_image.name}: {type(error).__name__}: {error}"
        on_image(sample.index)
    return BatchStarts(images, faults)
