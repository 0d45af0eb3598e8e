"""What edits are made from: each text and each picture encoded once for all samples that share it.

Everything is encoded by itself, so that what is kept has the bits that it would have anew. It is
kept in host memory, where there is room for that of many pictures; the transformer takes it from
there when a batch begins.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from jobs.batch_images import BatchImages, PictureKey, picture_key
from jobs.plan import Sample
from zimage_core import ZImagePipeline
from zimage_core.editing import Edit
from zimage_core.pictures import EncodedPicture, Picture, picture_latents
from zimage_core.upcasting import in_float32

MAX_BYTES = 512 * 2**20
"""Of what is kept. Latents of a picture of 1024 x 1024 pixels are 1 MiB; the text of the published
encoder is at most 2.5 MiB for a segment of 512 tokens."""


class EditFeatures:
    """Encodes texts and pictures of batches of edits.

    Args:
        pipeline: whose encoders are used; their weights must stay what they are.
        max_sequence_length: tokens that each segment of a text is cut to.
        max_bytes: of what is kept; what was used longest ago goes first.
    """

    def __init__(
        self, pipeline: ZImagePipeline, max_sequence_length: int, max_bytes: int = MAX_BYTES
    ) -> None:
        self._pipeline = pipeline
        self._max_sequence_length = max_sequence_length
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()
        self.num_bytes = 0

    def texts(
        self, texts: Sequence[str], samples: Sequence[Sample], *, anew: bool = False
    ) -> list[Edit]:
        """Edits of so many samples, still without their pictures; equal ones are one.

        Args:
            texts: one for each sample.
            samples: tell how many pictures a text is about.
            anew: nothing kept is used and nothing is kept, for an encoder that is in another dtype
                for a while.
        """
        keys = [(text, len(s.pictures)) for text, s in zip(texts, samples, strict=True)]
        made: dict[tuple[str, int], Edit] = {}
        for key in keys:
            if key in made:
                continue
            segments = None if anew else self._find(key)
            if segments is None:
                segments = self._encode_text(*key)
                if not anew:
                    self._keep(key, segments)
            made[key] = Edit(segments)
        return [made[key] for key in keys]

    def encoded(self, key: PictureKey) -> EncodedPicture | None:
        """A picture that is kept."""
        found = self._find(key)
        return None if found is None else EncodedPicture(*found)

    def with_pictures(
        self, edits: Sequence[Edit], samples: Sequence[Sample], images: BatchImages
    ) -> list[Edit]:
        """The edits of `texts` with the samples' pictures; equal ones are one."""
        found: dict[PictureKey, EncodedPicture] = {}
        missing: dict[PictureKey, Picture] = {}
        for key in _keys(samples):
            picture = self.encoded(key) or images.pictures[key]
            if isinstance(picture, Picture):
                missing[key] = picture
            else:
                found[key] = picture
        if missing:
            fresh = self._pipeline.encode_pictures(list(missing.values()))
            for key, encoded in zip(missing, fresh, strict=True):
                found[key] = EncodedPicture(encoded.latents.cpu(), encoded.visual.cpu())
                self._keep(key, (found[key].latents, found[key].visual))
        return _joined(edits, samples, found)

    @torch.no_grad()
    def with_pictures_in_float32(
        self, edits: Sequence[Edit], samples: Sequence[Sample], images: BatchImages
    ) -> list[Edit]:
        """The same with both encoders in float32 meanwhile, one after the other; nothing is kept.

        Args:
            images: all of their pictures, none of them encoded.
        """
        models, seen = self._pipeline, {}
        siglip, processor = models.siglip, models.siglip_processor
        assert siglip is not None and processor is not None
        pictures = {key: images.pictures[key] for key in _keys(samples)}
        given = {key: p for key, p in pictures.items() if isinstance(p, Picture)}
        with in_float32(siglip):
            for key, picture in given.items():
                seen[key] = siglip(processor(picture.seen)).cpu()
        with in_float32(models.vae):
            found = {
                key: EncodedPicture(picture_latents(models.vae, picture.cropped).cpu(), seen[key])
                for key, picture in given.items()
            }
        return _joined(edits, samples, found)

    def _encode_text(self, text: str, num_pictures: int) -> tuple[Tensor, ...]:
        segments = self._pipeline.encode_edit_text(
            text, num_pictures, max_sequence_length=self._max_sequence_length
        )
        return tuple(segment.cpu() for segment in segments)

    def _find(self, key: Hashable) -> tuple[Tensor, ...] | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def _keep(self, key: Hashable, tensors: tuple[Tensor, ...]) -> None:
        self._kept[key] = tensors
        self.num_bytes += _num_bytes(tensors)
        while self.num_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= _num_bytes(oldest)


def _keys(samples: Sequence[Sample]) -> dict[PictureKey, None]:
    """The pictures of samples, each once, in order."""
    return {picture_key(sample, picture): None for sample in samples for picture in sample.pictures}


def _joined(
    edits: Sequence[Edit],
    samples: Sequence[Sample],
    encoded: dict[PictureKey, EncodedPicture],
) -> list[Edit]:
    made: dict[tuple[object, ...], Edit] = {}
    result = []
    for edit, sample in zip(edits, samples, strict=True):
        keys = [picture_key(sample, picture) for picture in sample.pictures]
        whole = (id(edit), *keys)
        if whole not in made:
            pictures = [encoded[key] for key in keys]
            made[whole] = replace(
                edit,
                pictures=[picture.latents for picture in pictures],
                visual=[picture.visual for picture in pictures],
            )
        result.append(made[whole])
    return result


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
