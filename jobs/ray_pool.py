"""Which actors of a job there are, how many there should be, and what the cluster has room for."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray._private import state as ray_state

from jobs.errors import ClusterError
from jobs.executor import Settings, WorkerSpec
from jobs.ray_handle import RayHandle


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
        self.target = int(workers) if workers != "auto" else self._capacity()
        self.workers: list[RayHandle] = []
        self._settings: Settings | None = None
        self._counter = 0
        self._failed = 0  # workers that could not load: others would not either where they ran
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
            self.gpus = float(ray.cluster_resources().get("GPU", 0)) or self.gpus
            self.target = max(self.target, self._capacity() - self._failed)

    def fill(self) -> None:
        """Start those that are missing."""
        while len(self.workers) < self.target:
            self._add()

    def remove(self, worker: RayHandle) -> None:
        """End an actor, if it has not ended."""
        self.workers.remove(worker)
        ray.kill(worker.actor)

    def leave_aside(self, worker: RayHandle) -> None:
        """End an actor that cannot load, and start none in its place."""
        self.remove(worker)
        self.target -= 1
        self._failed += 1

    def stop(self) -> None:
        """End all of them."""
        for worker in self.workers:
            ray.kill(worker.actor)
        self.workers.clear()

    def on_drained_nodes(self) -> list[RayHandle]:
        """Those on nodes that are about to go, such as preempted spot instances."""
        nodes = ray_state.state.get_draining_nodes()
        return [w for w in self.workers if w.info is not None and w.info.node_id in nodes]

    def _capacity(self) -> int:
        if self.gpus:
            return int(self.gpus / self._gpus_per_worker)
        return max(1, int(self.cpus // self._threads_per_worker))

    def _add(self) -> None:
        name = f"w{self._counter}"
        self._counter += 1
        # the name is what the dashboard and `ray list actors` show
        actor = self._actor_class.options(name=f"zimage-{self.spec.nonce}-{name}").remote(
            self.spec, name
        )
        worker = RayHandle(name, actor, describing=actor.describe.remote(), moved=time.monotonic())
        if self._settings is not None:
            worker.loading = actor.load.remote(self._settings)
        self.workers.append(worker)
