"""Tensors as files keep them, and reading them: a piece at a time, into the dtype asked for.

A checkpoint may be twice or four times as large on disk as in memory (float32 on disk, bfloat16 in
memory), or a quarter of it (quantised). So no tensor is ever held whole in the form in which it is
stored: pieces of a few MiB of the memory-mapped file are decoded, cast and put in place, and the
pages are given back to the system.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from zimage_core.config import CheckpointError

_Key = TypeVar("_Key")

Shape = tuple[int, ...]
Decode = Callable[[Tensor], Tensor]

# Characters of a tensor's name. Names are compared in many spellings, which takes time with their
# length; the longest in use have some 150.
MAX_NAME = 1000

# Elements that are decoded at once. Decoding a quantised type makes several temporary arrays, which
# this keeps within a core's cache; a plain cast makes none.
_PIECE = 1 << 20
_QUANTISED_PIECE = 1 << 18
_RELEASED = 1 << 21  # bytes of a file that are read before their pages are given back

# torch warns once in a process of memory that is not writable. Here, since filters of warnings are
# no matter for threads.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    torch.frombuffer(b"\0", dtype=torch.uint8)


class Encoding(NamedTuple):
    """How numbers are stored: blocks of elements, each in so many bytes.

    Attributes:
        name: as the file format calls it, `BF16` or `Q4_K`.
        block_elements: elements of a block; 1 for plain types.
        block_bytes: bytes of a block.
        decode: uint8 (N * block_bytes,) to a floating (N * block_elements,), which may share its
            memory; None for types that no weight may have.
    """

    name: str
    block_elements: int
    block_bytes: int
    decode: Decode | None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where it is and how it is stored.

    Attributes:
        file: the file.
        name: the file's own name of the tensor.
        encoding: how its numbers are stored.
        shape: its shape.
        offset: of its first byte in the file.
        scale: what its numbers are to be multiplied with: one number, or one for each row.
    """

    file: Path
    name: str
    encoding: Encoding
    shape: Shape
    offset: int
    scale: StoredTensor | None = None

    @property
    def dtype(self) -> str:
        """Name of the encoding."""
        return self.encoding.name

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes in the file, without those of the scale."""
        return self.num_elements // self.encoding.block_elements * self.encoding.block_bytes

    @property
    def is_plain(self) -> bool:
        """Whether it is stored in float32, float16 or bfloat16, without a scale."""
        return self.dtype in PLAIN_DTYPES and self.scale is None


# What weights in memory may be, by the name that both safetensors and GGUF use.
PLAIN_DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def plain_encoding(name: str, dtype: torch.dtype) -> Encoding:
    """An encoding that torch has a dtype for."""
    return Encoding(name, 1, dtype.itemsize, lambda raw: raw.view(dtype))


@dataclass(frozen=True)
class Weight:
    """What fills one key of a model: all of a stored tensor, or a run of its elements.

    Attributes:
        stored: the tensor.
        shape: of the model's tensor, whose elements are stored in row-major order.
        start: its first element in `stored`.
    """

    stored: StoredTensor
    shape: Shape
    start: int = 0

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)


class WeightReader:
    """Reads weights; files stay open, mapped into memory, until it is left.

    Use as a context manager.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._unreleased = 0
        self._buffer = torch.empty(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for mapped in self._maps.values():
            # A traceback may still hold a view; the map is then closed when that is gone.
            with contextlib.suppress(BufferError):
                mapped.close()
        self._maps.clear()

    def read(self, weight: Weight, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Read a weight; memory for it and one piece is all that this takes.

        Args:
            weight: what to read; its encoding must have a `decode`.
            dtype: floating; rounded to once, from the numbers as stored or, where they are scaled
                or quantised, from their float32 value.
            device: where it goes; the cast is done there.

        Returns:
            A tensor of `weight.shape` of its own memory.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter since it was checked.
        """
        out = torch.empty(weight.shape, dtype=dtype, device=device)
        flat = out.view(-1)
        done = 0
        for piece in self.pieces(weight):
            flat[done : done + len(piece)].copy_(piece.to(device))
            done += len(piece)
        return out

    def pieces(self, weight: Weight) -> Iterator[Tensor]:
        """Yield a weight's elements in order, flat, in pieces that are good until the next one."""
        stored = weight.stored
        grain, scale = stored.encoding.block_elements, None
        limit = _PIECE if stored.is_plain else _QUANTISED_PIECE
        if stored.scale is not None:
            scale = self.read(
                Weight(stored.scale, (stored.scale.num_elements,)), torch.float32, "cpu"
            )
            if len(scale) > 1:  # pieces of whole rows
                grain = math.lcm(grain, stored.num_elements // len(scale))
        step = max(limit // grain, 1) * grain
        stop = weight.start + weight.num_elements
        for start in range(weight.start, stop, step):
            yield from self._piece(stored, start, min(start + step, stop), scale)

    def _piece(
        self, stored: StoredTensor, start: int, stop: int, scale: Tensor | None
    ) -> Iterator[Tensor]:
        encoding = stored.encoding
        assert encoding.decode is not None
        assert start % encoding.block_elements == stop % encoding.block_elements == 0
        begin = stored.offset + start // encoding.block_elements * encoding.block_bytes
        length = (stop - start) // encoding.block_elements * encoding.block_bytes
        mapped = self._map(stored, begin + length)
        # Nobody writes to it. A private mapping could be written to, but counts against the
        # machine's memory as if it were filled.
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=length, offset=begin)
        if raw.data_ptr() % 8:  # the safetensors format does not ask for alignment
            raw = raw.clone()
        piece = encoding.decode(raw)
        if scale is not None or piece.dtype not in PLAIN_DTYPES.values():  # float8
            numbers = self._scratch(len(piece)).copy_(piece)
            if scale is not None:
                columns = stored.num_elements // len(scale)
                of_rows = scale if len(scale) == 1 else scale[start // columns : stop // columns]
                numbers.view(len(of_rows), -1).mul_(of_rows[:, None])
            piece = numbers
        yield piece
        self._release(mapped, length)

    def _scratch(self, size: int) -> Tensor:
        """Float32 (size,), the same memory each time: new memory costs more than the decoding."""
        if len(self._buffer) < size:
            self._buffer = torch.empty(size)
        return self._buffer[:size]

    def _release(self, mapped: mmap.mmap, length: int) -> None:
        """Give back pages that were read; they stay in the system's cache, not in this process.

        Without it all pages of a file count as this process' memory until the file is closed. All
        of the map is given back, since a fault may bring in pages around the one that is read.
        """
        self._unreleased += length
        if self._unreleased >= _RELEASED and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)
            self._unreleased = 0

    def _map(self, stored: StoredTensor, end: int) -> mmap.mmap:
        mapped = self._maps.get(stored.file)
        try:
            if mapped is None:
                with stored.file.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if hasattr(mmap, "MADV_SEQUENTIAL"):
                    mapped.madvise(mmap.MADV_SEQUENTIAL)
                self._maps[stored.file] = mapped
            size = mapped.size()
        except (OSError, ValueError) as error:  # ValueError: the file is empty
            raise CheckpointError(f"{stored.file}: cannot be read: {error}") from error
        if min(size, len(mapped)) < end:  # reading on would kill the process
            raise CheckpointError(
                f"{stored.file}: is truncated: {size} bytes do not hold tensor {stored.name!r}"
            )
        return mapped


def in_file_order(weights: Iterable[tuple[_Key, Weight]]) -> list[tuple[_Key, Weight]]:
    """Sort keyed weights by their place on disk, so that reading them is sequential."""
    return sorted(weights, key=lambda item: _place(item[1]))


def _place(weight: Weight) -> tuple[str, int, int]:
    return str(weight.stored.file), weight.stored.offset, weight.start
