"""The forward of an edit model on batches of one layout, for its training.

Equal to `editing.EditEntries` on each edit alone, of one picture as large as the image, and as
quick as batches are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zimage_core.edit_layout import edit_layout
from zimage_core.modulation import MixedModulation, StepModulation
from zimage_core.patchify import TOKEN_MULTIPLE, pad_tokens, patchify, unpatchify
from zimage_core.transformer import Context, ZImageTransformer2DModel
from zimage_core.vision import VisionEncoder

Angles = tuple[Tensor, Tensor, Tensor]
"""Of the text, the images and the visual features."""


class Conditions(NamedTuple):
    """What a batch of edits is made from."""

    opened: Tensor
    """Text features of the first segment, the same in all, (n, D)."""
    asked: Tensor
    """Of the second, which holds the instruction, (B, 32, D)."""
    lengths: Tensor
    """Tokens of each, (B,) int64."""
    closed: Tensor
    """Of the last, the same in all, (m, D)."""
    pictures: Tensor
    """Latents of the pictures, (B, F, h, w), scaled."""
    visual: Tensor
    """What is seen in them, (B, rows, columns, siglip_feat_dim)."""


class EditForward:
    """Predicts velocities of edits of one picture each.

    Args:
        transformer: the model.
        height: h of the latents of the picture and of the image.
        width: w of them.
    """

    def __init__(self, transformer: ZImageTransformer2DModel, height: int, width: int) -> None:
        self.transformer = transformer
        self.height, self.width = height, width
        self._angles: dict[int, Angles] = {}
        self._noisy: tuple[Tensor, Tensor] | None = None

    def __call__(self, latents: Tensor, time: Tensor, given: Conditions) -> Tensor:
        """Predict velocities (B, F, h, w).

        Args:
            latents: (B, F, h, w) float32.
            time: model time, (B,) float32.
            given: of the same batch.
        """
        model = self.transformer
        text, images, visual = self._rotaries(given)
        captions = self._text(given)
        for block in model.context_refiner:
            captions = block(captions, text, None)
        pictures = model.embed_patches(patchify(given.pictures, model.patch_size))
        assert self._noisy is not None
        noisy, clean = model.modulate(time), model.modulate(torch.ones(1))
        mixed = StepModulation(
            MixedModulation(noisy.refiner, clean.refiner, self._noisy[0]),
            MixedModulation(noisy.layers, clean.layers, self._noisy[1]),
            noisy.final,
        )
        context = Context(
            before=captions,
            pictures=pictures,
            after=self._visual(given.visual, visual),
            image_rotary=images,
            rotary=torch.cat((text, images, visual), dim=1),
        )
        patches = model.predict(patchify(latents, model.patch_size), mixed, context)
        return unpatchify(patches, model.patch_size, self.height, self.width)

    def _text(self, given: Conditions) -> Tensor:
        """The three segments, each embedded and padded, (B, 96, C)."""
        model = self.transformer
        batch = len(given.asked)
        real = torch.arange(given.asked.shape[1]) < given.lengths[:, None]
        asked = torch.where(real[..., None], model.cap_embedder(given.asked), model.cap_pad_token)
        first, last = (
            pad_tokens(model.cap_embedder(part), model.cap_pad_token).expand(batch, -1, -1)
            for part in (given.opened, given.closed)
        )
        return torch.cat((first, asked, last), dim=1)

    def _visual(self, features: Tensor, rotary: Tensor) -> Tensor:
        model = self.transformer
        assert model.siglip_embedder is not None and model.siglip_refiner is not None
        batch, rows, columns, width = features.shape
        # As `editing` reads them: no token is the features of one place.
        tokens = features.permute(0, 3, 1, 2).reshape(batch, rows * columns, width)
        embedded = model.siglip_embedder(tokens)
        missing = -tokens.shape[1] % TOKEN_MULTIPLE + TOKEN_MULTIPLE
        x = torch.cat((embedded, model.siglip_pad_token.expand(batch, missing, -1)), dim=1)
        for block in model.siglip_refiner:
            x = block(x, rotary, None)
        return x

    def _rotaries(self, given: Conditions) -> Angles:
        """Angles of a batch, whose images stand behind instructions of different lengths."""
        rows = [self._of_length(int(n), given) for n in given.lengths]
        text, images, visual = zip(*rows, strict=True)
        return torch.cat(text), torch.cat(images), torch.cat(visual)

    def _of_length(self, length: int, given: Conditions) -> Angles:
        if length not in self._angles:
            size = self.height, self.width
            layout = edit_layout(
                [len(given.opened), length, len(given.closed)],
                [size, size],
                [(given.visual.shape[1], given.visual.shape[2])],
                patch_size=self.transformer.patch_size,
            )
            parts = (layout.text, layout.images, layout.visual)
            text, images, visual = (self.transformer.angles(part) for part in parts)
            self._angles[length] = text, images, visual
            self._noisy = layout.images_noisy[None, :, None], layout.noisy[None, :, None]
        return self._angles[length]


def see(vision: VisionEncoder, patches: Tensor) -> Tensor:
    """`VisionEncoder.forward` on a batch (B, rows, columns, D); (B, rows, columns, C).

    The learned places must be as many as the patches, so that none is interpolated.
    """
    batch, rows, columns, _ = patches.shape
    embeddings = vision.embeddings
    places = embeddings.position_embedding.weight
    assert rows == columns == embeddings.side
    x = embeddings.patch_embedding(patches.flatten(1, 2)) + places
    for layer in vision.encoder.layers:
        x = layer(x)
    seen: Tensor = vision.post_layernorm(x)
    return seen.reshape(batch, rows, columns, -1)
