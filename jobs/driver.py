"""The driver's loop: leases out, results in, commits written, until the work is done or stopped.

It owns the epoch and is the only writer of commits. Everything it knows is on the output within
one shard's work, so that it can die at any moment.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from jobs.canaries import CanaryComparison
from jobs.commits import PartName, write_part
from jobs.config import JobConfig
from jobs.dispatcher import Dispatcher
from jobs.epoch import Epoch
from jobs.errors import ClusterError, FailureRateError, ModelError, StorageError
from jobs.executor import (
    Event,
    Executor,
    Finished,
    Lease,
    LeaseEnded,
    LoadFailed,
    Progress,
    Settings,
    Trimmed,
    WorkerLeaving,
    WorkerLost,
    WorkerReady,
)
from jobs.manifest import ManifestRow
from jobs.progress import ProgressReport
from jobs.quantities import index_ranges
from jobs.resume import row_values
from jobs.scheduler import Commit, Outcome, Scheduler
from jobs.stage_clock import add_seconds
from jobs.storage import Storage

_POLL = 0.5  # seconds
_MIN_ENDED = 20  # samples that must have ended before the failure rate counts
_LOSSES_PER_WORKER = 3  # workers lost in a row, without any result, before the job is given up


class StopRequest:
    """Whether the user asked to stop: the first signal drains, the second stops at once."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Let SIGINT and SIGTERM drain the job while the context lasts."""
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Driver:
    """One run of a job against one output.

    Args:
        ended_before: samples of the output that had a row when the run began, less those that it
            makes again; `failed_before` the failed ones among them.
    """

    config: JobConfig
    settings: Settings
    storage: Storage
    epoch: Epoch
    executor: Executor
    scheduler: Scheduler
    report: ProgressReport
    stop: StopRequest
    ended_before: int = 0
    failed_before: int = 0

    def __post_init__(self) -> None:
        self._draining = False
        self._losses = 0
        self._load_error: str | None = None
        self._ready = 0
        self._canaries = CanaryComparison()
        self._stages: dict[str, float] = {}  # seconds of all workers, not yet written
        self._dispatcher = Dispatcher(
            self.scheduler, self.executor, on_lease=self._leased, on_trim=self._asked
        )

    def run(self) -> None:
        """Work until all is done, or until a stop was asked for and the batches under way ended.

        Raises:
            ModelError: no worker could load the model.
            ClusterError: workers die and nothing gets done.
            FailureRateError: more failed than allowed; what is done is committed.
            SupersededError: another driver has taken over.
            StorageError: a commit could not be written.
        """
        rate_error: FailureRateError | None = None
        while True:
            if self.stop and not self._draining:
                self.report.say(
                    f"{self.stop.name}: finishing the batches under way; once more stops at once"
                )
                self._drain()
            if not self._draining:
                self._dispatcher.hand_out()
            if self.scheduler.num_leased == 0 and (
                self._draining or self.scheduler.remaining(1) == 0
            ):
                break
            for event in self.executor.poll(_POLL):
                self._handle(event)
            self._commit()
            self._check_workers()
            if rate_error is None:
                rate_error = self._failure_rate()
                if rate_error is not None:
                    self._drain()
        self.scheduler.flush()
        self._commit()
        if rate_error is not None:
            raise rate_error

    def _drain(self) -> None:
        self._draining = True
        self.epoch.event("drain", signal=self.stop.name)
        self.executor.drain()

    def _leased(self, lease: Lease, worker: str) -> None:
        self.epoch.event(
            "lease",
            shard=lease.shard.id,
            attempt=lease.attempt,
            worker=worker,
            samples=len(lease.wanted),
            indices=index_ranges(lease.wanted),
            isolate=lease.isolate,
            copy_of=self.scheduler.copy_of(lease.attempt),
        )

    def _asked(self, lease: Lease, indices: tuple[int, ...]) -> None:
        self.epoch.event("trim", attempt=lease.attempt, samples=len(indices))

    def _handle(self, event: Event) -> None:
        match event:
            case WorkerReady():
                self._ready += 1
                self._losses = 0
                info = event.info
                self.epoch.event(
                    "worker_ready",
                    worker=event.worker,
                    node=info.node,
                    device=info.device,
                    pid=info.pid,
                    visible_devices=info.visible_devices,
                    versions=info.versions,
                    seconds=round(event.seconds, 3),
                    canary=event.canary.facts() if event.canary else None,
                )
                self.report.say(
                    f"worker {event.worker} ready on {info.node} ({info.device}) "
                    f"after {event.seconds:.1f} s of loading"
                )
                self._compare(event)
            case Progress():
                self._losses = 0
                if isinstance(event.message, Finished):
                    add_seconds(self._stages, event.message.stages)
                ended = self.scheduler.num_ended
                self.scheduler.progress(event)
                self.report.ended(self.scheduler.num_ended - ended, self.scheduler.num_failed)
            case LeaseEnded():
                self.scheduler.ended(event.lease, drained=event.drained)
            case Trimmed():
                self.scheduler.trimmed(event.lease, event.indices)
            case WorkerLeaving():
                node = event.info.node if event.info else ""
                self.epoch.event("worker_leaving", worker=event.worker, reason=event.reason)
                self.report.say(f"worker {event.worker} on {node} is leaving: {event.reason}")
            case WorkerLost():
                self._losses += 1
                self.epoch.event(
                    event.error_type, worker=event.worker, reason=event.reason, loaded=event.loaded
                )
                self.report.say(f"worker {event.worker} lost: {event.reason}")
                for words in self.scheduler.lost(event):
                    self.report.say(words)
            case LoadFailed():
                self._load_error = event.message
                if self.executor.num_workers:
                    node = event.info.node if event.info else "its node"
                    where = f"on {node}" if event.device_only else f"and {node}"
                    self.report.say(
                        f"worker {event.worker} {where} left aside, the others go on: "
                        f"{event.message}"
                    )
                self.epoch.event(
                    "load_failed",
                    worker=event.worker,
                    node=event.info.node if event.info else None,
                    node_id=event.info.node_id if event.info else None,
                    message=event.message,
                )

    def _compare(self, event: WorkerReady) -> None:
        """Name workers that do not compute what the others do."""
        if event.canary is None:
            return
        words = event.canary.words()
        if words is not None:
            self.report.say(f"worker {event.worker} on {event.info.node}: {words}")
        found = self._canaries.add(event.worker, event.info, event.canary)
        if found is not None:
            self.epoch.event("canaries_differ", **found.facts())
            self.report.say(found.words())

    def _check_workers(self) -> None:
        if self._load_error is not None and self.executor.num_workers == 0:
            raise ModelError(self._load_error)
        if self._losses > _LOSSES_PER_WORKER * max(1, self.executor.num_workers):
            raise ClusterError(
                f"{self._losses} workers were lost one after the other and nothing got done; "
                f"see {self.storage.uri}/logs and {self.storage.uri}/events"
            )
        if self.executor.num_workers == 0:
            raise ClusterError(
                "the last worker is gone; run the job again to go on where it stopped"
            )

    def _commit(self) -> None:
        commits = self.scheduler.take_commits()
        for commit in commits:
            self.epoch.check()
            part = part_name(commit, self.epoch.number)
            rows = [self._row(commit, outcome) for outcome in commit.outcomes]
            write_part(self.storage, part, rows)
            self.epoch.event("commit", part=str(part), **commit_facts(rows))
            for outcome in commit.outcomes:
                if outcome.result.error_type is not None:
                    self.report.failed(outcome)
        if commits:
            if self._stages:
                seconds = {name: round(taken, 4) for name, taken in self._stages.items()}
                self.epoch.event("stages", seconds=seconds)
                self._stages.clear()
            # Else a killed driver takes up to a heartbeat's worth of its story with it. Lines that
            # cannot be written now stay for the next beat.
            with contextlib.suppress(StorageError):
                self.epoch.flush()

    def _failure_rate(self) -> FailureRateError | None:
        ended = self.ended_before + self.scheduler.num_ended
        failed = self.failed_before + self.scheduler.num_failed
        limit = self.config.run.max_failure_rate
        if self.scheduler.num_failed == 0 or ended < _MIN_ENDED or failed <= limit * ended:
            return None
        return FailureRateError(
            f"stopped: {failed} of {ended} samples failed, more than run.max_failure_rate "
            f"{limit:g} allows; see `zimage status {self.storage.uri}`, mend the cause and run "
            "again with --retry-failed"
        )

    def _row(self, commit: Commit, outcome: Outcome) -> ManifestRow:
        sample, result, info = outcome.sample, outcome.result, outcome.info
        settings, sampling = self.settings, self.config.sampling
        values = row_values(sample)
        return ManifestRow(
            file_name=result.file_name,
            index=sample.index,
            prompt_index=sample.prompt_index,
            status="ok" if result.error_type is None else "failed",
            prompt=sample.prompt,
            negative_prompt=sample.negative_prompt or None,
            seed=sample.seed,
            width=sample.width,
            height=sample.height,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            model=settings.model,
            model_fingerprint=settings.model_fingerprint,
            loras=None if values["loras"] is None else str(values["loras"]),
            dtype=result.dtype or settings.dtype,
            attention=settings.attention,
            format=self.config.output.format,
            bytes=result.bytes,
            sha256=result.sha256,
            pixels_sha256=result.pixels_sha256,
            shard=commit.work.shard.id,
            revision=commit.work.revision,
            attempt=outcome.lease.attempt,
            batch=result.batch,
            batch_mode=result.batch_mode,
            worker=outcome.worker,
            node=info.node if info else "",
            device=info.device if info else "",
            seconds=result.seconds,
            error_type=result.error_type,
            error_message=result.error_message,
            created_at=result.created_at,
            metadata=sample.metadata,
            tar=result.tar,
            tar_offset=result.tar_offset,
            planned_seed=sample.planned_seed,
        )


def commit_facts(rows: Sequence[ManifestRow]) -> dict[str, object]:
    """What the event of a commit says of its rows: which samples came from which attempt."""
    made: dict[str, list[int]] = {}
    for row in rows:
        made.setdefault(row.attempt, []).append(row.index)
    return {
        "attempts": {attempt: index_ranges(indices) for attempt, indices in sorted(made.items())},
        "failed": index_ranges(row.index for row in rows if row.status == "failed"),
    }


def part_name(commit: Commit, epoch: int) -> PartName:
    """The name under which a commit is written."""
    return PartName(
        shard=commit.work.shard.id,
        revision=commit.work.revision,
        first_batch=commit.first_batch,
        last_batch=commit.last_batch,
        num_batches=commit.num_batches,
        rows=len(commit.outcomes),
        failed=sum(o.result.error_type is not None for o in commit.outcomes),
        failed_before=commit.failed_before,
        epoch=epoch,
    )
