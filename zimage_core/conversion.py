"""From checkpoints of any layout to a folder in diffusers' layout."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zimage_core.byte_progress import ByteProgress, byte_size
from zimage_core.checkpoint import Part, Source, find_source, open_checkpoint
from zimage_core.component import Component, holds_model
from zimage_core.config import CheckpointError, read_json_object
from zimage_core.loader import check_checkpoint
from zimage_core.model_kind import KINDS, VISION, Kind
from zimage_core.recognition import describe, refuse_unsupported
from zimage_core.stored_tensor import PLAIN_DTYPES, Weight
from zimage_core.weight_files import open_weight_file
from zimage_core.weight_writer import SHARD_BYTES, write_weights

# What a checkpoint has besides its models, and only a base can give.
_SHARED = ("model_index.json", "scheduler", "tokenizer")
_PROCESSOR = "siglip_processor"
_TEXT_PREFIX = "model."
# Left free on the disk, for the headers and JSON files.
_MARGIN = 64 * 2**20


class Written(NamedTuple):
    """A model that was written: from which file or folder, in which dtype, how many bytes."""

    source: Path
    dtype: str
    num_bytes: int


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        out: the folder.
        models: those that were written, by name.
        missing: what the folder lacks to be a whole checkpoint.
        notes: what a user should know, a sentence each.
    """

    out: Path
    models: Mapping[str, Written]
    missing: tuple[str, ...]
    notes: tuple[str, ...]


class _Model(NamedTuple):
    source: Source
    component: Component
    dtype: torch.dtype

    @property
    def weights(self) -> dict[str, Weight]:
        """By the names to write, also those that this project does not load."""
        every = {**self.component.weights, **self.component.unused}
        prefix = _TEXT_PREFIX if self.source.kind.name == "text_encoder" else ""
        return {prefix + key: weight for key, weight in every.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors once written."""
        return sum(w.num_elements for w in self.weights.values()) * self.dtype.itemsize


def convert_checkpoint(
    source: Path | str,
    out: Path | str,
    *,
    base: Path | str | None = None,
    dtype: torch.dtype | None = None,
    vae: Part = None,
    text_encoder: Part = None,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Write a folder that this project and diffusers load, from files in any layout.

    The folder appears whole or not at all: it is written under another name beside `out`, and
    checked before it is renamed.

    Args:
        source: a single file, from which all models that it holds are taken; the folder of a model;
            or a whole checkpoint, which is then written anew.
        out: the folder to write; must not exist.
        base: a checkpoint that gives the models that are not in `source`, configurations,
            tokenizer and scheduler. Without it only models are written, with the published
            configurations where they have none of their own.
        dtype: of what is written; None keeps the one in which most numbers of a model are stored,
            and is bfloat16 where they are float8 or quantised.
        vae: file or folder to take the autoencoder from.
        text_encoder: file or folder to take the text encoder from.
        shard_bytes: most bytes of tensors in one file.

    Raises:
        CheckpointError: a source is missing, broken, holds no model or one that does not fit its
            configuration.
        FileExistsError: `out` is there already.
        ValueError: `base` is given for a whole checkpoint, or `dtype` is none of float32, float16
            and bfloat16.
        OSError: the disk is too small or cannot be written.
    """
    source, out = Path(source), Path(out)
    if dtype not in (None, *PLAIN_DTYPES.values()):
        allowed = ", ".join(map(str, PLAIN_DTYPES.values()))
        raise ValueError(f"dtype is {dtype}; allowed: {allowed}")
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out}: exists already; allowed: a folder that is yet to be made")
    if (source / "model_index.json").is_file():
        if base is not None:
            raise ValueError(
                f"base is {str(base)!r}, but {source} is a whole checkpoint, which needs none"
            )
        base = source
    root = None if base is None else Path(base)
    parts = _parts(source, root, vae, text_encoder)
    models, notes = _open_models(root, parts, dtype)
    total = sum(model.num_bytes for model in models.values())
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < total + _MARGIN:
        raise OSError(
            f"{parent}: {byte_size(total)} are to be written, but only {byte_size(free)} are free"
        )
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=parent))
    try:
        folder.chmod(0o755)
        with ByteProgress(f"writing {out}", total) as progress:
            for name, model in models.items():
                _write(folder / name, model, shard_bytes, progress)
        if root is not None:
            _copy_shared(root, folder)
            check_checkpoint(folder)
        if out.exists():  # made by another meanwhile; an empty folder would be replaced
            raise FileExistsError(
                f"{out}: exists already; allowed: a folder that is yet to be made"
            )
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    written = {
        name: Written(
            model.source.file or model.source.config.parent,
            str(model.dtype).removeprefix("torch."),
            model.num_bytes,
        )
        for name, model in models.items()
    }
    missing = () if root is not None else (*_SHARED, *(n for n in KINDS if n not in models))
    return Conversion(out, written, missing, notes)


def _parts(source: Path, root: Path | None, vae: Part, text_encoder: Part) -> dict[str, Part]:
    """What each model is taken from; None for what only a base gives."""
    parts: dict[str, Part] = {"transformer": None, "vae": vae, "text_encoder": text_encoder}
    if source == root:
        return parts
    found = _models_in(source, root)
    free = [name for name in found if parts[name] is None]
    if not free:
        raise ValueError(f"{source}: holds only {' and '.join(found)}, which another file gives")
    return parts | dict.fromkeys(free, source)


def _open_models(
    root: Path | None, parts: dict[str, Part], dtype: torch.dtype | None
) -> tuple[dict[str, _Model], tuple[str, ...]]:
    """Check everything that is read; models by name, and notes."""
    sources = {
        name: find_source(kind, root, parts[name])
        for name, kind in KINDS.items()
        if root is not None or parts[name] is not None
    }
    if root is not None:
        checkpoint = open_checkpoint(root, **parts)
        components, notes = checkpoint.components, checkpoint.notes
        if VISION.name in components:
            sources[VISION.name] = find_source(VISION, root, None)
    else:
        components = {name: found.open(found.read_config()) for name, found in sources.items()}
        notes = tuple(note for component in components.values() for note in component.notes)
        notes += tuple(found.note for found in sources.values() if found.is_published)
    return {
        name: _Model(found, components[name], dtype or _stored_dtype(components[name]))
        for name, found in sources.items()
    }, notes


def _models_in(source: Path, root: Path | None) -> list[str]:
    """Names of the models that a file or a model's folder holds."""
    if source.is_dir():
        path = source / "config.json"
        values = read_json_object(path)
        names = [str(values.get("_class_name")), *map(str, values.get("architectures") or [])]
        classes = {"ZImageTransformer2DModel": "transformer", "AutoencoderKL": "vae"}
        classes |= dict.fromkeys(("Qwen3Model", "Qwen3ForCausalLM"), "text_encoder")
        found = [classes[name] for name in names if name in classes]
        if not found:
            raise CheckpointError(f"{path}: is of no model of Z-Image, but of {', '.join(names)}")
        return found
    files = open_weight_file(source)

    def holds(kind: Kind) -> bool:
        return holds_model(kind, find_source(kind, root, source).read_config(), files)

    found = [name for name, kind in KINDS.items() if holds(kind)]
    if not found:
        refuse_unsupported(source, files.tensors)
        raise CheckpointError(
            f"{source}: holds no model of Z-Image; by its tensors it is {describe(files.tensors)}"
        )
    return found


def _stored_dtype(component: Component) -> torch.dtype:
    """The dtype of most numbers of a model; bfloat16 where that is none for weights in memory."""
    counts: dict[str, int] = {}
    for weight in component.weights.values():
        name = weight.stored.dtype if weight.stored.is_plain else "quantised"
        counts[name] = counts.get(name, 0) + weight.num_elements
    return PLAIN_DTYPES.get(max(counts, key=lambda name: counts[name]), torch.bfloat16)


def _write(folder: Path, model: _Model, shard_bytes: int, progress: ByteProgress) -> None:
    folder.mkdir()
    config: dict[str, Any] = read_json_object(model.source.config)
    for key in ("dtype", "torch_dtype"):  # in which transformers loads, unless it is told
        if key in config:
            config[key] = str(model.dtype).removeprefix("torch.")
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    generation = model.source.config.with_name("generation_config.json")
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    write_weights(
        folder,
        model.source.kind.stem,
        model.weights,
        model.dtype,
        shard_bytes=shard_bytes,
        written=progress.add,
    )


def _copy_shared(root: Path, folder: Path) -> None:
    """Copy what is no model: `model_index.json`, and the files of scheduler and tokenizer."""
    for name in (*_SHARED, _PROCESSOR):
        path = root / name
        if name == _PROCESSOR and not path.is_dir():
            continue  # only where pictures are taken
        if path.is_dir():
            (folder / name).mkdir()
            for file in sorted(path.iterdir()):
                if file.is_file() and not file.name.startswith("."):
                    shutil.copyfile(file, folder / name / file.name)
        else:
            shutil.copyfile(path, folder / name)
    for path in folder.rglob("*.json"):
        with path.open("rb") as written:
            os.fsync(written.fileno())
