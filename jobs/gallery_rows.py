"""What the gallery page is told of an output: facts about the job, and rows, as JSON.

Rows go to the page column by column, and a column that repeats itself as a list of its values and
places in it, which makes a third of the size. Text stays as it is: the page shows it as text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, datetime
from typing import Any

from jobs.config import JobConfig
from jobs.epoch import is_alive, newest_claim
from jobs.manifest import PROFILE_PREFIX
from jobs.output import Output
from jobs.rejected import Rejection
from jobs.status import run_command
from jobs.terminal import visible_line, without_credentials
from jobs.writers import WRITERS

Row = dict[str, Any]

# Of the manifest's columns; those of profiles follow.
_COLUMNS = (
    "index",
    "prompt_index",
    "status",
    "prompt",
    "negative_prompt",
    "seed",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "model",
    "loras",
    "dtype",
    "attention",
    "format",
    "bytes",
    "sha256",
    "pixels_sha256",
    "batch_mode",
    "device",
    "node",
    "seconds",
    "error_type",
    "error_message",
    "created_at",
    "file_name",
    "problem",
)
_SAFE_INTEGER = 2**53 - 1  # beyond it JavaScript has no integers
# What `zimage generate` has no flag for, and the value at which that is no matter.
_WITHOUT_FLAG = {"cfg_normalization": False, "cfg_truncation": 1.0, "max_sequence_length": 512}


def read_rows(output: Output, shards: Iterable[int]) -> Iterator[tuple[int, list[Row]]]:
    """The current rows of shards, with all columns, read lazily. Raises StorageError."""
    for shard, table in output.listing.current_tables(shards):
        yield shard, table.to_pylist()


def linked(row: Row) -> Row:
    """A row for a page that finds images by `file_name`: null in a tar, or outside."""
    name = row["file_name"]
    inside = isinstance(name, str) and not name.startswith("/") and ".." not in name.split("/")
    return row if inside and row.get("tar") is None else {**row, "file_name": None}


def block(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows for the page: `rows`, their number, and `columns` by name.

    A column is `{"values": [...]}`, or `{"of": [...], "at": [...]}` where `at` are places in `of`.
    One that is null throughout is left out.
    """
    profiles = dict.fromkeys(n for row in rows for n in row if n.startswith(PROFILE_PREFIX))
    columns = {name: _column([row.get(name) for row in rows]) for name in (*_COLUMNS, *profiles)}
    return {"rows": len(rows), "columns": {n: c for n, c in columns.items() if c is not None}}


def progress(output: Output, uri: str) -> dict[str, Any]:
    """How far the job is, and what makes failed and rejected samples again. Raises StorageError."""
    listing, planned = output.listing, output.record.plan.num_samples
    claim = newest_claim(output.storage)
    left = planned - listing.num_rows
    running = claim is not None and is_alive(claim)
    failed = listing.num_failed > 0
    retry = visible_line(run_command(output, uri, "--retry-failed")) if failed else None
    return {
        "planned": planned,
        "ok": listing.num_rows - listing.num_failed,
        "failed": listing.num_failed,
        "state": "running" if running else ("complete" if left == 0 else "stopped"),
        "retry": retry,
        "redo": visible_line(run_command(output, uri, "--redo-rejected")),
    }


def marks(rejections: Iterable[Rejection]) -> list[list[object]]:
    """Marks for the page: index, hash, note."""
    return [[_value(r.index), r.pixels_sha256, r.note] for r in rejections]


def facts(output: Output, uri: str) -> dict[str, Any]:
    """The job's name and place, and what the page makes commands of."""
    config = JobConfig.model_validate(output.record.config)
    model, sampling = config.model, config.sampling
    parts = [
        word for n, path in model.parts.items() for word in (f"--{n.replace('_', '-')}", str(path))
    ]
    more = ["--quantization", model.quantization] if model.quantization != "none" else []
    more += ["--cache", str(sampling.cache)] if sampling.cache is not None else []
    root = config.prompts.images_root
    return {
        "name": config.name,
        "output": without_credentials(uri),
        "generate": {
            "model": ["--model", str(model.folder), *parts],
            "more": more,
            "loras": {n: [str(lora.path), lora.scale] for n, lora in model.loras.items()},
            "images_root": None if root is None else str(root),
            "strength": sampling.strength,
            "extensions": {name: writer.extension for name, writer in WRITERS.items()},
            "without_flag": [
                f"sampling.{key}: {getattr(sampling, key)}"
                for key, plain in _WITHOUT_FLAG.items()
                if getattr(sampling, key) != plain
            ],
        },
    }


def _column(values: list[object]) -> dict[str, list[object]] | None:
    found = [_value(value) for value in values]
    places = {value: place for place, value in enumerate(dict.fromkeys(found))}
    if list(places) == [None] or not places:
        return None
    if 2 * len(places) > len(found):
        return {"values": found}
    return {"of": list(places), "at": [places[value] for value in found]}


def _value(value: object) -> object:
    """A cell as JSON that JavaScript reads without loss."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return value if abs(value) <= _SAFE_INTEGER else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    return value.isoformat() if isinstance(value, date) else str(value)
