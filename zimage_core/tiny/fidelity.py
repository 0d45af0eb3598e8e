"""Compare the pictures of a tiny checkpoint with those it makes in float32, at the same seeds.

    python -m zimage_core.tiny.fidelity data/checkpoints/z-image-tiny --dtype bfloat16 \\
        --quantization int8 --prompts 200

Prompts are those of `score`. For each way: signal to noise and structural similarity of its
pictures to float32's, and how many of the attributes that were asked for they show. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from zimage_core.loader import load_from_local_dir
from zimage_core.quantization import QUANTIZATIONS
from zimage_core.tiny.make import DTYPES
from zimage_core.tiny.score import Question, make_pictures, make_questions, score_pictures
from zimage_core.tiny.vocabulary import load_vocabulary

Picture = NDArray[np.uint8]

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def psnr(a: Picture, b: Picture) -> float:
    """Peak signal to noise of two pictures (H, W, 3), in decibels; infinite where they are equal.

    Above 40 dB two pictures can hardly be told apart.
    """
    error = float(np.square(a.astype(np.float64) - b).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def ssim(a: Picture, b: Picture) -> float:
    """Mean structural similarity of two pictures (H, W, 3), the mean of their channels; 1 is equal.

    After Wang, Bovik, Sheikh and Simoncelli (2004), with their window: a Gaussian of deviation 1.5
    over 11 x 11 pixels. Both sides must be 11 or more.
    """
    x, y = (torch.from_numpy(p.astype(np.float64)).permute(2, 0, 1).unsqueeze(1) for p in (a, b))
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def mean(image: Tensor) -> Tensor:
        return F.conv2d(image, window)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float((luminance * structure).mean())


def compare(pictures: Sequence[Picture], reference: Sequence[Picture]) -> dict[str, float]:
    """Mean and worst similarity of pictures to those of a reference, in the same order."""
    pairs = list(zip(pictures, reference, strict=True))
    decibels = np.array([psnr(a, b) for a, b in pairs])
    similar = np.array([ssim(a, b) for a, b in pairs])
    return {
        "psnr_median": round(float(np.median(decibels)), 2),
        "psnr_10_percent": round(float(np.quantile(decibels, 0.1)), 2),
        "psnr_worst": round(float(decibels.min()), 2),
        "ssim_mean": round(float(similar.mean()), 4),
        "ssim_worst": round(float(similar.min()), 4),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m zimage_core.tiny.fidelity",
        description="Compare a tiny checkpoint's pictures with those in float32.",
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bfloat16"])
    parser.add_argument("--quantization", choices=QUANTIZATIONS, nargs="+", default=["none"])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    parser.add_argument("--processes", type=int, default=2, help="that judge pictures")
    parser.add_argument("--vocabularies", type=Path, help="folder; that of the clone by default")
    options = parser.parse_args(arguments)
    questions = make_questions(load_vocabulary(options.vocabularies), options.prompts)
    ways = [(dtype, how) for how in options.quantization for dtype in options.dtype]
    reference = _pictures(options, questions, "float32", "none")
    results = [
        {"dtype": "float32", "quantization": "none", **_score(options, questions, reference)}
    ]
    for dtype, quantization in ways:
        if (dtype, quantization) == ("float32", "none"):
            continue
        pictures = _pictures(options, questions, dtype, quantization)
        results.append(
            {
                "dtype": dtype,
                "quantization": quantization,
                **compare(pictures, reference),
                **_score(options, questions, pictures),
            }
        )
    for result in results:
        print(", ".join(f"{name} {value}" for name, value in result.items()))
    print(json.dumps({"prompts": len(questions), "steps": options.steps, "runs": results}))


def _pictures(
    options: argparse.Namespace, questions: Sequence[Question], dtype: str, quantization: str
) -> list[Picture]:
    components = load_from_local_dir(
        options.checkpoint, device="cpu", dtype=DTYPES[dtype], quantization=quantization
    )
    with tqdm(
        total=len(questions), unit="img", desc=f"{dtype} {quantization}", disable=None
    ) as bar:
        return make_pictures(
            components,
            [question.prompt for question in questions],
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed,
            report=lambda made: bar.update(made - bar.n),
        )


def _score(
    options: argparse.Namespace, questions: Sequence[Question], pictures: Sequence[Picture]
) -> dict[str, Any]:
    score = score_pictures(questions, pictures, options.processes)
    return {
        "attributes": round(score.overall, 4),
        "all_of_a_prompt": round(score.perfect / score.pictures, 4),
    }


if __name__ == "__main__":
    main()
