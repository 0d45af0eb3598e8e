"""`zimage verify`: re-read every committed image and compare it with its manifest row."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

from tqdm import tqdm

from jobs.errors import EXIT_DIFFERENCE, EXIT_OK
from jobs.output import Output
from jobs.quantities import counted
from jobs.storage import Storage
from jobs.writers import decode_image, pixels_sha256, sha256

_THREADS = 4
_COLUMNS = ["file_name", "status", "format", "bytes", "sha256", "pixels_sha256"]
_SHOWN = 20


@dataclass(frozen=True)
class Difference:
    """An image that is not what its row says."""

    index: int
    file_name: str
    problem: str


def verify(uri: str, *, as_json: bool = False) -> int:
    """Check an output and print the result; exit code 0, or 1 where something differs.

    Raises:
        InputError: there is no output of a job at `uri`.
        StorageError: it cannot be read.
    """
    output = Output.open(uri)
    listing, plan = output.listing, output.record.plan
    total = listing.num_rows - listing.num_failed
    differences: list[Difference] = []
    checked = 0
    with tqdm(total=total, unit="img", disable=None, file=sys.stderr) as bar:
        for difference in _check_all(output):
            checked += 1
            bar.update()
            if difference is not None:
                differences.append(difference)
    if as_json:
        report = {
            "output": uri,
            "planned": plan.num_samples,
            "rows": listing.num_rows,
            "failed": listing.num_failed,
            "checked": checked,
            "differences": [asdict(d) for d in differences],
        }
        print(json.dumps(report, indent=2))
    else:
        for difference in differences[:_SHOWN]:
            print(f"sample {difference.index}: {difference.file_name}: {difference.problem}")
        if len(differences) > _SHOWN:
            print(f"... and {len(differences) - _SHOWN} more")
        good = checked - len(differences)
        missing = plan.num_samples - listing.num_rows
        print(
            f"{good:,} of {counted(checked, 'image')} as committed"
            + (
                f"; {counted(listing.num_failed, 'failed row')} without one"
                if listing.num_failed
                else ""
            )
            + (f"; {missing:,} not made yet" if missing else "")
        )
        if differences:
            print(f"{len(differences):,} changed or lost since they were committed")
    return EXIT_DIFFERENCE if differences else EXIT_OK


def _check_all(output: Output) -> Iterator[Difference | None]:
    """One answer for each committed image, in index order."""
    pending: deque[Future[Difference | None]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for _, table in output.listing.current_tables(sorted(output.listing.parts), _COLUMNS):
            for row in table.to_pylist():
                if row["status"] != "ok":
                    continue
                pending.append(pool.submit(_check, output.storage, row))
                while len(pending) > 8 * _THREADS:
                    yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _check(storage: Storage, row: dict[str, object]) -> Difference | None:
    index, name = row["index"], row["file_name"]
    assert isinstance(index, int) and isinstance(name, str)
    content = storage.get(name)
    if content is None:
        return Difference(index, name, "the file is missing")
    if len(content) != row["bytes"]:
        return Difference(index, name, f"{len(content)} bytes, committed {row['bytes']}")
    if sha256(content) != row["sha256"]:
        return Difference(index, name, f"sha256 {sha256(content)}, committed {row['sha256']}")
    if row["format"] == "png":  # lossless: the file must give back the pixels that were made
        try:
            pixels = pixels_sha256(decode_image(content))
        except OSError as error:
            return Difference(index, name, f"cannot be decoded: {error}")
        if pixels != row["pixels_sha256"]:
            return Difference(index, name, f"pixels {pixels}, committed {row['pixels_sha256']}")
    return None
