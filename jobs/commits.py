"""Commits: Parquet parts under `manifest/` whose names alone tell what is done.

A part holds rows of one shard and is written whole, once, by the driver. Its name is

    00000012-r000-b0000-0003of0004-n00064-f00000-p00000-e000001.parquet
    shard    rev  batches of total rows    failed  before epoch

`r` is the revision: 0 for rows made for the first time, later ones for rows made again. `f`
counts failed rows and `p` how many of the part's rows were failed before it. A listing thus
says which shards are complete, which partly, and how many rows failed, without reading a byte.

Epochs never repeat and a driver commits a range of batches once, so that no name is written
twice. A driver that was wrongly taken for dead can at worst add a part of its own epoch; for
each index the row of the highest (revision, epoch) is current, whoever comes last.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from jobs import manifest
from jobs.errors import StorageError
from jobs.manifest import ManifestRow
from jobs.parallel import ordered_map
from jobs.part_check import MAX_FILE_BYTES
from jobs.plan import JobPlan, Shard
from jobs.storage import Storage

T = TypeVar("T")

FOLDER = "manifest"
_READERS = 8


def _number(least: int) -> str:
    """A number of at least so many digits, written in one way alone."""
    return rf"(\d{{{least}}}|[1-9]\d{{{least},}})"


_SHARD = re.compile(_number(8), re.ASCII)
_REST = re.compile(
    rf"r{_number(3)}-b{_number(4)}-{_number(4)}of{_number(4)}"
    rf"-n{_number(5)}-f{_number(5)}-p{_number(5)}-e{_number(6)}\.parquet",
    re.ASCII,
)


class PartName(NamedTuple):
    """The facts that a part's file name carries."""

    shard: int
    revision: int
    first_batch: int
    last_batch: int
    num_batches: int
    rows: int
    failed: int
    failed_before: int
    epoch: int

    def __str__(self) -> str:
        return (
            f"{self.shard:08d}-r{self.revision:03d}"
            f"-b{self.first_batch:04d}-{self.last_batch:04d}of{self.num_batches:04d}"
            f"-n{self.rows:05d}-f{self.failed:05d}-p{self.failed_before:05d}"
            f"-e{self.epoch:06d}.parquet"
        )

    @classmethod
    def parse(cls, name: str) -> PartName:
        """Read a name back. Raises ValueError for any other name."""
        shard, _, rest = name.partition("-")
        facts = _parse_rest(rest)
        if facts is None or _SHARD.fullmatch(shard) is None:
            raise ValueError(f"{name!r} is not the name of a manifest part")
        return cls(int(shard), *facts)


@lru_cache(1024)
def _parse_rest(rest: str) -> tuple[int, ...] | None:
    """The numbers of a name after the shard's, which most names of a large job have in common."""
    match = _REST.fullmatch(rest)
    return None if match is None else tuple(map(int, match.groups()))


class ShardState(NamedTuple):
    """What the listing says of one shard."""

    rows: int = 0
    failed: int = 0
    revision: int = 0  # highest seen


_NOTHING = ShardState()


class Listing:
    """All commits of an output, by name.

    Raises:
        StorageError: the folder holds a Parquet file that is no part of ours.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.parts: dict[int, list[PartName]] = {}
        with _no_garbage_collection():
            for name in storage.names(FOLDER):
                if not name.endswith(".parquet"):
                    continue
                try:
                    part = PartName.parse(name)
                except ValueError as error:
                    raise StorageError(f"{storage.uri}/{FOLDER}: {error}") from error
                self.parts.setdefault(part.shard, []).append(part)
            self.states = {shard: self._state(parts) for shard, parts in self.parts.items()}

    def state(self, shard_id: int) -> ShardState:
        """The state of one shard; an empty one if nothing of it is committed."""
        return self.states.get(shard_id, _NOTHING)

    @property
    def num_rows(self) -> int:
        """Indices that have a current row."""
        return sum(s.rows for s in self.states.values())

    @property
    def num_failed(self) -> int:
        """Indices whose current row is a failed one."""
        return sum(s.failed for s in self.states.values())

    def current(self, shard_id: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The current rows of a shard in index order. Raises StorageError for a damaged part."""
        parts = sorted(self.parts.get(shard_id, ()), key=lambda p: (p.revision, p.epoch))
        return _current(self.storage, parts, columns)

    def current_tables(
        self, shard_ids: Iterable[int], columns: Sequence[str] | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        """`current` for many shards, in the order given, read in parallel and lazily."""

        def read(shard_id: int) -> tuple[int, pa.Table]:
            return shard_id, self.current(shard_id, columns)

        known = (shard_id for shard_id in shard_ids if shard_id in self.parts)
        return ordered_map(read, known, threads=_READERS)

    def schemas(self) -> Iterator[pa.Schema]:
        """The schema of every part, from their footers, read in parallel and lazily."""
        parts = (part for shard in sorted(self.parts) for part in sorted(self.parts[shard]))
        return ordered_map(partial(read_schema, self.storage), parts, threads=_READERS)

    def _state(self, parts: list[PartName]) -> ShardState:
        if len(parts) == 1:  # nearly all shards of a large job: its listing takes this path
            (part,) = parts
            return ShardState(part.rows, part.failed, part.revision)
        revision = max(p.revision for p in parts)
        if _overlap(parts):  # only their rows tell
            table = _current(self.storage, sorted(parts, key=lambda p: (p.revision, p.epoch)), None)
            failed = pc.sum(pc.equal(table["status"], "failed")).as_py() or 0
            return ShardState(table.num_rows, failed, revision)
        rows = sum(part.rows for part in parts if part.revision == 0)
        return ShardState(rows, sum(p.failed - p.failed_before for p in parts), revision)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For hundreds of thousands of objects that all stay.

    Looking through them for garbage, again and again, takes as long as making them.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _overlap(parts: list[PartName]) -> bool:
    """Whether two parts of different epochs may hold rows of one index and revision."""
    by_revision: dict[int, list[PartName]] = {}
    for part in parts:
        by_revision.setdefault(part.revision, []).append(part)
    for revision, same in by_revision.items():
        if len({p.epoch for p in same}) == 1:
            continue
        if revision > 0:
            return True
        same.sort(key=lambda p: p.first_batch)
        if len({p.num_batches for p in same}) > 1:
            return True
        if any(a.last_batch >= b.first_batch for a, b in pairwise(same)):
            return True
    return False


def _current(
    storage: Storage, parts: Sequence[PartName], columns: Sequence[str] | None
) -> pa.Table:
    if columns is not None:
        columns = list(dict.fromkeys(["index", *columns]))
    tables = [read_part(storage, part, columns) for part in parts]
    if not tables:
        return manifest.SCHEMA.empty_table()
    schema = manifest.unify(t.schema for t in tables)
    if columns is not None:  # among them columns that are in none or some of the parts
        known = {field.name: field for field in [*manifest.FURTHER, *schema]}
        schema = pa.schema([known.get(name, pa.field(name, pa.string())) for name in columns])
    table = pa.concat_tables(manifest.cast(t, schema) for t in tables)
    indices = table["index"].to_numpy()
    if (indices[1:] > indices[:-1]).all():  # in order, none twice: nearly all shards
        return table
    last = {index: row for row, index in enumerate(table["index"].to_pylist())}
    return table.take(pa.array([last[index] for index in sorted(last)], type=pa.int64()))


def read_part(storage: Storage, part: PartName, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one part. Raises StorageError if it is gone or damaged."""
    return _parsed(storage, part, lambda content: manifest.from_parquet(content, columns))


def read_schema(storage: Storage, part: PartName) -> pa.Schema:
    """The schema of one part. Raises StorageError if it is gone or its footer is damaged."""
    return _parsed(storage, part, manifest.schema_of)


def _parsed(storage: Storage, part: PartName, parse: Callable[[bytes], T]) -> T:
    path = f"{FOLDER}/{part}"
    content = storage.get(path, most=MAX_FILE_BYTES)
    if content is None:
        raise StorageError(f"{storage.uri}/{path}: the part was listed, but is gone")
    try:
        return parse(content)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(
            f"{storage.uri}/{path}: damaged manifest part: {error} Put it back, or delete it and "
            f"run the job again: it makes the {part.rows} images of that part again"
        ) from error


def write_part(storage: Storage, part: PartName, rows: Sequence[ManifestRow]) -> None:
    """Commit `rows` under their name, create-if-absent. Raises StorageError if the name exists."""
    content = manifest.to_parquet(manifest.to_table(rows))
    if not storage.create(f"{FOLDER}/{part}", content):
        raise StorageError(f"{storage.uri}/{FOLDER}/{part}: the commit exists already")


def missing_indices(listing: Listing, shard: Shard) -> set[int] | None:
    """Indices of `shard` without a row; None where that is all of them."""
    state = listing.state(shard.id)
    if state.rows == 0:
        return None
    if state.rows >= len(shard):
        return set()
    done = set(listing.current(shard.id, ["index"])["index"].to_pylist())
    return set(range(shard.start, shard.stop)) - done


def failed_indices(listing: Listing, plan: JobPlan) -> Iterator[tuple[Shard, set[int]]]:
    """The failed current rows, shard by shard; only shards that have some are read."""
    shards = [shard_id for shard_id in sorted(listing.states) if listing.states[shard_id].failed]
    for shard_id, table in listing.current_tables(shards, ["index", "status"]):
        failed = table.filter(pc.equal(table["status"], "failed"))
        yield plan.shard(shard_id), set(failed["index"].to_pylist())
