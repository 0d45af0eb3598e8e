"""An output as a reader sees it: record and listing, opened without touching anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.commits import Listing
from jobs.errors import InputError, StorageUnusableError
from jobs.record import PATH, JobRecord, read_record
from jobs.storage import Storage


@dataclass(frozen=True)
class Output:
    """What a job has put on storage so far."""

    storage: Storage
    record: JobRecord
    listing: Listing

    @classmethod
    def open(cls, uri: str) -> Output:
        """Open an output for reading.

        Raises:
            InputError: there is no output of a job at `uri`.
            StorageError: it cannot be read.
        """
        if "://" not in uri and not Path(uri).is_dir():
            raise InputError(f"{uri}: no such folder; allowed: the output of a job")
        storage = Storage(uri.rstrip("/") or "/")
        record = read_record(storage)
        if record is None:
            raise InputError(f"{uri}: has no {PATH}; allowed: the output of a job")
        return cls(storage, record, Listing(storage))


def read_image_bytes(storage: Storage, row: Mapping[str, object]) -> bytes | None:
    """The image file of a row, or None where it is missing: the one way for readers to get at it.

    Args:
        row: an `ok` row; `file_name` is looked at.

    Raises:
        StorageUnusableError: it may not be read, or the row names something outside the output.
        StorageError: the storage does not answer.
    """
    name = row["file_name"]
    assert isinstance(name, str)
    if name.startswith("/") or ".." in name.split("/"):
        raise StorageUnusableError(f"{storage.uri}: {name!r}: leads out of the output")
    try:
        return storage.get(name)
    except ValueError as error:  # no path that any storage knows
        raise StorageUnusableError(f"{storage.uri}: {name!r}: {error}") from error
