"""Runs `zimage` again and again in processes that may die, forked off one that has imported it.

A fresh interpreter would need seconds for its imports alone; so a hundred deaths take a minute.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class CrashServer:
    """The process that forks."""

    def __init__(self, log: Path) -> None:
        self.log = log
        log.touch()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("a"),
            text=True,
        )

    def run(self, *arguments: object, **faults: Any) -> int:
        """`zimage ARGUMENTS` with `storage_faults.install(faults)`; the exit code, as `Popen` says.

        Nothing that a command prints may be a traceback.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        before = self.log.stat().st_size
        request = {"arguments": [str(a) for a in arguments], "faults": faults}
        self._process.stdin.write(json.dumps({**request, "log": str(self.log)}) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        self.said = self.log.read_bytes()[before:].decode()
        assert "Traceback" not in self.said, self.said
        return code

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


@contextlib.contextmanager
def crash_server(log: Path) -> Iterator[CrashServer]:
    server = CrashServer(log)
    try:
        yield server
    finally:
        server.stop()


def _serve() -> None:
    import gc

    import torch
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import jobs.job_file
    import jobs.runner
    import jobs.verify
    import jobs.worker  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is shared with the children stays shared
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_command(request))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _command(request: dict[str, Any]) -> int:
    import traceback

    import storage_faults

    from jobs.cli import main

    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdin.close()
    if request["faults"]:
        storage_faults.install(request["faults"])
    try:
        return main(request["arguments"])
    except BaseException:
        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    _serve()
