"""Where the presets, job files and data that ship with the project are.

In a clone they are `configs/`, `jobs/*.yaml` and `data/` in the repository root; a wheel carries
the same three below `jobs/bundled/`, so that their relative paths to each other stay the same.
"""

from __future__ import annotations

import os
from pathlib import Path

from jobs.errors import InputError

_PACKAGE = Path(__file__).absolute().parent


def bundle_root() -> Path:
    """Return the folder that holds `configs/`, `data/` and `jobs/*.yaml`.

    Raises `InputError` where neither a clone nor a wheel is around this package.
    """
    for root in (_PACKAGE / "bundled", _PACKAGE.parent):
        if (root / "configs" / "z-image-turbo.yaml").is_file():
            return root
    raise InputError(
        f"the shipped presets are missing: no configs/z-image-turbo.yaml in {_PACKAGE / 'bundled'} "
        f"nor in {_PACKAGE.parent}; install the package again (pip install --force-reinstall)"
    )


def presets() -> dict[str, Path]:
    """Return the shipped model presets, name to file, sorted: what `extends: NAME` can name."""
    files = {path.stem: path for path in (bundle_root() / "configs").glob("*.yaml")}
    return dict(sorted(files.items()))


def shipped_jobs() -> dict[str, Path]:
    """Return the shipped job files, `jobs/NAME.yaml` to file, sorted."""
    files = sorted((bundle_root() / "jobs").glob("*.yaml"))
    return {f"jobs/{path.name}": path for path in files}


def find_job(name_or_path: Path | str) -> Path:
    """Return the file meant by a job named on the command line.

    A path that exists is itself. A relative one that does not, such as `jobs/avatars.yaml` or
    `configs/z-image-tiny.yaml`, is looked up among the shipped files, so that the examples work
    from any folder. Anything else is returned as it is, for its reader to complain about.
    """
    path = Path(name_or_path)
    return _or_shipped(path, "configs", "jobs") if path.suffix == ".yaml" else path


def find_overlay(name_or_path: Path | str) -> Path:
    """Return the file meant by `--config`: as for a job, and a shipped preset by its name alone."""
    path = find_job(name_or_path)
    exists = os.path.exists(path)  # noqa: PTH110
    return path if exists else presets().get(str(name_or_path), path)


def data_path(name: str) -> Path:
    """Return the path that a flag names; one below `data/` that is not there is a shipped one.

    So `data/profiles/avatars.xlsx` and `data/checkpoints/z-image-tiny` are there after
    `pip install` too, as they are in a clone.
    """
    return _or_shipped(Path(name), "data")


def _or_shipped(path: Path, *folders: str) -> Path:
    """A path that is there, or else its namesake among the shipped files of these folders."""
    # os.path.exists, unlike Path.exists, takes a name too long for the system for a missing one
    exists = os.path.exists(path)  # noqa: PTH110
    if exists or ".." in path.parts or not path.parts or path.parts[0] not in folders:
        return path
    shipped = bundle_root() / path
    return shipped if os.path.exists(shipped) else path  # noqa: PTH110


def settle(path: Path) -> Path:
    """Return where a path written in a shipped file is, given as that file's folder reads it.

    An installed package is no place for weights. What a wheel's presets name beside the bundle's
    own files (`../ckpts/Z-Image-Turbo`) is therefore taken relative to the working directory,
    which is where it is for someone who runs in a clone's root.
    """
    bundled = _PACKAGE / "bundled"
    if path.is_relative_to(bundled) and not path.exists():
        return Path.cwd() / path.relative_to(bundled)
    return path
