from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from zimage_core import attention as module
from zimage_core.attention import (
    AttentionBackendError,
    attention,
    attention_backends,
    check_backend,
    resolve_backend,
    set_attention_backend,
)


@pytest.fixture(autouse=True)
def no_default(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ZIMAGE_ATTENTION", raising=False)
    set_attention_backend(None)
    yield
    set_attention_backend(None)


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 40, 4, 16, generator=generator).to(dtype).unbind()
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@pytest.mark.parametrize("backend", ["native", "_native_flash"])
def test_equals_softmax_by_hand(backend: str) -> None:
    q, k, v = qkv()
    torch.testing.assert_close(attention(q, k, v, backend=backend), by_hand(q, k, v))


def test_native_applies_the_mask() -> None:
    q, k, v = qkv()
    mask = torch.arange(40) < torch.tensor([[40], [7]])
    out = attention(q, k, v, mask, backend="native")
    torch.testing.assert_close(out, by_hand(q, k, v, mask))
    alone = attention(q[1:], k[1:, :7], v[1:, :7], backend="native")
    torch.testing.assert_close(out[1:], alone)


@pytest.mark.parametrize("backend", ["_native_flash", "flash", "_flash_3"])
def test_a_mask_is_never_dropped(backend: str) -> None:
    q, k, v = qkv()
    with pytest.raises(AttentionBackendError, match=f"{backend}.*cannot apply a mask"):
        attention(q, k, v, torch.ones(2, 40, dtype=torch.bool), backend=backend)


def test_native_flash_allows_no_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[bool] = []

    def spy(q: Tensor, *args: object, **kwargs: object) -> Tensor:
        enabled.append(torch.backends.cuda.math_sdp_enabled())
        enabled.append(torch.backends.cuda.flash_sdp_enabled())
        return q

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", spy)
    attention(*qkv(), backend="_native_flash")
    assert enabled == [False, True]


def test_argument_before_setting_before_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_backend() == "native"
    monkeypatch.setenv("ZIMAGE_ATTENTION", "flash")
    assert resolve_backend() == "flash"
    set_attention_backend("_native_flash")
    assert resolve_backend() == "_native_flash"
    assert resolve_backend("native") == "native"
    set_attention_backend(None)
    assert resolve_backend() == "flash"


def test_unknown_names_list_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention_backends() == ("native", "_native_flash", "flash", "_flash_3")
    known = "native, _native_flash, flash, _flash_3"
    with pytest.raises(ValueError, match=f"'xformers'.*{known}"):
        set_attention_backend("xformers")
    with pytest.raises(ValueError, match=f"'xformers'.*{known}"):
        attention(*qkv(), backend="xformers")
    with pytest.raises(ValueError, match=f"'xformers'.*{known}"):
        check_backend("xformers", "cpu", torch.float32, 128)
    monkeypatch.setenv("ZIMAGE_ATTENTION", "xformers")
    with pytest.raises(ValueError, match=r"ZIMAGE_ATTENTION: .*'xformers'"):
        resolve_backend()


def pretend(
    monkeypatch: pytest.MonkeyPatch, *, capability: tuple[int, int], packages: tuple[str, ...]
) -> None:
    """Make this machine look as if it had a GPU and some packages."""
    found = {"flash_attn", "flash_attn_interface"} & set(packages)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name in found or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended GPU")


BOTH = ("flash_attn", "flash_attn_interface")


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head_dim", "capability", "packages", "missing"),
    [
        ("flash", "cuda", torch.bfloat16, 128, (9, 0), (), "flash-attn .* is not installed"),
        ("_flash_3", "cuda", torch.bfloat16, 128, (9, 0), (), "FlashAttention 3 .* not installed"),
        ("flash", "cpu", torch.bfloat16, 128, (9, 0), BOTH, "needs a CUDA device, not 'cpu'"),
        ("_flash_3", "cpu", torch.bfloat16, 128, (9, 0), BOTH, "needs a CUDA device, not 'cpu'"),
        ("flash", "cuda", torch.bfloat16, 128, (7, 5), BOTH, r"Ampere.*Pretended GPU \(7.5\)"),
        ("_flash_3", "cuda", torch.bfloat16, 128, (8, 9), BOTH, r"Hopper.*Pretended GPU \(8.9\)"),
        ("_flash_3", "cuda", torch.bfloat16, 128, (10, 0), BOTH, r"Hopper.*\(10.0\)"),
        ("_native_flash", "mps", torch.bfloat16, 128, (9, 0), (), "needs a CUDA device, not 'mps'"),
        ("_native_flash", "cuda", torch.float32, 128, (9, 0), (), "not torch.float32"),
        ("_native_flash", "cuda", torch.float16, 512, (9, 0), (), "at most 256 channels.*512"),
    ],
)
def test_check_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    packages: tuple[str, ...],
    missing: str,
) -> None:
    pretend(monkeypatch, capability=capability, packages=packages)
    with pytest.raises(AttentionBackendError, match=f"'{name}' cannot run here: .*{missing}"):
        check_backend(name, device, dtype, head_dim)


def test_check_without_cuda() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(AttentionBackendError, match="torch finds none"):
        check_backend("_native_flash", "cuda", torch.bfloat16, 128)


@pytest.mark.parametrize("name", ["native", "_native_flash", "flash", "_flash_3"])
def test_check_passes_where_all_is_there(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend(monkeypatch, capability=(9, 0), packages=BOTH)
    check_backend(name, "cuda", torch.bfloat16, 128)


@pytest.mark.parametrize("name", ["native", "_native_flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_runs_what_the_check_allows(name: str, dtype: torch.dtype) -> None:
    check_backend(name, "cpu", dtype, 16)
    assert attention(*qkv(dtype), backend=name).dtype == dtype


@pytest.mark.parametrize(
    ("name", "package", "returns_lse"),
    [("flash", "flash_attn", False), ("_flash_3", "flash_attn_interface", True)],
)
def test_flash_packages_get_tokens_before_heads(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, returns_lse: bool
) -> None:
    fake = ModuleType(package)

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out = by_hand(q, k, v)
        return (out, out[..., 0]) if returns_lse else out

    fake.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, fake)
    q, k, v = qkv()
    torch.testing.assert_close(attention(q, k, v, backend=name), by_hand(q, k, v))
