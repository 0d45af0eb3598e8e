"""An output as a reader sees it: record and listing, opened without touching anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jobs.commits import Listing
from jobs.errors import InputError
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
