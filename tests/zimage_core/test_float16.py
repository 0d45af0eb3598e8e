"""Float16: what overflows in plain float16 is computed smaller, and the numbers stay the same."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from lora_files import FORMATS, train, write
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zimage_core import LoraSwitcher, ZImageTransformer2DModel, generate, load_from_local_dir
from zimage_core.float16 import ATTENTION_SCALE, FEED_FORWARD_SCALE, keep_in_range
from zimage_core.layers import CaptionBlock, ModulatedBlock
from zimage_core.lora import load_lora
from zimage_core.text_encoder import TextEncoder
from zimage_core.tiny.make import make_checkpoint

TRAINED = Path(__file__).parents[2] / "data" / "checkpoints" / "z-image-tiny"
# What is made larger by which power of two, so that plain float16 overflows there and nowhere else.
OVERFLOWS = {
    "output of w3": {"feed_forward.w3": 2.0**15},
    "product": {"feed_forward.w1": 2.0**2, "feed_forward.w3": 2.0**13},
    "w1 and w3": {"feed_forward.w1": 2.0**6, "feed_forward.w3": 2.0**7},
    "output of w2": {"feed_forward.w3": 2.0**7, "feed_forward.w2": 2.0**10},
    "attention": {"attention.to_out.0": 2.0**16},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("float16") / "plain", dim=64, layers=3)


def enlarge(checkpoint: Path, out: Path, scales: Mapping[str, float]) -> Path:
    """A copy of a checkpoint with the weights of some modules multiplied."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            target = out / file.relative_to(checkpoint)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix != ".safetensors":
                target.write_bytes(file.read_bytes())
                continue
            tensors = load_file(file)
            for name, tensor in tensors.items():
                for module, scale in scales.items():
                    if name.endswith(f"{module}.weight"):
                        tensors[name] = tensor * scale
            assert all(tensor.isfinite().all() for tensor in tensors.values())
            save_file(tensors, target, metadata={"format": "pt"})
    return out


def load(checkpoint: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
    return load_from_local_dir(checkpoint, device="cpu", dtype=dtype)


def plain_float16(checkpoint: Path, name: str = "transformer") -> nn.Module:
    """The same weights in float16 without the scales: float16 as it would be without them."""
    return load(checkpoint, torch.float32)[name].to(torch.float16)


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
    ids = torch.randint(1000, (2, 50), generator=torch.Generator().manual_seed(6))
    out: Tensor = model(ids)
    return out.float()


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference, relative."""
    return float((a - b).norm() / b.norm())


def test_without_overflow_nothing_is_lost(checkpoint: Path) -> None:
    exact = velocity(load(checkpoint, torch.float32)["transformer"])
    plain = velocity(plain_float16(checkpoint))
    ours = velocity(load(checkpoint, torch.float16)["transformer"])
    # Both are as far from float32 as float16's rounding makes them, and no further apart.
    assert distance(plain, exact) < 2e-3
    assert distance(ours, exact) < 1.1 * distance(plain, exact)
    assert distance(ours, plain) < 2e-3


@torch.no_grad()
def test_a_block_is_bit_equal_where_no_value_is_subnormal(checkpoint: Path) -> None:
    plain = plain_float16(checkpoint).context_refiner[0]
    ours = load(checkpoint, torch.float16)["transformer"].context_refiner[0]
    smallest = []
    for block in (plain, ours):
        # Nothing cancels and nothing is small: all of these are positive.
        for weight in (*block.feed_forward.parameters(), block.attention.to_v.weight):
            weight.copy_(weight.abs() + 0.1)
        block.attention.to_out[0].weight.abs_()
        block.ffn_norm1.weight.fill_(1.0)
        block.attention_norm1.weight.fill_(1.0)
        for module in (block.feed_forward.w3, block.feed_forward.w2, block.attention.to_out[0]):
            module.register_forward_hook(
                lambda module, inputs, output: smallest.append(
                    float(min(inputs[0].abs().min(), output.abs().min()))
                )
            )
    x = torch.rand(2, 32, 64, generator=torch.Generator().manual_seed(7)).half() + 0.5
    norms = []
    for block in (plain, ours):
        mixed = block.attention.to_out[0](x)
        mapped = block.feed_forward(block.ffn_norm1(x))
        norms.append((block.attention_norm2(mixed), block.ffn_norm2(mapped), mixed, mapped))
    assert min(smallest) >= torch.finfo(torch.float16).smallest_normal
    assert torch.equal(norms[1][2], norms[0][2] * ATTENTION_SCALE)
    assert torch.equal(norms[1][3], norms[0][3] * FEED_FORWARD_SCALE)
    assert torch.equal(norms[1][0], norms[0][0])
    assert torch.equal(norms[1][1], norms[0][1])


@pytest.mark.parametrize("exponent", [0, -4, -8, -12, -16, -24])
def test_a_norm_counts_with_a_tiny_eps(exponent: int) -> None:
    """In float16 it would be 0: the norm must add it in float32."""
    eps = 1e-5
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(8)).half() * 2.0**exponent
    norm = nn.RMSNorm(128, eps=eps * FEED_FORWARD_SCALE**2)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    assert torch.allclose(norm.half()(x).double(), exact, rtol=2e-3, atol=1e-6)


def test_small_outputs_lose_less_than_bfloat16_does(checkpoint: Path, tmp_path: Path) -> None:
    """The scaled activations are subnormal here; eps keeps what is lost below bfloat16's."""
    small = {"feed_forward.w2": 2.0**-8, "attention.to_out.0": 2.0**-8}
    folder = enlarge(checkpoint, tmp_path / "small", small)
    exact = velocity(load(folder, torch.float32)["transformer"])
    ours = velocity(load(folder, torch.float16)["transformer"])
    theirs = velocity(load(folder, torch.bfloat16)["transformer"])
    assert distance(ours, exact) < 0.5 * distance(theirs, exact)


@pytest.mark.parametrize("name", OVERFLOWS)
def test_overflow_is_kept_from_happening(checkpoint: Path, tmp_path: Path, name: str) -> None:
    folder = enlarge(checkpoint, tmp_path / "large", OVERFLOWS[name])
    plain = velocity(plain_float16(folder))
    assert not plain.isfinite().all()
    exact = velocity(load(folder, torch.float32)["transformer"])
    ours = velocity(load(folder, torch.float16)["transformer"])
    assert ours.isfinite().all()
    assert distance(ours, exact) < 3e-3


@pytest.mark.parametrize("stack", ["layers", "noise_refiner", "context_refiner"])
def test_each_stack_of_blocks_is_protected(checkpoint: Path, tmp_path: Path, stack: str) -> None:
    scales = {f"{stack}.0.feed_forward.w3": 2.0**14, f"{stack}.0.attention.to_out.0": 2.0**16}
    folder = enlarge(checkpoint, tmp_path / "large", scales)
    assert not velocity(plain_float16(folder)).isfinite().all()
    exact = velocity(load(folder, torch.float32)["transformer"])
    assert distance(velocity(load(folder, torch.float16)["transformer"]), exact) < 3e-3


def test_products_of_the_text_encoder_do_not_overflow(checkpoint: Path, tmp_path: Path) -> None:
    scales = {"mlp.up_proj": 2.0**15, "mlp.down_proj": 2.0**-12}
    folder = enlarge(checkpoint, tmp_path / "large", scales)
    assert not features(plain_float16(folder, "text_encoder")).isfinite().all()
    exact = features(load(folder, torch.float32)["text_encoder"])
    ours = features(load(folder, torch.float16)["text_encoder"])
    assert distance(ours, exact) < 3e-3


def test_the_text_encoder_is_as_exact_as_without_scales(checkpoint: Path) -> None:
    exact = features(load(checkpoint, torch.float32)["text_encoder"])
    plain = features(plain_float16(checkpoint, "text_encoder"))
    ours = features(load(checkpoint, torch.float16)["text_encoder"])
    assert distance(ours, exact) < 1.1 * distance(plain, exact) < 2e-3


def test_a_stream_of_the_text_encoder_beyond_the_range_is_infinite(
    checkpoint: Path, tmp_path: Path
) -> None:
    """What is not protected, as docs/float16.md says: no norm stands behind the stream."""
    folder = enlarge(checkpoint, tmp_path / "large", {"mlp.down_proj": 2.0**16})
    assert not features(load(folder, torch.float16)["text_encoder"]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_are_left_alone(checkpoint: Path, dtype: torch.dtype) -> None:
    for model in (load(checkpoint, dtype)[name] for name in ("transformer", "text_encoder")):
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
            if isinstance(module, CaptionBlock | ModulatedBlock):
                assert module.ffn_norm2.eps == module.attention_norm2.eps == 1e-5


def test_state_dicts_are_unchanged(checkpoint: Path) -> None:
    for name in ("transformer", "text_encoder"):
        ours, plain = load(checkpoint, torch.float16)[name], plain_float16(checkpoint, name)
        assert list(ours.state_dict()) == list(plain.state_dict())
        assert all(torch.equal(t, plain.state_dict()[key]) for key, t in ours.state_dict().items())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_keep_in_range(checkpoint: Path, tmp_path: Path, backend: str) -> None:
    folder = enlarge(checkpoint, tmp_path / "large", OVERFLOWS["product"])
    model = load(folder, torch.float16)["transformer"]
    before = velocity(model)
    torch.compiler.reset()
    for block in model.layers:
        block.compile(fullgraph=True, backend=backend)
    after = velocity(model)
    assert after.isfinite().all()
    assert distance(after, before) < 2e-3


def test_adapters_are_merged_and_taken_out(checkpoint: Path, tmp_path: Path) -> None:
    folder = enlarge(checkpoint, tmp_path / "large", {"feed_forward.w3": 2.0**14})
    modules = (
        "layers.0.feed_forward.w3",
        "layers.1.attention.to_out.0",
        "layers.2.feed_forward.w2",
    )
    exact, ours = (load(folder, dtype)["transformer"] for dtype in (torch.float32, torch.float16))
    tensors = FORMATS["kohya, musubi-tuner"][0](train(exact, modules, seed=3))
    file = write(tmp_path / "lora.safetensors", tensors)
    results, before = [], velocity(ours)
    for model in (exact, ours):
        switcher = LoraSwitcher(model, {"a": load_lora(file, model)})
        switcher.apply({"a": 1.0})
        results.append(velocity(model))
    assert distance(results[1], results[0]) < 3e-3
    assert distance(results[1], before) > 0.01
    switcher.apply({})
    assert torch.equal(velocity(ours), before)


@pytest.mark.parametrize(
    ("force_upcast", "dtype", "expected"),
    [
        (True, torch.float16, torch.float32),
        (False, torch.float16, torch.float16),
        (True, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_autoencoder_is_float32_where_its_configuration_says_so(
    checkpoint: Path,
    tmp_path: Path,
    force_upcast: bool,
    dtype: torch.dtype,
    expected: torch.dtype,
) -> None:
    folder = enlarge(checkpoint, tmp_path / "copy", {})
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"force_upcast": force_upcast}))
    models = load(folder, dtype)
    assert {parameter.dtype for parameter in models["vae"].parameters()} == {expected}
    assert {parameter.dtype for parameter in models["transformer"].parameters()} == {dtype}


def test_images_of_trained_weights_are_those_of_float32() -> None:
    def images(dtype: torch.dtype) -> Tensor:
        out = generate(
            **load(TRAINED, dtype),
            prompt=["portrait of a woman with red hair", "a bowl of soup", "an iron sword"],
            height=128,
            width=128,
            generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
            output_type="pt",
        )
        assert isinstance(out, Tensor)
        return out

    exact, ours = images(torch.float32), images(torch.float16)
    assert ours.isfinite().all()
    errors = (exact - ours).square().mean((1, 2, 3))
    assert (-10 * errors.log10()).min() > 40  # decibels, of colors in [0, 1]


def test_another_model_is_left_as_it_is() -> None:
    module = nn.Linear(4, 4)
    keep_in_range(module)
    assert not module._forward_hooks and not module._forward_pre_hooks
