"""Real Ray: nodes and devices on which no worker comes up cost a few tries, and get no others.

And a worker that gets SIGTERM leaves, and has another one in its place.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from driver_loop import drive
from sleeping_actor import SleepingActor
from sleeping_executor import SETTINGS, sleeping_executor

from jobs.cluster import connected
from jobs.errors import ClusterError, DeviceUnusableError
from jobs.executor import (
    LoadFailed,
    Settings,
    WorkerLeaving,
    WorkerLost,
    WorkerReady,
    WorkerSpec,
)
from jobs.ray_worker import drain_on_sigterm

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(480)]


class Picky(SleepingActor):
    """Cannot even be made where the package is missing, and does not load on GPU 0."""

    def __init__(self, spec: WorkerSpec, name: str) -> None:
        if os.environ.get("WITHOUT_PACKAGE"):
            raise ModuleNotFoundError("No module named 'jobs'")
        super().__init__(spec, name)
        drain_on_sigterm(self.draining.set)

    def load(self, settings: Settings) -> tuple[float, None]:
        if os.environ["CUDA_VISIBLE_DEVICES"] == "0":
            raise DeviceUnusableError("it fails on a first image")
        return super().load(settings)


class Unlucky(SleepingActor):
    """Those started first, as many as the job's `config` says, die of something else than code."""

    def __init__(self, spec: WorkerSpec, name: str) -> None:
        if int(name[1:]) < json.loads(spec.config)["unlucky"]:
            os._exit(1)
        super().__init__(spec, name)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))
    options = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args=options)
    made.add_node(**options, env_vars={"WITHOUT_PACKAGE": "1"})
    ray.init(address=made.address, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield made
    ray.shutdown()
    made.shutdown()


def test_node_where_workers_die_and_device_that_fails_are_left_aside(cluster: Any) -> None:
    executor = sleeping_executor("auto", 0.1, actor=Picky)
    assert executor.start().node_id == cluster.head_node.node_id
    told: list[int] = []

    def tell_once(scheduler: Any) -> None:
        worker = next((w for w in executor.pool.workers if w.leases), None)
        if not told and executor.pool.target == 1 and worker is not None:
            told.append(worker.info.pid)
            os.kill(worker.info.pid, signal.SIGTERM)  # then its place is free, and the bad node

    try:
        executor.load(SETTINGS)
        events = drive(executor, 200, shard_size=20, on_poll=tell_once).events
        assert executor.num_workers == 1
    finally:
        executor.stop()
    aside, device = sorted(
        (event for event in events if isinstance(event, LoadFailed)), key=lambda e: e.device_only
    )
    assert device.device_only and device.message == "it fails on a first image"
    assert not aside.device_only
    assert aside.message.startswith("3 workers in a row died on ")
    assert aside.message.endswith("the last of them: ModuleNotFoundError: No module named 'jobs'")
    lost = [event for event in events if isinstance(event, WorkerLost)]
    assert [event.loaded for event in lost] == [False, False, False]
    (leaving,) = [event for event in events if isinstance(event, WorkerLeaving)]
    assert leaving.reason == "it was told to stop"
    assert leaving.info is not None and [leaving.info.pid] == told
    ready = [event.info for event in events if isinstance(event, WorkerReady)]
    assert told == [ready[0].pid]
    assert {info.node_id for info in ready} == {cluster.head_node.node_id}
    assert len(ready) == 2


def test_workers_that_all_die_at_the_start_are_replaced_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))
    with connected(num_cpus=2):
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        executor = sleeping_executor(2, 0.0, {"unlucky": 4}, actor=Unlucky)
        executor.start()
        try:
            executor.load(SETTINGS)
            drive(executor, 20, shard_size=5)
            assert {worker.name for worker in executor.pool.workers} == {"w4", "w5"}
        finally:
            executor.stop()
        said = "every worker died before it could start: ActorDiedError: "
        assert capsys.readouterr().err.count(said) == 2
        executor = sleeping_executor(2, 0.0, {"unlucky": 6}, actor=Unlucky)
        with pytest.raises(ClusterError, match="every worker died before it could start"):
            executor.start()
        executor.stop()
