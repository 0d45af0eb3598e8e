"""The autoencoder computes what diffusers' AutoencoderKL computes, under the same keys."""

import diffusers
import pytest
import torch
from autoencoder_configs import CONFIGS, autoencoder_values, random_state

from zimage_core.autoencoder import AutoencoderKL
from zimage_core.config import AutoencoderConfig
from zimage_core.pipeline import ZImagePipeline


def pair(**changes):
    """Make our model and diffusers' with the same random weights, norms and biases included."""
    values = autoencoder_values(**changes)
    ours = AutoencoderKL(AutoencoderConfig(**values)).eval()
    theirs = diffusers.AutoencoderKL(**values).eval()
    state = random_state(theirs.state_dict())
    theirs.load_state_dict(state)
    ours.load_state_dict(state)  # strict: also proves that the keys are equal
    return ours, theirs


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(params=CONFIGS, scope="module")
def models(request):
    return pair(**CONFIGS[request.param])


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (48, 80), (64, 16)])
def test_encode_and_decode_equal_diffusers(models, size):
    ours, theirs = models
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    a, b = ours.encode(images), theirs.encode(images).latent_dist
    assert a.mean.shape == (2, ours.config.latent_channels, *(s // ours.scale_factor for s in size))
    assert relative(a.mode(), b.mode()) < 1e-5
    assert relative(a.logvar, b.logvar) < 1e-5
    decoded = ours.decode(a.mode())
    assert decoded.shape[-2:] == size
    assert relative(decoded, theirs.decode(b.mode()).sample) < 1e-5


@torch.no_grad()
def test_sample_equals_diffusers_with_the_same_generator(models):
    ours, theirs = models
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    a = ours.encode(images).sample(torch.Generator().manual_seed(7))
    b = theirs.encode(images).latent_dist.sample(torch.Generator().manual_seed(7))
    assert relative(a, b) < 1e-5
    assert not torch.equal(a, ours.encode(images).sample(torch.Generator().manual_seed(8)))


@torch.no_grad()
def test_the_pipeline_gives_each_image_of_a_batch_its_own_bits(models):
    vae, _ = models
    pipeline = ZImagePipeline(None, vae, None, None, None)
    latents = torch.randn(3, vae.config.latent_channels, 4, 6)
    together = pipeline.decode(latents)
    for i in range(3):
        assert torch.equal(together[i], pipeline.decode(latents[i : i + 1])[0])


@torch.no_grad()
def test_batch_equals_singles(models):
    ours, _ = models
    latents = torch.randn(3, ours.config.latent_channels, 4, 6)
    batch = ours.decode(latents)
    for i in range(3):
        assert relative(batch[i], ours.decode(latents[i : i + 1])[0]) < 1e-5


def test_log_variance_is_clamped():
    ours, _ = pair()
    with torch.no_grad():
        ours.encoder.conv_out.bias[4:] = 1e4
        assert ours.encode(torch.zeros(1, 3, 16, 16)).logvar.max() == 20.0


@torch.no_grad()
def test_bfloat16_stays_near_float32():
    ours, _ = pair()
    latents = torch.randn(1, 4, 4, 4)
    reference = ours.decode(latents)
    half = ours.to(torch.bfloat16).decode(latents.bfloat16())
    assert half.dtype == torch.bfloat16
    assert relative(half.float(), reference) < 0.05


def test_wrong_shapes_are_refused():
    ours, _ = pair()
    with pytest.raises(ValueError, match=r"\(1, 4, 32, 32\); allowed: \(B, 3, H, W\)"):
        ours.encode(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="20x32 pixels; both sides must be multiples of 8"):
        ours.encode(torch.zeros(1, 3, 32, 20))
    with pytest.raises(ValueError, match=r"allowed: \(B, 4, h, w\)"):
        ours.decode(torch.zeros(4, 8, 8))
