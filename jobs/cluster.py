"""Connecting to Ray: the cluster at hand, or a small one of our own on loopback."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from jobs.address import current_cluster, listens_on_loopback_only, unreachable_reason
from jobs.errors import ClusterError, InputError

# Where Ray Jobs tells a job's process what it was submitted with.
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_OBJECT_STORE = 128 * 1024 * 1024  # bytes; rows are all that passes through it


def refuse_lost_output(uri: str) -> None:
    """Refuse a relative output in a Ray job that runs in Ray's copy of a working directory.

    Raises:
        InputError: the images would be thrown away with that copy.
    """
    job = json.loads(os.environ.get(_JOB_CONFIG) or "{}")
    copied = job.get("runtime_env", {}).get("working_dir")
    if copied and "://" not in uri and not Path(uri).expanduser().is_absolute():
        raise InputError(
            f"output.uri: value {uri!r}: relative to Ray's copy of the working directory, which is "
            "thrown away; allowed: s3://, gs://, az://, or an absolute path that all nodes share"
        )


def _set_loopback() -> None:
    """The environment of a Ray that is started here, inherited by all its processes."""
    # Ray turns 127.0.0.1 into the machine's outward address and listens on every interface, but
    # for where it knows no clusters: this is the switch for that, whatever its name says.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Otherwise a local Ray writes a token into the user's home.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM: `ray.init` puts one in its place that ends the process."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def connected(num_cpus: int | None = None) -> Iterator[str]:
    """Connect to the cluster of RAY_ADDRESS (set inside a Ray job), or start one on loopback.

    A cluster that was started here listens on 127.0.0.1 only, has no dashboard, keeps its files
    in a temporary folder and is gone afterwards. A connection that exists already is used as it
    is and left open.

    Args:
        num_cpus: CPUs of a cluster that is started here; None for the machine's.

    Yields:
        Words that say which cluster it is.

    Raises:
        ClusterError: the address does not answer, or no cluster can be started.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address == "auto":
        address = current_cluster() or address
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Of several workers that meet the same full disk one is reported; Ray would print the others'
    # tracebacks between our lines.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    if "ray" not in sys.modules and (not address or listens_on_loopback_only(address)):
        _set_loopback()
    import ray  # after its environment is set: Ray reads it when it is imported

    if ray.is_initialized():
        yield "the Ray cluster of this process"
        return
    if address:
        if address.startswith(("http://", "https://")):
            raise ClusterError(
                f"RAY_ADDRESS: {address!r}: a dashboard, to which `zimage submit` sends jobs; "
                "allowed here: HEAD:6379, ray://HEAD:10001 or auto"
            )
        reason = unreachable_reason(address)  # Ray itself would try for minutes
        if reason is not None:
            raise ClusterError(f"RAY_ADDRESS: {address!r}: no Ray cluster answers: {reason}")
        try:
            with _own_sigterm():
                ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise ClusterError(
                f"RAY_ADDRESS: {address!r}: no Ray cluster answers: {error}"
            ) from error
        try:
            yield f"the Ray cluster at {address}"
        finally:
            ray.shutdown()
        return
    folder = tempfile.mkdtemp(prefix="zimage-", dir="/tmp")  # short: socket paths have a limit
    try:
        try:
            with _own_sigterm():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    _temp_dir=folder,
                )
        except Exception as error:
            if type(error) is not Exception:
                raise
            # Ray's way to say that its processes did not come up within half a minute
            raise TimeoutError(str(error)) from error
        yield "a Ray cluster of its own on loopback"
    except (ConnectionError, TimeoutError) as error:
        raise ClusterError(f"no local Ray cluster could be started: {error}") from error
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
