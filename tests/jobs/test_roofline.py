"""Operations of the transformer, by hand and as PyTorch counts them; cards by their names."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jobs.resources import bundle_root
from jobs.roofline import CARDS, PUBLISHED, TransformerSize, card_named, denoising_flops
from zimage_core import ZImagePipeline, load_from_local_dir

TINY = bundle_root() / "data" / "checkpoints" / "z-image-tiny"


def test_published_size_by_hand() -> None:
    # 1024 px: 4096 tokens of the image and 64 of the caption. Linear layers of a block have
    # 4 * 3840^2 + 3 * 3840 * 10240 weights, attention costs 4 * tokens^2 * 3840.
    linear = 2 * (4 * 3840**2 + 3 * 3840 * 10240)
    main = 30 * (linear * 4160 + 4 * 4160**2 * 3840)
    refiner = 2 * (linear * 4096 + 4 * 4096**2 * 3840)
    ends = 2 * (2 * 4096 * 64 * 3840)
    assert PUBLISHED.step_flops(1024, 1024, 64) == main + refiner + ends
    assert PUBLISHED.step_flops(1024, 1024, 33) == PUBLISHED.step_flops(1024, 1024, 64)
    assert PUBLISHED.step_flops(1024, 1024) == pytest.approx(55.6e12, rel=1e-3)
    assert PUBLISHED.step_flops(512, 512) == pytest.approx(12.9e12, rel=5e-3)
    assert PUBLISHED.step_flops(2048, 2048) == pytest.approx(319e12, rel=1e-3)


def test_computed_limits_are_those_of_the_data_sheets() -> None:
    flops = denoising_flops(PUBLISHED, 1024, 1024, 8)
    assert flops == pytest.approx(445e12, rel=2e-3)
    assert flops / CARDS["h100"].floor == pytest.approx(0.556, abs=5e-4)  # at 800 TFLOP/s
    assert flops / CARDS["h100"].peak == pytest.approx(0.450, abs=1e-3)
    assert flops / CARDS["rtx4090"].floor == pytest.approx(2.69, abs=5e-3)


@pytest.mark.parametrize("side", [64, 128, 144])  # 16, 64 and 81 patches: with and without padding
def test_formula_is_what_pytorch_counts(side: int) -> None:
    pipeline = ZImagePipeline(
        **load_from_local_dir(TINY, device="cpu", dtype=torch.float32, attention="native")
    )
    prompt = "a red apple on a wooden table"
    size = TransformerSize.of(pipeline.transformer.config)
    (caption,) = pipeline.caption_lengths([prompt])
    features = pipeline.encode([prompt])
    shape = pipeline.latents_shape(1, side, side)

    def denoise() -> None:
        pipeline.denoise(
            features, height=side, width=side, num_inference_steps=3, latents=torch.ones(shape)
        )

    denoise()  # what a schedule makes of the blocks is computed once
    # Of the kernels for CPUs only the plain one is counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoise()
    assert counter.get_total_flops() == denoising_flops(size, side, side, 3, caption)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        # These have the name of a card that computes more.
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("cpu", None),
    ],
)
def test_cards_are_known_by_their_whole_name(name: str, card: str | None) -> None:
    assert card_named(name) == card
