"""Z-Image text-to-image model: load a checkpoint, generate images.

    from zimage_core import generate, load_from_local_dir

    components = load_from_local_dir("Z-Image-Turbo", device="cuda", dtype=torch.bfloat16)
    generate(**components, prompt="a lighthouse at dusk")[0].save("lighthouse.png")

Names are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zimage_core.attention import AttentionBackendError, set_attention_backend
    from zimage_core.autoencoder import AutoencoderKL
    from zimage_core.config import CheckpointError
    from zimage_core.generation import generate
    from zimage_core.loader import load_from_local_dir
    from zimage_core.lora import LoraAdapter, LoraSwitcher, load_lora
    from zimage_core.pipeline import ZImagePipeline
    from zimage_core.scheduler import FlowMatchEulerDiscreteScheduler, calculate_shift
    from zimage_core.transformer import ZImageTransformer2DModel
    from zimage_core.weights import ensure_model_weights

__all__ = [
    "AttentionBackendError",
    "AutoencoderKL",
    "CheckpointError",
    "FlowMatchEulerDiscreteScheduler",
    "LoraAdapter",
    "LoraSwitcher",
    "ZImagePipeline",
    "ZImageTransformer2DModel",
    "calculate_shift",
    "ensure_model_weights",
    "generate",
    "load_from_local_dir",
    "load_lora",
    "set_attention_backend",
]

_MODULES = {
    "AttentionBackendError": "attention",
    "AutoencoderKL": "autoencoder",
    "CheckpointError": "config",
    "FlowMatchEulerDiscreteScheduler": "scheduler",
    "LoraAdapter": "lora",
    "LoraSwitcher": "lora",
    "ZImagePipeline": "pipeline",
    "ZImageTransformer2DModel": "transformer",
    "calculate_shift": "scheduler",
    "ensure_model_weights": "weights",
    "generate": "generation",
    "load_from_local_dir": "loader",
    "load_lora": "lora",
    "set_attention_backend": "attention",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
