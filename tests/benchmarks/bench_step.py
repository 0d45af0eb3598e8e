"""Denoising against diffusers on the same weights, in one process, alternately.

Two regimes matter: one image, where the cost is that of the operators themselves, and a batch
with guidance whose captions differ in length, where diffusers masks its attention. Weights are
random, float32, on the CPU: ratios say nothing about a GPU, where other limits rule.

Checks first that both give the same latents (1e-5 relative). Prints a table and, as the last
line, one JSON object.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import diffusers
import torch

from zimage_core import generate, load_from_local_dir
from zimage_core.tiny.make import make_checkpoint

SIZES = {
    "dim": 384,
    "layers": 8,
    "heads": 6,
    "refiners": 2,
    "axes_dims": (16, 24, 24),
    "text_dim": 128,
    "text_layers": 3,
}
SHORT = "a red apple on a plate"
LONG = " ".join(["a portrait of a smiling woman with curly hair and round glasses"] * 4)
CASES = {
    "256 px, 1 image": ([SHORT], 256, 0.0),
    "512 px, 1 image": ([SHORT], 512, 0.0),
    "256 px, 4 images, guidance, mixed lengths": ([SHORT, LONG, SHORT, LONG], 256, 3.0),
}
STEPS, ROUNDS = 4, 7


def main() -> int:
    """Run all cases; exit code 1 where outputs differ."""
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder) / "model", seed=0, dtype=torch.float32, **SIZES)
        ours = load_from_local_dir(path, device="cpu", dtype=torch.float32)
        theirs = diffusers.ZImagePipeline.from_pretrained(path, torch_dtype=torch.float32)
        theirs.set_progress_bar_config(disable=True)
        for name, (prompts, size, guidance) in CASES.items():
            result = run_case(ours, theirs, prompts, size, guidance)
            results.append({"case": name, **result})
    print(f"{'case':<44} {'ours s':>8} {'diffusers s':>12} {'ratio':>6} {'max rel diff':>13}")
    for row in results:
        print(
            f"{row['case']:<44} {row['ours_s']:>8.3f} {row['diffusers_s']:>12.3f} "
            f"{row['ratio']:>6.2f} {row['difference']:>13.1e}"
        )
    report = {
        "benchmark": "step",
        "date": date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, 1 thread, CPU, float32",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "steps": STEPS,
        "rounds": ROUNDS,
        "results": results,
    }
    print(json.dumps(report))
    return 0 if all(row["difference"] <= 1e-5 for row in results) else 1


def run_case(ours, theirs, prompts: list[str], size: int, guidance: float) -> dict[str, float]:
    """Median seconds of both over alternating rounds, text encoding included."""
    common = {
        "height": size,
        "width": size,
        "num_inference_steps": STEPS,
        "guidance_scale": guidance,
        "output_type": "latent",
    }

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(len(prompts))]

    def run_ours() -> torch.Tensor:
        return generate(**ours, prompt=list(prompts), generator=generators(), **common)

    def run_theirs() -> torch.Tensor:
        return theirs(prompt=list(prompts), generator=generators(), **common).images

    expected, found = run_theirs(), run_ours()
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(ROUNDS):
        times["ours"].append(timed(run_ours))
        times["theirs"].append(timed(run_theirs))
    mine, other = statistics.median(times["ours"]), statistics.median(times["theirs"])
    return {
        "ours_s": round(mine, 4),
        "diffusers_s": round(other, 4),
        "ratio": round(other / mine, 3),
        "difference": difference,
    }


def timed(function: Callable[[], object]) -> float:
    """CPU seconds of one call, which a busy neighbour does not change as wall time."""
    started = time.process_time()
    function()
    return time.process_time() - started


if __name__ == "__main__":
    sys.exit(main())
