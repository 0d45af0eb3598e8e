"""A start for the vision encoder: name the attributes that can be seen in a drawing.

The classifiers are thrown away; the joint training goes on from what the encoder sees.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage_core.tiny.attributes import VALUES, Subject, kind_of
from zimage_core.tiny.detector import measurable
from zimage_core.tiny.edit_forward import see
from zimage_core.tiny.edit_pairs import SIZE_OF_GROUP, EditPairs, normalised
from zimage_core.tiny.optimizer import MuonAdamW
from zimage_core.tiny.parallel import Threads
from zimage_core.tiny.state import learning_rate
from zimage_core.tiny.text_training import UNKNOWN, AttributeClassifier, split_encoder_parameters
from zimage_core.vision import VisionEncoder, VisionProcessor


class VisionTrainer:
    """Steps of the vision encoder's training.

    Args:
        vision: changed in place.
        pairs: drawings of known subjects.
        processor: what the encoder is shown was made by.
        threads: where it is computed.
        random: draws the drawings.
        batch_size: B.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        pairs: EditPairs,
        processor: VisionProcessor,
        threads: Threads,
        random: Random,
        *,
        batch_size: int,
    ) -> None:
        self.vision, self.pairs, self.processor = vision, pairs, processor
        self.threads, self.random, self.batch_size = threads, random, batch_size
        self.classifier = AttributeClassifier(vision.config.hidden_size)
        matrices, others = split_encoder_parameters(vision)
        others += list(self.classifier.parameters())
        self.optimizer = MuonAdamW(matrices, others, threads, matrix_lr=2e-3, lr=2e-3)

    def step(self, step: int, total: int) -> dict[str, float]:
        """Take a step."""
        chosen = [
            (self.random.randrange(len(self.pairs.groups)), self.random.randrange(SIZE_OF_GROUP))
            for _ in range(self.batch_size)
        ]
        seen = torch.stack([self.pairs.seen[group, place] for group, place in chosen])
        patches = normalised(self.processor, seen)
        labels = self._labels([self.pairs.groups[group].subjects[place] for group, place in chosen])

        def loss(part: slice, _: int) -> Tensor:
            features = see(self.vision, patches[part]).flatten(1, 2)
            lengths = torch.full((len(features),), features.shape[1])
            losses = [
                F.cross_entropy(logits, labels[part, i], ignore_index=UNKNOWN, reduction="sum")
                for i, logits in enumerate(self.classifier(features, lengths))
            ]
            return torch.stack(losses).sum() / (labels[part] != UNKNOWN).sum().clamp(min=1)

        value = self.threads.gradients(loss, len(patches), self.optimizer.parameters)
        norm = self.optimizer.step(learning_rate(step, total))
        return {"loss": value, "grad_norm": norm}

    def parts(self) -> dict[str, Any]:
        """What is saved."""
        return {
            "siglip": self.vision,
            "classifier": self.classifier,
            "optimizer": self.optimizer,
        }

    def _labels(self, subjects: list[Subject]) -> Tensor:
        """What can be seen of each, (B, attributes) int64: the value's number, or `UNKNOWN`."""
        rows = []
        for subject in subjects:
            kind, values = kind_of(subject), measurable(subject)
            rows.append(
                [
                    VALUES[k][n].index(values[n]) if k == kind and n in values else UNKNOWN
                    for k, n in self.classifier.names
                ]
            )
        return torch.tensor(rows)
