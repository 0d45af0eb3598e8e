"""LoRA adapters: from a file of any common trainer to changes of the transformer's weights.

    adapter = load_lora("ink.safetensors", transformer)
    switcher = LoraSwitcher(transformer, {"ink": adapter})
    switcher.apply({"ink": 0.75})

`docs/lora.md` lists the formats. Which weight a tensor belongs to is `lora_names`' part, the
formulas are `lora_deltas`', and weights are changed by `lora_switcher`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from zimage_core.config import CheckpointError, TransformerConfig
from zimage_core.lora_deltas import (
    Delta,
    Difference,
    kind_of,
    make_delta,
    plain_shape,
    rank_of,
)
from zimage_core.lora_file import LoraFile, open_lora
from zimage_core.lora_groups import LoraGroup, ResolvedFile, resolve
from zimage_core.lora_names import ModuleNames, is_of_text_encoder
from zimage_core.lora_switcher import LoraSwitcher, unwrapped
from zimage_core.transformer import ZImageTransformer2DModel

__all__ = [
    "LoraAdapter",
    "LoraReport",
    "LoraSwitcher",
    "check_lora",
    "empty_transformer",
    "load_lora",
]

_KIND_NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "diff": "diff", "bias": "diff"}
_SHOWN_KEYS = 3


@dataclass(frozen=True)
class LoraReport:
    """What an adapter's file holds for a model.

    Args:
        matched: keys that are used.
        unmatched: keys that belong to nothing in the transformer, and are left out.
        redundant: keys that repeat a change under another layout's name, and are left out.
        modules: names of the modules that are changed, in the model's order.
        kinds: `LoRA`, `LoHa`, `LoKr`, `diff`, behind `DoRA ` where lengths are learned, sorted.
        ranks: the smallest and the largest, None where there is none.
    """

    path: Path
    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    redundant: tuple[str, ...]
    modules: tuple[str, ...]
    kinds: tuple[str, ...]
    ranks: tuple[int, int] | None

    def words(self) -> str:
        """One line: what is changed, and how."""
        rank = ""
        if self.ranks is not None:
            low, high = self.ranks
            rank = f" of rank {low}" if low == high else f" of ranks {low} to {high}"
        number = f"{len(self.modules)} module{'s' * (len(self.modules) != 1)}"
        return f"{number} by {', '.join(self.kinds)}{rank}; {len(self.matched)} tensors matched"

    def warnings(self) -> list[str]:
        """One line for each reason why tensors are left out."""
        lines = []
        text = [key for key in self.unmatched if is_of_text_encoder(key)]
        other = [key for key in self.unmatched if not is_of_text_encoder(key)]
        for keys, reason in (
            (other, "match nothing in the transformer"),
            (text, "are for a text encoder, which adapters do not change here"),
            (self.redundant, "repeat others under ComfyUI's names"),
        ):
            if keys:
                shown = ", ".join(keys[:_SHOWN_KEYS]) + ", ..." * (len(keys) > _SHOWN_KEYS)
                total = len(self.matched) + len(self.unmatched) + len(self.redundant)
                lines.append(f"{len(keys)} of {total} tensors {reason} and are left out: {shown}")
        return lines


class LoraAdapter:
    """The changes that a file makes to a transformer, in memory (on the CPU, as stored).

    Args:
        report: what of the file is used.
        changes: by name of the parameter, the change and the rows of it that are the parameter's.
    """

    def __init__(
        self, report: LoraReport, changes: Mapping[str, tuple[Delta, slice | None]]
    ) -> None:
        self.report = report
        self._changes = dict(changes)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that are changed, such as `layers.0.attention.to_q.weight`."""
        return tuple(self._changes)

    @torch.no_grad()
    def delta(self, parameter: str, weight: Tensor) -> Tensor:
        """The change of a parameter at scale 1.

        Args:
            parameter: one of `parameters`.
            weight: its value without any adapter, on which a DoRA's change depends.

        Returns:
            float32, of the shape and on the device of `weight`.
        """
        change, rows = self._changes[parameter]
        return change.compute(weight.float(), rows)


def load_lora(path: Path | str, transformer: nn.Module) -> LoraAdapter:
    """Read an adapter for a transformer, which is not changed.

    Keys that belong to nothing in the transformer are reported and left out
    (`LoraAdapter.report`); what is known to be for one of its modules must be understood.

    Args:
        path: a safetensors file; see `docs/lora.md` for the formats.
        transformer: the model, compiled or not, on any device.

    Raises:
        CheckpointError: the file cannot be read, no key matches, or a tensor's part, partner, shape
            or value is wrong; file and tensor are named, and what it must be.
    """
    file, names = open_lora(path), ModuleNames(unwrapped(transformer))
    resolved = resolve(file, names)
    tensors = file.read([key for group in resolved.groups for key in group.keys.values()])
    changes: dict[str, tuple[Delta, slice | None]] = {}
    for group in resolved.groups:
        parts = {part: tensors[key] for part, key in group.keys.items()}
        changes |= _changes(file, group, parts)
    return LoraAdapter(_report(file, names, resolved), changes)


def check_lora(path: Path | str, transformer: nn.Module) -> LoraReport:
    """Check all that `load_lora` checks but the values, from headers alone.

    Args:
        path: as for `load_lora`.
        transformer: as for `load_lora`; `empty_transformer` will do.

    Raises:
        CheckpointError: see `load_lora`.
    """
    file, names = open_lora(path), ModuleNames(unwrapped(transformer))
    return _report(file, names, resolve(file, names))


def empty_transformer(config: TransformerConfig) -> ZImageTransformer2DModel:
    """Make a transformer without weights, on the meta device: names and shapes for `check_lora`."""
    with torch.device("meta"):
        return ZImageTransformer2DModel(config)


def _changes(
    file: LoraFile, group: LoraGroup, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[Delta, slice | None]]:
    """A change of weights and of biases, by name of the parameter."""
    parts = {part: t.reshape(plain_shape(tuple(t.shape))) for part, t in tensors.items()}
    kind = kind_of(parts)
    rank = rank_of(kind, {part: tuple(t.shape) for part, t in parts.items()})
    scale = _scale(file, group, parts, kind, rank)
    for part, tensor in parts.items():
        if part != "alpha" and not tensor.isfinite().all():
            raise CheckpointError(f"{file.path}: tensor {group.keys[part]!r} holds NaN or infinity")
    if "dora" in parts and parts["dora"].ndim == 1:
        parts["dora"] = parts["dora"][:, None]
    found: dict[str, tuple[Delta, slice | None]] = {}
    if kind != "bias":
        weight = make_delta(kind, parts, scale)
        found |= {f"{place.module}.weight": (weight, place.rows) for place in group.places}
    biases = [
        parts[part].float() * strength
        for part, strength in (("up_bias", scale), ("diff_bias", 1.0))
        if part in parts
    ]
    if biases:
        bias = Difference(sum(biases[1:], start=biases[0]))
        found |= {f"{place.module}.bias": (bias, place.rows) for place in group.places}
    return found


def _scale(
    file: LoraFile, group: LoraGroup, parts: Mapping[str, Tensor], kind: str, rank: int | None
) -> float:
    """Strength of a change: alpha / rank of the file, else of its config, else 1."""
    if kind in ("diff", "bias"):
        return 1.0
    if "alpha" not in parts:
        return file.config.scale(group.places[0].module, rank)
    if rank is None:
        return 1.0  # a LoKr of whole factors has no rank, and an alpha that only says so
    alpha = float(parts["alpha"].double())
    if alpha == 0 or not math.isfinite(alpha):
        raise CheckpointError(
            f"{file.path}: tensor {group.keys['alpha']!r} is {alpha}; allowed: a finite number "
            "other than 0"
        )
    return alpha / rank


def _report(file: LoraFile, names: ModuleNames, resolved: ResolvedFile) -> LoraReport:
    kinds: set[str] = set()
    ranks: list[int] = []
    changed: set[str] = set()
    for group in resolved.groups:
        kind = kind_of(group.keys)
        rank = rank_of(kind, {part: file.shapes[key] for part, key in group.keys.items()})
        ranks += [] if rank is None else [rank]
        kinds.add("DoRA " * ("dora" in group.keys) + _KIND_NAMES[kind])
        changed |= {place.module for place in group.places}
    left_out = {*resolved.unmatched, *resolved.redundant}
    in_order = dict.fromkeys(name.rpartition(".")[0] for name in names.shapes)
    return LoraReport(
        path=file.path,
        matched=tuple(key for key in file.shapes if key not in left_out),
        unmatched=resolved.unmatched,
        redundant=resolved.redundant,
        modules=tuple(module for module in in_order if module in changed),
        kinds=tuple(sorted(kinds)),
        ranks=(min(ranks), max(ranks)) if ranks else None,
    )
