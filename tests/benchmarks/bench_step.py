"""The transformer and the whole denoising against diffusers, on the same weights, alternately.

Weights are random, float32, on the CPU with one thread: ratios say nothing about a GPU, where other
limits rule. What carries over is counted: operators of a step, those that the host waits for, and
breaks in the graph that `torch.compile` makes of it.

Checks first that both give the same numbers (1e-5 relative). Prints tables and, as the last line,
one JSON object.

    python tests/benchmarks/bench_step.py [--rounds 7]
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zimage_core import generate, load_from_local_dir
from zimage_core.patchify import patchify, unpatchify
from zimage_core.tiny.make import make_checkpoint

SHARED = {"refiners": 2, "text_dim": 128, "text_layers": 3}
SIZES = {
    "dim 384, 8 blocks": {"dim": 384, "layers": 8, "heads": 6, "axes_dims": (16, 24, 24)},
    "dim 768, 12 blocks": {"dim": 768, "layers": 12, "heads": 6, "axes_dims": (32, 48, 48)},
}
SHORT = "a red apple on a plate"
LONG = " ".join(["a portrait of a smiling woman with curly hair and round glasses"] * 4)
WAITING = ("_local_scalar_dense", "nonzero", "item", "masked_select", "is_nonzero")


class Case(NamedTuple):
    size: str
    pixels: int
    prompts: list[str]
    guidance: float = 0.0
    steps: int = 4

    @property
    def name(self) -> str:
        what = f"{self.size}, {self.pixels} px, {len(self.prompts)} image(s)"
        return what + (", guidance, two lengths" if self.guidance else "")


SMALL, LARGE = SIZES
CASES = [
    Case(SMALL, 256, [SHORT]),
    Case(SMALL, 512, [SHORT]),
    Case(SMALL, 256, [SHORT] * 4),
    Case(SMALL, 256, [SHORT, LONG, SHORT, LONG], 3.0),
    Case(LARGE, 256, [SHORT], steps=2),
]


def main() -> int:
    """Run all cases; exit code 1 where outputs differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for size, shape in SIZES.items():
            path = make_checkpoint(
                Path(folder) / str(shape["dim"]), seed=0, dtype=torch.float32, **SHARED, **shape
            )
            ours = load_from_local_dir(path, device="cpu", dtype=torch.float32)
            theirs = diffusers.ZImagePipeline.from_pretrained(path, torch_dtype=torch.float32)
            theirs.set_progress_bar_config(disable=True)
            for case in CASES:
                if case.size == size:
                    results += run_case(ours, theirs, case, rounds)
            if size == SMALL:
                counts = count(ours, theirs)
    print(f"{'case':<62} {'ours s':>8} {'diffusers s':>12} {'ratio':>6} {'difference':>11}")
    for row in results:
        print(
            f"{row['case']:<62} {row['ours_s']:>8.3f} {row['diffusers_s']:>12.3f} "
            f"{row['ratio']:>6.2f} {row['difference']:>11.1e}"
        )
    print(f"\n{'one step, ' + SMALL:<44} {'ours':>6} {'diffusers':>10} {'ratio':>6}")
    for name, (mine, other) in counts.items():
        ratio = f"{mine / other:.2f}" if other else "-"
        print(f"{name:<44} {mine:>6} {other:>10} {ratio:>6}")
    report = {
        "benchmark": "step",
        "date": date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, 1 thread, CPU, float32",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "rounds": rounds,
        "results": results,
        "counts": {name: {"ours": m, "diffusers": o} for name, (m, o) in counts.items()},
    }
    print(json.dumps(report))
    return 0 if all(row["difference"] <= 1e-5 for row in results) else 1


def run_case(ours: Any, theirs: Any, case: Case, rounds: int) -> list[dict[str, Any]]:
    """Median CPU seconds over alternating rounds: denoising, text included, and one forward."""
    common = {
        "height": case.pixels,
        "width": case.pixels,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance,
        "output_type": "latent",
    }

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(len(case.prompts))]

    def denoise_ours() -> Tensor:
        return generate(**ours, prompt=list(case.prompts), generator=generators(), **common)

    def denoise_theirs() -> Tensor:
        return theirs(prompt=list(case.prompts), generator=generators(), **common).images

    rows = [compare(f"{case.name}: {case.steps} steps", denoise_ours, denoise_theirs, rounds)]
    if not case.guidance:
        mine, other = forwards(ours, theirs, case.pixels, len(case.prompts))
        rows.append(compare(f"{case.name}: forward", mine, other, rounds))
    return rows


def forwards(
    ours: Any, theirs: Any, pixels: int, batch: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """One evaluation of the transformer as each pipeline's loop calls it."""
    model, other, size = ours["transformer"], theirs.transformer, pixels // 8
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, model.in_channels, size, size, generator=draw)
    captions = [torch.randn(40, model.config.cap_feat_dim, generator=draw)] * batch
    time = torch.tensor([0.3])
    frames = list(latents.unsqueeze(2).unbind(0))
    with torch.no_grad():
        context = model.condition(model.embed_captions(captions), size, size)
        (modulation,) = model.modulations(time)
        patches = patchify(latents, model.patch_size)

    @torch.no_grad()
    def mine() -> Tensor:
        return unpatchify(model.predict(patches, modulation, context), model.patch_size, size, size)

    @torch.no_grad()
    def others() -> Tensor:
        out = other(frames, time.expand(batch), captions, return_dict=False)[0]
        return torch.stack(out).squeeze(2)

    return mine, others


def compare(
    name: str, mine: Callable[[], Tensor], other: Callable[[], Tensor], rounds: int
) -> dict[str, Any]:
    expected, found = other(), mine()
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        times["ours"].append(timed(mine))
        times["theirs"].append(timed(other))
    ours_s, theirs_s = statistics.median(times["ours"]), statistics.median(times["theirs"])
    return {
        "case": name,
        "ours_s": round(ours_s, 4),
        "diffusers_s": round(theirs_s, 4),
        "ratio": round(theirs_s / ours_s, 3),
        "difference": difference,
    }


class Operators(TorchDispatchMode):
    """Counts operators below those that are made of others."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count(ours: Any, theirs: Any) -> dict[str, tuple[int, int]]:
    """What one step makes PyTorch do: ours, diffusers'."""
    found: list[list[int]] = []
    for function in forwards(ours, theirs, 256, 1):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            function()
        events = sum(event.name.startswith("aten::") for event in profile.events())
        with Operators() as operators:
            function()
        names = operators.names
        breaks = torch._dynamo.explain(function)().graph_break_count
        torch._dynamo.reset()
        found.append([events, names.total(), sum(names[name] for name in WAITING), breaks])
    names = (
        "aten operators, the profiler's count",
        "aten operators that are not made of others",
        "of them such as the host waits for",
        "graph breaks",
    )
    return {name: (mine, other) for name, mine, other in zip(names, *found, strict=True)}


def timed(function: Callable[[], object]) -> float:
    """CPU seconds of one call, which a busy neighbour does not change as wall time."""
    started = time.process_time()
    function()
    return time.process_time() - started


if __name__ == "__main__":
    sys.exit(main())
