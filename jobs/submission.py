"""Sending a job to a Ray cluster through Ray Jobs: what `zimage submit` does.

The job is checked here first, also for what would not survive the trip: Ray unpacks a copy of the
working directory on the cluster, runs the job there and throws the copy away. On the cluster it
is `python -m jobs run` with the same arguments, which reads the job file again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.address import (
    ADDRESS_VARIABLES,
    CONNECT_SECONDS,
    cluster_address,
    unreachable_reason,
)
from jobs.config import JobConfig
from jobs.errors import EXIT_INTERRUPTED, EXIT_OK, ClusterError, InputError
from jobs.job_file import FLAGS, read_job
from jobs.layers import Layers
from jobs.upload import Upload, collect

# Ray's own 3 s between SIGTERM and SIGKILL are too few to commit the batch under way.
STOP_SECONDS = 120
_UNREACHABLE = (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError)


def submit(
    job_path: Path | str,
    *,
    address: str | None = None,
    follow: bool = False,
    overlays: Sequence[Path] = (),
    sets: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
    arguments: Sequence[str] = (),
) -> int:
    """Check a job, upload the working directory and start the job on a cluster.

    Args:
        job_path: the job file, as for `zimage run`.
        address: the cluster, as `http://HEAD:8265`; None for the one in RAY_API_SERVER_ADDRESS
            or RAY_ADDRESS.
        follow: print the job's log until it ends.
        overlays: as for `load_job`, and passed on.
        sets: as for `load_job`, and passed on.
        flags: as for `load_job`, and passed on.
        arguments: further arguments for `zimage run` (`--limit 8`, `--retry-failed`).

    Returns:
        0 once the job is submitted; with `follow` the exit code of the job itself, 130 for one
        that was stopped or is no longer followed.

    Raises:
        InputError: the job is wrong or would not survive the trip, or no address is known.
        ClusterError: the cluster cannot be reached, refuses the job, or lost it.
    """
    config, layers = read_job(job_path, overlays=overlays, sets=sets, flags=flags)
    where = cluster_address(address)
    upload = collect(Path.cwd())
    lost = lost_on_the_way(config, layers, upload)
    if lost:
        raise InputError("\n".join(lost))
    command = ["python", "-m", "jobs", "run", _named(job_path)]
    for overlay in overlays:
        command += ["--config", _named(overlay)]
    for assignment in sets:
        command += ["--set", assignment]
    for key, value in (flags or {}).items():
        if value is not None:
            command.append(f"{FLAGS[key]}={value}")
    client = connect(where)
    submission = submission_id(config.name)
    _say(f"uploading {len(upload.files)} files, {upload.total_bytes / 2**20:.1f} MiB")
    if upload.too_large:
        names = ", ".join(str(file.relative_to(upload.root)) for file in upload.too_large)
        _say(f"left out because of their size: {names}")
    metadata = {"job": config.name, "output": config.output.uri}
    send(client, where, submission, [*command, *arguments], upload, metadata)
    named = f"--address {where} {submission}"
    _say(f"submitted {submission} to {where}")
    _say(f"  progress  zimage status {shlex.quote(config.output.uri)}")
    _say(f"  log       ray job logs --follow {named}")
    _say(f"  stop      ray job stop {named}")
    return follow_job(client, where, submission) if follow else EXIT_OK


def lost_on_the_way(config: JobConfig, layers: Layers, upload: Upload) -> list[str]:
    """Return one line for each part of a job that the cluster would not have.

    An absolute path, and what a file named by one names in turn, is taken to be there: clusters
    share file systems, and whether this one does cannot be seen from here.
    """
    problems = []
    uri = config.output.uri
    if "://" not in uri and not uri.startswith("/"):
        place = layers.origin(("output", "uri")).place(("output", "uri"))
        problems.append(
            f"{place}: value {uri!r}: relative to Ray's copy of the working directory, which is "
            "thrown away; allowed: s3://, gs://, az://, or an absolute path that all nodes share"
        )
    for file in config.files:
        inside = file.is_relative_to(upload.root)
        if inside or file not in layers.anchored:
            reason = upload.missing(file)
            if reason is not None:
                problems.append(f"{file}: the cluster would not have it: {reason}")
    for keys, written in layers.paths.items():
        if keys == ("model", "path") and config.model.repo is not None:
            continue  # each node fetches what it does not have
        absolute = written.text.startswith(("/", "~"))
        outside = not written.path.is_relative_to(upload.root)
        if absolute or (outside and not written.base.is_relative_to(upload.root)):
            continue
        reason = upload.missing(written.path)
        if reason is not None:
            problems.append(
                f"{written.origin.place(keys)}: value {written.text!r}: the cluster would not have "
                f"it: {reason}; allowed: a path that is uploaded, or an absolute one"
            )
    return problems


def submission_id(name: str) -> str:
    """Return a new id for Ray: the job's name, the time in UTC, and random characters."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def connect(address: str) -> JobSubmissionClient:
    """Connect to a cluster's Jobs API: `http://HEAD:8265`, `HEAD:8265`, or Ray's own addresses.

    Raises `ClusterError`, naming the address, within seconds where nothing answers.
    """
    url = address
    if "://" not in address and address != "auto":
        url = f"http://{address}" if _speaks_http(address) else address
    unreachable = unreachable_reason(url)
    if unreachable is not None:
        raise ClusterError(f"no Ray cluster answers at {address}: {unreachable}")
    try:
        with _without_ray_addresses():
            return JobSubmissionClient(url)
    except (*_UNREACHABLE, AssertionError) as error:
        raise ClusterError(f"{address} is no Ray cluster that takes jobs: {error}") from error


def send(
    client: JobSubmissionClient,
    address: str,
    submission: str,
    command: Sequence[str],
    upload: Upload,
    metadata: Mapping[str, str],
) -> None:
    """Upload the packed files and start a command in them. Raises `ClusterError`."""
    with tempfile.TemporaryDirectory(prefix="zimage-") as folder:
        archive = Path(folder) / "working_dir.zip"
        upload.pack(archive)
        try:
            client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=submission,
                runtime_env={
                    "working_dir": str(archive),
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                },
                metadata=dict(metadata),
            )
        except _UNREACHABLE as error:
            raise ClusterError(f"{address} did not take the job: {error}") from error


def follow_job(client: JobSubmissionClient, address: str, submission: str) -> int:
    """Print a job's log until it ends and return the exit code of its command.

    Ctrl-C ends the following, not the job. A connection that breaks is made again and goes on
    where the log had stopped. Raises `ClusterError` where the cluster is gone or the job ended
    without an exit code.
    """
    try:
        asyncio.run(_print_log(client, address, submission))
    except KeyboardInterrupt:
        _say(f"no longer following; the job goes on: ray job stop --address {address} {submission}")
        return EXIT_INTERRUPTED
    info = _info(client, address, submission)
    if info.status == JobStatus.SUCCEEDED:
        return EXIT_OK
    if info.status == JobStatus.STOPPED:
        _say(f"{submission} was stopped")
        return EXIT_INTERRUPTED
    code = info.driver_exit_code
    if code is None:
        found = re.search(r"exit code (-?\d+)", info.message or "")
        code = int(found.group(1)) if found else None
    if code is None or code < 0:
        raise ClusterError(f"{submission} ended without an exit code: {info.message}")
    return int(code)


async def _print_log(client: JobSubmissionClient, address: str, submission: str) -> None:
    printed = 0
    while True:
        seen = 0
        # A broken connection is no end of the job: what its status says decides.
        with contextlib.suppress(*_UNREACHABLE, aiohttp.ClientError):
            async for text in client.tail_job_logs(submission):
                new = text[max(0, printed - seen) :]
                seen += len(text)
                printed = max(printed, seen)
                sys.stdout.write(new)
                sys.stdout.flush()
        if _info(client, address, submission).status.is_terminal():
            return
        await asyncio.sleep(1)


def _info(client: JobSubmissionClient, address: str, submission: str) -> Any:
    for attempt in range(5):
        try:
            return client.get_job_info(submission)
        except _UNREACHABLE as error:
            problem = error
        time.sleep(2**attempt)
    raise ClusterError(f"{address} no longer answers about {submission}: {problem}") from problem


def _named(path: Path | str) -> str:
    """Return a path as the job finds it in its copy of the working directory."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100
    if absolute.exists() and absolute.is_relative_to(Path.cwd()):
        return str(absolute.relative_to(Path.cwd()))
    return str(path)


def _speaks_http(address: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        response = requests.get(f"http://{address}/api/version", timeout=CONNECT_SECONDS)
        return response.ok
    return False


@contextlib.contextmanager
def _without_ray_addresses() -> Iterator[None]:
    """Hide the environment's addresses: Ray lets them override the one that it is given."""
    hidden = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _say(line: str) -> None:
    print(line, flush=True)
