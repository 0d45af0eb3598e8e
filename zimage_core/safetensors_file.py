"""Headers of safetensors files, checked against the file's size.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the length of a
JSON header, the header (for each tensor its dtype, shape and place, and `__metadata__`, text by
name), then the tensors without gaps. Nothing here reads a tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from zimage_core.config import CheckpointError, shown, unrepeated
from zimage_core.regular_file import open_regular
from zimage_core.stored_tensor import (
    MAX_NAME,
    PLAIN_DTYPES,
    Encoding,
    StoredTensor,
    plain_encoding,
)

# The longest header that the safetensors library takes.
_MAX_HEADER_ANYWHERE = 100_000_000
# The largest that are in use, of adapters with a record of their training, have a few MB.
_MAX_HEADER = 25_000_000
_MAX_DIMS = 8
_ZIP = b"PK\x03\x04"  # as torch.save writes

FLOAT8_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# Elements and bytes of the smallest whole number of bytes of types that no weight here may have.
_OTHER_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), (1, 8)),
    **dict.fromkeys(("I32", "U32"), (1, 4)),
    **dict.fromkeys(("I16", "U16"), (1, 2)),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), (1, 1)),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), (4, 3)),
    "F4": (2, 1),
}
_ENCODINGS: dict[str, Encoding] = {
    **{n: plain_encoding(n, dtype) for n, dtype in {**PLAIN_DTYPES, **FLOAT8_DTYPES}.items()},
    **{n: Encoding(n, elements, size, None) for n, (elements, size) in _OTHER_SIZES.items()},
}


class SafetensorsHeader(NamedTuple):
    """What a file says of itself: its tensors by name, and its metadata."""

    tensors: dict[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header(path: Path) -> SafetensorsHeader:
    """Read what a safetensors file holds, and check that it holds all of it.

    Stricter than the safetensors library, and the only way in here: no key twice, no overlaps, no
    gaps, every tensor of the size that its dtype and shape say, and exactly as many bytes as that.

    Raises:
        CheckpointError: the file is missing, truncated, corrupt or no safetensors file.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights themselves")
            if start.startswith(_ZIP):
                raise CheckpointError(
                    f"{path}: is a ZIP file, as pickles are, which can run code when they are "
                    "read; allowed: a safetensors file"
                )
            if len(start) < 8 or size - 8 < length <= _MAX_HEADER_ANYWHERE:
                raise CheckpointError(f"{path}: is truncated: {size} bytes do not hold its header")
            if _MAX_HEADER < length <= size - 8:
                raise CheckpointError(
                    f"{path}: its header has {length:,} bytes; allowed: up to {_MAX_HEADER:,}"
                )
            text = file.read(length) if length <= _MAX_HEADER else b""
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: file is missing") from error
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    try:
        header = json.loads(text, object_pairs_hook=unrepeated)
        metadata = {str(key): str(v) for key, v in (header.pop("__metadata__", {}) or {}).items()}
        places = []
        for key, entry in header.items():
            begin, stop = _counts(entry["data_offsets"])
            shape = _counts(entry["shape"])
            if len(shape) > _MAX_DIMS:
                raise ValueError(shape)
            places.append((begin, stop, key, str(entry["dtype"]), shape))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is corrupt, or no safetensors file") from error
    end = 0
    tensors: dict[str, StoredTensor] = {}
    for begin, stop, key, dtype, shape in sorted(places):
        if len(key) > MAX_NAME:
            raise CheckpointError(
                f"{path}: has a tensor whose name has {len(key):,} characters; allowed: up to "
                f"{MAX_NAME:,}"
            )
        encoding = _ENCODINGS.get(dtype)
        if encoding is None:
            raise CheckpointError(
                f"{path}: tensor {shown(key)} is stored as {dtype[:40]}; allowed: "
                f"{', '.join([*PLAIN_DTYPES, *FLOAT8_DTYPES])}"
            )
        blocks = math.prod(shape) * encoding.block_bytes
        if begin != end or (stop - begin) * encoding.block_elements != blocks:
            raise CheckpointError(
                f"{path}: is corrupt: bytes {begin} to {stop} cannot be those of tensor "
                f"{shown(key)}, "
                f"{dtype} {list(shape)}"
            )
        tensors[key] = StoredTensor(path, key, encoding, shape, 8 + length + begin)
        end = stop
    whole = 8 + length + end
    if size != whole:
        state = "truncated" if size < whole else "corrupt"
        raise CheckpointError(f"{path}: is {state}: {size} bytes, but its header says {whole}")
    return SafetensorsHeader({key: tensors[key] for key in header}, metadata)


def _counts(values: list[int]) -> tuple[int, ...]:
    """Whole numbers of a header; JSON has others too, infinity among them."""
    if not isinstance(values, list) or any(
        type(v) is not int or not 0 <= v < 2**63 for v in values
    ):
        raise ValueError(values)
    return tuple(values)
