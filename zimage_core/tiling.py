"""Encoding and decoding of large images in bands of rows, without seams.

    enable_tiling(vae)            # from now on images of more than 1024 x 1024 pixels
    vae.decode(latents)

The usual tiling cuts the latents into squares, decodes each with the group norms of that square
alone, and blends the overlaps: the pixels are others than those of one piece, and where tiles
differ it shows. Here the layers are run one after the other, each on one band of rows after the
other, with the norms of the whole image (`row_bands`): pixels are those of one piece but for
rounding. On the device are only a band and the weights; activations lie in host memory.

It is applied to a model from outside: the classes of encoder and decoder are replaced by subclasses
of theirs, weights and keys stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.autoencoder import AutoencoderKL, Decoder, DownBlock, Encoder
from zimage_core.chunked_attention import attend
from zimage_core.row_bands import Activation, RowBands, Store

BAND_BYTES = 64 * 2**20
MIN_PIXELS = 1024 * 1024
_ATTRIBUTE = "tiling"
_ALLOWED_STORES = "'cpu', 'device', another torch device, or a function that allocates"


@dataclass(frozen=True)
class Tiling:
    """How large images are encoded and decoded; see `enable_tiling`."""

    band_bytes: int
    store: str | torch.device | Store
    min_pixels: int

    def bands(self, groups: int, device: torch.device) -> RowBands:
        """Return what runs layers whose weights are on a device."""
        if callable(self.store):
            return RowBands(groups, self.band_bytes, self.store)
        place = device if self.store == "device" else torch.device(self.store)
        return RowBands(groups, self.band_bytes, partial(_new_tensor, place))


def enable_tiling(
    vae: AutoencoderKL,
    *,
    band_bytes: int = BAND_BYTES,
    store: str | torch.device | Store = "cpu",
    min_pixels: int = MIN_PIXELS,
) -> None:
    """Let an autoencoder encode and decode large images in bands of rows.

    `vae.encode` and `vae.decode` then do so by themselves, images of a batch one after the other.
    Calling it again changes the settings.

    Args:
        vae: the model; its weights may be moved between calls.
        band_bytes: memory of the device for the tensors of a band, which decides how many rows it
            has. One row, and in the attention one token, is computed where it does not suffice for
            more. Weights, the image itself and the workspaces of kernels come on top.
        store: where activations lie between layers: "cpu" is host memory, "device" where the
            weights are (then only intermediate results are saved), or another device; or a function
            of shape and dtype that returns a contiguous tensor, for memory of another kind.
        min_pixels: images of more pixels than this are computed so, all others exactly as without.

    Raises:
        ValueError: `band_bytes` is less than 1, `min_pixels` is negative, `store` is none of these.
            Later, of `encode` and `decode`: gradients are asked for.
    """
    if band_bytes < 1:
        raise ValueError(f"band_bytes: {band_bytes} must be at least 1")
    if min_pixels < 0:
        raise ValueError(f"min_pixels: {min_pixels} must be at least 0")
    _check_store(store)
    tiling = Tiling(band_bytes, store, min_pixels)
    vae.encoder.__class__, vae.decoder.__class__ = TiledEncoder, TiledDecoder
    for model in (vae.encoder, vae.decoder):
        setattr(model, _ATTRIBUTE, tiling)


def disable_tiling(vae: AutoencoderKL) -> None:
    """Undo `enable_tiling`; does nothing where it was not called."""
    vae.encoder.__class__, vae.decoder.__class__ = Encoder, Decoder
    for model in (vae.encoder, vae.decoder):
        model.__dict__.pop(_ATTRIBUTE, None)


class TiledEncoder(Encoder):
    """An encoder that encodes large images in bands of rows."""

    tiling: Tiling

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 2 F, h, w)."""
        height, width = images.shape[2:]
        if height * width <= self.tiling.min_pixels:
            return super().forward(images)
        _check_no_gradients(self, images)
        factor = 2 ** (len(self.down_blocks) - 1)
        moments = images.new_empty(
            len(images), self.conv_out.out_channels, height // factor, width // factor
        )
        bands = self.tiling.bands(self.conv_norm_out.num_groups, self.conv_in.weight.device)
        for image, out in zip(images, moments, strict=True):
            x = bands.first(image, self.conv_in)
            for block in self.down_blocks:
                x = _stage(x, block, bands)
            x = _mid_block(x, self.mid_block, bands)
            bands.last(x, self.conv_norm_out, self.conv_out, out)
        return moments


class TiledDecoder(Decoder):
    """A decoder that decodes large images in bands of rows."""

    tiling: Tiling

    def forward(self, latents: Tensor) -> Tensor:
        """(B, F, h, w) to (B, C, H, W)."""
        factor = 2 ** (len(self.up_blocks) - 1)
        height, width = (factor * side for side in latents.shape[2:])
        if height * width <= self.tiling.min_pixels:
            return super().forward(latents)
        _check_no_gradients(self, latents)
        images = latents.new_empty(len(latents), self.conv_out.out_channels, height, width)
        bands = self.tiling.bands(self.conv_norm_out.num_groups, self.conv_in.weight.device)
        for latent, image in zip(latents, images, strict=True):
            x = _mid_block(bands.first(latent, self.conv_in), self.mid_block, bands)
            for block in self.up_blocks:
                x = _stage(x, block, bands)
            bands.last(x, self.conv_norm_out, self.conv_out, image)
        return images


def _stage(x: Activation, block: Any, bands: RowBands) -> Activation:
    """Run a `DownBlock` or an `UpBlock`, with its last residual block and resampling in one."""
    resamplers: Any = block.downsamplers if isinstance(block, DownBlock) else block.upsamplers
    *others, last = block.resnets
    for resnet in others:
        x = bands.resnet(resnet, x)
    return bands.resnet(last, x, resamplers[0] if len(resamplers) else None)


def _mid_block(x: Activation, block: Any, bands: RowBands) -> Activation:
    first, second = block.resnets
    x = bands.resnet(first, x)
    for attention in block.attentions:
        x = attend(attention, x, bands)
    return bands.resnet(second, x)


def _new_tensor(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _check_store(store: str | torch.device | Store) -> None:
    if callable(store) or store == "device":
        return
    try:
        torch.device(store)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"store: {store!r}; allowed: {_ALLOWED_STORES}") from error


def _check_no_gradients(model: nn.Module, given: Tensor) -> None:
    wanted = given.requires_grad or any(weight.requires_grad for weight in model.parameters())
    if wanted and torch.is_grad_enabled():
        raise ValueError(
            "gradients through a tiled autoencoder are not possible; use torch.no_grad(), or "
            "disable_tiling(vae)"
        )
