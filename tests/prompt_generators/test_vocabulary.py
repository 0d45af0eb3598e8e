from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_generators.vocabulary import Draw, load_vocabulary, permute, stable_hash, with_article

NAMES = ["avatars", "food", "gaming"]


def test_hash_is_the_same_everywhere():
    # Written down once: a change here changes every prompt ever drawn.
    assert stable_hash(0, "avatars", 7, "age") == 10464435750757425406
    assert stable_hash("ab", "c") != stable_hash("a", "bc")


@given(size=st.integers(1, 300), key=st.integers())
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_vocabulary_is_well_formed(name):
    vocabulary = load_vocabulary(name)
    for values in vocabulary.attributes.values():
        assert all(isinstance(weight, int) and weight > 0 for weight in values.values())
    for phrases in vocabulary.slots.values():
        # Two equal phrases, or a comma in one, would let two combinations read alike.
        assert len(set(phrases)) == len(phrases)
        assert not any("," in phrase for phrase in phrases)
    assert not any(" of " in phrase for phrase in vocabulary.slots["framing"])
    assert vocabulary.combinations >= 50_000
    things = vocabulary.attributes.get("dish") or vocabulary.attributes.get("item") or {}
    assert set(things) == set(vocabulary.things)


def test_draws_follow_the_weights():
    draws = [Draw(load_vocabulary("avatars"), 0, "x", i) for i in range(4000)]
    counts = Counter(draw.weighted("a", {"rare": 1, "none": 3, "often": 6}) for draw in draws)
    assert set(counts) == {"rare", "", "often"}
    # Standard deviations are 19, 29 and 31.
    assert abs(counts["rare"] - 400) < 100
    assert abs(counts[""] - 1200) < 150
    assert {draw.number("n", 3, 5) for draw in draws} == {3, 4, 5}


def test_attributes_are_drawn_independently():
    draws = [Draw(load_vocabulary("avatars"), 0, "x", i) for i in range(2000)]
    same = sum(draw.one_of("a", "01") == draw.one_of("b", "01") for draw in draws)
    assert abs(same - 1000) < 115  # five standard deviations


def test_slots_differ_over_consecutive_indices_wherever_these_begin():
    vocabulary = load_vocabulary("food")
    size = vocabulary.combinations

    def combinations(indices):
        return [tuple(Draw(vocabulary, 0, "food", i).slots().values()) for i in indices]

    for start in (0, 12_345, size - 1500):
        assert len(set(combinations(range(start, start + 3000)))) == 3000


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("18-year-old man", "an 18-year-old man"),
        ("80-year-old man", "an 80-year-old man"),
        ("108-year-old man", "a 108-year-old man"),
        ("11-year lease", "an 11-year lease"),
        ("orange cap", "an orange cap"),
        ("uniform", "a uniform"),
        ("hourglass", "an hourglass"),
        ("headphones", "headphones"),
        ("round glasses", "round glasses"),
        ("blue dress", "a blue dress"),
        ("the crown", "the crown"),
    ],
)
def test_articles(phrase, expected):
    assert with_article(phrase) == expected
