"""Memory while loading: the weights in their dtype, and little more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import foreign_layouts as foreign
import pytest
import torch

from zimage_core.tiny.make import make_checkpoint

MB = 1_000_000
# 75 M parameters in the transformer: 300 MB in float32.
SIZES = {"dim": 1024, "heads": 8, "axes_dims": (32, 48, 48), "layers": 4, "vocab_size": 320}
LARGEST = 2730 * 1024 * 4  # feed_forward.w1 in float32
PEAK = Path("/proc/self/clear_refs")
CONSTANT = 16 * MB  # Python objects, and a piece in its stored and its decoded form

PROGRAM = """
import json, re, sys, torch
from zimage_core.loader import load_from_local_dir
from zimage_core.stored_tensor import WeightReader  # imports are no part of it

folder, tiny, parts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
load_from_local_dir(tiny, device="cpu", dtype=torch.bfloat16)  # nor what only a first load does

def status(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

open("/proc/self/clear_refs", "w").write("5")  # begin a new peak
before = status("VmRSS")
loaded = load_from_local_dir(folder, device="cpu", dtype=torch.bfloat16, **parts)
size = sum(p.nbytes for name in ("transformer", "vae", "text_encoder")
           for p in loaded[name].parameters())
print(json.dumps({"peak": status("VmHWM") - before, "weights": size}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("wide") / "wide", dtype=torch.float32, shard_size=100 * MB, **SIZES
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny", layers=1, vocab_size=320)


def measured(folder, tiny, **parts):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(tiny), json.dumps(parts)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment, timeout=200
    )
    return json.loads(done.stdout)


@pytest.mark.long
@pytest.mark.skipif(not PEAK.exists(), reason="Linux tells the peak")
def test_float32_shards_are_cast_without_a_second_copy(folder, tiny):
    stored = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert stored > 300 * MB and len(list(folder.rglob("*-of-*.safetensors"))) > 2
    found = measured(folder, tiny)
    assert 150 * MB < found["weights"] < stored / 1.9
    assert found["peak"] < found["weights"] + LARGEST + CONSTANT, found


@pytest.mark.long
@pytest.mark.skipif(not PEAK.exists(), reason="Linux tells the peak")
@pytest.mark.parametrize("form", ["scaled float8", "gguf"])
def test_single_files_neither(folder, tiny, tmp_path, form):
    from safetensors.torch import load_file

    state = {}
    for path in (folder / "transformer").glob("*.safetensors"):
        state |= load_file(path)
    state, path = foreign.comfy_transformer(state), tmp_path / "t.safetensors"
    if form == "scaled float8":
        tensors, metadata, _ = foreign.scaled_fp8(state, old=True)
        foreign.save(tensors, path, metadata)
    else:
        import gguf

        kinds = gguf.GGMLQuantizationType
        path = tmp_path / "t.gguf"
        foreign.write_gguf(
            path,
            state,
            lambda _, t: kinds.Q8_0 if t.ndim > 1 and t.shape[-1] % 32 == 0 else kinds.F32,
        )
    found = measured(folder, tiny, transformer=str(path))
    assert found["peak"] < found["weights"] + LARGEST + CONSTANT, found
