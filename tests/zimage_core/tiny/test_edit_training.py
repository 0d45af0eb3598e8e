"""The training of the edit checkpoint: its world, its forward and its files."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from zimage_core.chat_template import edit_segments
from zimage_core.editing import Edit as EditInputs
from zimage_core.editing import EditEntries
from zimage_core.loader import load_from_local_dir
from zimage_core.patchify import patchify, unpatchify
from zimage_core.pipeline import ZImagePipeline
from zimage_core.text_encoder import tokenize_texts
from zimage_core.tiny.attributes import NONE, VALUES, draw_subject, make_subject
from zimage_core.tiny.edit_forward import Conditions, EditForward, see
from zimage_core.tiny.edit_pairs import draw_group, normalised, shown
from zimage_core.tiny.edit_score import make_edit_questions, score_edits
from zimage_core.tiny.instructions import Edit, InstructionWriter, draw_edit
from zimage_core.tiny.make import make_checkpoint
from zimage_core.tiny.train_edit import main
from zimage_core.tiny.vae_training import draw_kind
from zimage_core.tiny.vocabulary import load_vocabulary
from zimage_core.tiny.world import draw, draw_array


def test_an_edit_changes_what_it_says_and_nothing_else() -> None:
    random = Random(5)
    for _ in range(200):
        edit = draw_edit(draw_subject(draw_kind(random), random), random)
        for one in (edit, edit.reversed()):
            assert one.changed
            assert not set(one.changed) & set(one.kept)
        assert draw_array(edit.before).tobytes() != draw_array(edit.after).tobytes()


def test_the_same_words_do_not_ask_for_two_things() -> None:
    """An instruction and the drawing tell what is asked for: for a drawing no text is ambiguous."""
    random = Random(7)
    writer = InstructionWriter(load_vocabulary(), random)
    subject = draw_subject("avatars", random)
    meant: dict[str, dict[str, str]] = {}
    for _ in range(3000):
        edit = draw_edit(subject, random)
        text = writer.instruction(edit).casefold().rstrip(".")
        assert meant.setdefault(text, edit.changed) == edit.changed, text
    assert len(meant) > 300


def test_what_hides_is_not_asked_to_be_kept() -> None:
    plain = {name: allowed[0] for name, allowed in VALUES["avatars"].items()}
    values = plain | {"hair_style": "bun", "hat": NONE, "hat_color": NONE, "clothes_color": "teal"}
    bare = make_subject("avatars", values)
    hatted = make_subject("avatars", {**values, "hat": "cap", "hat_color": "blue"})
    edit = Edit(bare, hatted, "hat")
    assert edit.changed == {"hat": "cap", "hat_color": "blue"}
    assert edit.reversed().changed == {"hat": NONE}
    assert "hair_style" not in edit.kept and "hair_color" not in edit.kept
    assert edit.kept["clothes_color"] == "teal"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> ZImagePipeline:
    folder = make_checkpoint(tmp_path_factory.mktemp("edit") / "model", siglip_dim=24)
    return ZImagePipeline(**load_from_local_dir(folder, device="cpu", dtype=torch.float32))


def test_the_batched_forward_is_that_of_single_edits(pipeline: ZImagePipeline) -> None:
    model = pipeline.transformer
    random = Random(3)
    prompts = ["remove the hat", "make the background sky blue, please", ""]
    pictures = [draw(draw_subject("avatars", random)) for _ in prompts]
    encoded = pipeline.encode_pictures(pictures)
    texts = [pipeline.encode_edit_text(prompt, 1) for prompt in prompts]
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, model.in_channels, 16, 16, generator=generator)
    time = torch.tensor([0.3])

    edits = [
        EditInputs(text, [one.latents], [one.visual])
        for text, one in zip(texts, encoded, strict=True)
    ]
    entries = EditEntries(model, edits, range(3), 16, 16)
    patches = patchify(latents, model.patch_size)
    expected = unpatchify(entries.velocity(patches, model.modulate(time)), model.patch_size, 16, 16)

    asked = torch.zeros(3, 32, model.config.cap_feat_dim)
    for row, text in zip(asked, texts, strict=True):
        row[: len(text[1])] = text[1]
    given = Conditions(
        opened=texts[0][0],
        asked=asked,
        lengths=torch.tensor([len(text[1]) for text in texts]),
        closed=texts[0][2],
        pictures=torch.stack([one.latents for one in encoded]),
        visual=torch.stack([one.visual for one in encoded]),
    )
    with torch.no_grad():
        found = EditForward(model, 16, 16)(latents, time.expand(3), given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_instruction_is_the_segment_that_the_training_pads(pipeline: ZImagePipeline) -> None:
    texts = edit_segments("add a red cap", 1)
    lengths = [len(ids) for ids in tokenize_texts(pipeline.tokenizer, texts, 512)]
    assert [len(x) for x in pipeline.encode_edit_text("add a red cap", 1)] == lengths


@pytest.mark.long
def test_a_training_ends_in_a_checkpoint_that_edits(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", vae_channels=(8, 8, 8, 8))
    out, state = tmp_path / "out", tmp_path / "state"
    sizes = ["--groups", "100", "--batch-size", "4", "--steps-vision", "2", "--steps-edit", "1"]
    main([str(base), str(out), "--state", str(state), "--look", "2", *sizes])
    components = load_from_local_dir(out, device="cpu", dtype=torch.float32)
    processor, vision = components["siglip_processor"], components["siglip"]
    group = draw_group("0/edit pairs", 0)
    picture = draw_array(group.subject, group.jitter)
    patches = processor(Image.fromarray(picture))
    torch.testing.assert_close(normalised(processor, shown(processor, picture)), patches)
    with torch.no_grad():
        alone, batched = vision(patches), see(vision, patches[None])[0]
    torch.testing.assert_close(batched, alone, rtol=1e-5, atol=1e-5)
    logged = (state / "log.jsonl").read_text(encoding="utf-8")
    assert '"changed": ' in logged and len(list((state / "sheets").iterdir())) == 1
    main([str(base), str(out), "--state", str(state), "--look", "2", *sizes])  # nothing is left
    assert (state / "log.jsonl").read_text(encoding="utf-8").count('"already done"') == 2
    with pytest.raises(ValueError, match=r"begun with lr=0\.0015"):
        main([str(base), str(out), "--state", str(state), "--lr", "0.1", *sizes])


def test_the_score_finds_what_is_there_and_what_is_not() -> None:
    questions = make_edit_questions(load_vocabulary(), 5)
    true = score_edits(questions, [draw_array(question.edit.after) for question in questions])
    assert (true.changed, true.kept, true.perfect) == (1.0, 1.0, 5)
    same = score_edits(questions, [question.picture for question in questions])
    assert (same.changed, same.kept, same.perfect) == (0.0, 1.0, 0)
