"""`zimage gc`: list what no commit refers to, or remove it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from jobs.epoch import Epoch, is_alive, newest_claim
from jobs.errors import EXIT_OK, JobError, OutputInUseError, StorageError
from jobs.leftovers import IMAGES, Leftover, Survey, survey, total_bytes
from jobs.output import Output, lost_parts
from jobs.parallel import ordered_map
from jobs.progress_bar import ProgressBar
from jobs.quantities import counted, duration, file_size
from jobs.storage import Storage
from jobs.terminal import visible

_THREADS = 8
_SHOWN = 20


def gc(
    uri: str, *, delete: bool, superseded: bool, min_age: timedelta, as_json: bool = False
) -> int:
    """Print what could go, and remove it if `delete`; exit code 0.

    Args:
        superseded: also images of rows that were made again since.
        min_age: attempts with a file younger than this are left alone.

    Raises:
        InputError: there is no output of a job at `uri`.
        OutputInUseError: a driver is alive.
        StorageError: it cannot be read or written, or lost a part of its manifest.
    """
    output = _free_output(uri)
    found = survey(output, min_age=min_age)
    files = _to_remove(found, superseded)
    if delete and (files or found.empty):
        # From here on no driver can begin, and one that was wrongly taken for dead commits nothing.
        epoch = Epoch.take(output.storage)
        reason = "error"
        try:
            output = Output.open(uri)
            found = survey(output, min_age=min_age)
            files = _to_remove(found, superseded)
            _remove(output.storage, files, found.empty)
            epoch.event("gc", files=len(files), bytes=total_bytes(files))
            reason = "done"
        finally:
            with contextlib.suppress(JobError):
                epoch.close(reason=reason)
    report = _report(uri, found, files, delete=delete, superseded=superseded)
    print(json.dumps(report, indent=2) if as_json else visible(format_gc(report, min_age)))
    return EXIT_OK


def format_gc(report: dict[str, Any], min_age: timedelta) -> str:
    """The report for a terminal."""
    lines = [
        f"{file['file']}  {file_size(file['bytes'])}  {file['kind']}"
        for file in report["leftovers"][:_SHOWN]
    ]
    hidden = len(report["leftovers"]) - _SHOWN
    if hidden > 0:
        lines.append(f"... and {hidden:,} more (--json lists all)")
    amount = f"{counted(report['files'], 'file')}, {file_size(report['bytes'])}"
    if not report["files"]:
        lines.append("nothing to remove: every file is referred to, or young, or not ours")
    elif report["deleted"]:
        lines.append(f"removed {amount}")
    else:
        lines.append(f"{amount} can go; --delete removes them")
    young, kept = report["young"], report["superseded"]
    if young["files"]:
        lines.append(
            f"left: {counted(young['files'], 'file')} ({file_size(young['bytes'])}) of attempts "
            f"younger than {duration(min_age.total_seconds())} (--min-age HOURS)"
        )
    if kept["files"]:
        lines.append(
            f"left: {counted(kept['files'], 'image')} ({file_size(kept['bytes'])}) of rows that "
            "were made again since (--superseded)"
        )
    if report["unknown"]:
        shown = ", ".join(report["unknown"][:_SHOWN])
        more = len(report["unknown"]) - _SHOWN
        lines.append(f"not ours, left alone: {shown}" + (f" and {more} more" if more > 0 else ""))
    return "\n".join(lines)


def _free_output(uri: str) -> Output:
    """An output that nobody writes to and whose manifest is whole."""
    output = Output.open(uri)
    claim = newest_claim(output.storage)
    if claim is not None and is_alive(claim):
        raise OutputInUseError(
            f"{uri} is in use by a driver on {claim.host.split('/')[0]} (pid {claim.pid}, epoch "
            f"{claim.epoch}, last seen {claim.last_seen:%H:%M:%S} UTC); wait for it, or stop it"
        )
    lost = lost_parts(output)
    if lost:
        raise StorageError(
            f"{uri}/manifest/{lost[0]}: was committed and is gone"
            + (f", as {counted(len(lost) - 1, 'other part')} are" if len(lost) > 1 else "")
            + "; the images that it names would be taken for leftovers. Put it back, or run the "
            "job again, which makes them again"
        )
    return output


def _to_remove(found: Survey, superseded: bool) -> list[Leftover]:
    return [*found.leftovers, *(found.superseded if superseded else ())]


def _remove(storage: Storage, files: Sequence[Leftover], empty: Sequence[str]) -> None:
    """Remove files, then the attempts' folders that are empty now."""
    with ProgressBar("removing", len(files), "file") as bar:
        for _ in ordered_map(lambda file: storage.delete(file.file), files, threads=_THREADS):
            bar.update()
    if storage.root is None:
        return
    folders = {file.file.rpartition("/")[0] for file in files if file.file.startswith(IMAGES)}
    for folder in folders.union(empty):
        with contextlib.suppress(OSError):  # something that stays is in it
            (storage.root / folder).rmdir()


def _report(
    uri: str, found: Survey, files: list[Leftover], *, delete: bool, superseded: bool
) -> dict[str, Any]:
    """Keys are documented in docs/cli.md and stable."""
    kept = [] if superseded else found.superseded
    return {
        "output": uri,
        "deleted": delete,
        "files": len(files),
        "bytes": total_bytes(files),
        "leftovers": [asdict(file) for file in files],
        "young": {"files": len(found.young), "bytes": total_bytes(found.young)},
        "superseded": {"files": len(kept), "bytes": total_bytes(kept)},
        "unknown": found.unknown,
    }
