"""Which weight a tensor of an adapter file belongs to, whoever wrote the file.

A key is a module's name and the part that the tensor plays in its change
(`...to_q.lora_A.weight`). Trainers write the name with dots, with underscores or with both mixed,
behind prefixes of their own. A name is therefore never split: every name of the model is written
with underscores only, and so is the key's, and the two are compared. Names of ComfyUI's layout,
which keeps queries, keys and values in one matrix, stand for rows of several weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from zimage_core.lora_deltas import Shape

# What trainers and savers put in front of a name, in underscores; the longer first.
_PREFIXES = (
    "model_diffusion_model_",
    "base_model_model_",
    "lora_transformer_",
    "diffusion_model_",
    "transformer_",
    "lora_unet_",
    "pipe_dit_",
    "lycoris_",
    "model_",
    "unet_",
    "dit_",
)
# Names that some layouts use for a module, by ours; both in underscores, as ends of a name.
_OTHER_NAMES = (
    ("attention_to_out_0", "attention_out"),
    ("attention_to_out_0", "attention_to_out"),
    ("attention_norm_q", "attention_q_norm"),
    ("attention_norm_k", "attention_k_norm"),
)
_FUSED = ("qkv", "to_qkv")

# A name that PEFT gave the adapter, `.lora_A.default.weight`, and the ending, both optional.
_TAIL = r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"
_PARTS = {
    "down": r"(?:\.lora_A|\.lora_down|[._]lora\.down|[._]lora_linear_layer\.down)" + _TAIL,
    "up": r"(?:\.lora_B|\.lora_up|[._]lora\.up|[._]lora_linear_layer\.up)" + _TAIL,
    "up_bias": r"(?:\.lora_B|\.lora_up)(?:\.(?!weight$|bias$)[^.]+)?\.bias",
    "dora": r"(?:\.dora_scale|\.lora_magnitude_vector)" + _TAIL,
    "alpha": r"\.alpha",
    "diff": r"\.(?:diff|w_norm)",
    "diff_bias": r"\.(?:diff_b|b_norm)",
    **{
        name: rf"\.{name}" + _TAIL
        for name in (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        )
    },
}
_KEY = re.compile("(?P<name>.+?)(?:" + "|".join(f"(?P<{p}>{e})" for p, e in _PARTS.items()) + ")$")
_TEXT_ENCODER = re.compile(r"lora_te\d?_|text_encoders?[._]|te\d?[._]|(?:.*[._])?self_attn[._]")


class Place(NamedTuple):
    """A module whose weight is changed, and which rows of the change are its own."""

    module: str
    rows: slice | None = None


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into the name that it has for its module and the part; None for other keys."""
    found = _KEY.match(key)
    if found is None or found.lastgroup is None:
        return None
    return found["name"], found.lastgroup


def is_of_text_encoder(key: str) -> bool:
    """Whether a key without a place in the transformer looks like one for a text encoder."""
    return _TEXT_ENCODER.match(key) is not None


class ModuleNames:
    """The modules of a model that an adapter can change, by every name they go under.

    Args:
        model: its modules with a `weight`; may be on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shapes: dict[str, Shape] = {}
        """Shape of each parameter that can be changed, by its name in the model."""
        for name, module in model.named_modules():
            for kind in ("weight", "bias"):
                parameter = getattr(module, kind, None)
                if name and isinstance(parameter, nn.Parameter):
                    self.shapes[f"{name}.{kind}"] = tuple(parameter.shape)
        modules = [key.removesuffix(".weight") for key in self.shapes if key.endswith(".weight")]
        self._places: dict[str, tuple[Place, ...]] = {_flat(m): (Place(m),) for m in modules}
        assert len(self._places) == len(modules), "two modules differ in dots and dashes alone"
        self._own = frozenset(self._places)
        for name, places in self._aliases():
            self._places.setdefault(name, places)

    def find(self, name: str) -> tuple[str, tuple[Place, ...]] | None:
        """Find what a name in a file stands for.

        Returns:
            One spelling for all spellings of the name, and its places in order of their rows;
            None where it stands for nothing in this model.
        """
        # Old diffusers trainers named the attention's processor, which held the change.
        flat = _flat(name.replace(".processor.", "."))
        while flat not in self._places:
            prefix = next((p for p in _PREFIXES if flat.startswith(p)), None)
            if prefix is None:
                return None
            flat = flat.removeprefix(prefix).lstrip("_")
        return flat, self._places[flat]

    def is_own(self, flat: str) -> bool:
        """Whether a spelling that `find` returned is the model's own name, not another layout's."""
        return flat in self._own

    def owner(self, key: str) -> str | None:
        """Name of the module to which a key belongs whose part is unknown; None for none."""
        pieces = key.split(".")
        for stop in range(len(pieces) - 1, 0, -1):
            found = self.find(".".join(pieces[:stop]))
            if found is not None:
                return found[1][0].module
        return None

    def _aliases(self) -> Iterator[tuple[str, tuple[Place, ...]]]:
        for flat, places in list(self._places.items()):
            for ours, theirs in _OTHER_NAMES:
                if flat.endswith(ours):
                    yield flat.removesuffix(ours) + theirs, places
            if flat.endswith("_to_q"):
                parent = flat.removesuffix("_to_q")
                parts = [self._places.get(f"{parent}_{name}") for name in ("to_q", "to_k", "to_v")]
                modules = [part[0].module for part in parts if part is not None]
                if len(modules) == len(parts):
                    fused = tuple(self._rows(modules))
                    yield from ((f"{parent}_{name}", fused) for name in _FUSED)
        for stem in ("x_embedder", "final_layer"):
            yield from self._without_patch_size(stem)

    def _rows(self, modules: list[str]) -> Iterator[Place]:
        start = 0
        for module in modules:
            stop = start + self.shapes[f"{module}.weight"][0]
            yield Place(module, slice(start, stop))
            start = stop

    def _without_patch_size(self, stem: str) -> Iterator[tuple[str, tuple[Place, ...]]]:
        """`x_embedder` for `all_x_embedder.2-1`, where there is but one patch size."""
        found: dict[str, list[tuple[Place, ...]]] = {}
        for flat, places in self._places.items():
            rest = re.fullmatch(rf"all_{stem}_\d+_\d+(.*)", flat)
            if rest is not None:
                found.setdefault(stem + rest[1], []).append(places)
        yield from ((name, options[0]) for name, options in found.items() if len(options) == 1)


def shape_of(places: tuple[Place, ...], shapes: Mapping[str, Shape], kind: str) -> Shape | None:
    """Shape of the `weight` or `bias` that places form together; None where one has none."""
    found = [shapes.get(f"{place.module}.{kind}") for place in places]
    known = [shape for shape in found if shape is not None]
    if len(known) < len(found):
        return None
    return (sum(shape[0] for shape in known), *known[0][1:])


def _flat(name: str) -> str:
    return re.sub(r"[.\-]", "_", name)
