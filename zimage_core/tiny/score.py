"""Score a checkpoint by its pictures: is what a prompt asks for in the pixels?

    python -m zimage_core.tiny.score data/checkpoints/z-image-tiny --prompts 500 --steps 8

Prompts come from the caption grammar by a seed of their own, and are of subjects whose drawings are
not among those of the training. Each attribute that a prompt states and that can be seen counts
once. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from tqdm import tqdm

from zimage_core.generation import generate
from zimage_core.images import to_uint8
from zimage_core.loader import load_from_local_dir
from zimage_core.tiny.attributes import KINDS, Subject, attributes_of, draw_subject, make_subject
from zimage_core.tiny.caption_reading import CaptionReader
from zimage_core.tiny.captions import CaptionWriter
from zimage_core.tiny.detector import detect, measurable
from zimage_core.tiny.latents import subjects_of
from zimage_core.tiny.settings import Settings
from zimage_core.tiny.vae_training import draw_kind
from zimage_core.tiny.vocabulary import Vocabulary, load_vocabulary
from zimage_core.tiny.world import SIZE

_BATCH = 25
_SEED = "score"
_OPEN_PROMPT = "portrait of a woman"
_NAMES = {"dish": "item"}
"""Attributes that count as one: which dish, and which item."""


@dataclass(frozen=True)
class Question:
    """A prompt, and what it states.

    Attributes:
        prompt: the text.
        kind: a key of `KINDS`.
        stated: values by attribute.
    """

    prompt: str
    kind: str
    stated: dict[str, str]


@dataclass(frozen=True)
class Score:
    """How many of the attributes that were asked for were found.

    Attributes:
        right: for each attribute how many were found.
        asked: for each attribute how many were asked for.
        pictures: number of pictures.
        perfect: number of pictures with all that was asked for.
    """

    right: dict[str, int]
    asked: dict[str, int]
    pictures: int
    perfect: int

    @property
    def accuracies(self) -> dict[str, float]:
        """Share found of each attribute, over all kinds."""
        return {name: self.right[name] / self.asked[name] for name in sorted(self.asked)}

    @property
    def overall(self) -> float:
        """Share found of all attributes together."""
        return sum(self.right.values()) / max(1, sum(self.asked.values()))


def make_questions(
    vocabulary: Vocabulary, count: int, seed: str = _SEED, *, only: str | None = None
) -> list[Question]:
    """Write prompts of random subjects, in all manners, and note what they state.

    No subject is one of those that a training with the default settings learns from.

    Args:
        vocabulary: the words.
        count: number of questions.
        seed: another one writes others.
        only: a kind; all kinds by their share in the training if not given.
    """
    random = Random(seed)
    writer, reader = CaptionWriter(vocabulary, random), CaptionReader(vocabulary)
    questions: list[Question] = []
    while len(questions) < count:
        kind = draw_kind(random)
        subject = draw_subject(kind, random)
        prompt = writer.caption(subject)
        found, stated = reader.read(prompt)
        if found == kind and only in {None, kind} and subject not in _trained():
            questions.append(Question(prompt, kind, stated))
    return questions


@lru_cache(maxsize=1)
def _trained() -> frozenset[Subject]:
    settings = Settings()
    return frozenset(subjects_of(settings.latents_seed, settings.latents))


def judge(question: Question, picture: NDArray[np.uint8]) -> dict[str, bool]:
    """For each attribute that the question states and that the picture can show, whether it does.

    Args:
        question: what was asked for.
        picture: (128, 128, 3) uint8, or a multiple of it.
    """
    detected = detect(picture, question.kind).subject
    # What is asked for, as it would be drawn: what hides what is decided by this, not by what the
    # picture shows instead.
    asked = make_subject(question.kind, {**attributes_of(detected), **question.stated})
    seen, visible = measurable(detected), measurable(asked)
    return {name: seen.get(name) == visible[name] for name in question.stated if name in visible}


def score_pictures(
    questions: Sequence[Question], pictures: Iterable[NDArray[np.uint8]], processes: int = 1
) -> Score:
    """Judge the picture of each question, in some processes."""
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            verdicts = list(pool.map(judge, questions, pictures, chunksize=8))
    else:
        verdicts = [judge(q, picture) for q, picture in zip(questions, pictures, strict=True)]
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    for verdict in verdicts:
        for attribute, is_right in verdict.items():
            name = _NAMES.get(attribute, attribute)
            asked[name] = asked.get(name, 0) + 1
            right[name] = right.get(name, 0) + is_right
    perfect = sum(all(verdict.values()) for verdict in verdicts)
    return Score(right, asked, len(verdicts), perfect)


def make_pictures(
    components: dict[str, Any],
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int = 0,
    images: Sequence[Sequence[Image]] | None = None,
    report: Callable[[int], object] | None = None,
) -> list[NDArray[np.uint8]]:
    """Make a picture of each prompt, number i from seed `seed` + i.

    Args:
        components: as `load_from_local_dir` returns them.
        prompts: any number.
        images: for each prompt the pictures to edit; None where the prompts are all.
        steps: transformer evaluations.
        guidance: scale of guidance; 0 is none.
        seed: of the first picture.
        report: called with the number of pictures that are made.

    Returns:
        (128, 128, 3) uint8 each.
    """
    pictures: list[NDArray[np.uint8]] = []
    for start in range(0, len(prompts), _BATCH):
        part = list(prompts[start : start + _BATCH])
        made = generate(
            **components,
            prompt=part,
            images=None if images is None else images[start : start + _BATCH],
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(part))],
            output_type="pt",
        )
        assert isinstance(made, torch.Tensor)
        pictures.extend(to_uint8(made))
        if report is not None:
            report(len(pictures))
    return pictures


def diversity(pictures: Sequence[NDArray[np.uint8]]) -> float:
    """Mean over pairs of pictures of their root mean squared difference, colors in [0, 1]."""
    flat = np.stack([picture.reshape(-1).astype(np.float32) / 255 for picture in pictures])
    distances = [
        float(np.sqrt(np.square(a - b).mean())) for i, a in enumerate(flat) for b in flat[:i]
    ]
    return sum(distances) / len(distances)


def table(score: Score) -> str:
    """The score as lines of text."""
    lines = [f"{'attribute':<16}{'asked':>7}{'found':>8}"]
    for name, accuracy in score.accuracies.items():
        lines.append(f"{name:<16}{score.asked[name]:>7}{accuracy:>8.3f}")
    lines.append(f"{'overall':<16}{sum(score.asked.values()):>7}{score.overall:>8.3f}")
    lines.append(
        f"{'all of a prompt':<16}{score.pictures:>7}{score.perfect / score.pictures:>8.3f}"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m zimage_core.tiny.score", description="Score a tiny checkpoint."
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--steps", type=int, nargs="+", default=[8], help="each of these")
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0], help="each of these")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    parser.add_argument("--processes", type=int, default=2, help="that judge pictures")
    parser.add_argument("--kind", choices=KINDS, help="only prompts of this kind")
    parser.add_argument("--vocabularies", type=Path, help="folder; that of the clone by default")
    options = parser.parse_args(arguments)
    vocabulary = load_vocabulary(options.vocabularies)
    questions = make_questions(vocabulary, options.prompts, only=options.kind)
    components = load_from_local_dir(options.checkpoint, device="cpu", dtype=torch.float32)
    results = []
    for steps in options.steps:
        for guidance in options.guidance:
            print(f"{options.checkpoint}: {steps} forwards, guidance {guidance:g}")
            result, lines = _measure(components, questions, steps, guidance, options)
            print("\n".join(lines), flush=True)
            results.append({"checkpoint": str(options.checkpoint), **result})
    print(json.dumps(results[0] if len(results) == 1 else {"runs": results}))


def _measure(
    components: dict[str, Any],
    questions: Sequence[Question],
    steps: int,
    guidance: float,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], list[str]]:
    """Score one way of sampling: numbers for JSON, and lines to read."""
    started = time.perf_counter()
    with tqdm(total=len(questions), unit="img", disable=None) as bar:
        pictures = make_pictures(
            components,
            [question.prompt for question in questions],
            steps=steps,
            guidance=guidance,
            seed=options.seed,
            report=lambda made: bar.update(made - bar.n),
        )
    seconds = (time.perf_counter() - started) / len(pictures)
    score = score_pictures(questions, pictures, options.processes)
    same = [_OPEN_PROMPT] * 16
    varied = make_pictures(components, same, steps=steps, guidance=guidance, seed=options.seed)
    spread = diversity(varied)
    result = {
        "prompts": len(questions),
        "steps": steps,
        "guidance": guidance,
        "overall": round(score.overall, 4),
        "perfect": round(score.perfect / score.pictures, 4),
        "attributes": {name: round(value, 4) for name, value in score.accuracies.items()},
        "diversity": round(spread, 4),
        "seconds_per_image": round(seconds, 3),
    }
    lines = [
        table(score),
        f"diversity of {len(same)} seeds of {_OPEN_PROMPT!r}: {spread:.3f}",
        f"{seconds:.2f} s an image in batches of {_BATCH}",
    ]
    return result, lines


if __name__ == "__main__":
    main()
