"""What PEFT and diffusers write beside the tensors of an adapter: its strength.

PEFT writes `adapter_config.json` next to `adapter_model.safetensors`; diffusers puts the same keys,
each behind the name of its component, as JSON into the metadata of the file itself. Other trainers
store an `alpha` with each module, or nothing, which means a strength of 1.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from zimage_core.config import CheckpointError, read_json, shown, unrepeated

_Number = TypeVar("_Number", int, float)

METADATA_KEY = "lora_adapter_metadata"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
_MAX_NUMBER = 1e9
_MAX_PATTERNS = 2000
_REPEATED = re.compile(r"[*+{]")
_GROUP_REPEATED = re.compile(r"\)[*+{?]|\(\?")
_TYPES = ("LORA", "LOHA", "LOKR")
# Other ways to begin a training change the model that the adapter is trained for.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "lycoris")


@dataclass(frozen=True)
class AdapterConfig:
    """Strength of an adapter's modules as PEFT defines it; empty where no config was found.

    Args:
        source: the file, or the metadata in it, as errors name it.
        alpha: strength times rank, of all modules that `alpha_pattern` does not name.
        rank: as trained, of all modules that `rank_pattern` does not name.
        alpha_pattern: regular expressions for the end of a module's name.
        rank_pattern: see `alpha_pattern`.
        use_rslora: the strength is alpha / sqrt(rank).
    """

    source: str = ""
    alpha: float | None = None
    rank: int | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    use_rslora: bool = False

    def scale(self, module: str, rank: int | None) -> float:
        """Strength of a module's change.

        Args:
            module: its name in the model.
            rank: of its tensors, None where they do not tell (a LoKr of two whole factors).
        """
        alpha = _of_pattern(self.alpha_pattern, module, self.alpha)
        if rank is None:
            rank = _of_pattern(self.rank_pattern, module, self.rank)
        if alpha is None or rank is None:
            return 1.0
        return float(alpha / (math.sqrt(rank) if self.use_rslora else rank))


def read_config(path: Path, metadata: Mapping[str, str]) -> AdapterConfig:
    """Read the config that belongs to an adapter's file.

    Args:
        path: of the safetensors file.
        metadata: from the file's header.

    Raises:
        CheckpointError: `adapter_config.json` is missing beside PEFT's own file name, cannot be
            read, or asks for what cannot be done here; the key and its value are named.
    """
    if path.name == PEFT_FILE:
        beside = path.with_name(PEFT_CONFIG)
        if not beside.is_file():
            raise CheckpointError(
                f"{path}: {PEFT_CONFIG} is missing beside it, which holds the adapter's strength"
            )
        return _parse(str(beside), read_json(beside))
    if METADATA_KEY not in metadata:
        return AdapterConfig()
    source = f"{path}: metadata {METADATA_KEY}"
    try:
        values = json.loads(metadata[METADATA_KEY], object_pairs_hook=unrepeated)
        if not isinstance(values, dict):
            raise TypeError("no mapping")
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: is no JSON object") from error
    prefix = "transformer."
    own = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    return _parse(source, own)


def _parse(source: str, values: Mapping[str, Any]) -> AdapterConfig:
    _refuse_others(source, values)

    def number(key: str, value: Any) -> float:
        usable = isinstance(value, int | float) and not isinstance(value, bool)
        if not usable or not 0 < value < _MAX_NUMBER:  # false for NaN too
            raise CheckpointError(f"{source}: {key} is {shown(value)}; allowed: a number above 0")
        return float(value)

    def whole(key: str, value: Any) -> int:
        found = number(key, value)
        if not found.is_integer():
            raise CheckpointError(
                f"{source}: {key} is {shown(value)}; allowed: a whole number above 0"
            )
        return int(found)

    def patterns(key: str, read: Callable[[str, Any], _Number]) -> dict[str, _Number]:
        found = values.get(key) or {}
        if not isinstance(found, dict):
            raise CheckpointError(f"{source}: {key} is {shown(found)}; allowed: a mapping")
        if len(found) > _MAX_PATTERNS:
            raise CheckpointError(
                f"{source}: {key} has {len(found):,} entries; allowed: up to {_MAX_PATTERNS:,}"
            )
        for pattern in found:
            _check_pattern(f"{source}: {key}", pattern)
        return {pattern: read(f"{key}.{pattern}", value) for pattern, value in found.items()}

    alpha_key = "lora_alpha" if "lora_alpha" in values else "alpha"
    alpha, rank = values.get(alpha_key), values.get("r")
    return AdapterConfig(
        source=source,
        alpha=None if alpha is None else number(alpha_key, alpha),
        rank=None if rank is None else whole("r", rank),
        alpha_pattern=patterns("alpha_pattern", number),
        rank_pattern=patterns("rank_pattern", whole),
        use_rslora=bool(values.get("use_rslora")),
    )


def _check_pattern(place: str, pattern: str) -> None:
    """Refuse what is no regular expression, and what could take for ever to match."""
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{place}: {shown(pattern)} is no pattern") from error
    # Without a repetition of a group a match takes at most the name's length to the power of the
    # number of repetitions.
    if len(pattern) > 200 or len(_REPEATED.findall(pattern)) > 3 or _GROUP_REPEATED.search(pattern):
        raise CheckpointError(
            f"{place}: {shown(pattern)} could take too long to match; allowed: up to 200 "
            "characters, at most three of * + and {}, and none of them behind a group"
        )


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FutureWarning for odd sets
        return re.compile(rf"(.*\.)?({pattern})$")


def _refuse_others(source: str, values: Mapping[str, Any]) -> None:
    peft_type = values.get("peft_type")
    if peft_type is not None and peft_type not in _TYPES:
        raise CheckpointError(
            f"{source}: peft_type is {shown(peft_type)}; allowed: {', '.join(_TYPES)}"
        )
    start = values.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{source}: init_lora_weights is {shown(start)}: trained for weights that this way "
            "changes; convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    for key in ("fan_in_fan_out", "layer_replication", "alora_invocation_tokens", "use_qalora"):
        if values.get(key):
            raise CheckpointError(f"{source}: {key} is {shown(values[key])}; allowed: none")


def _of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Value of the first pattern that the module's name ends with, as PEFT looks it up."""
    for pattern, value in patterns.items():
        if _compiled(pattern).match(module):
            return value
    return default
