"""However many workers of a node load the same weights, they are read once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from job_runs import ROOT, Job, wait_for

from jobs import node_weights
from jobs.cli import main
from jobs.fingerprint import node_fingerprint
from jobs.node_weights import available_memory, note_read, read_ahead
from zimage_core.checkpoint import checkpoint_files

TINY = ROOT / "data/checkpoints/z-image-tiny"
SIZE = 12_000_000

WORKER = """
import sys
from pathlib import Path
from jobs import node_weights

def rchar():
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])

read = node_weights._read

def held(path):
    read(path)
    print("reading", flush=True)
    sys.stdin.readline()

node_weights._read = held
node_weights._READ_FROM = 0
before = rchar()
node_weights.read_ahead([Path(p) for p in sys.argv[1:]])
print(rchar() - before)
"""


@dataclass
class Worker:
    process: subprocess.Popen[str]

    def reads(self) -> bool:
        """Whether it has read a file and waits for `go_on`; waits until it has."""
        assert self.process.stdout is not None
        return self.process.stdout.readline() == "reading\n"

    @property
    def waits(self) -> bool:
        """Whether it stands before a lock that another process holds."""
        return any(
            "->" in line and f" {self.process.pid} " in line
            for line in Path("/proc/locks").read_text().splitlines()
        )

    def bytes_read(self) -> int:
        """All that it read, once it has ended well."""
        said, _ = self.process.communicate("\n" * 10, timeout=60)
        assert self.process.returncode == 0
        return int(said.splitlines()[-1])


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node that knows nothing yet: what its processes tell each other lies below this folder."""
    folder = tmp_path / "node"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(node_weights, "_READ_FROM", 0)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        path.write_bytes(os.urandom(SIZE // len(paths)))
    return paths


@pytest.fixture
def workers(files: list[Path]) -> Iterator[list[Worker]]:
    """Four processes that read ahead."""
    command = [sys.executable, "-c", WORKER, *map(str, files)]
    started = [
        Worker(
            subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
        for _ in range(4)
    ]
    yield started
    for worker in started:
        worker.process.kill()
        worker.process.communicate()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that this process reads ahead, in order."""
    names: list[str] = []
    real = node_weights._read

    def spy(path: Path) -> None:
        names.append(path.name)
        real(path)

    monkeypatch.setattr(node_weights, "_read", spy)
    return names


def holder_of(workers: list[Worker]) -> Worker:
    """The one that reads, once all others wait for it."""
    wait_for(lambda: sum(worker.waits for worker in workers) == len(workers) - 1)
    (holder,) = [worker for worker in workers if not worker.waits]
    assert holder.reads()
    return holder


def test_workers_that_load_at_once_read_once_in_all(workers: list[Worker]) -> None:
    holder = holder_of(workers)
    assert holder.bytes_read() >= SIZE
    others = [worker.bytes_read() for worker in workers if worker is not holder]
    assert sum(others) < SIZE / 100, "each reads its own /proc/self/io, and nothing else"


def test_a_worker_that_dies_while_it_reads_holds_up_nobody(workers: list[Worker]) -> None:
    holder = holder_of(workers)
    holder.process.kill()
    holder.process.wait()
    left = [worker for worker in workers if worker is not holder]
    successor = holder_of(left)
    assert successor.bytes_read() >= SIZE
    assert sum(w.bytes_read() for w in left if w is not successor) < SIZE / 100


def test_what_was_read_just_now_is_not_read_again(
    files: list[Path], read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = read_ahead(files)
    assert words is not None and words.startswith("read 0.01 GB of weights ahead in ")
    assert read == ["a.safetensors", "b.safetensors"]
    assert read_ahead([*reversed(files), files[0]]) is None
    assert len(read) == 2
    monkeypatch.setattr(node_weights, "_boot", lambda: "another start of the system")
    read_ahead(files)
    assert len(read) == 4
    monkeypatch.setattr(node_weights, "_RECENT", 0.0)
    read_ahead(files)
    assert len(read) == 6


def test_a_changed_file_is_read(files: list[Path], read: list[str]) -> None:
    read_ahead(files)
    files[0].write_bytes(b"other")
    read_ahead(files)
    assert len(read) == 4


def test_what_does_not_fit_into_memory_is_not_read_and_that_is_said(
    files: list[Path], read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_weights, "available_memory", lambda: int(1.9 * SIZE))
    assert read_ahead(files) == (
        "weights of 0.0 GB are not read ahead: more than half of the 0.0 GB of memory that are "
        "free; each worker reads what it loads"
    )
    assert read == []
    monkeypatch.setattr(node_weights, "available_memory", lambda: None)  # as off Linux
    assert read_ahead(files) is None
    assert read == []


def test_hashing_is_reading(read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.fingerprint._REMEMBER_FROM", 0)
    node_fingerprint(TINY)
    assert read_ahead(checkpoint_files(TINY)) is None
    assert read == []
    # A hash that is known from before says nothing of what is in memory now.
    monkeypatch.setattr(node_weights, "_RECENT", 0.0)
    node_fingerprint(TINY)
    read_ahead(checkpoint_files(TINY))
    assert len(read) == len(checkpoint_files(TINY))


def test_a_worker_reads_ahead_before_it_loads_and_says_so(
    make_job: Callable[..., Job], read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_weights, "_RECENT", 0.0)
    job = make_job(count=1)
    assert main(["run", str(job.path), "--local"]) == 0
    assert len(read) == len(checkpoint_files(TINY))
    (log,) = job.output.glob("logs/*.log")
    ahead, loaded = log.read_text().splitlines()[:2]
    assert " GB of weights ahead in " in ahead
    assert f"loaded {TINY}" in loaded


def test_a_node_without_a_folder_for_it_loads_all_the_same(
    files: list[Path], read: list[str], node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (node / f"zimage-{os.getuid()}").write_text("in the way")
    note_read(files)
    assert read_ahead(files) is None
    assert read == []
    monkeypatch.setenv("TMPDIR", "/proc/1")
    monkeypatch.setattr("tempfile.tempdir", "/proc/1")
    assert read_ahead(files) is None


def test_a_limit_of_the_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = available_memory()
    assert free is not None and free > 2**20
    monkeypatch.setattr(node_weights, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() == pytest.approx(free, rel=0.5)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 100\nactive_file 250000\ninactive_file 150000\n")
    assert available_memory() == 700_000


def test_small_checkpoints_are_not_worth_it(
    files: list[Path], read: list[str], node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_weights, "_READ_FROM", 2 * SIZE)
    note_read(files)
    assert read_ahead(files) is None
    assert read == []
    assert not list(node.iterdir())


def test_times_of_the_record_are_of_one_clock_for_all_processes() -> None:
    command = [sys.executable, "-c", "import time; print(time.monotonic())"]
    before = time.monotonic()
    other = float(subprocess.run(command, capture_output=True, check=True).stdout)
    assert before <= other <= time.monotonic()
