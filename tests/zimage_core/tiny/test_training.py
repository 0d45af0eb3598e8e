"""A whole training, of models too small to learn much: it ends in folders that can be used."""

import json

import pytest
import torch
from safetensors.torch import load_file

from zimage_core.generation import generate
from zimage_core.loader import load_from_local_dir
from zimage_core.tiny.settings import Settings
from zimage_core.tiny.state import Budget
from zimage_core.tiny.train import main
from zimage_core.tiny.training import Training

pytestmark = pytest.mark.slow

SMALL = {
    "dim": 64,
    "layers": 1,
    "heads": 2,
    "text_dim": 32,
    "text_layers": 2,
    "text_mlp": 64,
    "vocab_size": 400,
    "vae_channels": (8, 8, 8, 8),
    "latents": 500,
    "captions": 200,
    "batch_size": 4,
}
STEPS = {"vae": 2, "text": 2, "dit": 4, "distill": 2, "decoder": 2}


def train(folder, out, *, until="decoder", steps=STEPS, **changes):
    budgets = {name: Budget(count) for name, count in steps.items()}
    training = Training(folder, Settings(**{**SMALL, **changes}), budgets, quiet=True)
    training.run(out, until)
    return training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    train(folder / "state", folder / "tiny")
    return folder


def tensors(folder):
    return {
        f"{path.parent.name}/{key}": tensor
        for path in sorted(folder.glob("*/*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def test_both_folders_load_and_make_pictures(trained):
    pictures = []
    for name in ("tiny", "tiny-base"):
        components = load_from_local_dir(trained / name, device="cpu", dtype=torch.float32)
        images = generate(
            **components,
            prompt=["a red apple", "portrait of a woman with blue hair"],
            height=64,
            width=64,
            num_inference_steps=2,
            output_type="pt",
            generator=[torch.Generator().manual_seed(i) for i in range(2)],
        )
        assert images.shape == (2, 3, 64, 64)
        assert images.isfinite().all()
        pictures.append(images)
    assert not torch.equal(*pictures)


def test_diffusers_gives_the_same_latents(trained):
    from diffusers import ZImagePipeline

    components = load_from_local_dir(trained / "tiny", device="cpu", dtype=torch.float32)
    pipeline = ZImagePipeline.from_pretrained(trained / "tiny", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": ["a green slime on a plain dark background, glowing softly"],
        "height": 128,
        "width": 128,
        "num_inference_steps": 3,
        "guidance_scale": 1.5,
        "output_type": "latent",
    }
    ours = generate(**components, **arguments, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_base_and_distilled_share_the_autoencoder_alone(trained):
    distilled, base = tensors(trained / "tiny"), tensors(trained / "tiny-base")
    assert distilled.keys() == base.keys()
    assert {tensor.dtype for tensor in distilled.values()} == {torch.float16}
    for key, tensor in distilled.items():
        if key.startswith("vae/"):
            assert torch.equal(tensor, base[key])
    moved = [key for key in distilled if not torch.equal(distilled[key], base[key])]
    assert {key.split("/")[0] for key in moved} == {"transformer", "text_encoder"}
    unused = [key for key in base if "model.layers.1." in key or key.endswith("model.norm.weight")]
    assert unused
    assert not any(base[key].any() for key in unused)
    config = json.loads((trained / "tiny" / "vae" / "config.json").read_text())
    assert config["scaling_factor"] > 0
    assert config["shift_factor"] != 0.1159


def test_log_sheets_and_versions_are_kept(trained):
    state = trained / "state"
    events = [json.loads(line) for line in (state / "log.jsonl").read_text().splitlines()]
    by_stage = {event["stage"] for event in events}
    assert by_stage == {
        *("start", "tokenizer", "vae", "latents", "text", "dit", "distill", "decoder", "export")
    }
    assert any("val_0.75" in event for event in events)
    assert any("psnr" in event for event in events)
    sheets = {path.name for path in (state / "sheets").iterdir()}
    assert {"vae-000002.png", "dit-000004-guidance-3.png", "final.png"} <= sheets
    recorded = json.loads((state / "settings.json").read_text())
    assert recorded["versions"]["torch"] == torch.__version__


def test_a_stopped_training_ends_as_one_that_ran_through(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("zimage_core.tiny.state.SAVE_SECONDS", -1.0)
    monkeypatch.setattr(
        "zimage_core.tiny.training.Training._reporter", lambda *_: lambda step: None
    )
    from zimage_core.tiny.dit_training import DitTrainer

    step = DitTrainer.step

    def breaking(self, number, total):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number, total)

    monkeypatch.setattr(DitTrainer, "step", breaking)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "state", tmp_path / "out")
    monkeypatch.setattr(DitTrainer, "step", step)
    train(tmp_path / "state", tmp_path / "out")
    for name in ("", "-base"):
        whole, resumed = tensors(trained / f"tiny{name}"), tensors(tmp_path / f"out{name}")
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_other_settings_are_refused(trained, tmp_path):
    with pytest.raises(ValueError, match=r"settings\.json: this training was begun with seed=0"):
        train(trained / "state", tmp_path / "out", seed=1)


def test_command_line(tmp_path, capsys):
    arguments = [str(tmp_path / "out"), "--state", str(tmp_path / "state"), "--until", "tokenizer"]
    main([*arguments, "--captions", "50", "--vocab-size", "300", "--dim", "64", "--heads", "2"])
    assert "tokens=300" in capsys.readouterr().out
    assert (tmp_path / "state" / "tokenizer" / "tokenizer.json").is_file()
    with pytest.raises(SystemExit):
        main([*arguments, "--until", "nothing"])
