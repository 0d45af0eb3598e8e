"""Modules without memory: made on the meta device, to be filled from a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def make_empty(model: type[nn.Module], config: Any) -> nn.Module:
    """Make a module on the meta device: its parameters have shapes and no values."""
    with torch.device("meta"), _NoInitialisation():
        return model(config)


class _NoInitialisation(TorchFunctionMode):
    """Leave out random initialisation: on the meta device it does nothing, but its first use
    imports a second's worth of torch.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
