"""A start for the text encoder: name the attributes that a caption states.

A few minutes of this spare the joint training a long search for what captions have to do with
pictures. The classifiers are thrown away.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage_core.text_encoder import TextEncoder
from zimage_core.tiny.attributes import KINDS, VALUES
from zimage_core.tiny.caption_batches import CaptionBatches
from zimage_core.tiny.caption_reading import CaptionReader
from zimage_core.tiny.optimizer import MuonAdamW
from zimage_core.tiny.parallel import Threads
from zimage_core.tiny.state import learning_rate

UNKNOWN = -100  # what cross entropy leaves out


class AttributeClassifier(nn.Module):
    """A query for each attribute of each kind, which attends over a caption's features.

    Args:
        dim: width of the features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.names = [(kind, name) for kind in KINDS for name in VALUES[kind]]
        self.queries = nn.Parameter(torch.randn(len(self.names), dim) * dim**-0.5)
        self.norm = nn.RMSNorm(dim)
        self.heads = nn.ModuleList(nn.Linear(dim, len(VALUES[k][n])) for k, n in self.names)

    def forward(self, features: Tensor, lengths: Tensor) -> list[Tensor]:
        """Logits of each attribute, (B, values), of features (B, L, D) of captions."""
        features = self.norm(features)
        scores = torch.einsum("qd,bld->bql", self.queries, features)
        real = torch.arange(features.shape[1]) < lengths[:, None]
        weights = scores.masked_fill(~real[:, None], -torch.inf).softmax(dim=-1)
        pooled = weights @ features
        return [head(pooled[:, i]) for i, head in enumerate(self.heads)]

    def labels(self, reader: CaptionReader, captions: list[str]) -> Tensor:
        """What captions state, (B, attributes) int64: the value's number, or `UNKNOWN`."""
        rows = []
        for caption in captions:
            kind, values = reader.read(caption)
            rows.append(
                [
                    VALUES[k][n].index(values[n]) if k == kind and n in values else UNKNOWN
                    for k, n in self.names
                ]
            )
        return torch.tensor(rows)


class TextTrainer:
    """Steps of the text encoder's training.

    Args:
        text_encoder: changed in place.
        batches: of captions.
        reader: finds what they state.
        threads: where it is computed.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        batches: CaptionBatches,
        reader: CaptionReader,
        threads: Threads,
    ) -> None:
        self.text_encoder, self.batches, self.reader = text_encoder, batches, reader
        self.threads = threads
        self.classifier = AttributeClassifier(text_encoder.config.hidden_size)
        matrices, others = split_encoder_parameters(text_encoder)
        others += list(self.classifier.parameters())
        self.optimizer = MuonAdamW(matrices, others, threads, matrix_lr=2e-3, lr=2e-3)

    def step(self, step: int, total: int) -> dict[str, float]:
        """Take a step."""
        batch = self.batches.next()
        labels = self.classifier.labels(self.reader, batch.captions)

        def loss(part: slice, thread: int) -> Tensor:
            features = self.text_encoder(batch.ids[part])
            logits = self.classifier(features, batch.lengths[part])
            losses = [
                F.cross_entropy(values, labels[part, i], ignore_index=UNKNOWN, reduction="sum")
                for i, values in enumerate(logits)
            ]
            stated = (labels[part] != UNKNOWN).sum().clamp(min=1)
            return torch.stack(losses).sum() / stated

        value = self.threads.gradients(loss, len(batch.ids), self.optimizer.parameters)
        norm = self.optimizer.step(learning_rate(step, total))
        return {"loss": value, "grad_norm": norm}

    def parts(self) -> dict[str, Any]:
        """What is saved."""
        return {
            "text_encoder": self.text_encoder,
            "classifier": self.classifier,
            "optimizer": self.optimizer,
            "batches": self.batches,
        }


def split_encoder_parameters(encoder: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Projections, for Muon; embeddings, norms and biases, for AdamW."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in encoder.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name
        (matrices if inner else others).append(parameter)
    return matrices, others


def initialize_text_encoder(text_encoder: TextEncoder, generator: torch.Generator) -> None:
    """Draw weights that keep variances, each tensor from one generator."""
    for name, parameter in text_encoder.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            elif "embed" in name:
                parameter.normal_(0.0, 0.5, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
