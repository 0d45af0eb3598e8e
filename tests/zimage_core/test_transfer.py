"""Copies that the host does not wait for: the same numbers, and none before they are there."""

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage_core.transfer import HostCopy, to_device


def test_without_cuda_a_copy_is_there_at_once() -> None:
    tensor = torch.randn(2, 3)
    assert torch.equal(HostCopy(tensor).wait(), tensor)
    assert to_device(tensor, torch.device("cpu")) is tensor
    assert to_device(tensor, torch.device("meta")).device.type == "meta"


class Stream:
    """What CUDA does with what it is asked for: all in order, and only when somebody waits."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.recorded = 0

    def record(self, stream: "Stream") -> None:
        assert stream is self
        self.recorded = len(self.asked)

    def synchronize(self) -> None:
        for work in self.asked[: self.recorded]:
            work()


class Pinned:
    """A tensor in pinned memory, into which CUDA copies."""

    def __init__(self, stream: Stream, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.stream, self.values = stream, torch.zeros(shape, dtype=dtype)

    def copy_(self, source: Any, *, non_blocking: bool) -> None:
        assert non_blocking
        self.stream.asked.append(lambda: self.values.copy_(source.values))

    def clone(self) -> Tensor:
        return self.values.clone()


def test_on_cuda_the_host_waits_for_its_copy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()

    def empty(shape: tuple[int, ...], *, dtype: torch.dtype, pin_memory: bool) -> Pinned:
        assert pin_memory
        return Pinned(stream, shape, dtype)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    values = torch.tensor([1, 2], dtype=torch.uint8)
    on_device: Any = types.SimpleNamespace(
        device=torch.device("cuda"), shape=values.shape, dtype=values.dtype, values=values
    )
    copy = HostCopy(on_device)
    assert len(stream.asked) == 1
    pinned: Any = copy._tensor
    assert not pinned.values.any()  # the device has not come so far
    came = copy.wait()
    assert torch.equal(came, values)
    pinned.values.zero_()  # used again, for the next copy
    assert torch.equal(came, values)


@pytest.mark.parametrize("is_pinned", [False, True])
@pytest.mark.parametrize("can_pin", [False, True])
def test_to_cuda_goes_through_pinned_memory_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_pinned: bool,
    can_pin: bool,
) -> None:
    moved: list[tuple[Tensor, bool]] = []
    plain = torch.empty

    def empty(shape: tuple[int, ...], *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        if not can_pin:
            raise RuntimeError("CUDA error: out of memory")
        return plain(shape, dtype=dtype)

    def to(self: Tensor, device: torch.device, *, non_blocking: bool = False) -> Tensor:
        moved.append((self, non_blocking))
        return self

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: is_pinned)
    monkeypatch.setattr(Tensor, "to", to)
    given = torch.arange(3.0).expand(2, 3)
    to_device(given, torch.device("cuda"))
    ((sent, does_not_wait),) = moved
    assert torch.equal(sent, given)
    assert does_not_wait == (can_pin and not is_pinned)
    assert does_not_wait == (sent is not given)
    assert ("cannot be pinned" in caplog.text) == (not can_pin and not is_pinned)
