"""Loading a checkpoint of 2 GB: time and memory, against diffusers' `from_pretrained`, alternately.

A checkpoint of random weights with the parts and proportions of files that the published one has:
transformer and text encoder in several safetensors files with an index, autoencoder in one. Three
cases: float32 as it is stored, float32 cast to bfloat16, bfloat16 as it is stored (the same
tensors, half of the bytes). Each load is a process of its own, forked from one that has imported
everything and computed nothing. Files are read once before, so that
they are in the system's page cache, and looked at afterwards, whether they still are.

Measured are, without imports and after a load of a tiny checkpoint (what only a first one does):

- seconds until the models are there, and until each of their weights was read once: diffusers may
  leave weights in the mapped file, to be fetched when they are used;
- CPU seconds of the process, all threads, until then;
- memory above that before the load: the most that was resident while loading (`VmHWM`), and at the
  end, with all weights read, what is the process' own (`RssAnon`) and what are pages of files
  (`RssFile`), which processes share, and which the system may take back and read again.

Before that, both ways give equal tensors: a hash of every one. diffusers' text encoder also has the
last layer, which no image needs and ours leaves out; its bytes are in the report.

Prints a table and, as the last line, one JSON object; exit code 1 where tensors differ.

    python tests/benchmarks/bench_load.py [--rounds 7] [--scale 1.0] [--folder DIR]
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}

T = TypeVar("T")
MODELS = ("transformer", "text_encoder", "vae")
OURS, THEIRS = "ours", "diffusers"
CASES = (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"))
MIB = 2**20
TINY = {"layers": 1, "vocab_size": 320}
WIDE = {
    "dim": 1536,
    "heads": 12,
    "axes_dims": (32, 48, 48),
    "text_dim": 1024,
    "text_heads": 8,
    "text_kv_heads": 4,
    "text_head_dim": 128,
    "text_mlp": 3072,
    "vocab_size": 8192,
    "vae_channels": (64, 128, 256, 256),
    "vae_layers": 2,
    "vae_groups": 32,
}


def main() -> int:
    """Run all cases; exit code 1 where tensors differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="of the 2 GB")
    parser.add_argument("--threads", type=int, help="torch's threads; torch's default if not given")
    parser.add_argument("--folder", type=Path, help="keeps the checkpoints here for another run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        # elsewhere, so that this process starts no threads and holds no memory that others inherit
        sizes = apart(make, folder=folder, scale=args.scale)
        import_all()
        rows = []
        same = True
        for stored, asked in CASES:
            equal, hashes = compare(folder, stored, asked, args.threads)
            same = same and equal
            rows += run_case(folder, stored, asked, args.rounds, args.threads)
            for row in rows[-2:]:
                row |= {"equal": equal, "tensors": hashes}
    print_table(rows)
    report = {
        "benchmark": "load",
        "date": date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load": [round(value, 1) for value in os.getloadavg()],
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "diffusers", "transformers", "safetensors")},
        "files_mib": sizes,
        "rounds": args.rounds,
        "results": rows,
    }
    print(json.dumps(report))
    return 0 if same else 1


def apart(function: Callable[..., T], **arguments: Any) -> T:
    """Call a function in a process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, kwds=arguments)


def import_all() -> None:
    """All that either way imports, the parts too that are imported when they are used."""
    import transformers
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline
    from diffusers import ZImageTransformer2DModel as Transformer

    import zimage_core.loader  # noqa: F401

    parts = (AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, Transformer)
    assert all(parts) and transformers.Qwen3Model and transformers.PreTrainedTokenizerFast


def make(folder: Path, scale: float) -> dict[str, dict[str, float]]:
    """Write the checkpoints that are not there; MiB by weight file."""
    import torch

    from zimage_core.tiny.make import make_checkpoint

    layers = {"layers": max(1, round(9 * scale)), "text_layers": max(2, round(12 * scale))}
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        path, kind = folder / dtype, getattr(torch, dtype)
        shard = int(300e6 * scale) * kind.itemsize // 4
        if not path.exists():
            make_checkpoint(path, dtype=kind, shard_size=shard, **(WIDE | layers))
        files = sorted(path.rglob("*.safetensors"))
        sizes[dtype] = {str(p.relative_to(path)): round(p.stat().st_size / MIB, 1) for p in files}
    if not (folder / "tiny").exists():
        make_checkpoint(folder / "tiny", **TINY)
    return sizes


def compare(folder: Path, stored: str, asked: str, threads: int | None) -> tuple[bool, int]:
    """Whether both ways give the same tensors, and how many were compared."""
    hashes = {
        way: apart(
            load,
            folder=folder,
            way=way,
            stored=stored,
            asked=asked,
            threads=threads,
            hashes=True,
        )["hashes"]
        for way in (OURS, THEIRS)
    }
    ours, theirs = hashes[OURS], hashes[THEIRS]
    extra = {key for key in theirs.keys() - ours.keys() if key.startswith("text_encoder")}
    equal = bool(ours) and ours == {k: h for k, h in theirs.items() if k not in extra}
    if not equal:
        wrong = [key for key in ours if ours[key] != theirs.get(key)]
        print(f"{stored} -> {asked}: differ: {wrong[:5]}", file=sys.stderr)
    return equal, len(ours)


def run_case(
    folder: Path, stored: str, asked: str, rounds: int, threads: int | None
) -> list[dict[str, Any]]:
    """Load both ways in turn; the medians of each."""
    for path in (folder / stored).rglob("*"):
        if path.is_file():
            path.read_bytes()
    taken: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
    for number in range(rounds):
        order = (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS)
        for way in order:
            found = apart(load, folder=folder, way=way, stored=stored, asked=asked, threads=threads)
            taken[way].append(found)
            print(f"{stored} -> {asked}, {way}: {found}", file=sys.stderr, flush=True)
    rows = []
    for way, loads in taken.items():
        numbers = {
            key: statistics.median(load[key] for load in loads) for key in loads[0] if key != "way"
        }
        spread = {
            key: [min(load[key] for load in loads), max(load[key] for load in loads)]
            for key in ("seconds", "ready", "cpu")
        }
        rows.append(
            {"stored": stored, "asked": asked, "way": way, **numbers, "least_and_most": spread}
        )
    return rows


def load(
    folder: Path,
    way: str,
    stored: str,
    asked: str,
    threads: int | None,
    hashes: bool = False,
) -> dict[str, Any]:
    """What a fresh process does."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    dtype = getattr(torch, asked)
    run = with_ours if way == OURS else with_diffusers
    run(folder / "tiny", dtype)
    begin_peak()
    before = memory()
    cpu, began = time.process_time(), time.perf_counter()
    models = run(folder / stored, dtype)
    seconds = time.perf_counter() - began
    peak = memory()["VmHWM"] - before["VmHWM"]
    for model in models.values():
        for tensor in model.state_dict().values():
            tensor.sum()
    ready, cpu = time.perf_counter() - began, time.process_time() - cpu
    after = memory()
    found: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "ready": round(ready, 3),
        "cpu": round(cpu, 3),
        "peak_mib": round(peak, 1),
        "own_mib": round(after["RssAnon"] - before["RssAnon"], 1),
        "file_mib": round(after["RssFile"] - before["RssFile"], 1),
        "weights_mib": round(
            sum(t.nbytes for m in models.values() for t in m.state_dict().values()) / MIB, 1
        ),
    }
    if hashes:
        found["hashes"] = {
            f"{name}.{key}": hashlib.sha256(
                f"{tensor.dtype} {list(tensor.shape)}".encode()
                + tensor.contiguous().view(torch.uint8).numpy().tobytes()
            ).hexdigest()
            for name, model in models.items()
            for key, tensor in model.state_dict().items()
            if tensor.ndim
        }
    return found


def with_ours(path: Path, dtype: Any) -> dict[str, Any]:
    from zimage_core.loader import load_from_local_dir

    components = load_from_local_dir(path, device="cpu", dtype=dtype)
    return {name: components[name] for name in MODELS}


def with_diffusers(path: Path, dtype: Any) -> dict[str, Any]:
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    pipeline = diffusers.ZImagePipeline.from_pretrained(path, dtype=dtype)
    return {name: getattr(pipeline, name) for name in MODELS}


def begin_peak() -> None:
    """Let `VmHWM` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def memory() -> dict[str, float]:
    """MiB of this process, by the system's names."""
    text = Path("/proc/self/status").read_text()
    return {name: int(kib) / 1024 for name, kib in re.findall(r"(VmHWM|Rss\w+):\s+(\d+) kB", text)}


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'':<22}{'way':<11}{'loaded s':>9}{'all read s':>11}{'CPU s':>7}{'peak MiB':>10}"
        f"{'own MiB':>9}{'file MiB':>9}{'weights':>9}  equal"
    )
    for row in rows:
        case = f"{row['stored']} -> {row['asked']}"
        print(
            f"{case:<22}{row['way']:<11}{row['seconds']:>9.2f}{row['ready']:>11.2f}"
            f"{row['cpu']:>7.2f}{row['peak_mib']:>10.0f}{row['own_mib']:>9.0f}"
            f"{row['file_mib']:>9.0f}{row['weights_mib']:>9.0f}  {row['equal']}"
        )


if __name__ == "__main__":
    sys.exit(main())
