"""The images of a batch's samples, decoded and brought to size, just before they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from jobs.input_images import InputImage, decode_image
from jobs.plan import Sample
from zimage_core.image_files import ImageFileError
from zimage_core.images import from_input
from zimage_core.pictures import EncodedPicture, Picture, prepare_picture

PictureKey = tuple[str, tuple[int, int]]
"""What features depend on: the hash of a picture's content, and the size in which it is seen."""


@dataclass(frozen=True)
class BatchImages:
    """What the samples of a batch are made from.

    Args:
        starts: (1, 3, H, W) float32 in [0, 1] each, by index of the samples that start from an
            image.
        pictures: to edit; those that were encoded before, as they were.
        faults: by index, for samples of which an image cannot be used, why.
    """

    starts: Mapping[int, Tensor] = field(default_factory=dict)
    pictures: Mapping[PictureKey, Picture | EncodedPicture] = field(default_factory=dict)
    faults: Mapping[int, str] = field(default_factory=dict)

    def starts_of(self, samples: Sequence[Sample]) -> Tensor | None:
        """Images (B, 3, H, W) of some of the samples; None where they start from noise alone."""
        if samples[0].init_image is None:
            return None
        return torch.cat([self.starts[sample.index] for sample in samples])


def picture_key(sample: Sample, picture: InputImage) -> PictureKey:
    """What the features of one of a sample's pictures are known by."""
    return picture.sha256, picture.sizes(sample.width * sample.height).seen


def read_images(
    batch: Sequence[Sample],
    root: Path | None,
    on_image: Callable[[int], None],
    *,
    multiple: int,
    encoded: Callable[[PictureKey], EncodedPicture | None],
) -> BatchImages:
    """Read the images of a batch, one after the other, so that only one is large at a time.

    Args:
        batch: samples that are alike in whether they start from an image.
        root: the job's `prompts.images_root`.
        on_image: called with the index of each sample whose images were read.
        multiple: of what the sides of pictures are encoded in.
        encoded: a picture that need not be read, since it is encoded.
    """
    starts: dict[int, Tensor] = {}
    pictures: dict[PictureKey, Picture | EncodedPicture] = {}
    faults: dict[int, str] = {}
    for sample in batch:
        if not sample.images:
            continue
        size = {"height": sample.height, "width": sample.width}
        for image in sample.images:
            try:
                if not sample.edits:
                    starts[sample.index] = from_input(decode_image(root, image), **size)
                    continue
                key = picture_key(sample, image)
                if key in pictures:
                    continue
                pictures[key] = encoded(key) or prepare_picture(
                    decode_image(root, image), multiple=multiple, area=sample.width * sample.height
                )
            except ImageFileError as error:
                faults[sample.index] = str(error)
            except Exception as error:  # noqa: BLE001 - costs its own row, whatever it is
                faults[sample.index] = f"{image.name}: {type(error).__name__}: {error}"
            if sample.index in faults:
                break
        on_image(sample.index)
    return BatchImages(starts, pictures, faults)
