"""A worker's log on a local output and on an object store, which cannot append."""

import pytest

from jobs import worker_log
from jobs.errors import StorageError
from jobs.storage import Storage
from jobs.worker_log import WorkerLog

PATH = "logs/000001-w0.log"


class ObjectStore(Storage):
    """Objects in memory; counts the bytes that were sent."""

    def __init__(self) -> None:
        self.root = None
        self.uri = "s3://bucket/out"
        self.objects: dict[str, bytes] = {}
        self.sent = 0
        self.is_down = False

    def put(self, path, content):
        self.sent += len(content)
        if self.is_down:
            raise StorageError("down")
        self.objects[path] = content

    def lines(self) -> list[str]:
        """Texts of all lines, the objects in the order of their names."""
        text = b"".join(self.objects[path] for path in sorted(self.objects)).decode()
        return [line.split(" ", 2)[2] for line in text.splitlines()]


def test_local_lines_are_there_at_once(tmp_path):
    log = WorkerLog(Storage(str(tmp_path / "out"), create=True), PATH)
    log.write("one")
    log.write("two\nthree")
    text = (tmp_path / "out" / PATH).read_text()
    assert [line[20:] for line in text.splitlines()] == ["one", "two\\nthree"]


def test_a_short_log_is_one_object():
    store = ObjectStore()
    log = WorkerLog(store, PATH)
    for number in range(20):
        log.write(f"lease {number}")
        log.flush()
    assert list(store.objects) == [PATH]
    assert store.lines() == [f"lease {number}" for number in range(20)]


def test_what_is_sent_and_held_does_not_grow_with_the_job(monkeypatch):
    """A line is 40 bytes: the whole text at each flush would be 80 MB, and 80 KB held."""
    monkeypatch.setattr(worker_log, "_MAX_FILE", 4000)
    store = ObjectStore()
    log = WorkerLog(store, PATH)
    for number in range(2000):
        log.write(f"lease {number:012d}")
        log.flush()
    log.flush()  # nothing new: nothing is sent
    assert store.lines() == [f"lease {number:012d}" for number in range(2000)]
    assert max(map(len, store.objects.values())) < 4100
    assert store.sent < 2000 * 4100
    assert sum(map(len, log._lines)) < 4100
    assert sorted(store.objects)[:2] == [PATH, f"{PATH}.00001"]


@pytest.mark.parametrize("limit", [10, 1000])
def test_lines_that_could_not_be_sent_are_sent_later(monkeypatch, limit):
    monkeypatch.setattr(worker_log, "_MAX_FILE", limit)
    store = ObjectStore()
    log = WorkerLog(store, PATH)
    for number in range(6):
        store.is_down = number in (2, 3)
        log.write(f"lease {number}")
        log.flush()
    assert store.lines() == [f"lease {number}" for number in range(6)]
