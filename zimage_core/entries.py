"""Evaluations of the transformer, one for each condition: a caption or an edit, for one image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from zimage_core.batching import CaptionGroups
from zimage_core.editing import Edit, EditEntries

if TYPE_CHECKING:
    from zimage_core.transformer import ZImageTransformer2DModel

Condition = Tensor | Edit
"""Text features of a prompt, or those of an edit and its pictures."""


def make_entries(
    model: ZImageTransformer2DModel,
    conditions: Sequence[Condition],
    num_images: int,
    height: int,
    width: int,
    *,
    aligned: bool,
) -> Callable[[int], CaptionGroups | EditEntries]:
    """Prepare all conditions once, to evaluate all of them or only the first ones.

    Args:
        model: the transformer.
        conditions: of the images, and behind them those of their negatives, if any.
        num_images: how many images there are.
        height: h of the latents.
        width: w of the latents.
        aligned: of edits, see `edit_layout`.

    Returns:
        What evaluates the first so many conditions.

    Raises:
        ValueError: edits, which this model does not take; and see `EditEntries` and
            `CaptionGroups`.
    """
    images = [i % num_images for i in range(len(conditions))]
    unique = {id(condition): condition for condition in conditions}
    if model.config.siglip_feat_dim is not None:
        # Text alone is laid out as that of an edit too: so such a model is trained.
        edits = {key: c if isinstance(c, Edit) else Edit([c]) for key, c in unique.items()}
        of_entries = [edits[id(condition)] for condition in conditions]
        return EditEntries(model, of_entries, images, height, width, aligned=aligned).first
    features = [condition for condition in unique.values() if isinstance(condition, Tensor)]
    if len(features) < len(unique):
        raise ValueError("prompt_embeds: edits, but this model's siglip_feat_dim is null")
    # Each distinct tensor once: images of one prompt, and negatives, share theirs.
    refined = dict(zip(unique, model.embed_captions(features), strict=True))
    captions = [refined[id(condition)] for condition in conditions]
    return lambda n: CaptionGroups(model, captions[:n], images[:n], height, width)
