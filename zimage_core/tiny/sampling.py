"""Looks at a training while it runs: validation loss, and sheets of samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from zimage_core.autoencoder import AutoencoderKL
from zimage_core.contact_sheet import contact_sheet
from zimage_core.generation import generate
from zimage_core.images import from_signed, to_pil
from zimage_core.scheduler import FlowMatchEulerDiscreteScheduler
from zimage_core.text_encoder import TextEncoder, tokenize
from zimage_core.tiny.attributes import KINDS, draw_subject
from zimage_core.tiny.captions import CaptionWriter
from zimage_core.tiny.dit_training import SHIFT, TrainingForward
from zimage_core.tiny.vae_training import to_signed
from zimage_core.tiny.vocabulary import Vocabulary
from zimage_core.tiny.world import SIZE, draw_array, draw_jitter
from zimage_core.transformer import ZImageTransformer2DModel

VALIDATION_LEVELS = (1.0, 0.9, 0.75, 0.5, 0.25)
_PADDED = 96


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The one that the checkpoint is written with."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def sheet_prompts(vocabulary: Vocabulary, seed: str) -> list[str]:
    """24 prompts for sheets: 12 of avatars, 6 of food, 6 of game items."""
    random = Random(f"{seed}/sheet")
    writer = CaptionWriter(vocabulary, random)
    kinds = ["avatars"] * 12 + ["food"] * 6 + ["gaming"] * 6
    return [
        writer.free_caption(draw_subject(kind, random), short=False)
        if i % 2
        else writer.generator_caption(draw_subject(kind, random))
        for i, kind in enumerate(kinds)
    ]


def save_samples(
    path: Path,
    transformer: ZImageTransformer2DModel,
    vae: AutoencoderKL,
    text_encoder: TextEncoder,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    guidance_scale: float,
) -> None:
    """Make a picture of each prompt in 8 steps and save them as one sheet."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    pictures = generate(
        transformer,
        vae,
        text_encoder,
        tokenizer,
        scheduler(),
        prompt=prompts,
        height=SIZE,
        width=SIZE,
        guidance_scale=guidance_scale,
        generator=generators,
    )
    assert isinstance(pictures, list)
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, 8).save(path)


def save_reconstructions(path: Path, decoded: Tensor) -> None:
    """Save images (B, 3, H, W) in [-1, 1] as one sheet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(to_pil(from_signed(decoded)), 8).save(path)


class Validation:
    """The loss at fixed noise levels, on drawings and captions that are in no training.

    Args:
        vae: encodes the drawings, once.
        scale: of latents, after `shift`.
        shift: mean of latents.
        tokenizer: of the captions.
        vocabulary: of the captions.
        seed: another one draws other pictures.
        count: number of drawings.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        scale: float,
        shift: float,
        tokenizer: Any,
        vocabulary: Vocabulary,
        seed: str,
        count: int = 48,
    ) -> None:
        random = Random(f"{seed}/validation")
        writer = CaptionWriter(vocabulary, random)
        kinds = list(KINDS)
        subjects = [draw_subject(kinds[i % len(kinds)], random) for i in range(count)]
        captions = [writer.generator_caption(subject) for subject in subjects]
        rows = tokenize(tokenizer, captions, _PADDED)
        self.ids = torch.zeros(count, _PADDED, dtype=torch.int64)
        for ids, row in zip(self.ids, rows, strict=True):
            ids[: len(row)] = torch.tensor(row)
        self.lengths = torch.tensor([len(row) for row in rows])
        generator = torch.Generator().manual_seed(random.getrandbits(32))
        encoded = []
        for subject in subjects:
            picture = draw_array(subject, draw_jitter(random))
            with torch.no_grad():
                encoded.append(vae.encode(to_signed(picture[None])).mode())
        self.x0 = (torch.cat(encoded) - shift) * scale
        self.noise = torch.randn(self.x0.shape, generator=generator)

    @torch.no_grad()
    def losses(
        self, transformer: ZImageTransformer2DModel, text_encoder: TextEncoder
    ) -> dict[str, float]:
        """Mean squared error of the velocity at each level, as "val_0.75"."""
        forward = TrainingForward(transformer, *self.x0.shape[-2:])
        features = text_encoder(self.ids)
        found = {}
        for level in VALIDATION_LEVELS:
            x = (1 - level) * self.x0 + level * self.noise
            time = torch.full((len(x),), 1 - level)
            velocity = forward(x, time, features, self.lengths)
            error = (velocity - (self.x0 - self.noise)).square().mean()
            found[f"val_{level:g}"] = round(float(error), 4)
        return found
