"""Drawings: pure functions of attributes, each value of which shows."""

from itertools import combinations
from random import Random

import numpy as np
import pytest

from zimage_core.tiny.attributes import (
    DISH_COLORS,
    KINDS,
    NONE,
    VALUES,
    attributes_of,
    draw_subject,
    kind_of,
    make_subject,
    with_values,
)
from zimage_core.tiny.canvas import Canvas, Jitter
from zimage_core.tiny.world import draw_array, draw_jitter

BASE = {
    "avatars": {
        "background": "light blue",
        "gender": "person",
        "skin": "tan",
        "hair_style": "short",
        "hair_color": "brown",
        "eyes": "green",
        "glasses": "round",
        "hat": "headphones",
        "hat_color": "red",
        "beard": NONE,
        "expression": "neutral",
        "clothes": "sweater",
        "clothes_color": "purple",
    },
    "food": {"background": "gray", "dish": "donut", "color": "pink", "plate": "blue"},
    "gaming": {"background": "navy", "item": "heart", "color": "red", "effect": NONE},
}


def test_same_subject_and_jitter_give_the_same_pixels():
    random = Random(3)
    for kind in KINDS:
        subject, jitter = draw_subject(kind, random), draw_jitter(random)
        first = draw_array(subject, jitter)
        assert first.shape == (128, 128, 3)
        assert first.dtype == np.uint8
        assert np.array_equal(first, draw_array(subject, jitter))
        assert not np.array_equal(first, draw_array(subject, draw_jitter(random)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_looks_different_from_the_others(kind):
    base = make_subject(kind, BASE[kind])
    for attribute, values in VALUES[kind].items():
        if kind == "food" and attribute == "color":
            values = DISH_COLORS["donut"]
        if attribute == "hat_color":
            values = values[1:]
        pictures = {
            value: draw_array(with_values(base, **{attribute: value})).astype(float)
            for value in values
        }
        for a, b in combinations(values, 2):
            changed = np.abs(pictures[a] - pictures[b]).max(axis=2) > 40
            # Lashes and eyes are the smallest things that differ.
            assert changed.sum() >= (20 if attribute in {"gender", "eyes"} else 60), (a, b)


def test_random_subjects_use_every_value_and_keep_the_rules():
    random = Random(0)
    for kind in KINDS:
        subjects = [draw_subject(kind, random) for _ in range(1500)]
        for attribute, values in VALUES[kind].items():
            if (kind, attribute) == ("food", "color"):
                values = {color for colors in DISH_COLORS.values() for color in colors}
            assert {attributes_of(s)[attribute] for s in subjects} == set(values), attribute
        for subject in subjects:
            assert kind_of(subject) == kind
            values = attributes_of(subject)
            if kind == "avatars":
                assert (values["hat"] == NONE) == (values["hat_color"] == NONE)
                assert values["beard"] == NONE or values["gender"] != "woman"
            if kind == "food":
                assert values["color"] in DISH_COLORS[values["dish"]]
                assert values["plate"] != NONE or values["dish"] not in {"soup", "ramen"}


def test_dependent_values_are_made_to_fit():
    base = make_subject("avatars", BASE["avatars"])
    assert with_values(base, hat=NONE).hat_color == NONE
    assert with_values(with_values(base, hat=NONE), hat="crown").hat_color == "yellow"
    donut = make_subject("food", BASE["food"])
    assert with_values(donut, dish="pizza").color == NONE
    assert with_values(donut, dish="soup", plate=NONE).plate == "white"


def test_values_that_are_not_drawn_are_refused():
    with pytest.raises(ValueError, match="skin is 'plaid'; allowed: light, tan"):
        make_subject("avatars", {**BASE["avatars"], "skin": "plaid"})
    with pytest.raises(TypeError):
        make_subject("gaming", {"item": "sword"})


def test_jitter_shifts_shapes_and_tints_all():
    subject = make_subject("gaming", {**BASE["gaming"], "background": "gray"})
    plain, moved = draw_array(subject), draw_array(subject, Jitter(dx=4.0, dy=-3.0))
    assert np.array_equal(plain[10:100, 10:110], moved[7:97, 14:114])
    assert np.array_equal(plain[0], moved[0])
    tinted = draw_array(subject, Jitter(tint=(5, 0, -5))).astype(int) - plain
    assert tinted[0, 0].tolist() == [5, 0, -5]


def test_edges_are_smooth_and_sizes_free():
    subject = make_subject("gaming", BASE["gaming"])
    assert len(np.unique(draw_array(subject).reshape(-1, 3), axis=0)) > 30
    small = draw_array(subject, size=64, supersampling=2)
    halved = draw_array(subject).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - halved).mean() < 2


def test_boxes_without_inside_are_refused():
    with pytest.raises(ValueError, match="has no inside"):
        Canvas(64, 2, Jitter()).box(10, 10, 5, 20, (0, 0, 0))
