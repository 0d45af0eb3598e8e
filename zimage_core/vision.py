"""What is seen in a picture: SigLIP 2's vision encoder, and how a picture is brought to it.

The encoder is that of transformers' `Siglip2VisionModel` without its pooling head, which nothing
here uses: it is neither loaded nor run. Attribute names are the keys of transformers 5; those of
transformers 4 have `vision_model.` before them. Since its class differs in that from version to
version, and pads every picture to one number of patches, the encoder is written out here; it sees
one picture at a time, so that there is nothing to pad and nothing to mask.

The processor is that of transformers' `Siglip2ImageProcessor` as Pillow computes it: what
transformers does where torchvision is not installed, and did before it could be.

Letters in shapes: S patches of a picture (rows * columns), C channels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image

    from zimage_core.config import VisionConfig, VisionProcessorConfig

# The search for the size of a picture ends where two scales differ by less.
_SCALE_STEP = 1e-5
_MAX_SCALE = 100.0


class VisionEncoder(nn.Module):
    """SigLIP 2's vision transformer.

    Args:
        config: architecture, as `siglip/config.json` gives it.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the features."""
        return self.post_layernorm.weight.dtype

    def forward(self, patches: Tensor) -> Tensor:
        """See a picture.

        Args:
            patches: (rows, columns, patch_size * patch_size * 3), as `VisionProcessor` cuts them.

        Returns:
            (rows, columns, C) in the encoder's dtype.
        """
        x = self.embeddings(patches)
        for layer in self.encoder.layers:
            x = layer(x)
        rows, columns, _ = patches.shape
        normed: Tensor = self.post_layernorm(x)
        return normed.reshape(rows, columns, -1)


class _Embeddings(nn.Module):
    """Patches to tokens, each with what was learned for its place on a square grid."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        patch_dim = config.num_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch_dim, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)
        self.side = math.isqrt(config.num_patches)

    def forward(self, patches: Tensor) -> Tensor:
        """Tokens (1, S, C) of patches (rows, columns, D)."""
        weight = self.position_embedding.weight
        grid = weight.float().T.reshape(1, -1, self.side, self.side)
        # The learned grid is stretched over the picture's; where that has fewer, several are
        # averaged. In float32 in any dtype, as it is trained.
        places = F.interpolate(
            grid, size=patches.shape[:2], mode="bilinear", align_corners=False, antialias=True
        )
        tokens: Tensor = self.patch_embedding(patches.to(weight.device, weight.dtype).flatten(0, 1))
        return (tokens + places[0].flatten(1).T.to(weight.dtype))[None]


class _Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class _Layer(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = _Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class _Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        out: Tensor = self.out_proj(mixed)
        return out


class _MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


def pooling_head_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the pooling head, which a file may hold and nothing here uses."""
    width, inner = config.hidden_size, config.intermediate_size
    return {
        "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width),
        "head.attention.in_proj_bias": (3 * width,),
        "head.attention.out_proj.weight": (width, width),
        "head.attention.out_proj.bias": (width,),
        "head.layernorm.weight": (width,),
        "head.layernorm.bias": (width,),
        "head.mlp.fc1.weight": (inner, width),
        "head.mlp.fc1.bias": (inner,),
        "head.mlp.fc2.weight": (width, inner),
        "head.mlp.fc2.bias": (width,),
    }


class VisionProcessor:
    """Brings a picture to the patches that the encoder sees.

    Args:
        config: as `siglip_processor/preprocessor_config.json` gives it.
    """

    def __init__(self, config: VisionProcessorConfig) -> None:
        self.config = config

    def __call__(self, picture: Image) -> Tensor:
        """Resize a picture to at most `max_num_patches` patches, and cut it.

        Args:
            picture: RGB.

        Returns:
            (rows, columns, patch_size * patch_size * 3) float32 on the CPU, normalised. Of a patch
            the numbers are in the order rows, columns, channels.
        """
        from PIL import Image as PilImage

        config = self.config
        rows, columns = self.grid(picture.height, picture.width)
        size = columns * config.patch_size, rows * config.patch_size
        resized = picture.resize(size, PilImage.Resampling(config.resample))
        pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32)) * config.rescale_factor
        mean, std = torch.tensor(config.image_mean), torch.tensor(config.image_std)
        normed = (pixels - mean) / std
        patch = config.patch_size
        patches = normed.reshape(rows, patch, columns, patch, 3).transpose(1, 2)
        return patches.reshape(rows, columns, -1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture: as many as are allowed, and about its shape.

        The largest scale is looked for at which both sides, each rounded up to whole patches, have
        no more patches than are allowed.
        """
        patch = self.config.patch_size

        def patches(scale: float) -> tuple[int, int]:
            rows, columns = (max(1, math.ceil(side * scale / patch)) for side in (height, width))
            return rows, columns

        low, high = _SCALE_STEP / 10, _MAX_SCALE
        while high - low >= _SCALE_STEP:
            middle = (low + high) / 2
            if math.prod(patches(middle)) <= self.config.max_num_patches:
                low = middle
            else:
                high = middle
        return patches(low)
