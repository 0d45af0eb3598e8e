"""The current rows of an output as they are asked for, while a job may be adding to them."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from datetime import UTC, datetime
from typing import Any

from jobs.errors import InputError, JobError
from jobs.gallery_rows import Row, block, facts, marks, progress, read_rows
from jobs.output import Output
from jobs.rejected import Rejection, add_rejected, counting, read_rejected, remove_rejected
from jobs.terminal import visible
from jobs.thumbnails import thumbnail_name

_FRESH = 2.0  # seconds for which what was read of the output is taken for current
_ROWS_AT_ONCE = 4000


class LiveRows:
    """The current rows of an output, read again when they are asked for.

    Each row has a number, higher than those of all rows that were read before it, so that a page
    can ask for what it has not seen. All methods are safe to call from several threads.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.output = Output.open(uri)
        self.facts = facts(self.output, uri)
        self._refreshing = threading.Lock()  # one thread reads the output at a time
        self._lock = threading.Lock()  # of what follows; never held while something is read
        self._numbers: list[int] = []  # ascending; and the index of the row of each
        self._indices: list[int] = []
        self._rows: dict[int, tuple[int, Row]] = {}
        self._by_thumbnail: dict[str, int] = {}
        self._parts: dict[int, tuple[object, ...]] = {}
        self._progress: dict[str, Any] = {}
        self._rejected: list[list[object]] = []
        self._marks = 0
        self._stale_at = 0.0
        self._problem: str | None = None

    def after(self, number: int, marks_seen: int) -> dict[str, Any]:
        """Rows behind a number, some at a time, and how far the job is, for the page."""
        with self._refreshing:
            self._refresh()
        with self._lock:
            start = bisect_right(self._numbers, number)
            stop = min(start + _ROWS_AT_ONCE, len(self._numbers))
            found = [
                self._rows[index][1]
                for place, index in enumerate(self._indices[start:stop], start)
                if self._rows[index][0] == self._numbers[place]
            ]
            answer = {
                **self._progress,
                "after": self._numbers[stop - 1] if stop > start else number,
                "more": stop < len(self._numbers),
                "marks": self._marks,
                "problem": self._problem,
                "rows": block(found),
            }
            if marks_seen != self._marks:
                answer["rejected"] = self._rejected
            return answer

    def row(self, index: int) -> Row | None:
        """The row of a sample, None where there is none yet."""
        with self._lock:
            found = self._rows.get(index)
            return None if found is None else found[1]

    def row_of_thumbnail(self, name: str) -> Row | None:
        """A row that shows such an image."""
        with self._lock:
            index = self._by_thumbnail.get(name)
            return None if index is None else self._rows[index][1]

    def mark(self, index: int, pixels_sha256: str, note: str, *, rejected: bool) -> None:
        """Reject the image of a sample, or take that back.

        Raises:
            InputError: it has another image by now, or none.
            StorageError: the output cannot be written.
        """
        row = self.row(index)
        if row is None or row["status"] != "ok" or row["pixels_sha256"] != pixels_sha256:
            raise InputError(f"sample {index}: has another image by now; look again")
        storage = self.output.storage
        if rejected:
            add_rejected(storage, [Rejection(index, pixels_sha256, note, datetime.now(UTC))])
        else:
            remove_rejected(storage, [(index, pixels_sha256)])
        self._read_marks()

    def _refresh(self) -> None:
        began = time.monotonic()
        if began < self._stale_at:
            return
        try:
            self.output = Output.open(self.uri)
            self._read_changes()
            self._progress = progress(self.output, self.uri)
            self._read_marks()
            self._problem = None
        except JobError as error:  # such as a store that does not answer: the page says so
            self._problem = visible(error)
        # a large or slow output is not read all the time
        now = time.monotonic()
        self._stale_at = now + max(_FRESH, 5 * (now - began))

    def _read_changes(self) -> None:
        listing = self.output.listing
        now = {shard: tuple(sorted(parts)) for shard, parts in listing.parts.items()}
        changed = sorted(shard for shard, parts in now.items() if self._parts.get(shard) != parts)
        for shard, rows in read_rows(self.output, changed):
            with self._lock:
                for row in rows:
                    self._take(row)
            self._parts[shard] = now[shard]

    def _take(self, row: Row) -> None:
        index = row["index"]
        before = self._rows.get(index)
        if before is not None and before[1] == row:
            return
        number = self._numbers[-1] + 1 if self._numbers else 1
        self._numbers.append(number)
        self._indices.append(index)
        self._rows[index] = number, row
        name = thumbnail_name(row["pixels_sha256"])
        if row["status"] == "ok" and name is not None:
            self._by_thumbnail[name] = index

    def _read_marks(self) -> None:
        rejections = read_rejected(self.output.storage)
        with self._lock:
            current = {index: row["pixels_sha256"] for index, (_, row) in self._rows.items()}
            found = marks(counting(rejections, current).values())
            if found != self._rejected:
                self._rejected = found
                self._marks += 1
