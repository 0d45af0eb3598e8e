"""What trainings are built from: threads, optimizer, state files, the batched forward."""

import json
from random import Random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from zimage_core.text_encoder import TextEncoder
from zimage_core.tiny.dit_training import (
    Guide,
    TrainingForward,
    initialize_transformer,
    split_transformer_parameters,
)
from zimage_core.tiny.make import Sizes, make_checkpoint
from zimage_core.tiny.optimizer import MovingAverage, MuonAdamW, orthogonalize
from zimage_core.tiny.parallel import Threads
from zimage_core.tiny.state import Budget, Log, Stage, learning_rate, load_state, save_atomically
from zimage_core.tiny.text_training import initialize_text_encoder
from zimage_core.tiny.vae_training import initialize_vae, reconstruct, split_parameters
from zimage_core.tiny.writer import read_vae
from zimage_core.transformer import ZImageTransformer2DModel

SIZES = Sizes(dim=64, layers=2, heads=2, text_dim=32, vae_channels=(8, 8, 8, 8))


def models():
    transformer = ZImageTransformer2DModel(SIZES.transformer())
    text_encoder = TextEncoder(SIZES.text_encoder())
    generator = torch.Generator().manual_seed(3)
    initialize_transformer(transformer, generator)
    initialize_text_encoder(text_encoder, generator)
    with torch.no_grad():  # an answer that is not near 0
        transformer.all_final_layer["2-1"].linear.weight.normal_(generator=generator)
        transformer.all_final_layer["2-1"].adaLN_modulation[1].weight.normal_(generator=generator)
    return transformer, text_encoder


def test_threads_sum_to_the_gradient_of_the_whole():
    torch.manual_seed(0)
    model, unused = nn.Linear(5, 3), nn.Parameter(torch.ones(2))
    x, y = torch.randn(7, 5), torch.randn(7, 3)
    parameters = [*model.parameters(), unused]
    threads = Threads(3)
    assert [s.stop - s.start for s in threads.slices(7)] == [2, 2, 3]
    assert len(threads.slices(2)) == 2
    value = threads.gradients(
        lambda part, _: F.mse_loss(model(x[part]), y[part]), len(x), parameters
    )
    ours = [p.grad for p in parameters]
    loss = F.mse_loss(model(x), y)
    assert value == pytest.approx(loss.item(), rel=1e-6)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for grad, theirs in zip(ours, expected, strict=False):
        assert torch.allclose(grad, theirs, atol=1e-6)
    assert ours[-1] is None
    with pytest.raises(ZeroDivisionError):
        threads.gradients(lambda part, _: 1 / 0, 4, parameters)


def test_orthogonalized_matrices_have_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((20, 50), (50, 20), (30, 30)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=generator)))
        assert values.max() < 1.3
        assert values.median() > 0.65


def test_adamw_part_is_torchs():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(4)), None
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = MuonAdamW([], [ours], Threads(1), matrix_lr=1.0, lr=0.01, clip=1e9)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(5):
        grad = torch.randn(4)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step(1.0)
        reference.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_optimizer_clips_learns_and_refuses_nan():
    torch.manual_seed(0)
    target = torch.randn(6, 6)
    weight, bias = nn.Parameter(torch.zeros(6, 6)), nn.Parameter(torch.zeros(6))
    optimizer = MuonAdamW([weight], [bias], Threads(2), matrix_lr=0.2, lr=0.05)
    x = torch.randn(64, 6)
    losses = []
    for step in range(150):
        loss = F.mse_loss(x @ weight.T + bias, x @ target.T + 1.0)
        weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
        optimizer.step(learning_rate(step, 150))
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
    bias.grad = torch.full((6,), torch.nan)
    with pytest.raises(FloatingPointError, match="norm is nan in step 151"):
        optimizer.step(1.0)


def test_learning_rate_warms_up_stays_and_goes_to_zero():
    factors = [learning_rate(i, 1000) for i in range(1001)]
    assert factors[0] < 0.02
    assert factors[60:500] == [1.0] * 440
    assert factors[750] == pytest.approx(0.5)
    assert factors[1000] == 0.0
    assert max(learning_rate(i, 6) for i in range(6)) == 1.0


def test_moving_average_follows_and_resumes():
    weight = nn.Parameter(torch.zeros(3))
    average = MovingAverage({"w": weight}, decay=0.9)
    with torch.no_grad():
        weight.fill_(1.0)
    for _ in range(200):
        average.update()
    assert torch.allclose(average.values["w"], torch.ones(3), atol=1e-3)
    other = MovingAverage({"w": nn.Parameter(torch.zeros(3))}, decay=0.9)
    other.load_state_dict(average.state_dict())
    assert (other.steps, other.values["w"].tolist()) == (200, average.values["w"].tolist())


def test_batched_forward_equals_the_models_own():
    transformer, _text_encoder = models()
    transformer.eval()
    generator = torch.Generator().manual_seed(0)
    for size in (32, 64):
        lengths = torch.tensor([size, size - 9, size - 31])
        features = torch.randn(3, size, 32, generator=generator)
        latents = torch.randn(3, 16, 16, 16, generator=generator)
        time = torch.rand(3, generator=generator)
        forward = TrainingForward(transformer, 16, 16)
        with torch.no_grad():
            ours = forward(latents, time, features, lengths)
            captions = transformer.embed_captions(
                [row[:n] for row, n in zip(features, lengths, strict=True)]
            )
            context = transformer.condition(captions, 16, 16)
            theirs = transformer(latents, time, context)
        assert theirs.std() > 0.1
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_guide_is_the_pipelines_guidance():
    from zimage_core.pipeline import ZImagePipeline
    from zimage_core.tiny.caption_batches import CaptionBatch
    from zimage_core.tiny.sampling import scheduler

    transformer, text_encoder = models()
    ids = torch.randint(5, 300, (2, 32))
    ids[:, 20:] = 0
    empty = torch.zeros(1, 32, dtype=torch.int64)
    empty[0, :8] = torch.arange(8)
    guide = Guide(transformer, text_encoder, empty, 8, 2.5)
    batch = CaptionBatch([], [], ids, torch.tensor([20, 20]))
    x = torch.randn(2, 16, 16, 16)
    forward = TrainingForward(guide.transformer, 16, 16)
    # One step of one: sampling ends at x + velocity where the time is 0.
    velocity = guide.velocity(forward, x, torch.zeros(2), batch)
    pipeline = ZImagePipeline(transformer, None, text_encoder, None, scheduler())
    pipeline.__class__ = type("Small", (ZImagePipeline,), {"vae_scale_factor": 8})
    with torch.no_grad():
        ended = pipeline.denoise(
            list(text_encoder(ids)[:, :20]),
            height=128,
            width=128,
            num_inference_steps=1,
            guidance_scale=2.5,
            negative_prompt_embeds=[text_encoder(empty)[0, :8]] * 2,
            latents=x,
        )
    assert torch.allclose(ended - x, velocity, rtol=1e-4, atol=1e-4 * float(velocity.abs().max()))
    with torch.no_grad():
        next(transformer.parameters()).add_(1.0)
    assert torch.equal(guide.velocity(forward, x, torch.zeros(2), batch), velocity)


def test_parameters_are_split_without_loss():
    transformer, _ = models()
    matrices, others = split_transformer_parameters(transformer)
    assert len(matrices) + len(others) == len(list(transformer.parameters()))
    assert len(matrices) == 7 * 4  # two layers and two refiners
    from zimage_core.autoencoder import AutoencoderKL

    vae = AutoencoderKL(SIZES.autoencoder())
    initialize_vae(vae, torch.Generator().manual_seed(0))
    kernels, rest = split_parameters(vae)
    assert len(kernels) + len(rest) == len(list(vae.parameters()))
    assert all(kernel.ndim >= 2 for kernel in kernels)
    import numpy as np

    decoded, psnr = reconstruct(vae, np.full((3, 64, 64, 3), 128, np.uint8))
    assert decoded.shape == (3, 3, 64, 64)
    assert psnr > 0


class Counter:
    """A part of a stage that counts its steps."""

    def __init__(self):
        self.seen = []

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


def stage(folder, counter, steps, seed=1):
    return Stage(
        folder / "s.pt",
        "s",
        Budget(steps),
        Log(folder / "log.jsonl", quiet=True),
        {"counter": counter},
        Random(seed),
        torch.Generator().manual_seed(seed),
    )


def run(found, counter):
    def step(number, total):
        counter.seen.append(
            (number, found.random.random(), torch.rand(1, generator=found.generator).item())
        )
        if len(counter.seen) == 7 and total == 13:
            raise KeyboardInterrupt
        return {"loss": 1.0}

    found.run(step)


def test_a_stage_goes_on_where_it_stopped(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    whole = Counter()
    run(stage(tmp_path / "a", whole, 12), whole)
    assert [number for number, *_ in whole.seen] == list(range(12))

    monkeypatch.setattr("zimage_core.tiny.state.SAVE_SECONDS", -1.0)
    broken = Counter()
    with pytest.raises(KeyboardInterrupt):
        run(stage(tmp_path, broken, 13), broken)
    resumed = Counter()
    again = stage(tmp_path, resumed, 12, seed=99)
    assert again.step == 6
    run(again, resumed)
    assert resumed.seen == whole.seen
    done = Counter()
    final = stage(tmp_path, done, 12)
    assert final.is_done()
    run(final, done)
    assert len(done.seen) == 12
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["state"] for e in events if "state" in e] == [
        *("resumed", "done"),
        *("resumed", "already done"),
    ]


def test_minutes_become_steps_by_the_pace(tmp_path):
    assert Budget(minutes=10.0).estimate(20, 40.0) == 300
    assert Budget(77, 10.0).estimate(20, 40.0) == 77
    assert Budget(minutes=0.0).estimate(20, 40.0) == 21


def test_state_files_are_replaced_whole_and_damage_is_named(tmp_path):
    path = tmp_path / "s.pt"
    save_atomically(path, {"a": torch.ones(2), "r": Random(1).getstate()})
    save_atomically(path, {"a": torch.zeros(2), "r": Random(2).getstate()})
    assert [p.name for p in tmp_path.iterdir()] == ["s.pt"]
    state = load_state(path)
    assert state["a"].tolist() == [0, 0]
    Random().setstate(state["r"])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"s\.pt: cannot be read as a training state"):
        load_state(path)


def test_autoencoder_is_read_as_it_was_written(tmp_path):
    channels = (8, 8, 8, 8)
    folder = make_checkpoint(tmp_path / "a", dtype=torch.float32, vae_channels=channels) / "vae"
    read = read_vae(folder)
    assert read.config == Sizes(vae_channels=channels).autoencoder()
    written = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert read.state_dict().keys() == written.keys()
    for key, tensor in written.items():
        assert torch.equal(read.state_dict()[key], tensor), key
