"""Headers of GGUF files, and their quantised types through the `gguf` package.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts,
metadata as typed key-value pairs, for each tensor its name, dimensions, type and place, then the
tensors, aligned. Dimensions are innermost first: a torch shape reversed, without leading ones.

The header is read here and not by the package's reader, which makes an array object of every entry
of a vocabulary (close to a minute and half a gigabyte for a text encoder) and answers a truncated
file with an IndexError. Block sizes and dequantisation are the package's.
"""

from __future__ import annotations

import math
import mmap
import struct
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zimage_core.config import CheckpointError, shown
from zimage_core.regular_file import open_regular
from zimage_core.stored_tensor import (
    MAX_NAME,
    PLAIN_DTYPES,
    Encoding,
    Shape,
    StoredTensor,
    plain_encoding,
)

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_MAX_DIMS = 8
# Types that the package turns into numbers, in every version that this project takes.
QUANTISED_DTYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M"),
)
# Type numbers of the metadata, with `struct`'s letters.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_KEPT = 16  # longest array whose values are kept: shapes are, vocabularies are not
_MAX_DEPTH = 4
# A vocabulary of 150,000 tokens with its merges makes a header of 6 MB. In a file of gigabytes of
# zeros every number is a valid one, so that the file's size alone bounds nothing.
_MAX_HEADER = 64 * 2**20
_MAX_ENTRIES = 2**16  # of the metadata, and tensors
_MAX_TEXT = 2**20
_MAX_ITEMS = 2**20  # of an array of texts or arrays: each takes time, however short


class GgufHeader(NamedTuple):
    """What a file says of itself: its tensors by name, and its metadata (long arrays as None)."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, Any]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read what a GGUF file holds, and check that it holds all of it.

    Shapes are torch's; a tensor that ComfyUI-GGUF stored in another shape has its original one.

    Raises:
        CheckpointError: the package `gguf` is not installed; or the file is missing, truncated,
            corrupt, a part of a split file, of another version, or holds a type that the package
            cannot turn into numbers.
    """
    _package(path)
    try:
        with (
            open_regular(path) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _read(path, _Cursor(path, data))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: file is missing") from error
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


class _Cursor:
    """A place in the header that never leaves the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise CheckpointError(
                f"{self.path}: is truncated or corrupt: {len(self.data)} bytes do not hold its "
                "header"
            )
        if self.at > _MAX_HEADER:
            raise self.corrupt(f"its header has over {_MAX_HEADER:,} bytes")

    def take(self, count: int) -> bytes:
        begin = self.at
        self.skip(count)
        return self.data[begin : self.at]

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(letter)))[0]

    def text(self) -> str:
        size = self.number("Q")
        if size > _MAX_TEXT:
            raise self.corrupt(f"a text in its header has {size:,} bytes")
        raw = self.take(size)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt(f"{raw[:40]!r} is no text") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > _MAX_DEPTH:
            raise self.corrupt(f"its metadata has a value of type {kind}")
        of, count = self.number("I"), self.number("Q")
        if count <= _MAX_KEPT:
            return [self.value(of, depth + 1) for _ in range(count)]
        if of in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[of]))
            return None
        if count > _MAX_ITEMS:
            raise self.corrupt(f"an array in its metadata has {count:,} items")
        for _ in range(count):
            if of == _STRING:
                self.skip(self.number("Q"))
            else:
                self.value(of, depth + 1)
        return None

    def corrupt(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: is corrupt: {what}")


def _read(path: Path, cursor: _Cursor) -> GgufHeader:
    if cursor.take(4) != MAGIC:
        raise CheckpointError(f"{path}: is no GGUF file: it does not start with {MAGIC.decode()!r}")
    version = cursor.number("I")
    if version not in _VERSIONS:
        order = " (or of big-endian byte order)" if version >> 16 else ""
        raise CheckpointError(
            f"{path}: is GGUF of version {version}{order}; allowed: "
            f"{', '.join(map(str, _VERSIONS))}"
        )
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    for what, count in (("tensors", num_tensors), ("entries of metadata", num_values)):
        if count > _MAX_ENTRIES:
            raise cursor.corrupt(f"it says that it holds {count:,} {what}")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.text()
        if key in metadata:
            raise cursor.corrupt(f"its metadata holds {shown(key)} twice")
        metadata[key] = cursor.value(cursor.number("I"))
    if metadata.get("split.count", 0) not in (0, 1):
        raise CheckpointError(
            f"{path}: is a part of a file that was split into "
            f"{shown(metadata['split.count'])}; allowed: "
            "one file (llama-gguf-split --merge makes one)"
        )
    entries = [_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.corrupt(f"general.alignment is {alignment!r}")
    data = -(-cursor.at // alignment) * alignment

    tensors: dict[str, StoredTensor] = {}
    end = 0
    for name, shape, kind, offset in sorted(entries, key=lambda entry: entry[3]):
        encoding = _encoding(path, name, kind)
        if name in tensors:
            raise cursor.corrupt(f"it holds tensor {shown(name)} twice")
        if offset < end or (shape[-1] if shape else 1) % encoding.block_elements:
            raise cursor.corrupt(
                f"tensor {name!r} cannot be {encoding.name} {list(shape)} at byte {offset}"
            )
        original = metadata.get(_ORIGINAL_SHAPE + name, list(shape))
        if not _is_shape(original) or math.prod(original) != math.prod(shape):
            raise cursor.corrupt(
                f"tensor {name!r} of shape {list(shape)} cannot have had the shape {original!r}, "
                f"as {_ORIGINAL_SHAPE}{name} says"
            )
        tensors[name] = StoredTensor(path, name, encoding, tuple(original), data + offset)
        end = offset + tensors[name].num_bytes
        if data + end > len(cursor.data):
            raise CheckpointError(
                f"{path}: is truncated: {len(cursor.data)} bytes do not hold tensor {name!r}, "
                f"which ends at byte {data + end}"
            )
    return GgufHeader({name: tensors[name] for name, *_ in entries}, metadata)


def _entry(cursor: _Cursor) -> tuple[str, Shape, int, int]:
    name = cursor.text()
    if len(name) > MAX_NAME:
        raise CheckpointError(
            f"{cursor.path}: has a tensor whose name has {len(name):,} characters; allowed: up to "
            f"{MAX_NAME:,}"
        )
    num_dims = cursor.number("I")
    if num_dims > _MAX_DIMS:
        raise cursor.corrupt(f"tensor {name!r} has {num_dims} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(num_dims))[::-1]
    return name, shape, cursor.number("I"), cursor.number("Q")


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(size, int) and size > 0 for size in value)


def _encoding(path: Path, name: str, kind: int) -> Encoding:
    encodings = _encodings()
    if kind in encodings:
        return encodings[kind]
    types = {int(member): member.name for member in _package(path).GGMLQuantizationType}
    raise CheckpointError(
        f"{path}: tensor {name!r} is stored as {types.get(kind, f'type {kind}')}; allowed: "
        f"{', '.join([*PLAIN_DTYPES, *QUANTISED_DTYPES])}"
    )


@cache
def _encodings() -> dict[int, Encoding]:
    import gguf

    found: dict[int, Encoding] = {}
    for kind, (elements, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name in PLAIN_DTYPES:
            found[int(kind)] = plain_encoding(kind.name, PLAIN_DTYPES[kind.name])
        elif kind.name in QUANTISED_DTYPES:
            found[int(kind)] = Encoding(kind.name, elements, size, partial(_dequantise, kind))
    return found


def _dequantise(kind: Any, raw: Tensor) -> Tensor:
    import gguf

    # One row of blocks, since the package loops over rows in Python.
    return torch.from_numpy(gguf.dequantize(raw.numpy()[None], kind)).view(-1)


def _package(path: Path) -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading GGUF files needs the package gguf: pip install 'zimage-batch[gguf]'"
        ) from error
    return gguf
