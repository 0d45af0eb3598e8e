"""The shipped checkpoint through the whole runner: avatars show what their profile rows ask for.

One job on Ray with two workers, as `make demo` runs it. Its first 24 pictures are the ones at the
top of the README, and stay so on any CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from job_runs import ROOT, read_rows
from perceptual import color_distance, difference_hash, hash_distance
from PIL import Image

from zimage_core.tiny.caption_reading import CaptionReader
from zimage_core.tiny.score import Question, judge, score_pictures
from zimage_core.tiny.vocabulary import load_vocabulary

pytestmark = [pytest.mark.ray, pytest.mark.long]

PINNED = Path(__file__).with_name("avatar_hashes.json")
SHEET = ROOT / "docs/images/avatars.webp"
COLUMNS, SIZE, GAP = 8, 128, 4

# Last bits of float32 differ between CPUs and builds of torch, and eight steps hardly amplify them.
HASH_BITS = 4
COLOR_DISTANCE = 0.02

# For each column of the table: the attribute, and the words that mean its values.
OF_COLUMN = {
    "hair_color": ("hair_color", "avatars.hair_color"),
    "skin_tone": ("skin", "avatars.skin"),
    "eye_color": ("eyes", "avatars.eyes"),
    "expression": ("expression", "avatars.expression"),
    "clothes_color": ("clothes_color", "colors"),
    "gender": ("gender", "avatars.gender"),
}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    output = tmp_path_factory.mktemp("avatars") / "out"
    job = ["jobs/avatars.yaml", "--config", "configs/z-image-tiny.yaml", "--count", "32"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "run", *job, "--workers", "2", "--output", str(output)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@pytest.fixture(scope="module")
def rows(output):
    return sorted(read_rows(output), key=lambda row: row["index"])


@pytest.fixture(scope="module")
def pictures(output, rows):
    return [Image.open(output / row["file_name"]).convert("RGB") for row in rows]


@pytest.fixture(scope="module")
def questions(rows):
    reader = CaptionReader(load_vocabulary())
    asked = []
    for row in rows:
        kind, stated = reader.read(row["prompt"])
        asked.append(Question(row["prompt"], kind, stated))
    return asked


def test_prompts_state_what_the_rows_say(rows, questions):
    vocabulary = load_vocabulary()
    compared = 0
    for row, question in zip(rows, questions, strict=True):
        assert question.kind == "avatars"
        for column, (attribute, table) in OF_COLUMN.items():
            word, stated = row[f"profile_{column}"], question.stated
            if word and attribute in stated:
                assert stated[attribute] == vocabulary.meanings(table)[word], (column, row)
                compared += 1
    assert compared > 60


def test_pictures_show_what_the_prompts_ask_for(pictures, questions):
    score = score_pictures(questions, [np.asarray(picture) for picture in pictures])
    assert sum(score.asked.values()) > 200
    assert score.overall >= 0.93, score.accuracies
    assert score.accuracies["background"] >= 0.95
    for attribute in ("hair_color", "clothes_color", "glasses"):
        assert score.accuracies[attribute] >= 0.9, attribute


def test_pictures_of_other_rows_do_not(pictures, questions):
    # The score can fall: it would not if it looked at anything but the pixels.
    shifted = [np.asarray(picture) for picture in pictures[1:] + pictures[:1]]
    right = [
        judge(question, picture)
        for question, picture in zip(questions[:8], shifted[:8], strict=True)
    ]
    found = [verdict for verdicts in right for verdict in verdicts.values()]
    assert sum(found) / len(found) < 0.7


def test_pictures_are_the_pinned_ones(pictures):
    pinned = json.loads(PINNED.read_text())
    assert len(pinned) == len(pictures)
    for i, (picture, expected) in enumerate(zip(pictures, pinned, strict=True)):
        distance = hash_distance(difference_hash(picture), int(expected, 16))
        assert distance <= HASH_BITS, f"picture {i}: {distance} of 64 bits"


def test_the_readme_shows_these_pictures(pictures):
    with Image.open(SHEET) as sheet:
        assert sheet.size == (COLUMNS * (SIZE + GAP) + GAP, 3 * (SIZE + GAP) + GAP)
        for i, picture in enumerate(pictures[:24]):
            down, across = divmod(i, COLUMNS)
            left, top = GAP + across * (SIZE + GAP), GAP + down * (SIZE + GAP)
            shown = sheet.crop((left, top, left + SIZE, top + SIZE))
            assert color_distance(shown, picture) <= COLOR_DISTANCE, i
            assert hash_distance(difference_hash(shown), difference_hash(picture)) <= HASH_BITS, i
