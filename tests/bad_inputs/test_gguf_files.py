"""GGUF files of others that cannot be used: one error each, whatever their numbers claim."""

import struct
from pathlib import Path

import pytest
from bounds import bounded
from raw_weights import gguf, gguf_tensor, gguf_value, sparse, text

from zimage_core.config import CheckpointError
from zimage_core.gguf_file import read_gguf_header

F32, Q4_K, I8 = 0, 12, 24
U32, BOOL, STRING, ARRAY = 4, 7, 8, 9


def array(of: int, count: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IQ", of, count) + raw


def number(value: int) -> bytes:
    return struct.pack("<I", value)


NESTED = b"".join(array(ARRAY, 1) for _ in range(50))
FILES: dict[str, tuple[bytes, str]] = {
    "another magic": (gguf(magic=b"GGML"), "is no GGUF file: it does not start with 'GGUF'"),
    "three bytes": (b"GGU", "is truncated or corrupt: 3 bytes do not hold its header"),
    "the magic alone": (b"GGUF", "is truncated or corrupt: 4 bytes"),
    "version 1": (gguf(version=1), "is GGUF of version 1; allowed: 2, 3"),
    "big-endian": (gguf(version=0x03000000), "(or of big-endian byte order); allowed: 2, 3"),
    "2**63 tensors": (gguf(num_tensors=2**63), "it says that it holds 9,223,372,036,854,775,808 t"),
    "2**64 - 1 values": (gguf(num_values=2**64 - 1), "551,615 entries of metadata"),
    "more tensors than there are": (gguf(num_tensors=100), "do not hold its header"),
    "a text of 2**60 bytes": (
        gguf([struct.pack("<Q", 2**60)]),
        "a text in its header has 1,152,921,504,606,846,976 bytes",
    ),
    "a text past the end": (gguf([struct.pack("<Q", 10_000)]), "is truncated or corrupt"),
    "text that is none": (gguf([gguf_value(b"\xff\xfe", U32, number(1))]), "is no text"),
    "a type that is none": (gguf([gguf_value("a", 99, b"")]), "metadata has a value of type 99"),
    "an array of 2**60 numbers": (
        gguf([gguf_value("a", ARRAY, array(U32, 2**60))]),
        "do not hold its header",
    ),
    "an array of 2**60 texts": (
        gguf([gguf_value("a", ARRAY, array(STRING, 2**60, text("x")))]),
        "an array in its metadata has 1,152,921,504,606,846,976 items",
    ),
    "an array of 2**60 arrays": (
        gguf([gguf_value("a", ARRAY, array(ARRAY, 2**60, array(U32, 0) * 20))]),
        "an array in its metadata has 1,152,921,504,606,846,976 items",
    ),
    "arrays in arrays": (
        gguf([gguf_value("a", ARRAY, NESTED)]),
        "its metadata has a value of type 9",
    ),
    "a key twice": (
        gguf([gguf_value("a", U32, number(1)), gguf_value("a", U32, number(2))]),
        "its metadata holds 'a' twice",
    ),
    "a part of a split file": (
        gguf([gguf_value("split.count", U32, number(3))]),
        "is a part of a file that was split into 3; allowed: one file",
    ),
    "an alignment of 0": (
        gguf([gguf_value("general.alignment", U32, number(0))]),
        "general.alignment is 0",
    ),
    "an alignment of text": (
        gguf([gguf_value("general.alignment", STRING, text("32"))]),
        "general.alignment is '32'",
    ),
    "a huge alignment": (
        gguf([gguf_value("general.alignment", 10, struct.pack("<Q", 2**63))], [
            gguf_tensor("a", [1], F32, 0)
        ], bytes(4)),
        "is truncated: ",
    ),
    "a tensor past the end": (
        gguf(tensors=[gguf_tensor("a", [4], F32, 0)], data=bytes(8)),
        "do not hold tensor 'a', which ends at byte ",
    ),
    "an offset past the end": (
        gguf(tensors=[gguf_tensor("a", [1], F32, 2**60)], data=bytes(4)),
        "do not hold tensor 'a'",
    ),
    "two tensors in one place": (
        gguf(tensors=[gguf_tensor(n, [8], F32, 0) for n in "ab"], data=bytes(64)),
        "cannot be F32 [8] at byte 0",
    ),
    "a tensor twice": (
        gguf(tensors=[gguf_tensor("a", [8], F32, i) for i in (0, 32)], data=bytes(64)),
        "it holds tensor 'a' twice",
    ),
    "a shape whose product overflows": (
        gguf(tensors=[gguf_tensor("a", [2**63, 2**63], F32, 0)], data=bytes(64)),
        "do not hold tensor 'a'",
    ),
    "half a block": (
        gguf(tensors=[gguf_tensor("a", [100], Q4_K, 0)], data=bytes(64)),
        "tensor 'a' cannot be Q4_K [100] at byte 0",
    ),
    "2**31 dimensions": (
        gguf(tensors=[text("a") + struct.pack("<I", 2**31)]),
        "tensor 'a' has 2147483648 dimensions",
    ),
    "a type of integers": (
        gguf(tensors=[gguf_tensor("a", [1], I8, 0)], data=bytes(4)),
        "tensor 'a' is stored as I8; allowed: F32, F16, BF16, Q4_0",
    ),
    "a type of nobody's": (
        gguf(tensors=[gguf_tensor("a", [1], 4000, 0)], data=bytes(4)),
        "tensor 'a' is stored as type 4000; allowed: F32",
    ),
    "another shape before": (
        gguf(
            [gguf_value("comfy.gguf.orig_shape.a", ARRAY, array(U32, 2, number(3) + number(5)))],
            [gguf_tensor("a", [4], F32, 0)],
            bytes(16),
        ),
        "tensor 'a' of shape [4] cannot have had the shape [3, 5]",
    ),
    "a name of 900,000 letters": (
        gguf(tensors=[gguf_tensor("a" * 900_000, [1], F32, 0)], data=bytes(4)),
        "has a tensor whose name has 900,000 characters; allowed: up to 1,000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_file(tmp_path: Path, case: str) -> None:
    content, words = FILES[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with bounded(tmp_path), pytest.raises(CheckpointError) as error:
        read_gguf_header(path)
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)
    assert len(str(error.value)) < 2000


def test_sparse_files(tmp_path: Path) -> None:
    """Zeros without end are valid numbers: of empty texts, of arrays, of tensors without a name."""
    path = tmp_path / "model.gguf"
    for content in (
        gguf(num_values=2**16),
        gguf(num_tensors=2**16),
        gguf([gguf_value("a", ARRAY, array(STRING, 2**40))]),
        gguf([gguf_value("a", ARRAY, array(ARRAY, 2**40))]),
        gguf([gguf_value("a", ARRAY, array(U32, 2**33))]),
    ):
        sparse(path, content, 2**36)
        with bounded(tmp_path), pytest.raises(CheckpointError) as error:
            read_gguf_header(path)
        assert str(error.value).startswith(f"{path}: is corrupt: ")
