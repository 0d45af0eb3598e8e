"""Adapter files of every producer: whose weights they change, and by how much."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from lora_files import (
    ATTENTION_FORMATS,
    CONFIG,
    FORMATS,
    MODULES,
    LowRankPair,
    diffusers_metadata,
    small_transformer,
    train,
    underscored,
    with_parts,
    write,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage_core.lora import check_lora, empty_transformer, load_lora
from zimage_core.transformer import ZImageTransformer2DModel

ATTENTION = tuple(m for m in MODULES if ".attention." in m)
Q = "layers.0.attention.to_q"


@pytest.fixture(scope="module")
def model() -> ZImageTransformer2DModel:
    return small_transformer()


def check_deltas(
    path: Path, model: ZImageTransformer2DModel, expected: Mapping[str, Tensor]
) -> None:
    """The adapter changes exactly these weights, by exactly so much."""
    adapter = load_lora(path, model)
    assert set(adapter.parameters) == {f"{module}.weight" for module in expected}
    for module, delta in expected.items():
        weight = model.get_submodule(module).weight
        found = adapter.delta(f"{module}.weight", weight)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-6 * float(delta.abs().max()))
    assert check_lora(path, empty_transformer(CONFIG)) == adapter.report


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_changes_every_module(
    model: ZImageTransformer2DModel, tmp_path: Path, form: str
) -> None:
    writer, has_alpha = FORMATS[form]
    pairs = train(model, alpha=5.0 if has_alpha else None)
    path = write(tmp_path / "lora.safetensors", writer(pairs))
    check_deltas(path, model, {name: pair.delta for name, pair in pairs.items()})
    report = load_lora(path, model).report
    assert set(report.modules) == set(pairs)
    assert report.unmatched == ()
    assert report.kinds == ("LoRA",)
    if form == "dots with copies":
        # two copies of an output and three fused ones; each pair, and the fused ones' alpha
        assert len(report.redundant) == 2 * 2 + 3 * 3
        assert all(".qkv." in key or ".out.lora" in key for key in report.redundant)
        assert "repeat others under ComfyUI's names" in " ".join(report.warnings())
    else:
        assert report.redundant == ()
        assert report.warnings() == []
        assert set(report.matched) == set(load_file(path))


@pytest.mark.parametrize("form", ATTENTION_FORMATS)
def test_formats_of_attention_alone(
    model: ZImageTransformer2DModel, tmp_path: Path, form: str
) -> None:
    pairs = train(model, ATTENTION)
    path = write(tmp_path / "lora.safetensors", ATTENTION_FORMATS[form](pairs))
    check_deltas(path, model, {name: pair.delta for name, pair in pairs.items()})


def test_every_linear_layer_has_a_name_in_every_format(tmp_path: Path) -> None:
    """A new layer in the model is reached without a change of any list."""
    model = small_transformer()
    every = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for form, (writer, _) in FORMATS.items():
        path = write(tmp_path / "lora.safetensors", writer(train(model, every)))
        assert set(load_lora(path, model).report.modules) == set(every), form


@pytest.mark.parametrize("prefix", ["lora_unet_layers_0_attention_", "layers.0.attention."])
def test_fused_attention_that_shares_one_down(
    model: ZImageTransformer2DModel, tmp_path: Path, prefix: str
) -> None:
    pair = LowRankPair(torch.randn(4, 48), torch.randn(3 * 48, 4), 2.0)
    down, up = (
        (".lora_down.weight", ".lora_up.weight")
        if "unet" in prefix
        else (".lora_A.weight", ".lora_B.weight")
    )
    tensors = with_parts({"qkv": pair}, lambda name: prefix + name, down, up, alpha=True)
    path = write(tmp_path / "lora.safetensors", tensors)
    rows = pair.delta.split(48)
    check_deltas(path, model, {f"layers.0.attention.to_{x}": rows[i] for i, x in enumerate("qkv")})


def test_rank_and_alpha_may_differ_between_modules(
    model: ZImageTransformer2DModel, tmp_path: Path
) -> None:
    pairs = {**train(model, [Q], rank=2, alpha=7.0), **train(model, ["cap_embedder.1"], rank=8)}
    path = write(tmp_path / "lora.safetensors", FORMATS["kohya, musubi-tuner"][0](pairs))
    check_deltas(path, model, {name: pair.delta for name, pair in pairs.items()})
    assert load_lora(path, model).report.ranks == (2, 8)
    assert "2 modules by LoRA of ranks 2 to 8" in load_lora(path, model).report.words()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_computed_in_float32(
    model: ZImageTransformer2DModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    pairs = train(model, [Q])
    path = write(
        tmp_path / "lora.safetensors", FORMATS["kohya, musubi-tuner"][0](pairs), dtype=dtype
    )
    pair = pairs[Q]
    expected = pair.up.to(dtype).float() @ pair.down.to(dtype).float()
    check_deltas(path, model, {Q: expected})


def test_an_alpha_given_as_a_whole_number(model: ZImageTransformer2DModel, tmp_path: Path) -> None:
    pairs = train(model, [Q], alpha=6.0)
    tensors = FORMATS["kohya, musubi-tuner"][0](pairs)
    path = tmp_path / "lora.safetensors"
    save_file({k: t.long() if t.ndim == 0 else t for k, t in tensors.items()}, path)
    check_deltas(path, model, {Q: pairs[Q].delta})


# Strengths that PEFT and diffusers write beside the tensors.


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 6, "r": 3}, 2.0),
        ({"lora_alpha": 6, "r": 3, "use_rslora": True}, 6 / math.sqrt(3)),
        ({"lora_alpha": 6, "r": 3, "alpha_pattern": {"attention.to_q": 9}}, 3.0),
        ({"lora_alpha": 6, "r": 3, "alpha_pattern": {r"layers\.\d+\.attention.to_[qk]": 1}}, 1 / 3),
        # Not the end of the name, so that it names another module.
        ({"lora_alpha": 6, "r": 3, "alpha_pattern": {"attention.to": 9}}, 2.0),
        # The tensors say the rank, whatever `r` says: rank_pattern is known to agree with them.
        ({"lora_alpha": 6, "r": 16, "rank_pattern": {"to_q": 3}}, 2.0),
    ],
    ids=str,
)
def test_strength_from_metadata_and_from_a_config_beside_the_file(
    model: ZImageTransformer2DModel, tmp_path: Path, config: dict[str, object], scale: float
) -> None:
    pairs = train(model, [Q])
    expected = {Q: pairs[Q].up @ pairs[Q].down * scale}
    metadata = diffusers_metadata(pairs, **config)
    path = write(tmp_path / "a.safetensors", FORMATS["diffusers"][0](pairs), metadata=metadata)
    check_deltas(path, model, expected)
    path = write(tmp_path / "adapter_model.safetensors", FORMATS["peft"][0](pairs))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    check_deltas(path, model, expected)


def test_an_alpha_in_the_file_goes_before_metadata(
    model: ZImageTransformer2DModel, tmp_path: Path
) -> None:
    pairs = train(model, [Q], alpha=1.0)
    metadata = diffusers_metadata(pairs, lora_alpha=30)
    tensors = FORMATS["down and up with dots"][0](pairs)
    path = write(tmp_path / "lora.safetensors", tensors, metadata=metadata)
    check_deltas(path, model, {Q: pairs[Q].delta})


# LoHa, LoKr, DoRA and differences, by the formula. test_lora_judges.py asks their makers.


def test_loha(model: ZImageTransformer2DModel, tmp_path: Path) -> None:
    parts = {
        "hada_w1_a": torch.randn(48, 2),
        "hada_w1_b": torch.randn(2, 48),
        "hada_w2_a": torch.randn(48, 2),
        "hada_w2_b": torch.randn(2, 48),
        "alpha": torch.tensor(1.0),
    }
    stem = "lora_unet_" + underscored(Q)
    path = write(tmp_path / "l.safetensors", {f"{stem}.{k}": v for k, v in parts.items()})
    first = parts["hada_w1_a"] @ parts["hada_w1_b"]
    second = parts["hada_w2_a"] @ parts["hada_w2_b"]
    check_deltas(path, model, {Q: first * second / 2})
    assert load_lora(path, model).report.kinds == ("LoHa",)


W1, W2 = torch.randn(4, 6), torch.randn(12, 8)
W1_A, W1_B = torch.randn(4, 3), torch.randn(3, 6)
W2_A, W2_B = torch.randn(12, 2), torch.randn(2, 8)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        # Two whole factors: alpha, however large, is only a mark.
        ({"lokr_w1": W1, "lokr_w2": W2, "alpha": torch.tensor(1e10)}, torch.kron(W1, W2)),
        ({"lokr_w1": W1, "lokr_w2": W2}, torch.kron(W1, W2)),
        (
            {"lokr_w1": W1, "lokr_w2_a": W2_A, "lokr_w2_b": W2_B, "alpha": torch.tensor(5.0)},
            torch.kron(W1, W2_A @ W2_B) * 2.5,
        ),
        (
            {"lokr_w1_a": W1_A, "lokr_w1_b": W1_B, "lokr_w2": W2, "alpha": torch.tensor(6.0)},
            torch.kron(W1_A @ W1_B, W2) * 2,
        ),
    ],
    ids=["whole, alpha 1e10", "whole", "second in factors", "first in factors"],
)
@pytest.mark.parametrize("stem", [f"diffusion_model.{Q}", "lycoris_" + underscored(Q)])
def test_lokr(
    model: ZImageTransformer2DModel,
    tmp_path: Path,
    stem: str,
    parts: dict[str, Tensor],
    expected: Tensor,
) -> None:
    path = write(tmp_path / "l.safetensors", {f"{stem}.{k}": v for k, v in parts.items()})
    check_deltas(path, model, {Q: expected})
    assert load_lora(path, model).report.kinds == ("LoKr",)


def test_lokr_alpha_that_half_precision_made_infinite_is_but_a_mark(
    model: ZImageTransformer2DModel, tmp_path: Path
) -> None:
    tensors = {f"{Q}.lokr_w1": W1, f"{Q}.lokr_w2": W2, f"{Q}.alpha": torch.tensor(1e10)}
    path = write(tmp_path / "l.safetensors", tensors, dtype=torch.float16)
    check_deltas(path, model, {Q: torch.kron(W1.half().float(), W2.half().float())})


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_fused_attention_of_other_kinds(
    model: ZImageTransformer2DModel, tmp_path: Path, kind: str
) -> None:
    stem = "lora_unet_layers_0_attention_qkv."
    if kind == "loha":
        tensors = {
            f"hada_w{n}_{x}": torch.randn(*shape)
            for n in (1, 2)
            for x, shape in (("a", (144, 2)), ("b", (2, 48)))
        }
        first, second = (tensors[f"hada_w{n}_a"] @ tensors[f"hada_w{n}_b"] for n in (1, 2))
        whole = first * second
    else:
        tensors = {"lokr_w1": torch.randn(9, 4), "lokr_w2": torch.randn(16, 12)}
        whole = torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])
    path = write(tmp_path / "l.safetensors", {stem + k: v for k, v in tensors.items()})
    rows = whole.split(48)
    check_deltas(path, model, {f"layers.0.attention.to_{x}": rows[i] for i, x in enumerate("qkv")})


@pytest.mark.parametrize("shape", ["(O,)", "(O, 1)", "(1, I)"])
@pytest.mark.parametrize(
    "part", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"]
)
def test_dora(model: ZImageTransformer2DModel, tmp_path: Path, part: str, shape: str) -> None:
    module = "layers.1.feed_forward.w2"
    pair = train(model, [module], alpha=1.5)[module]
    weight = model.get_submodule(module).weight
    by_row = shape != "(1, I)"
    magnitude = torch.rand(weight.shape[0] if by_row else weight.shape[1]) + 0.5
    stored = {"(O,)": magnitude, "(O, 1)": magnitude[:, None], "(1, I)": magnitude[None]}[shape]
    tensors = FORMATS["down and up with dots"][0]({module: pair})
    tensors[f"diffusion_model.{module}.{part}"] = stored
    path = write(tmp_path / "l.safetensors", tensors)
    changed = weight + pair.delta
    lengths = changed.norm(dim=1 if by_row else 0, keepdim=True)
    expected = stored.reshape(-1, 1) / lengths * changed if by_row else stored / lengths * changed
    check_deltas(path, model, {module: expected - weight})
    assert load_lora(path, model).report.kinds == ("DoRA LoRA",)


def test_dora_of_fused_attention_is_parted_by_rows(
    model: ZImageTransformer2DModel, tmp_path: Path
) -> None:
    stem = "diffusion_model.layers.0.attention.qkv"
    up, down, lengths = torch.randn(144, 2), torch.randn(2, 48), torch.rand(144, 1)
    parts = {".lora_B.weight": up, ".lora_A.weight": down, ".dora_scale": lengths}
    path = write(tmp_path / "l.safetensors", {stem + k: v for k, v in parts.items()})
    names = [f"layers.0.attention.to_{x}" for x in "qkv"]
    weight = torch.cat([model.get_submodule(name).weight for name in names])
    changed = weight + up @ down
    delta = lengths / changed.norm(dim=1, keepdim=True) * changed - weight
    check_deltas(path, model, dict(zip(names, delta.split(48), strict=True)))


def test_differences_of_weights_norms_and_biases(
    model: ZImageTransformer2DModel, tmp_path: Path
) -> None:
    weight, norm, bias = torch.randn(48, 48), torch.randn(48), torch.randn(48)
    tensors = {
        f"diffusion_model.{Q}.diff": weight,
        "diffusion_model.layers.0.attention_norm1.diff": norm,
        "lycoris_layers_1_ffn_norm2.w_norm": norm,
        "diffusion_model.layers.0.attention.q_norm.diff": norm[:24],
        "diffusion_model.x_embedder.diff_b": bias,
        "transformer.cap_embedder.1.lora_A.weight": torch.randn(2, 40),
        "transformer.cap_embedder.1.lora_B.weight": torch.randn(48, 2),
        "transformer.cap_embedder.1.lora_B.bias": bias,
    }
    adapter = load_lora(write(tmp_path / "l.safetensors", tensors), model)
    expected = {
        f"{Q}.weight": weight,
        "layers.0.attention_norm1.weight": norm,
        "layers.1.ffn_norm2.weight": norm,
        "layers.0.attention.norm_q.weight": norm[:24],
        "all_x_embedder.2-1.bias": bias,
        "cap_embedder.1.bias": bias,
    }
    assert set(adapter.parameters) == {*expected, "cap_embedder.1.weight"}
    for name, delta in expected.items():
        assert torch.equal(adapter.delta(name, model.get_parameter(name)), delta), name
