"""Fixtures of the runner's tests."""

import sys
from collections.abc import Callable, Iterator

import pytest
from cli_calls import CommandLine
from job_runs import JOB, ROOT, Job


@pytest.fixture
def make_job(tmp_path) -> Callable[..., Job]:
    def make(*, count: int = 12, steps: int = 2, shard_size: int = 4, name: str = "out") -> Job:
        output = tmp_path / name
        path = tmp_path / "job.yaml"
        path.write_text(
            JOB.format(root=ROOT, count=count, steps=steps, output=output, shard_size=shard_size)
        )
        return Job(path, output)

    return make


@pytest.fixture
def zimage(tmp_path, monkeypatch, capsys) -> Iterator[CommandLine]:
    """The command line in a folder that holds `job.yaml`; modules of its own are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a rewritten module has one second's age
    yield CommandLine(tmp_path, capsys)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
