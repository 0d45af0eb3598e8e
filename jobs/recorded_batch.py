"""Samples as their manifest rows say they were made: what `zimage regen` repeats.

A batch is repeated from the rows alone. The prompts' generator and table have no part in it, so
that an image can be proved long after they have changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jobs.commits import Listing, read_part
from jobs.config import pixels_fault
from jobs.errors import InputError, StorageError
from jobs.input_images import EDITED, STARTED_FROM, image_role
from jobs.manifest import PROFILE_PREFIX
from jobs.output import IMAGE_COLUMNS, Output
from jobs.plan import Sample

_OF_IMAGES = [
    PROFILE_PREFIX + key
    for role in (STARTED_FROM, EDITED)
    for key in (role.name_key, role.hash_key)
]
_COLUMNS = [
    *dict.fromkeys(
        (
            *("index", "prompt_index", "status", "prompt", "negative_prompt", "seed"),
            "planned_seed",
            *("width", "height", "loras", "model_fingerprint", "dtype", "attention", "format"),
            *("pixels_sha256", "revision", "attempt", "batch", "batch_mode", "device"),
            *("error_type", "error_message", *_OF_IMAGES, *IMAGE_COLUMNS),
        )
    )
]

_MAX_PIXELS = 2**27  # a row that somebody else wrote is not worth all memory
Row = dict[str, Any]


@dataclass(frozen=True)
class RecordedBatch:
    """Samples that were made together.

    Args:
        samples: all of them, in the order in which they were made.
        rows: of the samples that are asked for, by index.
        dtype: that they were computed in.
    """

    samples: tuple[Sample, ...]
    rows: dict[int, Row]
    dtype: str


def recorded_batches(output: Output, indices: Iterable[int]) -> list[RecordedBatch]:
    """The batches in which samples were made, each once, in order of their first sample.

    Raises:
        InputError: an index is not planned, has no row yet, or a failed one.
        StorageError: a part is damaged, or lacks a row of the batch.
    """
    plan = output.record.plan
    shards: dict[int, list[Row]] = {}
    found: dict[tuple[str, tuple[int, ...], str], RecordedBatch] = {}
    for index in sorted(set(indices)):
        try:
            shard = plan.shard_of(index)
        except KeyError:
            raise InputError(
                f"sample {index}: not planned; allowed: samples {plan.start} to {plan.stop - 1}"
            ) from None
        if shard.id not in shards:
            shards[shard.id] = _rows(output.listing, shard.id)
        row = _row_of(output, shards[shard.id], index)
        key = (row["attempt"], tuple(row["batch"]), row["dtype"])
        if key not in found:
            samples = [_neighbour(output, shards[shard.id], row, i) for i in row["batch"]]
            found[key] = RecordedBatch(tuple(samples), {}, row["dtype"])
        found[key].rows[index] = row
    return list(found.values())


def _rows(listing: Listing, shard: int) -> list[Row]:
    """All rows of a shard, the newest last."""
    parts = sorted(listing.parts.get(shard, ()), key=lambda part: (part.revision, part.epoch))
    return [row for part in parts for row in read_part(listing.storage, part, _COLUMNS).to_pylist()]


def _row_of(output: Output, rows: list[Row], index: int) -> Row:
    row = next((row for row in reversed(rows) if row["index"] == index), None)
    if row is None:
        raise InputError(f"sample {index}: not made yet; zimage status {output.storage.uri}")
    if row["status"] != "ok":
        words = f"{row['error_type']}: {row['error_message']}"
        raise InputError(
            f"sample {index}: failed ({words}), so that there is no image to compare with; "
            "run the job again with --retry-failed"
        )
    if index not in row["batch"] or len(set(row["batch"])) < len(row["batch"]):
        raise StorageError(
            f"{output.storage.uri}: sample {index}: its row's batch is without it, or holds a "
            "sample twice"
        )
    return row


def _neighbour(output: Output, rows: list[Row], row: Row, index: int) -> Sample:
    """A sample of the row's batch, as it was when that batch was made."""
    for other in reversed(rows):
        if other["index"] == index and other["revision"] <= row["revision"]:
            return _sample(output, other)
    raise StorageError(
        f"{output.storage.uri}: sample {row['index']} was made together with sample {index}, which "
        "has no row in its shard"
    )


def _sample(output: Output, row: Row) -> Sample:
    for side in ("width", "height"):
        fault = pixels_fault(row[side])
        if fault is not None:
            place = f"{output.storage.uri}: sample {row['index']}"
            raise StorageError(f"{place}: {side} {row[side]}: {fault}")
    if row["width"] * row["height"] > _MAX_PIXELS:
        raise StorageError(
            f"{output.storage.uri}: sample {row['index']}: {row['width']} x {row['height']} "
            f"pixels; allowed: up to {_MAX_PIXELS:,}"
        )
    edits = output.record.settings.takes_pictures
    return Sample(
        index=row["index"],
        prompt_index=row["prompt_index"],
        prompt=row["prompt"],
        negative_prompt=row["negative_prompt"] or "",
        seed=row["seed"],
        width=row["width"],
        height=row["height"],
        loras=tuple(row["loras"].split(",")) if row["loras"] else (),
        images=image_role(edits).recorded(row, PROFILE_PREFIX),
        edits=edits,
    )
