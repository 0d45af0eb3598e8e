"""Freed memory stays with a worker's process, so that no page is asked for twice."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading, torch
from jobs.host_memory import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def compute():
    x = torch.ones(10, 2**20)  # 40 MiB: more than glibc would ever keep by itself
    for _ in range(20):
        x = (x * 2).relu_() / 2

compute()
before = resource.getrusage(resource.RUSAGE_SELF)
compute()
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_minflt - before.ru_minflt)
"""


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is another one")
def test_a_second_batch_asks_for_no_page() -> None:
    faults = {}
    for how in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
        )
        faults[how] = int(done.stdout)
    assert faults["leave"] > 100_000  # 40 blocks of 10 240 pages
    assert faults["keep"] < 2_000


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs import host_memory

    monkeypatch.setattr(host_memory.platform, "libc_ver", lambda: ("", ""))
    assert not host_memory.keep_freed_memory()
