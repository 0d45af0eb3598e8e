"""The account of memory against what the same code really takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zimage_core.checkpoint import PUBLISHED, open_checkpoint
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.live_bytes import FusedAttention, LiveBytes
from zimage_core.memory import MemoryModel, Workload
from zimage_core.tiny.make import make_checkpoint

GIB = 1024**3
# 110 M parameters in the transformer, and a decoder whose activations are as large as its weights
# are small: as in the published model, but a fiftieth of it.
SIZES: dict[str, Any] = {
    "dim": 1024,
    "heads": 8,
    "axes_dims": (32, 48, 48),
    "layers": 6,
    "vocab_size": 320,
    "text_dim": 512,
    "text_layers": 6,
    "text_heads": 8,
    "text_kv_heads": 4,
    "text_head_dim": 64,
    "text_mlp": 1536,
    "vae_channels": (64, 128, 128, 128),
}
WIDTH, HEIGHT = 384, 256

# Pages that are given back at once, and a peak that can be begun anew: the kernel's own count.
PROGRAM = """
import gc, json, re, sys, torch
from zimage_core import ZImagePipeline, load_from_local_dir
from zimage_core.offload import put_away

folder, width, height, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def status(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def measured(call):
    put_away(models["vae"])  # whose turn it was before is no part of a stage
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")
    result = call()
    return result, status("VmHWM") - before

def stages(width, height):
    embeds, encode = measured(lambda: pipeline.encode(["a red fox " * 300]))
    latents, denoise = measured(lambda: pipeline.denoise(
        embeds, height=height, width=width, num_inference_steps=1,
        generators=[torch.Generator().manual_seed(0)]))
    _, decode = measured(lambda: pipeline.decode(latents))
    return {"encode": encode, "denoise": denoise, "decode": decode}

found = {}
for mode in sys.argv[5:]:
    before = 0
    models = load_from_local_dir(folder, device="cpu", dtype=getattr(torch, dtype), offload=mode)
    pipeline = ZImagePipeline(**models)
    stages(64, 64)  # what only a first call does is no part of it
    gc.collect()
    put_away(models["vae"])
    before = status("VmRSS")
    found[mode] = stages(width, height)
    del models, pipeline
    gc.collect()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mid") / "mid", dtype=torch.float32, **SIZES)


def model_of(folder: Path, dtype: torch.dtype) -> MemoryModel:
    checkpoint = open_checkpoint(folder)
    return MemoryModel(
        checkpoint.transformer_config,
        checkpoint.autoencoder_config,
        checkpoint.text_encoder_config,
        dtype,
    )


@pytest.fixture(scope="module")
def published() -> MemoryModel:
    return MemoryModel(
        TransformerConfig.from_json(PUBLISHED / "transformer.json"),
        AutoencoderConfig.from_json(PUBLISHED / "vae.json"),
        TextEncoderConfig.from_json(PUBLISHED / "text_encoder.json"),
        torch.bfloat16,
    )


@pytest.mark.long
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux' /proc"
)
@pytest.mark.parametrize(
    ("dtype", "modes"),
    [
        (torch.float32, ("none",)),
        pytest.param(torch.float32, ("block",), marks=pytest.mark.slow),
        # Products in bfloat16 take minutes on a CPU without instructions for them.
        pytest.param(
            torch.bfloat16, ("phase",), marks=[pytest.mark.slow, pytest.mark.timeout(900)]
        ),
    ],
)
def test_account_is_within_a_tenth_of_what_a_process_takes(
    folder: Path, dtype: torch.dtype, modes: tuple[str, ...]
) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, "-c", PROGRAM, str(folder), str(WIDTH), str(HEIGHT), name, *modes]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment, timeout=800
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    model = model_of(folder, dtype)
    for mode in modes:
        account = model.account(Workload(HEIGHT, WIDTH, caption_tokens=512), mode)
        for stage in account.stages:
            # Without offload the weights are there before the count begins.
            computed = stage.activations if mode == "none" else stage.total
            found = measured[mode][stage.name]
            assert abs(found - computed) <= 0.1 * computed, (mode, stage, found)


def test_published_weights_take_what_is_published(published: MemoryModel) -> None:
    none = published.account(Workload(1024, 1024), "none")
    # docs of the model: 12.3 GB, 8.0 GB less the last layer and the norm, 168 MB
    weights = 6_154_908_736 + 4_022_468_096 - 100_930_816 - 2560 + 83_819_683
    assert none.stages[0].weights == 2 * weights
    assert none.host == 0
    phase = published.account(Workload(1024, 1024), "phase")
    assert [stage.weights for stage in phase.stages] == [
        2 * (4_022_468_096 - 100_930_816 - 2560),
        2 * 6_154_908_736,
        2 * 83_819_683,
    ]
    assert phase.host == 2 * weights
    block = published.account(Workload(1024, 1024), "block")
    streamed = 34 * 176_962_816 + 32 * 3_947_520
    assert block.stages[1].weights == 2 * (6_154_908_736 - streamed + 2 * 180_910_336)


@pytest.mark.parametrize(
    ("gib", "pixels", "fits"),
    [
        (8, 1024, "block"),
        (12, 1024, "block"),
        (16, 1024, "phase"),
        (24, 1024, "none"),
        # Thousands of bands are counted one by one.
        pytest.param(24, 2048, "phase", marks=pytest.mark.slow),
        pytest.param(80, 2048, "none", marks=pytest.mark.slow),
    ],
)
def test_what_fits_a_card(published: MemoryModel, gib: int, pixels: int, fits: str) -> None:
    accounts = published.accounts(Workload(pixels, pixels, guided=True))
    fitting = [mode for mode, account in accounts.items() if account.needed <= gib * GIB]
    assert fitting[0] == fits


def test_more_work_takes_more(published: MemoryModel) -> None:
    def activations(stage: str, **changes: Any) -> int:
        account = published.account(Workload(512, 512, **changes), "none")
        return next(s.activations for s in account.stages if s.name == stage)

    assert activations("denoise", guided=True) > 1.8 * activations("denoise")
    assert activations("denoise", batch_size=4) > 3.5 * activations("denoise")
    # Images are decoded one after the other; only what they end as is there for all.
    images = 3 * 4 * 3 * 512 * 512
    assert images < activations("decode", batch_size=4) - activations("decode") < 4 * images
    assert activations("encode", caption_tokens=512) > 3.9 * activations(
        "encode", caption_tokens=128
    )
    assert activations("start", from_image=True) > activations("denoise")


def test_unknown_modes_are_refused(published: MemoryModel) -> None:
    with pytest.raises(ValueError, match="offload: 'disk'; allowed: none, phase, model, block"):
        published.account(Workload(512, 512), "disk")


def test_a_loop_counts_its_largest_moment() -> None:
    with LiveBytes("cpu") as live:
        for _ in range(3):
            a = torch.zeros(1000)
            b = a + 1
            view = b[:10]
            del a
        assert live.current == 4000
        del b
        assert live.current == 4000, "a view keeps the memory"
        del view
    assert live.current == 0
    # The new `a` is made while `b` of the round before is still there.
    assert live.peak == 12000


def test_weights_that_are_known_do_not_count() -> None:
    linear = nn.Linear(100, 100, bias=False)
    with torch.no_grad(), LiveBytes("cpu", linear.parameters()) as live:
        linear(torch.zeros(1, 100))
    assert live.peak == 800


def test_fused_attention_has_the_shape_and_no_scores() -> None:
    q = torch.empty(2, 3, 5000, 8, device="meta")
    with FusedAttention(), LiveBytes("meta", [q]) as live:
        out = nn.functional.scaled_dot_product_attention(q, q, q)
    assert out.shape == q.shape
    assert live.peak == q.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_tables_of_the_documents_are_computed(quantization: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "hardware.md").read_text(encoding="utf-8")
    _, plain, eight_bits = page.split("| pixels | guidance |")
    rows = re.findall(r"^\| (\d+) x (\d+) \| (yes|no) \|(.+)\|$", plain, re.MULTILINE)
    if quantization == "int8":
        rows = re.findall(r"^\| (\d+) x (\d+) \| (yes|no) \|(.+)\|$", eight_bits, re.MULTILINE)
    assert len(rows) == 6
    model = MemoryModel(
        TransformerConfig.from_json(PUBLISHED / "transformer.json"),
        AutoencoderConfig.from_json(PUBLISHED / "vae.json"),
        TextEncoderConfig.from_json(PUBLISHED / "text_encoder.json"),
        torch.bfloat16,
        quantization,
    )
    for width, height, guidance, cells in rows:
        workload = Workload(int(height), int(width), guided=guidance == "yes")
        needed = {mode: model.account(workload, mode).needed for mode in ("none", "phase", "block")}
        fits = [
            next((mode for mode in needed if needed[mode] <= 0.97 * gib * GIB), "nothing")
            for gib in (8, 12, 16, 24, 80)
        ]
        computed = [*(f"{count / GIB:.1f}" for count in needed.values()), *fits]
        assert [cell.strip() for cell in cells.split("|")] == computed
