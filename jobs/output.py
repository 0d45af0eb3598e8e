"""An output as a reader sees it: record and listing, opened without touching anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.commits import FOLDER, Listing, PartName
from jobs.epoch import read_events
from jobs.errors import InputError, StorageError, StorageUnusableError
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
        listing = Listing(storage)
        strange = max(listing.parts, default=-1)
        if strange >= record.plan.num_shards:
            raise StorageError(
                f"{uri}/{FOLDER}/{listing.parts[strange][0]}: is of shard {strange}, but {PATH} "
                f"plans shards 0 to {record.plan.num_shards - 1}: one of the two comes from "
                "another output, or from an earlier day"
            )
        return cls(storage, record, listing)


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


def lost_parts(output: Output) -> list[str]:
    """Parts that the events say were committed, that are gone, and that nothing has replaced.

    Their images are there and count as made by nobody. Raises StorageError.
    """
    names = {str(part) for parts in output.listing.parts.values() for part in parts}
    lost = []
    for event in read_events(output.storage):
        if event["event"] != "commit" or event["part"] in names:
            continue
        part = PartName.parse(event["part"])
        rows = output.listing.state(part.shard).rows
        complete = rows >= len(output.record.plan.shard(part.shard))
        replaced = part.revision == 0 or any(
            other.revision >= part.revision and other.epoch > part.epoch
            for other in output.listing.parts.get(part.shard, ())
        )
        if not (complete and replaced):
            lost.append(event["part"])
    return lost
