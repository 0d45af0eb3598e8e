"""Adapters in a model's weights: merged in float32, rounded once, taken out to the last bit."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from lora_files import FORMATS, small_transformer, train, write
from torch import Tensor

from zimage_core import ZImageTransformer2DModel
from zimage_core.lora import LoraAdapter, LoraSwitcher, load_lora

INK = ("layers.0.attention.to_q", "layers.1.feed_forward.w2", "cap_embedder.1")
PIXEL = ("layers.0.attention.to_q", "layers.0.attention.to_k", "all_x_embedder.2-1")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Load = Callable[..., LoraAdapter]


@pytest.fixture
def model() -> ZImageTransformer2DModel:
    return small_transformer()


@pytest.fixture
def load(model: ZImageTransformer2DModel, tmp_path: Path) -> Load:
    def make(modules: tuple[str, ...], seed: int) -> LoraAdapter:
        tensors = FORMATS["kohya, musubi-tuner"][0](train(model, modules, seed=seed))
        return load_lora(write(tmp_path / f"{seed}.safetensors", tensors), model)

    return make


def bits(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters as integers: NaN and -0.0 compare as what they are."""
    return {n: p.detach().clone().view(torch.uint8) for n, p in model.named_parameters()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_rounds_once_and_unmerging_gives_the_same_bits(
    model: ZImageTransformer2DModel, load: Load, dtype: torch.dtype
) -> None:
    ink, pixel = load(INK, 1), load(PIXEL, 2)
    model.to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = bits(model)
    switcher = LoraSwitcher(model, {"ink": ink, "pixel": pixel})
    switcher.apply({"ink": 0.75, "pixel": -0.5})
    for name, parameter in model.named_parameters():
        exact = before[name].double()
        for adapter, scale in ((ink, 0.75), (pixel, -0.5)):
            if name in adapter.parameters:
                exact = exact + scale * adapter.delta(name, before[name]).double()
        # One rounding of a float32 sum to the dtype: half a unit in the last place, and a
        # little for the sum.
        unit = torch.finfo(dtype).eps * exact.abs()
        slack = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert ((parameter.double() - exact).abs() <= unit / 2 + slack).all(), name
        assert parameter.dtype == dtype
    changed = {name for name, value in bits(model).items() if not torch.equal(value, start[name])}
    assert changed == {f"{module}.weight" for module in {*INK, *PIXEL}}
    switcher.apply({})
    assert same(bits(model), start)


def test_a_thousandth_in_bfloat16_is_not_lost_by_rounding_twice(
    model: ZImageTransformer2DModel, load: Load
) -> None:
    """Two adapters whose changes are each below half a unit of the weight, and together above."""
    model.to(torch.bfloat16)
    parameter = model.get_parameter("layers.0.attention.to_q.weight")
    parameter.fill_(1.0)
    ink, pixel = load(INK, 1), load(PIXEL, 2)

    class Third:
        parameters = ("layers.0.attention.to_q.weight",)

        def delta(self, parameter: str, weight: Tensor) -> Tensor:
            return torch.full(weight.shape, 0.003)  # a unit of bfloat16 at 1 is 0.0078

    switcher = LoraSwitcher(model, {"a": Third(), "b": Third(), "ink": ink, "pixel": pixel})
    switcher.apply({"a": 1.0})
    assert (parameter == 1.0).all()
    switcher.apply({"a": 1.0, "b": 1.0})
    assert (parameter == 1.0078125).all()


def test_switching_leaves_no_trace(model: ZImageTransformer2DModel, load: Load) -> None:
    """What is worn does not depend on what was worn before."""
    adapters = {"ink": load(INK, 1), "pixel": load(PIXEL, 2)}
    model.to(torch.bfloat16)
    combinations: list[dict[str, float]] = [
        {},
        {"ink": 1.0},
        {"pixel": 1.0},
        {"ink": 1.0, "pixel": 0.3},
        {"pixel": 0.3, "ink": 1.0},
        {"ink": 0.25},
    ]
    alone = []
    for scales in combinations:
        fresh = small_transformer().to(torch.bfloat16)
        LoraSwitcher(fresh, adapters).apply(scales)
        alone.append(bits(fresh))
    assert same(alone[3], alone[4])  # the order of names has no part in it
    assert not same(alone[1], alone[5])
    switcher = LoraSwitcher(model, adapters)
    for i in (1, 2, 3, 1, 0, 5, 2, 2, 4, 0):
        switcher.apply(combinations[i])
        assert same(bits(model), alone[i]), i


def test_parameters_stay_the_same_objects(model: ZImageTransformer2DModel, load: Load) -> None:
    """What compiled code, or an optimiser of memory, holds on to."""
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    switcher = LoraSwitcher(model, {"ink": load(INK, 1)})
    switcher.apply({"ink": 1.0})
    switcher.apply({})
    for name, parameter in model.named_parameters():
        assert before[name][0] is parameter
        assert before[name][1] == parameter.data_ptr()


def test_what_stays_is_not_computed_again(model: ZImageTransformer2DModel, load: Load) -> None:
    calls: list[str] = []
    ink, pixel = load(INK, 1), load(PIXEL, 2)

    class Counted:
        parameters = ink.parameters

        def delta(self, parameter: str, weight: Tensor) -> Tensor:
            calls.append(parameter)
            return ink.delta(parameter, weight)

    switcher = LoraSwitcher(model, {"ink": Counted(), "pixel": pixel})
    switcher.apply({"ink": 1.0})
    assert sorted(calls) == sorted(ink.parameters)
    switcher.apply({"ink": 1.0})
    assert len(calls) == 3
    switcher.apply({"ink": 1.0, "pixel": 1.0})
    assert calls[3:] == ["layers.0.attention.to_q.weight"]  # the one that both change
    switcher.apply({"ink": 0.0, "pixel": 1.0})
    assert len(calls) == 4  # at strength 0 an adapter is not there


def test_failure_in_the_middle_is_mended_by_the_next_switch(
    model: ZImageTransformer2DModel, load: Load
) -> None:
    start = bits(model)
    ink, pixel = load(INK, 1), load(PIXEL, 2)

    class Failing:
        parameters = ink.parameters
        broken = True

        def delta(self, parameter: str, weight: Tensor) -> Tensor:
            if self.broken and parameter == ink.parameters[1]:
                raise torch.OutOfMemoryError("no room")
            return ink.delta(parameter, weight)

    failing = Failing()
    switcher = LoraSwitcher(model, {"ink": failing, "pixel": pixel})
    switcher.apply({"pixel": 1.0})
    with pytest.raises(torch.OutOfMemoryError):
        switcher.apply({"ink": 1.0})
    failing.broken = False
    switcher.apply({"ink": 1.0})
    fresh = small_transformer()
    LoraSwitcher(fresh, {"ink": ink}).apply({"ink": 1.0})
    assert same(bits(model), bits(fresh))
    failing.broken = True
    with pytest.raises(torch.OutOfMemoryError):
        switcher.apply({"ink": 0.5})
    switcher.apply({})
    assert same(bits(model), start)


def test_compiled_blocks_follow_a_switch(model: ZImageTransformer2DModel, load: Load) -> None:
    """The compiled code reads the weights that are there, and is not compiled again."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    block = model.layers[0].feed_forward
    block.compile(backend=counter)
    x = torch.randn(1, 4, 48)
    before = block(x)
    adapter = load(("layers.0.feed_forward.w1",), 3)
    switcher = LoraSwitcher(model, {"ink": adapter})
    switcher.apply({"ink": 1.0})
    fresh = small_transformer()
    LoraSwitcher(fresh, {"ink": adapter}).apply({"ink": 1.0})
    torch.testing.assert_close(block(x), fresh.layers[0].feed_forward(x))
    assert (block(x) - before).abs().max() > 0.01 * before.abs().max()
    switcher.apply({})
    assert torch.equal(block(x), before)
    assert counter.frame_count == 1


def test_whole_compiled_model_is_known_by_its_own_names(
    model: ZImageTransformer2DModel, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", FORMATS["diffusers"][0](train(model, INK)))
    compiled = torch.compile(model)
    adapter = load_lora(path, compiled)
    LoraSwitcher(compiled, {"ink": adapter}).apply({"ink": 1.0})
    assert not same(bits(model), bits(small_transformer()))


def test_names_and_scales_that_do_not_exist(model: ZImageTransformer2DModel, load: Load) -> None:
    switcher = LoraSwitcher(model, {"ink": load(INK, 1)})
    with pytest.raises(ValueError, match="LoRA 'pixel': unknown; allowed: ink"):
        switcher.apply({"pixel": 1.0})
    with pytest.raises(ValueError, match="scale of LoRA 'ink' is nan; allowed: a finite number"):
        switcher.apply({"ink": float("nan")})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_are_refused(
    model: ZImageTransformer2DModel, load: Load, dtype: torch.dtype
) -> None:
    ink = load(INK, 1)
    layer = model.layers[1].feed_forward.w2
    layer.weight = torch.nn.Parameter(layer.weight.to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"layers.1.feed_forward.w2.weight is stored as {dtype}"):
        LoraSwitcher(model, {"ink": ink})
