"""Ways to lay hands on an output: its record, its manifest, its events, its files.

Each function makes a `Damage`, which takes the output's folder.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from raw_weights import sparse

from jobs.manifest import SCHEMA

Damage = Callable[[Path], object]
TB = 2**40


def record(**changes: object) -> Damage:
    """job.json with keys of its top changed."""
    return lambda out: change_record(out, lambda data: data.update(changes))


def inside(*keys: str, value: object) -> Damage:
    """job.json with one key inside of it changed."""

    def change(data: dict[str, Any]) -> None:
        place: Any = data
        for key in keys[:-1]:
            place = place[int(key)] if isinstance(place, list) else place[key]
        place[keys[-1]] = value

    return lambda out: change_record(out, change)


def change_record(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((out / "job.json").read_text())
    change(data)
    (out / "job.json").write_text(json.dumps(data))


def written(name: str, content: str | bytes | Callable[[], bytes]) -> Damage:
    def write(out: Path) -> None:
        path = find(out, name)
        path.unlink(missing_ok=True)
        made = content() if callable(content) else content
        path.write_bytes(made if isinstance(made, bytes) else made.encode())

    return write


def special(name: str, kind: str) -> Damage:
    """A pipe, a device, a folder, a loop or a huge file in the place of a file."""

    def make(out: Path) -> None:
        path = find(out, name)
        path.unlink(missing_ok=True)
        {
            "pipe": lambda: os.mkfifo(path),
            "device": lambda: path.symlink_to("/dev/zero"),
            "folder": lambda: path.mkdir(),
            "loop": lambda: path.symlink_to(path.name),
            "1 TB": lambda: sparse(path, b"", TB),
        }[kind]()

    return make


def find(out: Path, name: str) -> Path:
    """A file of the output; with a `*` the first that fits."""
    return min(out.glob(name)) if "*" in name else out / name


def part(change: Callable[[pa.Table], pa.Table], **options: Any) -> Damage:
    """The first part of the manifest, rewritten."""

    def rewrite(out: Path) -> None:
        path = find(out, "manifest/*.parquet")
        pq.write_table(change(pq.read_table(path)), path, **options)

    return rewrite


def rows(**values: object) -> Damage:
    """The first part with values of its first row changed, of the columns' own types."""

    def change(table: pa.Table) -> pa.Table:
        for name, value in values.items():
            field = table.schema.field(name)
            column = [value, *table[name].to_pylist()[1:]]
            array = pa.array(column, type=field.type)
            nullable = field.with_nullable(True)
            table = table.set_column(table.schema.names.index(name), nullable, array)
        return table

    return part(change)


def column(name: str, values: Callable[[int], pa.Array]) -> Damage:
    """The first part with a column replaced, or added at its end."""

    def change(table: pa.Table) -> pa.Table:
        array = values(table.num_rows)
        if name not in table.schema.names:
            return table.append_column(name, array)
        return table.set_column(table.schema.names.index(name), name, array)

    return part(change)


def image(content: bytes, **values: object) -> Damage:
    """The first image replaced, its row agreeing with it."""

    def replace(out: Path) -> None:
        path = find(out, "manifest/*.parquet")
        first = pq.read_table(path)["file_name"][0].as_py()
        (out / first).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        rows(bytes=len(content), sha256=digest, **values)(out)

    return replace


def event(change: Callable[[list[dict[str, Any]]], object]) -> Damage:
    """The events of the newest file changed."""

    def rewrite(out: Path) -> None:
        path = max((out / "events").iterdir())
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        change(entries)
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    return rewrite


def parquet_bomb(num_rows: int, size: int) -> Callable[[], bytes]:
    """Makes a small file whose `prompt` is `size` characters in each of `num_rows` rows."""
    return partial(_parquet_bomb, num_rows, size)


def _parquet_bomb(num_rows: int, size: int) -> bytes:
    arrays = []
    for field in SCHEMA:
        if field.type == pa.string():
            text = "a" * size if field.name == "prompt" else "x"
            indices = pa.repeat(pa.scalar(0, pa.int32()), num_rows)
            arrays.append(pa.DictionaryArray.from_arrays(indices, pa.array([text])))
        else:
            value = [] if pa.types.is_list(field.type) else 0
            arrays.append(pa.repeat(pa.scalar(value, field.type), num_rows))
    names = SCHEMA.names
    buffer = io.BytesIO()
    table = pa.Table.from_arrays(arrays, names).replace_schema_metadata(SCHEMA.metadata)
    pq.write_table(table, buffer, compression="zstd", store_schema=False)
    return buffer.getvalue()


def parquet_rows(num_rows: int) -> Callable[[], bytes]:
    """Makes a file of so many rows, and nothing else that is right."""

    def make() -> bytes:
        buffer = io.BytesIO()
        index = pa.repeat(pa.scalar(0, pa.int64()), num_rows)
        pq.write_table(pa.table({"index": index}), buffer)
        return buffer.getvalue()

    return make


def linked(name: str, target: str) -> Damage:
    """A folder of the output replaced by a link to one outside of it."""

    def link(out: Path) -> None:
        place = out.parent / target
        shutil.move(out / name, place)
        (out / name).symlink_to(place)

    return link
