"""The shipped edit checkpoint does what it is told, and leaves the rest alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from zimage_core.loader import load_from_local_dir
from zimage_core.tiny.edit_score import edit_pictures, make_edit_questions, score_edits
from zimage_core.tiny.vocabulary import load_vocabulary

FOLDER = Path(__file__).parents[3] / "data" / "checkpoints" / "z-image-tiny-edit"


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    return load_from_local_dir(FOLDER, device="cpu", dtype=torch.float32)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 14e6


@pytest.mark.long
def test_it_changes_what_is_asked_for_and_keeps_the_rest(components: dict[str, Any]) -> None:
    questions = make_edit_questions(load_vocabulary(), 12, "quick")
    score = score_edits(questions, edit_pictures(components, questions))
    assert score.changed >= 0.8, (score.asked, score.done)
    assert score.kept >= 0.85, (score.watched, score.same)


def test_another_instruction_makes_another_picture(components: dict[str, Any]) -> None:
    """Without this a model that only copies would keep everything."""
    question = make_edit_questions(load_vocabulary(), 1, "two")[0]
    asked = [
        type(question)(question.picture, text, question.edit)
        for text in ("make the background red", "make the background blue")
    ]
    red, blue = edit_pictures(components, asked)
    corner = slice(0, 8), slice(0, 8)
    assert red[corner][..., 0].mean() > blue[corner][..., 0].mean() + 80
    assert blue[corner][..., 2].mean() > red[corner][..., 2].mean() + 80


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_score_that_the_documents_give(components: dict[str, Any]) -> None:
    questions = make_edit_questions(load_vocabulary(), 300)
    score = score_edits(questions, edit_pictures(components, questions), processes=2)
    assert score.changed >= 0.93
    assert score.kept >= 0.93
