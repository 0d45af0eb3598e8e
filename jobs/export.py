"""`zimage export`: the images of an output in one folder, with names that say which is which."""

from __future__ import annotations

import csv
import errno
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from jobs import manifest
from jobs.config import NAME_PATTERN
from jobs.errors import EXIT_DIFFERENCE, EXIT_OK, InputError, StorageError, StorageUnusableError
from jobs.output import IMAGE_COLUMNS, Output, read_image_bytes
from jobs.parallel import ordered_map
from jobs.progress_bar import ProgressBar
from jobs.quantities import counted, file_size
from jobs.record import PATH
from jobs.storage import Storage
from jobs.terminal import visible
from jobs.writers import WRITERS, sha256
from prompt_generators.cells import defused

METADATA = "metadata.parquet"
T = TypeVar("T")
_THREADS = min(16, max(4, os.cpu_count() or 1))
_COLUMNS = ("format", "sha256", *IMAGE_COLUMNS)
_SHOWN = 20
# file systems that are two, or know no hard links, or have enough of this one
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EACCES}


@dataclass(frozen=True, slots=True)
class _Done:
    """What came of one image."""

    index: int
    bytes: int = 0
    linked: bool = False
    was_there: bool = False
    problem: str | None = None


def export(uri: str, folder: Path, *, link: bool) -> int:
    """Copy, or link, every current image into a folder; exit code 0, or 1 where one is damaged.

    Args:
        folder: not there yet, empty, or an export of the same output that is gone on with.

    Raises:
        InputError: there is no output of a job at `uri`, no image in it, or the folder holds
            something else.
        StorageError: one of both cannot be read or written.
    """
    output = Output.open(uri)
    names = _Names(output)
    listing = output.listing
    total = listing.num_rows - listing.num_failed
    if not total:
        raise InputError(f"{uri}: there is no image in it yet")
    _check_folder(folder, names, output)
    ways = {"linked": 0, "copied": 0, "there already": 0}
    size = 0
    problems: list[_Done] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ProgressBar("exporting", total) as bar:
            for done in _export_images(output, folder, names, link):
                bar.update()
                size += done.bytes
                if done.problem is not None:
                    problems.append(done)
                else:
                    way = "linked" if done.linked else "copied"
                    ways["there already" if done.was_there else way] += 1
        rows = _write_tables(output, folder, names, {done.index for done in problems})
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror or error}") from error
    for done in problems[:_SHOWN]:
        print(visible(f"sample {done.index}: {done.problem}; left out"))
    if len(problems) > _SHOWN:
        print(f"... and {len(problems) - _SHOWN:,} more")
    how = ", ".join(f"{count:,} {way}" for way, count in ways.items() if count)
    print(visible(f"{counted(rows, 'image')} in {folder} ({how}; {file_size(size)})"))
    print(visible(f"  rows      {folder / METADATA}, {folder / names.csv}"))
    if link and ways["copied"]:
        print(f"note: {counted(ways['copied'], 'image')} copied: no hard link can be made of them")
    left = [
        (listing.num_failed, "failed"),
        (output.record.plan.num_samples - listing.num_rows, "not made yet"),
        (len(problems), "damaged: zimage verify tells more"),
    ]
    for count, what in left:
        if count:
            print(f"left out: {counted(count, 'sample')} {what}")
    return EXIT_DIFFERENCE if problems else EXIT_OK


class _Names:
    """The names of an export, which are made up here and not taken from rows."""

    def __init__(self, output: Output) -> None:
        name = output.record.config["name"]
        if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
            raise StorageError(f"{output.storage.uri}/{PATH}: name: {name!r}: not a job's name")
        self.csv = f"{name}.csv"
        self._name = name
        extensions = "|".join(writer.extension for writer in WRITERS.values())
        image = rf"{re.escape(name)}_\d{{8,}}\.(?:{extensions})"
        tables = f"{re.escape(METADATA)}|{re.escape(self.csv)}"
        self._ours = re.compile(rf"{image}|{tables}|\.(?:{image}|{tables})\.part")

    def image(self, row: dict[str, Any]) -> str:
        """The name of a row's image."""
        writer = WRITERS.get(row["format"])
        if writer is None:
            raise StorageError(f"sample {row['index']}: format {row['format']!r} is unknown")
        return f"{self._name}_{row['index']:08d}.{writer.extension}"

    def is_ours(self, name: str) -> bool:
        """Whether an export of this output can have written a file of that name."""
        return self._ours.fullmatch(name) is not None


def _check_folder(folder: Path, names: _Names, output: Output) -> None:
    """Refuse a folder that holds anything but a part of this very export."""
    if "://" in str(folder) or re.match(r"[a-z][a-z0-9+.-]*:/", str(folder)):
        raise InputError(f"{folder}: allowed: a local folder")
    root = output.storage.root
    if root is not None and folder.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{folder}: is in the output; allowed: a folder outside of it")
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder")
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from error
    for entry in entries:
        if not names.is_ours(entry.name) or not entry.is_file(follow_symlinks=False):
            raise InputError(
                f"{folder}: holds {entry.name!r}; allowed: an empty folder, or an earlier export "
                "of the same output, which is gone on with"
            )


def _export_images(output: Output, folder: Path, names: _Names, link: bool) -> Iterator[_Done]:
    def one(row: dict[str, Any]) -> _Done:
        return _export_image(output.storage, row, folder / names.image(row), link)

    return ordered_map(one, output.ok_rows(_COLUMNS), threads=_THREADS)


def _export_image(storage: Storage, row: dict[str, Any], target: Path, link: bool) -> _Done:
    index = row["index"]
    if target.exists():
        content = target.read_bytes()
        if sha256(content) != row["sha256"]:
            raise InputError(
                f"{target}: is there with another content than sample {index} has; allowed: an "
                "empty folder, or an earlier export of the same output"
            )
        return _Done(index, len(content), was_there=True)
    try:
        found = read_image_bytes(storage, row)
    except StorageUnusableError as error:
        return _Done(index, problem=str(error))
    if found is None:
        return _Done(index, problem=f"{row['file_name']}: the file is missing")
    if sha256(found) != row["sha256"]:
        words = f"sha256 {sha256(found)}, committed {row['sha256']}"
        return _Done(index, problem=f"{row['file_name']}: {words}")
    linked = link and row.get("tar") is None and _link(storage, str(row["file_name"]), target)
    if not linked:
        _replace(target, lambda part: part.write_bytes(found))
    return _Done(index, len(found), linked=linked)


def _link(storage: Storage, name: str, target: Path) -> bool:
    """Whether a hard link could be made."""
    if storage.root is None or (storage.root / name).is_symlink():
        return False
    try:
        os.link(storage.root / name, target)
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise
    return True


def _replace(target: Path, write: Callable[[Path], T]) -> T:
    """Let a file appear whole or not at all; what `write` returns."""
    part = target.with_name(f".{target.name}.part")
    written = write(part)
    part.replace(target)
    return written


def _write_tables(output: Output, folder: Path, names: _Names, left_out: set[int]) -> int:
    """Write the rows of the exported images as Parquet and CSV; how many there are."""
    listing = output.listing
    unified = manifest.unify(listing.schemas())
    kept = [field for field in unified if field.name not in manifest.TAR_SCHEMA.names]
    schema = pa.schema(kept, metadata=unified.metadata)

    def write_parquet(file: Path) -> int:
        return manifest.write_tables(file, schema, _tables(output, schema, names, left_out))

    def write_csv(text: Path) -> None:
        # with a byte order mark, without which Excel takes UTF-8 for something else
        with text.open("w", encoding="utf-8-sig", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(schema.names)
            for table in _tables(output, schema, names, left_out):
                columns = [column.to_pylist() for column in table.columns]
                lines.writerows([_cell(v) for v in row] for row in zip(*columns, strict=True))

    _replace(folder / names.csv, write_csv)
    # last: an export with this file is complete
    return _replace(folder / METADATA, write_parquet)


def _tables(
    output: Output, schema: pa.Schema, names: _Names, left_out: set[int]
) -> Iterator[pa.Table]:
    """Rows of exported images, shard by shard, with the names that they have here."""
    listing = output.listing
    for _, table in listing.current_tables(sorted(listing.parts)):
        rows = manifest.cast(table, schema)
        rows = rows.filter(pc.equal(rows["status"], "ok"))
        if left_out:
            damaged = pa.array(sorted(left_out), pa.int64())
            rows = rows.filter(pc.invert(pc.is_in(rows["index"], value_set=damaged)))
        if rows.num_rows:
            files = [names.image(row) for row in rows.select(["index", "format"]).to_pylist()]
            field = schema.field("file_name")
            yield rows.set_column(0, field, pa.array(files, pa.string()))


def _cell(value: object) -> object:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    return defused(value)
