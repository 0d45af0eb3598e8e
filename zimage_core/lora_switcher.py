"""Putting adapters into a model's weights and taking them out again, to the last bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

_MERGEABLE = (torch.bfloat16, torch.float16, torch.float32)


class Adapter(Protocol):
    """What a switcher needs of an adapter; `lora.LoraAdapter` is one."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that it changes."""
        ...

    def delta(self, parameter: str, weight: Tensor) -> Tensor:
        """Its change of a parameter at scale 1, float32; `weight` is the value without any."""
        ...


class LoraSwitcher:
    """The adapters of one model, and which of them are merged into its weights now.

    A weight becomes `W + sum(scale * delta)`, computed in float32 from the model's own W and
    rounded once to the weight's dtype. It is written into the parameter that is there, so that
    compiled code goes on working. W is kept from the first time on that an adapter changes it, so
    that taking adapters out gives back the very same bits, and changing from one to another needs
    no file: this costs as much memory as the weights that are changed.

    A model has one switcher, and nobody else changes its weights meanwhile.

    Args:
        model: the transformer, without adapters.
        adapters: by name.
        keep_on: where W is kept: main memory, or the GPU where it has room to spare and adapters
            change often.

    Raises:
        ValueError: a weight that an adapter changes is quantised.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, Adapter],
        *,
        keep_on: torch.device | str = "cpu",
    ) -> None:
        self.adapters = dict(adapters)
        self._keep_on = keep_on
        self._model = unwrapped(model)
        self._pristine: dict[str, Tensor] = {}
        # What is in each changed parameter; absent: W itself, None: not known, after an error.
        self._merged: dict[str, tuple[tuple[str, float], ...] | None] = {}
        for name, adapter in self.adapters.items():
            for parameter in adapter.parameters:
                self._check_mergeable(name, parameter)

    @torch.no_grad()
    def apply(self, scales: Mapping[str, float]) -> bool:
        """Merge these adapters and no others; an empty mapping is the model itself.

        The order of the names has no part in the result. What is the same as before costs nothing.

        Args:
            scales: by name of the adapter, its strength; 0 is as good as not named.

        Returns:
            Whether any weight was written.

        Raises:
            ValueError: a name that is none of `adapters`, or a scale that is no finite number.
        """
        for name, scale in scales.items():
            if name not in self.adapters:
                known = ", ".join(self.adapters) or "none"
                raise ValueError(f"LoRA {name!r}: unknown; allowed: {known}")
            if not math.isfinite(scale):
                raise ValueError(f"scale of LoRA {name!r} is {scale}; allowed: a finite number")
        wanted: dict[str, list[tuple[str, float]]] = {}
        for name in sorted(name for name, scale in scales.items() if scale != 0):
            for parameter in self.adapters[name].parameters:
                wanted.setdefault(parameter, []).append((name, float(scales[name])))
        wanted |= {parameter: [] for parameter in self._merged if parameter not in wanted}
        changed = [name for name, new in wanted.items() if self._merged.get(name, ()) != tuple(new)]
        for parameter in changed:
            self._merge(parameter, tuple(wanted[parameter]))
        return bool(changed)

    def _merge(self, name: str, adapters: tuple[tuple[str, float], ...]) -> None:
        parameter = self._model.get_parameter(name)
        pristine = self._pristine.get(name)
        if pristine is None:
            pristine = self._pristine[name] = parameter.detach().to(self._keep_on, copy=True)
        assert pristine.dtype == parameter.dtype, "a model keeps its dtype under a switcher"
        weight = pristine.to(parameter.device)
        if adapters:
            own = weight.float()
            total = own.clone()
            for adapter, scale in adapters:
                total += self.adapters[adapter].delta(name, own) * scale
            weight = total
        self._merged[name] = None
        parameter.copy_(weight)
        self._merged[name] = adapters
        if not adapters:
            del self._merged[name]

    def _check_mergeable(self, adapter: str, name: str) -> None:
        parameter = self._model.get_parameter(name)
        # A quantised weight may be a tensor class of its own, or integers: adding to either is no
        # sum of weights.
        if parameter.dtype not in _MERGEABLE or type(parameter.data) is not Tensor:
            raise ValueError(
                f"LoRA {adapter!r}: {name} is stored as {parameter.dtype} "
                f"({type(parameter).__name__}); adapters can be merged only into float32, float16 "
                "or bfloat16 weights: load the model without quantisation"
            )
        if parameter.is_meta:
            raise ValueError(f"LoRA {adapter!r}: {name} is on the meta device, without values")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself where `torch.compile(module)` was given."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner
