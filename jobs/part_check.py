"""What a part of the manifest may hold, looked at before and after it is read.

An output may be of somebody else's making, and a Parquet file of kilobytes can stand for gigabytes:
one text in a dictionary that a million rows point to. So a part is bounded in rows and in what it
unpacks to, its columns have the manifest's types, and nothing is null that a reader counts on.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MAX_FILE_BYTES = 2**30
MAX_ROWS = 1_000_000
MAX_COLUMNS = 20_000  # a table has at most 2**14, see `prompt_generators.grid`
MAX_UNPACKED_BYTES = 2**29
_SAFE_BYTES = 2**26  # what may come of one column without counting
_YEARS = (1, 9999)  # that Python's dates know


def read_bounded(
    file: pq.ParquetFile,
    schema: pa.Schema,
    columns: Sequence[str] | None,
    *,
    further: Sequence[pa.Field] = (),
) -> pa.Table:
    """Read columns of a part, all if None.

    Args:
        schema: what its first columns must be.
        further: columns that may follow.

    Raises:
        pa.ArrowException, OSError: it is damaged, too large, of another schema, or holds a null or
            a time that may not be.
    """
    described = file.metadata
    check_size(described)
    fault = types_fault(file.schema_arrow, schema, further)
    if fault is not None:
        raise pa.ArrowInvalid(f"{fault}.")
    step = _rows_at_once(described)
    if step >= described.num_rows:
        table = file.read(columns=columns, use_threads=False)
    else:
        table = _read_counting(file, columns, step)
    table.validate(full=True)  # text that is no UTF-8, offsets that lead nowhere
    fault = values_fault(table, schema)
    if fault is not None:
        raise pa.ArrowInvalid(f"{fault}.")
    return table


def check_size(described: pq.FileMetaData) -> None:
    """Refuse a file of more rows, columns or row groups than a part may have.

    Raises:
        pa.ArrowInvalid: it has.
    """
    for what, count, most in (
        ("rows", described.num_rows, MAX_ROWS),
        ("columns", described.num_columns, MAX_COLUMNS),
        ("row groups", described.num_row_groups, MAX_ROWS),
    ):
        if count > most:
            raise pa.ArrowInvalid(f"it has {count:,} {what}; allowed: up to {most:,}.")


def types_fault(
    found: pa.Schema, schema: pa.Schema, further: Sequence[pa.Field] = ()
) -> str | None:
    """Words for the first column that is missing or of another type; None where all is well."""
    for position, field in enumerate(schema):
        here = found.field(position) if position < len(found) else None
        if here is None or here.name != field.name or here.type != field.type:
            said = "missing" if here is None else f"{here.name} ({here.type})"
            return f"column {position} is {said[:200]}; allowed: {field.name} ({field.type})"
    if len(set(found.names)) < len(found):
        twice = next(name for name in found.names if found.names.count(name) > 1)
        return f"column {twice[:200]!r} is there twice"
    for field in further:
        kind = found.field(field.name).type if field.name in found.names else field.type
        if kind != field.type:
            return f"column {field.name} is {str(kind)[:200]}; allowed: {field.type}"
    for field in list(found)[len(schema) :]:
        if not _is_scalar(field.type):
            kind = str(field.type)[:200]
            return f"column {field.name[:200]!r} is {kind}; allowed: text, numbers, booleans, times"
    return None


def values_fault(table: pa.Table, schema: pa.Schema) -> str | None:
    """Words for the first null or time that may not be; None where all is well."""
    for name in table.schema.names:
        column = table[name]
        position = schema.get_field_index(name)
        if position >= 0 and not schema.field(position).nullable and column.null_count:
            return f"column {name} holds null"
        if name == "index" and (pc.min(column).as_py() or 0) < 0:
            return f"column {name} holds a number below 0"
        if not (pa.types.is_timestamp(column.type) or pa.types.is_date(column.type)):
            continue
        ends = pc.min_max(pc.year(column)).as_py()
        if ends["min"] is not None and not _YEARS[0] <= ends["min"] <= ends["max"] <= _YEARS[1]:
            return f"column {name!r} holds a time of the year {ends['min']} or {ends['max']}"
    return None


def _is_scalar(kind: pa.DataType) -> bool:
    types = pa.types
    checks = (types.is_string, types.is_integer, types.is_floating, types.is_boolean)
    times = (types.is_timestamp, types.is_date, types.is_null)
    return any(check(kind) for check in (*checks, *times))


def _rows_at_once(described: pq.FileMetaData) -> int:
    """Rows whose columns cannot come to more than `_SAFE_BYTES` each, whatever is in them."""
    largest = 1
    total = 0
    for group in range(described.num_row_groups):
        chunks = described.row_group(group)
        for number in range(chunks.num_columns):
            size = chunks.column(number).total_uncompressed_size
            largest = max(largest, size)
            total += size
    if total > MAX_UNPACKED_BYTES:
        raise _too_large()
    return max(1, _SAFE_BYTES // largest)


def _read_counting(file: pq.ParquetFile, columns: Sequence[str] | None, step: int) -> pa.Table:
    batches: list[pa.RecordBatch] = []
    size = 0
    for batch in file.iter_batches(batch_size=step, columns=columns, use_threads=False):
        size += batch.nbytes
        if size > MAX_UNPACKED_BYTES:
            raise _too_large()
        batches.append(batch)
    return pa.Table.from_batches(batches)


def _too_large() -> pa.ArrowInvalid:
    return pa.ArrowInvalid(f"it unpacks to more than {MAX_UNPACKED_BYTES:,} bytes.")
