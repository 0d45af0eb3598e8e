"""Numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable

_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6))


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


def short_time(seconds: float) -> str:
    """Seconds that were measured, with three digits or more: `0.123 ms`, `93.1 ms`, `5.38 s`."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{_three_digits(1000 * seconds)} ms"


def scaled(number: float, unit: str) -> str:
    """A large number with a prefix, and three digits or more: `594 TFLOP/s`, `12.3 GFLOP`."""
    prefix, scale = next((p for p in _PREFIXES if number >= p[1]), _PREFIXES[-1])
    return f"{_three_digits(number / scale)} {prefix}{unit}"


def _three_digits(number: float) -> str:
    return f"{number:.{sum(number < limit for limit in (100, 10, 1))}f}"


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
