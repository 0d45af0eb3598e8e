"""The trained checkpoint that ships with the project: its size, its numbers, its pictures."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zimage_core.generation import generate
from zimage_core.loader import load_from_local_dir
from zimage_core.text_encoder import full_model_shapes
from zimage_core.tiny.score import diversity, main, make_pictures, make_questions, score_pictures
from zimage_core.tiny.vae_training import draw_picture, reconstruct
from zimage_core.tiny.vocabulary import load_vocabulary

CHECKPOINT = Path(__file__).parents[3] / "data/checkpoints/z-image-tiny"
PROMPTS = [
    "Portrait of a 40-year-old woman with dark brown skin, curly purple hair and green eyes, "
    "wearing round glasses and a yellow sweater, smiling, plain teal background.",
    "a burger",
    "legendary blue potion with sparks in a torch-lit dungeon",
]


@pytest.fixture(scope="module")
def components():
    return load_from_local_dir(CHECKPOINT, device="cpu", dtype=torch.float32)


def test_it_is_small_and_in_float16():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    for path in CHECKPOINT.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}


def test_every_weight_that_runs_is_trained(components):
    config = components["text_encoder"].config
    unused = {f"model.{k}" for k in full_model_shapes(config)} - {
        f"model.{k}" for k in components["text_encoder"].state_dict()
    }
    for path in CHECKPOINT.rglob("*.safetensors"):
        for key, tensor in load_file(path).items():
            assert tensor.isfinite().all(), key
            # Zeros where nothing runs, and nowhere else.
            assert (tensor == 0).all() == (key in unused), key


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_latents_equal_those_of_diffusers(components, guidance):
    from diffusers import ZImagePipeline

    reference = ZImagePipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    arguments = {"height": 128, "width": 128, "num_inference_steps": 8, "guidance_scale": guidance}

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]

    ours = generate(
        **components, prompt=PROMPTS, generator=generators(), output_type="latent", **arguments
    )
    theirs = reference(
        list(PROMPTS), generator=generators(), output_type="latent", **arguments
    ).images
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5


def test_the_autoencoder_keeps_drawings_that_it_never_saw(components):
    random = Random("never seen")
    pictures = np.stack([draw_picture(random) for _ in range(24)])
    with torch.no_grad():
        _, psnr = reconstruct(components["vae"], pictures)
    assert psnr >= 31.0


@pytest.mark.long
def test_it_draws_what_it_is_told(components):
    questions = make_questions(load_vocabulary(), 40, seed="test")
    pictures = make_pictures(components, [q.prompt for q in questions], steps=8, guidance=0.0)
    score = score_pictures(questions, pictures)
    assert score.overall >= 0.93, score.accuracies


def test_seeds_differ_where_the_prompt_leaves_freedom(components):
    pictures = make_pictures(components, ["portrait of a woman"] * 16, steps=8, guidance=0.0)
    assert diversity(pictures) >= 0.15
    assert len({picture.tobytes() for picture in pictures}) == 16


@pytest.mark.slow
def test_score_over_500_fresh_prompts(capsys):
    import json

    main([str(CHECKPOINT)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["overall"] >= 0.93
    found = result["attributes"]
    for attribute, least in {
        "background": 0.99,
        "item": 0.99,
        "hair_color": 0.95,
        "clothes_color": 0.95,
        "glasses": 0.95,
        "expression": 0.85,
    }.items():
        assert found[attribute] >= least, attribute
