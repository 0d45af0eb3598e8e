"""`metadata.parquet`: the current rows of an output in one file, for `datasets` and pandas."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import manifest
from jobs.commits import Listing
from jobs.errors import StorageError
from jobs.storage import Storage

PATH = "metadata.parquet"
TARS_PATH = "tars.txt"
_PARTS_KEY = b"zimage_parts"  # tells whether a crash came between the last commit and this file


def is_current(storage: Storage, listing: Listing) -> bool:
    """Whether the file was written after the last commit. Raises StorageError."""
    if not storage.exists(PATH):
        return not listing.parts
    try:
        # of a local file only the footer is read
        source = storage.root / PATH if storage.root else io.BytesIO(storage.get(PATH) or b"")
        metadata = pq.read_schema(source).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return False
    return bool(metadata.get(_PARTS_KEY) == _parts_digest(listing))


def write_metadata(storage: Storage, listing: Listing) -> int:
    """Write the current rows in index order; returns how many. Raises StorageError.

    Where images lie in tars, `tars.txt` is written too: the tars of current rows, a path a line.

    Rows stream through a temporary file, so that memory does not grow with the job but for the
    names of tars.
    """
    order = sorted(listing.parts)
    if not order:
        return 0
    schema = manifest.unify(listing.schemas())
    schema = schema.with_metadata({**schema.metadata, _PARTS_KEY: _parts_digest(listing)})
    tars: dict[str, None] = {}

    def tables() -> Iterator[pa.Table]:
        for _, table in listing.current_tables(order):
            if "tar" in table.schema.names:
                tars.update(dict.fromkeys(t for t in table["tar"].to_pylist() if t is not None))
            yield manifest.cast(table, schema)

    with _scratch() as folder:
        path = folder / PATH
        rows = manifest.write_tables(path, schema, tables())
        if tars:  # first, so that it is current wherever the other file is
            storage.put(TARS_PATH, "".join(f"{tar}\n" for tar in tars).encode())
        storage.put(PATH, path)
    return rows


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    except OSError as error:
        place = tempfile.gettempdir()
        raise StorageError(
            f"{PATH} is put together in {place}, which cannot be written: {error}; set TMPDIR to "
            "another folder and run again"
        ) from error


def _parts_digest(listing: Listing) -> bytes:
    names = sorted(str(part) for parts in listing.parts.values() for part in parts)
    return hashlib.sha256("\n".join(names).encode()).hexdigest().encode()
