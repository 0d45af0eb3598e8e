"""`zimage verify`: re-read every committed image and compare it with its manifest row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal

from jobs.epoch import is_alive, newest_claim
from jobs.errors import EXIT_DIFFERENCE, EXIT_OK, StorageUnusableError
from jobs.leftovers import survey, total_bytes
from jobs.manifest_check import check_parts, check_summary
from jobs.output import IMAGE_COLUMNS, Output, read_image_bytes
from jobs.parallel import ordered_map
from jobs.progress_bar import ProgressBar
from jobs.quantities import counted, file_size
from jobs.storage import Storage
from jobs.terminal import visible
from jobs.writers import decode_image, pixels_sha256, sha256

_THREADS = min(16, max(4, os.cpu_count() or 1))
_LOSSLESS = ("png",)
_COLUMNS = ("format", "width", "height", "sha256", "pixels_sha256", *IMAGE_COLUMNS)
_SHOWN = 20


@dataclass(frozen=True)
class Difference:
    """An image that is not what its row says."""

    index: int
    file_name: str
    kind: Literal["missing", "changed", "unreadable"]
    problem: str


def verify(uri: str, *, as_json: bool = False) -> int:
    """Check an output and print the result; exit code 0, or 1 where something differs.

    Raises:
        InputError: there is no output of a job at `uri`.
        StorageError: it cannot be read.
    """
    report = verify_report(Output.open(uri), uri)
    print(json.dumps(report, indent=2) if as_json else visible(format_verify(report)))
    return EXIT_DIFFERENCE if report["differences"] or report["manifest"] else EXIT_OK


def verify_report(output: Output, uri: str) -> dict[str, Any]:
    """What was found; keys are documented in docs/cli.md and stable."""
    listing = output.listing
    problems = list(check_parts(output))
    summary, notes = check_summary(output)
    differences: list[Difference] = []
    checked = 0
    with ProgressBar("verifying", listing.num_rows - listing.num_failed) as bar:
        for difference in _check_images(output):
            checked += 1
            bar.update()
            if difference is not None:
                differences.append(difference)
    found = survey(output, min_age=timedelta(0))
    claim = newest_claim(output.storage)
    return {
        "output": uri,
        "planned": output.record.plan.num_samples,
        "rows": listing.num_rows,
        "failed": listing.num_failed,
        "checked": checked,
        "differences": [asdict(difference) for difference in differences],
        "manifest": [asdict(problem) for problem in [*problems, *summary]],
        "orphans": {
            "files": len(found.leftovers),
            "bytes": total_bytes(found.leftovers),
            "under_way": claim is not None and is_alive(claim),
        },
        "notes": notes,
    }


def format_verify(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = []
    for entries, what in ((report["manifest"], "file"), (report["differences"], "file_name")):
        for entry in entries[:_SHOWN]:
            sample = f"sample {entry['index']}: " if "index" in entry else ""
            lines.append(f"{sample}{entry[what]}: {entry['problem']}")
        if len(entries) > _SHOWN:
            lines.append(f"... and {len(entries) - _SHOWN} more (--json lists all)")
    checked, failed = report["checked"], report["failed"]
    good = checked - len(report["differences"])
    missing = report["planned"] - report["rows"]
    lines.append(
        f"{good:,} of {counted(checked, 'image')} as committed"
        + (f"; {counted(failed, 'failed row')} without one" if failed else "")
        + (f"; {missing:,} not made yet" if missing else "")
    )
    if report["differences"]:
        lines.append(f"{len(report['differences']):,} changed or lost since they were committed")
    if report["manifest"]:
        lines.append(f"{counted(len(report['manifest']), 'problem')} of the manifest")
    lines += [f"note: {note}" for note in report["notes"]]
    orphans = report["orphans"]
    if orphans["files"]:
        what = f"{counted(orphans['files'], 'file')} ({file_size(orphans['bytes'])})"
        lines.append(
            f"note: {what} that no commit refers to"
            + (
                " yet: a driver is at work"
                if orphans["under_way"]
                else f"; zimage gc {report['output']} lists them"
            )
        )
    return "\n".join(lines)


def _check_images(output: Output) -> Iterator[Difference | None]:
    """One answer for each committed image, in index order."""
    rows = output.ok_rows(_COLUMNS)
    return ordered_map(lambda row: _check(output.storage, row), rows, threads=_THREADS)


def _check(storage: Storage, row: dict[str, Any]) -> Difference | None:
    index, name = row["index"], str(row["file_name"])
    if row["file_name"] is None:
        return Difference(index, name, "missing", "the row names no file")
    try:
        content = read_image_bytes(storage, row)
    except StorageUnusableError as error:
        return Difference(index, name, "unreadable", str(error))
    if content is None:
        return Difference(index, name, "missing", "the file is missing")
    if len(content) != row["bytes"]:
        words = f"{len(content)} bytes, committed {row['bytes']}"
        return Difference(index, name, "changed", words)
    if sha256(content) != row["sha256"]:
        words = f"sha256 {sha256(content)}, committed {row['sha256']}"
        return Difference(index, name, "changed", words)
    try:
        pixels = decode_image(content)
    except (OSError, ValueError) as error:
        return Difference(index, name, "unreadable", f"cannot be decoded: {error}")
    if pixels.shape[:2] != (row["height"], row["width"]):
        words = f"{pixels.shape[1]}x{pixels.shape[0]}, committed {row['width']}x{row['height']}"
        return Difference(index, name, "changed", words)
    # a lossless file must give back the pixels that were made
    if row["format"] in _LOSSLESS and pixels_sha256(pixels) != row["pixels_sha256"]:
        words = f"pixels {pixels_sha256(pixels)}, committed {row['pixels_sha256']}"
        return Difference(index, name, "changed", words)
    return None
