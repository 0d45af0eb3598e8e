import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_generators import ProfileError, generator_length, make_generator
from prompt_generators.template import parse_template


@pytest.fixture
def people(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        "id,age,job,height cm,member,since,nothing\n"
        "1,34,nurse,170.5,true,2024-05-01,\n"
        "2,51,,180.0,false,2023-01-02,\n",
        encoding="utf-8",
    )
    return path


def make(path, template, **options):
    return make_generator("template", profiles=path, options={"template": template, **options})


def test_fills_from_columns_of_every_type(people):
    generator = make(people, "a {age} year old, {height cm} cm, {member}, {since}, {{x}} }}{{")
    assert [generator.generate_prompt(i).text for i in range(2)] == [
        "a 34 year old, 170.5 cm, yes, 2024-05-01, {x} }{",
        "a 51 year old, 180 cm, no, 2023-01-02, {x} }{",
    ]
    assert generator.generate_prompt(1).metadata["age"] == 51


def test_empty_cell_is_an_error_or_what_missing_says(people):
    with pytest.raises(ProfileError, match="row 3, column 'job': the template uses this cell"):
        make(people, "a {job}")
    assert make(people, "a {job}", missing="person").generate_prompt(1).text == "a person"
    assert make(people, "a {job}", missing="").generate_prompt(1).text == "a "
    with pytest.raises(ProfileError, match="row 2: the filled template is empty"):
        make(people, " {nothing}", missing="")


def test_ends_with_the_table_or_repeats(people):
    once, again = make(people, "{age}"), make(people, "{age}", repeat=True)
    assert (generator_length(once), generator_length(again)) == (2, None)
    with pytest.raises(IndexError):
        once.generate_prompt(2)
    assert again and [again.generate_prompt(i).text for i in (2, 5)] == ["34", "51"]
    assert pickle.loads(pickle.dumps(again)).generate_prompt(3) == again.generate_prompt(3)


def test_unknown_column_lists_the_columns(people):
    with pytest.raises(
        ProfileError, match=r"column 'Job': no such column.*'age', 'job', 'height cm'"
    ):
        make(people, "a {Job}")


@pytest.mark.parametrize(
    "template",
    [
        "{age.__class__}",
        "{age[0]}",
        "{age!r}",
        "{age:>100000000}",
        "{age:{age}}",
        "{}",
        "{ }",
        "{0.real}",
        "{age",
        "age}",
        "{age!}",
        "",
        "  ",
        None,
        3,
    ],
)
def test_anything_but_plain_columns_is_refused(people, template):
    with pytest.raises(ValueError, match="option template") as caught:
        make(people, template)
    assert not isinstance(caught.value, ProfileError)


def test_bad_options(people):
    with pytest.raises(ValueError, match="option missing must be text, got 3"):
        make(people, "{age}", missing=3)
    with pytest.raises(ValueError, match="option repeat must be true or false, got 1"):
        make(people, "{age}", repeat=1)
    with pytest.raises(ValueError, match="'template' needs the option 'template'"):
        make_generator("template", profiles=people)
    with pytest.raises(ValueError, match="'template' needs a profile table"):
        make_generator("template", options={"template": "x"})


def test_values_are_never_parsed_as_templates(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a,b\n{b},"{a.__class__} {{"\n', encoding="utf-8")
    assert make(path, "{a}|{b}").generate_prompt(0).text == "{b}|{a.__class__} {{"


@given(st.text())
def test_any_literal_text_survives(text):
    if not text.strip():
        return
    parts = parse_template(text.replace("{", "{{").replace("}", "}}"))
    assert "".join(literal for literal, _ in parts) == text
    assert all(column is None for _, column in parts)
