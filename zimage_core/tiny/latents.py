"""The latents that the transformer is trained on: drawings of a fixed list of subjects, encoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zimage_core.autoencoder import AutoencoderKL
from zimage_core.tiny.attributes import Subject, draw_subject
from zimage_core.tiny.parallel import Threads
from zimage_core.tiny.vae_training import draw_kind, to_signed
from zimage_core.tiny.world import draw_array, draw_jitter

CHUNK = 500


def subject_and_picture(seed: str, index: int) -> tuple[Subject, NDArray[np.uint8]]:
    """Subject number `index` of a seed's list, and its drawing (128, 128, 3) uint8."""
    random = Random(f"{seed}/{index}")
    subject = draw_subject(draw_kind(random), random)
    return subject, draw_array(subject, draw_jitter(random))


def subjects_of(seed: str, count: int) -> list[Subject]:
    """The first subjects of a seed's list, not drawn."""
    found = []
    for index in range(count):
        random = Random(f"{seed}/{index}")
        found.append(draw_subject(draw_kind(random), random))
    return found


def encode_latents(
    vae: AutoencoderKL,
    folder: Path,
    seed: str,
    count: int,
    threads: Threads,
    report: Callable[[int], None],
) -> Tensor:
    """Encode the drawings of a seed's list, chunk by chunk; chunks that are there are kept.

    Args:
        vae: the encoder.
        folder: for the chunks, made if it does not exist.
        seed: see `subject_and_picture`.
        count: number of drawings, a multiple of 500.
        threads: where it is computed.
        report: called with the number of drawings that are done.

    Returns:
        (count, F, h, w) float16, as the encoder gives them, not scaled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = []
    for start in range(0, count, CHUNK):
        path = folder / f"{start:06d}.npy"
        if not path.is_file():
            latents = _encode(vae, seed, range(start, start + CHUNK), threads)
            beside = path.with_suffix(".part")
            with beside.open("wb") as file:
                np.save(file, latents.numpy())
            beside.replace(path)
            report(start + CHUNK)
        chunks.append(torch.from_numpy(np.load(path)))
    return torch.cat(chunks)


def scale_and_shift(latents: Tensor) -> tuple[float, float]:
    """The two numbers that bring latents to mean 0 and deviation 1: (latents - shift) * scale."""
    values = latents[:4000].float()
    return 1.0 / float(values.std()), float(values.mean())


def _encode(vae: AutoencoderKL, seed: str, indices: range, threads: Threads) -> Tensor:
    def part(part: slice) -> Tensor:
        encoded = []
        for group in np.array_split(np.asarray(indices[part]), max(1, len(indices[part]) // 10)):
            pictures = np.stack([subject_and_picture(seed, int(i))[1] for i in group])
            with torch.no_grad():
                encoded.append(vae.encode(to_signed(pictures)).mode())
        return torch.cat(encoded).half()

    return torch.cat(threads.map(part, threads.slices(len(indices))))
