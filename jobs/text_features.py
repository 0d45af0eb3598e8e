"""Text features of a batch, and those that many batches share: of the negative prompt above all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from zimage_core import ZImagePipeline

_KEPT = 8  # texts; of the published encoder 2.5 MiB each at most, for 512 tokens in 16 bits


class TextFeatures:
    """Encodes the texts of batches, and keeps the features of texts that were encoded alone.

    What shares a padded batch moves the last bits of a float. So texts are encoded together with
    their own batch's and no others; and only what was encoded with nothing beside it is kept, which
    is the same whoever asks for it, and after whatever.

    Args:
        pipeline: whose text encoder is used; its weights must stay what they are.
        max_sequence_length: tokens that a text is cut to.
    """

    def __init__(self, pipeline: ZImagePipeline, max_sequence_length: int) -> None:
        self._pipeline = pipeline
        self._max_sequence_length = max_sequence_length
        self._kept: OrderedDict[str, list[Tensor]] = OrderedDict()

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Features (L, D) of each text of a batch; equal texts share one tensor."""
        first = texts[0]
        if any(text != first for text in texts):
            return self.encode_anew(texts)
        if first not in self._kept:
            self._kept[first] = self.encode_anew([first])
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(first)
        return self._kept[first] * len(texts)

    def encode_anew(self, texts: Sequence[str]) -> list[Tensor]:
        """The same with nothing kept: for an encoder that is in another dtype for a while."""
        return self._pipeline.encode(texts, max_sequence_length=self._max_sequence_length)
