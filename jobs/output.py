"""An output as a reader sees it: record and listing, opened without touching anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.commits import FOLDER, Listing, PartName
from jobs.epoch import is_alive, newest_claim, read_events
from jobs.errors import InputError, StorageError, StorageUnusableError
from jobs.manifest import TAR_SCHEMA
from jobs.quantities import counted
from jobs.record import PATH, JobRecord, read_record
from jobs.storage import Storage

_MAX_IMAGE_BYTES = 2**30
IMAGE_COLUMNS = ("file_name", "bytes", *TAR_SCHEMA.names)  # for `read_image_bytes`


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
            raise InputError(f"{uri}: {_without_record(storage)}")
        listing = Listing(storage)
        strange = max(listing.parts, default=-1)
        if strange >= record.plan.num_shards:
            raise StorageError(
                f"{uri}/{FOLDER}/{listing.parts[strange][0]}: is of shard {strange}, but {PATH} "
                f"plans shards 0 to {record.plan.num_shards - 1}: one of the two comes from "
                "another output, or from an earlier day"
            )
        most = max(extent.shard_size for extent in record.plan.extents)
        for parts in listing.parts.values():
            for part in parts:
                if part.rows > most or max(part.failed, part.failed_before) > part.rows:
                    raise StorageError(
                        f"{uri}/{FOLDER}/{part}: its name says {part.rows} rows, {part.failed} "
                        f"failed, {part.failed_before} before; allowed: up to {most} rows of a "
                        "shard, and no more failed ones"
                    )
        return cls(storage, record, listing)

    def ok_rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The current rows that have an image, in index order, read lazily.

        Args:
            columns: that a row shall have, beside `index` and `status`.

        Raises:
            StorageError: a part of the manifest is damaged or cannot be read.
        """
        shards = sorted(self.listing.parts)
        for _, table in self.listing.current_tables(shards, ["status", *columns]):
            for row in table.to_pylist():
                if row["status"] == "ok":
                    yield row


def _without_record(storage: Storage) -> str:
    """Words for what lies where an output should be, but has no record."""
    parts = sum(name.endswith(".parquet") for name in storage.names(FOLDER))
    if parts:
        return f"holds {counted(parts, 'part')} of a manifest, but its {PATH} is gone; put it back"
    claim = newest_claim(storage)
    if claim is None:
        return f"has no {PATH}; allowed: the output of a job"
    who = f"the driver on {claim.host.split('/')[0]} (pid {claim.pid}) "
    if is_alive(claim):
        return f"has no {PATH} yet: {who}is starting; wait a moment"
    return f"has no {PATH}: {who}ended before it had planned anything; run the job again"


def stored_path(row: Mapping[str, object]) -> str:
    """The file of the output that holds an `ok` row's image: of its own, or a tar of many."""
    tar = row.get("tar")
    name = row["file_name"] if tar is None else tar
    assert isinstance(name, str)
    return name


def read_image_bytes(storage: Storage, row: Mapping[str, object]) -> bytes | None:
    """The image file of a row, or None where it is missing: the one way for readers to get at it.

    Args:
        row: an `ok` row; `file_name` is looked at, and, where the output has them, `tar`,
            `tar_offset` and `bytes` (`IMAGE_COLUMNS`).

    Raises:
        StorageUnusableError: it may not be read, or the row names something outside the output.
        StorageError: the storage does not answer.
    """
    if not isinstance(row["file_name"], str):
        raise StorageUnusableError(f"{storage.uri}: the row names no file")
    name, offset, size = stored_path(row), row.get("tar_offset"), row.get("bytes")
    if not name or name.startswith("/") or ".." in name.split("/"):
        raise StorageUnusableError(f"{storage.uri}: {name!r}: leads out of the output")
    try:
        if row.get("tar") is None:
            return storage.get(name, most=_MAX_IMAGE_BYTES)
        if (
            not isinstance(offset, int)
            or not isinstance(size, int)
            or min(offset, size) < 0
            or size > _MAX_IMAGE_BYTES
        ):
            raise StorageUnusableError(
                f"{storage.uri}: {name!r}: {size} bytes from {offset} are no part of a tar"
            )
        return storage.get_range(name, offset, size)
    except ValueError as error:  # no path that any storage knows
        raise StorageUnusableError(f"{storage.uri}: {name!r}: {error}") from error


def lost_parts(output: Output) -> list[str]:
    """Parts that the events say were committed, that are gone, and that nothing has replaced.

    Their images are there and count as made by nobody. Raises StorageError.
    """
    names = {str(part) for parts in output.listing.parts.values() for part in parts}
    lost = []
    for event in read_events(output.storage):
        if event["event"] != "commit" or event.get("part") in names:
            continue
        try:
            part = PartName.parse(str(event.get("part")))
        except ValueError as error:
            raise StorageError(f"{output.storage.uri}/events: a commit's part: {error}") from error
        rows = output.listing.state(part.shard).rows
        try:
            complete = rows >= len(output.record.plan.shard(part.shard))
        except KeyError:
            raise StorageError(
                f"{output.storage.uri}/events: a commit's part {part} is of a shard that {PATH} "
                "does not plan: one of the two comes from another output"
            ) from None
        replaced = part.revision == 0 or any(
            other.revision >= part.revision and other.epoch > part.epoch
            for other in output.listing.parts.get(part.shard, ())
        )
        if not (complete and replaced):
            lost.append(str(part))
    return lost
