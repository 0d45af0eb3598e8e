"""How much memory a checkpoint needs on a device, found without the device and the checkpoint.

The models are made on the meta device, where tensors have shapes and no values, and the pipeline's
own stages are run on them while the bytes of live tensors are counted. So the account follows the
code; what happens inside of kernels (workspaces), the CUDA context and fragmentation it does not
see: `ALLOWANCE` stands for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.autoencoder import AutoencoderKL
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.empty_module import make_empty
from zimage_core.float16 import weights_dtype
from zimage_core.live_bytes import FusedAttention, LiveBytes
from zimage_core.offload import OFFLOAD_MODES, parameters_outside, streamed_blocks
from zimage_core.pipeline import ZImagePipeline
from zimage_core.scheduler import FlowMatchEulerDiscreteScheduler
from zimage_core.text_encoder import TextEncoder
from zimage_core.transformer import ZImageTransformer2DModel

# Bytes beside tensors on a CUDA device: its context, cuBLAS' and cuDNN's workspaces. Assumed.
ALLOWANCE = 768 * 1024**2
# Of what is computed; holes between tensors. Assumed.
FRAGMENTATION = 0.05
_FEW = 2


@dataclass(frozen=True)
class Workload:
    """What is made at once.

    Attributes:
        height: of the images, in pixels.
        width: of the images, in pixels.
        batch_size: images.
        guided: whether guidance is on, which doubles the transformer's batch.
        caption_tokens: of each prompt.
        from_image: whether images are started from.
    """

    height: int
    width: int
    batch_size: int = 1
    guided: bool = False
    caption_tokens: int = 512
    from_image: bool = False


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
    """

    def __init__(
        self,
        transformer: TransformerConfig,
        vae: AutoencoderConfig,
        text_encoder: TextEncoderConfig,
        dtype: torch.dtype,
    ) -> None:
        self._models = _make(transformer, vae, text_encoder, dtype)
        # Blocks are alike, and hand on no more than their result: a few do for all of them.
        few = _make(
            replace(transformer, n_layers=_FEW, n_refiner_layers=_FEW),
            vae,
            replace(text_encoder, num_hidden_layers=_FEW + 1),  # the last one is never made
            dtype,
        )
        # Any schedule does: its numbers have no part in the memory.
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self._pipeline = ZImagePipeline(**few, tokenizer=None, scheduler=scheduler)
        self._measured: dict[tuple[str, bool, Workload], int] = {}

    def account(self, workload: Workload, offload: str) -> MemoryAccount:
        """Account for one way of offloading.

        Raises:
            ValueError: `offload` is unknown, or the workload does not fit the models.
        """
        if offload not in OFFLOAD_MODES:
            raise ValueError(f"offload: {offload!r}; allowed: {', '.join(OFFLOAD_MODES)}")
        everything = sum(_num_bytes(model.parameters()) for model in self._models.values())
        users = {"encode": "text_encoder", "denoise": "transformer", "decode": "vae"}
        if workload.from_image:
            users = {"encode": "text_encoder", "start": "vae", **users}
        stages = []
        for stage, name in users.items():
            weights = everything
            if offload != "none":
                weights = _resident_bytes(self._models[name], offload)
            activations = self._activations(stage, workload, tiled=offload != "none")
            stages.append(StageMemory(stage, weights, activations))
        return MemoryAccount(offload, tuple(stages), 0 if offload == "none" else everything)

    def accounts(self, workload: Workload) -> Mapping[str, MemoryAccount]:
        """Account for every way of offloading, by name."""
        return {offload: self.account(workload, offload) for offload in OFFLOAD_MODES}

    def _activations(self, stage: str, workload: Workload, *, tiled: bool) -> int:
        key = (stage, tiled, workload)
        if key not in self._measured:
            run = {
                "encode": self._encode,
                "start": self._start,
                "denoise": self._denoise,
                "decode": self._decode,
            }[stage]
            self._measured[key] = self._peak(run, workload)
        return self._measured[key]

    def _peak(self, run: Callable[[Workload], Any], workload: Workload) -> int:
        pipeline = self._pipeline
        models = (pipeline.text_encoder, pipeline.transformer, pipeline.vae)
        weights = [p for model in models for p in model.parameters()]
        with torch.no_grad(), FusedAttention(), LiveBytes("meta", weights) as live:
            run(workload)
        return int(live.peak)

    def _encode(self, workload: Workload) -> Any:
        size = workload.batch_size, workload.caption_tokens
        return self._pipeline.text_encoder(_empty(*size, dtype=torch.int64))

    def _start(self, workload: Workload) -> Any:
        image = _empty(1, 3, workload.height, workload.width, dtype=torch.float32)
        generators = [torch.Generator() for _ in range(workload.batch_size)]
        return self._pipeline.encode_image(image, generators)

    def _denoise(self, workload: Workload) -> Any:
        width = self._pipeline.transformer.config.cap_feat_dim
        size = workload.batch_size
        captions = [
            _empty(workload.caption_tokens, width, dtype=self._pipeline.text_encoder.dtype)
            for _ in range(2 * size if workload.guided else size)
        ]
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

    def _decode(self, workload: Workload) -> Any:
        shape = self._pipeline.latents_shape(workload.batch_size, workload.height, workload.width)
        return self._pipeline.decode(_empty(*shape, dtype=torch.float32))


def _make(
    transformer: TransformerConfig,
    vae: AutoencoderConfig,
    text_encoder: TextEncoderConfig,
    dtype: torch.dtype,
) -> dict[str, Any]:
    models = {
        "text_encoder": make_empty(TextEncoder, text_encoder),
        "transformer": make_empty(ZImageTransformer2DModel, transformer),
        "vae": make_empty(AutoencoderKL, vae),
    }
    for model in models.values():
        model.to(weights_dtype(model, dtype)).requires_grad_(False).eval()
    return models


def _resident_bytes(model: nn.Module, offload: str) -> int:
    """Bytes of a model's weights on the device while it has its turn."""
    blocks, _ = streamed_blocks(model)
    if not blocks or offload != "block":
        return _num_bytes(model.parameters())
    largest = max(_num_bytes(block.parameters()) for block in blocks)
    return _num_bytes(parameters_outside(model, blocks)) + 2 * largest


def _num_bytes(parameters: Any) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
