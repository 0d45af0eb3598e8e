"""Safetensors and GGUF files written by hand, so that they can be wrong in any way."""

import json
import struct
from pathlib import Path
from typing import Any


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file.

    Args:
        header: what the JSON says; text or bytes go in as they are.
        length: what the first eight bytes say, if not the header's own length.
    """
    if isinstance(header, str):
        header = header.encode()
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a good file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def entry(dtype: str, shape: object, *offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def sparse(path: Path, content: bytes, size: int) -> None:
    """A file that begins with `content` and is `size` bytes long, without taking them on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.truncate(size)


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf(
    values: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_values: int | None = None,
) -> bytes:
    """A GGUF file of entries that `gguf_value` and `gguf_tensor` make."""
    values, tensors = values or [], tensors or []
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(values) if num_values is None else num_values,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(values + tensors)
    return head + bytes(-len(head) % 32) + data


def gguf_value(key: str | bytes, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def gguf_tensor(name: str | bytes, shape: list[int], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + dims + struct.pack("<IQ", kind, offset)
