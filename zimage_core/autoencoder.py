"""AutoencoderKL: the convolutional autoencoder of FLUX.1 that Z-Image works in.

Kept to what Z-Image's checkpoints use: residual blocks of two 3x3 convolutions under group norm,
one single-head attention in the middle, nearest-neighbour upsampling. Attribute names are the
checkpoint's keys (diffusers' layout), so weights load without a map.

Shapes: B images, C channels, H and W pixels, F latent channels, h = H / 8 and w = W / 8 for the
published model (2 ** (stages - 1) in general).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from zimage_core.config import AutoencoderConfig
from zimage_core.noise import draw_noise

# Written into the model code of FLUX.1, not into its configuration.
NORM_EPS = 1e-6


class AutoencoderKL(nn.Module):
    """Maps images to a Gaussian over latents and latents to images.

    Latents are as the encoder gives them: the pipeline applies `config.scaling_factor` and
    `config.shift_factor`, z = (latents - shift) * scale.

    Args:
        config: architecture, as the checkpoint's `vae/config.json` gives it.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    @property
    def scale_factor(self) -> int:
        """Pixels of an image for each element of its latents, along one side."""
        return int(2 ** (len(self.config.block_out_channels) - 1))

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Encode images (B, C, H, W) in [-1, 1] to the Gaussian of their latents (B, F, h, w).

        Raises:
            ValueError: `images` has another rank or number of channels, or a side that the
                encoder cannot halve down to whole latents.
        """
        channels, factor = self.config.in_channels, self.scale_factor
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; allowed: (B, {channels}, H, W)"
            )
        if images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images are {images.shape[3]}x{images.shape[2]} pixels; both sides must be "
                f"multiples of {factor}"
            )
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, F, h, w) to images (B, C, H, W), about [-1, 1] but not clamped.

        Raises:
            ValueError: `latents` has another rank or number of channels.
        """
        channels = self.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; allowed: (B, {channels}, h, w)"
            )
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        images: Tensor = self.decoder(latents)
        return images


@dataclass(frozen=True)
class DiagonalGaussian:
    """Gaussian with independent elements; `mean` and `logvar` are (B, F, h, w)."""

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        """Return the most probable latents, (B, F, h, w)."""
        return self.mean

    def sample(self, generator: Generator | Sequence[Generator] | None = None) -> Tensor:
        """Draw latents (B, F, h, w), with noise in float32 from one generator or B of them.

        Raises:
            ValueError: a list of another length than B.
        """
        batch, channels, height, width = self.mean.shape
        noise = draw_noise((batch, channels, height, width), generator)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)


class Encoder(nn.Module):
    """Images (B, C, H, W) to mean and log-variance, side by side: (B, 2 F, h, w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        inputs = (widths[0], *widths[:-1])
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(
                inputs[i],
                widths[i],
                groups,
                num_layers=config.layers_per_block,
                downsample=i < len(widths) - 1,
            )
            for i in range(len(widths))
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Encode; see the class."""
        x = self.conv_in(images)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        moments: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return moments


class Decoder(nn.Module):
    """Latents (B, F, h, w) to images (B, C, H, W)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        inputs = (widths[0], *widths[:-1])
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(
                inputs[i],
                widths[i],
                groups,
                # The decoder of the released model is one layer a stage deeper than the encoder.
                num_layers=config.layers_per_block + 1,
                upsample=i < len(widths) - 1,
            )
            for i in range(len(widths))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode; see the class."""
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        images: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return images


class DownBlock(nn.Module):
    """Residual blocks at one resolution, then half of it but in the last stage."""

    def __init__(
        self, in_channels: int, channels: int, groups: int, *, num_layers: int, downsample: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, channels, groups, num_layers)
        self.downsamplers = nn.ModuleList([Downsample(channels)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H / 2, W / 2)."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks at one resolution, then double of it but in the last stage."""

    def __init__(
        self, in_channels: int, channels: int, groups: int, *, num_layers: int, upsample: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, channels, groups, num_layers)
        self.upsamplers = nn.ModuleList([Upsample(channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, 2 H, 2 W)."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Two residual blocks with, where the configuration says so, an attention between them."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = _resnets(channels, channels, groups, 2)
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same shape."""
        first, second = self.resnets
        for layer in (first, *self.attentions, second):
            x = layer(x)
        return x


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x through a 1x1 convolution if widths differ."""

    def __init__(self, in_channels: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels, NORM_EPS)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, channels, 1) if in_channels != channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H, W)."""
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        x = self.conv1(F.silu(self.norm1(x)))
        x = self.conv2(F.silu(self.norm2(x)))
        return residual + x


class AttentionBlock(nn.Module):
    """Every position attends to every other, with one head as wide as the feature map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        # A list because the checkpoint names the projection `to_out.0`.
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same shape."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        # (B, 1, H W, channels): attention kernels want the head axis.
        q, k, v = (to(tokens).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))
        update: Tensor = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + update.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, channels, H / 2, W / 2)."""
        # The trained weights expect the border on the right and at the bottom only.
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


class Upsample(nn.Module):
    """Each pixel becomes four, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, channels, 2 H, 2 W)."""
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled


def _resnets(in_channels: int, channels: int, groups: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResnetBlock(in_channels if i == 0 else channels, channels, groups) for i in range(count)
    )
