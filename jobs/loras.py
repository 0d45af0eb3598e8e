"""The LoRA adapters that a job declares: checked before a run, pinned in job.json, worn by workers.

Adapters are pinned by their content and scale, and only as far as something was made with them:
another adapter may join a job, and one that no image used may change.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.commits import Listing
from jobs.config import JobConfig
from jobs.errors import InputError, ModelError
from jobs.record import JobRecord

if TYPE_CHECKING:
    from torch import nn

    from zimage_core.lora import LoraReport, LoraSwitcher


@dataclass(frozen=True)
class DeclaredLora:
    """An adapter of `model.loras`, looked at on the driver's side.

    Args:
        fingerprint: content hash of its file.
        report: what it holds for the model; None where the model is not here yet, so that only a
            worker can tell.
    """

    name: str
    path: Path
    scale: float
    fingerprint: str
    report: LoraReport | None

    @property
    def warnings(self) -> list[str]:
        """What of the file is left out, one line for each reason."""
        lines = [] if self.report is None else self.report.warnings()
        return [f"model.loras.{self.name}: {self.path}: {line}" for line in lines]


def declared_loras(config: JobConfig) -> dict[str, DeclaredLora]:
    """Check the adapters of a job from their headers, and hash them.

    Raises:
        InputError: a file is missing, cannot be used, or does not fit the model; with its key.
    """
    if not config.model.loras:
        return {}
    from jobs.fingerprint import adapter_fingerprint
    from zimage_core.lora import check_lora
    from zimage_core.lora_file import open_lora

    model = _empty_transformer(config)
    found: dict[str, DeclaredLora] = {}
    for name, lora in config.model.loras.items():
        try:
            if model is None:
                open_lora(lora.path)
                report = None
            else:
                report = check_lora(lora.path, model)
            fingerprint = adapter_fingerprint(lora.path)
        except (ValueError, OSError) as error:
            raise InputError(f"{config.place(f'model.loras.{name}.path')}: {error}") from error
        found[name] = DeclaredLora(name, lora.path, lora.scale, fingerprint, report)
    return found


def _empty_transformer(config: JobConfig) -> nn.Module | None:
    from zimage_core.loader import check_checkpoint
    from zimage_core.lora import empty_transformer

    try:
        summary = check_checkpoint(config.model.folder, **config.model.parts)
        return empty_transformer(summary.transformer)
    except (ValueError, OSError):
        return None  # not fetched yet, or broken, which is told by whoever loads the model


def load_loras(
    config: JobConfig, transformer: nn.Module, fingerprints: Mapping[str, str]
) -> LoraSwitcher:
    """Load the adapters of a job on a worker; the transformer is not changed yet.

    Args:
        fingerprints: by name, what the driver saw.

    Raises:
        ModelError: a file is not here, or is another one than the driver's.
        InputError: an adapter does not fit the model, or holds NaN.
    """
    from jobs.fingerprint import adapter_fingerprint
    from zimage_core.lora import LoraSwitcher, load_lora

    adapters = {}
    for name, lora in config.model.loras.items():
        key = f"model.loras.{name}.path"
        try:
            found = adapter_fingerprint(lora.path)
        except OSError as error:
            raise ModelError(f"{key}: on {socket.gethostname()}: {error}") from error
        if found != fingerprints[name]:
            raise ModelError(
                f"{key}: {lora.path} on {socket.gethostname()} is another adapter than the job's: "
                f"{found}, planned {fingerprints[name]}"
            )
        try:
            adapters[name] = load_lora(lora.path, transformer)
        except (ValueError, OSError) as error:
            raise InputError(f"{key}: {error}") from error
    try:
        return LoraSwitcher(transformer, adapters)
    except ValueError as error:
        raise InputError(f"model.loras: {error}") from error


def lora_changes(
    record: JobRecord,
    config: JobConfig,
    declared: Mapping[str, DeclaredLora],
    listing: Listing,
) -> list[str]:
    """One line for each adapter that images of the output were made with and that changed.

    The output's rows are read only where an adapter changed at all.
    """
    changes: dict[str, list[str]] = {}
    for name, before in record.config["model"]["loras"].items():
        key = f"model.loras.{name}"
        if name not in declared:
            changes[name] = [f"{key}: was declared, now is not"]
            continue
        now = declared[name]
        pinned = record.settings.loras.get(name)
        if pinned != now.fingerprint:
            line = f"{key}: the adapter was {pinned}, now {now.fingerprint} ({now.path})"
            changes.setdefault(name, []).append(line)
        if before["scale"] != now.scale:
            line = f"{key}.scale: was {before['scale']!r}, now {now.scale!r}"
            changes.setdefault(name, []).append(line)
    if not changes:
        return []
    used: set[str] = set()
    for _, table in listing.current_tables(sorted(listing.parts), ["loras", "status"]):
        rows = table.to_pydict()
        for loras, status in zip(rows["loras"], rows["status"], strict=True):
            if loras is not None and status == "ok":
                used.update(loras.split(","))
    return [line for name in changes if name in used for line in changes[name]]
