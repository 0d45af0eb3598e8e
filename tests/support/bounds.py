"""What refusing a bad input may cost: little time, little memory, no file anywhere else.

with Bounds(folder, seconds=5, megabytes=200, may_write=["out"]):
    ...
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_calls import CommandLine, Ended

SECONDS = 8.0  # of processor time, on a machine that does other things too
MEGABYTES = 300.0


@contextmanager
def bounded(
    folder: Path,
    *,
    may_write: Sequence[str] = (),
    seconds: float = SECONDS,
    megabytes: float = MEGABYTES,
) -> Iterator[None]:
    """Assert that the body stays within bounds.

    Args:
        folder: everything around the input, the home folder and that of temporary files included.
        may_write: names in `folder` whose content may change.
    """
    before = _content(folder, may_write)
    started, resident = time.process_time(), _reset_peak()
    yield
    used, grown = time.process_time() - started, (_peak() - resident) / 1024
    assert used < seconds, f"took {used:.1f} s"
    assert grown < megabytes, f"took {grown:.0f} MB more"
    after = _content(folder, may_write)
    assert after == before, sorted(set(after.items()) ^ set(before.items()))


class Refuser:
    """Calls commands that must refuse, within bounds, with one error."""

    def __init__(self, zimage: CommandLine) -> None:
        self.zimage = zimage
        self.folder = zimage.folder

    def __call__(
        self,
        *arguments: object,
        code: int,
        words: Sequence[str],
        may_write: Sequence[str] = (),
        problems: int = 1,
    ) -> Ended:
        """Run a command that must end with `code`, and with so many lines of error, no more."""
        with bounded(self.folder, may_write=may_write):
            ended = self.zimage(*arguments, code=code)
        lines = [line for line in ended.err.splitlines() if line.strip()]
        assert len(lines) == problems, ended.err
        assert lines[0].startswith(f"zimage {arguments[0]}: "), ended.err
        for word in words:
            assert word in ended.err, ended.err
        assert all(len(line) < 5000 and line.isprintable() for line in lines), ended.err
        return ended


def no_homes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the home folder and that of temporary files where `bounded` sees them."""
    for name, variable in (("home", "HOME"), ("temporary", "TMPDIR")):
        (folder / name).mkdir()
        monkeypatch.setenv(variable, str(folder / name))


def _content(folder: Path, may_write: Sequence[str]) -> dict[str, tuple[int, int]]:
    found = {}
    for place, folders, names in os.walk(folder):
        if Path(place) == folder:
            folders[:] = [name for name in folders if name not in may_write]
            names = [name for name in names if name not in may_write]
        for name in (*names, *folders):
            path = Path(place, name)
            status = path.lstat()
            size = 0 if path.is_dir() else status.st_size
            changed = 0 if path.is_dir() else status.st_mtime_ns
            found[str(path.relative_to(folder))] = (size, changed)
    return found


def _reset_peak() -> int:
    """Begin to measure this process' peak anew; KiB that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])
