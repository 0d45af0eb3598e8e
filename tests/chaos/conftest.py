"""A job that takes a third of a second, and a server that runs it in processes that may die."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash_server import CrashServer, crash_server
from job_runs import read_hashes

from zimage_core.tiny.make import make_checkpoint

COUNT, SHARD = 3, 2

JOB = """
name: faces
model: {{path: {model}, dtype: float32}}
prompts:
  {{generator: template, profiles: jobs.csv, count: {count}, options: {{template: "a {{job}}"}}}}
sampling: {{width: 32, height: 32, num_inference_steps: 1, batch_size: 2}}
output: {{uri: out, shard_size: {shard}}}
"""


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[CrashServer]:
    with crash_server(tmp_path_factory.mktemp("server") / "log") as started:
        yield started


@pytest.fixture(scope="session")
def run(server, tmp_path_factory) -> Callable[..., int]:
    """`run(output, *flags, **faults)`: `zimage run --local` of the small job; its exit code."""
    folder = tmp_path_factory.mktemp("job")
    model = make_checkpoint(folder / "model", layers=1, text_layers=2, vae_channels=(8, 8, 8, 8))
    (folder / "jobs.csv").write_text("job\n" + "\n".join(f"job {n}" for n in range(40)))
    job_file = folder / "job.yaml"
    job_file.write_text(JOB.format(model=model, count=COUNT, shard=SHARD))

    def run(output: Path, *flags: object, **faults: object) -> int:
        return server.run("run", job_file, "--local", "--output", output, *flags, **faults)

    return run


@pytest.fixture(scope="session")
def undisturbed(run, tmp_path_factory) -> tuple[Path, list[str]]:
    """The output of a run that nothing happens to, and the paths it wrote, in order."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(folder / "out", journal=str(folder / "journal")) == 0
    return folder / "out", (folder / "journal").read_text().splitlines()


@pytest.fixture(scope="session")
def expected(undisturbed) -> dict[int, str]:
    """The pixels' hashes of the undisturbed run."""
    hashes = read_hashes(undisturbed[0])
    assert len(set(hashes.values())) == COUNT
    return hashes
