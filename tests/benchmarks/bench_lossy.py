"""What step caching and 8-bit weights gain and cost, on the trained tiny checkpoint, on a CPU.

For each length of schedule, with guidance: the plain run; `cache` at each of its intervals; as many
steps of a plain run as `cache` computes, which is what a user could ask for instead; 8-bit weights.
Each way draws the same prompts (those of `zimage_core.tiny.score`) at the same seeds, and the ways
take turns batch by batch. Measured: CPU seconds of denoising, since other work shares the machine;
blocks that were run; likeness to the plain run; attributes found by the score's detector.

Checks first that both ways are nothing when off: the same bits as a call that does not name them.
Prints tables and, as the last line, one JSON object; exit code 1 where the check fails.

    python tests/benchmarks/bench_lossy.py [--steps 28 50] [--prompts 64] [--ways NAME...]
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zimage_core import ZImagePipeline, load_from_local_dir
from zimage_core.images import to_uint8
from zimage_core.step_cache import INTERVALS, computed_steps
from zimage_core.tiny.fidelity import compare
from zimage_core.tiny.score import Question, make_questions, score_pictures
from zimage_core.tiny.vocabulary import load_vocabulary
from zimage_core.tiny.world import SIZE

CHECKPOINT = Path(__file__).parents[2] / "data" / "checkpoints" / "z-image-tiny"
BATCH = 8
ALIKE = (2, 3)  # intervals that are compared with fewer steps


@dataclass
class Way:
    """One way to make all pictures, and what came of it."""

    name: str
    pipeline: ZImagePipeline
    steps: int
    cache: int | None = None
    seconds: float = 0.0
    blocks: int = 0
    latents: list[Tensor] = field(default_factory=list)

    @cached_property
    def pictures(self) -> list[np.ndarray]:
        """Asked for once all are made."""
        batches = [to_uint8(self.pipeline.decode(latents)) for latents in self.latents]
        return [picture for batch in batches for picture in batch]


def main() -> int:
    """Run all ways; exit code 1 where one that is off changes a bit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--ways", nargs="+", help="only these, by name, beside the plain run")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="begin no further batch of a schedule after it"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain, unquantized, int8 = (
        ZImagePipeline(**load(**how))
        for how in ({}, {"quantization": "none"}, {"quantization": "int8"})
    )
    questions = make_questions(load_vocabulary(), args.prompts)
    same = check(plain, unquantized)
    print(f"off is bit-equal to the plain run: {'yes' if same else 'NO'}\n")
    results = []
    for steps in args.steps:
        rows = run(plain, int8, questions, steps, args)
        print_table(rows)
        results += rows
    report = {
        "benchmark": "lossy",
        "date": date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, 1 thread, CPU, float32, shared",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "guidance": args.guidance,
        "off_is_bit_equal": same,
        "results": results,
    }
    print(json.dumps(report))
    return 0 if same else 1


def load(**how: str) -> dict[str, Any]:
    return load_from_local_dir(CHECKPOINT, device="cpu", dtype=torch.float32, **how)


def check(plain: ZImagePipeline, unquantized: ZImagePipeline) -> bool:
    """Whether `cache=None` and `quantization="none"` give the bits of a call without them."""
    prompts = ["a red apple", "portrait of a smiling man with a red hat and a long blue beard"]
    common: dict[str, Any] = {"steps": 4, "guidance": 3.0}
    expected = denoise(plain, prompts, 0, **common)
    return torch.equal(denoise(plain, prompts, 0, cache=None, **common), expected) and torch.equal(
        denoise(unquantized, prompts, 0, **common), expected
    )


def denoise(
    pipeline: ZImagePipeline,
    prompts: Sequence[str],
    seed: int,
    *,
    steps: int,
    guidance: float,
    **cache: int | None,
) -> Tensor:
    """Latents of prompts, number i from seed `seed` + i."""
    return pipeline.denoise(
        pipeline.encode(prompts),
        height=SIZE,
        width=SIZE,
        num_inference_steps=steps,
        guidance_scale=guidance,
        negative_prompt_embeds=pipeline.encode([""] * len(prompts)),
        generators=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        **cache,
    )


def run(
    plain: ZImagePipeline,
    int8: ZImagePipeline,
    questions: Sequence[Question],
    steps: int,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """All ways of one schedule, batch by batch in turns; a row for each."""
    counts = {cache: sum(computed_steps([True] * steps, cache)) for cache in INTERVALS}
    ways = [Way("plain", plain, steps)]
    ways += [Way(f"cache {cache}", plain, steps, cache) for cache in INTERVALS]
    ways += [Way(f"{counts[cache]} steps instead", plain, counts[cache]) for cache in ALIKE]
    ways += [Way("int8 weights", int8, steps)]
    ways += [Way("int8 weights, cache 2", int8, steps, 2)]
    if args.ways is not None:
        ways = [way for way in ways if way.name in ("plain", *args.ways)]
    end = time.monotonic() + 60 * args.minutes
    made = 0
    for start in range(0, len(questions), BATCH):
        if time.monotonic() > end:
            break
        prompts = [question.prompt for question in questions[start : start + BATCH]]
        for way in ways:
            with blocks_counted(way.pipeline, lambda n, way=way: grow(way, n)):
                began = time.process_time()
                way.latents.append(
                    denoise(
                        way.pipeline,
                        prompts,
                        start,
                        steps=way.steps,
                        guidance=args.guidance,
                        cache=way.cache,
                    )
                )
                way.seconds += time.process_time() - began
        made += len(prompts)
        print(f"{steps} steps: {made} of {len(questions)} prompts", file=sys.stderr, flush=True)
    return [row(way, ways[0], questions[:made], steps) for way in ways]


def grow(way: Way, images: int) -> None:
    way.blocks += images


@contextmanager
def blocks_counted(pipeline: ZImagePipeline, count: Callable[[int], None]) -> Iterator[None]:
    """Call `count` with the images of every block that runs, refiners of noise included."""
    transformer = pipeline.transformer
    hooks = [
        block.register_forward_pre_hook(lambda _, arguments: count(len(arguments[0])))
        for block in (*transformer.noise_refiner, *transformer.layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def row(way: Way, reference: Way, questions: Sequence[Question], schedule: int) -> dict[str, Any]:
    found, expected = torch.cat(way.latents), torch.cat(reference.latents)
    score = score_pictures(questions, way.pictures)
    likeness: dict[str, Any] = {}
    if way is not reference:
        off = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        likeness = {
            **compare(way.pictures, reference.pictures),
            "latents_median": round(float(off.median()), 4),
            "latents_worst": round(float(off.max()), 4),
        }
    return {
        "schedule": schedule,
        "way": way.name,
        "prompts": len(questions),
        "cpu_seconds_per_image": round(way.seconds / len(questions), 3),
        "speedup": round(reference.seconds / way.seconds, 2),
        "blocks_skipped": round(1 - way.blocks / reference.blocks, 3),
        "attributes_found": score.overall,
        "attributes_asked": sum(score.asked.values()),
        "all_of_a_prompt": score.perfect,
        **likeness,
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]
    print(
        f"{first['schedule']} steps, guidance, {first['prompts']} prompts, "
        f"{first['attributes_asked']} attributes"
    )
    print(
        f"{'way':<22}{'CPU s/image':>12}{'speedup':>8}{'skipped':>8}{'found':>7}{'all of it':>10}"
        f"{'PSNR':>6}{'tenth':>6}{'worst':>6}{'SSIM':>7}{'latents':>8}{'worst':>7}"
    )
    for each in rows:
        line = (
            f"{each['way']:<22}{each['cpu_seconds_per_image']:>12.2f}{each['speedup']:>8.2f}"
            f"{each['blocks_skipped']:>8.1%}{each['attributes_found']:>7.3f}"
            f"{each['all_of_a_prompt']:>10}"
        )
        if "psnr_median" in each:
            line += (
                f"{each['psnr_median']:>6.1f}{each['psnr_10_percent']:>6.1f}"
                f"{each['psnr_worst']:>6.1f}{each['ssim_mean']:>7.4f}"
                f"{each['latents_median']:>8.4f}{each['latents_worst']:>7.4f}"
            )
        print(line)
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
