"""Merging what several sources say about one job, and remembering who said what.

A layer is a nested mapping from one file, one `--set` or one flag. Layers are added in order of
precedence; mappings merge, anything else (null too) replaces what was there. Input paths are made
absolute as they are added, since only then is it known what they are relative to.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.resources import settle

Keys = tuple[str, ...]

# `*` stands for any name. Each is a path that is read, relative to where it is written.
INPUT_PATHS: tuple[Keys, ...] = (
    ("model", "path"),
    ("model", "transformer"),
    ("model", "vae"),
    ("model", "text_encoder"),
    ("model", "loras", "*", "path"),
    ("prompts", "profiles"),
    ("prompts", "images_root"),
)
OUTPUT_URI: Keys = ("output", "uri")


@dataclass(frozen=True, slots=True)
class Origin:
    """Who set a key: a file as messages show it, `--set`, or the name of a flag."""

    label: str
    prefix: str = ""  # "metadata.job." for a job inside a Ray cluster file

    def place(self, keys: Keys) -> str:
        """Return `FILE: key.path`, as an error line begins."""
        return f"{self.label}: {self.prefix}{'.'.join(keys)}"


@dataclass(frozen=True, slots=True)
class Written:
    """An input path as its writer put it, beside what was made of it."""

    text: str
    path: Path
    base: Path  # the folder that it is relative to
    origin: Origin


@dataclass(slots=True)
class Layers:
    """The layers merged so far.

    Attributes:
        data: the merged mapping, as `JobConfig` validates it.
        paths: the input paths that won, by key.
        problems: what is wrong with a path before any validation, one line each.
        anchored: the files that were named by an absolute path, or by a file that was.
    """

    data: dict[str, Any] = field(default_factory=dict)
    paths: dict[Keys, Written] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    anchored: set[Path] = field(default_factory=set)
    _origins: dict[Keys, Origin] = field(default_factory=dict)
    _main: Origin | None = None

    def add(self, values: dict[str, Any], *, base: Path, origin: Origin) -> None:
        """Merge one layer over what is there; relative input paths are relative to `base`."""
        self._merge(self.data, values, (), base, origin)

    def set_main(self, origin: Origin) -> None:
        """Name the job file: what answers for keys that nobody set."""
        self._main = origin

    def origin(self, keys: Keys) -> Origin:
        """Return who set a key, or else began the mapping around it, or else the job file."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self._origins:
                return self._origins[keys[:length]]
        return self.main

    @property
    def main(self) -> Origin:
        """The job file, which answers for what nobody wrote."""
        assert self._main is not None
        return self._main

    def value(self, keys: Keys) -> Any:
        """Return a merged value, None where there is none."""
        value: Any = self.data
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def _merge(
        self, target: dict[str, Any], values: dict[str, Any], at: Keys, base: Path, origin: Origin
    ) -> None:
        for key, value in values.items():
            keys = (*at, key)
            if isinstance(value, dict):
                if not isinstance(target.get(key), dict):
                    target[key] = {}
                    self._origins[keys] = origin
                self._merge(target[key], value, keys, base, origin)
            else:
                self._origins[keys] = origin
                target[key] = self._resolved(value, keys, base, origin)

    def _resolved(self, value: object, keys: Keys, base: Path, origin: Origin) -> object:
        is_input = any(_matches(keys, pattern) for pattern in INPUT_PATHS)
        self.paths.pop(keys, None)
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            return value  # validation says what is wrong with it
        if not is_input and keys != OUTPUT_URI:
            return value
        try:
            path = Path(value).expanduser()
        except RuntimeError:
            self.problems.append(
                f"{origin.place(keys)}: value {value!r}: no such user; allowed: ~ for your own "
                "home folder, or an absolute path"
            )
            return value
        if keys == OUTPUT_URI:
            return str(path) if value.startswith("~") else value
        resolved = settle(Path(os.path.normpath(base / path)))
        self.paths[keys] = Written(value, resolved, base, origin)
        return str(resolved)


def _matches(keys: Keys, pattern: Keys) -> bool:
    return len(keys) == len(pattern) and all(
        expected in ("*", key) for key, expected in zip(keys, pattern, strict=True)
    )
