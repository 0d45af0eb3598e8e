"""What of an adapter's file is reported, and what is refused: file, tensor, and what is allowed."""

import json
import math
from pathlib import Path

import pytest
import torch
from lora_files import FORMATS, small_transformer, train, write
from torch import Tensor

from zimage_core import CheckpointError
from zimage_core.lora import check_lora, load_lora
from zimage_core.lora_file import lora_fingerprint
from zimage_core.transformer import ZImageTransformer2DModel

Q = "layers.0.attention.to_q"
W1, W2_A = torch.randn(4, 6), torch.randn(12, 2)


@pytest.fixture(scope="module")
def model() -> ZImageTransformer2DModel:
    return small_transformer()


def test_keys_of_nothing_here_are_reported_and_left_out(
    model: ZImageTransformer2DModel, tmp_path: Path
) -> None:
    pairs = train(model, [Q])
    foreign = ["siglip_refiner.0.attention.to_q.lora_A.weight", "made_up.lora_B.weight"]
    text = ["lora_te1_text_model_layers_0_self_attn_q_proj.lora_down.weight"]
    text += ["text_encoder.layers.0.mlp.up_proj.lora_A.weight"]
    tensors = FORMATS["diffusers"][0](pairs) | {key: torch.randn(2, 2) for key in foreign + text}
    path = write(tmp_path / "lora.safetensors", tensors)
    adapter = load_lora(path, model)
    assert adapter.parameters == (f"{Q}.weight",)
    report = adapter.report
    assert set(report.unmatched) == {*foreign, *text}
    assert set(report.matched) == set(FORMATS["diffusers"][0](pairs))
    other, of_text = sorted(report.warnings(), key=lambda line: "text encoder" in line)
    assert "2 of 6 tensors match nothing in the transformer and are left out: " in other
    assert foreign[0] in other
    assert "2 of 6 tensors are for a text encoder, which adapters do not change here" in of_text


def lora(up: Tensor, down: Tensor, module: str = Q) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


UP, DOWN = torch.randn(48, 2), torch.randn(2, 48)
GOOD = lora(UP, DOWN)
BAD: dict[str, tuple[dict[str, Tensor], list[str]]] = {
    "nothing matches": (
        {"blocks.0.attn.lora_A.weight": DOWN},
        ["none of its 1 tensors matches", "'blocks.0.attn.lora_A.weight'", "allowed: names such"],
    ),
    "a checkpoint": (
        {f"{Q}.weight": torch.randn(48, 48)},
        [f"'{Q}.weight' is for {Q}, but is no part of a LoRA"],
    ),
    "another width": (
        lora(torch.randn(96, 2), DOWN),
        [f"'{Q}.lora_B.weight' has shape [96, 2]", f"for {Q} must be [48, 2]"],
    ),
    "another depth": (
        lora(UP, torch.randn(2, 64)),
        [f"'{Q}.lora_A.weight' has shape [2, 64]", "must be [2, 48]"],
    ),
    "two ranks": (lora(torch.randn(48, 3), DOWN), ["lora_B.weight' has shape [48, 3]", "[48, 2]"]),
    "fused width": (
        lora(UP, DOWN, "layers.0.attention.qkv"),
        ["layers.0.attention.to_q and layers.0.attention.to_k and", "must be [144, 2]"],
    ),
    "no rank": (
        lora(torch.ones(48, 0), torch.ones(0, 48)),
        ["lora_A.weight' has shape [0, 48]", "must be a matrix, and not an empty one"],
    ),
    "no partner": ({f"{Q}.lora_A.weight": DOWN}, [f"'{Q}.lora_A.weight' lacks its partner, up"]),
    "half a LoKr": ({f"{Q}.lokr_w1": W1}, ["lacks its partner, lokr_w2"]),
    "half a factor": (
        {f"{Q}.lokr_w1": W1, f"{Q}.lokr_w2_a": W2_A},
        ["lacks its partner, lokr_w2_b"],
    ),
    "wrong LoKr": (
        {f"{Q}.lokr_w1": W1, f"{Q}.lokr_w2": torch.randn(12, 9)},
        [f"'{Q}.lokr_w2' has shape [12, 9]", "a change of [48, 54]; must be [48, 48]"],
    ),
    "LoKr whole and in factors": (
        {
            f"{Q}.lokr_w1": W1, f"{Q}.lokr_w1_a": torch.ones(4, 2),
            f"{Q}.lokr_w1_b": torch.ones(2, 6), f"{Q}.lokr_w2": torch.ones(12, 8),
        },
        [f"'{Q}.lokr_w1_a' has shape [4, 2]", "one of two factors of lokr_w1, which is there"],
    ),
    "wrong LoHa": (
        {
            f"{Q}.hada_w1_a": UP, f"{Q}.hada_w1_b": DOWN,
            f"{Q}.hada_w2_a": UP, f"{Q}.hada_w2_b": torch.randn(2, 47),
        },
        [f"'{Q}.hada_w2_b' has shape [2, 47]", "must be [2, 48]"],
    ),
    "the same part twice": (
        {**GOOD, f"transformer.{Q}.lora_A.weight": DOWN},
        ["are the same part twice", f"'transformer.{Q}.lora_A.weight'"],
    ),
    "fused and partly apart": (
        {**GOOD, **lora(torch.randn(144, 2), DOWN, "layers.0.attention.qkv")},
        ["changes layers.0.attention.to_q, as 'layers.0.attention.to_q.lora_A.weight' does"],
    ),
    "two kinds": ({**GOOD, f"{Q}.lokr_w1": W1}, ["parts of lora and lokr; allowed: one of them"]),
    "alpha alone": ({f"{Q}.alpha": torch.tensor(1.0)}, [f"'{Q}.alpha': has nothing to go with"]),
    "alpha of two": ({**GOOD, f"{Q}.alpha": torch.ones(2)}, ["alpha' has shape [2]", "one number"]),
    "no bias here": (
        {**GOOD, f"{Q}.lora_B.bias": torch.ones(48)},
        ["lora_B.bias' has shape [48]", "has no bias to be added to"],
    ),
    "lengths of another weight": (
        {**GOOD, f"{Q}.dora_scale": torch.ones(47, 1)},
        ["dora_scale' has shape [47, 1]", "must be [48, 1] or [1, 48]"],
    ),
    "fused lengths of columns": (
        {
            **lora(torch.randn(144, 2), DOWN, "layers.0.attention.qkv"),
            "layers.0.attention.qkv.dora_scale": torch.ones(1, 48),
        },
        ["dora_scale' has shape [1, 48]", "cannot be parted into rows"],
    ),
    "norm of another width": (
        {"layers.0.ffn_norm1.diff": torch.ones(47)},
        ["ffn_norm1.diff' has shape [47]", "must be [48]"],
    ),
    "lengths of a norm": (
        {
            "layers.0.ffn_norm1.diff": torch.ones(48),
            "layers.0.ffn_norm1.dora_scale": torch.ones(48, 1),
        },
        ["ffn_norm1.dora_scale' has shape [48, 1]", "has no matrix whose lengths it could set"],
    ),
    "LoRA of a norm": (
        lora(UP, DOWN, "layers.0.ffn_norm1"),
        ["is lora, but the weight has shape [48] and takes .diff alone"],
    ),
    **{
        f"unknown part {part}": (
            {**GOOD, f"{Q}.{part}": torch.ones(2, 2)},
            [f"'{Q}.{part}' is for {Q}, but is no part of a LoRA, LoHa, LoKr, DoRA or difference"],
        )
        for part in (
            *("lora_mid.weight", "hada_t1", "lokr_t2", "oft_blocks", "set_weight", "bias"),
            *("reshape_weight", "a1.weight", "scalar"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_from_the_header(
    model: ZImageTransformer2DModel, tmp_path: Path, case: str
) -> None:
    tensors, words = BAD[case]
    path = write(tmp_path / "lora.safetensors", tensors)
    for read in (check_lora, load_lora):
        with pytest.raises(CheckpointError) as error:
            read(path, model)
        assert str(error.value).startswith(f"{path}: ")
        for word in words:
            assert word in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers_are_refused(
    model: ZImageTransformer2DModel, tmp_path: Path, value: float
) -> None:
    up = UP.clone()
    up[3, 1] = value
    path = write(tmp_path / "lora.safetensors", lora(up, DOWN))
    with pytest.raises(CheckpointError, match=r"lora_B\.weight' holds NaN or infinity"):
        load_lora(path, model)
    path = write(tmp_path / "lora.safetensors", {**GOOD, f"{Q}.alpha": torch.tensor(value)})
    with pytest.raises(CheckpointError, match=r"to_q\.alpha' is (nan|inf); allowed"):
        load_lora(path, model)


def test_files_that_cannot_be_read(model: ZImageTransformer2DModel, tmp_path: Path) -> None:
    def refused(name: str, words: str) -> None:
        for read in (check_lora, load_lora):
            with pytest.raises(CheckpointError) as error:
                read(tmp_path / name, model)
            assert f"{tmp_path / name}: {words}" in str(error.value)

    refused("none.safetensors", "no such file")
    (tmp_path / "folder").mkdir()
    refused("folder", "is a folder; allowed: a .safetensors file")
    (tmp_path / "a.pt").write_bytes(b"PK")
    refused("a.pt", "is a pickle, which can run code")
    (tmp_path / "text.safetensors").write_text("not weights")
    refused("text.safetensors", "is corrupt, or no safetensors file")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused("pointer.safetensors", "is a Git LFS pointer, not the weights themselves")
    whole = write(tmp_path / "whole.safetensors", GOOD).read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-10])
    refused("short.safetensors", "is truncated: ")
    write(tmp_path / "empty.safetensors", {})
    refused("empty.safetensors", "holds no tensors")
    write(tmp_path / "whole_numbers.safetensors", GOOD, dtype=torch.int8)
    refused("whole_numbers.safetensors", "tensor 'layers.0.attention.to_q.lora_A.weight' is stored")
    write(tmp_path / "adapter_model.safetensors", GOOD)
    refused("adapter_model.safetensors", "adapter_config.json is missing beside it")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lora_alpha": "8"}, "lora_alpha is '8'; allowed: a number above 0"),
        ({"lora_alpha": 8, "r": 0}, "r is 0; allowed: a number above 0"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '(' is no pattern"),
        ({"peft_type": "OFT"}, "peft_type is 'OFT'; allowed: LORA, LOHA, LOKR"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': trained for weights"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True; allowed: none"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_followed(
    model: ZImageTransformer2DModel, tmp_path: Path, config: dict[str, object], words: str
) -> None:
    path = write(tmp_path / "adapter_model.safetensors", GOOD)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        load_lora(path, model)
    assert f"{tmp_path / 'adapter_config.json'}: {words}" in str(error.value)


def test_metadata_that_is_no_json(model: ZImageTransformer2DModel, tmp_path: Path) -> None:
    path = write(tmp_path / "l.safetensors", GOOD, metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(CheckpointError, match="metadata lora_adapter_metadata: is no JSON object"):
        load_lora(path, model)


def test_fingerprint_follows_all_that_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", GOOD)
    assert lora_fingerprint(path).startswith("sha256:")
    assert lora_fingerprint(write(tmp_path / "b.safetensors", GOOD)) == lora_fingerprint(path)
    other = write(tmp_path / "c.safetensors", lora(UP + 1, DOWN))
    assert lora_fingerprint(other) != lora_fingerprint(path)
    peft = write(tmp_path / "adapter_model.safetensors", GOOD)
    found = set()
    for alpha in (1, 2):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        found.add(lora_fingerprint(peft))
    assert len(found) == 2
