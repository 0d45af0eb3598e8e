"""What passes between the driver and its workers, and the protocol of an executor.

The driver hands out `Lease`s and reads `Event`s. An executor knows how to start workers and
carry messages; it decides nothing about shards, retries or commits. Everything here pickles and
is small: pixels never leave the worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

from jobs.canaries import CanaryReport
from jobs.errors import ErrorType
from jobs.manifest import BatchMode
from jobs.moved_seeds import MovedSeed
from jobs.plan import Sample, Shard


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker needs in order to start. `config` is a JobConfig as JSON."""

    config: str
    output_uri: str
    epoch: int
    nonce: str  # of the epoch's claim: a worker that does not see it does not see the output
    working_dir: str | None = None  # the driver's: where a generator's module may be


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Where a worker runs, known before it has loaded a model."""

    node: str
    device: str  # "cpu", or the name of the accelerator
    device_type: str  # "cpu", "cuda" or "mps"
    memory: int  # bytes of the device
    free_memory: int = 0  # of these, before the model is loaded
    versions: dict[str, str] = field(default_factory=dict)
    visible_devices: str | None = None
    pid: int = 0
    node_id: str = ""  # Ray's name of the node
    attention: tuple[str, ...] = ()  # backends that can run in the job's dtype, the best first
    compiles: bool = False  # see `Capabilities.compiles`


@dataclass(frozen=True, slots=True)
class Settings:
    """Every `auto` of a job, resolved once by the driver and recorded in job.json.

    Args:
        loras: content hashes of the adapters that the job declares, by name.
        takes_pictures: whether the checkpoint edits the images of prompts, else one is started
            from.
    """

    device_type: str
    dtype: str
    attention: str
    compile: bool
    offload: str
    batch_size: int
    threads_per_worker: int
    model: str
    model_fingerprint: str
    loras: dict[str, str] = field(default_factory=dict)
    takes_pictures: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """A shard, or a part of one, given to a worker for one attempt.

    Args:
        indices: samples of the shard whose rows are wanted; None for all. Batches are planned
            over the whole shard in either case, so that the same samples are made together.
        isolate: make each of `indices` alone and plan nothing else, for finding the sample that
            kills its worker.
        kills: how many workers died or hung with these samples so far.
        seeds: of samples of the shard that are not the plan's, by index.
    """

    shard: Shard
    attempt: str
    indices: tuple[int, ...] | None = None
    isolate: bool = False
    kills: int = 0
    seeds: Mapping[int, MovedSeed] = field(default_factory=dict, hash=False)

    @property
    def wanted(self) -> Sequence[int]:
        """The sample indices whose rows are wanted."""
        if self.indices is None:
            return range(self.shard.start, self.shard.stop)
        return self.indices


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one sample: the part of a row that the worker knows."""

    index: int
    batch: tuple[int, ...]
    batch_mode: BatchMode
    created_at: datetime
    file_name: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    pixels_sha256: str | None = None
    seconds: float | None = None
    error_type: ErrorType | None = None
    error_message: str | None = None
    dtype: str | None = None  # where another than the job's
    tar: str | None = None  # in the webdataset layout; `file_name` is a member of it then
    tar_offset: int | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """A worker has planned a lease: its samples, and its batches in the order of work."""

    samples: tuple[Sample, ...]
    batches: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """A batch has ended.

    Attributes:
        results: one for each wanted sample of it.
        stages: seconds by stage of all that the worker did since its last message of this kind.
    """

    results: tuple[Result, ...]
    stages: Mapping[str, float] = field(default_factory=dict)


Message = Planned | Finished


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has loaded its model."""

    worker: str
    info: WorkerInfo
    seconds: float
    canary: CanaryReport | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """A worker's message about one of its leases."""

    worker: str
    info: WorkerInfo
    lease: Lease
    message: Message


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """A worker is done with a lease: all of it, or what was under way when it drained."""

    worker: str
    lease: Lease
    drained: bool


@dataclass(frozen=True, slots=True)
class Trimmed:
    """A worker has given up samples of a lease, of which it has begun none."""

    worker: str
    lease: Lease
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WorkerLeaving:
    """A worker ends what is under way and then goes; its place is filled when there is room."""

    worker: str
    info: WorkerInfo | None
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker died or hung. `running` was under way, `queued` had not begun."""

    worker: str
    info: WorkerInfo | None
    running: Lease | None
    queued: tuple[Lease, ...]
    error_type: Literal["worker_died", "worker_stalled"]
    reason: str
    loaded: bool


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A worker could not load its model; the message is for the user.

    Args:
        device_only: it is its device that is not to be used; else its node.
    """

    worker: str
    info: WorkerInfo | None
    message: str
    device_only: bool = False


Event = WorkerReady | Progress | LeaseEnded | Trimmed | WorkerLeaving | WorkerLost | LoadFailed


class Executor(Protocol):
    """Workers under one roof: in this process, or as actors on a Ray cluster."""

    def start(self) -> WorkerInfo:
        """Start all workers at once; where the first of them runs.

        Raises:
            ClusterError: no worker can be started.
        """
        ...

    def fingerprint(self) -> str:
        """Content hash of the weights as a worker sees them. Raises ModelError, InputError."""
        ...

    def takes_pictures(self) -> bool:
        """Whether the checkpoint edits the images of prompts. Raises as `fingerprint`."""
        ...

    def memory_needed(self) -> Mapping[str, int]:
        """Bytes that should be free on a worker's device, for each way of offloading.

        Raises:
            ModelError, InputError: as `fingerprint`.
        """
        ...

    def load(self, settings: Settings) -> None:
        """Tell every worker, also those that come later, to load the model. Does not wait."""
        ...

    def free(self) -> int:
        """How many more leases the workers that are ready can take now."""
        ...

    def idle(self) -> list[str]:
        """Names of the workers that are ready and have no lease."""
        ...

    def submit(self, lease: Lease, worker: str | None = None) -> str:
        """Give a lease to a worker that is idle, or to the least busy one; returns its name."""
        ...

    def trim(self, lease: Lease, indices: Sequence[int]) -> None:
        """Ask the worker that holds a lease to give up samples; it answers with `Trimmed`.

        It gives up whole batches, and none that it has begun: what it answers with nobody else
        makes or will make. Without an answer it is lost.
        """
        ...

    def poll(self, timeout: float) -> list[Event]:
        """What happened, waiting at most `timeout` seconds for the first event."""
        ...

    def drain(self) -> None:
        """Ask the workers to end after the batch under way and to begin no queued lease."""
        ...

    def stop(self) -> None:
        """End all workers now."""
        ...

    @property
    def num_workers(self) -> int:
        """Workers that are ready or on their way."""
        ...
