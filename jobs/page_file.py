"""The file that a command writes a page to: where it may be, and that it appears whole."""

from __future__ import annotations

from pathlib import Path

from jobs.errors import InputError, StorageError

_HEAD = 4096  # bytes in which a page of ours names its maker


def check_page_file(file: Path, mark: str, kind: str) -> None:
    """Refuse a place where no page can be, and a file of someone else's.

    Args:
        file: where the page goes.
        mark: what the head of a page of this command holds.
        kind: what the command writes, for the message.

    Raises:
        InputError: there is no such folder, no file can be there, or another file is.
    """
    if not file.absolute().parent.is_dir():
        raise InputError(f"-o: {file}: no such folder: {file.parent}")
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise InputError(f"{file}: is a link, a folder or a device; allowed: a file")
    if not file.exists():
        return
    try:
        with file.open("rb") as content:
            head = content.read(_HEAD)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    if mark.encode() not in head:
        raise InputError(
            f"{file}: is there and no {kind} of this command; allowed: -o FILE with another name"
        )


def replace_page_file(file: Path, content: bytes) -> None:
    """Write a page beside the old one and put it in its place at once.

    Raises:
        StorageError: it cannot be written.
    """
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_bytes(content)
        part.replace(file)
    except OSError as error:
        raise StorageError(f"{file}: cannot be written: {error.strerror}; see -o FILE") from error
