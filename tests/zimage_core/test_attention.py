from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flash_packages import BACKENDS, MODULES, by_hand, install
from torch import Tensor

from zimage_core import attention as module
from zimage_core import attention_kernels
from zimage_core.attention import (
    AttentionBackendError,
    attention,
    attention_backends,
    best_backend,
    check_backend,
    choose_backend,
    resolve_backend,
    set_attention_backend,
    usable_backends,
)
from zimage_core.padding import padding_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_default(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ZIMAGE_ATTENTION", raising=False)
    set_attention_backend(None)
    module._best_for.cache_clear()
    yield
    set_attention_backend(None)
    module._best_for.cache_clear()


def qkv(dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, 40, 4, 16, generator=generator).to(dtype).unbind()
    return q, k, v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("returns_lse", [False, True], ids=["", "lse"])
def test_equals_softmax_by_hand(
    monkeypatch: pytest.MonkeyPatch, backend: str, returns_lse: bool
) -> None:
    calls = install(monkeypatch, returns_lse=returns_lse)
    q, k, v = qkv()
    torch.testing.assert_close(attention(q, k, v, backend=backend), by_hand(q, k, v))
    expected = [(MODULES[backend], "dense", (2, 40, 4, 16))] if backend in MODULES else []
    assert calls.made == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[40, 7], [1, 40, 13], [40, 40, 39, 2]], ids=str)
def test_padding_is_no_key_and_its_rows_are_zeros(
    monkeypatch: pytest.MonkeyPatch, backend: str, lengths: list[int]
) -> None:
    calls = install(monkeypatch)
    q, k, v = qkv(batch=len(lengths))
    padding = padding_of(lengths, CPU)
    out = attention(q, k, v, padding, backend)
    for i, n in enumerate(lengths):
        alone = by_hand(q[i : i + 1, :n], k[i : i + 1, :n], v[i : i + 1, :n])
        torch.testing.assert_close(out[i : i + 1, :n], alone)
        assert out[i, n:].count_nonzero() == 0
    if backend in MODULES:
        assert calls.made == [(MODULES[backend], "varlen", (sum(lengths), 4, 16))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_lie_otherwise_in_memory(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """The stand-ins refuse what is not contiguous."""
    install(monkeypatch)
    q, k, v = qkv()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for padding in (None, padding_of([40, 7], CPU)):
        out = attention(*strided, padding, backend)
        torch.testing.assert_close(out, attention(q, k, v, padding, backend))
        assert out.flatten(-2).shape == (2, 40, 64)


def test_padding_in_every_form() -> None:
    padding = padding_of([3, 1, 2], CPU)
    assert padding.mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert padding.lengths.tolist() == [3, 1, 2]
    assert padding.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert padding.cu_seqlens.dtype == torch.int32
    assert padding.indices.tolist() == [0, 1, 2, 3, 6, 7]
    x = torch.arange(1, 10).view(3, 3, 1, 1)
    assert padding.pack(x).flatten().tolist() == [1, 2, 3, 4, 7, 8]
    assert padding.unpack(padding.pack(x)).flatten().tolist() == [1, 2, 3, 4, 0, 0, 7, 8, 0]


@pytest.mark.parametrize("padded", [False, True])
def test_native_flash_allows_no_other_kernel(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    enabled: list[bool] = []
    plain = attention_kernels.F.scaled_dot_product_attention

    def spy(*args: Tensor, attn_mask: Tensor | None) -> Tensor:
        assert attn_mask is None
        enabled.append(torch.backends.cuda.math_sdp_enabled())
        enabled.append(torch.backends.cuda.flash_sdp_enabled())
        return plain(*args)

    monkeypatch.setattr(attention_kernels.F, "scaled_dot_product_attention", spy)
    padding = padding_of([40, 7], CPU) if padded else None
    attention(*qkv(), padding, "_native_flash")
    assert enabled == [False, True] * (1 + padded)


@pytest.mark.parametrize("backend", ["_native_flash", "flash", "_flash_3"])
@pytest.mark.parametrize("padded", [False, True])
def test_operators_are_registered_right(
    monkeypatch: pytest.MonkeyPatch, backend: str, padded: bool
) -> None:
    """Schema, fake implementation and strides, as torch itself tests them."""
    install(monkeypatch)
    q, k, v = qkv()
    padding = padding_of([40, 7], CPU)
    dense = {
        "_native_flash": attention_kernels._native_flash,
        "flash": attention_kernels._flash,
        "_flash_3": attention_kernels._flash_3,
    }
    if not padded:
        torch.library.opcheck(dense[backend], (q, k, v))
    elif backend == "_native_flash":
        operator = attention_kernels._native_flash_by_sequence
        torch.library.opcheck(operator, (q, k, v, padding.lengths))
    else:
        packed = tuple(padding.pack(x) for x in (q, k, v))
        varlen = {
            "flash": attention_kernels._flash_varlen,
            "_flash_3": attention_kernels._flash_3_varlen,
        }
        torch.library.opcheck(varlen[backend], (*packed, padding.cu_seqlens, 40))


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
    known = "native, _native_flash, flash, _flash_3, auto"
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
    install(monkeypatch, runnable=False)
    for name in MODULES.values():
        if name not in packages:
            monkeypatch.setitem(sys.modules, name, None)
            monkeypatch.delitem(sys.modules, name)
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
        ("_flash_3", "cuda", torch.bfloat16, 128, (12, 0), BOTH, r"Hopper.*\(12.0\)"),
        ("_flash_3", "cuda", torch.float32, 128, (9, 0), BOTH, "not torch.float32"),
        ("flash", "cuda", torch.float32, 128, (9, 0), BOTH, "not torch.float32"),
        ("flash", "cuda", torch.bfloat16, 260, (9, 0), BOTH, "at most 256 channels.*260"),
        ("flash", "cuda", torch.bfloat16, 60, (9, 0), BOTH, "a multiple of 8, not 60"),
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


@pytest.mark.parametrize(("name", "package"), list(MODULES.items()))
def test_a_package_that_is_broken_is_no_package_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, package: str
) -> None:
    pretend(monkeypatch, capability=(9, 0), packages=())
    file = tmp_path / f"{package}.py"
    file.write_text("raise ImportError('lib.so: undefined symbol: _ZN3c10')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = f"{package}\\) is installed but cannot be imported: ImportError: .*symbol: _ZN3c10"
    with pytest.raises(AttentionBackendError, match=message):
        check_backend(name, "cuda", torch.bfloat16, 128)
    check_backend("native", "cuda", torch.bfloat16, 128)
    assert name not in usable_backends("cuda", torch.bfloat16, 128)
    # Not even looked into where it could not run anyway.
    with pytest.raises(AttentionBackendError, match="needs a CUDA device"):
        check_backend(name, "cpu", torch.bfloat16, 128)


@pytest.mark.parametrize(("name", "package"), list(MODULES.items()))
def test_a_package_without_the_functions_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    pretend(monkeypatch, capability=(9, 0), packages=BOTH)
    monkeypatch.delattr(sys.modules[package], "flash_attn_varlen_func")
    with pytest.raises(AttentionBackendError, match="has no flash_attn_varlen_func"):
        check_backend(name, "cuda", torch.bfloat16, 128)


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "packages", "usable"),
    [
        ("cuda", torch.bfloat16, (9, 0), BOTH, ["_flash_3", "flash", "native", "_native_flash"]),
        ("cuda", torch.bfloat16, (8, 9), BOTH, ["flash", "native", "_native_flash"]),
        ("cuda", torch.bfloat16, (9, 0), BOTH[:1], ["flash", "native", "_native_flash"]),
        ("cuda", torch.bfloat16, (10, 0), BOTH[1:], ["native", "_native_flash"]),
        ("cuda", torch.float32, (9, 0), BOTH, ["native"]),
        ("cuda", torch.bfloat16, (7, 5), BOTH, ["native"]),
        ("cpu", torch.bfloat16, (9, 0), BOTH, ["native", "_native_flash"]),
        ("mps", torch.bfloat16, (9, 0), BOTH, ["native"]),
    ],
)
def test_auto_picks_the_best_that_can_run(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int],
    packages: tuple[str, ...],
    usable: list[str],
) -> None:
    pretend(monkeypatch, capability=capability, packages=packages)
    assert list(usable_backends(device, dtype, 128)) == usable
    assert best_backend(device, dtype, 128) == usable[0]
    assert choose_backend("auto", device, dtype, 128) == usable[0]


def test_environment_before_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_ATTENTION", "_native_flash")
    assert choose_backend("auto", "cpu", torch.float32, 16) == "_native_flash"
    assert choose_backend(None, "cpu", torch.float32, 16) == "_native_flash"
    assert choose_backend("native", "cpu", torch.float32, 16) == "native"
    monkeypatch.setenv("ZIMAGE_ATTENTION", "flash")
    with pytest.raises(AttentionBackendError, match="'flash' cannot run here"):
        choose_backend("auto", "cpu", torch.float32, 16)
    monkeypatch.setenv("ZIMAGE_ATTENTION", "auto")
    assert choose_backend("auto", "cpu", torch.float32, 16) == "native"
    assert choose_backend(None, "cpu", torch.float32, 16) == "native"
    monkeypatch.setenv("ZIMAGE_ATTENTION", "fast")
    with pytest.raises(ValueError, match=r"ZIMAGE_ATTENTION: .*'fast'"):
        choose_backend("auto", "cpu", torch.float32, 16)


def test_auto_for_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch)
    q, k, v = qkv()
    set_attention_backend("auto")
    assert resolve_backend() == "auto"
    torch.testing.assert_close(attention(q, k, v), by_hand(q, k, v))
    assert [name for name, _, _ in calls.made] == ["flash_attn_interface"]
