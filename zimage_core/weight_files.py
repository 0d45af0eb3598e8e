"""Weight files of one model: which there are, and what their headers say.

Weights lie in one file, safetensors or GGUF, or in a folder as diffusers lays it out: one
safetensors file or numbered shards with an index. Nothing here reads the weights themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_core.config import CheckpointError, read_json_object, shown
from zimage_core.gguf_file import MAGIC as GGUF_MAGIC
from zimage_core.gguf_file import read_gguf_header
from zimage_core.safetensors_file import read_header
from zimage_core.stored_tensor import StoredTensor

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MOST_PROBLEMS = 10
_SHARD = re.compile(r"[^/\\\0]{1,200}\.safetensors")


@dataclass(frozen=True)
class WeightFiles:
    """Weight files of one model, or of several in one file, by their headers.

    Attributes:
        files: those that are read; the index of shards is the last.
        tensors: by the files' own names.
        metadata: of safetensors text by name; of GGUF values of any kind.
    """

    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, Any]


def open_weight_file(path: Path) -> WeightFiles:
    """Read the header of a single file, safetensors or GGUF by its first bytes.

    Raises:
        CheckpointError: the file is missing, a pickle, truncated, corrupt or of an unknown kind.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path}: is a pickle, which can run code when it is read; allowed: .safetensors and "
            ".gguf files"
        )
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: file is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if magic == GGUF_MAGIC or path.suffix.lower() == ".gguf":
        gguf = read_gguf_header(path)
        return WeightFiles((path,), gguf.tensors, gguf.metadata)
    header = read_header(path)
    return WeightFiles((path,), header.tensors, header.metadata)


def open_weight_folder(folder: Path, stem: str) -> WeightFiles:
    """Read the headers of a folder's files, and compare shards with their index.

    Args:
        folder: of one model.
        stem: file name of the weights without ending, `diffusion_pytorch_model` or `model`.

    Raises:
        CheckpointError: see `find_weight_files`; or a file is truncated or corrupt, or does not
            hold the tensors that the index lists there, and no others.
    """
    files, weight_map = find_weight_files(folder, stem)
    problems: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if file.suffix == ".json":
            continue
        header = read_header(file)
        metadata |= header.metadata
        found = header.tensors
        if weight_map is not None:
            listed = {key for key, name in weight_map.items() if name == file.name}
            problems += [
                f"{file}: missing tensor {key!r}, which the index lists there"
                for key in sorted(listed - set(found))
            ]
            problems += [
                f"{file}: unexpected tensor {key!r}, which the index does not list there"
                for key in sorted(set(found) - listed)
            ]
            found = {key: tensor for key, tensor in found.items() if key in listed}
        tensors.update(found)
    refuse_all(problems)
    return WeightFiles(tuple(files), tensors, metadata)


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
        pickles = [path.name for path in present if path.suffix in PICKLE_SUFFIXES]
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
        if not _SHARD.fullmatch(name):
            raise CheckpointError(
                f"{index}: weight_map names {shown(name)}; allowed: a .safetensors file in its "
                "folder"
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
