"""`LocalExecutor`: one worker in this process, without Ray. For dry runs and single machines."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from jobs.errors import InputError, JobError
from jobs.executor import (
    Event,
    Lease,
    LeaseEnded,
    LoadFailed,
    Message,
    Progress,
    Settings,
    WorkerInfo,
    WorkerLost,
    WorkerReady,
    WorkerSpec,
)


class LocalExecutor:
    """Runs leases on the calling thread: each `poll` makes one batch.

    The same `GenerationWorker` as on a cluster, called directly.

    Args:
        spec: the job and its output.
        stop: whether to drain: a signal that comes while a batch is made is seen in here first.
        name: of the worker.
    """

    def __init__(
        self, spec: WorkerSpec, stop: Callable[[], bool] = lambda: False, name: str = "local-0"
    ) -> None:
        self.spec = spec
        self._stop = stop
        self.name = name
        self.num_workers = 1
        self._events: deque[Event] = deque()
        self._lease: Lease | None = None
        self._messages: Iterator[Message] | None = None
        self._loaded = False

    def start(self) -> WorkerInfo:
        """See `Executor.start`."""
        from jobs.worker import GenerationWorker  # torch is imported where a model is run

        self._worker = GenerationWorker(self.spec, self.name, self._stop)
        self._info = self._worker.describe()
        return self._info

    def fingerprint(self) -> str:
        """See `Executor.fingerprint`."""
        return self._worker.fingerprint()

    def takes_pictures(self) -> bool:
        """See `Executor.takes_pictures`."""
        return self._worker.takes_pictures()

    def memory_needed(self) -> Mapping[str, int]:
        """See `Executor.memory_needed`."""
        return self._worker.memory_needed()

    def load(self, settings: Settings) -> None:
        """See `Executor.load`; here it does wait."""
        started = time.perf_counter()
        try:
            canary = self._worker.load(settings)
        except InputError:
            raise
        except JobError as error:
            self.num_workers = 0  # no other process can take its place
            self._events.append(LoadFailed(self.name, self._info, str(error)))
            return
        self._loaded = True
        seconds = time.perf_counter() - started
        self._events.append(WorkerReady(self.name, self._info, seconds, canary))

    def free(self) -> int:
        """See `Executor.free`."""
        return int(self._loaded and self._lease is None)

    def idle(self) -> list[str]:
        """See `Executor.idle`."""
        return [self.name] if self.free() else []

    def trim(self, lease: Lease, indices: Sequence[int]) -> None:
        """See `Executor.trim`; there is no second worker to ask for anything."""
        raise AssertionError("one worker has nobody to give to")

    def submit(self, lease: Lease, worker: str | None = None) -> str:
        """See `Executor.submit`."""
        assert self._lease is None
        self._lease = lease
        self._messages = self._worker.run(lease)
        return self.name

    def poll(self, timeout: float) -> list[Event]:
        """See `Executor.poll`; makes the next batch of the lease at hand."""
        if not self._events and self._lease is not None and self._messages is not None:
            self._events.append(self._advance(self._lease, self._messages))
        elif not self._events:
            time.sleep(min(timeout, 0.05))
        events = list(self._events)
        self._events.clear()
        return events

    def drain(self) -> None:
        """See `Executor.drain`."""
        self._worker.drain()

    def stop(self) -> None:
        """See `Executor.stop`."""
        self._worker.close()

    def _advance(self, lease: Lease, messages: Iterator[Message]) -> Event:
        from jobs.device import DeviceError

        try:
            message = next(messages, None)
        except DeviceError as error:
            # No other process can take over here: the job ends and a new run goes on.
            self._loaded = False
            self._lease = None
            self.num_workers = 0
            return WorkerLost(self.name, self._info, lease, (), "worker_died", str(error), True)
        if message is not None:
            return Progress(self.name, self._info, lease, message)
        self._lease = None
        return LeaseEnded(self.name, lease, self._worker.draining)
