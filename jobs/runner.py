"""`run_job`: from a checked job file to an exit code.

The order matters: everything that can be refused is refused before a worker starts, the epoch is
taken before anything is written, and the plan is on disk before the first lease.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.cluster import connected
from jobs.commits import FOLDER, Listing
from jobs.config import JobConfig
from jobs.driver import Driver, StopRequest, stop_signals
from jobs.epoch import Epoch
from jobs.errors import (
    EXIT_FAILED_ROWS,
    EXIT_INTERRUPTED,
    EXIT_OK,
    FailureRateError,
    FingerprintError,
    InputError,
    JobError,
)
from jobs.executor import Executor, Settings, WorkerInfo, WorkerSpec
from jobs.local_executor import LocalExecutor
from jobs.metadata_file import is_current, write_metadata
from jobs.plan import JobPlan, job_generator, lost_sample, new_plan, num_prompts
from jobs.progress import ProgressReport, counted, duration
from jobs.record import (
    PATH,
    JobRecord,
    check_record,
    check_weights,
    new_record,
    prompt_source,
    read_record,
    updated,
    version_changes,
)
from jobs.resume import Resume, changed_samples, retry_failed
from jobs.scheduler import Scheduler
from jobs.storage import Storage
from prompt_generators import PromptGenerator

_SHOWN_CHANGES = 20
_MEGAPIXEL = 1024 * 1024
_MAX_AUTO_BATCH = 8


@dataclass(frozen=True)
class RunOptions:
    """Flags of `zimage run` that are no keys of the job file.

    Args:
        local: in this process, without Ray.
        limit: a dry run: the first so many samples, into `<uri>-dry`.
        command: the command line, for messages that say what to run next.
    """

    local: bool = False
    limit: int | None = None
    retry_failed: bool = False
    accept_changes: bool = False
    command: tuple[str, ...] = ()


@dataclass
class Prepared:
    """A job that was checked against its output, before any worker runs."""

    config: JobConfig
    generator: PromptGenerator
    storage: Storage
    record: JobRecord | None
    resume: Resume

    @property
    def plan(self) -> JobPlan:
        """The whole plan, earlier extents included."""
        return self.resume.plan


def output_uri(config: JobConfig, limit: int | None) -> str:
    """Where the run writes: the job's output, or beside it for a dry run."""
    uri = config.output.uri.rstrip("/") or "/"
    return f"{uri}-dry" if limit is not None else uri


def prepare(config: JobConfig, options: RunOptions, *, create: bool) -> Prepared:
    """Check everything that needs no worker, and find out what there is to do.

    Raises:
        InputError: a table, generator or key that does not fit.
        FingerprintError: the output belongs to another job, or its prompts changed.
        StorageError: the output cannot be read.
    """
    refuse_unavailable(config)
    generator = job_generator(config)
    sampling = config.sampling
    start = config.prompts.start * sampling.images_per_prompt
    stop = start + num_prompts(config, generator) * sampling.images_per_prompt
    if options.limit is not None:
        stop = min(stop, start + options.limit)
    storage = Storage(output_uri(config, options.limit), create=create)
    record = read_record(storage)
    if record is None and any(name.endswith(".parquet") for name in storage.names(FOLDER)):
        raise InputError(
            f"{storage.uri}: holds a manifest but no {PATH}; allowed: an empty folder, or the "
            "output of a job"
        )
    listing = Listing(storage)
    if not listing.parts:
        record = None  # nothing is made yet, so that nothing holds the job to what was tried first
    if record is None:
        plan = new_plan(start, stop, config.output.shard_size)
    else:
        if options.limit is not None:
            stop = max(stop, record.plan.stop)  # a dry run never forgets what it has made
        check_record(storage, record, config, stop)
        plan = record.plan.extended_to(stop, config.output.shard_size)
    resume = Resume(plan, listing)
    if record is not None:
        resume.changed = _changes(config, generator, storage, record, resume, options)
    if options.retry_failed:
        resume.retry = retry_failed(plan, listing)
    return Prepared(config, generator, storage, record, resume)


def _changes(
    config: JobConfig,
    generator: PromptGenerator,
    storage: Storage,
    record: JobRecord,
    resume: Resume,
    options: RunOptions,
) -> dict[int, dict[int, list[str]]]:
    """Samples that changed with their prompts' source; refused unless accepted."""
    source = record.prompts.differences(prompt_source(config))
    if not source and not record.unaccepted:
        return {}
    changed = changed_samples(config, generator, resume.plan, resume.listing)
    if not changed or options.accept_changes or record.unaccepted:
        return changed
    lines = [
        f"sample {index}: {'; '.join(words)}"
        for shard in sorted(changed)
        for index, words in sorted(changed[shard].items())
    ]
    count = len(lines)
    if count > _SHOWN_CHANGES:
        lines = [*lines[:_SHOWN_CHANGES], f"... and {count - _SHOWN_CHANGES} more"]
    raise FingerprintError(
        f"{storage.uri}: {', '.join(source)} changed, and with it {count} of "
        f"{resume.listing.num_rows} samples that are made already:\n  "
        + "\n  ".join(lines)
        + "\nRun with --accept-changes to make just those again, or choose another --output."
    )


def refuse_unavailable(config: JobConfig) -> None:
    """Name the keys of the format that this version does not carry out yet."""
    if config.output.layout != "files":
        raise InputError(
            f"{config.place('output.layout')}: {config.output.layout!r} is not available yet; "
            "allowed: 'files'"
        )
    if config.model.loras:
        raise InputError(
            f"{config.place('model.loras')}: {', '.join(config.model.loras)}: LoRA adapters are "
            "not available yet; allowed: {}"
        )
    if config.model.offload not in ("auto", "none"):
        raise InputError(
            f"{config.place('model.offload')}: {config.model.offload!r} is not available yet; "
            "allowed: 'auto', 'none'"
        )


def resolve(config: JobConfig, info: WorkerInfo, fingerprint: str) -> Settings:
    """Resolve every `auto`, from the job and the kind of device alone: never from their number."""
    model, sampling = config.model, config.sampling
    dtype = model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if info.device_type == "cuda" else "float32"
    if sampling.batch_size == "auto":
        # From 1024 x 1024 on one image fills a GPU; smaller ones share the launches.
        images = _MEGAPIXEL // (sampling.width * sampling.height)
        batch_size = max(1, min(_MAX_AUTO_BATCH, images))
    else:
        batch_size = sampling.batch_size
    return Settings(
        device_type=info.device_type,
        dtype=dtype,
        attention="native" if model.attention == "auto" else model.attention,
        compile=False if model.compile == "auto" else model.compile,
        offload="none" if model.offload == "auto" else model.offload,
        batch_size=batch_size,
        threads_per_worker=config.run.threads_per_worker,
        model=model.repo or model.folder.name,
        model_fingerprint=fingerprint,
    )


def run_job(config: JobConfig, options: RunOptions) -> int:
    """Run or resume a job; the exit code.

    Raises:
        JobError: whatever ends it early, with its exit code.
    """
    prepared = prepare(config, options, create=True)
    storage, resume = prepared.storage, prepared.resume
    _say(f"{storage.uri}: {resume.words()}")
    if prepared.record is not None:
        for change in version_changes(prepared.record):
            _say(f"note: {change} since this output was begun; bytes may differ")
    if resume.num_to_make == 0:
        return _nothing_to_make(prepared)
    with contextlib.ExitStack() as stack:
        epoch = Epoch.take(storage)
        closed = False
        try:
            # The listing from before the claim may be out of date by another driver's commits.
            prepared = prepare(config, options, create=True)
            with stop_signals() as stop:
                seconds = _work(prepared, options, epoch, stop, stack)
            epoch.close(reason=stop.name or "done")
            closed = True
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        finally:
            if not closed:
                with contextlib.suppress(JobError):
                    epoch.close(reason="error")
    listing = Listing(storage)
    complete = listing.num_rows == prepared.plan.num_samples
    if not complete and not stop:
        raise AssertionError(
            f"{prepared.plan.num_samples} samples planned, {listing.num_rows} accounted for"
        )
    return _summary(prepared, listing, seconds, stop)


def _work(
    prepared: Prepared,
    options: RunOptions,
    epoch: Epoch,
    stop: StopRequest,
    stack: contextlib.ExitStack,
) -> float:
    """Start workers, fix the plan and drive the job; seconds it took."""
    config, storage, resume = prepared.config, prepared.storage, prepared.resume
    executor = stack.enter_context(_executor(config, options, storage, epoch))
    info = executor.start()
    fingerprint = executor.fingerprint()
    record = _fix_plan(prepared, options, info, fingerprint, epoch)
    report = ProgressReport(resume.num_to_make)
    listing = resume.listing
    scheduler = Scheduler(
        resume.work(),
        max_attempts=config.run.max_shard_attempts,
        placeholder=lambda index: lost_sample(config, index),
    )
    redone = resume.num_changed + resume.num_retried
    driver = Driver(
        config=config,
        settings=record.settings,
        storage=storage,
        epoch=epoch,
        executor=executor,
        scheduler=scheduler,
        report=report,
        stop=stop,
        ended_before=listing.num_rows - redone,
        failed_before=max(0, listing.num_failed - resume.num_retried),
    )
    try:
        if not stop:
            executor.load(record.settings)
        driver.run()
    except (FailureRateError, KeyboardInterrupt):
        write_metadata(storage, Listing(storage))
        raise
    finally:
        report.close()
    write_metadata(storage, Listing(storage))
    if record.unaccepted and not stop:
        storage.put(PATH, replace(record, unaccepted=False).dump())
    return report.seconds


def _fix_plan(
    prepared: Prepared, options: RunOptions, info: WorkerInfo, fingerprint: str, epoch: Epoch
) -> JobRecord:
    """Write job.json: the resolved job, or the old one with a further extent."""
    config, storage = prepared.config, prepared.storage
    record = prepared.record
    if record is None:
        settings = resolve(config, info, fingerprint)
        source = prompt_source(config)
        record = new_record(config, settings, source, prepared.plan, options.command)
    else:
        check_weights(storage, record, fingerprint)
        settings = record.settings
        if settings.device_type != info.device_type:
            _say(
                f"note: this output was begun on {settings.device_type}, going on on "
                f"{info.device_type}; bytes may differ"
            )
            settings = replace(settings, device_type=info.device_type)
        record = updated(
            record,
            config,
            settings=settings,
            plan=prepared.plan,
            prompts=prompt_source(config),
            unaccepted=record.unaccepted or bool(prepared.resume.changed),
            command=options.command,
        )
    epoch.check()
    storage.put(PATH, record.dump())
    epoch.event("plan", samples=prepared.plan.num_samples, to_make=prepared.resume.num_to_make)
    return record


@contextlib.contextmanager
def _executor(
    config: JobConfig, options: RunOptions, storage: Storage, epoch: Epoch
) -> Iterator[Executor]:
    uri = storage.uri if storage.root is None else str(storage.root)
    spec = WorkerSpec(
        config.model_dump_json(), uri, epoch.number, epoch.nonce, working_dir=str(Path.cwd())
    )
    if options.local:
        local = LocalExecutor(spec)
        try:
            yield local
        finally:
            local.stop()
        return
    run = config.run
    cpus = os.cpu_count() or 1
    if run.workers != "auto":
        cpus = max(cpus, run.workers * run.threads_per_worker)
    with connected(num_cpus=cpus) as cluster:
        from jobs.ray_executor import RayExecutor

        executor = RayExecutor(
            spec,
            workers=run.workers,
            gpus_per_worker=run.gpus_per_worker,
            threads_per_worker=run.threads_per_worker,
            stall_timeout=run.stall_timeout,
        )
        if executor.shortfall:
            _say(executor.shortfall)
        _say(f"{executor.target} workers on {cluster}")
        try:
            yield executor
        finally:
            executor.stop()


def _nothing_to_make(prepared: Prepared) -> int:
    """A run with nothing left to do: mend metadata.parquet if a crash left it out of date."""
    storage, listing = prepared.storage, prepared.resume.listing
    if prepared.config.model.folder.is_dir() and prepared.record is not None:
        from jobs.fingerprint import node_fingerprint

        try:
            check_weights(storage, prepared.record, node_fingerprint(prepared.config.model.folder))
        except (ValueError, OSError) as error:
            raise InputError(f"model.path: {error}") from error
    if not is_current(storage, listing):
        write_metadata(storage, listing)
    return _summary(prepared, listing, 0.0, StopRequest())


def _summary(prepared: Prepared, listing: Listing, seconds: float, stop: StopRequest) -> int:
    """Say where to look and what to run next; the exit code."""
    storage, planned = prepared.storage, prepared.plan.num_samples
    ok = listing.num_rows - listing.num_failed
    made = f" in {duration(seconds)}" if seconds else ""
    _say("")
    failed = f", {counted(listing.num_failed, 'failed row')}" if listing.num_failed else ""
    _say(f"{ok:,} of {counted(planned, 'image')}{made}{failed}")
    _say(f"  images    {storage.uri}/images")
    _say(f"  manifest  {storage.uri}/metadata.parquet")
    _say(f"  look      zimage status {storage.uri}")
    _say(f"  check     zimage verify {storage.uri}")
    if stop:
        _say(f"stopped by {stop.name}; the same command goes on with the rest")
        return EXIT_INTERRUPTED
    if listing.num_failed:
        _say("  again     the same command with --retry-failed, once the cause is mended")
        return EXIT_FAILED_ROWS
    return EXIT_OK


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
