import re

import openpyxl
import pytest

from prompt_generators import ProfileError, make_generator


def make(tmp_path, columns, *rows, **options):
    """From an XLSX table, so that each cell has the type it has here."""
    book = openpyxl.Workbook()
    book.active.title = "people"
    for row in (columns, *rows):
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    return make_generator("avatars", profiles=tmp_path / "t.xlsx", options=options)


FULL = {
    "name": "Ana Dvořák",
    "age": 34,
    "gender": "female",
    "skin_tone": "warm brown",
    "hair_style": "curly",
    "hair_color": "black",
    "eye_color": "green",
    "glasses": "round",
    "hat": "red beanie",
    "beard": None,
    "expression": "neutral",
    "clothes": "sweater",
    "clothes_color": "orange",
    "background": "plain teal",
    "occupation": "nurse",
    "style": "flat illustration",
    "extra": "holding a cup of tea.",
}


def test_every_column_reaches_the_prompt_but_the_name(tmp_path):
    text = make(tmp_path, list(FULL), list(FULL.values())).generate_prompt(0).text
    assert (
        " of a nurse, a 34-year-old woman with warm brown skin, curly black hair and green eyes, "
        "wearing round glasses, a red beanie and an orange sweater, with a neutral expression, "
    ) in text
    assert ", against a plain teal background, holding a cup of tea. Flat illustration, " in text
    assert "Ana" not in text


def test_name_is_in_the_prompt_only_on_request(tmp_path):
    prompt = make(tmp_path, list(FULL), list(FULL.values()), include_name=True).generate_prompt(0)
    assert " of Ana Dvořák, a nurse, a 34-year-old woman with " in prompt.text
    with pytest.raises(ValueError, match="include_name must be true or false, got 'yes'"):
        make(tmp_path, list(FULL), list(FULL.values()), include_name="yes")


@pytest.mark.parametrize("age", [17, 0, -3, 121, 17.5, "seventeen", "34 years", True, "²"])
def test_age_that_is_no_adults_age_is_an_error(tmp_path, age):
    with pytest.raises(ProfileError) as caught:
        make(tmp_path, ["name", "age"], ["A", 40], ["B", age])
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 't.xlsx'}, sheet 'people', row 3, column 'age': ")
    assert message.endswith(f"got {age!r} (allowed: 18 to 120)")


@pytest.mark.parametrize("age", [18, 120, 34.0, "34", None])
def test_age_of_an_adult(tmp_path, age):
    text = make(tmp_path, ["name", "age"], ["A", age]).generate_prompt(0).text
    found = int(re.search(r"(\d+)-year-old", text)[1])
    assert found >= 18 if age is None else found == int(age)


def test_no_drawn_person_is_a_minor():
    generator = make_generator("avatars")
    for i in range(3000):
        text = generator.generate_prompt(i).text
        assert int(re.search(r"(\d+)-year-old", text)[1]) >= 18


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("gender", "girl"),
        ("gender", "Boy"),
        ("gender", "teenage man"),
        ("occupation", "schoolgirl"),
        ("extra", "looks like a child"),
        ("extra", "a 12-year-old with a ball"),
        ("extra", "under-age"),
    ],
)
def test_words_for_a_minor_are_an_error(tmp_path, column, value):
    with pytest.raises(ProfileError, match=f"row 2, column '{column}': .*not an adult, got"):
        make(tmp_path, ["id", column], [1, value])


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("occupation", "child psychologist"),
        ("occupation", "cowboy"),
        ("extra", "with a baby blue scarf"),
        ("extra", "reading a children's book"),
        ("gender", "non-binary"),
        ("extra", "a 42-year-old at heart"),
    ],
)
def test_words_that_only_sound_like_it_are_not(tmp_path, column, value):
    assert value in make(tmp_path, ["id", column], [1, value]).generate_prompt(0).text


@pytest.mark.parametrize(
    ("columns", "expected", "unexpected"),
    [
        ({"glasses": True}, "wearing glasses", None),
        ({"glasses": False}, " of ", "glasses"),
        ({"glasses": "none"}, " of ", "glasses"),
        ({"glasses": "sunglasses", "eye_color": None}, "wearing sunglasses", "eyes"),
        ({"hat": "No"}, " of ", r"\b(cap|hat|beanie|beret|crown|headphones)\b"),
        (
            {"hat": "headphones"},
            "wearing (round |square |thin-rimmed )?.*headphones",
            "a headphones",
        ),
        ({"gender": "man", "beard": True}, "and a beard", None),
        ({"gender": "man", "beard": "mustache"}, "and a mustache", "beard"),
        ({"gender": "man", "beard": "stubble"}, "and stubble", "a stubble"),
        ({"gender": "man", "beard": False}, " of ", "beard|stubble|goatee|mustache"),
        ({"gender": "woman"}, " of ", "beard|stubble|goatee|mustache"),
        ({"hair_style": "bald"}, "a bald head", "hair"),
        ({"hair_style": "high ponytail", "hair_color": "red"}, "red hair in a high ponytail", None),
        ({"hair_style": "braids", "hair_color": "gray"}, "gray hair in braids", None),
        ({"hair_style": "wavy hair", "hair_color": "pink"}, "with .*wavy pink hair", None),
        ({"clothes": "white coat"}, "a white coat", None),
        ({"clothes": "a lab coat", "clothes_color": "white"}, "a white lab coat", None),
        ({"clothes": "overalls", "clothes_color": "blue"}, "blue overalls", "a blue overalls"),
        ({"expression": "smiling"}, ", smiling, ", None),
        ({"expression": "a shy smile"}, ", with a shy smile, ", None),
        ({"background": "on a beach"}, ", on a beach", "background"),
        ({"background": "a brick wall"}, ", against a brick wall", "background"),
        ({"background": "orange"}, "against an orange background", None),
        ({"style": "none"}, " of ", "^[^.]*[.] (Photograph|Cartoon)"),
    ],
)
def test_values_become_words(tmp_path, columns, expected, unexpected):
    generator = make(tmp_path, ["age", *columns], [40, *columns.values()])
    for i in range(25):
        text = generator.generate_prompt(i).text
        assert re.search(expected, text), text
        assert unexpected is None or not re.search(unexpected, text), text


def test_variants_of_a_row_keep_what_it_says(tmp_path):
    generator = make(
        tmp_path, ["age", "hair_color", "hair_style"], [40, "red", "short"], [50, "blue", "short"]
    )
    assert all("short red hair" in generator.generate_prompt(2 * k).text for k in range(50))
    assert all("short blue hair" in generator.generate_prompt(2 * k + 1).text for k in range(50))
    assert len({generator.generate_prompt(2 * k).text for k in range(50)}) == 50


def test_misspelt_age_column_is_refused_rather_than_ignored(tmp_path):
    with pytest.raises(ProfileError, match=r"column 'Age': looks like .*allowed: 'age'"):
        make(tmp_path, ["Age"], [12])
