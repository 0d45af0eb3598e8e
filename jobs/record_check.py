"""Whether a job.json holds what it must, before anything is made of it.

An output may be of somebody else's making. What the record says decides how many shards are
counted, which names are given to files and what a user is told to run next, so that every value is
looked at: its type, its range, and whether the extents follow each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from jobs.config import MAX_INT64, JobConfig
from jobs.executor import Settings

MAX_BYTES = 64 * 2**20
"""Of the file. A job file has at most 1 MB, its options, written out, a few more."""
PROGRAM = "zimage"

Text = Annotated[str, Field(max_length=1_000_000)]
Short = Annotated[str, Field(max_length=1000)]
Index = Annotated[int, Field(ge=0, le=MAX_INT64)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Extent(_Part):
    start: Index
    stop: Index
    first_shard: Index
    shard_size: Annotated[int, Field(ge=1, le=MAX_INT64)]


class _Prompts(_Part):
    generator: Text
    options: Text
    source_sha256: Short
    profiles_sha256: Short | None


class _Top(BaseModel):
    model_config = ConfigDict(strict=True)

    schema_version: int
    created_at: Short
    updated_at: Short
    extents: Annotated[list[_Extent], Field(min_length=1, max_length=100_000)]
    versions: dict[Short, Short]
    unaccepted: bool
    command: Annotated[list[Text], Field(max_length=10_000)]
    job: dict[str, Any]
    fingerprint: dict[str, Any]


class _Resolved(BaseModel):
    """What of the settings chooses code by its name."""

    model_config = ConfigDict(strict=True)

    dtype: Literal["bfloat16", "float16", "float32"]
    batch_size: Annotated[int, Field(ge=1, le=MAX_INT64)]
    threads_per_worker: Annotated[int, Field(ge=1, le=4096)]


def check_values(data: Mapping[str, Any]) -> None:
    """Look at every value of a record that was read from JSON.

    Raises:
        ValueError: the first one that is wrong: its key, what it is, and what is allowed.
    """
    _check(_adapter(_Top), data, "")
    fingerprint = dict(data["fingerprint"])
    _check(_adapter(_Prompts), fingerprint.pop("prompts", None), "fingerprint.prompts")
    _check(_adapter(_Resolved), fingerprint, "fingerprint")
    _check(_adapter(Settings), fingerprint, "fingerprint")
    _check(_adapter(JobConfig), data["job"], "job")
    command = data["command"]
    if command and command[0] != PROGRAM:  # it is shown to be run again
        raise ValueError(f"command is {command[0]!r:.80} ...; allowed: {PROGRAM} ...")
    end = shards = 0
    for number, extent in enumerate(data["extents"]):
        start, stop = extent["start"], extent["stop"]
        follows = number == 0 or start == end
        if stop <= start or extent["first_shard"] != shards or not follows:
            raise ValueError(
                f"extents.{number} is {json.dumps(extent)}; allowed: samples and shards that "
                "follow those before"
            )
        end = stop
        shards += -(-(stop - start) // extent["shard_size"])


def _check(adapter: TypeAdapter[Any], value: object, where: str) -> None:
    try:
        # as JSON, in which a strict mapping may become a dataclass
        adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(filter(None, (where, *map(str, first["loc"]))))
        given = "" if first["type"] == "missing" else f" is {first['input']!r:.80}"
        words = first["msg"]
        if first["type"] == "extra_forbidden":
            words = "no such key; a newer version of this program may have written it"
        raise ValueError(f"{key}{given}: {words}") from None


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
