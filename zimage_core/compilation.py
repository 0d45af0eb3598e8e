"""Compiled blocks: the main blocks of a transformer through `torch.compile`, each by itself.

Refiners stay as they are: they run on other lengths, or once for a caption, and a compilation
that serves both is tuned for the wrong one (https://github.com/sgl-project/sglang/pull/35755).

**The same code whatever comes first.** A job promises the same bytes in any order, and code that is
compiled depends on the shapes it is first called with: sizes become constants or variables, and
loops are cut for their number. So every size that may vary is a variable from the start, and the
blocks are compiled when they are loaded, on shapes that depend on nothing but the model and the
kind of device. Batches of one and of several are two compilations, because PyTorch treats a size of
one as a constant; nothing that a pipeline then asks for is a third.
"""

from __future__ import annotations

import importlib
import inspect
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zimage_core.layers import ModulatedBlock
from zimage_core.modulation import Modulation

if TYPE_CHECKING:
    from zimage_core.transformer import ZImageTransformer2DModel

# Compilations of one model that may exist at once. A pipeline needs two; those who call a model
# directly can bring about a dozen (gradients or none, padding or none, a time for each image).
# At the limit PyTorch would raise, with its own limit of 8 too early.
_MAX_VARIANTS = 64
# Tokens of the canonical shapes: an image of 1024 x 1024 and a caption of 64 tokens where it is
# compiled for speed; fewer on a CPU, where loading would wait for them.
_CUDA_TOKENS = 4096 + 64
_OTHER_TOKENS = 256 + 32
_TOKEN_STEP = 32


class CompileError(ValueError):
    """Blocks cannot be compiled here; the message says what is missing."""


def check_compile(device: torch.device | str) -> None:
    """Check, before weights are read, that blocks can be compiled for a device.

    Raises:
        CompileError: MPS; CUDA without a Triton that works, or before Volta; a CPU without a C++
            compiler; a Python that is too new for this PyTorch.
    """
    missing = _missing(torch.device(device))
    if missing is not None:
        raise CompileError(f"compile is not possible {missing}; load with compile=False")


def can_compile(device: torch.device | str) -> bool:
    """Whether `check_compile` would pass."""
    return _missing(torch.device(device)) is None


def compile_blocks(
    transformer: ZImageTransformer2DModel,
    device: torch.device | str,
    *,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Compile the main blocks of a transformer in place, now.

    The choice of the attention backend is fixed first: it is a part of the code, as are the number
    of threads and the modes of PyTorch at the time.

    Args:
        transformer: with its weights where they are when it runs.
        device: where it runs.
        backend: of `torch.compile`.

    Raises:
        CompileError: it cannot be compiled; the message has the compiler's reason.
    """
    from torch._dynamo.exc import TorchDynamoException

    # A function of its own for each model: PyTorch counts compilations by the function's code.
    own = FunctionType(_run_block.__code__.replace(), _run_block.__globals__, "block")
    transformer.set_attention_backend(transformer.attention_backend)
    try:
        compiled = torch.compile(own, **_arguments(backend))
        for block in transformer.layers:
            block.forward = MethodType(compiled, block)
        with torch.no_grad():
            for arguments in _canonical_arguments(transformer, torch.device(device)):
                transformer.layers[0](*arguments)
    except TorchDynamoException as error:
        # The first line may be but the words in front of the compiler's own.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CompileError(
            "compile is not possible: the transformer's blocks do not compile: "
            f"{type(error).__name__}: {' '.join(lines[:2])}; load with compile=False"
        ) from error


@contextmanager
def uncompiled(transformer: ZImageTransformer2DModel) -> Iterator[None]:
    """Run a transformer's blocks as they are written while the context lasts."""
    compiled = [(block, block.__dict__.pop("forward", None)) for block in transformer.layers]
    try:
        yield
    finally:
        for block, forward in compiled:
            if forward is not None:
                block.forward = forward


def _run_block(block: ModulatedBlock, *arguments: Any) -> Tensor:
    return ModulatedBlock.forward(block, *arguments)


def _arguments(backend: str | Callable[..., Any]) -> dict[str, Any]:
    import torch._dynamo.config
    import torch._inductor.config

    arguments: dict[str, Any] = {"fullgraph": True, "dynamic": True, "backend": backend}
    if backend == "inductor" and hasattr(torch._inductor.config, "deterministic"):
        # Otherwise kernels of reductions may be chosen by how fast they ran, worker by worker.
        arguments["options"] = {"deterministic": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        arguments["recompile_limit"] = _MAX_VARIANTS
    else:  # before it was an argument; later the setting is one of the thread that made it
        torch._dynamo.config.cache_size_limit = max(
            torch._dynamo.config.cache_size_limit, _MAX_VARIANTS
        )
    return arguments


def _canonical_arguments(
    transformer: ZImageTransformer2DModel, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, None, Modulation]]:
    """Arguments of a block for one image and for several.

    PyTorch takes sizes that are equal in these arguments for one and the same, and a size that
    equals one of the weights' for a constant: so the two that vary are unlike all others.
    """
    dim = transformer.config.dim
    taken = {dim, transformer.head_dim, 1}
    taken |= {size for p in transformer.layers[0].parameters() for size in p.shape}
    tokens = _CUDA_TOKENS if device.type == "cuda" else _OTHER_TOKENS
    while tokens in taken:
        tokens += _TOKEN_STEP
    several = 2
    while several in taken:
        several += 1
    rotary = torch.zeros(1, tokens, 1, transformer.head_dim, device=device)
    # Each with memory of its own: that a tensor is a view would become a part of the code.
    vectors = [torch.zeros(1, 1, dim, device=device, dtype=transformer.dtype) for _ in range(4)]
    for batch in (1, several):
        x = torch.zeros(batch, tokens, dim, device=device, dtype=transformer.dtype)
        yield x, rotary, None, Modulation(*vectors)


def _missing(device: torch.device) -> str | None:
    """Where compiling is not possible, in words that end a sentence; None where it is."""
    if device.type == "mps":
        return "on MPS"
    from torch._dynamo.eval_frame import is_dynamo_supported

    if not is_dynamo_supported():
        return f"under Python {platform.python_version()} with torch {torch.__version__}"
    if device.type == "cuda":
        return _missing_on_cuda(device)
    if device.type == "cpu" and not _has_cpp_compiler():
        return "on a CPU without a C++ compiler: neither g++ nor what $CXX names can be run"
    return None


def _missing_on_cuda(device: torch.device) -> str | None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (7, 0):
        return "on GPUs before Volta (compute capability 7.0), which Triton does not serve"
    try:
        importlib.import_module("triton")
    except (ImportError, OSError, RuntimeError) as error:
        return f"on CUDA without the package triton ({type(error).__name__}: {error})"
    return None


def _has_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
