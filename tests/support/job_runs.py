"""A small job on the shipped tiny checkpoint, and the command line as a user calls it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]

JOB = """
extends: {root}/configs/z-image-tiny.yaml
name: faces
prompts: {{generator: avatars, profiles: {root}/data/profiles/avatars.csv, count: {count}}}
sampling: {{width: 64, height: 64, num_inference_steps: {steps}, batch_size: 4}}
output: {{uri: {output}, shard_size: {shard_size}}}
"""


@dataclass(frozen=True)
class Job:
    """A job file in a folder of its own."""

    path: Path
    output: Path

    def command(self, *flags: str, verb: str = "run") -> list[str]:
        return [sys.executable, "-m", "jobs", verb, str(self.path), *flags]

    def run(self, *flags: str, verb: str = "run", **environment: str):
        return subprocess.run(
            self.command(*flags, verb=verb),
            cwd=self.path.parent,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    def start(self, *flags: str, **environment: str) -> subprocess.Popen:
        """In a session of its own, like a shell's job, so that signals can go to all of it."""
        log = (self.path.parent / "run.log").open("a")
        return subprocess.Popen(
            self.command(*flags),
            cwd=self.path.parent,
            env=os.environ | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def read_rows(output: Path) -> list[dict]:
    return pq.read_table(output / "metadata.parquet").to_pylist()


def read_hashes(output: Path) -> dict[int, str]:
    return {row["index"]: row["pixels_sha256"] for row in read_rows(output)}


@contextlib.contextmanager
def unmakeable(index: int) -> Iterator[None]:
    """Meanwhile the workers of this process fail at a sample, and at every batch that it is in."""
    from jobs.worker import GenerationWorker

    generate = GenerationWorker._generate

    def fail(self, batch):
        if any(sample.index == index for sample in batch):
            raise RuntimeError(f"sample {index} cannot be made")
        return generate(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationWorker, "_generate", fail)
        yield


def wait_for(condition: Callable[[], object], seconds: float = 120) -> object:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def kill_session(process: subprocess.Popen) -> None:
    """Nothing of a test's run outlives the test."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
