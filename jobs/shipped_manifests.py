"""Which manifest a checkpoint folder is to be compared with, where the user names none."""

from __future__ import annotations

from pathlib import Path

from jobs.errors import InputError
from jobs.resources import bundle_root
from zimage_core.source_record import read_record
from zimage_core.weights_manifest import Expected, Manifest, folder_files, read_manifest


def shipped_manifests() -> list[Manifest]:
    """The manifests of published checkpoints that come with the project, by name."""
    return [read_manifest(path) for path in sorted(manifests_folder().glob("*.json"))]


def manifests_folder() -> Path:
    """Where they are, in a clone and in a wheel."""
    return bundle_root() / "data" / "manifests"


def known_manifest(folder: Path) -> tuple[Manifest, str]:
    """Find the manifest of a folder: what its download noted, else a shipped one.

    A shipped one is taken where the download names its repository, the folder has its name
    (`Z-Image-Turbo`), or every weight file of the folder is one that it names.

    Returns:
        The manifest, and in words why it is the one.

    Raises:
        InputError: none is known, or the folder's download did not end.
        CheckpointError: the record of the download cannot be read.
    """
    record = read_record(folder)
    if record is not None and not record.complete:
        raise InputError(
            f"{folder}: fetching {record.describe()}, did not end; "
            f"`zimage weights download {record.repo} {folder}` goes on with it"
        )
    if record is not None and record.files:
        files = {
            name: Expected(size=values.get("size"), sha256=values.get("sha256"))
            for name, values in record.files.items()
        }
        manifest = Manifest("the record of its download", files, record.repo)
        return manifest, f"what was noted when it was fetched: {record.describe()}"
    shipped = shipped_manifests()
    for manifest in shipped:
        if record is not None and record.repo == manifest.repo:
            return manifest, f"the shipped manifest of {manifest.repo}, where it was fetched from"
        if folder.resolve().name.lower() == manifest.name:
            return manifest, f"the shipped manifest {manifest.name}, whose name the folder has"
    weights = {name for name in folder_files(folder) if name.endswith(".safetensors")}
    for manifest in shipped:
        if weights and weights <= set(manifest.files):
            return manifest, f"the shipped manifest {manifest.name}, whose weight files it has"
    names = ", ".join(manifest.name for manifest in shipped)
    raise InputError(
        f"{folder}: no manifest of it is known: it was not fetched by `zimage weights download`, "
        f"and has neither name nor weight files of a shipped one ({names}); give --manifest FILE"
    )
