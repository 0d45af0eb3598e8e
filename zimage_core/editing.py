"""Transformer evaluations of edits: an instruction and clean pictures beside each image.

The sequence is [text, pictures, image, visual features]. What has no noise is modulated by the time
at which an image is finished. Text and features do not depend on time, so they are refined once;
the pictures' latents are refined together with the image's, at each step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from zimage_core.edit_layout import edit_layout
from zimage_core.modulation import MixedModulation, StepModulation
from zimage_core.patchify import TOKEN_MULTIPLE, pad_tokens, patchify
from zimage_core.transformer import Context

if TYPE_CHECKING:
    from zimage_core.transformer import ZImageTransformer2DModel


@dataclass(frozen=True)
class Edit:
    """What one image is made from.

    Attributes:
        text: features of the segments of its text, (L_k, cap_feat_dim) each; see `edit_layout`.
        pictures: latents of the pictures, (F, h, w) each, as `ZImagePipeline.encode_pictures`
            returns them.
        visual: what is seen in each picture, (rows, columns, siglip_feat_dim).
    """

    text: Sequence[Tensor]
    pictures: Sequence[Tensor] = ()
    visual: Sequence[Tensor] = ()


class _Entry(NamedTuple):
    image: int
    context: Context
    refined_noisy: Tensor
    """Which tokens of the noise refiner are the image's, (1, S, 1) bool."""
    noisy: Tensor
    """Which tokens of the whole sequence go with it, (1, S, 1) bool."""


class EditEntries:
    """Entries of an evaluation, one for each edit and each text of it.

    Each runs by itself: sequences are long, and seldom are two of one layout. So an image does not
    depend on its neighbours, to the last bit.

    Args:
        transformer: the model.
        edits: one for each entry.
        images: for each entry the index of its latents.
        height: h of the latents.
        width: w of the latents.
        aligned: see `edit_layout`.

    Raises:
        ValueError: there are more tokens, or a larger picture, than the model has positions for; it
            takes no pictures; a caption is empty or of another width.
    """

    def __init__(
        self,
        transformer: ZImageTransformer2DModel,
        edits: Sequence[Edit],
        images: Sequence[int],
        height: int,
        width: int,
        *,
        aligned: bool = True,
    ) -> None:
        self._transformer = transformer
        self._clean = transformer.modulate(torch.ones(1, device=transformer.device))
        # Images of one prompt, and negatives, share an edit.
        unique = {id(edit): edit for edit in edits}
        laid_out = {
            key: self._lay_out(edit, height, width, aligned) for key, edit in unique.items()
        }
        self._entries = [
            laid_out[id(edit)]._replace(image=image)
            for edit, image in zip(edits, images, strict=True)
        ]

    def first(self, count: int) -> EditEntries:
        """The first entries alone; nothing is computed again."""
        entries = copy.copy(self)
        entries._entries = self._entries[:count]
        return entries

    def velocity(self, patches: Tensor, modulation: StepModulation) -> Tensor:
        """Evaluate the transformer once for each entry.

        Args:
            patches: of all latents, float32, as `patchify` cuts them.
            modulation: of the step.

        Returns:
            Float32, as `patches`, one for each entry.
        """
        patches = patches.to(self._transformer.dtype)
        results = []
        for image, context, refined_noisy, noisy in self._entries:
            mixed = StepModulation(
                MixedModulation(modulation.refiner, self._clean.refiner, refined_noisy),
                MixedModulation(modulation.layers, self._clean.layers, noisy),
                modulation.final,
            )
            own = patches[image : image + 1]
            results.append(self._transformer.predict(own, mixed, context))
        return torch.cat(results).float()

    def _lay_out(self, edit: Edit, height: int, width: int, aligned: bool) -> _Entry:
        model = self._transformer
        layout = edit_layout(
            [len(segment) for segment in edit.text],
            [*((p.shape[1], p.shape[2]) for p in edit.pictures), (height, width)],
            [(seen.shape[0], seen.shape[1]) for seen in edit.visual],
            patch_size=model.patch_size,
            aligned=aligned,
        )
        self._check(layout.positions)
        rotary = [model.angles(part) for part in (layout.text, layout.images, layout.visual)]
        visual = None
        if edit.visual:
            visual = _refine_visual(model, [_scrambled(seen) for seen in edit.visual], rotary[2])
        context = Context(
            before=_refine_text(model, edit.text, rotary[0]),
            pictures=_embed_pictures(model, edit.pictures) if edit.pictures else None,
            after=visual,
            image_rotary=rotary[1],
            rotary=torch.cat(rotary, dim=1),
        )
        marks = layout.images_noisy, layout.noisy
        return _Entry(0, context, *(mark[None, :, None].to(model.device) for mark in marks))

    def _check(self, positions: Tensor) -> None:
        most = self._transformer.config.axes_lens
        needed = [int(n) + 1 for n in positions.amax(dim=0)]
        for axis, have, need in zip(("first", "row", "column"), most, needed, strict=True):
            if need > have:
                raise ValueError(
                    f"text and pictures need {need} positions of the {axis} axis; this model has "
                    f"{have}"
                )


def _refine_text(
    model: ZImageTransformer2DModel, segments: Sequence[Tensor], rotary: Tensor
) -> Tensor:
    """Embed and refine the segments of one text together; (1, S, C)."""
    for segment in segments:
        model.check_caption(segment)
    x = _embed(model, model.cap_embedder, segments, model.cap_pad_token)
    for block in model.context_refiner:
        x = block(x, rotary, None)
    return x


def _refine_visual(
    model: ZImageTransformer2DModel, features: Sequence[Tensor], rotary: Tensor
) -> Tensor:
    """Embed and refine tokens (n_j, siglip_feat_dim) of all pictures together; (1, S, C).

    Behind them come 32 pads in place of those of the image that is made.
    """
    if model.siglip_embedder is None or model.siglip_refiner is None:
        raise ValueError("this model takes no pictures: its siglip_feat_dim is null")
    pad = model.siglip_pad_token
    seen = _embed(model, model.siglip_embedder, features, pad)
    x = torch.cat((seen, pad.expand(1, TOKEN_MULTIPLE, -1)), dim=1)
    for block in model.siglip_refiner:
        x = block(x, rotary, None)
    return x


def _embed_pictures(model: ZImageTransformer2DModel, pictures: Sequence[Tensor]) -> Tensor:
    """Clean latents as tokens in front of the image's, not refined; (1, S, C)."""
    patches = [patchify(latents[None], model.patch_size)[0] for latents in pictures]
    return _embed(model, model.embed_patches, patches, model.x_pad_token)


def _embed(
    model: ZImageTransformer2DModel,
    embed: Callable[[Tensor], Tensor],
    parts: Sequence[Tensor],
    pad: Tensor,
) -> Tensor:
    """Embed parts (n_i, width), each padded to a multiple of 32 tokens; (1, S, C)."""
    embedded = embed(torch.cat([part.to(model.device, model.dtype) for part in parts]))
    padded = [
        pad_tokens(part, pad) for part in torch.split(embedded, [len(part) for part in parts])
    ]
    return torch.cat(padded)[None]


def _scrambled(features: Tensor) -> Tensor:
    """Tokens (rows * columns, D) of visual features (rows, columns, D).

    Their numbers are read along the axes D, rows, columns and cut into tokens of D: no token is the
    features of one place. All implementations do this, so that a model is trained with it.
    """
    rows, columns, width = features.shape
    return features.permute(2, 0, 1).reshape(rows * columns, width)
