"""The Z-Image transformer: latents, model time and captions in, velocity out.

Several calls, so that nothing is computed more often than it changes:

    captions = model.embed_captions(features)           # once for each prompt
    context = model.condition(captions, h, w)           # once for each batch
    steps = model.modulations(times)                    # once for a schedule
    velocity = model.predict(patches, steps[i], context)    # each step, on patches of latents

Attribute names are the keys of the checkpoint. Letters in shapes: B batch, F channels of latents,
h and w latents' height and width, L tokens of a caption, C channels of a token (`dim`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from zimage_core.attention import AUTO, choose_backend, resolve_backend
from zimage_core.layers import (
    MODULATION_DIM,
    Attention,
    CaptionBlock,
    FinalLayer,
    ModulatedBlock,
    TimestepEmbedder,
)
from zimage_core.modulation import ModulationTable, StepModulation
from zimage_core.normalization import RMSNorm
from zimage_core.padding import Padding, padding_of
from zimage_core.patchify import (
    TOKEN_MULTIPLE,
    pad_tokens,
    padded_length,
    patchify,
    unpatchify,
)
from zimage_core.rotary_tables import RotaryTables

if TYPE_CHECKING:
    from zimage_core.config import TransformerConfig


class Context(NamedTuple):
    """What every step of a batch shares: the tokens beside the image's, and where each stands.

    Text to image has the sequence [image, caption]. `editing` makes those of
    [caption, pictures, image, visual features].
    """

    after: Tensor | None
    """Behind the image: refined captions, (B, L, C), zeros behind the shorter ones."""
    image_rotary: Tensor
    """Angles of the tokens that the noise refiner sees, see `layers.apply_rotary`."""
    rotary: Tensor
    """Angles of the whole sequence."""
    padding: Padding | None = None
    """Which tokens are real; None where all sequences are equally long."""
    pictures: Tensor | None = None
    """In front of the image, and refined with it: embedded, (B, N, C)."""
    before: Tensor | None = None
    """In front of all that, refined already: (B, M, C)."""


class ZImageTransformer2DModel(nn.Module):
    """Single-stream diffusion transformer of Z-Image.

    Args:
        config: architecture, as the checkpoint's `transformer/config.json` gives it.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        # `TransformerConfig.from_json` tells a user; here it can only be a mistake in a program.
        assert config.n_kv_heads == config.n_heads and config.all_f_patch_size[0] == 1
        assert config.dim == config.n_heads * sum(config.axes_dims)
        self.config = config
        self.in_channels = config.in_channels
        self.patch_size = config.all_patch_size[0]
        self._patch_key = f"{config.all_patch_size[0]}-{config.all_f_patch_size[0]}"
        dim = config.dim

        def modulated_block() -> ModulatedBlock:
            return ModulatedBlock(
                dim, config.n_heads, norm_eps=config.norm_eps, qk_norm=config.qk_norm
            )

        def caption_block() -> CaptionBlock:
            return CaptionBlock(
                dim, config.n_heads, norm_eps=config.norm_eps, qk_norm=config.qk_norm
            )

        self.all_x_embedder = nn.ModuleDict()
        self.all_final_layer = nn.ModuleDict()
        for patch, frames in zip(config.all_patch_size, config.all_f_patch_size, strict=True):
            patch_dim = frames * patch * patch * config.in_channels
            self.all_x_embedder[f"{patch}-{frames}"] = nn.Linear(patch_dim, dim)
            self.all_final_layer[f"{patch}-{frames}"] = FinalLayer(dim, patch_dim)
        self.t_embedder = TimestepEmbedder(min(dim, MODULATION_DIM))
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.cap_feat_dim, eps=config.norm_eps),
            nn.Linear(config.cap_feat_dim, dim),
        )
        self.noise_refiner = nn.ModuleList(
            modulated_block() for _ in range(config.n_refiner_layers)
        )
        self.context_refiner = nn.ModuleList(
            caption_block() for _ in range(config.n_refiner_layers)
        )
        self.siglip_embedder: nn.Sequential | None = None
        self.siglip_refiner: nn.ModuleList | None = None
        if config.siglip_feat_dim is not None:
            self.siglip_embedder = nn.Sequential(
                RMSNorm(config.siglip_feat_dim, eps=config.norm_eps),
                nn.Linear(config.siglip_feat_dim, dim),
            )
            self.siglip_refiner = nn.ModuleList(
                caption_block() for _ in range(config.n_refiner_layers)
            )
            self.siglip_pad_token = nn.Parameter(torch.empty(1, dim).normal_(std=0.02))
        self.layers = nn.ModuleList(modulated_block() for _ in range(config.n_layers))
        # Not zero, so that random weights show a pad token that is misplaced.
        self.x_pad_token = nn.Parameter(torch.empty(1, dim).normal_(std=0.02))
        self.cap_pad_token = nn.Parameter(torch.empty(1, dim).normal_(std=0.02))
        self._table = ModulationTable(self._modulating_parameters)
        self._rotaries = RotaryTables(config)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.x_pad_token.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; latents and captions are computed in it."""
        return self.x_pad_token.dtype

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.config.dim // self.config.n_heads

    @property
    def max_caption_length(self) -> int:
        """Tokens of the longest caption that leaves the image a position of its own."""
        return (self.config.axes_lens[0] - 2) // TOKEN_MULTIPLE * TOKEN_MULTIPLE

    @property
    def attention_backend(self) -> str:
        """Name of the attention backend that the next forward will use."""
        name = resolve_backend(self._attention_modules()[0].backend)
        if name != AUTO:
            return name
        return choose_backend(name, self.device, self.dtype, self.head_dim)

    def set_attention_backend(self, name: str | None) -> None:
        """Choose the backend of this model; None goes back to the default, `auto` is the best one.

        Raises:
            AttentionBackendError: the backend cannot run on this model's device and dtype.
            ValueError: `name` is unknown.
        """
        if name is not None:
            name = choose_backend(name, self.device, self.dtype, self.head_dim)
        for module in self._attention_modules():
            module.backend = name

    def angles(self, positions: Tensor) -> Tensor:
        """Rotary angles (1, S, 1, D) of one sequence of positions (S, 3) int64 on the CPU."""
        return self._rotaries.of([positions], self.device)

    def embed_captions(self, captions: Sequence[Tensor]) -> list[Tensor]:
        """Bring text features into the transformer's space and refine them; independent of time.

        Captions of the same padded length are refined together, so none ever needs a mask.

        Args:
            captions: text features, (L_i, cap_feat_dim) each, any floating dtype and device.

        Returns:
            For each caption (L_i rounded up to a multiple of 32, C), in the model's dtype.

        Raises:
            ValueError: a caption is empty, too long, or not of width `cap_feat_dim`.
        """
        for caption in captions:
            self.check_caption(caption)
        lengths = [len(caption) for caption in captions]
        features = torch.cat([c.to(self.device, self.dtype) for c in captions])
        embedded = self.cap_embedder(features).split(lengths)

        refined: dict[int, Tensor] = {}
        for length in sorted({padded_length(n) for n in lengths}):
            members = [i for i, n in enumerate(lengths) if padded_length(n) == length]
            x = torch.stack([pad_tokens(embedded[i], self.cap_pad_token) for i in members])
            rotary = self._rotaries.caption(length, self.device)
            for block in self.context_refiner:
                x = block(x, rotary, None)
            refined.update(zip(members, x.unbind(), strict=True))
        return [refined[i] for i in range(len(captions))]

    def embed_patches(self, patches: Tensor) -> Tensor:
        """Tokens (..., C) of patches (..., p * p * F) of latents, both in the model's dtype."""
        tokens: Tensor = self.all_x_embedder[self._patch_key](patches)
        return tokens

    def condition(self, captions: Sequence[Tensor], height: int, width: int) -> Context:
        """Lay out the sequences of a batch, one image of the same size behind each caption.

        Args:
            captions: as `embed_captions` returns them.
            height: h of the latents, a multiple of the patch size.
            width: w of the latents, a multiple of the patch size.

        Raises:
            ValueError: the image is larger than the model has positions for.
        """
        rows, columns = height // self.patch_size, width // self.patch_size
        _, max_rows, max_columns = self.config.axes_lens
        if rows > max_rows or columns > max_columns:
            raise ValueError(
                f"latents of {height}x{width} have {rows}x{columns} patches; "
                f"this model has positions for {max_rows}x{max_columns}"
            )
        lengths = [len(caption) for caption in captions]
        if len(set(lengths)) == 1:
            # One row of angles serves the whole batch.
            laid_out, padding = lengths[:1], None
        else:
            num_image_tokens = padded_length(rows * columns)
            laid_out = lengths
            padding = padding_of([num_image_tokens + n for n in lengths], self.device)
        image_rotary, rotary = self._rotaries.sequences(laid_out, rows, columns, self.device)
        return Context(
            after=pad_sequence(list(captions), batch_first=True),
            image_rotary=image_rotary,
            rotary=rotary,
            padding=padding,
        )

    def modulate(self, time: Tensor) -> StepModulation:
        """What a time makes of every block.

        Args:
            time: model time 1 - sigma, float32, (1,) for a whole batch or (B,).
        """
        t = self.t_embedder(time * self.config.t_scale).to(self.dtype)
        return StepModulation(
            refiner=tuple(block.modulation(t) for block in self._blocks(self.noise_refiner)),
            layers=tuple(block.modulation(t) for block in self._blocks(self.layers)),
            final=self._final_layer().scale(t),
        )

    def modulations(self, times: Tensor) -> list[StepModulation]:
        """`modulate` for each time of a schedule; those of the last schedule are remembered.

        Args:
            times: (n,) float32 on the CPU.
        """
        return self._table.get(times, self.device, self.modulate)

    def forget(self) -> None:
        """Give back the memory of what is remembered from one call to the next."""
        self._table.clear()
        self._rotaries.clear()

    def forward(self, latents: Tensor, time: Tensor, context: Context) -> Tensor:
        """Predict the velocity of latents at a model time, negated (noise to image is positive).

        Args:
            latents: (B, F, h, w) in the model's dtype.
            time: model time 1 - sigma, float32, (1,) for the whole batch or (B,).
            context: what `condition` returned for this batch and size.

        Returns:
            (B, F, h, w) in the model's dtype.
        """
        patches = self.predict(patchify(latents, self.patch_size), self.modulate(time), context)
        return unpatchify(patches, self.patch_size, *latents.shape[2:])

    def predict(self, patches: Tensor, modulation: StepModulation, context: Context) -> Tensor:
        """`forward` in the layout of the tokens, on what does not change from image to image.

        Args:
            patches: of latents, (B, h/p * w/p, p * p * F) in the model's dtype, as `patchify` cuts
                them.
            modulation: of this step.
            context: what `condition` returned for this batch and size.

        Returns:
            The shape and dtype of `patches`.
        """
        B, num_patches, _ = patches.shape
        x = self.embed_patches(patches)
        num_pads = padded_length(num_patches) - num_patches
        pads = self.x_pad_token.expand(B, num_pads, -1) if num_pads else None
        x = _join(context.pictures, x, pads)
        for block, row in zip(self.noise_refiner, modulation.refiner, strict=True):
            x = block(x, context.image_rotary, None, row)

        x = _join(context.before, x, context.after)
        for block, row in zip(self.layers, modulation.layers, strict=True):
            x = block(x, context.rotary, context.padding, row)

        first = _length(context.before) + _length(context.pictures)
        patches = x[:, first : first + num_patches]
        projected: Tensor = self._final_layer()(patches, modulation.final)
        return projected

    def _final_layer(self) -> FinalLayer:
        layer = self.all_final_layer[self._patch_key]
        assert isinstance(layer, FinalLayer)
        return layer

    @staticmethod
    def _blocks(blocks: nn.ModuleList) -> list[ModulatedBlock]:
        return [block for block in blocks if isinstance(block, ModulatedBlock)]

    def _modulating_parameters(self) -> list[nn.Parameter]:
        final = self._final_layer().adaLN_modulation
        blocks = self._blocks(self.noise_refiner) + self._blocks(self.layers)
        return [
            *self.t_embedder.parameters(),
            *final.parameters(),
            *(weight for block in blocks for weight in block.modulating_parameters()),
        ]

    def _attention_modules(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]

    def check_caption(self, caption: Tensor) -> None:
        """See that text features can be a caption. Raises ValueError: as `embed_captions`."""
        if caption.ndim != 2 or caption.shape[1] != self.config.cap_feat_dim:
            raise ValueError(
                f"a caption has shape {tuple(caption.shape)}; "
                f"this model takes (tokens, {self.config.cap_feat_dim})"
            )
        if not 1 <= len(caption) <= self.max_caption_length:
            raise ValueError(
                f"a caption has {len(caption)} tokens; this model takes 1 to "
                f"{self.max_caption_length}"
            )


def _join(*parts: Tensor | None) -> Tensor:
    """One sequence of those (B, S_i, C) that are there."""
    there = [part for part in parts if part is not None]
    return there[0] if len(there) == 1 else torch.cat(there, dim=1)


def _length(part: Tensor | None) -> int:
    return 0 if part is None else part.shape[1]
