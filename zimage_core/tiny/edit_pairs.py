"""The drawings that an edit model learns from: groups of one drawing and its changes, encoded.

A group is a subject and the same subject after three edits, all with the same shift and tint, so
that what an instruction does not name is the same to the pixel. Each edit is also read backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zimage_core.autoencoder import AutoencoderKL
from zimage_core.tiny.attributes import Subject, draw_subject
from zimage_core.tiny.canvas import Jitter
from zimage_core.tiny.instructions import Edit, draw_edit
from zimage_core.tiny.parallel import Threads
from zimage_core.tiny.vae_training import draw_kind, to_signed
from zimage_core.tiny.world import draw_array, draw_jitter
from zimage_core.vision import VisionProcessor

EDITS = 3
SIZE_OF_GROUP = EDITS + 1
CHUNK = 100


@dataclass(frozen=True)
class Group:
    """A subject, edits of it, and how all of them are drawn."""

    subject: Subject
    edits: tuple[Edit, ...]
    jitter: Jitter

    @property
    def subjects(self) -> list[Subject]:
        """The subject and what each edit makes of it."""
        return [self.subject, *(edit.after for edit in self.edits)]


@dataclass(frozen=True)
class EditPairs:
    """Encoded drawings of groups, in the order of `Group.subjects`.

    Attributes:
        groups: G of them.
        latents: (G, 4, F, h, w) float16, as the encoder gives them, not scaled.
        seen: what the vision encoder is shown, (G, 4, rows, columns, 3 * patch * patch) uint8.
    """

    groups: Sequence[Group]
    latents: Tensor
    seen: Tensor


def draw_group(seed: str, index: int) -> Group:
    """Group number `index` of a seed's list."""
    random = Random(f"{seed}/{index}")
    subject = draw_subject(draw_kind(random), random)
    edits = tuple(draw_edit(subject, random) for _ in range(EDITS))
    return Group(subject, edits, draw_jitter(random))


def encode_pairs(
    vae: AutoencoderKL,
    processor: VisionProcessor,
    folder: Path,
    seed: str,
    count: int,
    threads: Threads,
    report: Callable[[int], None],
) -> EditPairs:
    """Draw and encode the groups of a seed's list, chunk by chunk; chunks that are there are kept.

    Args:
        vae: the encoder.
        processor: brings drawings to what the vision encoder is shown.
        folder: for the chunks, made if it does not exist.
        seed: see `draw_group`.
        count: number of groups, a multiple of 100.
        threads: where it is computed.
        report: called with the number of groups that are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = [draw_group(seed, index) for index in range(count)]
    latents, seen = [], []
    for start in range(0, count, CHUNK):
        path = folder / f"{start:06d}.npz"
        if not path.is_file():
            arrays = _encode(vae, processor, groups[start : start + CHUNK], threads)
            beside = path.with_suffix(".part")
            with beside.open("wb") as file:
                np.savez(file, latents=arrays[0].numpy(), seen=arrays[1].numpy())
            beside.replace(path)
            report(start + CHUNK)
        with np.load(path) as chunk:
            latents.append(torch.from_numpy(chunk["latents"]))
            seen.append(torch.from_numpy(chunk["seen"]))
    return EditPairs(groups, torch.cat(latents), torch.cat(seen))


def _encode(
    vae: AutoencoderKL, processor: VisionProcessor, groups: Sequence[Group], threads: Threads
) -> tuple[Tensor, Tensor]:
    def part(part: slice) -> tuple[Tensor, Tensor]:
        latents, seen = [], []
        for group in groups[part]:
            pictures = np.stack([draw_array(s, group.jitter) for s in group.subjects])
            with torch.no_grad():
                latents.append(vae.encode(to_signed(pictures)).mode().half())
            seen.append(torch.stack([shown(processor, picture) for picture in pictures]))
        return torch.stack(latents), torch.stack(seen)

    parts = threads.map(part, threads.slices(len(groups)))
    return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])


def shown(
    processor: VisionProcessor, picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
) -> Tensor:
    """What the processor makes of a picture (H, W, 3), before it is normalised; uint8."""
    config = processor.config
    patches = processor(Image.fromarray(picture))
    mean, std = config.image_mean[0], config.image_std[0]
    return ((patches * std + mean) / config.rescale_factor).round().to(torch.uint8)


def normalised(processor: VisionProcessor, seen: Tensor) -> Tensor:
    """What `shown` returned, as the processor gives it, float32."""
    config = processor.config
    mean, std = config.image_mean[0], config.image_std[0]
    return (seen.float() * config.rescale_factor - mean) / std
