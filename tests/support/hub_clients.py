"""Processes that fetch a checkpoint at once, as workers of one machine do.

They are forked off one clean process that has imported what costs, so that each starts at once.
"""

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from job_runs import ROOT

_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Client:
    """One process, and where its words go."""

    process: BaseProcess
    log: Path

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(20)

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait(self) -> str:
        """What it said, once it has ended well."""
        self.process.join(60)
        assert self.process.exitcode == 0, self.said
        return self.said


def start_client(
    folder: Path, log: Path, environment: dict[str, str], *arguments: Any, **options: Any
) -> Client:
    """Start `ensure_model_weights(folder, *arguments, **options)` in a process of its own."""
    # what the common process is started with; later ones find it running
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests/support"), str(ROOT)])
    _CONTEXT.set_forkserver_preload(["hub_clients_preload"])
    process = _CONTEXT.Process(
        target=_fetch, args=(folder, log, environment, arguments, options), daemon=True
    )
    log.touch()
    process.start()
    return Client(process, log)


def small_chunks() -> None:
    """Make both libraries write at once what they receive: they gather more than a test sends."""
    import huggingface_hub.constants
    import modelscope_hub._download

    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000
    modelscope_hub._download.DOWNLOAD_CHUNK_SIZE = 1000


def _fetch(
    folder: Path,
    log: Path,
    environment: dict[str, str],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    file = log.open("w", encoding="utf-8", buffering=1)
    os.dup2(file.fileno(), 2)
    sys.stderr = file
    os.environ.update(environment)
    small_chunks()
    from zimage_core.weights import ensure_model_weights

    started = time.monotonic()
    ensure_model_weights(folder, *arguments, **options)
    print(f"ended after {time.monotonic() - started:.1f} s", file=file)
