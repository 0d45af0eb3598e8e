"""What must hold for an output: at every moment, and when its job is done."""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from jobs.commits import FOLDER, PartName
from jobs.errors import InputError
from jobs.output import Output
from jobs.status import status_report
from jobs.writers import decode_image, pixels_sha256, sha256


def part_rows(output: Path) -> list[dict]:
    """Rows of all committed parts, each of which must be whole and hold what its name says."""
    rows = []
    for path in sorted((output / FOLDER).glob("*.parquet")):
        part = PartName.parse(path.name)
        found = pq.read_table(path).to_pylist()
        assert len(found) == part.rows, path
        assert {r["shard"] for r in found} == {part.shard}, path
        assert {r["revision"] for r in found} == {part.revision}, path
        assert sum(r["status"] == "failed" for r in found) == part.failed, path
        rows += found
    return rows


def check_visible(output: Path, expected: dict[int, str]) -> dict | None:
    """What a reader may ask for at any moment, however dead the driver is.

    Every listed part parses, each committed image is there, whole and the right one, no index is
    committed twice in one revision, and `status` answers.

    Returns:
        `status --json`, or None before there was a plan.
    """
    rows = part_rows(output)
    twice = Counter((r["index"], r["revision"]) for r in rows)
    assert set(twice.values()) <= {1}, twice
    for row in rows:
        if row["status"] == "ok":
            content = (output / row["file_name"]).read_bytes()
            assert sha256(content) == row["sha256"], row["file_name"]
            assert (
                pixels_sha256(decode_image(content))
                == row["pixels_sha256"]
                == expected[row["index"]]
            )
    if not (output / "job.json").exists():
        assert not rows
        return None
    report = status_report(str(output))
    assert report["planned"] == len(expected)
    assert report["ok"] + report["failed"] + report["left"] == len(expected)
    return report


def check_complete(output: Path, expected: dict[int, str], *, redone: int = 0) -> int:
    """All of a job is there, once, with the pixels of an undisturbed run.

    Args:
        redone: how many more images than planned may have been written.

    Returns:
        How many were.
    """
    report = check_visible(output, expected)
    assert report is not None
    assert (report["state"], report["ok"], report["failed"]) == ("complete", len(expected), 0)
    rows = pq.read_table(output / "metadata.parquet").to_pylist()
    assert [r["index"] for r in rows] == sorted(expected)
    assert {r["index"]: r["pixels_sha256"] for r in rows} == expected
    assert {r["status"] for r in rows} == {"ok"}
    # one current row for each index, in the parts as in the summary
    current = {r["index"]: r for r in sorted(part_rows(output), key=lambda r: r["revision"])}
    assert {i: r["file_name"] for i, r in current.items()} == {
        r["index"]: r["file_name"] for r in rows
    }
    written = [p for p in output.glob("images/*/*") if "#" not in p.name]
    assert len(written) - len(expected) <= redone
    return len(written) - len(expected)


def has_output(output: Path) -> bool:
    """Whether there is a job's output to read."""
    try:
        Output.open(str(output))
    except InputError:
        return False
    return True
