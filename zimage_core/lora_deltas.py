"""How an adapter changes a weight: the formulas of LoRA, LoHa, LoKr, DoRA and whole differences.

Every change is computed in float32 and belongs to one weight (O, I), O outputs and I inputs, or to
rows of it. Letters in shapes: R rank, and for LoKr A and B the factors of O, C and D those of I.

    LoRA   up @ down                                    https://arxiv.org/abs/2106.09685
    LoHa   (w1_a @ w1_b) * (w2_a @ w2_b)                https://arxiv.org/abs/2108.06098
    LoKr   kron(w1, w2)                                 https://arxiv.org/abs/2309.14859
    DoRA   m * (W + d) / |W + d| - W                    https://arxiv.org/abs/2402.09353
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
# The parts of which a kind consists; LoKr's come whole or in two factors.
_PARTS = {"lora": ("down", "up"), "loha": _LOHA, "diff": ("diff",), "bias": ("diff_bias",)}


class Delta(Protocol):
    """A change of a weight."""

    def compute(self, weight: Tensor, rows: slice | None) -> Tensor:
        """The change, float32 (O, I) on the device of `weight`.

        Args:
            weight: what is changed, as it is without any adapter, float32 (O, I).
            rows: which rows of the change belong to this weight; None for all.
        """
        ...


@dataclass(frozen=True)
class LowRank:
    """LoRA: `scale * up @ down`, up (O, R), down (R, I)."""

    up: Tensor
    down: Tensor
    scale: float

    def compute(self, weight: Tensor, rows: slice | None) -> Tensor:
        """See `Delta.compute`."""
        return (_on(weight, self.up, rows) @ _on(weight, self.down)) * self.scale


@dataclass(frozen=True)
class Hadamard:
    """LoHa: the product, element by element, of two low-rank matrices; w_a (O, R), w_b (R, I)."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float

    def compute(self, weight: Tensor, rows: slice | None) -> Tensor:
        """See `Delta.compute`."""
        first = _on(weight, self.w1_a, rows) @ _on(weight, self.w1_b)
        second = _on(weight, self.w2_a, rows) @ _on(weight, self.w2_b)
        return first * second * self.scale


@dataclass(frozen=True)
class Kronecker:
    """LoKr: `scale * kron(w1, w2)`, w1 (A, C), w2 (B, D), each whole or as two factors."""

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float

    def compute(self, weight: Tensor, rows: slice | None) -> Tensor:
        """See `Delta.compute`."""
        w1, w2 = (
            _on(weight, w[0]) if len(w) == 1 else _on(weight, w[0]) @ _on(weight, w[1])
            for w in (self.w1, self.w2)
        )
        product = torch.kron(w1, w2 * self.scale)
        return product if rows is None else product[rows]


@dataclass(frozen=True)
class Difference:
    """The change itself, of any shape: of a weight, a norm or a bias."""

    difference: Tensor

    def compute(self, weight: Tensor, rows: slice | None) -> Tensor:
        """See `Delta.compute`."""
        return _on(weight, self.difference, rows)


@dataclass(frozen=True)
class Decomposed:
    """DoRA: another change, after which rows (or columns) are brought to learned lengths.

    The difference to the weight is what an adapter's scale multiplies, so that scale 0 is the
    model itself and scale 1 is what was trained.

    Args:
        magnitude: (O, 1), a length for each row, or (1, I), for each column.
    """

    change: Delta
    magnitude: Tensor

    def compute(self, weight: Tensor, rows: slice | None) -> Tensor:
        """See `Delta.compute`."""
        by_row = self.magnitude.shape[1] == 1
        assert by_row or rows is None  # refused when the file was read
        changed = weight + self.change.compute(weight, rows)
        lengths = torch.linalg.vector_norm(changed, dim=1 if by_row else 0, keepdim=True)
        magnitude = _on(weight, self.magnitude, rows if by_row else None)
        # A row of zeros has no direction; it stays one.
        return torch.where(lengths > 0, magnitude / lengths, 0.0) * changed - weight


def kind_of(parts: Collection[str]) -> str:
    """Name the kind of change that parts form: `lora`, `loha`, `lokr`, `diff` or `bias`.

    Raises:
        ValueError: they are of several kinds or of none.
    """
    kinds = [kind for kind, known in _PARTS.items() if any(part in parts for part in known)]
    if any(part.startswith("lokr") for part in parts):
        kinds.append("lokr")
    if len(kinds) > 1 and "bias" in kinds:
        kinds.remove("bias")  # a bias may go with any of them
    if len(kinds) != 1:
        raise ValueError(
            f"its module has parts of {' and '.join(kinds)}; allowed: one of them"
            if kinds
            else "has nothing to go with; allowed: beside a LoRA, LoHa, LoKr or difference"
        )
    return kinds[0]


def missing_parts(kind: str, parts: Collection[str]) -> list[str]:
    """The parts that a kind lacks."""
    if kind != "lokr":
        return [part for part in _PARTS[kind] if part not in parts]
    missing = []
    for name in ("lokr_w1", "lokr_w2"):
        factors = [f"{name}_a", f"{name}_b"]
        if any(factor in parts for factor in factors):
            missing += [factor for factor in factors if factor not in parts]
        elif name not in parts:
            missing.append(name)
    return missing


def plain_shape(shape: Shape) -> Shape:
    """Shape of a matrix that may have been stored as a convolution of size 1, (O, I, 1, 1)."""
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape


def rank_of(kind: str, shapes: Mapping[str, Shape]) -> int | None:
    """R of a change, None where it has none: a whole difference, a LoKr of two whole factors."""
    part = {"lora": "down", "loha": "hada_w1_b"}.get(kind)
    if kind == "lokr":
        part = next((p for p in ("lokr_w1_b", "lokr_w2_b") if p in shapes), None)
    return None if part is None else shapes[part][0]


def misfit(kind: str, shapes: Mapping[str, Shape], target: Shape) -> tuple[str, str] | None:
    """Find the part whose shape does not fit the weight.

    Args:
        kind: as `kind_of` names it.
        shapes: of the parts, as `plain_shape` gives them, none missing.
        target: shape of the weight.

    Returns:
        The part, and what its shape must be in words; None where all fit.
    """
    if kind == "diff":
        return None if shapes["diff"] == target else ("diff", f"must be {list(target)}")
    if len(target) != 2:
        part = next(iter(shapes))
        return part, f"is {kind}, but the weight has shape {list(target)} and takes .diff alone"
    for part, shape in shapes.items():
        if len(shape) != 2 or 0 in shape:
            return part, "must be a matrix, and not an empty one"
    if kind == "lokr":
        return _lokr_misfit(shapes, target)
    rank = rank_of(kind, shapes)
    pairs = [("up", "down")] if kind == "lora" else [_LOHA[:2], _LOHA[2:]]
    for left, right in pairs:
        # The factor on the inputs' side is what says the rank.
        if shapes[right] != (rank, target[1]):
            return right, f"must be {[rank, target[1]]}"
        if shapes[left] != (target[0], rank):
            return left, f"must be {[target[0], rank]}"
    return None


def _lokr_misfit(shapes: Mapping[str, Shape], target: Shape) -> tuple[str, str] | None:
    sizes: list[Shape] = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in shapes:
            if f"{name}_a" in shapes:
                return f"{name}_a", f"is one of two factors of {name}, which is there whole too"
            sizes.append(shapes[name])
            continue
        left, right = shapes[f"{name}_a"], shapes[f"{name}_b"]
        if left[1] != right[0]:
            return f"{name}_b", f"must have {left[1]} rows, the columns of {name}_a"
        sizes.append((left[0], right[1]))
    (a, c), (b, d) = sizes
    if (a * b, c * d) == target:
        return None
    part = "lokr_w2" if "lokr_w2" in shapes else "lokr_w2_a"
    return part, (
        f"gives, with lokr_w1 {[a, c]} and lokr_w2 {[b, d]}, a change of {[a * b, c * d]}; must be "
        f"{list(target)}"
    )


def make_delta(kind: str, tensors: Mapping[str, Tensor], scale: float) -> Delta:
    """Put a change together from parts that were found to fit."""
    if kind == "lora":
        change: Delta = LowRank(tensors["up"], tensors["down"], scale)
    elif kind == "loha":
        w1_a, w1_b, w2_a, w2_b = (tensors[part] for part in _LOHA)
        change = Hadamard(w1_a, w1_b, w2_a, w2_b, scale)
    elif kind == "lokr":
        w1, w2 = (
            (tensors[name],) if name in tensors else (tensors[f"{name}_a"], tensors[f"{name}_b"])
            for name in ("lokr_w1", "lokr_w2")
        )
        change = Kronecker(w1, w2, scale)
    else:
        change = Difference(tensors["diff"])
    return Decomposed(change, tensors["dora"]) if "dora" in tensors else change


def _on(weight: Tensor, tensor: Tensor, rows: slice | None = None) -> Tensor:
    part = tensor if rows is None else tensor[rows]
    return part.to(weight.device, torch.float32)
