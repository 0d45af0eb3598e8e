"""How much memory a checkpoint needs on a device, found without the device and the checkpoint.

The models are made on the meta device, where tensors have shapes and no values, and the pipeline's
own stages are run on them while the bytes of live tensors are counted. So the account follows the
code. What it does not see, the CUDA context, workspaces of kernels and holes between tensors, is
assumed: `ALLOWANCE` and `FRAGMENTATION`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.autoencoder import AutoencoderKL
from zimage_core.config import (
    AutoencoderConfig,
    TextEncoderConfig,
    TransformerConfig,
    VisionConfig,
)
from zimage_core.editing import Edit
from zimage_core.empty_module import make_empty
from zimage_core.entries import Condition
from zimage_core.float16 import weights_dtype
from zimage_core.live_bytes import FusedAttention, LiveBytes
from zimage_core.offload import OFFLOAD_MODES, parameters_outside, streamed_blocks
from zimage_core.patchify import TOKEN_MULTIPLE
from zimage_core.pipeline import ZImagePipeline
from zimage_core.quantization import int8_bytes, is_quantized
from zimage_core.scheduler import FlowMatchEulerDiscreteScheduler
from zimage_core.text_encoder import TextEncoder
from zimage_core.tiling import disable_tiling, enable_tiling
from zimage_core.transformer import ZImageTransformer2DModel
from zimage_core.vision import VisionEncoder

# Bytes beside tensors on a CUDA device: its context, cuBLAS' and cuDNN's workspaces. Assumed.
ALLOWANCE = 768 * 1024**2
# Of what is computed; holes between tensors. Assumed.
FRAGMENTATION = 0.05
_FEW = 2
PICTURE_SIDE = 1024
"""Of a picture to edit; larger ones are resized to so many pixels, or to those of the image."""


@dataclass(frozen=True)
class Workload:
    """What is made at once.

    Attributes:
        height: of the images, in pixels.
        width: of the images, in pixels.
        batch_size: images.
        guided: whether guidance is on, which doubles the transformer's batch.
        caption_tokens: of each prompt.
        num_steps: of the schedule; what its times make of the blocks is kept.
        from_image: whether images are started from.
        num_pictures: to edit, of each image; each is taken to be as large as may be.
    """

    height: int
    width: int
    batch_size: int = 1
    guided: bool = False
    caption_tokens: int = 512
    num_steps: int = 8
    from_image: bool = False
    num_pictures: int = 0


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the device in one stage: of weights, and of everything else at its peak."""

    name: str
    weights: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes of tensors."""
        return self.weights + self.activations


@dataclass(frozen=True)
class MemoryAccount:
    """What one way of offloading needs for a workload.

    Attributes:
        offload: a name of `OFFLOAD_MODES`.
        stages: in order.
        host: bytes of weights in host memory.
    """

    offload: str
    stages: tuple[StageMemory, ...]
    host: int

    @property
    def peak(self) -> int:
        """Bytes of tensors on the device in the stage that has most."""
        return max(stage.total for stage in self.stages)

    @property
    def needed(self) -> int:
        """Bytes that should be free on a CUDA device: the peak and what is assumed beside it."""
        return int(self.peak * (1 + FRAGMENTATION)) + ALLOWANCE


class MemoryModel:
    """A checkpoint's models without their weights, to account for.

    Args:
        transformer: its architecture, as the two others.
        vae: see `transformer`.
        text_encoder: see `transformer`.
        dtype: in which the models are loaded.
        quantization: a name of `quantization.QUANTIZATIONS`.
        vision: architecture of the encoder of pictures, where there is one.
    """

    def __init__(
        self,
        transformer: TransformerConfig,
        vae: AutoencoderConfig,
        text_encoder: TextEncoderConfig,
        dtype: torch.dtype,
        quantization: str = "none",
        vision: VisionConfig | None = None,
    ) -> None:
        self._models = _make(transformer, vae, text_encoder, vision, dtype)
        self._bytes: dict[int, int] = {}  # of parameters, by identity
        self._multiplied_out = dict.fromkeys(self._models, 0)
        for name, model in self._models.items():
            for key, weight in model.named_parameters():
                self._bytes[id(weight)] = weight.nbytes
                if quantization == "int8" and is_quantized(name, key):
                    rows, columns = weight.shape
                    self._bytes[id(weight)] = int8_bytes((rows, columns), weight.dtype)
                    # A product needs the weight in the dtype of the activations; with scales for
                    # parts of rows also on the way there, in float32.
                    copies = 3 if dtype == torch.float16 else 1
                    largest = max(self._multiplied_out[name], copies * weight.nbytes)
                    self._multiplied_out[name] = largest
        # Blocks are alike, and hand on no more than their result: a few do for all of them.
        few = _make(
            replace(transformer, n_layers=_FEW, n_refiner_layers=_FEW),
            vae,
            replace(text_encoder, num_hidden_layers=_FEW + 1),  # the last one is never made
            None if vision is None else replace(vision, num_hidden_layers=_FEW),
            dtype,
        )
        # Any schedule does: its numbers have no part in the memory.
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self._pipeline = ZImagePipeline(**few, tokenizer=None, scheduler=scheduler)
        self._measured: dict[tuple[str, bool, Workload], int] = {}

    @property
    def max_caption_tokens(self) -> int:
        """The longest caption that the transformer has positions for."""
        return self._pipeline.transformer.max_caption_length

    @property
    def max_side(self) -> int:
        """Pixels of the largest square that it has positions for."""
        pipeline = self._pipeline
        return min(pipeline.transformer.config.axes_lens[1:]) * pipeline.size_multiple

    def account(self, workload: Workload, offload: str) -> MemoryAccount:
        """Account for one way of offloading.

        Raises:
            ValueError: `offload` is unknown, or the workload does not fit the models.
        """
        if offload not in OFFLOAD_MODES:
            raise ValueError(f"offload: {offload!r}; allowed: {', '.join(OFFLOAD_MODES)}")
        if workload.num_pictures and "siglip" not in self._models:
            raise ValueError("num_pictures: these models take no pictures")
        everything = sum(self._bytes.values())
        users = {"encode": "text_encoder", "denoise": "transformer", "decode": "vae"}
        if workload.from_image:
            users = {"encode": "text_encoder", "start": "vae", **users}
        if workload.num_pictures:
            users = {"encode": "text_encoder", "see": "siglip", "start": "vae", **users}
        stages = []
        for stage, name in users.items():
            weights = everything
            if offload != "none":
                weights = self._resident_bytes(self._models[name], offload)
            activations = self._activations(stage, workload, tiled=offload != "none")
            if stage == "denoise":
                activations += self._table_bytes(workload.num_steps)
            stages.append(StageMemory(stage, weights, activations + self._multiplied_out[name]))
        return MemoryAccount(offload, tuple(stages), 0 if offload == "none" else everything)

    def accounts(self, workload: Workload) -> dict[str, MemoryAccount]:
        """Account for every way of offloading, by name."""
        return {offload: self.account(workload, offload) for offload in OFFLOAD_MODES}

    def _table_bytes(self, num_steps: int) -> int:
        """Bytes of the modulations of a schedule (`modulation`), all but the one that is measured.

        Few as they are, they would be more than what is assumed for thousands of steps.
        """
        config, few = self._models["transformer"].config, self._pipeline.transformer.config
        blocks = num_steps * (config.n_layers + config.n_refiner_layers)
        measured = few.n_layers + few.n_refiner_layers
        num_bytes: int = 4 * (blocks - measured) * config.dim * self._pipeline.dtype.itemsize
        return num_bytes

    def _resident_bytes(self, model: nn.Module, offload: str) -> int:
        """Bytes of a model's weights on the device while it has its turn."""
        blocks, _ = streamed_blocks(model)
        if not blocks or offload != "block":
            return self._num_bytes(model.parameters())
        largest = max(self._num_bytes(block.parameters()) for block in blocks)
        return self._num_bytes(parameters_outside(model, blocks)) + 2 * largest

    def _num_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        return sum(self._bytes[id(parameter)] for parameter in parameters)

    def _activations(self, stage: str, workload: Workload, *, tiled: bool) -> int:
        """Bytes at the peak of a stage, weights aside."""
        if stage == "encode":
            key = stage, False, Workload(0, 0, workload.batch_size, False, workload.caption_tokens)
        elif stage == "denoise":
            key = stage, False, workload
        elif stage == "see":
            key = stage, False, Workload(0, 0)
        else:
            num_pictures = workload.num_pictures if stage == "start" else 0
            size = workload.height, workload.width, workload.batch_size
            key = stage, tiled, Workload(*size, num_pictures=num_pictures)
        if key not in self._measured:
            self._measured[key] = self._peak(getattr(self, f"_{stage}"), workload, tiled)
        return self._measured[key]

    def _peak(self, run: Callable[[Workload], object], workload: Workload, tiled: bool) -> int:
        pipeline = self._pipeline
        pipeline.transformer.forget()
        models = (pipeline.text_encoder, pipeline.transformer, pipeline.vae, pipeline.siglip)
        weights = [p for model in models if model is not None for p in model.parameters()]
        with torch.no_grad(), FusedAttention(), LiveBytes("meta", weights) as live:
            if tiled:
                enable_tiling(pipeline.vae, store=partial(_host_tensor, live))
            try:
                run(workload)
            finally:
                disable_tiling(pipeline.vae)
        return int(live.peak)

    def _encode(self, workload: Workload) -> object:
        size = workload.batch_size, workload.caption_tokens
        return self._pipeline.text_encoder(_empty(*size, dtype=torch.int64))

    def _see(self, workload: Workload) -> object:
        siglip = self._pipeline.siglip
        assert siglip is not None
        config = siglip.config
        side = isqrt(config.num_patches)
        return siglip(_empty(side, side, 3 * config.patch_size**2, dtype=torch.float32))

    def _start(self, workload: Workload) -> object:
        # One image is encoded after the other.
        image = _empty(1, 3, *_encoded_size(workload), dtype=torch.float32)
        generators = [torch.Generator() for _ in range(workload.batch_size)]
        return self._pipeline.encode_image(image, generators)

    def _denoise(self, workload: Workload) -> object:
        width = self._pipeline.transformer.config.cap_feat_dim
        size = workload.batch_size
        captions: list[Condition] = [
            _empty(workload.caption_tokens, width, dtype=self._pipeline.text_encoder.dtype)
            for _ in range(2 * size if workload.guided else size)
        ]
        if workload.num_pictures:
            captions = [self._edit(text, workload) for text in captions if isinstance(text, Tensor)]
        shape = self._pipeline.latents_shape(size, workload.height, workload.width)
        return self._pipeline.denoise(
            captions[:size],
            height=workload.height,
            width=workload.width,
            num_inference_steps=1,
            guidance_scale=1.0 if workload.guided else 0.0,
            negative_prompt_embeds=captions[size:] if workload.guided else None,
            latents=_empty(*shape, dtype=torch.float32),
        )

    def _edit(self, text: Tensor, workload: Workload) -> Edit:
        siglip = self._pipeline.siglip
        assert siglip is not None
        num, side = workload.num_pictures, isqrt(siglip.config.num_patches)
        shape = self._pipeline.latents_shape(1, *_encoded_size(workload))[1:]
        return Edit(
            # What is asked for is in one segment; the others are marks around pictures.
            [text, *[text[:TOKEN_MULTIPLE]] * (num + 1)],
            [_empty(*shape, dtype=torch.float32)] * num,
            [_empty(side, side, siglip.config.hidden_size, dtype=siglip.dtype)] * num,
        )

    def _decode(self, workload: Workload) -> object:
        size = workload.batch_size, workload.height, workload.width
        shape = self._pipeline.latents_shape(*size)
        return self._pipeline.decode(_empty(*shape, dtype=torch.float32))


def _make(
    transformer: TransformerConfig,
    vae: AutoencoderConfig,
    text_encoder: TextEncoderConfig,
    vision: VisionConfig | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    models: dict[str, Any] = {
        "text_encoder": make_empty(TextEncoder, text_encoder),
        "transformer": make_empty(ZImageTransformer2DModel, transformer),
        "vae": make_empty(AutoencoderKL, vae),
    }
    if vision is not None:
        models["siglip"] = make_empty(VisionEncoder, vision)
    for model in models.values():
        model.to(weights_dtype(model, dtype)).requires_grad_(False).eval()
    return models


def _encoded_size(workload: Workload) -> tuple[int, int]:
    """Height and width of what the autoencoder encodes."""
    if not workload.num_pictures:
        return workload.height, workload.width
    return max(workload.height, PICTURE_SIDE), max(workload.width, PICTURE_SIDE)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _host_tensor(live: LiveBytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Stands for host memory, in which tiling keeps what waits."""
    with live.elsewhere():
        return _empty(*shape, dtype=dtype)
