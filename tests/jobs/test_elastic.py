"""Real Ray, actors that sleep: the end of a job, and nodes that come and go."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from driver_loop import drive
from sleeping_executor import SETTINGS, sleeping_executor

from jobs import ray_executor
from jobs.executor import Trimmed, WorkerLeaving, WorkerLost, WorkerReady

pytestmark = pytest.mark.ray
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let actors import what the tests do."""
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))


@pytest.mark.slow
def test_one_slow_actor_costs_less_than_three_percent() -> None:
    from jobs.cluster import connected

    workers, each, seconds = 6, 40, 0.3
    total = workers * each
    ideal = total / ((workers - 1) / seconds + 1 / (3 * seconds))
    best = float("inf")
    for _ in range(3):  # by the clock on the wall: a busy machine may spoil one
        with connected(num_cpus=workers):
            executor = sleeping_executor(workers, seconds, {"w5": 3 * seconds})
            executor.start()
            try:
                executor.load(SETTINGS)
                driven = drive(executor, total, shard_size=16, together=True)
            finally:
                executor.stop()
        assert any(isinstance(event, Trimmed) and event.indices for event in driven.events)
        best = min(best, driven.seconds)
        if best <= ideal / 0.97:
            return
    assert best <= ideal / 0.97


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(ray_executor, "_JOIN", 0.5)
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 4, "num_gpus": 1, "object_store_memory": 80 * 2**20},
    )
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.long
def test_nodes_join_are_drained_and_die(cluster: Any) -> None:
    """All in one run, for a cluster takes longer to start than this takes."""
    import ray
    from ray.core.generated import autoscaler_pb2

    options = {"num_cpus": 4, "num_gpus": 1, "object_store_memory": 80 * 2**20}
    dies = cluster.add_node(**options)
    leaves = cluster.add_node(**options)
    cluster.wait_for_nodes()
    executor = sleeping_executor("auto", 0.15)
    executor.start()
    assert executor.pool.target == 3
    total, done = 3 * 90, []

    def disturb(scheduler: Any) -> None:
        if scheduler.num_ended > 20 and "join" not in done:
            done.append("join")
            cluster.add_node(**options)
        if scheduler.num_ended > 90 and "drain" not in done:
            done.append("drain")
            ray._raylet.GcsClient(address=cluster.address).drain_node(
                leaves.node_id,
                autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
                "spot",
                int((time.time() + 60) * 1000),
            )
        if scheduler.num_ended > 150 and "die" not in done:
            done.append("die")
            os.kill(dies.all_processes["raylet"][0].process.pid, signal.SIGKILL)

    try:
        executor.load(SETTINGS)
        happened = drive(executor, total, shard_size=16, together=True, on_poll=disturb).events
    finally:
        executor.stop()
    assert done == ["join", "drain", "die"]
    ready = [event.info for event in happened if isinstance(event, WorkerReady)]
    assert len({info.node_id for info in ready}) == 4, "the node that joined got a worker"
    (leaving,) = [event for event in happened if isinstance(event, WorkerLeaving)]
    assert leaving.reason == "its node is being drained"
    assert leaving.info is not None and leaving.info.node_id == leaves.node_id
    lost = [event for event in happened if isinstance(event, WorkerLost)]
    # Ray may take longer to notice than others take to make what was there.
    assert {event.info.node_id for event in lost if event.info} <= {dies.node_id}
