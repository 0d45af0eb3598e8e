"""What of the working directory goes to a Ray cluster with a job, and packing it.

The rules are few and do not depend on Ray's version: in a Git work tree what Git tracks or would
track (so `.gitignore` counts), else everything; never hidden names, caches, `output/` and
`ckpts/` at the top, nor a file too large to be code or a table. The packed archive depends on the
files' contents only, so that an unchanged folder is uploaded once.
"""

from __future__ import annotations

import os
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import InputError

MAX_FILE_BYTES = 20 * 1024 * 1024
MAX_TOTAL_BYTES = 100 * 1024 * 1024
MAX_FILES = 20_000
_NEVER = frozenset({"__pycache__", "node_modules", "venv"})
_NEVER_AT_TOP = frozenset({"output", "ckpts"})


@dataclass(frozen=True, slots=True)
class Upload:
    """The files below `root` that go along, sorted, and those left out for their size."""

    root: Path
    files: tuple[Path, ...]
    too_large: tuple[Path, ...]
    total_bytes: int

    def missing(self, path: Path) -> str | None:
        """Return why an absolute path will not be there on the cluster, None where it will.

        A folder is there when every file below it is, hidden ones aside.
        """
        if not path.exists():
            return "it does not exist"
        if not path.is_relative_to(self.root):
            return f"it is outside of the working directory, {self.root}"
        known = frozenset(self.files)
        if not path.is_dir():
            return self._missing_file(path, known)
        for folder in _links_to_folders(path):
            return f"{folder.relative_to(self.root)} is a link to a folder, which is not followed"
        files = sorted(file for file in _walk(path) if not file.name.startswith("."))
        if not files:
            return "it is an empty folder"
        for file in filter(Path.is_file, files):  # a link may lead to nothing
            reason = self._missing_file(file, known)
            if reason is not None:
                return f"{file.relative_to(self.root)} is not uploaded: {reason}"
        return None

    def _missing_file(self, path: Path, known: frozenset[Path]) -> str | None:
        if path in known:
            return None
        if path in self.too_large:
            return f"it is over {MAX_FILE_BYTES // 2**20} MiB"
        if not _may_go(path.relative_to(self.root)):
            return "hidden names, caches, output/ and ckpts/ are left out"
        return ".gitignore leaves it out"

    def pack(self, archive: Path) -> None:
        """Write the files into a zip archive, the same bytes for the same contents."""
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
            for file in self.files:
                entry = zipfile.ZipInfo(file.relative_to(self.root).as_posix())
                executable = os.access(file, os.X_OK)
                entry.external_attr = (0o100755 if executable else 0o100644) << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                packed.writestr(entry, file.read_bytes())


def collect(root: Path) -> Upload:
    """Choose the files below `root`, an absolute path, that go to the cluster.

    Raises `InputError` where they are too many or too large together (it names the largest), and
    where Git, which knows what `.gitignore` leaves out, cannot be asked.
    """
    sizes: dict[Path, int] = {}
    listed = _git_files(root)
    for file in _walk(root) if listed is None else listed:
        # A submodule is listed as one name, and a link may lead to nothing: neither is a file.
        if _may_go(file.relative_to(root)) and file.is_file():
            sizes[file] = file.stat().st_size
        if len(sizes) > MAX_FILES:
            raise InputError(
                f"{root}: over {MAX_FILES} files to upload; run this in your project's folder"
            )
    files = sorted(file for file, size in sizes.items() if size <= MAX_FILE_BYTES)
    total = sum(sizes[file] for file in files)
    if total > MAX_TOTAL_BYTES:
        largest = sorted(files, key=lambda file: -sizes[file])[:5]
        names = ", ".join(
            f"{file.relative_to(root)} ({sizes[file] / 2**20:.1f} MiB)" for file in largest
        )
        raise InputError(
            f"{root}: {total / 2**20:.0f} MiB to upload, allowed: {MAX_TOTAL_BYTES // 2**20} MiB. "
            f"Largest: {names}. Put what the job does not need into .gitignore, and large inputs "
            "where the cluster reaches them by an absolute path"
        )
    too_large = tuple(sorted(set(sizes) - set(files)))
    return Upload(root, tuple(files), too_large, total)


def _git_files(root: Path) -> list[Path] | None:
    """Return what Git tracks or would track below `root`, None outside of a work tree."""
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        return None
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        # Going on without .gitignore could upload what must not leave this machine.
        detail = getattr(error, "stderr", b"") or str(error).encode()
        raise InputError(
            f"{root}: cannot ask Git what .gitignore leaves out of the upload: "
            f"{detail.decode(errors='replace').strip()}"
        ) from None
    return [root / os.fsdecode(name) for name in set(done.stdout.split(b"\0")) if name]


def _walk(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".") and name not in _NEVER]
        if Path(folder) == root:
            names[:] = [name for name in names if name not in _NEVER_AT_TOP]
        yield from (Path(folder) / name for name in files)


def _links_to_folders(root: Path) -> Iterator[Path]:
    for folder, names, _ in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".") and name not in _NEVER]
        yield from (path for name in sorted(names) if (path := Path(folder) / name).is_symlink())


def _may_go(path: Path) -> bool:
    if _hidden(path) or path.suffix == ".pyc" or path.parts[0] in _NEVER_AT_TOP:
        return False
    return not _NEVER.intersection(path.parts)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
