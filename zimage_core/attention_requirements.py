"""What an attention backend needs of a machine, found out without running it."""

from __future__ import annotations

import importlib
import importlib.util

import torch

_HALF = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
_HEAD_DIM_MULTIPLE = 8
_FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")

# Each returns None, or in words why a backend cannot run on a device in a dtype with heads of so
# many channels. Packages are imported last: a machine that could not use one need not load it.


def missing_for_native(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Nothing: PyTorch always has a kernel."""
    return None


def missing_for_native_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """PyTorch's flash kernel: any CPU, or what FlashAttention 2 needs."""
    if device.type == "cpu":
        return None
    return _missing_for_cuda_flash(device, dtype, head_dim)


def missing_for_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """FlashAttention 2 (https://github.com/Dao-AILab/flash-attention): Ampere or newer."""
    return (
        _not_installed("flash_attn", "flash-attn")
        or _missing_for_cuda_flash(device, dtype, head_dim)
        or _not_importable("flash_attn", "flash-attn")
    )


def missing_for_flash_3(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """FlashAttention 3 (the folder `hopper` of the same repository): Hopper alone."""
    missing = _not_installed("flash_attn_interface", "FlashAttention 3") or _no_cuda(device)
    if missing is None and torch.cuda.get_device_capability(device)[0] != 9:
        missing = f"it needs a Hopper GPU (compute capability 9.x), not {_gpu(device)}"
    return (
        missing
        or _wrong_numbers(dtype, head_dim)
        or _not_importable("flash_attn_interface", "FlashAttention 3")
    )


def _missing_for_cuda_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    missing = _no_cuda(device)
    if missing is None and torch.cuda.get_device_capability(device) < (8, 0):
        missing = f"it needs Ampere or newer (compute capability 8.0 or higher), not {_gpu(device)}"
    return missing or _wrong_numbers(dtype, head_dim)


def _no_cuda(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type!r}"
    if not torch.cuda.is_available():
        return "it needs CUDA, and torch finds none"
    return None


def _wrong_numbers(dtype: torch.dtype, head_dim: int) -> str | None:
    if dtype not in _HALF:
        return f"it computes in float16 or bfloat16, not {dtype}"
    if head_dim > _MAX_HEAD_DIM or head_dim % _HEAD_DIM_MULTIPLE != 0:
        return (
            f"it needs heads of at most {_MAX_HEAD_DIM} channels, a multiple of "
            f"{_HEAD_DIM_MULTIPLE}, not {head_dim}"
        )
    return None


def _not_installed(module: str, package: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"the package {package} (module {module}) is not installed"
    return None


def _not_importable(module: str, package: str) -> str | None:
    """A package built for another torch or CUDA is there, and fails only when it is imported."""
    installed = f"the package {package} (module {module}) is installed but"
    try:
        imported = importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # undefined symbol, no libcudart, no op
        return f"{installed} cannot be imported: {type(error).__name__}: {error}"
    absent = [name for name in _FUNCTIONS if not hasattr(imported, name)]
    if absent:
        return f"{installed} has no {' and no '.join(absent)}: its version is not supported"
    return None


def _gpu(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"
