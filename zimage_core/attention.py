"""Attention backends: their names, what each needs, and the one function that calls them.

Which backend runs is decided before any image is made: the model's own choice, else
`set_attention_backend()`, else the environment variable `ZIMAGE_ATTENTION`, else `native`.
A backend that cannot run here, or would have to drop a mask, raises; none stands in for another.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ENVIRONMENT_VARIABLE = "ZIMAGE_ATTENTION"
DEFAULT_BACKEND = "native"

# B batch, S tokens, H heads, D channels of one head. All backends take and return (B, S, H, D).
AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class AttentionBackendError(RuntimeError):
    """The chosen attention backend cannot run here; the message says what is missing."""


class _Backend(NamedTuple):
    run: AttentionFunction
    missing: Callable[[torch.device, torch.dtype, int], str | None]
    takes_mask: bool


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Softmax attention of `q` over `k` and `v`, scaled by 1 / sqrt(D), not causal.

    Args:
        q: queries, (B, S, H, D), any floating dtype.
        k: keys, same shape and dtype.
        v: values, same shape and dtype.
        mask: bool, (B, S), true where a key is real. None where every key is: no backend is then
            given a mask.
        backend: a name of `attention_backends()`; None takes the default (`resolve_backend`).

    Returns:
        (B, S, H, D) in the dtype of `q`.

    Raises:
        AttentionBackendError: the backend has no way to apply `mask`.
        ValueError: `backend` is unknown.
    """
    name = resolve_backend(backend)
    chosen = _BACKENDS[name]
    if mask is not None and not chosen.takes_mask:
        raise AttentionBackendError(
            f"attention backend {name!r} cannot apply a mask, and this batch needs one because its "
            "captions have different padded lengths; batch equal lengths together or use 'native'"
        )
    return chosen.run(q, k, v, mask)


def attention_backends() -> tuple[str, ...]:
    """Names of all backends, whether or not they can run here."""
    return tuple(_BACKENDS)


def set_attention_backend(name: str | None) -> None:
    """Set the backend of every model that has none of its own; None forgets an earlier choice.

    Raises:
        ValueError: `name` is unknown.
    """
    global _default
    _default = None if name is None else _known(name, "set_attention_backend()")


def resolve_backend(name: str | None = None) -> str:
    """Return the backend that `name` stands for: itself, or where None the default in force.

    Raises:
        ValueError: the name given, or the one in `ZIMAGE_ATTENTION`, is unknown.
    """
    if name is not None:
        return _known(name, "attention")
    if _default is not None:
        return _default
    return _known(os.environ.get(ENVIRONMENT_VARIABLE) or DEFAULT_BACKEND, ENVIRONMENT_VARIABLE)


def check_backend(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> None:
    """Check, before a model is made, that a backend can run on a device.

    Args:
        name: a name of `attention_backends()`.
        device: where the model will run.
        dtype: of queries, keys and values.
        head_dim: channels of one head (128 in Z-Image).

    Raises:
        AttentionBackendError: it cannot; the message says what is missing.
        ValueError: `name` is unknown.
    """
    missing = _BACKENDS[_known(name, "attention")].missing(torch.device(device), dtype, head_dim)
    if missing is not None:
        raise AttentionBackendError(f"attention backend {name!r} cannot run here: {missing}")


def _known(name: str, source: str) -> str:
    if name not in _BACKENDS:
        raise ValueError(
            f"{source}: unknown attention backend {name!r}; known are {', '.join(_BACKENDS)}"
        )
    return name


def _native(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    key_mask = None if mask is None else mask[:, None, None, :]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=key_mask
    )
    return out.transpose(1, 2)


def _native_flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _native(q, k, v, None)


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is None
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(q, k, v)
    return out


def _flash_3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is None
    from flash_attn_interface import flash_attn_func

    out: Tensor | tuple[Tensor, Tensor] = flash_attn_func(q, k, v)
    # Earlier releases of FlashAttention 3 return the log-sum-exp beside the output.
    return out[0] if isinstance(out, tuple) else out


def _nothing_missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


def _native_flash_missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type == "cpu":
        return None
    return _cuda_flash_missing(device, dtype, head_dim, capability=(8, 0), family="Ampere or newer")


def _flash_missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return _package_missing("flash_attn", "flash-attn") or _cuda_flash_missing(
        device, dtype, head_dim, capability=(8, 0), family="Ampere or newer"
    )


def _flash_3_missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    missing = _package_missing("flash_attn_interface", "FlashAttention 3") or _cuda_flash_missing(
        device, dtype, head_dim, capability=(9, 0), family="Hopper"
    )
    if missing is None and torch.cuda.get_device_capability(device)[0] != 9:
        return f"it needs a Hopper GPU (compute capability 9.x), not {_gpu(device)}"
    return missing


def _package_missing(module: str, package: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"the package {package} (module {module}) is not installed"
    return None


def _cuda_flash_missing(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    capability: tuple[int, int],
    family: str,
) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type!r}"
    if not torch.cuda.is_available():
        return "it needs CUDA, and torch finds none"
    if torch.cuda.get_device_capability(device) < capability:
        wanted = ".".join(map(str, capability))
        return f"it needs {family} (compute capability {wanted} or higher), not {_gpu(device)}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16, not {dtype}"
    if head_dim > 256 or head_dim % 8 != 0:
        return f"it needs heads of at most 256 channels, a multiple of 8, not {head_dim}"
    return None


def _gpu(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


_default: str | None = None

_BACKENDS: dict[str, _Backend] = {
    "native": _Backend(_native, _nothing_missing, takes_mask=True),
    "_native_flash": _Backend(_native_flash, _native_flash_missing, takes_mask=False),
    "flash": _Backend(_flash, _flash_missing, takes_mask=False),
    "_flash_3": _Backend(_flash_3, _flash_3_missing, takes_mask=False),
}
