"""Compiled blocks: the same numbers, few compilations, and the same code whatever comes first.

Most tests compile for a backend that counts, records the operators and runs them as they are; those
marked slow compile C++ with Inductor, which takes a minute where its cache is empty.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from flash_packages import BACKENDS, install
from lora_files import FORMATS, train, write
from torch import Generator, Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from zimage_core import loader
from zimage_core.compilation import CompileError, can_compile, check_compile, compile_blocks
from zimage_core.generation import generate
from zimage_core.loader import load_from_local_dir
from zimage_core.lora import LoraAdapter, LoraSwitcher, load_lora
from zimage_core.pipeline import ZImagePipeline
from zimage_core.tiny.make import make_checkpoint
from zimage_core.transformer import ZImageTransformer2DModel

TOLERANCE = 1e-5
# Forty captions, each of another length, in several buckets of 32 tokens.
PROMPTS = [" ".join(["a red hat"] * n) for n in range(1, 41)]
# Captions of batches that a model is given without a pipeline, which would group them.
MIXED = [[31, 70], [31, 33, 200], [64, 20, 90, 90, 31], [100, 1, 30, 64, 65, 40, 20]]
SMALL: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 2}
SIZES = {"layers": 3, "refiners": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return make_checkpoint(path, dtype=torch.float32, **SIZES)


@pytest.fixture(scope="module", autouse=True)
def no_traces() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def counted_anew() -> None:
    counters.clear()


@pytest.fixture(scope="module")
def shared(folder: Path) -> tuple[dict[str, Any], Counter]:
    """A compiled model for tests that leave it as it was; each needs no third compilation."""
    return compiled(folder)


def load(folder: Path, **options: Any) -> dict[str, Any]:
    return load_from_local_dir(folder, device="cpu", dtype=torch.float32, **options)


class Counter:
    """A backend that runs what it is asked to compile as it is, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        self.count += 1
        return graph.forward


class Recorder:
    """A backend that keeps the operators which a compiler would be given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return aot_autograd(fw_compiler=self._record, inference_compiler=self._record)(
            graph, inputs
        )

    def _record(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        self.graphs.append(graph)
        return graph.forward


def compiled(folder: Path, **options: Any) -> tuple[dict[str, Any], Counter]:
    components, counter = load(folder, **options), Counter()
    compile_blocks(components["transformer"], "cpu", backend=counter)
    return components, counter


def make(components: dict[str, Any], prompts: Sequence[str], first: int = 0, **more: Any) -> Tensor:
    generators = [Generator().manual_seed(first + i) for i in range(len(prompts))]
    arguments = {**SMALL, "output_type": "latent", **more}
    latents = generate(**components, prompt=list(prompts), generator=generators, **arguments)
    assert isinstance(latents, Tensor)
    return latents


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((actual.float() - expected.float()).abs().max() / expected.abs().max()).item()


def num_buckets(components: dict[str, Any], prompts: Sequence[str]) -> int:
    lengths = ZImagePipeline(**components).caption_lengths(prompts)
    return len({-(-length // 32) for length in lengths})


def make_all(components: dict[str, Any], batch: int, **more: Any) -> Tensor:
    """All prompts in batches of a size, the last one smaller."""
    starts = range(0, len(PROMPTS), batch)
    return torch.cat([make(components, PROMPTS[i : i + batch], i, **more) for i in starts])


@pytest.mark.long
@pytest.mark.parametrize(
    "backend",
    [b if b == "native" else pytest.param(b, marks=pytest.mark.slow) for b in BACKENDS],
)
def test_forty_lengths_need_no_compilation_of_their_own(
    monkeypatch: pytest.MonkeyPatch, folder: Path, backend: str
) -> None:
    install(monkeypatch)
    components, counter = compiled(folder, attention=backend)
    plain = load(folder)
    assert counter.count == 2  # one image, several images: both while loading
    assert num_buckets(components, PROMPTS) >= 4
    expected = make_all(plain, 7)
    for batch in (1, 7):
        assert distance(make_all(components, batch), expected) < TOLERANCE
    guided: dict[str, Any] = {"guidance_scale": 3.0, "negative_prompt": PROMPTS[30]}
    expected = make(plain, PROMPTS[::9], **guided)
    assert distance(make(components, PROMPTS[::9], **guided), expected) < TOLERANCE
    assert counter.count == 2
    assert not counters["graph_break"]
    for lengths in MIXED:
        actual, expected = (step(c["transformer"], lengths) for c in (components, plain))
        assert distance(actual, expected) < TOLERANCE
    assert counter.count == 3  # not one for each number of sequences


def test_other_sizes_need_none_either(folder: Path, shared: tuple[dict[str, Any], Counter]) -> None:
    components, counter = shared
    plain = load(folder)
    for width, height in ((16, 16), (48, 208), (256, 256), (512, 64)):
        size = {"width": width, "height": height}
        for prompts in (PROMPTS[:1], PROMPTS[:3]):
            expected = make(plain, prompts, **size)
            assert distance(make(components, prompts, **size), expected) < TOLERANCE
    assert counter.count == 2


def test_a_length_that_equals_a_size_of_the_model(
    folder: Path, shared: tuple[dict[str, Any], Counter]
) -> None:
    """The number of tokens passes through the width of the model and of its heads."""
    components, counter = shared
    transformer, plain = components["transformer"], load(folder)["transformer"]
    lengths = range(32, 2 * transformer.config.dim, 32)
    assert transformer.config.dim in [32 + n for n in lengths]
    for n in lengths:
        for batch in (1, 2, 3):
            actual, expected = (step(m, [n] * batch) for m in (transformer, plain))
            assert distance(actual, expected) < TOLERANCE
    assert counter.count == 2


def step(
    model: ZImageTransformer2DModel, lengths: Sequence[int], times: int = 1, time: float = 0.5
) -> Tensor:
    """One evaluation at 64 x 64 with captions of some lengths, without gradients."""
    generator = Generator().manual_seed(1)
    latents = torch.randn(len(lengths), model.in_channels, 8, 8, generator=generator)
    width = model.config.cap_feat_dim
    captions = [torch.randn(n, width, generator=generator) for n in lengths]
    with torch.no_grad():
        context = model.condition(model.embed_captions(captions), 8, 8)
        velocity: Tensor = model(latents, torch.full((times,), time), context)
    return velocity


@pytest.mark.long
@pytest.mark.parametrize(
    "backend", ["native", *(pytest.param(b, marks=pytest.mark.slow) for b in BACKENDS[1:])]
)
def test_graphs_neither_wait_nor_know_complex_numbers(
    monkeypatch: pytest.MonkeyPatch, folder: Path, backend: str
) -> None:
    install(monkeypatch)
    model, recorder = load(folder, attention=backend)["transformer"], Recorder()
    compile_blocks(model, "cpu", backend=recorder)
    step(model, MIXED[0])
    assert len(recorder.graphs) == 3
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "item", "index", "index_put"}
    operator = {"native": "_scaled_dot_product_flash_attention_for_cpu"}.get(backend, backend)
    for graph in recorder.graphs:
        names, dtypes = set(), set()
        for node in graph.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                names.add(node.target.overloadpacket.__name__)
            value = node.meta.get("val")
            values = value if isinstance(value, list | tuple) else [value]
            dtypes |= {v.dtype for v in values if isinstance(v, Tensor)}
        assert "rsqrt" in names or "_fused_rms_norm" in names
        assert any(operator.lstrip("_") in name for name in names)
        assert names & waiting == set()
        assert not any(dtype.is_complex for dtype in dtypes)
        assert torch.float32 in dtypes


def test_the_refiners_are_left_alone(shared: tuple[dict[str, Any], Counter]) -> None:
    transformer = shared[0]["transformer"]
    for blocks in (transformer.noise_refiner, transformer.context_refiner):
        assert all("forward" not in vars(block) for block in blocks)
    assert len({id(block.forward.__func__) for block in transformer.layers}) == 1


def test_another_thread_finds_the_code(
    folder: Path, shared: tuple[dict[str, Any], Counter]
) -> None:
    """A worker loads in one thread and runs in others; settings of PyTorch's are a thread's own."""
    components, counter = shared
    threads = torch.get_num_threads()

    def work() -> Tensor:
        torch.set_num_threads(threads)
        return torch.cat([make(components, PROMPTS[:1]), make(components, PROMPTS[3:8], 3)])

    with ThreadPoolExecutor(1) as pool:
        actual = pool.submit(work).result()
    assert counter.count == 2
    assert torch.equal(actual, work())


@pytest.mark.long
def test_no_limit_of_compilations_is_met(folder: Path) -> None:
    """Neither PyTorch's for one function nor the one for all that were ever made of it."""
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=5):
        for _ in range(2):
            components, counter = compiled(folder)
            step(components["transformer"], [31, 31], times=2)
            assert counter.count == 3


def test_hooks_of_blocks_stay_outside(folder: Path) -> None:
    """Such as those that move weights, and could not be compiled."""
    components = load(folder)
    calls: list[Any] = []

    @torch.compiler.disable
    def hook(block: Any, arguments: Any) -> None:
        calls.append(block)

    for block in components["transformer"].layers:
        block.register_forward_pre_hook(hook)
    compile_blocks(components["transformer"], "cpu", backend=Counter())
    calls.clear()
    make(components, PROMPTS[:1])
    assert calls == list(components["transformer"].layers) * 2


def make_adapter(model: ZImageTransformer2DModel, path: Path) -> LoraAdapter:
    modules = ("layers.0.attention.to_q", "layers.1.feed_forward.w2", "layers.2.attention.to_v")
    tensors = FORMATS["kohya, musubi-tuner"][0](train(model, modules, seed=3))
    return load_lora(write(path / "ink.safetensors", tensors), model)


def check_switching(folder: Path, path: Path, components: dict[str, Any]) -> None:
    """Adapters put into the compiled model do what they do in another, and leave no trace."""
    plain = load(folder)
    adapter = make_adapter(plain["transformer"], path)
    before = make(components, PROMPTS[:3])
    switchers = [LoraSwitcher(c["transformer"], {"ink": adapter}) for c in (components, plain)]
    for scale in (1.0, -0.5):
        for switcher in switchers:
            switcher.apply({"ink": scale})
        expected = make(plain, PROMPTS[:3])
        assert distance(make(components, PROMPTS[:3]), expected) < TOLERANCE
        assert distance(before, expected) > 1e-3
    switchers[0].apply({})
    assert torch.equal(make(components, PROMPTS[:3]), before)


def test_adapters_are_switched_without_compiling(
    folder: Path, tmp_path: Path, shared: tuple[dict[str, Any], Counter]
) -> None:
    components, counter = shared
    check_switching(folder, tmp_path, components)
    assert counter.count == 2


def test_mps_is_refused() -> None:
    with pytest.raises(CompileError, match="not possible on MPS; load with compile=False"):
        check_compile("mps")


@pytest.fixture
def no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(loader, "_fill", fail)


@pytest.mark.usefixtures("no_weights_are_read")
def test_a_cpu_without_a_compiler_is_refused(folder: Path) -> None:
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert not can_compile("cpu")
        with pytest.raises(ValueError, match="not possible on a CPU without a C\\+\\+ compiler"):
            load(folder, compile=True)
    assert can_compile("cpu")


def test_cuda_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(CompileError, match=r"without the package triton \(ModuleNotFoundError"):
        check_compile("cuda")
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    check_compile("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.raises(CompileError, match="before Volta"):
        check_compile("cuda")


def test_a_python_that_pytorch_cannot_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.eval_frame, "is_dynamo_supported", lambda: False)
    with pytest.raises(CompileError, match="under Python 3"):
        check_compile("cpu")


def test_a_compiler_that_fails_is_one_error(folder: Path) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("ld: cannot find -lomp")

    transformer = load(folder)["transformer"]
    message = "blocks do not compile: .*cannot find -lomp; load with compile=False"
    with pytest.raises(CompileError, match=message):
        compile_blocks(transformer, "cpu", backend=backend)


# From here on with Inductor, as `load_from_local_dir(compile=True)` compiles.


def num_compilations() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_inductor_is_near_and_compiles_twice(
    monkeypatch: pytest.MonkeyPatch, folder: Path, backend: str
) -> None:
    install(monkeypatch)
    plain, components = load(folder), load(folder, attention=backend, compile=True)
    assert num_compilations() == 2
    expected = make_all(plain, 7)
    for batch in (1, 7):
        assert distance(make_all(components, batch), expected) < TOLERANCE
    guided: dict[str, Any] = {"guidance_scale": 3.0, "negative_prompt": PROMPTS[30]}
    expected = make(plain, PROMPTS[::9], **guided)
    assert distance(make(components, PROMPTS[::9], **guided), expected) < TOLERANCE
    assert num_compilations() == 2
    assert not counters["graph_break"]
    for lengths in MIXED:
        actual, expected = (step(c["transformer"], lengths) for c in (components, plain))
        assert distance(actual, expected) < TOLERANCE
    assert num_compilations() == 3


@pytest.mark.slow
def test_inductor_follows_adapters(folder: Path, tmp_path: Path) -> None:
    check_switching(folder, tmp_path, load(folder, compile=True))
    assert num_compilations() == 2


_ORDERED = """
import hashlib, sys, torch
from torch import Generator
from zimage_core import generate, load_from_local_dir

folder, order = sys.argv[1:]
torch.set_num_threads(1)
components = load_from_local_dir(folder, device="cpu", dtype=torch.float32, compile=True)
cases = {
    "a": ([0], 64, 64), "b": ([7, 8, 9], 64, 64), "c": ([39], 208, 48), "d": ([20, 21], 128, 128),
}
for name in order:
    indices, height, width = cases[name]
    latents = generate(
        **components, prompt=[" ".join(["a red hat"] * (i + 1)) for i in indices],
        height=height, width=width, num_inference_steps=2, output_type="latent",
        generator=[Generator().manual_seed(i) for i in indices],
    )
    print(name, hashlib.sha256(latents.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_bytes_do_not_depend_on_what_comes_first(folder: Path, tmp_path: Path) -> None:
    """Fresh processes that share no cache, the shapes the other way round."""
    found = []
    for order in ("abcd", "dcba"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / order)}
        ended = subprocess.run(
            [sys.executable, "-c", _ORDERED, str(folder), order],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(dict(line.split() for line in ended.stdout.splitlines()))
    assert set(found[0]) == set("abcd")
    assert found[0] == found[1]
