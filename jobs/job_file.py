"""Reading a job: files with what they extend, overlays, `--set` and flags, merged and checked.

Precedence, low to high: the files named by `extends`, the job file, each `--config` file (with
what it extends itself) from left to right, `--set`, named flags. Input paths are relative to the
file in which they are written, on the command line to the working directory. Everything that is
wrong is reported at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobs.config import SECTIONS, JobConfig
from jobs.config_errors import explain, show
from jobs.errors import InputError
from jobs.layers import Keys, Layers, Origin
from jobs.resources import find_job, find_overlay, presets, shipped_jobs
from jobs.yaml_file import YamlFileError, display, kind, read_mapping, read_value

# What a named flag sets, for messages that must name the flag instead of a file.
FLAGS: dict[str, str] = {
    "output.uri": "--output",
    "prompts.start": "--start",
    "prompts.count": "--count",
    "run.workers": "--workers",
}
_LONGEST_CHAIN = 32  # files, each of which extends the next
_CLUSTER_KEYS = ("cluster_name", "provider")


class JobFileError(InputError):
    """A job that cannot be read. `problems` holds one line for each thing that is wrong."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[JobFileError], tuple[tuple[str, ...]]]:
        return (JobFileError, (self.problems,))


def load_job(
    path: Path | str,
    *,
    overlays: Sequence[Path] = (),
    sets: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
) -> JobConfig:
    """Read a job file, or a Ray cluster file that carries a job under `metadata.job`.

    Args:
        path: the file; `jobs/avatars.yaml` and the like are found among the shipped ones too.
        overlays: further files that win over it, the last one most (`--config`).
        sets: `KEY=VALUE` with a dotted key and a YAML value (`--set`).
        flags: dotted key to value of the named flags; one that is None was not given.

    Raises `JobFileError`, with every problem at once.
    """
    return read_job(path, overlays=overlays, sets=sets, flags=flags)[0]


def read_job(
    path: Path | str,
    *,
    overlays: Sequence[Path] = (),
    sets: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
) -> tuple[JobConfig, Layers]:
    """Do what `load_job` does, and also return the layers: who set what, paths as written."""
    reader = _Reader()
    source = find_job(path)
    reader.add_file(source, main=True)
    for overlay in overlays:
        reader.add_file(find_overlay(overlay))
    for assignment in sets:
        reader.add_assignment(assignment)
    for key, value in (flags or {}).items():
        if value is not None:
            reader.add_value(key, value, Origin(FLAGS.get(key, f"--{key.rpartition('.')[2]}")))
    if reader.problems:
        # Keys of a file that cannot be read would all be missing: no use in checking the rest.
        raise JobFileError(reader.problems)
    layers = reader.layers
    for section in SECTIONS:  # so that a missing key is named, not the section around it
        layers.data.setdefault(section, {})
    try:
        config = JobConfig.model_validate(layers.data)
    except ValidationError as error:
        raise JobFileError([*layers.problems, *explain(error, layers)]) from None
    if layers.problems:
        raise JobFileError(layers.problems)
    config._files = tuple(dict.fromkeys(reader.files))
    config._source = reader.source
    config._layers = layers
    return config, layers


class _Reader:
    """Collects layers and problems while files are followed."""

    def __init__(self) -> None:
        self.layers = Layers()
        self.problems: list[str] = []
        self.files: list[Path] = []
        self.source: Path | None = None

    def add_file(
        self,
        named: Path,
        chain: tuple[Path, ...] = (),
        *,
        by: Path | None = None,
        main: bool = False,
    ) -> None:
        """Add a file as a layer, after the files that it extends.

        Args:
            named: the path as the command line, or the file `by`, names it.
            chain: the files that led here, outermost first, links followed.
            by: the file that names it; None for the command line.
            main: whether it answers for keys that nobody wrote.
        """
        path = Path(os.path.abspath((by.parent if by else Path.cwd()) / named))  # noqa: PTH100
        if named.is_absolute() or by in self.layers.anchored:
            self.layers.anchored.add(path)
        self.source = self.source or path
        real = Path(os.path.realpath(path))  # Path.resolve raises for a link to itself
        if real in chain:
            loop = [*chain[chain.index(real) :], real]
            self.problems.append(
                f"{display(chain[-1])}: extends: a circle: {' -> '.join(map(display, loop))}"
            )
            return
        if len(chain) >= _LONGEST_CHAIN:
            self.problems.append(
                f"{display(chain[-1])}: extends: a chain of over {_LONGEST_CHAIN} files"
            )
            return
        chain = (*chain, real)
        try:
            values = read_mapping(path)
        except YamlFileError as error:
            hint = ""
            if by is None and not os.path.lexists(path):
                hint = f"; shipped: {', '.join(shipped_jobs() if main else presets())}"
            self.problems.append(f"{error}{hint}")
            return
        prefix = ""
        if any(key in values for key in _CLUSTER_KEYS):
            job = self._job_of_cluster(values, path, chain, main)
            if job is None:
                return
            values, prefix = job, "metadata.job."
        origin = Origin(display(path), prefix)
        if main:
            self.layers.set_main(origin)
        if "extends" in values:
            values = dict(values)
            self._extend(values.pop("extends"), path, origin, chain)
        self.files.append(path)
        self.layers.add(values, base=path.parent, origin=origin)

    def _job_of_cluster(
        self, cluster: dict[str, Any], path: Path, chain: tuple[Path, ...], main: bool
    ) -> dict[str, Any] | None:
        """Return the inline job of a Ray cluster file; follow one that is named by its path."""
        metadata = cluster.get("metadata")
        job = metadata.get("job") if isinstance(metadata, dict) else None
        if isinstance(job, dict):
            return job
        if isinstance(job, str) and job.strip() and "\0" not in job:
            self.files.append(path)
            self._follow(job, path, Origin(display(path)), ("metadata", "job"), chain, main)
            return None
        given = "missing" if job is None else f"value {show(job)}: {kind(job)} does not belong here"
        self.problems.append(
            f"{display(path)}: metadata.job: {given}; allowed: in a Ray cluster file, which this "
            "is, the job itself as a mapping, or the path of a job file"
        )
        return None

    def _extend(self, name: object, path: Path, origin: Origin, chain: tuple[Path, ...]) -> None:
        place = origin.place(("extends",))
        shipped = presets()
        allowed = f"a shipped preset ({', '.join(shipped)}) or a path such as ./mine.yaml"
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            self.problems.append(
                f"{place}: value {show(name)}: {kind(name)} does not belong here; "
                f"allowed: {allowed}"
            )
        elif "/" in name or name.endswith((".yaml", ".yml")):
            self._follow(name, path, origin, ("extends",), chain)
        elif name in shipped:
            self.add_file(shipped[name], chain)
        else:
            self.problems.append(f"{place}: value {show(name)}: no such preset; allowed: {allowed}")

    def _follow(
        self,
        name: str,
        path: Path,
        origin: Origin,
        keys: Keys,
        chain: tuple[Path, ...],
        main: bool = False,
    ) -> None:
        """Add the file that another one names, relative to that other one."""
        try:
            target = Path(name).expanduser()
        except RuntimeError:
            self.problems.append(f"{origin.place(keys)}: value {show(name)}: no such user")
            return
        self.add_file(target, chain, by=path, main=main)

    def add_assignment(self, assignment: str) -> None:
        """Add a `KEY=VALUE` of the command line."""
        key, separator, text = assignment.partition("=")
        if not separator or not all(part.strip() for part in key.split(".")):
            self.problems.append(
                f"--set: value {show(assignment)}: not KEY=VALUE; "
                "allowed: such as --set sampling.seed=7"
            )
            return
        try:
            value = read_value(text)
        except YamlFileError as error:
            self.problems.append(
                f"--set: {key}: value {show(text)}: {error}; allowed: a YAML value"
            )
            return
        self.add_value(key.strip(), value, Origin("--set"))

    def add_value(self, key: str, value: object, origin: Origin) -> None:
        """Add one dotted key as a layer of its own."""
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        self.layers.add(nested, base=Path.cwd(), origin=origin)
