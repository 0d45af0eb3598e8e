"""Transformer evaluations of a batch whose captions differ in length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from zimage_core.transfer import to_device

if TYPE_CHECKING:
    from zimage_core.modulation import StepModulation
    from zimage_core.transformer import Context, ZImageTransformer2DModel


class _Group(NamedTuple):
    images: Tensor | None
    """Index of each entry's latents in the batch; None where they are all, in their order."""
    context: Context


class CaptionGroups:
    """Entries of an evaluation, one caption for one image each, split by the caption's length.

    Entries of one length run together and need no mask: masked attention leaves the fast kernels,
    and costs more than another, smaller call. All that is constant over the steps is made here.

    Args:
        transformer: the model.
        captions: one for each entry, as `embed_captions` returns them.
        images: for each entry the index of its latents.
        height: h of the latents.
        width: w of the latents.

    Raises:
        ValueError: the image is larger than the model has positions for.
    """

    def __init__(
        self,
        transformer: ZImageTransformer2DModel,
        captions: Sequence[Tensor],
        images: Sequence[int],
        height: int,
        width: int,
    ) -> None:
        self._transformer = transformer
        self._groups: list[_Group] = []
        order: list[int] = []
        every = list(range(len(set(images))))
        for length in sorted({len(caption) for caption in captions}):
            members = [i for i, caption in enumerate(captions) if len(caption) == length]
            context = transformer.condition([captions[i] for i in members], height, width)
            chosen = [images[i] for i in members]
            index = None
            if chosen != every:
                index = to_device(torch.tensor(chosen), transformer.device)
            self._groups.append(_Group(index, context))
            order += members
        # Where each entry's result lies among the results of the groups, one after the other.
        self._positions: Tensor | None = None
        if order != list(range(len(order))):
            self._positions = to_device(torch.tensor(order).argsort(), transformer.device)

    def velocity(self, patches: Tensor, modulation: StepModulation) -> Tensor:
        """Evaluate the transformer once for each entry.

        Args:
            patches: of all latents, float32, as `patchify` cuts them.
            modulation: of the step.

        Returns:
            Float32, as `patches`, an entry for each caption in their order.
        """
        patches = patches.to(self._transformer.dtype)
        results = [
            self._transformer.predict(
                patches if group.images is None else patches.index_select(0, group.images),
                modulation,
                group.context,
            )
            for group in self._groups
        ]
        joined = results[0] if len(results) == 1 else torch.cat(results)
        if self._positions is not None:
            joined = joined.index_select(0, self._positions)
        return joined.float()
