"""An adapter's file on disk: its tensors by header, its config, its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from zimage_core.config import CheckpointError, shown
from zimage_core.file_hashes import hash_file
from zimage_core.lora_config import PEFT_CONFIG, PEFT_FILE, AdapterConfig, read_config
from zimage_core.lora_deltas import Shape
from zimage_core.safetensors_file import read_header
from zimage_core.weight_files import PICKLE_SUFFIXES

_DTYPES = ("F32", "F16", "BF16", "F64")
_ALPHA_DTYPES = (*_DTYPES, "I64", "I32")  # an alpha that was given as a whole number


@dataclass(frozen=True)
class LoraFile:
    """Header of an adapter's file; no tensor is read yet.

    Args:
        shapes: of all tensors, by key.
        config: what PEFT or diffusers wrote beside them.
    """

    path: Path
    shapes: Mapping[str, Shape]
    config: AdapterConfig

    def read(self, keys: list[str]) -> dict[str, Tensor]:
        """Read tensors to the CPU, in the dtype in which they are stored.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                # Copies: what is used later depends on the file no longer.
                return {key: file.get_tensor(key).clone() for key in keys}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from error


def open_lora(path: Path | str) -> LoraFile:
    """Read the header of an adapter's file, and the config that belongs to it.

    Raises:
        CheckpointError: the file is missing, a pickle, truncated, corrupt, no safetensors file or
            empty, holds numbers that are no floats, or its config cannot be used.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; allowed: a .safetensors file")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path}: is a pickle, which can run code when it is read; allowed: a .safetensors file"
        )
    header = read_header(path)
    shapes: dict[str, Shape] = {}
    for key, stored in header.tensors.items():
        allowed = _ALPHA_DTYPES if key.endswith(".alpha") else _DTYPES
        if stored.dtype not in allowed:
            raise CheckpointError(
                f"{path}: tensor {shown(key)} is stored as {stored.dtype}; allowed: "
                f"{', '.join(allowed)}"
            )
        shapes[key] = stored.shape
    if not shapes:
        raise CheckpointError(f"{path}: holds no tensors")
    return LoraFile(path, shapes, read_config(path, header.metadata))


def lora_files(path: Path | str) -> list[Path]:
    """List the files that loading an adapter reads: PEFT's own has its config beside it."""
    path = Path(path)
    return [path, path.with_name(PEFT_CONFIG)] if path.name == PEFT_FILE else [path]


def lora_fingerprint(path: Path | str) -> str:
    """Hash what loading an adapter reads: `sha256:` and hex.

    The hash is the file's own; where there is a config beside it, one over the hashes of both.

    Raises:
        OSError: a file cannot be read.
    """
    digests = [hash_file(file, ["sha256"]).hashes["sha256"] for file in lora_files(path)]
    if len(digests) > 1:
        digests = [hashlib.sha256(" ".join(digests).encode()).hexdigest()]
    return f"sha256:{digests[0]}"
