"""Fixtures of the runner's tests."""

import sys
from collections.abc import Callable, Iterator

import pytest
from cli_calls import CommandLine
from fault_proxy import FaultProxy
from job_runs import JOB, ROOT, Job
from s3_server import BUCKET, S3Server, s3_environment, s3_server

from jobs import storage as storage_module


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


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """An S3 server."""
    with s3_server() as server:
        yield server


@pytest.fixture
def proxy(server, monkeypatch) -> Iterator[FaultProxy]:
    """What lies between the object stores of this process and the server, and breaks traffic."""
    monkeypatch.setattr(storage_module, "_FIRST_DELAY", 0.01)
    with FaultProxy(server.address, delay=0.1) as proxy:
        for name, value in s3_environment(proxy.port).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def uri(proxy, request) -> str:
    """A place on the server of the test's own."""
    return f"s3://{BUCKET}/{request.node.name.replace('[', '-').rstrip(']')}"
