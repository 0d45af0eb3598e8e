"""Training of the autoencoder on drawings, and of its decoder alone once the latents are fixed."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from zimage_core.autoencoder import AutoencoderKL
from zimage_core.tiny.attributes import draw_subject
from zimage_core.tiny.optimizer import MovingAverage, MuonAdamW
from zimage_core.tiny.parallel import Threads
from zimage_core.tiny.state import learning_rate
from zimage_core.tiny.world import SIZE, draw_array, draw_jitter

KIND_SHARES = {"avatars": 0.55, "food": 0.2, "gaming": 0.25}
CROP = 64
CROP_BATCH, WHOLE_BATCH, DECODER_BATCH = 8, 2, 4
CROPS_UNTIL = 0.75
KL_WEIGHT = 5e-4
GRADIENT_WEIGHT = 0.3
# Latents that the transformer makes are a little off; the decoder shall not mind.
LATENT_NOISE = 0.06


def draw_kind(random: Random) -> str:
    """A kind of subject, by its share in the training."""
    return random.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]


def draw_picture(random: Random) -> NDArray[np.uint8]:
    """A drawing of a random subject, (128, 128, 3) uint8."""
    return draw_array(draw_subject(draw_kind(random), random), draw_jitter(random))


def to_signed(pictures: NDArray[np.uint8]) -> Tensor:
    """Pictures (B, H, W, 3) uint8 as images (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1.0


class VaeTrainer:
    """Steps of the autoencoder's training.

    Args:
        vae: changed in place.
        threads: where it is computed.
        random: draws pictures and crops.
        generator: draws latents from the encoder's Gaussians.
    """

    def __init__(
        self, vae: AutoencoderKL, threads: Threads, random: Random, generator: torch.Generator
    ) -> None:
        self.vae, self.threads = vae, threads
        self.random, self.generator = random, generator
        matrices, others = split_parameters(vae)
        self.optimizer = MuonAdamW(
            matrices, others, threads, matrix_lr=2e-3, lr=2e-3, momentum=0.9, weight_decay=0.0
        )
        self.average = MovingAverage(dict(vae.named_parameters()), decay=0.995)

    def step(self, step: int, total: int) -> dict[str, float]:
        """Take a step on crops, or on whole pictures towards the end."""
        crops = step < CROPS_UNTIL * total
        images = self._crops() if crops else to_signed(self._pictures(WHOLE_BATCH))
        size = SIZE if not crops else CROP
        noise = torch.randn(
            len(images), self.vae.config.latent_channels, size // 8, size // 8,
            generator=self.generator,
        )  # fmt: skip

        def loss(part: slice, _: int) -> Tensor:
            gaussian = self.vae.encode(images[part])
            latents = gaussian.mean + torch.exp(0.5 * gaussian.logvar) * noise[part]
            decoded = self.vae.decode(latents)
            spread = gaussian.mean.square() + gaussian.logvar.exp() - 1.0 - gaussian.logvar
            return picture_loss(decoded, images[part]) + KL_WEIGHT * 0.5 * spread.mean()

        value = self.threads.gradients(loss, len(images), self.optimizer.parameters)
        norm = self.optimizer.step(learning_rate(step, total))
        self.average.update()
        return {"loss": value, "grad_norm": norm}

    def parts(self) -> dict[str, Any]:
        """What is saved."""
        return {"vae": self.vae, "optimizer": self.optimizer, "average": self.average}

    def _pictures(self, count: int) -> NDArray[np.uint8]:
        return np.stack([draw_picture(self.random) for _ in range(count)])

    def _crops(self) -> Tensor:
        """Two crops of each of a few pictures."""
        crops = []
        for picture in self._pictures(CROP_BATCH // 2):
            for _ in range(2):
                x, y = (self.random.randint(0, SIZE - CROP) for _ in range(2))
                crops.append(picture[y : y + CROP, x : x + CROP])
        return to_signed(np.stack(crops))


class DecoderTrainer:
    """Steps of the decoder's training, on whole pictures and latents that stay as they are.

    Args:
        vae: its decoder is changed in place.
        threads: where it is computed.
        random: draws pictures.
        generator: draws the noise on latents.
    """

    def __init__(
        self, vae: AutoencoderKL, threads: Threads, random: Random, generator: torch.Generator
    ) -> None:
        self.vae, self.threads = vae, threads
        self.random, self.generator = random, generator
        matrices, others = split_parameters(vae.decoder)
        self.optimizer = MuonAdamW(
            matrices, others, threads, matrix_lr=1e-3, lr=1e-3, momentum=0.9, weight_decay=0.0
        )
        self.average = MovingAverage(dict(vae.decoder.named_parameters()), decay=0.998)

    def step(self, step: int, total: int) -> dict[str, float]:
        """Take a step."""
        pictures = [draw_picture(self.random) for _ in range(DECODER_BATCH)]
        images = to_signed(np.stack(pictures))
        noise = torch.randn(
            len(images), self.vae.config.latent_channels, SIZE // 8, SIZE // 8,
            generator=self.generator,
        )  # fmt: skip
        # From none to twice the usual noise, one amount for each picture.
        amount = torch.rand(len(images), 1, 1, 1, generator=self.generator) * 2 * LATENT_NOISE
        scale = 1.0 / self.vae.config.scaling_factor

        def loss(part: slice, _: int) -> Tensor:
            with torch.no_grad():
                latents = self.vae.encode(images[part]).mean
            decoded = self.vae.decode(latents + noise[part] * amount[part] * scale)
            return picture_loss(decoded, images[part])

        value = self.threads.gradients(loss, len(images), self.optimizer.parameters)
        norm = self.optimizer.step(learning_rate(step, total))
        self.average.update()
        return {"loss": value, "grad_norm": norm}

    def parts(self) -> dict[str, Any]:
        """What is saved."""
        return {"decoder": self.vae.decoder, "optimizer": self.optimizer, "average": self.average}


def picture_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Absolute and squared differences, and those of neighbouring pixels, which are the edges."""
    error = decoded - images
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    loss: Tensor = error.abs().mean() + error.square().mean() + GRADIENT_WEIGHT * edges
    return loss


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: NDArray[np.uint8]) -> tuple[Tensor, float]:
    """Encode and decode pictures (B, 128, 128, 3) uint8.

    Returns:
        Images (B, 3, 128, 128) in [-1, 1], and the mean of their PSNR in dB.
    """
    images = to_signed(pictures)
    decoded = torch.cat(
        [vae.decode(vae.encode(part).mode()).clamp(-1, 1) for part in torch.split(images, 8)]
    )
    errors = F.mse_loss(decoded, images, reduction="none").mean(dim=(1, 2, 3)) / 4.0
    return decoded, float((-10.0 * errors.log10()).mean())


def split_parameters(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of layers with several inputs, for Muon, but for those at the ends; and the rest."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in module.named_parameters():
        inner = parameter.ndim >= 2 and "conv_in" not in name and "conv_out" not in name
        (matrices if inner else others).append(parameter)
    return matrices, others


def initialize_vae(vae: AutoencoderKL, generator: torch.Generator) -> None:
    """Draw weights that keep variances, each tensor from one generator."""
    for name, parameter in vae.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                bound = math.sqrt(3.0 / parameter[0].numel())
                parameter.uniform_(-bound, bound, generator=generator)
