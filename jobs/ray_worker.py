"""The process behind one actor: a `GenerationWorker` that answers Ray's calls."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import FrameType

import ray

from jobs.canaries import CanaryReport
from jobs.executor import Lease, Message, Settings, WorkerInfo, WorkerSpec
from jobs.mailbox import Mailbox

END = "end"  # the last answer to a lease, so that a stream that breaks off is told from one


def drain_on_sigterm(drain: Callable[[], None]) -> None:
    """Let a first SIGTERM to this process drain its worker, and a second one end it at once.

    Ray's own handler, set before an actor is made, ends the process in the middle of a batch.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # Ray makes actors on the main thread; only that one can have handlers
    ended = signal.getsignal(signal.SIGTERM)

    def on_first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, ended)
        drain()

    signal.signal(signal.SIGTERM, on_first)


class WorkerActor:
    """What runs in an actor's process: a GenerationWorker behind Ray's calls.

    All that it does on the device is done on one thread of its own, beside those on which Ray calls
    and sends: the device does not wait while a message is on its way.
    """

    def __init__(self, spec: WorkerSpec, name: str) -> None:
        from jobs.worker import GenerationWorker

        self.worker = GenerationWorker(spec, name)
        self.device = ThreadPoolExecutor(1, thread_name_prefix="device")
        drain_on_sigterm(self.worker.drain)

    def describe(self) -> WorkerInfo:
        """See `GenerationWorker.describe`."""
        node_id = ray.get_runtime_context().get_node_id()
        return replace(self.worker.describe(), node_id=node_id)

    def fingerprint(self) -> str:
        """See `GenerationWorker.fingerprint`."""
        return self.worker.fingerprint()

    def takes_pictures(self) -> bool:
        """See `GenerationWorker.takes_pictures`."""
        return self.worker.takes_pictures()

    def memory_needed(self) -> dict[str, int]:
        """See `GenerationWorker.memory_needed`."""
        return self.worker.memory_needed()

    def load(self, settings: Settings) -> tuple[float, CanaryReport]:
        """Load the model; seconds it took, and what the canary showed."""
        started = time.perf_counter()
        canary = self.device.submit(self.worker.load, settings).result()
        return time.perf_counter() - started, canary

    @ray.method(num_returns="streaming")  # type: ignore[untyped-decorator]
    def run(self, lease: Lease) -> Iterator[list[Message | tuple[str, bool]]]:
        """The messages of a lease, then whether it was drained; each time what has gathered."""
        yield from Mailbox(self._messages(lease), self.device)

    def _messages(self, lease: Lease) -> Iterator[Message | tuple[str, bool]]:
        yield from self.worker.run(lease)
        yield (END, self.worker.draining)

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def beat(self) -> int:
        """How much work was done so far, in steps."""
        return self.worker.ticks

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def trim(self, attempt: str, indices: Sequence[int]) -> tuple[int, ...]:
        """See `GenerationWorker.trim`."""
        return self.worker.trim(attempt, indices)

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def drain(self) -> None:
        """See `GenerationWorker.drain`."""
        self.worker.drain()
