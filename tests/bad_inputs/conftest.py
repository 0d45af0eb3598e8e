"""Fixtures of the bad inputs: a folder with a good job, and a home that is watched."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bounds import Refuser, no_homes
from cli_calls import CommandLine


@pytest.fixture
def refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Refuser]:
    """Commands in a folder that holds a good `job.yaml`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    no_homes(tmp_path, monkeypatch)
    yield Refuser(CommandLine(tmp_path, capsys))
