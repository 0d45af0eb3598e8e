"""Numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 image`, `6,000 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds in words: `12 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def file_size(count: float) -> str:
    """Bytes in decimal units: `2.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def memory_size(count: float) -> str:
    """Bytes of memory in binary units: `78.2 GiB`."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def index_ranges(indices: Iterable[int]) -> str:
    """Numbers in ascending order, runs of them in short: `0-3,7,9-10`; empty for none."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def range_indices(text: str) -> list[int]:
    """The numbers that `index_ranges` wrote. Raises ValueError for other text."""
    indices: list[int] = []
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        indices += range(int(first), int(last or first) + 1)
    return indices
