"""Where a checkpoint folder came from, kept inside it: `.zimage-source.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zimage_core.config import CheckpointError

RECORD_NAME = ".zimage-source.json"
_FORMAT = 1


@dataclass(frozen=True)
class SourceRecord:
    """What was fetched into a folder.

    Attributes:
        repo: repository, `Tongyi-MAI/Z-Image-Turbo`.
        source: `huggingface` or `modelscope`.
        revision: branch, tag or commit that was asked for; None for the main branch.
        commit: what that was at the time; None where the hub does not say.
        complete: every file has arrived and was checked. False while a download is under way or
            was broken off.
        files: each file with `size` in bytes and `sha256` in hex, once complete.
        fetched_at: time of the last change of this record, UTC, ISO 8601.
    """

    repo: str
    source: str
    revision: str | None
    commit: str | None
    complete: bool = False
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    fetched_at: str = ""

    def write(self, folder: Path) -> None:
        """Put the record into a folder, whole or not at all."""
        values = {"format": _FORMAT} | asdict(self)
        values["fetched_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        new = folder / f"{RECORD_NAME}.new"
        new.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        new.replace(folder / RECORD_NAME)

    def describe(self) -> str:
        """`REPO at REVISION (COMMIT), from SOURCE`."""
        commit = f" ({self.commit})" if self.commit and self.commit != self.revision else ""
        return f"{self.repo} at {self.revision or 'its main branch'}{commit}, from {self.source}"


def read_record(folder: Path) -> SourceRecord | None:
    """Read the record of a folder; None where there is none.

    Raises:
        CheckpointError: there is one that cannot be read.
    """
    path = folder / RECORD_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != _FORMAT:
            raise ValueError("it was written by another version")
        record = SourceRecord(**values)
        if not isinstance(record.files, dict) or not isinstance(record.complete, bool):
            raise ValueError("its values are of the wrong types")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as the record of a download: {error}; if the folder is "
            "right, remove this file"
        ) from error
    return record
