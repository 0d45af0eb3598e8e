"""Encoding prompts against diffusers on the same weights, in one process, alternately.

A random Qwen3 of 12 narrow layers, float32, one thread. diffusers pads every prompt to 512 tokens,
encodes equal ones again, and runs the last layer, whose output is not used; it is called with 4
prompts at a time, which is quicker for it than 16 or all at once. Attention among padding weighs
more in narrow layers than in the published ones: `attention_share` says how much.

Checks that both give the same features (1e-5 relative) before any time is shown. Prints a table
and, as the last line, one JSON object.
"""

import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import diffusers
import torch
import transformers
from torch import Tensor

from jobs.text_features import TextFeatures
from zimage_core import ZImagePipeline, load_from_local_dir
from zimage_core.tiny.make import make_checkpoint

WIDTH, MLP, HEADS, HEAD_DIM = 96, 384, 2, 32
SIZES = {
    "text_dim": WIDTH,
    "text_layers": 12,
    "text_heads": HEADS,
    "text_kv_heads": 1,
    "text_head_dim": HEAD_DIM,
    "text_mlp": MLP,
    "layers": 1,
}
MAX_LENGTH, PEER_BATCH, JOB_BATCH, ROUNDS = 512, 4, 4, 2
WORDS = (
    *("red", "green", "small", "old", "young", "smiling", "apple", "portrait", "avatar", "woman"),
    *("castle", "dragon", "sword", "potion", "bowl", "noodles", "basil", "tomato", "light", "hat"),
)
STYLE = "square game icon, hand painted, thick outlines, soft rim light, plain background, of a"
NEGATIVE = "blurry, text, watermark, extra fingers"

Encode = Callable[[], list[Tensor]]


def main() -> int:
    """Run all cases; exit code 1 where features differ."""
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder) / "model", seed=0, dtype=torch.float32, **SIZES)
        ours = ZImagePipeline(**load_from_local_dir(path, device="cpu", dtype=torch.float32))
        theirs = diffusers.ZImagePipeline.from_pretrained(path, torch_dtype=torch.float32)
        as_a_job(ours, [STYLE])  # what only a first call does is no part of it
        of_diffusers(theirs, [STYLE], NEGATIVE)
        for name, prompts in cases().items():
            lengths = ours.caption_lengths(prompts)
            result = run_case(
                lambda prompts=prompts: ours.encode(prompts),
                lambda prompts=prompts: of_diffusers(theirs, prompts),
            )
            results.append({"case": name, "prompts": len(prompts), "tokens": sum(lengths)} | result)
            print(f"{name}: {min(lengths)} to {max(lengths)} tokens: {result}", file=sys.stderr)
        prompts = cases()["unique"][:64]
        result = run_case(
            lambda: as_a_job(ours, prompts), lambda: of_diffusers(theirs, prompts, NEGATIVE)
        )
        tokens = (
            sum(ours.caption_lengths(prompts)) + len(prompts) * ours.caption_lengths([NEGATIVE])[0]
        )
        name = f"batches of {JOB_BATCH}, one negative"
        results.append({"case": name, "prompts": 2 * len(prompts), "tokens": tokens} | result)
    print(
        f"{'case':<26} {'prompts':>7} {'tokens':>7} {'ours s':>7} {'diffusers s':>11} "
        f"{'ratio':>6} {'max rel diff':>12}"
    )
    for row in results:
        print(
            f"{row['case']:<26} {row['prompts']:>7} {row['tokens']:>7} {row['ours_s']:>7.2f} "
            f"{row['diffusers_s']:>11.2f} {row['ratio']:>6.1f} {row['difference']:>12.1e}"
        )
    report = {
        "benchmark": "prompts",
        "date": date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, 1 thread, CPU, float32",
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "sizes": SIZES,
        "attention_share": round(attention_share(), 3),
        "rounds": ROUNDS,
        "results": results,
    }
    print(json.dumps(report))
    return 0 if all(row["difference"] <= 1e-5 for row in results) else 1


def cases() -> dict[str, list[str]]:
    """256 prompts of some 20 to 80 tokens for three cases, 64 of up to 150 for the last."""
    rng = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    unique = [f"{i} {words(3, 32)}" for i in range(256)]
    half = unique[:128] * 2
    rng.shuffle(half)
    templated = [f"{STYLE} {words(3, 10)}, number {i}" for i in range(256)]
    longer = [f"{i} {words(5, 60)}" for i in range(64)]
    return {
        "unique": unique,
        "half are duplicates": half,
        "one template": templated,
        "unique, longer": longer,
    }


def of_diffusers(
    pipeline: diffusers.ZImagePipeline, prompts: list[str], negative: str | None = None
) -> list[Tensor]:
    """The features of prompts, and after them those of the negative prompt, one for each."""
    found, negatives = [], []
    with torch.no_grad():
        for start in range(0, len(prompts), PEER_BATCH):
            batch = prompts[start : start + PEER_BATCH]
            both = pipeline.encode_prompt(
                list(batch),  # it puts the template around the texts of the list that it is given
                device=torch.device("cpu"),
                do_classifier_free_guidance=negative is not None,
                negative_prompt=None if negative is None else [negative] * len(batch),
                max_sequence_length=MAX_LENGTH,
            )
            found += both[0]
            negatives += both[1]
    return found + negatives


def as_a_job(pipeline: ZImagePipeline, prompts: list[str]) -> list[Tensor]:
    """The same as a worker encodes them: batch by batch, in each with the negative prompt."""
    features = TextFeatures(pipeline, MAX_LENGTH)
    found, negatives = [], []
    for start in range(0, len(prompts), JOB_BATCH):
        batch = prompts[start : start + JOB_BATCH]
        found += features.encode(batch)
        negatives += features.encode([NEGATIVE] * len(batch))
    return found + negatives


def run_case(ours: Encode, theirs: Encode) -> dict[str, float]:
    """Median CPU seconds of both, and how far their features are apart."""
    times: dict[Encode, list[float]] = {ours: [], theirs: []}
    for _ in range(ROUNDS):
        features = []
        for encode, found in times.items():
            started = time.process_time()
            features.append(encode())
            found.append(time.process_time() - started)
    difference = apart(*features)
    mine, other = (statistics.median(found) for found in times.values())
    return {
        "ours_s": round(mine, 3),
        "diffusers_s": round(other, 3),
        "ratio": round(other / mine, 2),
        "difference": difference,
    }


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative difference of features; infinite where shapes differ."""
    if [f.shape for f in found] != [e.shape for e in expected]:
        return float("inf")
    pairs = zip(found, expected, strict=True)
    return max(((f - e).abs().max() / e.abs().max()).item() for f, e in pairs)


def attention_share() -> float:
    """Of a padded prompt's operations: scores and weighted sums, beside all products of weights."""
    attention = 4 * MAX_LENGTH * HEADS * HEAD_DIM
    weights = WIDTH * HEAD_DIM * (2 * HEADS + 2) + 3 * WIDTH * MLP
    return attention / (attention + 2 * weights)


if __name__ == "__main__":
    sys.exit(main())
