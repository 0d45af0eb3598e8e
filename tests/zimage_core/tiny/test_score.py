"""Scores: full marks for what was asked for, none for something else."""

import json
from random import Random

import numpy as np
import pytest

from zimage_core.tiny.attributes import NONE, VALUES, attributes_of, make_subject
from zimage_core.tiny.caption_reading import CaptionReader
from zimage_core.tiny.make import make_checkpoint
from zimage_core.tiny.score import (
    Question,
    diversity,
    judge,
    main,
    make_questions,
    score_pictures,
    table,
)
from zimage_core.tiny.vocabulary import load_vocabulary
from zimage_core.tiny.world import draw_array, draw_jitter

VOCABULARY = load_vocabulary()


def answer(question, random, **changes):
    """A drawing with what the question states and anything else."""
    from zimage_core.tiny.attributes import draw_subject

    values = {**attributes_of(draw_subject(question.kind, random)), **question.stated, **changes}
    return draw_array(make_subject(question.kind, values), draw_jitter(random))


def test_questions_are_the_same_each_time_and_state_what_they_say():
    questions = make_questions(VOCABULARY, 60)
    assert questions == make_questions(VOCABULARY, 60)
    assert questions[:20] == make_questions(VOCABULARY, 20)
    assert questions != make_questions(VOCABULARY, 60, seed="other")
    assert {q.kind for q in questions} == set(VALUES)
    reader = CaptionReader(VOCABULARY)
    assert all(reader.read(q.prompt) == (q.kind, q.stated) for q in questions)


@pytest.mark.slow
def test_drawings_of_what_is_asked_for_get_full_marks():
    random = Random(1)
    questions = make_questions(VOCABULARY, 24)
    score = score_pictures(questions, [answer(q, random) for q in questions])
    assert score.overall >= 0.97
    assert score.pictures == 24
    assert score.asked["background"] > 5
    assert "dish" not in score.asked
    text = table(score)
    assert "overall" in text and "item" in text


def test_a_wrong_attribute_is_marked_wrong_and_others_are_not():
    stated = {"background": "red", "item": "gem", "color": "blue", "effect": "sparks"}
    question = Question("", "gaming", stated)
    random = Random(2)
    assert judge(question, answer(question, random)) == dict.fromkeys(stated, True)
    for attribute, value in (("background", "green"), ("item", "heart"), ("effect", NONE)):
        verdict = judge(question, answer(question, random, **{attribute: value}))
        assert verdict == {**dict.fromkeys(stated, True), attribute: False}


def test_what_cannot_be_seen_is_not_marked():
    question = Question("", "avatars", {"eyes": "blue", "glasses": "sunglasses", "hat": NONE})
    verdict = judge(question, answer(question, Random(3), hat_color=NONE))
    assert verdict == {"glasses": True, "hat": True}


def test_diversity_is_zero_for_copies():
    picture = np.full((8, 8, 3), 255, np.uint8)
    assert diversity([picture] * 3) == 0
    assert diversity([picture, 0 * picture]) == pytest.approx(1.0)


def test_command_line(tmp_path, capsys):
    folder = make_checkpoint(tmp_path / "a", vae_channels=(8, 8, 8, 8), layers=1)
    main([str(folder), "--prompts", "3", "--steps", "1", "--kind", "food", "--processes", "1"])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["prompts"] == 3
    assert result["steps"] == 1
    assert 0 <= result["overall"] <= 1
    assert set(result["attributes"]) <= {"background", "item", "color", "plate"}
    assert result["diversity"] > 0
    assert lines[0] == f"{folder}: 1 forwards, guidance 0"
    assert lines[1].split() == ["attribute", "asked", "found"]
    arguments = ["--prompts", "1", "--steps", "1", "2", "--guidance", "0", "1.5"]
    main([str(folder), *arguments, "--kind", "gaming", "--processes", "1"])
    runs = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert [(run["steps"], run["guidance"]) for run in runs] == [(1, 0), (1, 1.5), (2, 0), (2, 1.5)]
