"""From a repository on a hub to a complete checkpoint folder."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from zimage_core.byte_progress import ByteProgress, byte_size
from zimage_core.checkpoint import Part
from zimage_core.config import CheckpointError
from zimage_core.file_hashes import hash_files
from zimage_core.hub import PARTS_FOLDER, Hub, HubError, RemoteFile, Snapshot
from zimage_core.loader import check_checkpoint
from zimage_core.source_record import SourceRecord, read_record

# What loading reads (`checkpoint.checkpoint_files`). Repositories hold more: example images,
# the same weights in other precisions, tokenizer files that `tokenizer.json` contains.
_NEEDED = re.compile(
    r"model_index\.json"
    r"|scheduler/scheduler_config\.json"
    r"|tokenizer/(tokenizer\.json|tokenizer_config\.json|chat_template\.jinja)"
    r"|(transformer|vae|text_encoder|siglip)/config\.json"
    r"|siglip_processor/preprocessor_config\.json"
    r"|(transformer|vae)/diffusion_pytorch_model(?P<a>-\d+-of-\d+)?\.safetensors(?P<b>\.index\.json)?"
    r"|(text_encoder|siglip)/model(?P<c>-\d+-of-\d+)?\.safetensors(?P<d>\.index\.json)?"
)
_REQUIRED = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
)


def needed_files(paths: Iterable[str]) -> list[str]:
    """Choose the files of a repository that loading reads, sorted.

    Where a model is there in one file and in shards, only the one file is taken.
    """
    found = {path: match for path in paths if (match := _NEEDED.fullmatch(path))}
    whole = {
        path.partition("/")[0]
        for path, match in found.items()
        if path.endswith(".safetensors") and not any(match.groupdict().values())
    }
    return sorted(
        path
        for path, match in found.items()
        if not (path.partition("/")[0] in whole and any(match.groupdict().values()))
    )


def download_checkpoint(
    hub: Hub,
    source: str,
    repo: str,
    revision: str | None,
    folder: Path,
    parts: Mapping[str, Part] | None = None,
) -> SourceRecord:
    """Fetch what is missing of a checkpoint into a folder that this process holds the lock of.

    Files that are there already are kept where their content is the repository's. Others are
    replaced if an earlier download put them there or if they are broken, and are an error if not:
    they may be somebody's own. Weights of models that `parts` replace are left out.

    Returns:
        The record of the folder, complete.

    Raises:
        CheckpointError: the repository is no checkpoint, the disk is too small or fails, a file of
            the folder is another than the repository's, or what arrived does not fit together;
            and see `Hub`.
        OSError: a file that is there cannot be read.
    """
    snapshot = hub.snapshot(repo, revision)
    parts = {name: part for name, part in (parts or {}).items() if part is not None}
    files = [
        file
        for file in _choose(snapshot)
        if file.path.partition("/")[0] not in parts or file.path.endswith("/config.json")
    ]
    record = SourceRecord(repo, source, revision, snapshot.commit)
    missing = _compare(folder, files, ours=read_record(folder) is not None)
    _check_disk(folder, hub, missing)
    record.write(folder)
    if missing:
        total = sum(file.size for file in missing)
        print(
            f"{folder}: fetching {len(missing)} of {len(files)} files, {byte_size(total)}, of "
            f"{record.describe()}",
            file=sys.stderr,
            flush=True,
        )
        stop = threading.Event()
        with ByteProgress(f"fetching {repo}", total) as progress:
            try:
                hub.fetch(snapshot, missing, folder, progress, stop)
            except OSError as error:  # of the disk: a hub's own are HubError
                raise CheckpointError(
                    f"{folder}: cannot be written: {error}; once that is mended, run the same "
                    "again: it goes on"
                ) from error
    try:
        check_checkpoint(folder, **parts)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: holds all of {record.describe()}, but that cannot be loaded:\n{error}"
        ) from error
    record = SourceRecord(
        repo,
        source,
        revision,
        snapshot.commit,
        complete=True,
        files=_describe(folder, files),
    )
    record.write(folder)
    shutil.rmtree(folder / PARTS_FOLDER, ignore_errors=True)
    return record


def _choose(snapshot: Snapshot) -> list[RemoteFile]:
    listed = {file.path: file for file in snapshot.files}
    lacking = [path for path in _REQUIRED if path not in listed]
    if lacking:
        raise HubError(
            f"{snapshot.repo} has no {', no '.join(lacking)}: it is no checkpoint in diffusers' "
            "folder layout; single files are turned into a folder by `zimage weights convert`"
        )
    return [listed[path] for path in needed_files(listed)]


def _compare(folder: Path, files: list[RemoteFile], *, ours: bool) -> list[RemoteFile]:
    """The files that must be fetched."""
    missing, same_size = [], []
    for file in files:
        path = folder / file.path
        if not path.exists():
            missing.append(file)
        elif path.is_file() and path.stat().st_size == file.size:
            same_size.append(file)
        else:
            missing.append(_replaceable(folder, file, ours))
    known = [file for file in same_size if file.check is not None]
    total = sum(file.size for file in known)
    with ByteProgress(f"checking what is in {folder}", total) as progress:
        found = hash_files(
            [(folder / file.path, [file.check[0]]) for file in known if file.check], progress.add
        )
    for file, content in zip(known, found, strict=True):
        if isinstance(content, OSError):
            raise content
        assert file.check is not None
        algorithm, expected = file.check
        if content.hashes[algorithm] != expected:
            missing.append(_replaceable(folder, file, ours))
    return missing


def _replaceable(folder: Path, file: RemoteFile, ours: bool) -> RemoteFile:
    """`file`, if what lies in its place may be overwritten."""
    path = folder / file.path
    if not path.is_file() or not (ours or _is_broken(path)):
        there = byte_size(path.stat().st_size) if path.is_file() else "no file"
        raise CheckpointError(
            f"{path}: is not the repository's {file.path} ({there}, there {byte_size(file.size)}), "
            "and nothing says that it was fetched; move it away, or give another folder"
        )
    print(f"{path}: is not the repository's; replacing it", file=sys.stderr, flush=True)
    return file


def _is_broken(path: Path) -> bool:
    """Whether nothing is lost with a file: a pointer of Git LFS, a truncated or corrupt one."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares its header with its size
                pass
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
    except (SafetensorError, ValueError):
        return True
    return False


def _check_disk(folder: Path, hub: Hub, missing: list[RemoteFile]) -> None:
    needed = sum(max(file.size - hub.partial_bytes(file, folder), 0) for file in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: {needed} bytes ({byte_size(needed)}) must still be fetched, but only "
            f"{free} bytes ({byte_size(free)}) are free on its disk; free some, or give a folder "
            "on another disk"
        )


def _describe(folder: Path, files: list[RemoteFile]) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of each file, from the hub where it says them: those were checked."""
    small = [file for file in files if file.sha256 is None]
    hashed = hash_files([(folder / file.path, ["sha256"]) for file in small])
    sha256 = {file.path: file.sha256 for file in files}
    for file, content in zip(small, hashed, strict=True):
        if isinstance(content, OSError):
            raise content
        sha256[file.path] = content.hashes["sha256"]
    return {file.path: {"size": file.size, "sha256": sha256[file.path] or ""} for file in files}
