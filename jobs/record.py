"""`job.json`: what an output was made from, and the comparison that guards it.

The record pins everything that has a say in an image's bytes. A run that asks for something else
is refused field by field before a model loads. Two things may change: `prompts.count`, upwards,
and what the prompts are made from (generator, options, profile table), where the samples
themselves are then compared (`jobs.resume`).
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from jobs.config import PNG_LEVEL, JobConfig
from jobs.errors import FingerprintError, InputError, StorageError
from jobs.executor import Settings
from jobs.plan import Extent, JobPlan
from jobs.record_check import MAX_BYTES, check_values
from jobs.storage import Storage
from prompt_generators import generator_source, read_profiles

PATH = "job.json"
SCHEMA_VERSION = 1
PACKAGES = ("zimage-batch", "torch", "transformers", "numpy", "pillow", "isal", "ray")
_QUANTIZER = "torchao"


@dataclass(frozen=True)
class PromptSource:
    """What the prompts are a function of, besides their index."""

    generator: str
    options: str  # canonical JSON
    source_sha256: str  # of the generator's source files
    profiles_sha256: str | None  # of the parsed table

    def differences(self, other: PromptSource) -> list[str]:
        """Words for what is not equal."""
        words = {
            "generator": "prompts.generator",
            "options": "prompts.options",
            "source_sha256": "the generator's source",
            "profiles_sha256": "the profile table's content",
        }
        return [w for key, w in words.items() if getattr(self, key) != getattr(other, key)]


@dataclass(frozen=True)
class JobRecord:
    """The content of job.json.

    Args:
        unaccepted: a change of the prompts was accepted, but its rows are not all remade yet.
        command: the command line of the newest run, for messages that say what to run next.
    """

    config: dict[str, Any]
    settings: Settings
    prompts: PromptSource
    plan: JobPlan
    versions: dict[str, str]
    created_at: str
    updated_at: str
    unaccepted: bool = False
    command: tuple[str, ...] = ()

    def dump(self) -> bytes:
        """The file's bytes."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "name": self.config["name"],
            "created_at": self.created_at,
            "updated_at": self.updated_at,
            "extents": [asdict(e) for e in self.plan.extents],
            "fingerprint": {**asdict(self.settings), "prompts": asdict(self.prompts)},
            "versions": self.versions,
            "unaccepted": self.unaccepted,
            "command": list(self.command),
            "job": self.config,
        }
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def read_record(storage: Storage) -> JobRecord | None:
    """The record of an output, or None where there is none.

    Raises:
        StorageError: the file is damaged, or of a newer version of this project.
    """
    content = storage.get(PATH, most=MAX_BYTES)
    if content is None:
        return None
    where = f"{storage.uri}/{PATH}"
    try:
        data = json.loads(content)
        if data["schema_version"] != SCHEMA_VERSION:
            raise StorageError(
                f"{where}: schema_version {data['schema_version']}; allowed: {SCHEMA_VERSION}"
                " (another version of this program wrote it)"
            )
        # A record of before the key existed: all weights were what `model.dtype` says.
        data["job"]["model"] = {"quantization": "none", **data["job"]["model"]}
        # As before the key, at level 1; what encoded them shows in their bytes, not their pixels.
        # As before the next, without metadata in the files.
        before = {"png_level": PNG_LEVEL, "embed_metadata": "none"}
        data["job"]["output"] = {**before, **data["job"]["output"]}
        check_values(data)
        fingerprint = dict(data["fingerprint"])
        prompts = PromptSource(**fingerprint.pop("prompts"))
        return JobRecord(
            config=data["job"],
            settings=Settings(**fingerprint),
            prompts=prompts,
            plan=JobPlan(tuple(Extent(**e) for e in data["extents"])),
            versions=data["versions"],
            created_at=data["created_at"],
            updated_at=data["updated_at"],
            unaccepted=data["unaccepted"],
            command=tuple(data["command"]),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise StorageError(
            f"{where}: damaged: {type(error).__name__}: {error}; put it back, or choose another "
            "--output"
        ) from error


def prompt_source(config: JobConfig) -> PromptSource:
    """What this job's prompts are made from. Raises InputError for sources that cannot be read."""
    prompts = config.prompts
    try:
        # by name and content, not by folder: a clone and a wheel keep them in different places
        files = sorted(
            (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in generator_source(prompts.generator)
        )
    except (ValueError, OSError) as error:
        raise InputError(f"{config.place('prompts.generator')}: {error}") from error
    digest = hashlib.sha256(json.dumps(files).encode())
    profiles = None
    if prompts.profiles is not None:
        try:
            profiles = read_profiles(prompts.profiles, prompts.sheet).fingerprint
        except (ValueError, OSError) as error:
            raise InputError(f"{config.place('prompts.profiles')}: {error}") from error
    return PromptSource(
        generator=prompts.generator,
        options=json.dumps(prompts.options, sort_keys=True, ensure_ascii=False),
        source_sha256=digest.hexdigest(),
        profiles_sha256=profiles,
    )


# Keys that say how or where work is done, not what is made.
_FREE = {
    "output.uri",
    "run.workers",
    "run.gpus_per_worker",
    "run.max_shard_attempts",
    "run.stall_timeout",
    "run.max_failure_rate",
    # pinned by content instead
    "model.loras",
    "model.transformer",
    "model.vae",
    "model.text_encoder",
    "model.path",
    "model.repo",
    "model.source",
    "model.revision",
    # compared sample by sample
    "prompts.generator",
    "prompts.profiles",
    "prompts.sheet",
    "prompts.options",
    "prompts.count",
    "prompts.images_root",
}
# Keys whose `auto` was resolved: recorded under this name of Settings.
_RESOLVED = {
    "model.dtype": "dtype",
    "model.attention": "attention",
    "model.compile": "compile",
    "model.offload": "offload",
    "sampling.batch_size": "batch_size",
}


def changed_keys(before: JobConfig, now: JobConfig) -> dict[str, tuple[Any, Any]]:
    """Keys that have a say in an image by their value, and whose values are not the same."""
    old, new = (_flatten(json.loads(config.model_dump_json())) for config in (before, now))
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _is_free(key)
    }


def refused_changes(record: JobRecord, config: JobConfig) -> list[str]:
    """One line for each field in which `config` asks for other bytes than the record's."""
    before, now = _flatten(record.config), _flatten(json.loads(config.model_dump_json()))
    changes = []
    for key in sorted(before.keys() | now.keys()):
        if _is_free(key):
            continue
        old, new = before.get(key), now.get(key)
        if key in _RESOLVED:
            resolved = getattr(record.settings, _RESOLVED[key])
            # `auto` stands for what was resolved, and naming just that is no change
            old, new = resolved, resolved if new == "auto" else new
        if old != new:
            changes.append(f"{key}: was {old!r}, now {new!r}")
    return changes


def _is_free(key: str) -> bool:
    return key in _FREE or any(key.startswith(f"{free}.") for free in _FREE)


def check_record(
    storage: Storage,
    record: JobRecord,
    config: JobConfig,
    stop: int,
    further_changes: Iterable[str] = (),
) -> None:
    """Refuse what would mix two jobs in one output.

    Args:
        stop: one past the last sample index that the job asks for now.
        further_changes: found by others, a line each.

    Raises:
        FingerprintError: naming every field that changed.
    """
    changes = [*refused_changes(record, config), *further_changes]
    if stop < record.plan.stop:
        per = config.sampling.images_per_prompt
        changes.append(
            f"prompts.count: was {record.plan.num_samples // per}, now "
            f"{(stop - record.plan.start) // per} (it may grow, not shrink)"
        )
    if changes:
        lines = "\n  ".join(changes)
        raise FingerprintError(
            f"{storage.uri} was made by another job; this one differs in\n  {lines}\n"
            "Put the old values back, or choose another --output."
        )


def check_weights(storage: Storage, record: JobRecord, fingerprint: str) -> None:
    """Raise FingerprintError if the weights are not those that the output was made with."""
    if fingerprint != record.settings.model_fingerprint:
        raise FingerprintError(
            f"{storage.uri} was made by another job; this one differs in\n"
            f"  model weights: was {record.settings.model_fingerprint}, now {fingerprint}\n"
            "Put the old weights back, or choose another --output."
        )


def new_record(
    config: JobConfig,
    settings: Settings,
    prompts: PromptSource,
    plan: JobPlan,
    command: tuple[str, ...] = (),
) -> JobRecord:
    """The record of an output that is begun now."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    dump = json.loads(config.model_dump_json())
    packages = PACKAGES if config.model.quantization == "none" else (*PACKAGES, _QUANTIZER)
    found = versions(packages)
    return JobRecord(dump, settings, prompts, plan, found, now, now, command=command)


def updated(record: JobRecord, config: JobConfig, **changes: Any) -> JobRecord:
    """`record` for this run's config, with `changes`; what was resolved stays."""
    return replace(
        record,
        config=json.loads(config.model_dump_json()),
        updated_at=datetime.now(UTC).isoformat(timespec="seconds"),
        **changes,
    )


def version_changes(record: JobRecord) -> list[str]:
    """Packages that are not what they were when the output was begun."""
    now = versions((*PACKAGES, _QUANTIZER))
    return [
        f"{name} {old} -> {now.get(name, 'not installed')}"
        for name, old in record.versions.items()
        if now.get(name, "not installed") != old
    ]


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of what has a say in an image's bytes."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
