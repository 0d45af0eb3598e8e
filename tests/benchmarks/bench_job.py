"""A whole job against a plain loop over diffusers' pipeline, on the same weights, alternately.

Ours is what `zimage run --local` does: one worker in this process, PNG files, hashes, manifest,
commits and metadata.parquet. The loop calls `ZImagePipeline` for one image at a time, with the same
prompts and seeds, and saves what comes with Pillow as it saves by default. Random weights, float32,
one thread each; the transformer takes most of the time, as it does in the published models.

Checks first that the files hold the same pixels. CPU time of the process, its writing threads
included, beside wall time: on a machine that others use only the first says anything. Loading is
given apart; ours hashes the weights and makes two trial images in it.

With `--ray N` images as well: one worker and two, one thread each, on a Ray of its own; the rate
while all of them make images, from the rows.

Prints tables and, as the last line, one JSON object; exit code 1 where more pixels differ than
rounding explains.

    python tests/benchmarks/bench_job.py [--model small] [--count 200] [--steps 4] [--ray 0]
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from threading import Lock
from typing import Any

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs.batch_stages import BatchStages
from jobs.config import JobConfig
from jobs.image_output import ImageOutput
from jobs.job_file import load_job
from jobs.local_executor import LocalExecutor
from jobs.plan import job_generator
from jobs.preparation import RunOptions
from jobs.runner import run_job
from zimage_core.tiny.make import make_checkpoint

ROOT = Path(__file__).parents[2]
TEXT: dict[str, Any] = {"text_dim": 64, "text_layers": 3}
MODELS: dict[str, dict[str, Any]] = {
    # The transformer takes 83 % of the loop's time here, between a published model's on an H100
    # (68 %) and on an RTX 4090 (90 %), both computed.
    "small": TEXT
    | {"dim": 256, "layers": 4, "heads": 4, "axes_dims": (16, 24, 24), "refiners": 2}
    | {"vae_channels": (8, 8, 8, 8)},
    # 89 %, and products of matrices most of it.
    "mid": TEXT
    | {"dim": 384, "layers": 8, "heads": 6, "axes_dims": (16, 24, 24), "refiners": 2}
    | {"vae_channels": (16, 16, 32, 32)},
}
PIXELS, SEED = 256, 42
JOB = f"""
extends: {ROOT}/configs/z-image-tiny.yaml
name: faces
model: {{path: model}}
prompts: {{generator: avatars, profiles: {ROOT}/data/profiles/avatars.csv, count: 1}}
sampling:
  {{width: {PIXELS}, height: {PIXELS}, guidance_scale: 0.0, seed: {SEED}}}
output: {{uri: out, shard_size: 8}}
run: {{threads_per_worker: 1}}
"""
STAGES = ("text", "transformer", "autoencoder", "file", "rest")
START = "start"
MOST_APART = 1  # steps of uint8: rounding of 1e-5 relative


@dataclass
class Clock:
    """Where the CPU time of this process goes, by name."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    lock: Lock = field(default_factory=Lock)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its CPU seconds counted for the thread that calls it."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                with self.lock:
                    self.seconds[name] += time.thread_time() - started

        return timed


@dataclass
class Side:
    """What one of the two took for all its images, its start apart."""

    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    start_cpu: float = 0.0
    start_wall: float = 0.0
    cpu: float = 0.0
    wall: float = 0.0
    rates: list[float] = field(default_factory=list)

    def add(self, clock: Clock, count: int, cpu: float, wall: float) -> None:
        """A round; `cpu` and `wall` are its seconds without its start."""
        self.cpu += cpu
        self.wall += wall
        self.rates.append(count / cpu)
        for stage in STAGES[:-1]:
            self.stages[stage] += clock.seconds[stage]
        self.stages["rest"] += cpu - sum(clock.seconds[stage] for stage in STAGES[:-1])

    def row(self, count: int) -> dict[str, Any]:
        """For the report: seconds of CPU an image, and images a second of CPU and of wall time."""
        return {
            "stages_ms": {s: round(1000 * self.stages[s] / count, 2) for s in STAGES},
            "cpu_ms": round(1000 * self.cpu / count, 1),
            "images_per_cpu_second": round(count / self.cpu, 3),
            "images_per_second": round(count / self.wall, 3),
            "rounds": [round(rate, 3) for rate in self.rates],
            "start_cpu_s": round(self.start_cpu, 2),
            "start_wall_s": round(self.start_wall, 2),
        }


def main() -> int:
    """Run both; exit code 1 where they do not make the same pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="images of each side, all rounds")
    parser.add_argument("--rounds", type=int, default=4, help="jobs that they are divided into")
    parser.add_argument("--steps", type=int, default=4, help="of every image")
    parser.add_argument("--model", choices=MODELS, default="small", help="its size")
    parser.add_argument("--batch", default="auto", help="batch_size of our jobs")
    parser.add_argument("--ray", type=int, default=0, help="images of a job on Ray; 0: none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    load = os.getloadavg()[0]
    each = args.count // args.rounds
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        model = make_checkpoint(folder / "model", seed=0, dtype=torch.float32, **MODELS[args.model])
        (folder / "job.yaml").write_text(JOB)
        ours, loop = Side(), Side()
        sets = [f"sampling.num_inference_steps={args.steps}", f"sampling.batch_size={args.batch}"]
        pipeline = load_loop(model, loop)
        run_round(pipeline, folder / "first", 0, 1, Side(), Side(), sets)  # first calls
        counts = [0, 0, 0]
        for number in range(args.rounds):
            at = folder / f"round-{number}"
            run_round(pipeline, at, number * each, each, ours, loop, sets)
            found = apart(at, each)
            counts = [counts[0] + found[0], counts[1] + found[1], max(counts[2], found[2])]
            print(f"round {number + 1}: ours {ours.rates[-1]:.2f}, loop {loop.rates[-1]:.2f}")
        sizes = {
            "ours": mean_bytes(folder.glob("round-*/out/images/**/*.png")),
            "loop": mean_bytes(folder.glob("round-*/loop/*.png")),
        }
        settings = json.loads((folder / "round-0/out/job.json").read_text())["fingerprint"]
        total = each * args.rounds
        rows = {"ours": ours.row(total), "loop": loop.row(total)}
        ratio = loop.cpu / ours.cpu
        show(rows, ratio)
        on_ray = scaling(folder, args.ray, sets) if args.ray else []
    with_start = (loop.cpu + loop.start_cpu) / (ours.cpu + ours.start_cpu / args.rounds)
    print(
        f"with one start of each: {with_start:.2f} (start, CPU s: ours "
        f"{ours.start_cpu / args.rounds:.1f}, loop {loop.start_cpu:.1f})"
    )
    print(
        f"pixels: {counts[0]} of {counts[1]} values differ, by {counts[2]} of 255 at most; "
        f"bytes of a file: ours {sizes['ours']:.0f}, loop {sizes['loop']:.0f}"
    )
    for row in on_ray:
        print(
            f"Ray, {row['workers']} worker(s): {row['images_per_second']:.3f} images/s of wall time"
            f", {row['images']} images, load {row['load']}"
        )
    report = {
        "benchmark": "job",
        "date": date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, 1 thread, CPU, float32",
        "load": [round(value, 1) for value in (load, os.getloadavg()[0])],
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "model": args.model,
        "sizes": MODELS[args.model],
        "pixels": PIXELS,
        "steps": args.steps,
        "count": total,
        "batch_size": settings["batch_size"],
        "results": rows,
        "ratio": round(ratio, 3),
        "ratio_with_start": round(with_start, 3),
        "values_that_differ": counts[0],
        "values": counts[1],
        "most_apart": counts[2],
        "bytes": sizes,
        "ray": on_ray,
    }
    print(json.dumps(report))
    return 0 if counts[2] <= MOST_APART else 1


def load_loop(model: Path, side: Side) -> diffusers.ZImagePipeline:
    """The pipeline of the loop."""
    cpu, wall = time.process_time(), time.monotonic()
    pipeline = diffusers.ZImagePipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    side.start_cpu, side.start_wall = time.process_time() - cpu, time.monotonic() - wall
    return pipeline


def run_round(
    pipeline: diffusers.ZImagePipeline,
    at: Path,
    start: int,
    count: int,
    ours: Side,
    loop: Side,
    sets: Sequence[str],
) -> None:
    """The same images by both, below `at`."""
    at.mkdir()
    config = load_job(
        at.parent / "job.yaml",
        sets=[f"prompts.start={start}", f"prompts.count={count}", *sets],
        flags={"output.uri": str(at / "out")},
    )
    run_ours(config, count, ours)
    run_loop(pipeline, config, at / "loop", start, count, loop)


def run_ours(config: JobConfig, count: int, side: Side) -> None:
    """A job from its file to metadata.parquet."""
    clock = Clock()
    wall_of_start = 0.0

    def start(function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            nonlocal wall_of_start
            begun, cpu = time.monotonic(), time.process_time()
            answer = function(*args)
            clock.seconds[START] += time.process_time() - cpu
            wall_of_start += time.monotonic() - begun
            return answer

        return timed

    log = Path("log")
    with pytest.MonkeyPatch.context() as monkey, log.open("w") as lines:
        for name in ("start", "fingerprint", "load"):
            monkey.setattr(LocalExecutor, name, start(getattr(LocalExecutor, name)))
        for owner, name, stage in (
            (BatchStages, "_encode", "text"),
            (BatchStages, "_denoise", "transformer"),
            (BatchStages, "_decode", "autoencoder"),
            (ImageOutput, "_write", "file"),
        ):
            timed = clock.around(stage, getattr(owner, name))
            monkey.setattr(owner, name, timed)
        cpu, wall = time.process_time(), time.monotonic()
        with contextlib.redirect_stderr(lines):
            code = run_job(config, RunOptions(local=True))
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    assert code == 0, log.read_text()
    side.start_cpu += clock.seconds[START]
    side.start_wall += wall_of_start
    side.add(clock, count, cpu - clock.seconds[START], wall - wall_of_start)


def run_loop(
    pipeline: diffusers.ZImagePipeline,
    config: JobConfig,
    folder: Path,
    start: int,
    count: int,
    side: Side,
) -> None:
    """What a user of diffusers writes."""
    folder.mkdir()
    clock = Clock()
    with pytest.MonkeyPatch.context() as monkey:
        for owner, name, stage in (
            (pipeline, "encode_prompt", "text"),
            (pipeline.transformer, "forward", "transformer"),
            (pipeline.vae, "decode", "autoencoder"),
            (Image.Image, "save", "file"),
        ):
            monkey.setattr(owner, name, clock.around(stage, getattr(owner, name)))
        cpu, wall = time.process_time(), time.monotonic()
        generator = job_generator(config, str(Path.cwd()))
        for index in range(start, start + count):
            prompt = generator.generate_prompt(index)
            image = pipeline(
                prompt=prompt if isinstance(prompt, str) else prompt.text,
                height=PIXELS,
                width=PIXELS,
                num_inference_steps=config.sampling.num_inference_steps,
                guidance_scale=0.0,
                generator=torch.Generator("cpu").manual_seed(SEED + index),
            ).images[0]
            image.save(folder / f"{index:08d}.png")
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    side.add(clock, count, cpu, wall)


def apart(at: Path, count: int) -> tuple[int, int, int]:
    """Values of uint8 that differ, of how many, and by how much at most."""
    table = pq.read_table(at / "out" / "metadata.parquet")
    differ, of, most = 0, 0, 0
    for row in table.select(["file_name", "index"]).to_pylist():
        with Image.open(at / "out" / row["file_name"]) as image:
            mine = np.asarray(image).astype(int)
        with Image.open(at / "loop" / f"{row['index']:08d}.png") as image:
            other = np.asarray(image).astype(int)
        distance = abs(mine - other)
        differ += int((distance > 0).sum())
        of += distance.size
        most = max(most, int(distance.max()))
    assert len(table) == count, "an image of each index"
    return differ, of, most


def mean_bytes(files: Iterable[Path]) -> float:
    """Of a file."""
    return float(np.mean([file.stat().st_size for file in files]))


def scaling(folder: Path, count: int, sets: Sequence[str]) -> list[dict[str, Any]]:
    """One worker, two, and both once more."""
    rows = []
    for number, workers in enumerate((1, 2, 1, 2)):
        output = folder / f"ray-{number}"
        load = os.getloadavg()[0]
        command = [
            *(
                sys.executable,
                "-m",
                "jobs",
                "run",
                str(folder / "job.yaml"),
                "--output",
                str(output),
            ),
            *("--count", str(count * workers), "--workers", str(workers)),
            *(f"--set={key}" for key in (*sets, "output.shard_size=4")),
        ]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
        }
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        rows.append({"workers": workers, "load": round(load, 1)} | rate(output))
    return rows


def rate(output: Path) -> dict[str, Any]:
    """Images a second from when every worker had made its first to when one made its last."""
    made = pq.read_table(output / "metadata.parquet", columns=["worker", "created_at", "seconds"])
    times: dict[str, list[Any]] = defaultdict(list)
    for row in made.to_pylist():
        times[row["worker"]].append(row["created_at"])
    begin = max(min(found) for found in times.values())
    end = min(max(found) for found in times.values())
    images = sum(begin < at <= end for found in times.values() for at in found)
    return {
        "workers_seen": len(times),
        "images": images,
        "images_per_second": round(images / (end - begin).total_seconds(), 4),
    }


def show(rows: dict[str, dict[str, Any]], ratio: float) -> None:
    """Print the tables."""
    print(f"{'CPU ms an image':<18}{'ours':>9}{'share':>8}{'loop':>9}{'share':>8}{'ratio':>8}")
    ours, loop = rows["ours"], rows["loop"]
    for stage in STAGES:
        mine, other = ours["stages_ms"][stage], loop["stages_ms"][stage]
        print(
            f"  {stage:<16}{mine:>9.2f}{mine / ours['cpu_ms']:>8.1%}{other:>9.2f}"
            f"{other / loop['cpu_ms']:>8.1%}{other / mine:>8.2f}"
        )
    print(f"  {'all':<16}{ours['cpu_ms']:>9.1f}{'':>8}{loop['cpu_ms']:>9.1f}{'':>8}{ratio:>8.2f}")
    for key, words in (
        ("images_per_cpu_second", "images a second of CPU"),
        ("images_per_second", "images a second of wall time"),
    ):
        print(f"{words}: ours {ours[key]:.3f}, loop {loop[key]:.3f}, {ours[key] / loop[key]:.2f}")


if __name__ == "__main__":
    sys.exit(main())
