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
from ray.exceptions import RayError, RayTaskError

from jobs.errors import (
    ClusterError,
    DeviceUnusableError,
    InputError,
    JobError,
    ModelError,
    StorageUnusableError,
)
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
from jobs.ray_handle import RayHandle, cause_of, first_line
from jobs.ray_pool import RayPool
from jobs.ray_worker import WorkerActor

_IN_FLIGHT = 2  # leases for each worker: the one under way and the next
_GATHER = 0.005  # seconds from one message to the next look for others
_AT_ONCE = 16  # answers that are read of one worker before the others have their turn
_BEAT = 2.0  # seconds between two questions to a worker whether it moves
_ROUNDS = 3  # times that all workers are started of which none gets as far as to say where it is
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
        self.stall_timeout = stall_timeout
        self.pool = RayPool(
            spec,
            workers=workers,
            gpus_per_worker=gpus_per_worker,
            threads_per_worker=threads_per_worker,
            actor=actor,
        )
        self._events: deque[Event] = deque()
        self._loading = False
        self._draining = False
        self._looked = time.monotonic()
        self._received = 0.0  # when a worker last said something

    @property
    def num_workers(self) -> int:
        """See `Executor.num_workers`."""
        return max(len(self.pool.workers), self.pool.target)

    def start(self) -> WorkerInfo:
        """See `Executor.start`."""
        self.pool.start()
        self._first = self._next_described()
        assert self._first.info is not None
        return self._first.info

    def _next_described(self) -> RayHandle:
        """The worker that is the first to say where it runs."""
        begun, reason, rounds = time.monotonic(), "", 1
        while True:
            for worker in self.pool.workers:
                if worker.info is not None:
                    return worker
            describing = {w.describing: w for w in self.pool.workers}
            if not describing:
                words = f"every worker died before it could start: {reason}"
                if rounds == _ROUNDS:
                    raise ClusterError(words)
                # their nodes may have gone while they started, and others be there
                rounds += 1
                print(f"{words}; starting others", file=sys.stderr, flush=True)
                self.pool.fill()
                continue
            done, _ = ray.wait(list(describing), num_returns=1, timeout=_ROOM_NOTE)
            if not done:
                self._wait_for_room(time.monotonic() - begun)
                continue
            worker = describing[done[0]]
            try:
                worker.info = ray.get(done[0])
                worker.describing = None
            except RayError as error:
                self.pool.workers.remove(worker)
                cause = cause_of(error)
                if isinstance(cause, JobError):
                    raise cause from error
                reason = first_line(error)

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

    def takes_pictures(self) -> bool:
        """See `Executor.takes_pictures`; asks the worker that started first."""
        return bool(self._ask("takes_pictures"))

    def memory_needed(self) -> Mapping[str, int]:
        """See `Executor.memory_needed`; asks the worker that started first."""
        return dict(self._ask("memory_needed"))

    def _ask(self, method: str) -> Any:
        """Ask a worker; where its node has no usable weights, one of another node."""
        while True:
            worker = self._first
            try:
                answer = getattr(worker.actor, method).remote()
                return ray.get(answer, timeout=max(_LOAD_LIMIT, self.stall_timeout))
            except RayError as error:
                cause = cause_of(error)
                if isinstance(cause, ModelError):
                    self.pool.leave_aside(worker)
                    self._events.append(LoadFailed(worker.name, worker.info, str(cause)))
                    self.pool.fill()
                    if self.pool.workers:
                        self._first = self._next_described()
                        continue
                if isinstance(cause, JobError):
                    raise cause from error
                raise ClusterError(f"worker {worker.name} died: {error}") from error

    def load(self, settings: Settings) -> None:
        """See `Executor.load`."""
        self._loading = True
        self.pool.load(settings)

    def free(self) -> int:
        """See `Executor.free`."""
        return sum(_IN_FLIGHT - len(w.leases) for w in self.pool.workers if w.takes_leases)

    def idle(self) -> list[str]:
        """See `Executor.idle`."""
        return [w.name for w in self.pool.workers if w.takes_leases and not w.leases]

    def submit(self, lease: Lease, worker: str | None = None) -> str:
        """See `Executor.submit`."""
        ready = [w for w in self.pool.workers if w.takes_leases]
        chosen = min(ready, key=lambda w: (w.name != worker, len(w.leases)))
        if not chosen.leases:
            chosen.moved = time.monotonic()
        chosen.leases.append((lease, chosen.actor.run.remote(lease)))
        return chosen.name

    def trim(self, lease: Lease, indices: Sequence[int]) -> None:
        """See `Executor.trim`."""
        for worker in self.pool.workers:
            if any(held.attempt == lease.attempt for held, _ in worker.leases):
                answer = worker.actor.trim.remote(lease.attempt, list(indices))
                worker.trimming[answer] = lease
                return
        self._events.append(Trimmed("", lease, ()))  # it has ended, or its worker is gone

    def poll(self, timeout: float) -> list[Event]:
        """See `Executor.poll`."""
        self._join()
        deadline = time.monotonic() + timeout
        # Waiting takes Ray longer than reading: where messages follow each other, let some gather.
        time.sleep(max(0.0, min(timeout, self._received + _GATHER - time.monotonic())))
        while not self._events:
            left = deadline - time.monotonic()
            waiting = self._waiting()
            if waiting:
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=max(0.0, min(left, 0.5)))
                for ref in done:
                    self._receive(waiting[ref], ref)
                    self._receive_more(waiting[ref], ref)
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
        for worker in self.pool.workers:
            worker.actor.drain.remote()

    def stop(self) -> None:
        """See `Executor.stop`."""
        self.pool.stop()

    def _join(self) -> None:
        """Replace lost workers, and follow the cluster's GPUs where the number is `auto`."""
        if not self._loading or self._draining:
            return
        if time.monotonic() - self._looked > _JOIN:
            self._looked = time.monotonic()
            for worker in self.pool.on_drained_nodes():
                self._leaves(worker, "its node is being drained")
            self.pool.follow_cluster()
        for worker in list(self.pool.workers):
            if worker.leaving and not worker.leases:
                self.pool.remove(worker)
        self.pool.fill()

    def _leaves(self, worker: RayHandle, reason: str) -> None:
        if worker.leaving:
            return
        worker.leaving = True
        worker.actor.drain.remote()
        self._events.append(WorkerLeaving(worker.name, worker.info, reason))

    def _waiting(self) -> dict[Any, RayHandle]:
        return {ref: worker for worker in self.pool.workers for ref in worker.questions()}

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
                if worker.ended is not None and not worker.owes_answer:
                    self._end(worker, worker.ended)
            elif ref is worker.loading:
                seconds, canary = ray.get(ref)
                worker.loading = None
                worker.ready = True
                self.pool.loaded(worker)
                assert worker.info is not None
                self._events.append(WorkerReady(worker.name, worker.info, seconds, canary))
            else:
                for message in ray.get(next(ref)):
                    self._message(worker, message)
        except StopIteration:
            # the stream broke off without its end mark
            self._lose(worker, "worker_died", "its answer broke off")
        except RayTaskError as error:
            cause = cause_of(error)
            if isinstance(cause, StorageUnusableError):
                raise cause from error
            if isinstance(cause, JobError) and not worker.ready:
                device_only = isinstance(cause, DeviceUnusableError)
                self.pool.leave_aside(worker, device_only=device_only)
                if isinstance(cause, InputError):
                    raise cause from error
                failed = LoadFailed(worker.name, worker.info, str(cause), device_only)
                self._events.append(failed)
            else:
                self._lose(worker, "worker_died", f"{type(cause).__name__}: {cause}")
        except RayError as error:
            self._lose(worker, "worker_died", first_line(error))

    def _receive_more(self, worker: RayHandle, ref: Any) -> None:
        """What else a worker has said meanwhile."""
        for _ in range(_AT_ONCE):
            if worker not in self.pool.workers or worker.stream is not ref or not ref.next_ready():
                return
            self._receive(worker, ref)

    def _message(self, worker: RayHandle, message: Message | tuple[str, bool]) -> None:
        worker.moved = self._received = time.monotonic()
        assert worker.info is not None
        if isinstance(message, tuple):
            # The answer to a question comes another way, and may come later than the end of a
            # lease; but what the worker has given up would then be left to nobody.
            if worker.owes_answer:
                worker.ended = message
            else:
                self._end(worker, message)
        else:
            lease = worker.leases[0][0]
            self._events.append(Progress(worker.name, worker.info, lease, message))

    def _end(self, worker: RayHandle, message: tuple[str, bool]) -> None:
        lease, _ = worker.leases.popleft()
        worker.ended, drained = None, message[1]
        self._events.append(LeaseEnded(worker.name, lease, drained))
        if drained and not self._draining:
            self._leaves(worker, "it was told to stop")

    def _watch(self) -> None:
        """Ask busy workers whether they move, and give up those that do not."""
        now = time.monotonic()
        for worker in list(self.pool.workers):
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
        self.pool.remove(worker)
        leases = [lease for lease, _ in worker.leases]
        running = leases[0] if leases else None
        self._events.append(
            WorkerLost(
                worker.name, worker.info, running, tuple(leases[1:]), kind, reason, worker.ready
            )
        )
        words = None if worker.ready else self.pool.died_unloaded(worker)
        if words is not None:
            message = f"{words}; the last of them: {reason}"
            self._events.append(LoadFailed(worker.name, worker.info, message))
