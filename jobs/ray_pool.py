"""Which actors of a job there are, how many there should be, and where the cluster has room.

A node on which the model cannot be loaded is left aside: Ray, which knows only of free GPUs, would
put every new worker there. Workers that it has already go on. Of a GPU that fails the actor stays,
and holds it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import ray
from ray._private import state as ray_state
from ray.util.scheduling_strategies import NodeLabelSchedulingStrategy, NotIn

from jobs.errors import ClusterError
from jobs.executor import Settings, WorkerSpec
from jobs.ray_handle import RayHandle, node_of

_TRIES = 3  # workers in a row that die on a node before they have loaded, until it is left aside


class RayPool:
    """The actors of one job.

    Args:
        spec: the job and its output.
        workers: how many, or "auto": one for each GPU, without any one for each
            `threads_per_worker` CPUs.
        gpus_per_worker: GPUs of an actor where the cluster has GPUs.
        threads_per_worker: CPUs of an actor where it has none.
        actor: class of the actors.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        workers: int | str,
        gpus_per_worker: float,
        threads_per_worker: int,
        actor: type,
    ) -> None:
        self.spec = spec
        resources = ray.cluster_resources()
        self.gpus = float(resources.get("GPU", 0))
        self.cpus = float(resources.get("CPU", 1))
        self._elastic = workers == "auto"
        self._gpus_per_worker = gpus_per_worker
        self._threads_per_worker = threads_per_worker
        self.workers: list[RayHandle] = []
        self._aside: set[str] = set()  # nodes on which no worker is started any more, by Ray's id
        self._holding: list[RayHandle] = []  # actors on devices that nobody else shall get
        self._died: Counter[str] = Counter()  # on each node, since one has loaded there
        self._settings: Settings | None = None
        self._counter = 0
        self.target = int(workers) if workers != "auto" else self._capacity()
        if workers == "auto" and not self.gpus:
            self.target = max(1, self.target)
        options: dict[str, Any] = {"num_gpus": gpus_per_worker, "num_cpus": 1}
        if not self.gpus:
            options = {"num_cpus": threads_per_worker}
        self._actor_class = ray.remote(
            max_restarts=0, max_task_retries=0, concurrency_groups={"control": 1}, **options
        )(actor)

    @property
    def shortfall(self) -> str | None:
        """Words for a cluster that has room for fewer workers than asked, else None."""
        room = self._capacity()
        if self.target <= room:
            return None
        have = f"{self.gpus:g} GPUs" if self.gpus else f"{self.cpus:g} CPUs"
        return (
            f"{self.target} workers asked, the cluster's {have} have room for {room}: "
            "starting with those, more join as room appears"
        )

    def start(self) -> None:
        """Start as many as there should be.

        Raises:
            ClusterError: that is none.
        """
        if self.target < 1:
            raise ClusterError(
                f"run.gpus_per_worker: {self._gpus_per_worker:g}: the cluster has "
                f"{self.gpus:g} GPUs, room for no worker"
            )
        self.fill()

    def load(self, settings: Settings) -> None:
        """Tell all of them, also those that come later, to load the model."""
        self._settings = settings
        for worker in self.workers:
            worker.loading = worker.actor.load.remote(settings)

    def follow_cluster(self) -> None:
        """Want more where GPUs have joined, if the number is `auto`."""
        if self._elastic and self.gpus:
            self.target = max(self.target, self._capacity())

    def fill(self) -> None:
        """Start those that are missing."""
        while len(self.workers) < self.target:
            self._add()

    def remove(self, worker: RayHandle) -> None:
        """End an actor, if it has not ended."""
        self.workers.remove(worker)
        ray.kill(worker.actor)

    def leave_aside(self, worker: RayHandle, *, device_only: bool = False) -> None:
        """Give up an actor that cannot load, and start none on its node, or device, any more."""
        before = self._capacity()
        if device_only:
            self.workers.remove(worker)
            self._holding.append(worker)
        else:
            node = node_of(worker)
            self.remove(worker)
            self._put_aside(node)
        self._want_less(before)

    def loaded(self, worker: RayHandle) -> None:
        """An actor has loaded its model."""
        self._died.pop(node_of(worker), None)

    def died_unloaded(self, worker: RayHandle) -> str | None:
        """An actor has died before it had loaded; words if its node is left aside for that.

        The last node that there is is not: whether to go on there is the driver's decision.
        """
        node = node_of(worker)
        self._died[node] += 1
        others = any(w.info is not None and w.info.node_id != node for w in self.workers)
        if not node or node in self._aside or self._died[node] < _TRIES or not others:
            return None
        before = self._capacity()
        self._put_aside(node)
        self._want_less(before)
        (host,) = [n["NodeManagerHostname"] for n in ray.nodes() if n["NodeID"] == node]
        return f"{_TRIES} workers in a row died on {host} before they had loaded"

    def _put_aside(self, node: str) -> None:
        if node in self._aside:
            return
        self._aside.add(node)
        good = {n["NodeID"] for n in ray.nodes()} - self._aside
        for worker in list(self.workers):
            if worker.info is None and node_of(worker) not in good:
                self.remove(worker)  # it may be on its way there

    def _want_less(self, before: int) -> None:
        """The cluster had room for so many: those for which it has none now are not replaced."""
        room = self._capacity()
        self.target -= max(0, min(self.target, before) - room)
        if not room:  # those who wait for room would only fail there
            self.target = 0

    def stop(self) -> None:
        """End all of them."""
        for worker in self.workers + self._holding:
            ray.kill(worker.actor)
        self.workers.clear()
        self._holding.clear()

    def on_drained_nodes(self) -> list[RayHandle]:
        """Those on nodes that are about to go, such as preempted spot instances."""
        nodes = ray_state.state.get_draining_nodes()
        return [w for w in self.workers if w.info is not None and w.info.node_id in nodes]

    def _capacity(self) -> int:
        """How many actors the cluster has room for, these and others."""
        nodes = [node for node in ray.nodes() if node["Alive"]]
        room = sum(self._slots(node) for node in nodes if node["NodeID"] not in self._aside)
        there = [w for w in self.workers if w.info is not None and w.info.node_id in self._aside]
        return room + len(there) - len(self._holding)

    def _slots(self, node: Mapping[str, Any]) -> int:
        resources = node["Resources"]
        if self.gpus:
            return int(resources.get("GPU", 0) / self._gpus_per_worker)
        return int(resources.get("CPU", 0) // self._threads_per_worker)

    def _placement(self) -> NodeLabelSchedulingStrategy | None:
        """What keeps new actors off the nodes that are left aside; None if there are no others."""
        for node in ray.nodes() if self._aside else ():
            if not node["Alive"] or node["NodeID"] in self._aside or not self._slots(node):
                continue
            for label, value in node["Labels"].items():
                if value == node["NodeID"]:  # what it is called depends on Ray's version
                    return NodeLabelSchedulingStrategy({label: NotIn(*sorted(self._aside))})
        return None

    def _add(self) -> None:
        name = f"w{self._counter}"
        self._counter += 1
        # the name is what the dashboard and `ray list actors` show
        actor = self._actor_class.options(
            name=f"zimage-{self.spec.nonce}-{name}", scheduling_strategy=self._placement()
        ).remote(self.spec, name)
        worker = RayHandle(name, actor, describing=actor.describe.remote(), moved=time.monotonic())
        if self._settings is not None:
            worker.loading = actor.load.remote(self._settings)
        self.workers.append(worker)
