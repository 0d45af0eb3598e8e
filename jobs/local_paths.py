"""What may lie in the place of an output's folders and files on a local disk."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from jobs.errors import StorageUnusableError


def check_folders(uri: str, root: Path) -> None:
    """Say it in plain words where a file is in the way of the output's folder."""
    for path in (root, *root.parents):
        if path.exists():
            if not path.is_dir():
                raise StorageUnusableError(
                    f"output {uri!r} cannot be opened: {path} is a file; allowed: a folder, or a "
                    "path that is not there yet"
                )
            return


def check_kind(uri: str, root: Path | None, path: str) -> None:
    """Refuse a pipe, which waits for a writer for ever, and a device, which has no end.

    Args:
        uri: the output, for messages.
        root: its folder; None where it is an object store.
        path: relative to it.
    """
    if root is None:
        return
    try:
        mode = os.stat(root / path).st_mode  # noqa: PTH116 - of each part of a large output
    except (OSError, ValueError):
        return  # told by who reads it
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise StorageUnusableError(f"{uri}/{path}: is a pipe or device; allowed: a file")
