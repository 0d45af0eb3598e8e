import copy
import dataclasses
import datetime
import pickle
from pathlib import Path

import pytest

from prompt_generators import ProfileError, Prompt, PromptGenerator, generator_length, prompt_at


def test_fields_are_exactly_these_in_this_order():
    names = [field.name for field in dataclasses.fields(Prompt)]
    assert names == [
        *("text", "negative_text", "seed", "width", "height", "images", "loras", "metadata")
    ]


def test_prompt_pickles_copies_and_cannot_be_changed():
    prompt = Prompt(
        "a", "b", 3, 64, 32, ["x.png", Path("y/z.png")], ("ink",), {"age": 3, "d": None}
    )
    assert pickle.loads(pickle.dumps(prompt)) == prompt
    assert copy.deepcopy(prompt) == prompt
    assert dataclasses.asdict(prompt)["metadata"] == {"age": 3, "d": None}
    assert prompt.images == ("x.png", "y/z.png")
    with pytest.raises(dataclasses.FrozenInstanceError):
        prompt.text = "c"
    with pytest.raises(TypeError):
        prompt.metadata["age"] = 4


def test_metadata_does_not_follow_its_source():
    source = {"a": 1}
    prompt = Prompt("x", metadata=source)
    source["a"] = 2
    assert prompt.metadata == {"a": 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"text": " \n"},
        {"text": None},
        {"negative_text": 3},
        {"seed": -1},
        {"seed": True},
        {"seed": 1.0},
        {"seed": 2**63},
        {"width": 0},
        {"height": "512"},
        {"images": "a.png"},
        {"images": ["a.png", ""]},
        {"images": ["half an emoji \ud83d.png"]},
        {"loras": [3]},
        {"metadata": {"a": [1]}},
        {"metadata": {"a": float("nan")}},
        {"metadata": {"a": 2**63}},
        {"metadata": {3: "a"}},
        {"metadata": [("a", 1)]},
    ],
)
def test_wrong_fields_are_named(fields):
    name = next(iter(fields))
    with pytest.raises(ValueError, match=f"Prompt.{name}"):
        Prompt(**{"text": "fine", **fields})


def test_metadata_takes_every_flat_scalar():
    values = {
        "s": "x",
        "i": 1,
        "f": 0.5,
        "b": True,
        "n": None,
        "t": datetime.datetime(2026, 1, 2, 3),
        "d": datetime.date(2026, 1, 2),
    }
    kept = Prompt("x", metadata=values).metadata
    assert {key: (type(value), value) for key, value in kept.items()} == {
        key: (type(value), value) for key, value in values.items()
    }


class Absent:
    def generate_prompt(self, index):
        return f"prompt {index}"


class SaysNone(Absent):
    def __len__(self):
        return None


class IsNone(Absent):
    __len__ = None


class Three(Absent):
    def __len__(self):
        return 3


class Negative(Absent):
    def __len__(self):
        return -1


def test_length_is_none_where_endless():
    assert [generator_length(kind()) for kind in (Absent, SaysNone, IsNone, Three)] == [
        *(None, None, None, 3)
    ]
    with pytest.raises(ValueError, match=r"Negative\.__len__"):
        generator_length(Negative())


def test_prompt_at_takes_text_and_refuses_other_things():
    assert isinstance(Absent(), PromptGenerator)
    assert prompt_at(Absent(), 4) == Prompt("prompt 4")

    class Wrong:
        def generate_prompt(self, index):
            return None

    with pytest.raises(
        ValueError, match=r"Wrong\.generate_prompt\(7\) must give a Prompt or a str"
    ):
        prompt_at(Wrong(), 7)


def test_profile_error_says_everything_and_survives_a_process_boundary():
    error = ProfileError(
        "bad", path="t.xlsx", sheet="s", row=3, column="age", value=12, allowed="18 to 120"
    )
    for shown in (error, pickle.loads(pickle.dumps(error))):
        assert (
            str(shown) == "t.xlsx, sheet 's', row 3, column 'age': bad, got 12 (allowed: 18 to 120)"
        )
        assert (shown.row, shown.column, shown.value) == (3, "age", 12)
