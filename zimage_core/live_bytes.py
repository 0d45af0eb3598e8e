"""How many bytes of tensors are alive while code runs, and how many there were at most."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operators make on one kind of device, and that are not gone yet.

    Memory that several tensors share counts once. Inside of an operator nothing is seen, but that
    a convolution is taken to hold its input twice. On the meta device it is an account of what the
    same code would need elsewhere, without needing it.

    Use as a context manager.

    Args:
        device_type: "meta", "cpu" or "cuda".
        known: tensors that do not count, such as weights.
    """

    def __init__(self, device_type: str, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = device_type
        # By the address of the storage's own object, which its tensors share.
        self._sizes: dict[int, int] = {}
        self._is_elsewhere = False
        self.current = 0
        self.peak = 0
        for tensor in known:
            self._remember(tensor.untyped_storage(), 0)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is made in here lies in other memory, and does not count."""
        self._is_elsewhere = True
        try:
            yield
        finally:
            self._is_elsewhere = False

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device_type:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._remember(storage, 0 if self._is_elsewhere else storage.nbytes())
        if function is torch.ops.aten.convolution.default:
            image = args[0]
            if image.device.type == self._device_type:
                # Kernels bring the input into a layout of their own, in memory that is gone after.
                self.peak = max(self.peak, self.current + image.nbytes)
        return result

    def _remember(self, storage: torch.UntypedStorage, size: int) -> None:
        self._sizes[storage._cdata] = size
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, identity: int) -> None:
        self.current -= self._sizes.pop(identity)


class FusedAttention(TorchFunctionMode):
    """Leaves out the scores of attention, which fused kernels never hold in memory whole.

    The meta device has no fused kernel, and would count them. Results have shapes and no values.
    """

    def __torch_function__(
        self,
        function: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return function(*args, **(kwargs or {}))
