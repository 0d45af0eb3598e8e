"""What this machine can run, and what stands in the way: what `zimage doctor` prints.

Nothing here fails because something is missing: that is what it reports. The keys of the report
are described in docs/cli.md and stay as they are.
"""

from __future__ import annotations

import importlib
import math
import os
import platform
import shutil
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from jobs.address import environment_address, unreachable_reason
from jobs.canary_check import canary_problems, check_canary, format_canary
from jobs.memory_needs import format_memory, memory_report, smallest_need
from jobs.quantities import memory_size

PACKAGES = ("zimage-batch", "torch", "transformers", "ray", "safetensors", "pyarrow", "obstore")
MINIMUM = {"torch": (2, 5), "transformers": (4, 51), "ray": (2, 44)}
HEAD_DIM = 128  # channels of an attention head of the published models
MIN_FREE_BYTES = 2 * 1024**3
_GIB = 1024**3
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

Report = dict[str, Any]


class _Problems(list[dict[str, str]]):
    """What is wrong, each with the command that mends it."""

    def found(self, problem: str, fix: str) -> None:
        self.append({"problem": problem, "fix": fix})


def doctor(model_dir: Path | None = None, parts: Mapping[str, Path] | None = None) -> Report:
    """Look at this machine, and at a checkpoint where one is given.

    Args:
        model_dir: the checkpoint's folder.
        parts: what replaces models of it, by name.

    Returns a mapping that `json.dumps` takes: `ok`, `versions`, `cpu`, `device`, `gpus`,
    `attention`, `attention_auto`, `compile`, `disk`, `ray`, `model`, `canary`, `problems`.
    """
    problems = _Problems()
    versions = _versions(problems)
    torch = _torch(problems)
    gpus = _gpus(torch, problems)
    device = _device(torch, gpus)
    report: Report = {
        "ok": False,
        "versions": versions | {"cuda": torch.version.cuda if torch is not None else None},
        "cpu": _cpu(),
        "device": device,
        "gpus": gpus,
        "attention": _attention(torch, device),
        "attention_auto": _attention_auto(torch, device),
        "compile": _compile(torch, device),
        "disk": _disk(problems),
        "ray": _ray(problems),
        "model": None if model_dir is None else _model(model_dir, gpus, problems, parts),
        "canary": None,
    }
    if report["model"] is not None and report["model"]["ok"]:
        report["canary"] = check_canary(report, parts or {})
        problems.extend(canary_problems(report["canary"]))
    report["problems"] = list(problems)
    report["ok"] = not problems
    return report


def format_doctor(report: Report) -> str:
    """Return the report as lines for people."""
    versions, cpu, disk, ray = (report[key] for key in ("versions", "cpu", "disk", "ray"))
    lines = [
        "versions   "
        + ", ".join(f"{name} {number or 'none'}" for name, number in versions.items()),
        f"cpu        {cpu['cores']} cores, {memory_size(cpu['memory_bytes'])} memory",
    ]
    for gpu in report["gpus"]:
        lines.append(
            f"gpu {gpu['index']:<7}{gpu['name']}, {memory_size(gpu['memory_bytes'])} "
            f"({memory_size(gpu['free_bytes'])} free), compute capability {gpu['capability']}"
        )
    if not report["gpus"]:
        lines.append(f"gpu        none; images are made on {report['device']}")
    for name, backend in report["attention"].items():
        lines.append(f"attention  {name}: {'can run' if backend['runs'] else backend['reason']}")
    if report["attention_auto"] is not None:
        lines.append(f"attention  auto picks {report['attention_auto']}")
    compiling = report["compile"]
    lines.append(f"compile    {'can run' if compiling['runs'] else compiling['reason']}")
    lines.append(f"disk       {memory_size(disk['free_bytes'])} free in {disk['path']}")
    if ray["address"] is None:
        lines.append("ray        no address is set: `zimage run` starts Ray on this machine")
    else:
        lines.append(f"ray        {ray['address']}: {ray['reason'] or 'answers'}")
    model = report["model"]
    if model is not None and model["ok"]:
        parameters = sum(model["parameters"].values())
        lines.append(
            f"model      {model['path']}: complete, {parameters:,} parameters, "
            f"{memory_size(model['bytes'])} on disk"
        )
        lines += [f"           note: {note}" for note in model["notes"]]
        lines += format_memory(
            model["memory"],
            model["memory_dtype"],
            min((gpu["free_bytes"] for gpu in report["gpus"]), default=None),
        )
    elif model is not None:
        lines.append(f"model      {model['path']}: cannot be used")
    if report["canary"] is not None:
        lines.append(format_canary(report["canary"]))
    for entry in report["problems"]:
        lines += [f"PROBLEM    {entry['problem']}", f"           mend it: {entry['fix']}"]
    lines.append("no problems" if report["ok"] else f"{len(report['problems'])} problem(s)")
    return "\n".join(lines)


def _versions(problems: _Problems) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    for package, minimum in MINIMUM.items():
        number = found[package]
        wanted = ".".join(map(str, minimum))
        if number is None:
            problems.found(f"{package} is not installed", f"pip install '{package}>={wanted}'")
        elif _release(number) < minimum:
            problems.found(
                f"{package} {number} is older than {wanted}", f"pip install '{package}>={wanted}'"
            )
    return found


def _release(number: str) -> tuple[int, ...]:
    parts = []
    for part in number.split(".")[:2]:
        digits = "".join(character for character in part if character.isdigit())
        parts.append(int(digits or 0))
    return tuple(parts)


def _torch(problems: _Problems) -> ModuleType | None:
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a shared library of CUDA is missing
        problems.found(
            f"torch cannot be imported: {error}", "pip install --force-reinstall 'torch>=2.5'"
        )
        return None


def _cpu() -> dict[str, int]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # A container sees the whole machine; what it may use of it stands in its control group.
    quota, _, period = _cgroup("cpu.max").partition(" ")
    limit = _cgroup("memory.max")
    if quota.isdigit() and period.isdigit():
        cores = min(cores or 1, math.ceil(int(quota) / int(period)))
    if limit.isdigit():
        memory = min(memory, int(limit))
    return {"cores": cores or 1, "memory_bytes": memory}


def _cgroup(name: str) -> str:
    path = Path("/sys/fs/cgroup") / name
    return path.read_text(encoding="ascii").strip() if path.is_file() else ""


def _gpus(torch: ModuleType | None, problems: _Problems) -> list[dict[str, Any]]:
    if torch is None:
        return []
    with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver that is too old
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        if _NVIDIA_DRIVER.exists() and torch.version.cuda is None:
            problems.found(
                "an NVIDIA driver is loaded, but this torch is built without CUDA",
                "pip install --force-reinstall torch --index-url "
                "https://download.pytorch.org/whl/cu128",
            )
        elif _NVIDIA_DRIVER.exists():
            reason = f": {caught[0].message}" if caught else ""
            problems.found(
                f"an NVIDIA driver is loaded, but torch finds no GPU{reason}", "nvidia-smi"
            )
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        try:
            free, _ = torch.cuda.mem_get_info(index)
        except RuntimeError as error:  # lost from the bus, or held by a process in exclusive mode
            free = 0
            problems.found(f"GPU {index} ({properties.name}) cannot be used: {error}", "nvidia-smi")
        gpus.append(
            {
                "index": index,
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "free_bytes": free,
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
        if properties.major < 8:
            problems.found(
                f"GPU {index} ({properties.name}) does not compute in bfloat16, the default of "
                "jobs; it does in float16, and in float32 with twice the memory",
                "zimage run JOB --set model.dtype=float16",
            )
    return gpus


def _device(torch: ModuleType | None, gpus: list[dict[str, Any]]) -> str:
    if gpus:
        return "cuda"
    return "mps" if torch is not None and torch.backends.mps.is_available() else "cpu"


def _attention(torch: ModuleType | None, device: str) -> dict[str, dict[str, Any]]:
    if torch is None:
        return {}
    from zimage_core.attention import AttentionBackendError, attention_backends, check_backend

    dtype = _dtype(torch, device)
    found: dict[str, dict[str, Any]] = {}
    for name in attention_backends():
        try:
            check_backend(name, device, dtype, HEAD_DIM)
            found[name] = {"runs": True, "reason": None}
        except AttentionBackendError as error:
            reason = str(error).partition("cannot run here: ")[2] or str(error)
            found[name] = {"runs": False, "reason": reason}
    return found


def _attention_auto(torch: ModuleType | None, device: str) -> str | None:
    """What `auto` stands for here, whatever the environment names."""
    if torch is None:
        return None
    from zimage_core.attention import best_backend

    return best_backend(device, _dtype(torch, device), HEAD_DIM)


def _compile(torch: ModuleType | None, device: str) -> dict[str, Any]:
    if torch is None:
        return {"runs": False, "reason": "torch cannot be imported"}
    from zimage_core.compilation import CompileError, check_compile

    try:
        check_compile(device)
    except CompileError as error:
        return {"runs": False, "reason": str(error)}
    return {"runs": True, "reason": None}


def _dtype(torch: ModuleType, device: str) -> Any:
    return torch.bfloat16 if device == "cuda" else torch.float32


def _disk(problems: _Problems) -> dict[str, Any]:
    path = Path.cwd()
    usage = shutil.disk_usage(path)
    if usage.free < MIN_FREE_BYTES:
        problems.found(
            f"{memory_size(usage.free)} of disk are free in {path}",
            "zimage run JOB --output /a/larger/disk",
        )
    return {"path": str(path), "free_bytes": usage.free, "total_bytes": usage.total}


def _ray(problems: _Problems) -> dict[str, Any]:
    address = environment_address()
    if address is None:
        return {"address": None, "reachable": None, "reason": None}
    reason = unreachable_reason(address)
    if reason is not None:
        problems.found(
            f"no Ray cluster answers at {address}: {reason}",
            "unset RAY_ADDRESS RAY_API_SERVER_ADDRESS (or, on the head: ray start --head)",
        )
    return {"address": address, "reachable": reason is None, "reason": reason}


def _model(
    model_dir: Path,
    gpus: list[dict[str, Any]],
    problems: _Problems,
    parts: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    from zimage_core.config import CheckpointError
    from zimage_core.loader import check_checkpoint

    found: dict[str, Any] = {
        "path": str(model_dir),
        "ok": False,
        "error": None,
        "parameters": {},
        "bytes": None,
        "files": None,
        "notes": [],
        "memory_dtype": "bfloat16",
        "memory": [],
    }
    try:
        summary = check_checkpoint(model_dir, **(parts or {}))
    except CheckpointError as error:
        found["error"] = str(error)
        problems.found(
            f"the model cannot be used: {error}",
            "give the folder that holds model_index.json; `zimage run JOB` fetches a missing one "
            "where the job names model.repo",
        )
        return found
    parameters = dict(summary.num_parameters)
    found |= {
        "ok": True,
        "parameters": parameters,
        "bytes": summary.num_bytes,
        "files": len(summary.files),
        "notes": list(summary.notes),
    }
    found["memory"] = memory_report(model_dir, parts or {}, dtype="bfloat16")
    needed = smallest_need(found["memory"])
    for gpu in gpus:
        if needed is not None and gpu["memory_bytes"] < needed:
            problems.found(
                f"GPU {gpu['index']} ({gpu['name']}) has {memory_size(gpu['memory_bytes'])}, and "
                f"the least that the model needs is {memory_size(needed)}, with model.offload: "
                "block",
                f"use a GPU of more than {memory_size(needed)}, or none: "
                "CUDA_VISIBLE_DEVICES= zimage run JOB --local",
            )
    return found
