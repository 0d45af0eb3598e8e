"""Weight files of one model: which there are, and what their headers say.

The format is safetensors: eight bytes with the length of a JSON header, the header (for each tensor
its dtype, shape and place), then the tensors without gaps
(https://github.com/huggingface/safetensors#format). Weights may lie in one file or in numbered
shards with an index. Nothing here reads the weights themselves.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from zimage_core.config import CheckpointError, read_json_object

Shape = tuple[int, ...]

# Bytes an element of the dtypes that weights may have.
_ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
# Longest header that the safetensors library itself accepts.
_MAX_HEADER = 100_000_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MOST_PROBLEMS = 10


class StoredTensor(NamedTuple):
    """A tensor in a file: where it is and what the header says of it."""

    file: Path
    dtype: str
    shape: Shape


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read what a safetensors file holds, and check that it holds all of it.

    Raises:
        CheckpointError: the file is missing, truncated, corrupt, no safetensors file, or holds a
            tensor of a dtype other than float32, float16 and bfloat16.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights themselves")
            if len(start) < 8 or (length <= _MAX_HEADER and length > size - 8):
                raise CheckpointError(f"{path}: is truncated: {size} bytes do not hold its header")
            text = file.read(length) if length <= _MAX_HEADER else b""
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: file is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {
            key: StoredTensor(path, str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for key, entry in header.items()
        }
        places = []
        for key, entry in header.items():
            begin, stop = map(int, entry["data_offsets"])
            places.append((begin, stop, key))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is corrupt, or no safetensors file") from error
    end = 0
    for begin, stop, key in sorted(places):
        _, dtype, shape = tensors[key]
        if dtype not in _ITEM_SIZES:
            raise CheckpointError(
                f"{path}: tensor {key!r} is stored as {dtype}; allowed: {', '.join(_ITEM_SIZES)}"
            )
        if begin != end or stop - begin != math.prod(shape) * _ITEM_SIZES[dtype]:
            raise CheckpointError(
                f"{path}: is corrupt: bytes {begin} to {stop} cannot be those of tensor {key!r}, "
                f"{dtype} {list(shape)}"
            )
        end = stop
    whole = 8 + length + end
    if size != whole:
        state = "truncated" if size < whole else "corrupt"
        raise CheckpointError(f"{path}: is {state}: {size} bytes, but its header says {whole}")
    return tensors


def find_weight_files(folder: Path, stem: str) -> tuple[list[Path], dict[str, str] | None]:
    """Find the weight files of a model.

    Args:
        folder: of the model.
        stem: name of the weight file without its ending, `diffusion_pytorch_model` or `model`.

    Returns:
        The one file and None, or the shards followed by their index and the index's weight map
        (file name by tensor).

    Raises:
        CheckpointError: there are none, some are missing or not listed, both kinds are there, or
            there are only pickles.
    """
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file() and index.is_file():
        raise CheckpointError(f"{folder}: has both {whole.name} and {index.name}; remove one")
    numbered = re.compile(re.escape(stem) + r"-\d+-of-\d+\.safetensors")
    present = sorted(folder.iterdir()) if folder.is_dir() else []
    shards = [path for path in present if numbered.fullmatch(path.name)]
    if whole.is_file():
        refuse_all(f"{path}: is a shard that no index lists" for path in shards)
        return [whole], None
    if not index.is_file():
        pickles = [path.name for path in present if path.suffix in _PICKLES]
        if pickles:
            raise CheckpointError(
                f"{folder / pickles[0]}: is a pickle, which can run code when it is read; weights "
                f"must be safetensors, {whole.name} or {index.name}"
            )
        raise CheckpointError(f"{whole}: file is missing, and so is {index.name}")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map tensors to files")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # A bare name of this folder: an index must not lead anywhere else.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: weight_map names {name!r}; allowed: a .safetensors file in its folder"
            )
    refuse_all(
        [
            f"{path}: is a shard that {index.name} does not list"
            for path in shards
            if path.name not in names
        ]
        + [
            f"{folder / name}: file is missing, which {index.name} lists"
            for name in names
            if not (folder / name).is_file()
        ]
    )
    return [*(folder / name for name in names), index], weight_map


def refuse_all(problems: Iterable[str]) -> None:
    """Raise one `CheckpointError` that tells all problems, or of very many the first.

    Raises:
        CheckpointError: there is any problem.
    """
    found = list(problems)
    if len(found) > _MOST_PROBLEMS:
        found = [*found[:_MOST_PROBLEMS], f"... and {len(found) - _MOST_PROBLEMS} more"]
    if found:
        raise CheckpointError("\n".join(found))
