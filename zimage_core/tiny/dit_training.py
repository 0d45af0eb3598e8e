"""Joint training of the transformer and the text encoder by flow matching, and the distillation of
guidance into them.

Latents at noise level s are (1 - s) x0 + s noise; the model's time is 1 - s and its answer the
velocity x0 - noise. Noise levels are drawn as sampling walks through them, with the same shift.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.text_encoder import TextEncoder
from zimage_core.tiny.caption_batches import CaptionBatch, CaptionBatches
from zimage_core.tiny.optimizer import MovingAverage, MuonAdamW
from zimage_core.tiny.parallel import Threads
from zimage_core.tiny.state import learning_rate
from zimage_core.tiny.text_training import split_encoder_parameters
from zimage_core.transformer import Context, ZImageTransformer2DModel

SHIFT = 3.0
"""Of the scheduler that the checkpoint is written with."""


class TrainingForward:
    """The transformer's forward from text features of one padded length, batched throughout.

    Equal to `embed_captions`, `condition` and `forward`, without lists of captions.

    Args:
        transformer: the model.
        height: h of the latents.
        width: w of the latents.
    """

    def __init__(self, transformer: ZImageTransformer2DModel, height: int, width: int) -> None:
        self.transformer = transformer
        self.height, self.width = height, width
        self._contexts: dict[int, Context] = {}

    def __call__(self, latents: Tensor, time: Tensor, features: Tensor, lengths: Tensor) -> Tensor:
        """Predict velocities (B, F, h, w).

        Args:
            latents: (B, F, h, w) float32.
            time: model time, (B,) float32.
            features: of the text encoder, (B, L, D), L a multiple of 32.
            lengths: tokens of each caption, (B,) int64.
        """
        model = self.transformer
        context = self._context(features.shape[1])
        real = torch.arange(features.shape[1]) < lengths[:, None]
        captions = torch.where(real[..., None], model.cap_embedder(features), model.cap_pad_token)
        rotary = context.rotary[:, -features.shape[1] :]
        for block in model.context_refiner:
            captions = block(captions, rotary, None)
        velocity: Tensor = model(latents, time, context._replace(after=captions))
        return velocity

    def _context(self, length: int) -> Context:
        if length not in self._contexts:
            empty = torch.zeros(length, self.transformer.config.dim)
            self._contexts[length] = self.transformer.condition([empty], self.height, self.width)
        return self._contexts[length]


class Guide:
    """A frozen model under guidance, whose velocity a student learns to predict without.

    Args:
        transformer: copied.
        text_encoder: copied.
        empty: ids of the empty prompt, (1, L) int64 padded to a multiple of 32.
        empty_length: its tokens.
        scale: s in `pos + s * (pos - neg)`.
    """

    def __init__(
        self,
        transformer: ZImageTransformer2DModel,
        text_encoder: TextEncoder,
        empty: Tensor,
        empty_length: int,
        scale: float,
    ) -> None:
        self.transformer = copy.deepcopy(transformer).requires_grad_(False)
        self.text_encoder = copy.deepcopy(text_encoder).requires_grad_(False)
        self.scale = scale
        self.empty_length = empty_length
        with torch.no_grad():
            self.empty = self.text_encoder(empty)

    @torch.no_grad()
    def velocity(
        self, forward: TrainingForward, x: Tensor, time: Tensor, batch: CaptionBatch
    ) -> Tensor:
        """The guided velocity (B, F, h, w); that of an empty caption is left as it is."""
        features = self.text_encoder(batch.ids)
        positive = forward(x, time, features, batch.lengths)
        empty = self.empty.expand(len(x), -1, -1)
        lengths = torch.full_like(batch.lengths, self.empty_length)
        negative = forward(x, time, empty, lengths)
        return positive + self.scale * (positive - negative)


class DitTrainer:
    """Steps of the joint training, or of the distillation where a guide is given.

    Args:
        transformer: changed in place.
        text_encoder: changed in place.
        latents: (N, F, h, w) of any float dtype, as the encoder gives them.
        scale: brings them to deviation 1, after `shift`.
        shift: their mean.
        batches: of captions of the N drawings.
        threads: where it is computed.
        generator: draws noise and its levels.
        lr: learning rate of both optimizers.
        decay: of the moving average.
        guide: the teacher.
    """

    def __init__(
        self,
        transformer: ZImageTransformer2DModel,
        text_encoder: TextEncoder,
        latents: Tensor,
        scale: float,
        shift: float,
        batches: CaptionBatches,
        threads: Threads,
        generator: torch.Generator,
        *,
        lr: float = 2e-3,
        decay: float = 0.998,
        guide: Guide | None = None,
    ) -> None:
        self.transformer, self.text_encoder = transformer, text_encoder
        self.latents, self.scale, self.shift = latents, scale, shift
        self.batches, self.threads, self.generator = batches, threads, generator
        self.guide = guide
        height, width = latents.shape[-2:]
        self.forwards = [TrainingForward(transformer, height, width) for _ in range(threads.count)]
        self.guide_forwards = [
            TrainingForward(guide.transformer, height, width) if guide else None
            for _ in range(threads.count)
        ]
        matrices, others = split_transformer_parameters(transformer)
        text_matrices, text_others = split_encoder_parameters(text_encoder)
        self.optimizer = MuonAdamW(
            [*matrices, *text_matrices], [*others, *text_others], threads, matrix_lr=lr, lr=lr
        )
        self.average = MovingAverage(
            {
                **{f"transformer.{name}": p for name, p in transformer.named_parameters()},
                **{f"text_encoder.{name}": p for name, p in text_encoder.named_parameters()},
            },
            decay,
        )

    def step(self, step: int, total: int) -> dict[str, float]:
        """Take a step."""
        batch = self.batches.next()
        x0 = (self.latents[batch.indices].float() - self.shift) * self.scale
        noise = torch.randn(x0.shape, generator=self.generator)
        s = noise_levels(len(x0), self.generator)
        level = s[:, None, None, None]
        x = (1 - level) * x0 + level * noise

        def loss(part: slice, thread: int) -> Tensor:
            features = self.text_encoder(batch.ids[part])
            lengths = batch.lengths[part]
            velocity = self.forwards[thread](x[part], 1 - s[part], features, lengths)
            target = x0[part] - noise[part]
            guide_forward = self.guide_forwards[thread]
            if self.guide is not None and guide_forward is not None:
                captions = CaptionBatch([], [], batch.ids[part], lengths)
                target = self.guide.velocity(guide_forward, x[part], 1 - s[part], captions)
            return (velocity - target).square().mean()

        value = self.threads.gradients(loss, len(x0), self.optimizer.parameters)
        norm = self.optimizer.step(learning_rate(step, total))
        self.average.update()
        return {"loss": value, "grad_norm": norm, "tokens": float(batch.ids.shape[1])}

    def parts(self) -> dict[str, Any]:
        """What is saved."""
        return {
            "transformer": self.transformer,
            "text_encoder": self.text_encoder,
            "optimizer": self.optimizer,
            "average": self.average,
            "batches": self.batches,
        }

    def averaged(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """State dicts of the transformer and the text encoder, averaged over the steps."""
        split: dict[str, dict[str, Tensor]] = {"transformer": {}, "text_encoder": {}}
        for name, value in self.average.values.items():
            model, _, key = name.partition(".")
            split[model][key] = value
        return split["transformer"], split["text_encoder"]


def noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """One level for each of `count` equal parts of the range, in random order."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    u = u[torch.randperm(count, generator=generator)]
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def split_transformer_parameters(
    transformer: ZImageTransformer2DModel,
) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices of attention and feed-forward, for Muon; all else, for AdamW."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in transformer.named_parameters():
        inner = parameter.ndim == 2 and (".attention." in name or ".feed_forward." in name)
        (matrices if inner else others).append(parameter)
    return matrices, others


def initialize_transformer(
    transformer: ZImageTransformer2DModel, generator: torch.Generator
) -> None:
    """Draw weights: layers that keep variances, gates a little open, an answer near 0."""
    for name, parameter in transformer.named_parameters():
        with torch.no_grad():
            if "adaLN_modulation" in name:
                parameter.zero_()
                if name.endswith("weight"):
                    parameter.normal_(0.0, 0.01, generator=generator)
                elif "final" not in name:
                    _open_gates(parameter)
            elif "final" in name and name.endswith("weight"):
                parameter.normal_(0.0, 0.002, generator=generator)
            elif "pad_token" in name:
                parameter.normal_(0.0, 0.1, generator=generator)
            elif parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                bound = math.sqrt(6.0 / sum(parameter.shape))
                parameter.uniform_(-bound, bound, generator=generator)
    # They start with norms whose names do not say so.
    for embedder in (transformer.cap_embedder, transformer.siglip_embedder):
        if embedder is not None:
            for parameter in embedder[0].parameters():
                nn.init.ones_(parameter)


def _open_gates(bias: Tensor) -> None:
    _, attention_gate, _, ffn_gate = bias.chunk(4)
    attention_gate.fill_(0.3)
    ffn_gate.fill_(0.3)
