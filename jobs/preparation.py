"""Before any worker runs: a job checked against its output, and what is left to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jobs.checkpoint_kind import takes_pictures_here
from jobs.commits import FOLDER, Listing
from jobs.config import JobConfig
from jobs.errors import FingerprintError, InputError
from jobs.input_images import check_images, image_role
from jobs.loras import DeclaredLora, declared_loras, lora_changes
from jobs.plan import MAX_SEED, JobPlan, job_generator, new_plan, num_prompts
from jobs.record import PATH, JobRecord, check_record, prompt_source, read_record
from jobs.redo import read_marks
from jobs.resume import Resume, changed_samples, concerns_image, retry_failed
from jobs.settings import refuse_unavailable
from jobs.storage import Storage
from prompt_generators import PromptGenerator

_SHOWN_CHANGES = 20


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
    redo_rejected: bool = False
    command: tuple[str, ...] = ()


@dataclass
class Prepared:
    """A job that was checked against its output, before any worker runs.

    Args:
        takes_pictures: whether the checkpoint edits the images of prompts; None where only a worker
            knows.
    """

    config: JobConfig
    generator: PromptGenerator
    storage: Storage
    record: JobRecord | None
    resume: Resume
    takes_pictures: bool | None = False
    loras: Mapping[str, DeclaredLora] = field(default_factory=dict)

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
        InputError: a table, generator, adapter or key that does not fit.
        FingerprintError: the output belongs to another job, or its prompts changed.
        StorageError: the output cannot be read.
    """
    refuse_unavailable(config)
    takes_pictures = takes_pictures_here(config)
    check_images(config, takes_pictures)
    generator = job_generator(config)
    sampling = config.sampling
    start = config.prompts.start * sampling.images_per_prompt
    stop = start + num_prompts(config, generator) * sampling.images_per_prompt
    if stop >= MAX_SEED:
        raise InputError(
            f"{config.place('prompts.count')}: sample numbers would reach {stop}; allowed: below "
            f"{MAX_SEED}"
        )
    if options.limit is not None:
        stop = min(stop, start + options.limit)
    loras = declared_loras(config)
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
        check_record(storage, record, config, stop, lora_changes(record, config, loras, listing))
        plan = record.plan.extended_to(stop, config.output.shard_size)
    resume = Resume(plan, listing)
    if record is not None:
        takes_pictures = record.settings.takes_pictures  # as its rows were made, and will be
        check_images(config, takes_pictures)
        resume.changed = _changes(config, generator, storage, record, resume, options)
    if options.retry_failed:
        resume.retry = retry_failed(plan, listing)
    if options.redo_rejected:
        resume.marks = read_marks(storage, plan, listing)
    return Prepared(config, generator, storage, record, resume, takes_pictures, loras)


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
    with_images = config.prompts.images_root is not None  # that a file changed shows in no source
    if not source and not record.unaccepted and not with_images:
        return {}
    takes_pictures = record.settings.takes_pictures
    changed = changed_samples(
        config, generator, resume.plan, resume.listing, takes_pictures=takes_pictures
    )
    if not changed or options.accept_changes:
        return changed
    of_images = any(concerns_image(words) for shard in changed.values() for words in shard.values())
    # an interrupted acceptance goes on by itself, but covers no further change
    if record.unaccepted and not source and not of_images:
        return changed
    if of_images:
        source = [*source, f"{image_role(takes_pictures).word}s"]
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
