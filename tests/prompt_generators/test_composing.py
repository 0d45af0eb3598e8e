"""What `avatars`, `food` and `gaming` promise alike."""

import hashlib
import importlib.util
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prompt_generators import ProfileError, generator_length, make_generator, read_profiles

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "data" / "profiles"
NAMES = ["avatars", "food", "gaming"]
BARE = {name: make_generator(name) for name in NAMES}
FROM_TABLE = {
    name: make_generator(name, profiles=TABLES / f"{name}.xlsx", sheet=None) for name in NAMES
}


def write(tmp_path, content):
    path = tmp_path / "t.csv"
    path.write_text(content, encoding="utf-8")
    return path


def texts(generator, indices):
    return [generator.generate_prompt(i).text for i in indices]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("generators", [BARE, FROM_TABLE], ids=["bare", "table"])
def test_six_thousand_prompts_all_differ(name, generators):
    assert len(set(texts(generators[name], range(6000)))) == 6000


@pytest.mark.parametrize("name", NAMES)
def test_prompts_differ_even_where_every_row_says_the_same(name, tmp_path):
    columns = [column for column in FROM_TABLE[name].columns if column != "age"]
    row = ",".join("blue" for _ in columns)
    path = write(tmp_path, ",".join(columns) + f"\n{row}\n{row}\n{row}\n")
    assert len(set(texts(make_generator(name, profiles=path), range(3000)))) == 3000


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("generators", [BARE, FROM_TABLE], ids=["bare", "table"])
def test_prompts_read_like_sentences(name, generators):
    for text in texts(generators[name], range(1500)):
        assert re.fullmatch(r"[A-Z][^.]+\. [A-Z0-9][^.]+\.", text), text
        assert not re.search(
            r"\s\s|\s[,.]|,,|, \.|\bNone\b|\bnone\b|_|\ba [aeio]\w|\ba an?\b", text
        ), text
        assert not re.search(r"watermark|\bno text\b|\bnan\b", text, re.IGNORECASE)
        assert 60 < len(text) < 420, text
        # Not two words twice in a row, as where a column's value repeats a drawn word.
        assert not re.search(r"\b(\w+) \1\b", text), text


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(-(2**70), 2**70),
    indices=st.lists(st.integers(0, 10**12), min_size=2, max_size=6),
)
def test_a_prompt_depends_on_arguments_and_index_only(name, seed, indices):
    options = {"seed": seed}
    generator = make_generator(name, options=options)
    forward = [generator.generate_prompt(i) for i in indices]
    backward = [generator.generate_prompt(i) for i in reversed(indices)][::-1]
    copied = pickle.loads(pickle.dumps(generator))
    alone = [make_generator(name, options=options).generate_prompt(i) for i in indices]
    assert forward == backward == [copied.generate_prompt(i) for i in indices] == alone


def test_texts_are_identical_in_a_process_with_another_hash_seed():
    code = (
        "import hashlib, sys; from prompt_generators import make_generator\n"
        "for name in ('avatars', 'food', 'gaming'):\n"
        "  for table in (None, f'{sys.argv[1]}/{name}.csv'):\n"
        "    g = make_generator(name, profiles=table)\n"
        "    text = '\\n'.join(g.generate_prompt(i).text for i in reversed(range(400)))\n"
        "    print(hashlib.sha256(text.encode()).hexdigest())\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code, str(TABLES)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "4242")
    ]
    here = [
        hashlib.sha256("\n".join(texts(g, reversed(range(400)))).encode()).hexdigest()
        for name in NAMES
        for g in (BARE[name], FROM_TABLE[name])
    ]
    assert outputs[0] == outputs[1] == here


@pytest.mark.parametrize("name", NAMES)
def test_seed_changes_the_prompts(name):
    other = make_generator(name, options={"seed": 1})
    assert not set(texts(other, range(50))) & set(texts(BARE[name], range(50)))
    with pytest.raises(ValueError, match="seed must be an int, got True"):
        make_generator(name, options={"seed": True})
    with pytest.raises(ValueError, match=r"seed must be an int, got 1\.5"):
        make_generator(name, options={"seed": 1.5})


@pytest.mark.parametrize("name", NAMES)
def test_index_goes_round_the_rows_and_rows_become_metadata(name):
    generator = FROM_TABLE[name]
    table = generator.profiles
    assert generator_length(generator) is None
    for i in (0, 3, len(table) + 3, 7 * len(table)):
        assert generator.generate_prompt(i).metadata == table.rows[i % len(table)]
    assert BARE[name].generate_prompt(5).metadata == {}
    with pytest.raises(IndexError):
        generator.generate_prompt(-1)


def test_shipped_tables_are_what_their_maker_makes(tmp_path):
    spec = importlib.util.spec_from_file_location(
        "make_profiles", Path(__file__).with_name("make_profiles.py")
    )
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    maker.make(tmp_path)
    for name, sheets in maker.make_tables().items():
        shipped = read_profiles(TABLES / f"{name}.csv")
        assert shipped.fingerprint == read_profiles(TABLES / f"{name}.xlsx").fingerprint
        assert len(shipped) >= 200
        for sheet in sheets:
            assert (
                read_profiles(TABLES / f"{name}.xlsx", sheet).fingerprint
                == read_profiles(tmp_path / f"{name}.xlsx", sheet).fingerprint
            )
            make_generator(name, profiles=TABLES / f"{name}.xlsx", sheet=sheet)
    assert (TABLES / "avatars.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    assert (TABLES / "edit.csv").read_bytes() == (tmp_path / "edit.csv").read_bytes()
    pictures = sorted(path.name for path in (TABLES / "edit").iterdir())
    assert pictures == sorted({row["image"] for row in read_profiles(TABLES / "edit.csv").rows})
    assert pictures == sorted(path.name for path in (tmp_path / "edit").iterdir())
    assert sum((TABLES / "edit" / name).stat().st_size for name in pictures) < 60_000
    for name in pictures:
        shipped, made = (Image.open(folder / "edit" / name) for folder in (TABLES, tmp_path))
        assert shipped.size == (128, 128)
        assert np.array_equal(shipped.convert("RGB"), made.convert("RGB"))


def test_reserved_columns_set_the_prompts_fields(tmp_path):
    path = write(
        tmp_path, "dish,seed,width,height,negative_prompt\napple,7,512,768,blurry\nramen,,,,\n"
    )
    generator = make_generator("food", profiles=path)
    first, second = generator.generate_prompt(0), generator.generate_prompt(1)
    assert (first.seed, first.width, first.height, first.negative_text) == (7, 512, 768, "blurry")
    assert (second.seed, second.width, second.height, second.negative_text) == (None,) * 4
    assert "blurry" not in first.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("dish,seed\napple,-1\n", "row 2, column 'seed': not a whole number.*got -1"),
        ("dish,seed\napple,1.5\n", "column 'seed': .*got 1.5"),
        ("dish,seed\napple,true\n", "column 'seed': .*got True"),
        ("dish,width,height\na,512,512\nb,1000,512\n", "row 3, column 'width'.*992 and 1008"),
        ("dish,width,height\na,512,\n", "row 2, column 'height': width and height come together"),
        ("dish,negative_prompt\na,3\n", "column 'negative_prompt': not text but of type int"),
        ("dish,plate\na,x\nb,y\n,7\n", None),
        ("dish,plate\na,7\nb,8\n", "row 2, column 'plate': not text but of type int, got 7"),
        ("dish,Main Colour\na,red\n", "column 'Main Colour': .*allowed: 'main_color'"),
    ],
)
def test_cells_that_cannot_be_what_they_must_be(tmp_path, content, message):
    path = write(tmp_path, content)
    if message is None:
        make_generator("food", profiles=path)
        return
    with pytest.raises(ProfileError, match=message) as caught:
        make_generator("food", profiles=path)
    assert str(path) in str(caught.value)


def test_columns_decide_and_empty_cells_are_drawn(tmp_path):
    path = write(
        tmp_path, "dish,main_color,plate,garnish,background\ndonut,green,none,,on a tray\n"
    )
    generator = make_generator("food", profiles=path)
    drawn = texts(generator, range(60))
    for text in drawn:
        assert re.search(r" of a green donut, (?!served)", text)
        assert ", on a tray." in text
    assert any("rainbow sprinkles" in text for text in drawn)
    assert any("garnished" not in text for text in drawn)


def test_dish_that_the_vocabulary_does_not_know_gets_nothing_that_could_contradict_it(tmp_path):
    path = write(tmp_path, "dish\nborscht\n")
    for text in texts(make_generator("food", profiles=path), range(40)):
        assert re.search(r" of borscht, (?!served|garnished)[^,]+, (?:against|on) ", text), text


@pytest.mark.parametrize(
    ("effect", "expected"),
    [
        ("glowing softly", "a weapon glowing softly,"),
        ("floating sparks", "a weapon with floating sparks,"),
        ("covered in frost", "a weapon covered in frost,"),
        ("with runes", "a weapon with runes,"),
        ("none", "a weapon, "),
    ],
)
def test_gaming_effect(tmp_path, effect, expected):
    path = write(
        tmp_path,
        f"item,rarity,color,material,category,effect\naxe,epic,red,stone,weapon,{effect}\n",
    )
    text = make_generator("gaming", profiles=path).generate_prompt(0).text
    assert f"of an epic red stone axe, {expected}" in text
