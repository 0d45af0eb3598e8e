"""Steps of an edit model's training: flow matching towards the drawing that is asked for.

The loss weighs places more where the picture has to change: they are few, and to copy the rest is
what is learned first.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from zimage_core.chat_template import edit_segments
from zimage_core.text_encoder import TextEncoder, tokenize_texts
from zimage_core.tiny.dit_training import noise_levels, split_transformer_parameters
from zimage_core.tiny.edit_forward import Conditions, EditForward, see
from zimage_core.tiny.edit_pairs import SIZE_OF_GROUP, EditPairs, normalised
from zimage_core.tiny.instructions import InstructionWriter
from zimage_core.tiny.optimizer import MovingAverage, MuonAdamW
from zimage_core.tiny.parallel import Threads
from zimage_core.tiny.state import learning_rate
from zimage_core.tiny.text_training import split_encoder_parameters
from zimage_core.transformer import ZImageTransformer2DModel
from zimage_core.vision import VisionEncoder, VisionProcessor

MAX_ASKED = 32
"""Tokens of the segment with the instruction: one padded length, so that no mask is needed."""
_CHANGED = 0.25
_CHANGED_WEIGHT = 3.0


class Instructed:
    """Draws pairs of encoded drawings, and writes an instruction for each.

    Args:
        pairs: the drawings.
        writer: of the instructions.
        tokenizer: as `load_tokenizer` gives it, with the two tokens around pictures.
        random: draws the pairs, and which instructions are empty.
        dropout: share of empty instructions, which guidance needs.
    """

    def __init__(
        self,
        pairs: EditPairs,
        writer: InstructionWriter,
        tokenizer: Any,
        random: Random,
        dropout: float,
    ) -> None:
        self.pairs, self.writer, self.tokenizer = pairs, writer, tokenizer
        self.random, self.dropout = random, dropout
        opened, _, closed = edit_segments("", 1)
        self.opened, self.closed = tokenize_texts(tokenizer, [opened, closed], MAX_ASKED)

    def next(self, size: int) -> tuple[list[tuple[int, int, int]], Tensor, Tensor]:
        """A batch.

        Returns:
            Of each edit its group and the places of its two drawings in it; the ids (B, 32) int64
            of what is asked, zeros behind; and how many they are, (B,) int64.
        """
        chosen: list[tuple[int, int, int]] = []
        rows: list[list[int]] = []
        while len(chosen) < size:
            group = self.random.randrange(len(self.pairs.groups))
            place = self.random.randrange(1, SIZE_OF_GROUP)
            edit = self.pairs.groups[group].edits[place - 1]
            backwards = self.random.random() < 0.5
            text = self.writer.instruction(edit.reversed() if backwards else edit)
            if self.random.random() < self.dropout:
                text = ""
            (ids,) = tokenize_texts(self.tokenizer, [edit_segments(text, 1)[1]], 512)
            if len(ids) > MAX_ASKED:
                continue
            chosen.append((group, place, 0) if backwards else (group, 0, place))
            rows.append(ids)
        padded = torch.zeros(size, MAX_ASKED, dtype=torch.int64)
        for row, ids in zip(padded, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return chosen, padded, torch.tensor([len(ids) for ids in rows])


class EditTrainer:
    """Steps of the joint training of the three models.

    Args:
        transformer: changed in place, as are the two that follow.
        text_encoder: see `transformer`.
        vision: see `transformer`.
        instructed: source of the batches.
        processor: what the vision encoder is shown was made by.
        scale: brings latents to deviation 1, after `shift`.
        shift: their mean.
        threads: where it is computed.
        generator: draws noise and its levels.
        batch_size: B.
        lr: learning rate of both optimizers.
        decay: of the moving average.
    """

    def __init__(
        self,
        transformer: ZImageTransformer2DModel,
        text_encoder: TextEncoder,
        vision: VisionEncoder,
        instructed: Instructed,
        processor: VisionProcessor,
        scale: float,
        shift: float,
        threads: Threads,
        generator: torch.Generator,
        *,
        batch_size: int,
        lr: float,
        decay: float = 0.998,
    ) -> None:
        self.models = {"transformer": transformer, "text_encoder": text_encoder, "siglip": vision}
        self.transformer, self.text_encoder, self.vision = transformer, text_encoder, vision
        self.instructed, self.processor = instructed, processor
        self.scale, self.shift = scale, shift
        self.threads, self.generator = threads, generator
        self.batch_size = batch_size
        height, width = instructed.pairs.latents.shape[-2:]
        self.forwards = [EditForward(transformer, height, width) for _ in range(threads.count)]
        matrices, others = split_transformer_parameters(transformer)
        for model in (text_encoder, vision):
            more, rest = split_encoder_parameters(model)
            matrices, others = matrices + more, others + rest
        self.optimizer = MuonAdamW(matrices, others, threads, matrix_lr=lr, lr=lr)
        self.average = MovingAverage(
            {
                f"{name}.{key}": parameter
                for name, model in self.models.items()
                for key, parameter in model.named_parameters()
            },
            decay,
        )

    def step(self, step: int, total: int) -> dict[str, float]:
        """Take a step."""
        chosen, ids, lengths = self.instructed.next(self.batch_size)
        pairs = self.instructed.pairs
        pictures = self._scaled([pairs.latents[group, before] for group, before, _ in chosen])
        x0 = self._scaled([pairs.latents[group, after] for group, _, after in chosen])
        seen = normalised(
            self.processor, torch.stack([pairs.seen[group, before] for group, before, _ in chosen])
        )
        noise = torch.randn(x0.shape, generator=self.generator)
        s = noise_levels(len(x0), self.generator)
        level = s[:, None, None, None]
        x = (1 - level) * x0 + level * noise
        changed = (x0 - pictures).abs().mean(dim=1, keepdim=True) > _CHANGED
        weight = torch.where(changed, _CHANGED_WEIGHT, 1.0)
        opened, closed = (
            torch.tensor([part]) for part in (self.instructed.opened, self.instructed.closed)
        )

        def loss(part: slice, thread: int) -> Tensor:
            given = Conditions(
                opened=self.text_encoder(opened)[0],
                asked=self.text_encoder(ids[part]),
                lengths=lengths[part],
                closed=self.text_encoder(closed)[0],
                pictures=pictures[part],
                visual=see(self.vision, seen[part]),
            )
            velocity = self.forwards[thread](x[part], 1 - s[part], given)
            error = (velocity - (x0[part] - noise[part])).square()
            return (error * weight[part]).mean()

        value = self.threads.gradients(loss, len(x0), self.optimizer.parameters)
        norm = self.optimizer.step(learning_rate(step, total))
        self.average.update()
        return {"loss": value, "grad_norm": norm}

    def parts(self) -> dict[str, Any]:
        """What is saved."""
        return {**self.models, "optimizer": self.optimizer, "average": self.average}

    def averaged(self) -> dict[str, dict[str, Tensor]]:
        """State dicts of the three models, averaged over the steps."""
        split: dict[str, dict[str, Tensor]] = {name: {} for name in self.models}
        for name, value in self.average.values.items():
            model, _, key = name.partition(".")
            split[model][key] = value
        return split

    def _scaled(self, latents: list[Tensor]) -> Tensor:
        return (torch.stack(latents).float() - self.shift) * self.scale
