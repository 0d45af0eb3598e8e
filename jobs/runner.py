"""`run_job`: from a checked job file to an exit code.

The order matters: everything that can be refused is refused before a worker starts, the epoch is
taken before anything is written, and the plan is on disk before the first lease.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jobs.cluster import connected
from jobs.commits import Listing
from jobs.config import JobConfig
from jobs.driver import Driver, StopRequest, stop_signals
from jobs.epoch import Epoch
from jobs.errors import (
    EXIT_FAILED_ROWS,
    EXIT_INTERRUPTED,
    EXIT_OK,
    FailureRateError,
    JobError,
    ModelError,
    StorageError,
)
from jobs.executor import Executor, WorkerInfo, WorkerSpec
from jobs.local_executor import LocalExecutor
from jobs.metadata_file import is_current, write_metadata
from jobs.plan import lost_sample
from jobs.preparation import Prepared, RunOptions, prepare
from jobs.progress import ProgressReport
from jobs.quantities import counted, duration, index_ranges
from jobs.record import (
    PATH,
    JobRecord,
    check_weights,
    new_record,
    prompt_source,
    updated,
    version_changes,
)
from jobs.scheduler import Scheduler
from jobs.settings import resolve
from jobs.storage import Storage
from jobs.terminal import visible


def run_job(config: JobConfig, options: RunOptions) -> int:
    """Run or resume a job; the exit code.

    Raises:
        JobError: whatever ends it early, with its exit code.
    """
    prepared = prepare(config, options, create=True)
    storage, resume = prepared.storage, prepared.resume
    _say(f"{storage.uri}: {resume.words()}")
    for note in resume.marks.notes() if resume.marks else ():
        _say(f"note: {note}")
    for lora in prepared.loras.values():
        for warning in lora.warnings:
            _say(f"note: {warning}")
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
        raise StorageError(
            f"{storage.uri}: {prepared.plan.num_samples} samples planned, {listing.num_rows} "
            "accounted for: a commit that the output confirmed is not there; run the job again, "
            "and do not trust this storage"
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
    executor = stack.enter_context(_executor(config, options, storage, epoch, stop))
    info = executor.start()
    fingerprint = executor.fingerprint()
    record = _fix_plan(prepared, options, executor, info, fingerprint, epoch)
    report = ProgressReport(resume.num_to_make)
    listing = resume.listing
    scheduler = Scheduler(
        resume.work(),
        max_attempts=config.run.max_shard_attempts,
        placeholder=lambda index: lost_sample(config, index),
    )
    driver = Driver(
        config=config,
        settings=record.settings,
        storage=storage,
        epoch=epoch,
        executor=executor,
        scheduler=scheduler,
        report=report,
        stop=stop,
        ended_before=listing.num_rows - resume.num_again,
        failed_before=max(0, listing.num_failed - resume.num_retried),
    )
    try:
        if not stop:
            executor.load(record.settings)
        driver.run()
    except FailureRateError:
        epoch.check()
        write_metadata(storage, Listing(storage))
        raise
    finally:
        report.close()
    epoch.check()  # these files are the newest driver's to write
    write_metadata(storage, Listing(storage))
    if record.unaccepted and not stop:
        storage.put(PATH, replace(record, unaccepted=False).dump())
    return report.seconds


def _fix_plan(
    prepared: Prepared,
    options: RunOptions,
    executor: Executor,
    info: WorkerInfo,
    fingerprint: str,
    epoch: Epoch,
) -> JobRecord:
    """Write job.json: the resolved job, or the old one with a further extent."""
    config, storage = prepared.config, prepared.storage
    record = prepared.record
    loras = {name: lora.fingerprint for name, lora in prepared.loras.items()}
    if record is None:
        num_samples = prepared.plan.num_samples
        settings = resolve(
            config,
            info,
            fingerprint,
            loras,
            executor.memory_needed,
            num_samples,
            executor.takes_pictures(),
        )
        source = prompt_source(config)
        record = new_record(config, settings, source, prepared.plan, options.command)
    else:
        check_weights(storage, record, fingerprint)
        settings = replace(record.settings, loras=loras)
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
    content = record.dump()
    storage.put(PATH, content)
    if storage.get(PATH) != content:  # before the work: without this file it would be lost
        raise StorageError(
            f"{storage.uri}/{PATH}: the output confirmed it, but does not give it back"
        )
    epoch.event(
        "plan",
        samples=prepared.plan.num_samples,
        to_make=prepared.resume.num_to_make,
        rejected=index_ranges(redo.index for redo in prepared.resume.redone),
    )
    return record


@contextlib.contextmanager
def _executor(
    config: JobConfig, options: RunOptions, storage: Storage, epoch: Epoch, stop: StopRequest
) -> Iterator[Executor]:
    uri = storage.uri if storage.root is None else str(storage.root)
    spec = WorkerSpec(
        config.model_dump_json(), uri, epoch.number, epoch.nonce, working_dir=str(Path.cwd())
    )
    if options.local:
        if config.run.workers not in ("auto", 1):
            _say(f"note: --local runs 1 worker in this process, not {config.run.workers}")
        local = LocalExecutor(spec, lambda: bool(stop))
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
        if executor.pool.shortfall:
            _say(executor.pool.shortfall)
        _say(f"{counted(executor.pool.target, 'worker')} on {cluster}")
        if not executor.pool.gpus and os.environ.get("RAY_ADDRESS"):
            _say("note: the cluster has no GPUs now; the job runs on its CPUs to the end")
        try:
            yield executor
        finally:
            executor.stop()


def _nothing_to_make(prepared: Prepared) -> int:
    """A run with nothing left to do: mend metadata.parquet if a crash left it out of date."""
    storage, listing = prepared.storage, prepared.resume.listing
    model = prepared.config.model
    if model.folder.is_dir() and prepared.record is not None:
        from jobs.fingerprint import node_fingerprint

        try:
            found = node_fingerprint(model.folder, **model.parts)
            check_weights(storage, prepared.record, found)
        except (ValueError, OSError) as error:
            raise ModelError(f"{model.key_of(str(error))}: {error}") from error
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
    if stop and listing.num_rows < planned:
        _say(f"stopped by {stop.name}; the same command goes on with the rest")
        return EXIT_INTERRUPTED
    if listing.num_failed:
        _say("  again     the same command with --retry-failed, once the cause is mended")
        return EXIT_FAILED_ROWS
    return EXIT_OK


def _say(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)
