"""Captions say what is drawn, in words that the prompt generators use and the tokenizer knows."""

import json
import re
from itertools import product
from pathlib import Path
from random import Random

import pytest

from prompt_generators import make_generator
from zimage_core.patchify import padded_length
from zimage_core.text_encoder import load_tokenizer, tokenize
from zimage_core.tiny.attributes import KINDS, NONE, VALUES, attributes_of, draw_subject
from zimage_core.tiny.caption_batches import CaptionBatches
from zimage_core.tiny.caption_reading import CaptionReader
from zimage_core.tiny.captions import CaptionWriter
from zimage_core.tiny.tokenizer import HYPHENATED_WORD, save_tokenizer, train_tokenizer
from zimage_core.tiny.vae_training import draw_kind
from zimage_core.tiny.vocabulary import FOLDER, load_vocabulary

VOCABULARY = load_vocabulary()
READER = CaptionReader(VOCABULARY)
PROFILES = Path(__file__).parents[3] / "data" / "profiles"


def written(count, seed=0):
    random = Random(seed)
    writer = CaptionWriter(VOCABULARY, random)
    subjects = [draw_subject(draw_kind(random), random) for _ in range(count)]
    return [(subject, writer.caption(subject)) for subject in subjects]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"user\n{caption}\nassistant\n" for _, caption in written(20_000, seed=1)]
    bpe = train_tokenizer(2048, texts, word=HYPHENATED_WORD)
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer"), bpe))


def words(text):
    return set(re.findall(r"[^\W_]+(?:-[^\W_]+)*", text.casefold()))


@pytest.fixture(scope="module")
def known_words():
    return {word for _, caption in written(20_000, seed=1) for word in words(caption)}


def prompts(name, table, count=2000):
    profiles = PROFILES / f"{name}.csv" if table else None
    generator = make_generator(name, profiles=profiles)
    return [generator.generate_prompt(i).text for i in range(count)]


@pytest.mark.long
@pytest.mark.parametrize("table", [False, True], ids=["bare", "table"])
@pytest.mark.parametrize("name", KINDS)
def test_every_word_of_the_generators_is_in_the_training(name, table, known_words, tokenizer):
    ids = tokenize(tokenizer, prompts(name, table), 512)
    lengths = [padded_length(len(row)) for row in ids]
    assert max(lengths) <= 96
    assert sum(length <= 64 for length in lengths) > 0.8 * len(lengths)
    for text in prompts(name, table):
        unknown = words(text) - known_words
        # Ages are one token each where they came up, digits where not.
        assert not {word for word in unknown if not re.fullmatch(r"\d+-year-old", word)}, text


@pytest.mark.parametrize("table", [False, True], ids=["bare", "table"])
@pytest.mark.parametrize("name", KINDS)
def test_attributes_are_read_back_from_the_generators_prompts(name, table):
    expected = {
        "avatars": {"background", "gender", "skin", "hair_style", "expression", "clothes"},
        "food": {"background", "dish"},
        "gaming": {"background", "item", "color"},
    }[name]
    for text in prompts(name, table):
        kind, values = READER.read(text)
        assert kind == name, text
        assert expected <= set(values), text
        for attribute, value in values.items():
            assert value in VALUES[name][attribute], text


def test_rows_of_a_table_reach_the_reader():
    generator = make_generator("avatars", profiles=PROFILES / "avatars.csv")
    meaning = VOCABULARY.meanings
    for i in range(200):
        prompt = generator.generate_prompt(i)
        _, values = READER.read(prompt.text)
        row = prompt.metadata
        for column, attribute, table in (
            ("skin_tone", "skin", "avatars.skin"),
            ("eye_color", "eyes", "avatars.eyes"),
            ("clothes", "clothes", "avatars.clothes"),
            ("clothes_color", "clothes_color", "colors"),
        ):
            if row[column]:
                assert values[attribute] == meaning(table)[row[column]], prompt.text
        if row["hair_color"] and values["hair_style"] != "bald":
            assert values["hair_color"] == meaning("avatars.hair_color")[row["hair_color"]]
        if row["hat"] in {"headphones", "top hat", "red cap", "blue beanie"}:
            assert row["hat"].endswith(values["hat"])


def test_captions_state_nothing_but_the_truth():
    stated = 0
    for subject, caption in written(4000):
        kind, values = READER.read(caption)
        truth = attributes_of(subject)
        assert VALUES[kind].keys() == truth.keys(), caption
        assert {name: truth[name] for name in values} == values, caption
        stated += len(values)
    assert stated > 4000 * 4


def test_every_value_is_named_in_some_caption():
    seen = {kind: {name: set() for name in VALUES[kind]} for kind in KINDS}
    for _, caption in written(8000):
        kind, values = READER.read(caption)
        for name, value in values.items():
            seen[kind][name].add(value)
    for kind, names in VALUES.items():
        for name, values in names.items():
            if name not in {"hat_color", "color", "effect"}:
                assert seen[kind][name] == set(values), name
    assert seen["gaming"]["effect"] == set(VALUES["gaming"]["effect"]) - {NONE}


def test_captions_come_in_many_forms():
    captions = [caption for _, caption in written(2000)]
    assert len(set(captions)) > 1900
    counts = sorted(len(caption.split()) for caption in captions)
    assert counts[60] <= 4
    assert counts[-60] > 30
    random = Random(0)
    subject = draw_subject("avatars", random)
    again = CaptionWriter(VOCABULARY, random)
    assert len({again.caption(subject) for _ in range(200)}) > 190


@pytest.mark.parametrize(
    ("text", "kind", "values"),
    [
        ("Woman, red background", "avatars", {"gender": "woman", "background": "red"}),
        (
            "portrait of a bald man with a gray mustache and a top hat, a calm mood",
            "avatars",
            {"gender": "man", "hair_style": "bald", "beard": "mustache", "hat": "top hat"},
        ),
        ("a blue crew cut? a lady with red hair in a bun", "avatars", None),
        ("a donut", "food", {"dish": "donut"}),
        ("tomato soup in a blue bowl", "food", {"dish": "soup", "color": "red", "plate": "blue"}),
        ("a mystery", None, {}),
    ],
)
def test_reading(text, kind, values):
    found = READER.read(text)
    assert found[0] == kind
    if values is not None:
        assert found[1] == values


def test_every_word_of_the_generators_vocabularies_is_drawn_or_noise():
    tables = {
        "avatars": {
            "gender": ["avatars.gender"],
            "skin_tone": ["avatars.skin"],
            "hair_style": ["avatars.hair_style", "avatars.haircut", "avatars.bald"],
            "hair_style_man": ["avatars.hair_style", "avatars.haircut", "avatars.bald"],
            "hair_color": ["avatars.hair_color"],
            "hair_color_older": ["avatars.hair_color"],
            "eye_color": ["avatars.eyes"],
            "hat": ["avatars.hat"],
            "hat_color": ["colors"],
            "clothes": ["avatars.clothes"],
            "clothes_color": ["colors"],
        },
        "food": {"dish": ["food.dish"]},
        "gaming": {"item": ["gaming.item"], "color": ["colors"], "effect": ["gaming.effect"]},
    }
    for kind, names in tables.items():
        attributes = json.loads((FOLDER / f"{kind}.json").read_text("utf-8"))["attributes"]
        for name, (*found,) in names.items():
            known = {word for table in found for word in VOCABULARY.meanings(table)}
            assert set(attributes[name]) - {NONE} <= known, name
        plain = {*VOCABULARY.meanings("backgrounds"), *VOCABULARY.meanings("scenes")}
        plain |= {f"plain {word}" for word in plain}
        assert set(attributes["background"]) <= plain


def test_broken_vocabularies_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"drawings\.json: file is missing"):
        load_vocabulary(tmp_path)
    for path in FOLDER.glob("*.json"):
        content = json.loads(path.read_text("utf-8"))
        if path.stem == "drawings":
            content["avatars.skin"]["plaid"] = ["plaid"]
        (tmp_path / path.name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"drawings\.json: avatars\.skin: 'plaid'; allowed: light"):
        load_vocabulary(tmp_path)


def test_batches_are_full_of_one_length_and_resume(tokenizer):
    def batches():
        random = Random(5)
        subjects = [draw_subject(draw_kind(random), random) for _ in range(50)]
        writer = CaptionWriter(VOCABULARY, random)
        return CaptionBatches(writer, tokenizer, subjects, 16, random, dropout=0.2), random

    stream, random = batches()
    lengths, empty = set(), 0
    for _ in range(20):
        batch = stream.next()
        size = batch.ids.shape[1]
        assert batch.ids.shape[0] == len(batch.indices) == 16
        assert {padded_length(int(n)) for n in batch.lengths} == {size}
        for ids, n, caption in zip(batch.ids, batch.lengths, batch.captions, strict=True):
            assert ids[:n].tolist() == tokenize(tokenizer, [caption], 512)[0]
            assert not ids[n:].any()
            empty += caption == ""
        lengths.add(size)
    assert {32, 64} <= lengths <= {32, 64, 96}
    assert 30 < empty < 110
    other, other_random = batches()
    other.load_state_dict(json.loads(json.dumps(stream.state_dict()), object_hook=_int_keys))
    other_random.setstate(random.getstate())
    for _, _ in product(range(3), range(3)):
        assert other.next().ids.tolist() == stream.next().ids.tolist()


def _int_keys(found):
    return {int(k) if k.isdigit() else k: v for k, v in found.items()}
