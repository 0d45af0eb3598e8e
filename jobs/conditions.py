"""Where a measurement is made: the device that is asked for, and what its figures depend on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from jobs.device import device_type
from jobs.errors import InputError
from jobs.quantities import counted, memory_size
from jobs.record import versions

_ALLOWED_DEVICES = "auto, cpu, cuda, cuda:N, mps"
_PACKAGES = (
    *("zimage-batch", "torch", "transformers", "numpy", "pillow", "isal"),
    *("triton", "flash-attn", "flash-attn-3"),
)
_OTHERS_MEMORY = 2**30  # bytes of a GPU: more than this process' own context takes
_BUSY = 0.5  # of the cores
_DRIVER = Path("/proc/driver/nvidia/version")
_CPU = Path("/proc/cpuinfo")


def find_device(name: str) -> torch.device:
    """The device that `--device` names, which is made the current one; `auto` is the best.

    Raises:
        InputError: there is no such device, or it is not here.
    """
    try:
        device = torch.device(device_type() if name == "auto" else name)
    except RuntimeError as error:
        raise InputError(
            f"--device: {name!r}: no such device; allowed: {_ALLOWED_DEVICES}"
        ) from error
    if device.type == "cuda":
        number = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index or 0
        if index >= number:
            found = "no CUDA GPU" if not number else f"CUDA GPUs 0 to {number - 1} only"
            raise InputError(f"--device: {name!r}: torch finds {found} here")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"--device: {name!r}: torch finds no MPS here")
    if device.type not in ("cpu", "mps"):
        raise InputError(f"--device: {name!r}: cannot be used; allowed: {_ALLOWED_DEVICES}")
    return device


def conditions(device: torch.device) -> dict[str, Any]:
    """What figures depend on besides the command: `conditions` in docs/cli.md."""
    memory = free = None
    name = _processor() if device.type == "cpu" else device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        free, memory = torch.cuda.mem_get_info(device)
    return {
        "device": name,
        "device_type": device.type,
        "memory_bytes": memory,
        "free_bytes": free,
        "driver": driver_version(_DRIVER.read_text()) if _DRIVER.is_file() else None,
        "cuda": torch.version.cuda,
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions(_PACKAGES),
        "commit": _commit(Path(__file__).parents[1]),
    }


def company(found: Mapping[str, Any]) -> list[str]:
    """What else seems to have run on the machine, and may have made figures worse."""
    words = []
    if found["device_type"] == "cpu" and found["load_average"] > _BUSY * found["cores"]:
        words.append(
            f"the load before was {found['load_average']} on {counted(found['cores'], 'core')}, so "
            "that times here are too long by an unknown factor; CPU times are less so"
        )
    if found["memory_bytes"] and found["memory_bytes"] - found["free_bytes"] > _OTHERS_MEMORY:
        taken = memory_size(found["memory_bytes"] - found["free_bytes"])
        words.append(f"{taken} of the GPU's memory were taken before")
    return words


def page_path(given: Path | None, date: datetime, device: str) -> Path:
    """Where the page goes: what is given, or a name that is free in the working directory."""
    if given is not None:
        return given
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    stem = f"{date:%Y-%m-%d}-bench-{slug}"
    path, number = Path(f"{stem}.md"), 2
    while path.exists():
        path, number = Path(f"{stem}-{number}.md"), number + 1
    return path


def driver_version(text: str) -> str | None:
    """The number in what NVIDIA's driver says of itself under `/proc`."""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found and found[0]


def _processor() -> str:
    """The CPU's name, or its architecture where the system does not say."""
    if _CPU.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", _CPU.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _commit(root: Path) -> str | None:
    """The commit of a clone, and whether its files are others; None for an installed package."""
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or a clone of somebody else's
    return f"{commit}, with changes" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout.strip()
