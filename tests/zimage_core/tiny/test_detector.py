"""The detector is right about drawings whose attributes are known, or its scores mean nothing."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from zimage_core.tiny.attributes import KINDS, NONE, draw_subject, make_subject
from zimage_core.tiny.detector import detect, measurable
from zimage_core.tiny.world import draw_array, draw_jitter


def measure(kind, count, seed, spoil=lambda picture: picture):
    """Share of right answers for each attribute, on random drawings."""
    random = Random(seed)
    right, asked = Counter(), Counter()
    for _ in range(count):
        subject = draw_subject(kind, random)
        seen = measurable(detect(spoil(draw_array(subject, draw_jitter(random))), kind).subject)
        for name, value in measurable(subject).items():
            asked[name] += 1
            right[name] += seen.get(name) == value
    return {name: right[name] / asked[name] for name in asked}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"),
    [("avatars", 40), ("food", 80), ("gaming", 80)],
)
def test_attributes_of_drawings_are_found(kind, count):
    # 97 % and more on many drawings: see the slow test. Here one in 40 may be wrong.
    accuracies = measure(kind, count, seed=11)
    assert min(accuracies.values()) >= 0.925, accuracies
    assert sum(accuracies.values()) / len(accuracies) >= 0.97, accuracies


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_attribute_is_found_in_97_of_100_drawings(kind):
    accuracies = measure(kind, 300, seed=12)
    assert min(accuracies.values()) >= 0.97, accuracies


@pytest.mark.long
def test_a_blurred_and_noisy_drawing_is_still_read():
    noise = np.random.default_rng(0)

    def spoil(picture):
        blurred = picture.astype(float)
        for axis in (0, 1):
            blurred = (np.roll(blurred, 1, axis) + 2 * blurred + np.roll(blurred, -1, axis)) / 4
        return (blurred + noise.normal(0, 6, picture.shape)).clip(0, 255).astype(np.uint8)

    for kind in ("food", "gaming"):
        accuracies = measure(kind, 25, seed=13, spoil=spoil)
        assert min(accuracies.values()) >= 0.9, accuracies


def test_what_is_not_there_is_not_found():
    """An empty background is no item with confidence: its distance is large."""
    subject = make_subject(
        "gaming", {"background": "white", "item": "gem", "color": "red", "effect": NONE}
    )
    there = detect(draw_array(subject), "gaming")
    empty = detect(np.full((128, 128, 3), 247, np.uint8), "gaming")
    assert there.subject == subject
    assert there.distance < 0.002 < 0.004 < empty.distance


def test_hidden_attributes_are_not_asked_for():
    random = Random(4)
    for _ in range(400):
        subject = draw_subject("avatars", random)
        names = measurable(subject)
        assert ("eyes" in names) == (subject.glasses != "sunglasses")
        covered = subject.hat in {"cap", "beanie", "top hat"}
        assert ("hair_style" in names) == (not covered)
        if subject.hair_style == "bald":
            assert "hair_color" not in names


def test_pictures_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(100, 100, 3\); allowed"):
        detect(np.zeros((100, 100, 3), np.uint8), "food")
