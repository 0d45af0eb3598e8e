"""Batches of captions for training: whole ones of a single padded length, so none needs a mask."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zimage_core.patchify import padded_length
from zimage_core.text_encoder import tokenize
from zimage_core.tiny.attributes import Subject
from zimage_core.tiny.captions import CaptionWriter

_WRITTEN_AT_ONCE = 64
MAX_LENGTH = 96


class CaptionBatch(NamedTuple):
    """Captions of drawings."""

    indices: list[int]
    """Of the subjects."""
    captions: list[str]
    ids: Tensor
    """(B, L) int64, L a multiple of 32, zeros behind the shorter ones."""
    lengths: Tensor
    """(B,) int64, tokens of each."""


class CaptionBatches:
    """An endless stream of batches; every use of a subject writes a new caption.

    Captions wait in a queue for each padded length until a batch is full, so all lengths come as
    often as they are written. Those of more than 96 tokens are written again.

    Args:
        writer: of the captions.
        tokenizer: as `load_tokenizer` gives it.
        subjects: what the captions describe.
        batch_size: B.
        random: draws the subjects, and which captions are empty.
        dropout: share of empty captions, which guidance needs.
    """

    def __init__(
        self,
        writer: CaptionWriter,
        tokenizer: Any,
        subjects: Sequence[Subject],
        batch_size: int,
        random: Random,
        *,
        dropout: float = 0.0,
    ) -> None:
        self.writer, self.tokenizer, self.subjects = writer, tokenizer, subjects
        self.batch_size, self.random, self.dropout = batch_size, random, dropout
        self._queues: dict[int, list[tuple[int, str, list[int]]]] = {}

    def next(self) -> CaptionBatch:
        """The next full batch."""
        while True:
            for length, queue in self._queues.items():
                if len(queue) >= self.batch_size:
                    taken, self._queues[length] = (
                        queue[: self.batch_size],
                        queue[self.batch_size :],
                    )
                    return self._batch(taken, length)
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """What waits."""
        return {"queues": self._queues}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what waited."""
        self._queues = state["queues"]

    def _write(self) -> None:
        indices = [self.random.randrange(len(self.subjects)) for _ in range(_WRITTEN_AT_ONCE)]
        captions = [
            "" if self.random.random() < self.dropout else self.writer.caption(self.subjects[i])
            for i in indices
        ]
        for entry in zip(indices, captions, tokenize(self.tokenizer, captions, 512), strict=True):
            length = padded_length(len(entry[2]))
            if length <= MAX_LENGTH:
                self._queues.setdefault(length, []).append(entry)

    def _batch(self, entries: list[tuple[int, str, list[int]]], length: int) -> CaptionBatch:
        ids = torch.zeros(len(entries), length, dtype=torch.int64)
        for row, (_, _, tokens) in zip(ids, entries, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return CaptionBatch(
            [index for index, _, _ in entries],
            [caption for _, caption, _ in entries],
            ids,
            torch.tensor([len(tokens) for _, _, tokens in entries]),
        )
