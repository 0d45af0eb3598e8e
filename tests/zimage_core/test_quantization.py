"""8-bit weights: which there are, what they cost, and how close the results are."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_files import FORMATS, train, write
from torch import Tensor, nn

import zimage_core.quantization as quantization_module
from zimage_core import LoraSwitcher, ZImageTransformer2DModel, generate, load_from_local_dir
from zimage_core.lora import load_lora
from zimage_core.quantization import (
    QuantizationError,
    check_quantization,
    int8_bytes,
    is_quantized,
    plain_tensors,
    to_int8,
    weight_bytes,
)
from zimage_core.text_encoder import TextEncoder
from zimage_core.tiny import fidelity
from zimage_core.tiny.make import make_checkpoint

TRAINED = Path(__file__).parents[2] / "data" / "checkpoints" / "z-image-tiny"
ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
TEXT = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "tiny"
    return make_checkpoint(folder, dim=128, layers=3, heads=4, text_dim=128, text_mlp=320)


def load(
    checkpoint: Path,
    quantization: str = "int8",
    dtype: torch.dtype = torch.float32,
    **arguments: object,
) -> dict[str, nn.Module]:
    return load_from_local_dir(
        checkpoint, device="cpu", dtype=dtype, quantization=quantization, **arguments
    )


@torch.no_grad()
def velocity(model: nn.Module) -> Tensor:
    assert isinstance(model, ZImageTransformer2DModel)
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(40, model.config.cap_feat_dim, generator=generator)
    latents = torch.randn(2, model.in_channels, 16, 24, generator=generator)
    captions = model.embed_captions([features, features[:20]])
    context = model.condition(captions, 16, 24)
    return model(latents.to(model.dtype), torch.tensor([0.3]), context).float()


@torch.no_grad()
def features(model: nn.Module) -> Tensor:
    assert isinstance(model, TextEncoder)
    out: Tensor = model(torch.randint(1000, (2, 50), generator=torch.Generator().manual_seed(6)))
    return out.float()


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference, relative."""
    return float((a - b).norm() / b.norm())


def latents(components: dict[str, nn.Module], steps: int = 4, count: int = 2) -> Tensor:
    out = generate(
        **components,
        prompt=["portrait of a woman with red hair", "a bowl of soup"] * (count // 2),
        height=128,
        width=128,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
        output_type="latent",
    )
    assert isinstance(out, Tensor)
    return out


def test_the_named_weights_have_8_bits_and_no_others(checkpoint: Path) -> None:
    components = load(checkpoint)
    found = {
        f"{name}.{key.removesuffix('.weight')}"
        for name in ("transformer", "text_encoder", "vae")
        for key, weight in components[name].named_parameters()
        if type(weight.data) is not Tensor
    }
    blocks = {f"transformer.layers.{i}.{n}" for i in range(3) for n in ATTENTION + FEED_FORWARD}
    assert found == blocks | {f"text_encoder.layers.{i}.{n}" for i in range(2) for n in TEXT}
    for name in ("transformer", "text_encoder"):
        for key, weight in components[name].named_parameters():
            kinds = {part.dtype for part in plain_tensors(weight)}
            assert (torch.int8 in kinds) == (f"{name}.{key.removesuffix('.weight')}" in found)
            assert not weight.requires_grad


def test_none_is_the_default_and_changes_nothing(checkpoint: Path) -> None:
    plain = load_from_local_dir(checkpoint, device="cpu", dtype=torch.bfloat16)
    none = load(checkpoint, "none", torch.bfloat16)
    for name in ("transformer", "text_encoder", "vae"):
        state = none[name].state_dict()
        assert all(torch.equal(t, state[key]) for key, t in plain[name].state_dict().items())
        assert all(type(parameter.data) is Tensor for parameter in none[name].parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_those_of_the_account(checkpoint: Path, dtype: torch.dtype) -> None:
    for name in ("transformer", "text_encoder", "vae"):
        plain, ours = (load(checkpoint, q, dtype)[name] for q in ("none", "int8"))
        expected = sum(
            int8_bytes(tuple(weight.shape), dtype) if is_quantized(name, key) else weight.nbytes
            for key, weight in plain.named_parameters()
        )
        assert weight_bytes(ours) == expected
        assert weight_bytes(plain) == sum(weight.nbytes for weight in plain.parameters())


def test_published_sizes_are_a_little_over_a_byte_for_each_weight() -> None:
    assert int8_bytes((3840, 10240), torch.bfloat16) == 3840 * 10240 + 5 * 3840
    assert int8_bytes((3840, 10240), torch.float16) == 3840 * 10240 + 5 * 3840 * 80
    weight = to_int8(torch.randn(96, 640, dtype=torch.float16))
    assert sum(part.nbytes for part in plain_tensors(weight)) == int8_bytes((96, 640), weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_is_off_by_at_most_half_a_step(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = to_int8(weight.clone())
    # In float16 a row has several scales, none larger than this one.
    step = weight.abs().amax(dim=1, keepdim=True).float() / 127.5
    # Plus a rounding of what is multiplied out to the weight's own dtype.
    rounding = weight.abs().float() * torch.finfo(dtype).eps
    error = (ours.dequantize().float() - weight.float()).abs()
    assert (error <= 0.51 * step + rounding).all()
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact = x.float() @ ours.dequantize(torch.float32).t()
    assert (
        distance(nn.functional.linear(x, ours).float(), exact)
        < {
            torch.float32: 1e-6,
            torch.bfloat16: 4e-3,
            torch.float16: 1e-3,
        }[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_close_to_those_of_whole_weights(checkpoint: Path, dtype: torch.dtype) -> None:
    exact = load(checkpoint, "none")
    ours = load(checkpoint, "int8", dtype)
    assert 1e-3 < distance(velocity(ours["transformer"]), velocity(exact["transformer"])) < 0.02
    assert 1e-3 < distance(features(ours["text_encoder"]), features(exact["text_encoder"])) < 0.02


def test_products_in_float16_do_not_overflow(checkpoint: Path) -> None:
    """Of whole numbers up to 127 and activations of 20 they would, before the scales."""
    weight = torch.full((8, 1024), 0.02, dtype=torch.float16)
    x = torch.full((1, 1024), 20.0, dtype=torch.float16)
    assert not (x @ torch.full((1024, 8), 127, dtype=torch.float16)).isfinite().all()
    exact = x @ weight.t()
    assert torch.allclose(nn.functional.linear(x, to_int8(weight)), exact, rtol=0.01)
    assert velocity(load(checkpoint, "int8", torch.float16)["transformer"]).isfinite().all()


def test_runs_are_bit_equal_and_differ_from_whole_weights() -> None:
    first, again = latents(load(TRAINED)), latents(load(TRAINED))
    assert torch.equal(first, again)
    assert not torch.equal(first, latents(load(TRAINED, "none")))


def test_to_quantise_what_is_kept_is_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of what is kept earns its place, on trained weights."""
    exact = latents(load(TRAINED, "none"), steps=8, count=8)
    ours = distance(latents(load(TRAINED), steps=8, count=8), exact)
    linear = (
        r".*(to_(q|k|v|out\.0)|w[123]|cap_embedder\.1|mlp\.[02]|_modulation\.[01]|linear)\.weight"
    )
    everything = {
        **quantization_module._QUANTIZED,
        "transformer": f"{linear}|all_x_embedder.*weight",
    }
    monkeypatch.setattr(quantization_module, "_QUANTIZED", everything)
    all_of_it = load(TRAINED)
    kept = (
        "t_embedder.mlp.0",
        "cap_embedder.1",
        "all_x_embedder.2-1",
        "layers.0.adaLN_modulation.0",
    )
    for name in (*kept, "noise_refiner.0.attention.to_q", "all_final_layer.2-1.linear"):
        assert type(all_of_it["transformer"].get_submodule(name).weight.data) is not Tensor
    assert distance(latents(all_of_it, steps=8, count=8), exact) > 1.05 * ours


def test_images_of_trained_weights_are_near_those_of_float32() -> None:
    def pictures(quantization: str, dtype: torch.dtype) -> list[np.ndarray]:
        prompts = ["portrait of a woman with red hair", "a bowl of soup", "an iron sword"] * 2
        components = load(TRAINED, quantization, dtype)
        return fidelity.make_pictures(components, prompts, steps=8, guidance=0.0)

    exact = pictures("none", torch.float32)
    found = fidelity.compare(pictures("int8", torch.float32), exact)
    assert found["psnr_median"] > 25
    assert found["ssim_mean"] > 0.9


@pytest.mark.parametrize("offload", ["phase", "model", "block"])
def test_offload_gives_the_same_bits(offload: str) -> None:
    assert torch.equal(latents(load(TRAINED, offload=offload)), latents(load(TRAINED)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_blocks_compile_without_a_break(checkpoint: Path, dtype: torch.dtype) -> None:
    model = load(checkpoint, "int8", dtype)["transformer"]
    before = velocity(model)
    torch.compiler.reset()
    for block in model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    assert distance(velocity(model), before) < 0.01


def test_only_one_weight_at_a_time_is_whole(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, most = 0, 0

    def counted(weight: Tensor) -> Tensor:
        nonlocal whole, most
        whole += 1
        most = max(most, whole)
        ours = to_int8(weight)
        del weight
        whole -= 1
        return ours

    monkeypatch.setattr("zimage_core.loader.to_int8", counted)
    load(checkpoint)
    assert most == 1


def test_global_switches_of_torch_stay_as_they_are(checkpoint: Path) -> None:
    from torch._inductor import config

    before = (torch.get_float32_matmul_precision(), config.coordinate_descent_tuning)
    load(checkpoint)
    assert (torch.get_float32_matmul_precision(), config.coordinate_descent_tuning) == before


def test_adapters_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    plain = load(checkpoint, "none")["transformer"]
    model = load(checkpoint)["transformer"]
    tensors = FORMATS["kohya, musubi-tuner"][0](train(plain, ("layers.0.attention.to_q",), seed=1))
    file = write(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(ValueError, match=r"Int8Tensor.*load the model without quantisation"):
        LoraSwitcher(model, {"a": load_lora(file, model)})


def test_other_names_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="quantization is 'int4'; allowed: none, int8"):
        load(checkpoint, "int4")


def test_mps_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"'int8' is not possible on MPS; allowed.*'none'"):
        check_quantization("int8", torch.device("mps"))
    check_quantization("none", torch.device("mps"))


def test_a_missing_torchao_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setattr(quantization_module, "version", missing)
    with pytest.raises(
        QuantizationError, match=r"needs torchao.*pip install 'zimage-batch\[int8\]'"
    ):
        load(checkpoint)
    load(checkpoint, "none")


def missing(package: str) -> str:
    raise quantization_module.PackageNotFoundError(package)


def test_a_torchao_that_cannot_do_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchao.quantization

    def old(**arguments: object) -> None:
        raise TypeError("unexpected keyword argument 'granularity'")

    monkeypatch.setattr(torchao.quantization, "Int8WeightOnlyConfig", old)
    with pytest.raises(QuantizationError, match=r"torchao 0\.18 or newer.*here it is \d.*granul"):
        check_quantization("int8", torch.device("cpu"))


def test_similarities_are_those_of_their_definitions() -> None:
    random = np.random.default_rng(3)
    a = random.integers(0, 256, (32, 40, 3), dtype=np.uint8)
    assert fidelity.psnr(a, a) == float("inf")
    assert fidelity.ssim(a, a) == 1.0
    off = np.full((32, 40, 3), 100, np.uint8)
    assert fidelity.psnr(off, off + np.uint8(1)) == pytest.approx(48.13, abs=0.01)
    # Constant pictures have no structure: what is left is the term of luminance.
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert fidelity.ssim(off, np.full_like(off, 150)) == pytest.approx(expected, abs=1e-9)
    assert fidelity.ssim(a, random.integers(0, 256, a.shape, dtype=np.uint8)) < 0.1


@pytest.mark.long
def test_fidelity_prints_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dtype", "float32", "--quantization", "none", "int8", "--prompts", "3"]
    fidelity.main([str(TRAINED), *arguments, "--steps", "2", "--processes", "1"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["prompts"] == 3
    reference, ours = report["runs"]
    assert (reference["dtype"], reference["quantization"]) == ("float32", "none")
    assert ours["quantization"] == "int8" and 15 < ours["psnr_worst"] < 60
    assert 0 <= ours["attributes"] <= 1
