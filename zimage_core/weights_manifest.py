"""Manifests of checkpoints: what each file holds by size and hash, and comparing a folder with one.

Three forms are read and written: JSON with size, MD5 and SHA-256 of each file, and the two columns
`<hash>  <path>` that `md5sum -c` and `sha256sum -c` check. The original repository's manifests are
in the second form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from zimage_core.file_hashes import FileHashes, Progress, hash_files

FORMATS = ("md5", "sha256", "json")
_FORMAT = 1
_KINDS: dict[str, Callable[[Any], bool]] = {
    "size": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "md5": lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{32}", value)),
    "sha256": lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)),
}


class ManifestError(ValueError):
    """A manifest cannot be read or made; the message names its file and line or key."""


@dataclass(frozen=True)
class Expected:
    """What a file must hold; None where the manifest does not say."""

    size: int | None = None
    md5: str | None = None
    sha256: str | None = None

    @property
    def hash(self) -> tuple[str, str] | None:
        """The strongest hash there is: algorithm and value in hex."""
        if self.sha256 is not None:
            return "sha256", self.sha256
        return None if self.md5 is None else ("md5", self.md5)


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint.

    Attributes:
        name: for the user, a file's name or `z-image-turbo`.
        files: by path in the folder, with slashes.
        repo: repository that it describes; None where it does not say.
    """

    name: str
    files: Mapping[str, Expected]
    repo: str | None = None


@dataclass(frozen=True)
class Difference:
    """A file that is not as its manifest says.

    Attributes:
        file: path in the folder.
        problem: `missing`, `size`, `hash` or `unreadable`.
        expected: size in bytes or `<algorithm>:<hex>`; None for `missing` and `unreadable`.
        found: the same of what is there; for `unreadable` the reason.
    """

    file: str
    problem: str
    expected: int | str | None = None
    found: int | str | None = None

    def describe(self) -> str:
        """In words: `transformer/config.json: has 12 bytes, the manifest says 492`."""
        if self.problem == "missing":
            return f"{self.file}: is missing"
        if self.problem == "unreadable":
            return f"{self.file}: cannot be read: {self.found}"
        if self.problem == "size":
            return f"{self.file}: has {self.found} bytes, the manifest says {self.expected}"
        return f"{self.file}: has {self.found}, the manifest says {self.expected}"


def make_manifest(folder: Path, paths: Sequence[str], progress: Progress | None = None) -> Manifest:
    """Read files of a folder and write down what they hold.

    Raises:
        OSError: a file cannot be read.
    """
    found = hash_files([(folder / path, ("md5", "sha256")) for path in paths], progress)
    files = {}
    for path, content in zip(paths, found, strict=True):
        if isinstance(content, OSError):
            raise content
        files[path] = Expected(content.size, content.hashes["md5"], content.hashes["sha256"])
    return Manifest(folder.name, files)


def format_manifest(manifest: Manifest, form: str) -> str:
    """Write a complete manifest as text, in one of `FORMATS`.

    Raises:
        ManifestError: a path cannot be written in columns.
    """
    lines = sorted(manifest.files.items())
    if form == "json":
        files = {path: vars(expected) for path, expected in lines}
        values = {"format": _FORMAT, "name": manifest.name, "repo": manifest.repo, "files": files}
        return json.dumps(values, indent=2) + "\n"
    for path, _ in lines:
        if "\n" in path or "\\" in path:
            raise ManifestError(f"{path!r}: has a character that only the format json can hold")
    return "".join(f"{getattr(expected, form)}  {path}\n" for path, expected in lines)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest in any of the three forms.

    Raises:
        ManifestError: it is missing, unreadable, or in none of them; or it names a file outside of
            the folder, or none at all.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read as a manifest: {error}") from error
    if text.lstrip().startswith("{"):
        manifest = _read_json(path, text)
    else:
        manifest = Manifest(path.name, _read_columns(path, text))
    if not manifest.files:
        raise ManifestError(f"{path}: names no file")
    for name in manifest.files:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
            raise ManifestError(f"{path}: names {name!r}; allowed: a path inside the folder")
    return manifest


def compare(folder: Path, manifest: Manifest, progress: Progress | None = None) -> list[Difference]:
    """Find what in a folder is not as a manifest says, several files at once.

    A file of the wrong size is not read further. Where a manifest has both hashes, the SHA-256 is
    compared alone. Files that the manifest does not name are no difference; see `surplus`.

    Returns:
        Differences in the order of the manifest.
    """
    differences: dict[str, Difference] = {}
    to_hash: list[tuple[str, tuple[str, str]]] = []
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            found = path.stat().st_size if path.is_file() else None
        except OSError as error:
            differences[name] = Difference(name, "unreadable", None, str(error))
            continue
        if found is None:
            differences[name] = Difference(name, "missing")
        elif expected.size not in (None, found):
            differences[name] = Difference(name, "size", expected.size, found)
        elif expected.hash is not None:
            to_hash.append((name, expected.hash))
    contents = hash_files([(folder / name, [check[0]]) for name, check in to_hash], progress)
    for (name, check), content in zip(to_hash, contents, strict=True):
        difference = _compare_hash(name, check, content)
        if difference is not None:
            differences[name] = difference
    return [differences[name] for name in manifest.files if name in differences]


def bytes_to_read(folder: Path, manifest: Manifest) -> int:
    """Bytes that `compare` is going to hash, for a progress bar."""
    paths = [(folder / name, expected) for name, expected in manifest.files.items()]
    sizes = [(path.stat().st_size, want.size) for path, want in paths if path.is_file()]
    return sum(size for size, want in sizes if want in (None, size))


def folder_files(folder: Path) -> list[str]:
    """Every file of a folder, sorted, without hidden ones and what lies in hidden folders."""
    relative = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.as_posix() for path in relative if not any(part.startswith(".") for part in path.parts)
    )


def _compare_hash(
    name: str, check: tuple[str, str], content: FileHashes | OSError
) -> Difference | None:
    if isinstance(content, OSError):
        return Difference(name, "unreadable", None, str(content))
    algorithm, expected = check
    found = content.hashes[algorithm]
    if found == expected:
        return None
    return Difference(name, "hash", f"{algorithm}:{expected}", f"{algorithm}:{found}")


def _read_columns(path: Path, text: str) -> dict[str, Expected]:
    files: dict[str, Expected] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        # a star marks a file read as binary, which says nothing on Linux
        match = re.fullmatch(r"([0-9A-Fa-f]{32}|[0-9A-Fa-f]{64})\s+\*?(.*\S)\s*", line)
        if match is None:
            raise ManifestError(
                f"{path}: line {number} is {line[:80]!r}; allowed: an MD5 or SHA-256 in hex, two "
                "spaces, a path"
            )
        name = match[2].removeprefix("./")
        if name in files:
            raise ManifestError(f"{path}: line {number} names {name!r} again")
        value = match[1].lower()
        files[name] = Expected(md5=value) if len(value) == 32 else Expected(sha256=value)
    return files


def _read_json(path: Path, text: str) -> Manifest:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ManifestError(f"{path}: cannot be read as JSON: {error}") from error
    if values.get("format") != _FORMAT:
        raise ManifestError(f"{path}: format is {values.get('format')!r}; allowed: {_FORMAT}")
    entries, repo = values.get("files"), values.get("repo")
    if not isinstance(entries, dict) or not (repo is None or isinstance(repo, str)):
        raise ManifestError(f"{path}: files must be an object, and repo a text or null")
    files = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise ManifestError(f"{path}: {name!r} must be an object with {', '.join(_KINDS)}")
        for key, value in entry.items():
            if key not in _KINDS or not (value is None or _KINDS[key](value)):
                raise ManifestError(
                    f"{path}: {name!r} has {key} {value!r}; allowed: size in bytes, md5 and sha256 "
                    "in lower-case hex"
                )
        files[name] = Expected(**entry)
    return Manifest(str(values.get("name") or path.stem), files, repo)
