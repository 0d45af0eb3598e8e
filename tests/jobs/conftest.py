"""Fixtures of the runner's tests."""

from collections.abc import Callable

import pytest
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
