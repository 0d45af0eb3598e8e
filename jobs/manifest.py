"""The manifest: one typed row for each sample, in Parquet.

`ManifestRow` is a row before its profile columns; `to_table` gives a table its schema. How rows
become commits is the subject of `commits`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date, datetime
from operator import attrgetter
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.errors import ErrorType
from jobs.part_check import check_size, read_bounded

SCHEMA_VERSION = 1
_UTC = pa.timestamp("us", tz="UTC")

_STR, _I64, _I32, _F64 = pa.string(), pa.int64(), pa.int32(), pa.float64()

# (name, type, nullable), in the order of the file
_COLUMNS: list[tuple[str, pa.DataType, bool]] = [
    ("file_name", _STR, True),
    ("index", _I64, False),
    ("prompt_index", _I64, False),
    ("status", _STR, False),
    ("prompt", _STR, False),
    ("negative_prompt", _STR, True),
    ("seed", _I64, False),
    ("width", _I32, False),
    ("height", _I32, False),
    ("num_inference_steps", _I32, False),
    ("guidance_scale", _F64, False),
    ("model", _STR, False),
    ("model_fingerprint", _STR, False),
    ("loras", _STR, True),
    ("dtype", _STR, False),
    ("attention", _STR, False),
    ("format", _STR, False),
    ("bytes", _I64, True),
    ("sha256", _STR, True),
    ("pixels_sha256", _STR, True),
    ("shard", _I64, False),
    ("revision", _I32, False),
    ("attempt", _STR, False),
    ("batch", pa.list_(_I64), False),
    ("batch_mode", _STR, False),
    ("worker", _STR, False),
    ("node", _STR, False),
    ("device", _STR, False),
    ("seconds", _F64, True),
    ("error_type", _STR, True),
    ("error_message", _STR, True),
    ("created_at", _UTC, False),
]
SCHEMA = pa.schema(
    [pa.field(name, kind, nullable=nullable) for name, kind, nullable in _COLUMNS],
    metadata={"zimage_schema_version": str(SCHEMA_VERSION)},
)
COLUMN_NAMES = tuple(SCHEMA.names)
# Where images lie in tars (`output.layout: webdataset`) these follow, before the profile columns.
# Other outputs do without them, and so do parts without any image.
TAR_SCHEMA = pa.schema([pa.field("tar", _STR), pa.field("tar_offset", _I64)])
# And then, in parts with an image that was made again because it was rejected, the plan's seed.
MOVED_SCHEMA = pa.schema([pa.field("planned_seed", _I64)])
FURTHER = (*TAR_SCHEMA, *MOVED_SCHEMA)
PROFILE_PREFIX = "profile_"
_ROW_GROUP = 50_000

BatchMode = Literal["planned", "halved", "single"]


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """What became of one sample. Field for field the manifest's columns, plus its metadata.

    Args:
        tar: in the webdataset layout, the tar's path in the output; `file_name` is then the
            member's name, and the image the `bytes` bytes of the tar from `tar_offset`.
        planned_seed: what the plan had, where `seed` is another because the image that was there
            before had been rejected.
    """

    file_name: str | None
    index: int
    prompt_index: int
    status: Literal["ok", "failed"]
    prompt: str
    negative_prompt: str | None
    seed: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    model: str
    model_fingerprint: str
    loras: str | None
    dtype: str
    attention: str
    format: str
    bytes: int | None
    sha256: str | None
    pixels_sha256: str | None
    shard: int
    revision: int
    attempt: str
    batch: tuple[int, ...]
    batch_mode: BatchMode
    worker: str
    node: str
    device: str
    seconds: float | None
    error_type: ErrorType | None
    error_message: str | None
    created_at: datetime
    metadata: Mapping[str, object]
    tar: str | None = None
    tar_offset: int | None = None
    planned_seed: int | None = None


assert tuple(f.name for f in fields(ManifestRow)) == (
    *(*COLUMN_NAMES, "metadata", *(field.name for field in FURTHER)),
)


def to_table(rows: Sequence[ManifestRow]) -> pa.Table:
    """Rows as a table: the fixed columns, then `profile_<column>` in order of first appearance."""
    schema = _fixed_schema(
        tars=any(row.tar is not None for row in rows),
        moved=any(row.planned_seed is not None for row in rows),
    )
    values = zip(*map(attrgetter(*schema.names), rows), strict=True) if rows else [()] * len(schema)
    columns = [
        pa.array(column, type=field.type) for column, field in zip(values, schema, strict=True)
    ]
    names = dict.fromkeys(name for row in rows for name in row.metadata)
    for name in names:
        array = _profile_array([row.metadata.get(name) for row in rows])
        columns.append(array)
        schema = schema.append(pa.field(PROFILE_PREFIX + name, array.type, nullable=True))
    return pa.Table.from_arrays(columns, schema=schema)


def unify(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """One schema for several parts: profile columns get the narrowest type that holds them all.

    It has the columns of tars, and that of moved seeds, if one of the parts has.
    """
    profile: dict[str, pa.DataType] = {}
    tars = moved = False
    previous: pa.Schema | None = None
    for schema in schemas:
        if previous is not None and schema.equals(previous):
            continue  # nearly all parts of a job: to look at each field takes long
        previous = schema
        tars |= TAR_SCHEMA.names[0] in schema.names
        moved |= MOVED_SCHEMA.names[0] in schema.names
        for field in schema:
            if field.name.startswith(PROFILE_PREFIX):
                profile[field.name] = _common(profile.get(field.name, pa.null()), field.type)
    result = _fixed_schema(tars=tars, moved=moved)
    for name, kind in profile.items():
        # an all-null column still needs a type that every reader knows
        result = result.append(pa.field(name, pa.string() if pa.types.is_null(kind) else kind))
    return result


def cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with exactly the columns and types of `schema`; absent ones are null."""
    if table.schema.equals(schema):
        return table.replace_schema_metadata(schema.metadata)
    positions = {name: position for position, name in enumerate(table.schema.names)}
    arrays = []
    for field in schema:
        position = positions.get(field.name)
        if position is None:
            arrays.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table.column(position)
        # a cast that changes nothing takes longer than all the rest
        arrays.append(column if column.type == field.type else column.cast(field.type, safe=False))
    return pa.Table.from_arrays(arrays, schema=schema)


def to_parquet(table: pa.Table) -> bytes:
    """A whole Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write many small tables to one Parquet file, in row groups of a good size for readers.

    Args:
        schema: of the file and of each table.

    Returns:
        How many rows there are. No more of them than a row group's are in memory at a time.
    """
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        group: list[pa.Table] = []
        rows = 0
        for table in tables:
            group.append(table)
            rows += table.num_rows
            if rows >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(group))
                count += rows
                group, rows = [], 0
        if group:
            writer.write_table(pa.concat_tables(group))
            count += rows
    return count


def from_parquet(content: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in a Parquet file's bytes; of `columns` those after the fixed ones may be absent.

    Raises:
        pa.ArrowException, OSError: the file is damaged, or holds what no part may: see
            `part_check`.
    """
    # Without threads of Arrow's: parts are small, readers read many of them at once, and a thread
    # that lets go of a Python object while the interpreter ends aborts the process.
    file = pq.ParquetFile(
        pa.BufferReader(content), page_checksum_verification=True, pre_buffer=False
    )
    names = None if not columns else [n for n in columns if n in file.schema_arrow.names]
    table = read_bounded(file, SCHEMA, names, further=FURTHER)
    return table if names is None else table.select(names)


def schema_of(content: bytes) -> pa.Schema:
    """The schema of a part, from its footer alone: its rows are not looked at.

    Raises:
        pa.ArrowException, OSError: the footer is damaged, or has more columns than a part may.
    """
    file = pq.ParquetFile(pa.BufferReader(content), pre_buffer=False)
    check_size(file.metadata)
    return file.schema_arrow


def _fixed_schema(*, tars: bool, moved: bool) -> pa.Schema:
    """All columns before those of profiles."""
    schema = SCHEMA
    for field in [*(TAR_SCHEMA if tars else ()), *(MOVED_SCHEMA if moved else ())]:
        schema = schema.append(field)
    return schema


def _profile_array(values: list[object]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool} or kinds <= {int} or kinds <= {float} or kinds <= {str}:
        return pa.array(values)
    if kinds <= {int, float}:
        return pa.array([None if v is None else float(v) for v in values])  # type: ignore[arg-type]
    if kinds <= {date} or kinds <= {datetime}:
        return pa.array(values)
    return pa.array([None if v is None else str(v) for v in values])


def _common(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    numbers = {pa.int64(), pa.float64()}
    return pa.float64() if {a, b} <= numbers else pa.string()
