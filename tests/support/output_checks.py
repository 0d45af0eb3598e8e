"""What must hold for an output: at every moment, and when its job is done."""

import io
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from jobs.commits import FOLDER, PartName
from jobs.status import status_report
from jobs.storage import Storage
from jobs.writers import decode_image, pixels_sha256, sha256


class OutputWatcher:
    """Looks at an output as a reader may at any moment, however dead its driver is.

    Args:
        output: a folder, or the address of an object store.
        expected: the pixels' hashes of an undisturbed run, by index.
    """

    def __init__(self, output: Path | str, expected: dict[int, str]) -> None:
        self.uri = str(output)
        self.expected = expected
        self.rows: list[dict] = []  # of all parts seen so far
        self._parts: set[str] = set()

    @property
    def storage(self) -> Storage:
        """The output, which may not have been there a moment ago."""
        return Storage(self.uri)

    def look(self) -> dict | None:
        """Check what has come since the last look.

        Every listed part parses and holds what its name says, each committed image is there, whole
        and the right one, no index is committed twice in one revision, and `status` answers.

        Returns:
            `status --json`, or None before there was a plan.
        """
        storage = self.storage
        names = {n for n in storage.names(FOLDER) if n.endswith(".parquet")}
        assert self._parts <= names, "a commit has gone"
        for name in sorted(names - self._parts):
            self._parts.add(name)
            self.rows += self._part(storage, PartName.parse(name))
        twice = Counter((r["index"], r["revision"]) for r in self.rows)
        assert set(twice.values()) <= {1}, twice
        if not storage.exists("job.json"):
            assert not self.rows
            return None
        report = status_report(self.uri)
        assert report["planned"] == len(self.expected)
        assert report["ok"] + report["failed"] + report["left"] == report["planned"]
        return report

    def _part(self, storage: Storage, part: PartName) -> list[dict]:
        rows = _read_parquet(storage, f"{FOLDER}/{part}")
        assert len(rows) == part.rows, part
        assert {r["shard"] for r in rows} == {part.shard}, part
        assert {r["revision"] for r in rows} == {part.revision}, part
        assert sum(r["status"] == "failed" for r in rows) == part.failed, part
        for row in rows:
            if row["status"] == "ok":
                content = storage.get(row["file_name"])
                assert content is not None, row["file_name"]
                assert sha256(content) == row["sha256"], row["file_name"]
                assert pixels_sha256(decode_image(content)) == row["pixels_sha256"]
                assert row["pixels_sha256"] == self.expected[row["index"]]
        return rows


def check_visible(output: Path | str, expected: dict[int, str]) -> dict | None:
    """One look at an output."""
    return OutputWatcher(output, expected).look()


def check_complete(output: Path | str, expected: dict[int, str], *, redone: int) -> int:
    """All of a job is there, once, with the pixels of an undisturbed run.

    Args:
        redone: how many more images than planned may have been written.

    Returns:
        How many were.
    """
    watcher = OutputWatcher(output, expected)
    report = watcher.look()
    assert report is not None
    assert (report["state"], report["ok"], report["failed"]) == ("complete", len(expected), 0)
    rows = _read_parquet(watcher.storage, "metadata.parquet")
    assert [r["index"] for r in rows] == sorted(expected)
    assert {r["index"]: r["pixels_sha256"] for r in rows} == expected
    assert {r["status"] for r in rows} == {"ok"}
    # one current row for each index, in the parts as in the summary
    current = {r["index"]: r for r in sorted(watcher.rows, key=lambda r: r["revision"])}
    assert {i: r["file_name"] for i, r in current.items()} == {
        r["index"]: r["file_name"] for r in rows
    }
    made = len(written_images(watcher.storage)) - len(expected)
    assert 0 <= made <= redone
    return made


def written_images(storage: Storage) -> list[str]:
    """Paths of all whole images, committed or not."""
    return [path for path, _, _ in storage.list("images") if "#" not in path]


def _read_parquet(storage: Storage, path: str) -> list[dict]:
    content = storage.get(path)
    assert content is not None, path
    return pq.read_table(io.BytesIO(content)).to_pylist()
