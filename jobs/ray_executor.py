"""`RayExecutor`: one long-lived actor for each GPU, each with its own loaded pipeline.

Actors never restart by themselves (`max_restarts=0`): what a lost worker means is the driver's
decision. Rows come back through a streaming generator, a batch at a time; heartbeats run in a
concurrency group of their own, because Ray notices neither a hung worker nor, for a minute, a
frozen node. Any RayError that is not the worker's own exception costs the worker.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private import state as ray_state
from ray.exceptions import RayError, RayTaskError

from jobs.errors import ClusterError, InputError, JobError, StorageUnusableError
from jobs.executor import (
    Event,
    Lease,
    LeaseEnded,
    LoadFailed,
    Message,
    Progress,
    Settings,
    Trimmed,
    WorkerInfo,
    WorkerLeaving,
    WorkerLost,
    WorkerReady,
    WorkerSpec,
)
from jobs.ray_handle import RayHandle, cause_of, first_line, last_line
from jobs.ray_worker import WorkerActor

_IN_FLIGHT = 2  # leases for each worker: the one under way and the next
_BEAT = 2.0  # seconds between two questions to a worker whether it moves
_LOAD_LIMIT = 1800.0  # seconds for a worker to start and load, at least
_ROOM_NOTE = 30.0  # seconds between two words about a cluster that has no room
_JOIN = 5.0  # seconds between two looks for GPUs that joined the cluster


class RayExecutor:
    """Actors on the Ray cluster that this process is connected to.

    Args:
        spec: the job and its output.
        workers: how many, or "auto": one for each GPU, without any one for each
            `threads_per_worker` CPUs.
        gpus_per_worker: GPUs of an actor where the cluster has GPUs.
        threads_per_worker: CPUs of an actor where it has none.
        stall_timeout: seconds without a step of work after which a worker counts as hung.
        actor: class of the actors, `WorkerActor` or one with its methods.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        workers: int | str,
        gpus_per_worker: float,
        threads_per_worker: int,
        stall_timeout: float,
        actor: type = WorkerActor,
    ) -> None:
        self.spec = spec
        self.stall_timeout = stall_timeout
        resources = ray.cluster_resources()
        self.gpus = float(resources.get("GPU", 0))
        self.cpus = float(resources.get("CPU", 1))
        self._elastic = workers == "auto"
        self._gpus_per_worker = gpus_per_worker
        self._threads_per_worker = threads_per_worker
        self._target = int(workers) if workers != "auto" else self._capacity()
        self._settings: Settings | None = None
        self._workers: list[RayHandle] = []
        self._events: deque[Event] = deque()
        self._counter = 0
        self._draining = False
        self._failed = 0  # workers that could not load: others would not either where they ran
        self._looked = time.monotonic()
        options: dict[str, Any] = {"num_gpus": gpus_per_worker, "num_cpus": 1}
        if not self.gpus:
            options = {"num_cpus": threads_per_worker}
        self._actor_class = ray.remote(
            max_restarts=0, max_task_retries=0, concurrency_groups={"control": 1}, **options
        )(actor)

    @property
    def num_workers(self) -> int:
        """See `Executor.num_workers`."""
        return max(len(self._workers), self._target)

    @property
    def target(self) -> int:
        """Workers that are wanted."""
        return self._target

    @property
    def shortfall(self) -> str | None:
        """Words for a cluster that has room for fewer workers than asked, else None."""
        room = self._capacity()
        if self._target <= room:
            return None
        have = f"{self.gpus:g} GPUs" if self.gpus else f"{self.cpus:g} CPUs"
        return (
            f"{self._target} workers asked, the cluster's {have} have room for {room}: "
            "starting with those, more join as room appears"
        )

    def start(self) -> WorkerInfo:
        """See `Executor.start`."""
        if self._target < 1:
            raise ClusterError(
                f"run.gpus_per_worker: {self._gpus_per_worker:g}: the cluster has "
                f"{self.gpus:g} GPUs, room for no worker"
            )
        for _ in range(self._target):
            self._add()
        begun, reason = time.monotonic(), ""
        while True:
            describing = {w.describing: w for w in self._workers}
            if not describing:
                raise ClusterError(f"every worker died before it could start: {reason}")
            done, _ = ray.wait(list(describing), num_returns=1, timeout=_ROOM_NOTE)
            if not done:
                self._wait_for_room(time.monotonic() - begun)
                continue
            worker = describing[done[0]]
            try:
                worker.info = ray.get(done[0])
            except RayError as error:
                self._workers.remove(worker)
                cause = cause_of(error)
                if isinstance(cause, JobError):
                    raise cause from error
                reason = last_line(error)
                continue
            assert worker.info is not None
            worker.describing = None
            self._first = worker
            return worker.info

    def _wait_for_room(self, waited: float) -> None:
        """Say that no worker has started; an autoscaler may take minutes to bring a node."""
        free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        words = f"no worker has started after {waited:.0f} s; free on the cluster: {free}"
        if waited > _LOAD_LIMIT:
            raise ClusterError(words)
        print(f"{words}; waiting", file=sys.stderr, flush=True)

    def fingerprint(self) -> str:
        """See `Executor.fingerprint`; asks the worker that started first."""
        return str(self._ask("fingerprint"))

    def memory_needed(self) -> Mapping[str, int]:
        """See `Executor.memory_needed`; asks the worker that started first."""
        return dict(self._ask("memory_needed"))

    def _ask(self, method: str) -> Any:
        try:
            answer = getattr(self._first.actor, method).remote()
            return ray.get(answer, timeout=max(_LOAD_LIMIT, self.stall_timeout))
        except RayError as error:
            cause = cause_of(error)
            if isinstance(cause, JobError):
                raise cause from error
            raise ClusterError(f"worker {self._first.name} died: {error}") from error

    def load(self, settings: Settings) -> None:
        """See `Executor.load`."""
        self._settings = settings
        for worker in self._workers:
            worker.loading = worker.actor.load.remote(settings)

    def free(self) -> int:
        """See `Executor.free`."""
        return sum(_IN_FLIGHT - len(w.leases) for w in self._workers if w.takes_leases)

    def idle(self) -> list[str]:
        """See `Executor.idle`."""
        return [w.name for w in self._workers if w.takes_leases and not w.leases]

    def submit(self, lease: Lease, worker: str | None = None) -> str:
        """See `Executor.submit`."""
        ready = [w for w in self._workers if w.takes_leases]
        chosen = min(ready, key=lambda w: (w.name != worker, len(w.leases)))
        if not chosen.leases:
            chosen.moved = time.monotonic()
        chosen.leases.append((lease, chosen.actor.run.remote(lease)))
        return chosen.name

    def trim(self, lease: Lease, indices: Sequence[int]) -> None:
        """See `Executor.trim`."""
        for worker in self._workers:
            if any(held.attempt == lease.attempt for held, _ in worker.leases):
                answer = worker.actor.trim.remote(lease.attempt, list(indices))
                worker.trimming[answer] = lease
                return
        self._events.append(Trimmed("", lease, ()))  # it has ended, or its worker is gone

    def poll(self, timeout: float) -> list[Event]:
        """See `Executor.poll`."""
        self._join()
        deadline = time.monotonic() + timeout
        while not self._events:
            left = deadline - time.monotonic()
            waiting = self._waiting()
            if waiting:
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=max(0.0, min(left, 0.5)))
                for ref in done:
                    self._receive(waiting[ref], ref)
            elif left > 0:
                time.sleep(min(left, 0.1))
            self._watch()
            if left <= 0:
                break
        events = list(self._events)
        self._events.clear()
        return events

    def drain(self) -> None:
        """See `Executor.drain`."""
        self._draining = True
        for worker in self._workers:
            worker.actor.drain.remote()

    def stop(self) -> None:
        """See `Executor.stop`."""
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers.clear()

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
        self._workers.append(worker)

    def _join(self) -> None:
        """Replace lost workers, and follow the cluster's GPUs where the number is `auto`."""
        if self._settings is None or self._draining:
            return
        if time.monotonic() - self._looked > _JOIN:
            self._looked = time.monotonic()
            self._leave_drained_nodes()
            if self._elastic and self.gpus:
                self.gpus = float(ray.cluster_resources().get("GPU", 0)) or self.gpus
                self._target = max(self._target, self._capacity() - self._failed)
        for worker in list(self._workers):
            if worker.leaving and not worker.leases:
                self._workers.remove(worker)
                ray.kill(worker.actor)
        while len(self._workers) < self._target:
            self._add()

    def _leave_drained_nodes(self) -> None:
        """Drain the workers of nodes that are about to go, such as preempted spot instances."""
        nodes = ray_state.state.get_draining_nodes()
        for worker in self._workers:
            if worker.info is not None and worker.info.node_id in nodes:
                self._leaves(worker, "its node is being drained")

    def _leaves(self, worker: RayHandle, reason: str) -> None:
        if worker.leaving:
            return
        worker.leaving = True
        worker.actor.drain.remote()
        self._events.append(WorkerLeaving(worker.name, worker.info, reason))

    def _waiting(self) -> dict[Any, RayHandle]:
        return {ref: worker for worker in self._workers for ref in worker.questions()}

    def _receive(self, worker: RayHandle, ref: Any) -> None:
        try:
            if ref is worker.describing:
                worker.info = ray.get(ref)
                worker.describing = None
                worker.moved = time.monotonic()
            elif ref is worker.beating:
                worker.beating = None
                ticks = ray.get(ref)
                if ticks != worker.ticks:
                    worker.ticks, worker.moved = ticks, time.monotonic()
            elif ref in worker.trimming:
                lease = worker.trimming.pop(ref)
                self._events.append(Trimmed(worker.name, lease, tuple(ray.get(ref))))
            elif ref is worker.loading:
                seconds, canary = ray.get(ref)
                worker.loading = None
                worker.ready = True
                assert worker.info is not None
                self._events.append(WorkerReady(worker.name, worker.info, seconds, canary))
            else:
                self._message(worker, ray.get(next(ref)))
        except StopIteration:
            # the stream broke off without its end mark
            self._lose(worker, "worker_died", "its answer broke off")
        except RayTaskError as error:
            cause = cause_of(error)
            if isinstance(cause, StorageUnusableError):
                raise cause from error
            if isinstance(cause, JobError) and not worker.ready:
                self._workers.remove(worker)
                self._target -= 1
                self._failed += 1
                ray.kill(worker.actor)
                if isinstance(cause, InputError):
                    raise cause from error
                self._events.append(LoadFailed(worker.name, worker.info, str(cause)))
            else:
                self._lose(worker, "worker_died", f"{type(cause).__name__}: {cause}")
        except RayError as error:
            self._lose(worker, "worker_died", first_line(error))

    def _message(self, worker: RayHandle, message: Message | tuple[str, bool]) -> None:
        worker.moved = time.monotonic()
        assert worker.info is not None
        if isinstance(message, tuple):
            lease, _ = worker.leases.popleft()
            drained = message[1]
            self._events.append(LeaseEnded(worker.name, lease, drained))
            if drained and not self._draining:
                self._leaves(worker, "it was told to stop")
        else:
            lease = worker.leases[0][0]
            self._events.append(Progress(worker.name, worker.info, lease, message))

    def _watch(self) -> None:
        """Ask busy workers whether they move, and give up those that do not."""
        now = time.monotonic()
        for worker in list(self._workers):
            # one that waits for room on the cluster has no time running
            limit = max(_LOAD_LIMIT, self.stall_timeout)
            if worker.info is not None and not worker.ready and now - worker.moved > limit:
                self._lose(worker, "worker_stalled", f"not loaded after {limit:g} s")
            if not worker.ready or not worker.leases:
                continue
            if worker.beating is None and now - worker.asked > _BEAT:
                worker.asked = now
                worker.beating = worker.actor.beat.remote()
            if now - worker.moved > self.stall_timeout:
                reason = f"no step of work for {self.stall_timeout:g} s (run.stall_timeout)"
                self._lose(worker, "worker_stalled", reason)

    def _lose(self, worker: RayHandle, kind: Any, reason: str) -> None:
        self._workers.remove(worker)
        ray.kill(worker.actor)
        leases = [lease for lease, _ in worker.leases]
        running = leases[0] if leases else None
        self._events.append(
            WorkerLost(
                worker.name, worker.info, running, tuple(leases[1:]), kind, reason, worker.ready
            )
        )
