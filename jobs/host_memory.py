"""Memory that a worker on a CPU computes in: kept by its process from one operator to the next."""

from __future__ import annotations

import ctypes
import platform

# Of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1  # bytes, what its int can hold
_ALLOWED_BEFORE = 2**25  # older versions of glibc refuse more for the second one


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for the next that asks; whether that can be asked for.

    A batch's activations are blocks of some ten megabytes, which glibc hands back to the kernel as
    soon as they are free. Their pages then come back one by one, emptied: 30 000 faults and a
    twelfth of the CPU time of an image of the size that docs/benchmarks/2026-11-30-job.md tells of.
    What the process holds stays at the most that it ever needed.

    Done for the whole process. Other libraries than glibc are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Either of them alone would stop glibc from raising the other one by itself.
    large = mallopt(_M_MMAP_THRESHOLD, _LARGEST) or mallopt(_M_MMAP_THRESHOLD, _ALLOWED_BEFORE)
    return bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST) and large)
