"""Where a checkpoint comes from and which it is: fetching its folder, hashing its content."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zimage_core.config import CheckpointError
from zimage_core.loader import check_checkpoint, checkpoint_files

# Hashing is bound by the disk; more threads than this only make its heads and queues busier.
_HASH_THREADS = 8

# What loading reads. Repositories also hold example images, which can be large.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]


def ensure_model_weights(
    model_path: Path | str,
    repo_id: str | None = None,
    *,
    source: str = "huggingface",
    revision: str | None = None,
) -> Path:
    """Return a complete checkpoint folder, fetched first if it is not there and may be.

    Any number of processes of a machine may call this at once: downloads lock each file.

    Args:
        model_path: the folder; a download goes into it, and goes on where an earlier one stopped.
        repo_id: repository to fetch from, `Tongyi-MAI/Z-Image-Turbo`; None never fetches.
        source: `huggingface` or `modelscope` (which needs the package of that name).
        revision: branch, tag or commit of the repository; None is its main branch.

    Returns:
        `model_path` as a path.

    Raises:
        FileNotFoundError: no such folder, and no repository to fetch it from.
        CheckpointError: the folder is there but incomplete or broken, and no repository is given;
            the download failed, or what it brought is no complete checkpoint.
        ValueError: `source` is unknown, or its package is not installed.
    """
    if source not in _SOURCES:
        raise ValueError(f"source is {source!r}; allowed: {', '.join(_SOURCES)}")
    path = Path(model_path).expanduser()
    if path.is_dir():
        try:
            check_checkpoint(path)
        except CheckpointError:
            if repo_id is None:
                raise
        else:
            return path
    elif repo_id is None:
        raise FileNotFoundError(
            f"{path}: no such model folder; give the folder of a checkpoint, or a repository to "
            "fetch it from (Tongyi-MAI/Z-Image-Turbo)"
        )
    download = _SOURCES[source]()
    try:
        download(repo_id, path, revision)
    except Exception as error:
        raise CheckpointError(
            f"{path}: fetching {repo_id} from {source} failed: {type(error).__name__}: {error}"
        ) from error
    check_checkpoint(path)
    return path


def weights_fingerprint(model_dir: Path | str) -> str:
    """Identify a checkpoint by content, wherever its folder lies and whatever it is called.

    Every file that loading reads counts, so that a changed configuration or tokenizer changes the
    fingerprint as changed weights do. Reads all of them: tens of seconds for 30 GB.

    Args:
        model_dir: a checkpoint folder.

    Returns:
        `sha256:` and the hash, over the sorted lines `<relative path> NUL <sha256> LF`.

    Raises:
        CheckpointError: a file that loading needs is missing.
        OSError: a file cannot be read.
    """
    root = Path(model_dir)
    files = checkpoint_files(root)
    with ThreadPoolExecutor(min(_HASH_THREADS, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(_sha256, files))
    lines = sorted(
        f"{path.relative_to(root).as_posix()}\0{content}\n"
        for path, content in zip(files, hashes, strict=True)
    )
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_Download = Callable[[str | None, Path, str | None], Any]


def _huggingface() -> _Download:
    from huggingface_hub import snapshot_download

    return lambda repo_id, path, revision: snapshot_download(
        repo_id, revision=revision, local_dir=path, allow_patterns=_PATTERNS
    )


def _modelscope() -> _Download:
    try:
        modelscope = importlib.import_module("modelscope")
    except ImportError as error:
        raise ValueError(
            "source 'modelscope' needs the package modelscope: pip install modelscope"
        ) from error
    return lambda repo_id, path, revision: modelscope.snapshot_download(
        repo_id, revision=revision, local_dir=str(path)
    )


_SOURCES: dict[str, Callable[[], _Download]] = {
    "huggingface": _huggingface,
    "modelscope": _modelscope,
}
