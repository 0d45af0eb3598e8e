"""A Ray cluster of several nodes on this machine, each of which can be killed, frozen or added.

Every node is a `ray start --block` in a session of its own. Its processes carry a token in their
environment, or were seen as children of such (Ray writes the titles of workers over their
environment), so that what is left at the end can be found and ended, and nothing else.
"""

import contextlib
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
from job_runs import wait_for

_TOKEN = "CHAOS_TOKEN"
# Every node has an address of its own. All of them are loopback, but Ray has no rules of its own
# for these as it has for 127.0.0.1.
_HEAD = "127.0.0.2"
_RAY = str(Path(sys.executable).parent / "ray")


class ChaosCluster:
    """A head without GPUs, to which drivers connect, and nodes with one logical GPU each.

    Args:
        environment: of all processes of the cluster, besides this process's own.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.token = secrets.token_hex(8)
        self._folder = tempfile.mkdtemp(prefix="zc-", dir="/tmp")  # socket paths have a limit
        secret = Path(self._folder) / "token"
        secret.touch(0o600)
        secret.write_text(secrets.token_hex(32))
        # Ray listens on more than loopback as soon as a cluster may have several nodes, so that
        # nobody may come in without the token.
        self.access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(secret)}
        os.environ.update(self.access)  # for the questions of this process
        self.environment = os.environ | environment
        self.environment |= {_TOKEN: self.token, "RAY_USAGE_STATS_ENABLED": "0"}
        with socket.socket() as free:
            free.bind((_HEAD, 0))
            self._port = free.getsockname()[1]
        self.address = f"{_HEAD}:{self._port}"
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._numbers = itertools.count(2)
        self._seen: set[psutil.Process] = set()
        self._joining = ThreadPoolExecutor(1)
        self._start("--head", f"--port={self._port}", "--num-gpus=0", "--num-cpus=0")
        wait_for(lambda: socket.socket().connect_ex((_HEAD, self._port)) == 0)
        # Ray reads how it may come in when it is imported
        from ray._private.state import GlobalState
        from ray._raylet import GcsClientOptions

        self._state = GlobalState()  # Ray's own test clusters ask in this way
        options = GcsClientOptions.create(
            self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
        )
        self._state._initialize_global_state(options)
        wait_for(lambda: self._alive(_HEAD))

    def add_node(self) -> "Future[None]":
        """Start a node with one logical GPU. One after the other: together they may block."""
        return self._joining.submit(self._add_node)

    def _add_node(self) -> None:
        for _ in range(5):
            node = self._start(f"--address={self.address}", "--num-gpus=1", "--num-cpus=1")
            with contextlib.suppress(AssertionError):
                wait_for(lambda: self._alive(str(node.args[-1]).partition("=")[2]), seconds=30)  # noqa: B023
                self.nodes.append(node)
                return
            node.kill()
        raise AssertionError("a node does not start")

    def _alive(self, address: str) -> bool:
        nodes = self._state.node_table()
        return any(n["Alive"] and n["NodeManagerAddress"] == address for n in nodes)

    def workers(self) -> list[psutil.Process]:
        """The processes of the job's workers on nodes that are there."""
        return [worker for node in self.nodes for worker in self.workers_of(node)]

    def raylet(self, node: subprocess.Popen[bytes]) -> psutil.Process | None:
        """The raylet of a node, or None where it is dead already."""
        return next((p for p in self._children(node) if _is_raylet(p)), None)

    def workers_of(self, node: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """The workers that run on a node."""
        return [p for p in self._children(node) if "WorkerActor" in _title(p)]

    def kill_raylet(self, node: subprocess.Popen[bytes]) -> None:
        """As if Ray itself had crashed there: its workers find out and end."""
        raylet = self.raylet(node)
        self.nodes.remove(node)
        if raylet is not None:
            _send(raylet, signal.SIGKILL)

    def kill_node(self, node: subprocess.Popen[bytes]) -> None:
        """As if the machine had lost its power: all of its processes at once."""
        self.nodes.remove(node)
        for process in [psutil.Process(node.pid), *self._children(node)]:
            _send(process, signal.SIGKILL)
        node.wait()

    def freeze(self, node: subprocess.Popen[bytes], number: signal.Signals) -> None:
        """SIGSTOP or SIGCONT to a node's raylet and workers: a machine that hangs, and goes on."""
        raylet = self.raylet(node)
        for process in [*self.workers_of(node), *([raylet] if raylet else [])]:
            _send(process, number)

    def stop(self) -> None:
        """End all that is left of the cluster and of what ran on it."""
        self._joining.shutdown(cancel_futures=True)
        for node in self.nodes:
            self._children(node)
        for _ in range(3):
            for process in self._family():
                _send(process, signal.SIGKILL)
            time.sleep(0.2)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [_RAY, "start", "--block", "--object-store-memory=100000000", *arguments]
        command += [f"--node-ip-address=127.0.0.{next(self._numbers)}"]
        if "--head" in arguments:
            command += [f"--temp-dir={self._folder}", "--include-dashboard=false"]
        return subprocess.Popen(
            command,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _children(self, node: subprocess.Popen[bytes]) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(node.pid).children(recursive=True)
            self._seen.update(found)
            return found
        return []

    def _family(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_TOKEN) == self.token or process in self._seen:
                    yield process


def _is_raylet(process: psutil.Process) -> bool:
    return Path((_title(process).split() or [""])[0]).name == "raylet"


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


@contextlib.contextmanager
def chaos_cluster(environment: dict[str, str], nodes: int = 2) -> Iterator[ChaosCluster]:
    """A cluster with so many nodes, and nothing of it afterwards."""
    cluster = ChaosCluster(environment)
    try:
        for _ in range(nodes):
            cluster.add_node().result()
        yield cluster
    finally:
        cluster.stop()
