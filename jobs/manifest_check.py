"""Whether an output's manifest holds together: its parts, their names, the plan and the summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import manifest, metadata_file
from jobs.commits import FOLDER, PartName, read_part
from jobs.output import Output, lost_parts
from jobs.parallel import ordered_map
from jobs.plan import JobPlan

_READERS = 8
_COMPARED = ("index", "status", "revision", "file_name", "prompt", "seed", "sha256")
_OF_IMAGES = ("file_name", "bytes", "sha256", "pixels_sha256")


@dataclass(frozen=True)
class ManifestProblem:
    """A file of the manifest that is not what it should be."""

    file: str
    problem: str


def check_parts(output: Output) -> Iterator[ManifestProblem]:
    """Compare every part with its name and the plan, and look for indices that have two rows.

    Raises:
        StorageError: a part cannot be read.
    """
    plan, listing = output.record.plan, output.listing
    for name in lost_parts(output):
        yield ManifestProblem(f"{FOLDER}/{name}", "was committed and is gone")
    parts = [part for shard in sorted(listing.parts) for part in sorted(listing.parts[shard])]
    seen: dict[tuple[int, int], set[int]] = {}  # by revision and epoch, of one shard
    shard = -1
    tables = ordered_map(lambda part: read_part(output.storage, part), parts, threads=_READERS)
    for part, table in zip(parts, tables, strict=True):
        if part.shard != shard:
            shard, seen = part.shard, {}
        file = f"{FOLDER}/{part}"
        fault = _schema_fault(table.schema)
        if fault is not None:
            yield ManifestProblem(file, fault)
            continue
        for words in _part_faults(part, table, plan):
            yield ManifestProblem(file, words)
        indices = table["index"].to_pylist()
        before = seen.setdefault((part.revision, part.epoch), set())
        twice = before.intersection(indices) or _repeated(indices)
        if twice:
            yield ManifestProblem(file, f"sample {min(twice)} has two rows")
        before.update(indices)


def check_summary(output: Output) -> tuple[list[ManifestProblem], list[str]]:
    """Compare `metadata.parquet` with the parts.

    Returns:
        Problems, and notes: a file that is not written yet is none.
    """
    storage, listing, path = output.storage, output.listing, metadata_file.PATH
    if not listing.parts:
        return [], []
    if not storage.exists(path):
        return [], [f"{path} is not there yet; the next run that ends writes it"]
    if not metadata_file.is_current(storage, listing):
        return [], [f"{path} is older than the last commit; the next run that ends writes it"]
    expected = (
        row
        for _, table in listing.current_tables(sorted(listing.parts), _COMPARED)
        for row in zip(*(table[name].to_pylist() for name in _COMPARED), strict=True)
    )
    source = storage.root / path if storage.root else pa.BufferReader(storage.get(path) or b"")
    try:
        found = _rows(pq.ParquetFile(source))
        for row in expected:
            other = next(found, None)
            if other != row:
                where = "row is missing" if other is None else f"row is of sample {other[0]}"
                if other is not None and other[0] == row[0]:
                    pairs = zip(_COMPARED, row, other, strict=True)
                    where = next(name for name, a, b in pairs if a != b) + " is another one"
                return [ManifestProblem(path, f"sample {row[0]}: {where} than the manifest's")], []
        extra = next(found, None)
    except (pa.ArrowException, OSError, KeyError) as error:
        return [ManifestProblem(path, f"cannot be read: {error}")], []
    if extra is not None:
        return [ManifestProblem(path, f"has a row of sample {extra[0]} too many")], []
    return [], []


def _rows(file: pq.ParquetFile) -> Iterator[tuple[object, ...]]:
    for batch in file.iter_batches(columns=list(_COMPARED), use_threads=False):
        yield from zip(*(batch[name].to_pylist() for name in _COMPARED), strict=True)


def _schema_fault(schema: pa.Schema) -> str | None:
    version = (schema.metadata or {}).get(b"zimage_schema_version")
    if version != str(manifest.SCHEMA_VERSION).encode():
        said = "none" if version is None else version.decode(errors="replace")
        return f"schema version {said}; allowed: {manifest.SCHEMA_VERSION}"
    return None


def _part_faults(part: PartName, table: pa.Table, plan: JobPlan) -> Iterator[str]:
    columns = table.select(["index", "status", "shard", "revision", "error_type", *_OF_IMAGES])
    rows = columns.to_pylist()
    if len(rows) != part.rows:
        yield f"{len(rows)} rows; its name says {part.rows}"
    failed = sum(row["status"] == "failed" for row in rows)
    if failed != part.failed:
        yield f"{failed} failed rows; its name says {part.failed}"
    shard = plan.shard(part.shard)
    for row in rows:
        index = row["index"]
        if not shard.start <= index < shard.stop:
            yield f"sample {index}: shard {shard.id} is {shard.start} to {shard.stop - 1}"
        elif (row["shard"], row["revision"]) != (part.shard, part.revision):
            yield f"sample {index}: shard or revision is not that of the part's name"
        elif row["status"] not in ("ok", "failed"):
            yield f"sample {index}: status {row['status']!r}; allowed: ok, failed"
        elif row["status"] == "ok" and any(row[name] is None for name in _OF_IMAGES):
            yield f"sample {index}: is ok, but file_name, bytes or a hash is null"
        elif row["status"] == "failed" and row["error_type"] is None:
            yield f"sample {index}: is a failed row without an error_type"


def _repeated(indices: list[int]) -> set[int]:
    return {index for index, times in Counter(indices).items() if times > 1}
