"""Attention backends: their names, the choice of one, and the one function that calls them.

Which backend runs is decided before any image is made: the model's own choice, else
`set_attention_backend()`, else the environment variable `ZIMAGE_ATTENTION`, else `native`.
A backend that cannot run here raises; none stands in for another, and no mask is dropped. The name
`auto` leaves the choice to `best_backend`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zimage_core import attention_kernels as kernels
from zimage_core import attention_requirements as requirements
from zimage_core.padding import Padding

ENVIRONMENT_VARIABLE = "ZIMAGE_ATTENTION"
DEFAULT_BACKEND = "native"
AUTO = "auto"

# What `auto` tries, the best first; elsewhere than on CUDA all but the last are impossible.
# `_native_flash` is not in it: `native` lets PyTorch choose among that very kernel, cuDNN's and
# the memory-efficient one, so that naming one of them can only be slower.
_PREFERRED = ("_flash_3", "flash", DEFAULT_BACKEND)

# B batch, S tokens, H heads, D channels of one head. All backends take and return (B, S, H, D).
AttentionFunction = Callable[[Tensor, Tensor, Tensor, Padding | None], Tensor]


class AttentionBackendError(RuntimeError):
    """The chosen attention backend cannot run here; the message says what is missing."""


class _Backend(NamedTuple):
    run: AttentionFunction
    missing: Callable[[torch.device, torch.dtype, int], str | None]


_BACKENDS: dict[str, _Backend] = {
    "native": _Backend(kernels.native, requirements.missing_for_native),
    "_native_flash": _Backend(kernels.native_flash, requirements.missing_for_native_flash),
    "flash": _Backend(kernels.flash, requirements.missing_for_flash),
    "_flash_3": _Backend(kernels.flash_3, requirements.missing_for_flash_3),
}
_default: str | None = None


def attention(
    q: Tensor, k: Tensor, v: Tensor, padding: Padding | None = None, backend: str | None = None
) -> Tensor:
    """Softmax attention of `q` over `k` and `v`, scaled by 1 / sqrt(D), not causal.

    Args:
        q: queries, (B, S, H, D), any floating dtype.
        k: keys, same shape and dtype.
        v: values, same shape and dtype.
        padding: which tokens are real: others are no keys, and their rows of the result are zeros.
            None where every token is real: no backend is then given a mask.
        backend: a name of `attention_backends()` or `auto`; None takes the default
            (`resolve_backend`).

    Returns:
        (B, S, H, D) in the dtype of `q`.

    Raises:
        ValueError: `backend` is unknown.
    """
    name = resolve_backend(backend)
    if name == AUTO:
        name = _best_for(q.device, q.dtype, q.shape[-1])
    return _BACKENDS[name].run(q, k, v, padding)


def attention_backends() -> tuple[str, ...]:
    """Names of all backends, whether or not they can run here."""
    return tuple(_BACKENDS)


def set_attention_backend(name: str | None) -> None:
    """Set the backend of every model that has none of its own; None forgets an earlier choice.

    `auto` is chosen anew for each model, by its device and dtype.

    Raises:
        ValueError: `name` is unknown.
    """
    global _default
    _default = None if name is None else _known(name, "set_attention_backend()")


def resolve_backend(name: str | None = None) -> str:
    """Return what `name` stands for: itself, or where None the default in force; maybe `auto`.

    Raises:
        ValueError: the name given, or the one in `ZIMAGE_ATTENTION`, is unknown.
    """
    if name is not None:
        return _known(name, "attention")
    if _default is not None:
        return _default
    return _from_environment() or DEFAULT_BACKEND


def choose_backend(
    name: str | None, device: torch.device | str, dtype: torch.dtype, head_dim: int
) -> str:
    """Name the backend that a model will use, and check that it can run.

    Args:
        name: a name of `attention_backends()`; None is the default in force; `auto` is the backend
            named in `ZIMAGE_ATTENTION` or, where none is, the best one.
        device: where the model will run.
        dtype: of queries, keys and values.
        head_dim: channels of one head.

    Raises:
        AttentionBackendError: the one that is named cannot run; the message says what is missing.
        ValueError: a name is unknown.
    """
    named = resolve_backend(name)
    if named == AUTO:
        named = _from_environment() or AUTO
    if named == AUTO:
        return best_backend(device, dtype, head_dim)
    check_backend(named, device, dtype, head_dim)
    return named


def best_backend(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """Name the best backend that can run: what `auto` stands for.

    On CUDA FlashAttention 3, then 2, where they are installed and fit; else `native`.
    """
    return usable_backends(device, dtype, head_dim)[0]


def usable_backends(
    device: torch.device | str, dtype: torch.dtype, head_dim: int
) -> tuple[str, ...]:
    """Names of the backends that can run, the one that `auto` picks first."""
    device = torch.device(device)
    order = dict.fromkeys((*_PREFERRED, *_BACKENDS))
    return tuple(name for name in order if not _BACKENDS[name].missing(device, dtype, head_dim))


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
    if name not in _BACKENDS:
        raise ValueError(_unknown(name, "attention"))
    missing = _BACKENDS[name].missing(torch.device(device), dtype, head_dim)
    if missing is not None:
        raise AttentionBackendError(f"attention backend {name!r} cannot run here: {missing}")


def _from_environment() -> str | None:
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return _known(name, ENVIRONMENT_VARIABLE) if name else None


def _known(name: str, source: str) -> str:
    if name not in _BACKENDS and name != AUTO:
        raise ValueError(_unknown(name, source))
    return name


def _unknown(name: str, source: str) -> str:
    known = ", ".join((*_BACKENDS, AUTO))
    return f"{source}: unknown attention backend {name!r}; known are {known}"


@functools.cache
def _best_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """For a model that nobody chose a backend for: found once, not in every layer."""
    return choose_backend(AUTO, device, dtype, head_dim)
