"""What is not as it was when samples were made: weights, adapters, device, software, prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jobs.config import JobConfig
from jobs.epoch import read_events
from jobs.errors import InputError
from jobs.fingerprint import node_fingerprint
from jobs.moved_seeds import planned_seed
from jobs.output import Output
from jobs.plan import PromptError, job_generator, make_sample
from jobs.record import JobRecord, versions
from jobs.recorded_batch import RecordedBatch, Row
from jobs.regenerator import Regenerator
from jobs.resume import row_values
from prompt_generators import GENERATORS


def changes_since(
    output: Output,
    config: JobConfig,
    batches: Sequence[RecordedBatch],
    regenerator: Regenerator,
) -> list[str]:
    """What is not as it was when the samples were made, most telling first."""
    record = output.record
    rows = [row for batch in batches for row in batch.rows.values()]
    changes = []
    found = node_fingerprint(config.model.folder, **config.model.parts)
    for before in dict.fromkeys(row["model_fingerprint"] for row in rows):
        if before != found:
            changes.append(f"model weights: were {before}, now {found}")
    changes += dict.fromkeys(regenerator.changes)
    for device in dict.fromkeys(row["device"] for row in rows):
        if device != regenerator.info.device:
            changes.append(f"device: was {device}, now {regenerator.info.device}")
    changes += _version_changes(output, record, {row["attempt"] for row in rows})
    settings = record.settings
    for before in dict.fromkeys(row["attention"] for row in rows):
        if before != settings.attention:
            changes.append(f"attention: the row says {before}, job.json {settings.attention}")
    return changes + _prompt_changes(config, rows, settings.takes_pictures)


def _version_changes(output: Output, record: JobRecord, attempts: set[str]) -> list[str]:
    """Packages that are others than those of the workers that made the attempts."""
    workers: dict[tuple[int, str], dict[str, str]] = {}
    makers: list[tuple[int, str]] = []
    for event in read_events(output.storage):
        if event["event"] == "worker_ready" and event.get("versions"):
            workers[event["epoch"], event["worker"]] = event["versions"]
        elif event["event"] == "lease" and event["attempt"] in attempts:
            makers.append((event["epoch"], event["worker"]))
    of_attempts = [workers.get(maker, {}) for maker in makers]
    changes: dict[str, None] = {}
    for before in of_attempts or [{}]:
        # what the record has besides (8-bit weights' package) is not asked of each worker
        before = {**record.versions, **before}
        packages = [name for name in before if name not in ("python", "machine")]
        now = versions(packages)
        changes |= dict.fromkeys(
            f"{name}: was {old}, now {now[name]}"
            for name, old in before.items()
            if now[name] != old
        )
    return list(changes)


def _prompt_changes(config: JobConfig, rows: Iterable[Row], takes_pictures: bool) -> list[str]:
    """Where the job's prompts are others than the rows', from which the samples were made again."""
    if config.prompts.generator not in GENERATORS:
        return []  # code that an output of somebody else names is not run
    try:
        generator = job_generator(config)
    except InputError as error:
        return [f"prompts: cannot be asked for again, the rows' were taken: {error}"]
    changes = []
    for row in rows:
        try:
            sample = make_sample(config, generator, row["index"], takes_pictures=takes_pictures)
        except PromptError as error:
            changes.append(f"sample {row['index']}: {error}")
            continue
        before = {**row, "seed": planned_seed(row)}
        changes += [
            f"sample {row['index']}: {key}: the row says {before[key]!r}, the generator {value!r}"
            for key, value in row_values(sample).items()
            if before[key] != value
        ]
    return changes
