"""Floating-point operations of the transformer, and the cards they are compared with.

One table and one formula for everything that is computed and not measured: the estimate of
`zimage plan --device`, and the limits that `zimage bench` sets beside its measurements.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from zimage_core.config import TransformerConfig

CAPTION_TOKENS = 64
"""Assumed where an estimate needs a caption's length."""

VISUAL_TOKENS = 256
"""Of what is seen in a picture: as many as SigLIP 2's processor gives at most unless told."""

_PIXELS_PER_TOKEN = 16  # along a side: 8 of the autoencoder, 2 of a patch
_TOKEN_MULTIPLE = 32


class Card(NamedTuple):
    """A GPU as its maker's data sheet has it."""

    peak: float
    """Dense bfloat16 and float16 with float32 accumulation, FLOP/s."""
    share: float
    """Of the peak, what published Z-Image runs reach; not measured by this project."""
    names: str
    """Pattern of the names that drivers give it; cut-down and laptop models have others."""
    matmul: float | None = None
    """FLOP/s of large matrix products where it is known that no program gets to the peak."""

    @property
    def floor(self) -> float:
        """FLOP/s that no exact computation in 16 bits is expected to exceed."""
        return self.matmul or self.peak


CARDS = {
    "h100": Card(989.0e12, 0.65, r"H[18]00( SXM5)?( \d+GB HBM3)?", 800e12),
    "h200": Card(989.0e12, 0.65, r"H200", 800e12),  # computes with the H100's chip
    "a100": Card(312.0e12, 0.65, r"A100-(SXM4?|PCIE)-\d+GB|A100 80GB PCIe"),
    "l40s": Card(362.0e12, 0.5, r"L40S"),
    "l4": Card(121.0e12, 0.5, r"L4"),
    "rtx4090": Card(165.2e12, 0.75, r"GeForce RTX 4090"),
    "rtx5090": Card(209.5e12, 0.75, r"GeForce RTX 5090"),
    "rtx3090": Card(71.0e12, 0.75, r"GeForce RTX 3090"),
}


def card_named(device_name: str) -> str | None:
    """The key of `CARDS` for a device as its driver calls it; None for one that is not there."""
    name = device_name.removeprefix("NVIDIA ")
    return next((key for key, card in CARDS.items() if re.fullmatch(card.names, name)), None)


class TransformerSize(NamedTuple):
    """Numbers of an architecture that its operations follow from."""

    dim: int
    num_layers: int
    num_refiner_layers: int
    patch_dim: int
    caption_dim: int

    @classmethod
    def of(cls, config: TransformerConfig) -> TransformerSize:
        """The numbers of a checkpoint's transformer."""
        return cls(
            dim=config.dim,
            num_layers=config.n_layers,
            num_refiner_layers=config.n_refiner_layers,
            patch_dim=config.in_channels * config.all_patch_size[0] ** 2,
            caption_dim=config.cap_feat_dim,
        )

    def step_flops(
        self, width: int, height: int, caption: int = CAPTION_TOKENS, pictures: int = 0
    ) -> float:
        """Operations of one forward for one image: what is done again at every step.

        Matrix products and attention; a multiplication and an addition count as two. Norms and the
        like are left out, as in every figure of this kind.

        Args:
            width: in pixels.
            height: in pixels.
            caption: tokens of the prompt, and of what is seen in pictures.
            pictures: tokens of the latents of pictures to edit.
        """
        patches = latents_tokens(width, height)
        image = _padded(patches) + _padded(pictures)
        embedding_and_projection = 2 * (2.0 * patches * self.patch_dim * self.dim)
        return (
            self._blocks(self.num_layers, image + _padded(caption))
            + self._blocks(self.num_refiner_layers, image)
            + embedding_and_projection
        )

    def caption_flops(self, caption: int = CAPTION_TOKENS) -> float:
        """Operations on a prompt's own tokens, which are done once for all steps."""
        embedding = 2.0 * caption * self.caption_dim * self.dim
        return self._blocks(self.num_refiner_layers, _padded(caption)) + embedding

    def _blocks(self, number: int, tokens: int) -> float:
        hidden = int(self.dim / 3 * 8)
        per_token = 2.0 * (4 * self.dim * self.dim + 3 * self.dim * hidden)
        return number * (per_token * tokens + 4.0 * tokens * tokens * self.dim)


PUBLISHED = TransformerSize(
    dim=3840, num_layers=30, num_refiner_layers=2, patch_dim=64, caption_dim=2560
)
"""The 6B transformer of Z-Image and Z-Image-Turbo."""


def denoising_flops(
    size: TransformerSize,
    width: int,
    height: int,
    forwards: int,
    caption: int = CAPTION_TOKENS,
    pictures: int = 0,
) -> float:
    """Operations of the transformer for one image, from its caption's features to its latents."""
    step = size.step_flops(width, height, caption, pictures)
    return forwards * step + size.caption_flops(caption)


def latents_tokens(width: int, height: int) -> int:
    """Tokens of the latents of an image of so many pixels, without padding."""
    return (width // _PIXELS_PER_TOKEN) * (height // _PIXELS_PER_TOKEN)


def _padded(tokens: int) -> int:
    return -(-tokens // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE
