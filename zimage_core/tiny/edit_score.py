"""Score an edit checkpoint by its pictures: is what was asked for there, and all else as it was?

    python -m zimage_core.tiny.edit_score data/checkpoints/z-image-tiny-edit --pairs 300

Drawings are of subjects that no training with the default settings has seen, and instructions are
written by a seed of their own. What the detector finds in the result is compared with what the
instruction asks for (*changed*) and, attribute by attribute, with what the drawing shows that was
given (*kept*), where it can be seen before and after. The last line is JSON.
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
from PIL import Image
from tqdm import tqdm

from zimage_core.contact_sheet import contact_sheet
from zimage_core.loader import load_from_local_dir
from zimage_core.tiny.attributes import Subject, draw_subject, kind_of
from zimage_core.tiny.detector import detect, measurable
from zimage_core.tiny.edit_pairs import draw_group
from zimage_core.tiny.instructions import Edit, InstructionWriter, draw_edit
from zimage_core.tiny.latents import subjects_of
from zimage_core.tiny.score import make_pictures
from zimage_core.tiny.settings import Settings
from zimage_core.tiny.vae_training import draw_kind
from zimage_core.tiny.vocabulary import Vocabulary, load_vocabulary
from zimage_core.tiny.world import draw_array, draw_jitter

Pixels = NDArray[np.uint8]

TRAINED_GROUPS = 4000
TRAINED_SEED = "0/edit pairs"
_SEED = "edit score"


@dataclass(frozen=True)
class EditQuestion:
    """A drawing, an instruction, and what they mean.

    Attributes:
        picture: (128, 128, 3).
        instruction: the text.
        edit: the subject before and after.
    """

    picture: Pixels
    instruction: str
    edit: Edit


@dataclass(frozen=True)
class EditScore:
    """How often the asked thing was changed, and how much of the rest was kept.

    Attributes:
        asked: for each attribute that instructions change, how many asked for it.
        done: for each, how many of them show all that was asked for.
        watched: for each attribute that was to be kept, how many.
        same: for each, how many are as they were.
        perfect: pictures with the change and with all else as it was.
    """

    asked: dict[str, int]
    done: dict[str, int]
    watched: dict[str, int]
    same: dict[str, int]
    perfect: int

    @property
    def changed(self) -> float:
        """Share of the instructions that were followed."""
        return sum(self.done.values()) / max(1, sum(self.asked.values()))

    @property
    def kept(self) -> float:
        """Share of the other attributes that stayed."""
        return sum(self.same.values()) / max(1, sum(self.watched.values()))


def make_edit_questions(
    vocabulary: Vocabulary, count: int, seed: str = _SEED
) -> list[EditQuestion]:
    """Draw subjects, and ask for edits of them. None of the subjects is one of the training's."""
    random = Random(seed)
    writer = InstructionWriter(vocabulary, random)
    questions: list[EditQuestion] = []
    while len(questions) < count:
        subject = draw_subject(draw_kind(random), random)
        edit = draw_edit(subject, random)
        if {edit.before, edit.after} & _trained():
            continue
        picture = draw_array(subject, draw_jitter(random))
        questions.append(EditQuestion(picture, writer.instruction(edit), edit))
    return questions


@lru_cache(maxsize=1)
def _trained() -> frozenset[Subject]:
    settings = Settings()
    drawn = subjects_of(settings.latents_seed, settings.latents)
    groups = (draw_group(TRAINED_SEED, index) for index in range(TRAINED_GROUPS))
    return frozenset(drawn).union(*(group.subjects for group in groups))


def edit_pictures(
    components: dict[str, Any],
    questions: Sequence[EditQuestion],
    *,
    steps: int = 8,
    guidance: float = 0.0,
    seed: int = 0,
    report: Callable[[int], object] | None = None,
) -> list[Pixels]:
    """Make the edit of each question, number i from seed `seed` + i; (128, 128, 3) each."""
    return make_pictures(
        components,
        [question.instruction for question in questions],
        images=[[Image.fromarray(question.picture)] for question in questions],
        steps=steps,
        guidance=guidance,
        seed=seed,
        report=report,
    )


def judge_edit(question: EditQuestion, picture: Pixels) -> tuple[bool, dict[str, bool]]:
    """Whether the change is there, and for each attribute to be kept whether it is."""
    edit = question.edit
    found = measurable(detect(picture, kind_of(edit.after)).subject)
    changed = all(found.get(name) == value for name, value in edit.changed.items())
    return changed, {name: found.get(name) == value for name, value in edit.kept.items()}


def score_edits(
    questions: Sequence[EditQuestion], pictures: Iterable[Pixels], processes: int = 1
) -> EditScore:
    """Judge the picture of each question, in some processes."""
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            verdicts = list(pool.map(judge_edit, questions, pictures, chunksize=8))
    else:
        verdicts = [judge_edit(q, p) for q, p in zip(questions, pictures, strict=True)]
    score = EditScore({}, {}, {}, {}, sum(c and all(k.values()) for c, k in verdicts))
    for question, (changed, kept) in zip(questions, verdicts, strict=True):
        _count(score.asked, score.done, question.edit.attribute, changed)
        for name, same in kept.items():
            _count(score.watched, score.same, name, same)
    return score


def _count(of: dict[str, int], right: dict[str, int], name: str, is_right: bool) -> None:
    of[name] = of.get(name, 0) + 1
    right[name] = right.get(name, 0) + is_right


def table(score: EditScore) -> str:
    """The score as lines of text."""
    lines = [f"{'attribute':<16}{'asked':>7}{'changed':>9}{'to keep':>9}{'kept':>8}"]
    for name in sorted(score.asked | score.watched):
        line = f"{name:<16}"
        for of, right in ((score.asked, score.done), (score.watched, score.same)):
            share = f"{right[name] / of[name]:.3f}" if name in of else "-"
            line += (
                f"{of.get(name, 0):>7}{share:>9}"
                if of is score.asked
                else f"{of.get(name, 0):>9}{share:>8}"
            )
        lines.append(line)
    asked, watched = sum(score.asked.values()), sum(score.watched.values())
    lines.append(f"{'overall':<16}{asked:>7}{score.changed:>9.3f}{watched:>9}{score.kept:>8.3f}")
    lines.append(f"{'all of an edit':<16}{asked:>7}{score.perfect / asked:>9.3f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m zimage_core.tiny.edit_score", description="Score an edit checkpoint."
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    parser.add_argument("--processes", type=int, default=2, help="that judge pictures")
    parser.add_argument("--sheet", type=Path, help="file for the first 24 pairs, side by side")
    parser.add_argument("--vocabularies", type=Path, help="folder; that of the clone by default")
    options = parser.parse_args(arguments)
    questions = make_edit_questions(load_vocabulary(options.vocabularies), options.pairs)
    components = load_from_local_dir(options.checkpoint, device="cpu", dtype=torch.float32)
    started = time.perf_counter()
    with tqdm(total=len(questions), unit="img", disable=None) as bar:
        pictures = edit_pictures(
            components,
            questions,
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed,
            report=lambda made: bar.update(made - bar.n),
        )
    seconds = (time.perf_counter() - started) / len(pictures)
    score = score_edits(questions, pictures, options.processes)
    if options.sheet is not None:
        pairs = list(zip(questions, pictures, strict=True))[:24]
        sheet = [Image.fromarray(p) for q, made in pairs for p in (q.picture, made)]
        contact_sheet(sheet, 8).save(options.sheet)
        print("\n".join(question.instruction for question, _ in pairs))
    print(table(score))
    result = {
        "checkpoint": str(options.checkpoint),
        "pairs": len(questions),
        "steps": options.steps,
        "guidance": options.guidance,
        "changed": round(score.changed, 4),
        "kept": round(score.kept, 4),
        "perfect": round(score.perfect / len(questions), 4),
        "seconds_per_image": round(seconds, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
