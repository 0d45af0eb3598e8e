"""Writing the weight files of a model as they are read, in shards with an index.

The safetensors library writes tensors that are all in memory. Here they pass through it a piece at
a time, so that writing 20 GB takes no more memory than one piece does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from zimage_core.stored_tensor import PLAIN_DTYPES, Weight, WeightReader

SHARD_BYTES = 5_000_000_000
"""Most bytes of tensors in a file; a larger tensor gets one to itself."""

_NAMES = {dtype: name for name, dtype in PLAIN_DTYPES.items()}


def write_weights(
    folder: Path,
    stem: str,
    weights: Mapping[str, Weight],
    dtype: torch.dtype,
    *,
    shard_bytes: int = SHARD_BYTES,
    written: Callable[[int], None] = lambda count: None,
) -> list[Path]:
    """Write tensors as `<stem>.safetensors`, or as numbered shards with their index.

    The same tensors give the same bytes, wherever they were read from.

    Args:
        folder: must exist.
        stem: file name without ending, `diffusion_pytorch_model` or `model`.
        weights: by the name to write, in any order.
        dtype: float32, float16 or bfloat16, to which they are rounded.
        shard_bytes: most bytes of one shard.
        written: is called with every number of bytes that is written.

    Returns:
        The files, the index last.

    Raises:
        CheckpointError: a tensor cannot be read.
        OSError: a file cannot be written.
    """
    sizes = {key: weights[key].num_elements * dtype.itemsize for key in sorted(weights)}
    shards = name_shards(stem, sizes, shard_bytes)
    files = [folder / name for name in shards]
    with WeightReader() as reader:
        for path, keys in zip(files, shards.values(), strict=True):
            with path.open("xb") as file:
                _write_shard(file, {key: weights[key] for key in keys}, dtype, reader, written)
                file.flush()
                os.fsync(file.fileno())
    if len(shards) > 1:
        files.append(write_index(folder, stem, shards, sum(sizes.values())))
    return files


def name_shards(
    stem: str, sizes: Mapping[str, int], shard_bytes: int | None
) -> dict[str, list[str]]:
    """Cut tensors into files, in their order.

    Args:
        stem: of the files' names.
        sizes: bytes of each tensor.
        shard_bytes: most bytes of one file (a larger tensor gets one to itself); None: one file.

    Returns:
        The tensors of each file, by the file's name.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shard_bytes is not None and shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        filled += size
        shards[-1].append(key)
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {
        f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": keys
        for i, keys in enumerate(shards, start=1)
    }


def write_index(folder: Path, stem: str, shards: Mapping[str, list[str]], total_size: int) -> Path:
    """Write the index of shards as `name_shards` names them; returns its path."""
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _write_shard(
    file: BinaryIO,
    weights: Mapping[str, Weight],
    dtype: torch.dtype,
    reader: WeightReader,
    written: Callable[[int], None],
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, weight in weights.items():
        begin, end = end, end + weight.num_elements * dtype.itemsize
        header[key] = {
            "dtype": _NAMES[dtype],
            "shape": list(weight.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    for weight in weights.values():
        for piece in reader.pieces(weight):
            raw = piece.to(dtype).contiguous().view(torch.uint8).numpy()
            file.write(raw.data)
            written(raw.nbytes)
