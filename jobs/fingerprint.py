"""Content hashes of a checkpoint and of adapters.

Hashing 20 GB takes longer than loading them, so a checkpoint's is computed once on each node and
not again by each worker. Files are taken for unchanged while their path, size and time of
modification are; small checkpoints are hashed each time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from functools import lru_cache
from pathlib import Path

from jobs.node_weights import node_folder, note_read
from zimage_core.checkpoint import named_checkpoint_files
from zimage_core.lora_file import lora_files, lora_fingerprint
from zimage_core.weights import weights_fingerprint

_REMEMBER_FROM = 1_000_000_000  # bytes


def node_fingerprint(model_dir: Path, **parts: Path) -> str:
    """`zimage_core.weights.weights_fingerprint`, remembered in this node's temporary folder.

    Workers that ask at the same time wait for the first of them.

    Args:
        model_dir: the checkpoint's folder.
        parts: what replaces models of it, as `ModelConfig.parts` names them.

    Raises:
        CheckpointError: the folder is no checkpoint.
        OSError: it cannot be read.
    """
    named = named_checkpoint_files(model_dir, **parts)
    stats = [(name, str(path.resolve()), path.stat()) for name, path in named.items()]

    def computed() -> str:
        fingerprint = weights_fingerprint(model_dir, **parts)
        note_read(list(named.values()))
        return fingerprint

    if sum(stat.st_size for *_, stat in stats) < _REMEMBER_FROM:
        return computed()
    folder = node_folder()
    if folder is None:
        return computed()
    key = json.dumps([(*names, stat.st_size, stat.st_mtime_ns) for *names, stat in stats])
    with (folder / f"hash-{hashlib.sha256(key.encode()).hexdigest()}").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = file.read()
        if not known:
            known = computed()
            file.write(known)
        return known


def adapter_fingerprint(path: Path) -> str:
    """`zimage_core.lora_file.lora_fingerprint`, remembered in this process.

    Raises:
        OSError: a file cannot be read.
    """
    stats = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in lora_files(path))
    return _adapter_fingerprint(path, stats)


@lru_cache(maxsize=1024)
def _adapter_fingerprint(path: Path, _: tuple[tuple[int, int], ...]) -> str:
    return lora_fingerprint(path)
