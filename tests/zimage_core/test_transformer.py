"""The transformer alone, against diffusers' on the same random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel as Reference
from flash_packages import BACKENDS, MODULES, install
from random_transformer import random_transformer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zimage_core import attention as attention_module
from zimage_core import layers
from zimage_core.attention import AttentionBackendError
from zimage_core.config import TransformerConfig
from zimage_core.layers import apply_rotary
from zimage_core.padding import Padding
from zimage_core.patchify import patchify, unpatchify
from zimage_core.transformer import ZImageTransformer2DModel

TINY = TransformerConfig(
    all_patch_size=(2,),
    all_f_patch_size=(1,),
    in_channels=16,
    dim=64,
    n_layers=3,
    n_refiner_layers=2,
    n_heads=2,
    n_kv_heads=2,
    norm_eps=1e-5,
    qk_norm=True,
    cap_feat_dim=48,
    rope_theta=256.0,
    t_scale=1000.0,
    axes_dims=(8, 12, 12),
    axes_lens=(1024, 512, 512),
)
SHAPES: dict[str, dict[str, Any]] = {
    "two-heads": {},
    "four-heads": {"n_heads": 4, "n_kv_heads": 4, "axes_dims": (4, 6, 6)},
    "one-refiner": {"n_refiner_layers": 1, "n_layers": 2},
    "three-refiners": {"n_refiner_layers": 3, "n_layers": 1},
    "no-qk-norm": {"qk_norm": False},
    "wide": {"dim": 384, "n_heads": 3, "n_kv_heads": 3, "axes_dims": (32, 48, 48)},
    "axes": {"axes_dims": (16, 8, 8), "axes_lens": (1536, 64, 32), "rope_theta": 100.0},
    "other-scales": {"norm_eps": 1e-3, "t_scale": 500.0, "in_channels": 4},
}


def make_model(seed: int = 0, **shape: Any) -> ZImageTransformer2DModel:
    return random_transformer(dataclasses.replace(TINY, **shape), seed)


def make_reference(model: ZImageTransformer2DModel) -> Reference:
    reference = Reference(**dataclasses.asdict(model.config))
    reference.load_state_dict(model.state_dict(), strict=True)
    return reference.to(model.dtype).eval().requires_grad_(False)


def make_inputs(
    model: ZImageTransformer2DModel, lengths: Sequence[int], size: tuple[int, int]
) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(lengths), model.in_channels, *size, generator=generator)
    width = model.config.cap_feat_dim
    return latents, [3 * torch.randn(n, width, generator=generator) for n in lengths]


def run(
    model: ZImageTransformer2DModel, latents: Tensor, time: Tensor, captions: Sequence[Tensor]
) -> Tensor:
    refined = model.embed_captions(captions)
    context = model.condition(refined, latents.shape[2], latents.shape[3])
    out: Tensor = model(latents.to(model.dtype), time, context)
    return out


def run_reference(
    reference: Reference, latents: Tensor, time: Tensor, captions: Sequence[Tensor]
) -> Tensor:
    frames = list(latents.to(reference.dtype).unsqueeze(2))
    captions = [caption.to(reference.dtype) for caption in captions]
    out = reference(frames, time.expand(len(latents)), captions, return_dict=False)[0]
    return torch.stack(out).squeeze(2)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((actual.float() - expected.float()).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ([31], (16, 16)),
        ([33], (10, 6)),
        ([31, 32, 33], (16, 24)),
        ([500, 700, 1], (10, 6)),
        ([32, 20], (8, 4)),
    ],
    ids=str,
)
def test_equals_diffusers(shape: dict[str, Any], lengths: list[int], size: tuple[int, int]) -> None:
    model = make_model(**shape)
    latents, captions = make_inputs(model, lengths, size)
    time = torch.tensor([0.3123])
    expected = run_reference(make_reference(model), latents, time, captions)
    assert distance(run(model, latents, time, captions), expected) < 1e-5


def test_equals_diffusers_with_a_time_for_each_item() -> None:
    model = make_model()
    latents, captions = make_inputs(model, [31, 70, 33], (8, 8))
    time = torch.tensor([0.0, 0.45454, 0.9876])
    expected = run_reference(make_reference(model), latents, time, captions)
    assert distance(run(model, latents, time, captions), expected) < 1e-5
    assert distance(run(model, latents, time[:1], captions), expected) > 1e-2


def test_a_batch_equals_its_items() -> None:
    model = make_model()
    latents, captions = make_inputs(model, [31, 32, 33, 200, 500], (10, 6))
    time = torch.tensor([0.7])
    together = run(model, latents, time, captions)
    for i, caption in enumerate(captions):
        assert distance(together[i : i + 1], run(model, latents[i : i + 1], time, [caption])) < 1e-5


def test_every_input_counts() -> None:
    """Parity on weights that ignore an input would prove nothing about that input."""
    model = make_model()
    latents, captions = make_inputs(model, [20], (10, 6))  # 15 patches: both kinds of pads occur
    time = torch.tensor([0.5])
    before = run(model, latents, time, captions)
    assert distance(run(model, latents, time + 0.01, captions), before) > 1e-3
    assert distance(run(model, latents, time, [captions[0][:-1]]), before) > 1e-3
    assert distance(run(model, latents, time, [captions[0].flip(0)]), before) > 1e-3
    assert distance(run(model, latents.flip(2), time, captions).flip(2), before) > 1e-3
    for name in ("x_pad_token", "cap_pad_token"):
        changed = make_model()
        getattr(changed, name).neg_()
        assert distance(run(changed, latents, time, captions), before) > 1e-3


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor | None]]:
    """Number of tokens and mask of each call of attention."""
    seen: list[tuple[int, Tensor | None]] = []

    def spy(
        q: Tensor, k: Tensor, v: Tensor, padding: Padding | None = None, backend: str | None = None
    ) -> Tensor:
        seen.append((q.shape[1], None if padding is None else padding.mask))
        return attention_module.attention(q, k, v, padding, backend)

    monkeypatch.setattr(layers, "attention", spy)
    return seen


def test_no_mask_where_padded_lengths_are_equal(masks: list[tuple[int, Tensor | None]]) -> None:
    model = make_model()
    latents, captions = make_inputs(model, [33, 64, 40], (10, 6))
    run(model, latents, torch.tensor([0.5]), captions)
    # 2 context refiners, 2 noise refiners, 3 layers; 15 patches are padded to 32.
    assert masks == [(64, None)] * 2 + [(32, None)] * 2 + [(96, None)] * 3


def test_only_padding_of_the_batch_is_masked(masks: list[tuple[int, Tensor | None]]) -> None:
    model = make_model()
    latents, captions = make_inputs(model, [5, 40], (10, 6))
    run(model, latents, torch.tensor([0.5]), captions)
    assert masks[:-3] == [(32, None)] * 2 + [(64, None)] * 2 + [(32, None)] * 2
    for num_tokens, mask in masks[-3:]:
        assert num_tokens == 96
        assert mask is not None
        assert mask.tolist() == [[True] * 64 + [False] * 32, [True] * 96]


def test_captions_are_refined_alone_and_in_any_order() -> None:
    model = make_model()
    _, captions = make_inputs(model, [31, 70, 33, 3], (8, 8))
    together = model.embed_captions(captions)
    assert [len(caption) for caption in together] == [32, 96, 64, 32]
    for refined, caption in zip(together, captions, strict=True):
        assert distance(refined, model.embed_captions([caption])[0]) < 1e-5


def test_bfloat16_is_no_further_from_float32_than_diffusers() -> None:
    model = make_model()
    latents, captions = make_inputs(model, [31, 70], (16, 16))
    time = torch.tensor([0.4])
    exact = run(model, latents, time, captions)
    model.bfloat16()
    rounded = run(model, latents, time, captions)
    assert rounded.dtype == torch.bfloat16
    reference = run_reference(make_reference(model), latents, time, captions)
    error = (rounded.float() - exact).norm() / exact.norm()
    assert error < 0.02
    assert error < 1.2 * (reference.float() - exact).norm() / exact.norm()


def test_rms_norm_accumulates_in_float32() -> None:
    x = torch.full((1, 4096), 3.0, dtype=torch.bfloat16)
    assert isinstance(make_model().layers[0].attention_norm1, torch.nn.RMSNorm)
    norm = torch.nn.RMSNorm(4096, eps=1e-5, dtype=torch.bfloat16)
    # A bfloat16 sum of 4096 nines would stop growing at 2048.
    assert norm(x).unique().tolist() == [1.0]


def test_rotary_is_a_complex_rotation() -> None:
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.linspace(0, 30, 20).view(1, 5, 1, 4)
    expected = torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(()), angles)
    )
    rotary = torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(-2)
    torch.testing.assert_close(apply_rotary(x, rotary), expected.flatten(-2))
    assert apply_rotary(x.bfloat16(), rotary).dtype == torch.bfloat16


def test_unpatchify_inverts_patchify() -> None:
    latents = torch.arange(2 * 4 * 6 * 8).view(2, 4, 6, 8)
    patches = patchify(latents, 2)
    assert patches.shape == (2, 12, 16)
    # Second patch of the first row: its rows, then its columns, channels innermost.
    assert torch.equal(patches[1, 1], latents[1, :, 0:2, 2:4].permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify(patches, 2, 6, 8), latents)


class Operators(TorchDispatchMode):
    """Records which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        if isinstance(out, Tensor):
            self.dtypes.add(out.dtype)
        return out


# Operators whose result the host must wait for, and those that upload.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "item",
    "index",
    "index_put_",
    "_to_copy",
    "lift_fresh",
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[31, 20], [31, 70, 200]], ids=str)
def test_a_step_asks_the_device_nothing(
    monkeypatch: pytest.MonkeyPatch, backend: str, lengths: list[int]
) -> None:
    """On tensors without memory whatever reads one raises."""
    install(monkeypatch)
    model = make_model()
    model.set_attention_backend(backend)
    model.to("meta")
    latents, captions = make_inputs(model, lengths, (16, 16))
    context = model.condition(model.embed_captions(captions), 16, 16)
    latents, time = latents.to("meta"), torch.tensor([0.5]).to("meta")
    with Operators() as operators:
        out = model(latents, time, context)
    assert out.shape == latents.shape
    assert "addmm" in operators.names
    assert operators.names & WAITING == set()
    # The mask is the bool, rotations are complex.
    assert operators.dtypes <= {torch.float32, torch.bool, torch.complex64}


def test_keys_equal_diffusers_and_none_is_a_buffer() -> None:
    model = make_model()
    assert set(model.state_dict()) == set(make_reference(model).state_dict())
    assert list(model.buffers()) == []


def test_is_built_on_the_meta_device_and_filled_later() -> None:
    filled = make_model()
    with torch.device("meta"):
        model = ZImageTransformer2DModel(TINY)
    assert model.device.type == "meta"
    model.load_state_dict(filled.state_dict(), assign=True)
    latents, captions = make_inputs(model, [31], (8, 8))
    time = torch.tensor([0.5])
    with torch.no_grad():
        out = run(model, latents, time, captions)
    assert torch.equal(out, run(filled, latents, time, captions))


def test_blocks_compile_without_a_graph_break() -> None:
    model = make_model()
    latents, captions = make_inputs(model, [31, 70], (8, 8))
    time = torch.tensor([0.5])
    expected = run(model, latents, time, captions)
    for block in model.layers:
        block.compile(backend="eager", fullgraph=True)
    assert distance(run(model, latents, time, captions), expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own", [True, False], ids=["own", "default"])
def test_a_mixed_batch_equals_its_items_with_every_backend(
    monkeypatch: pytest.MonkeyPatch, backend: str, own: bool
) -> None:
    monkeypatch.delenv("ZIMAGE_ATTENTION", raising=False)
    calls = install(monkeypatch)
    model = make_model()
    latents, captions = make_inputs(model, [31, 70, 33, 200], (10, 6))
    time = torch.tensor([0.7])
    expected = [
        run(model, latents[i : i + 1], time, captions[i : i + 1]) for i in range(len(captions))
    ]
    assert calls.made == []
    if own:
        model.set_attention_backend(backend)
    monkeypatch.setattr(attention_module, "_default", None if own else backend)
    assert model.attention_backend == backend
    together = run(model, latents, time, captions)
    for alone, one in zip(expected, together.split(1), strict=True):
        assert distance(one, alone) < 1e-5
    if backend in MODULES:
        # Captions of 32, 64, 64 + 32, 224 tokens behind 32 of the image, in 3 layers.
        packed = (MODULES[backend], "varlen", (4 * 32 + 32 + 96 + 64 + 224, 2, 32))
        assert calls.made.count(packed) == 3
        assert sum(kind == "varlen" for _, kind, _ in calls.made) == 3


def test_a_model_takes_auto_and_gives_it_up() -> None:
    model = make_model()
    model.set_attention_backend("auto")
    assert model.attention_backend == "native"
    assert model.layers[0].attention.backend == "native"
    model.set_attention_backend(None)
    assert model.layers[0].attention.backend is None


def test_an_unusable_backend_is_refused_when_it_is_chosen() -> None:
    model = make_model()
    with pytest.raises(AttentionBackendError, match="'flash' cannot run here"):
        model.set_attention_backend("flash")
    with pytest.raises(ValueError, match="unknown attention backend 'fast'"):
        model.set_attention_backend("fast")
    assert model.attention_backend == "native"


def test_longest_caption() -> None:
    model = make_model(axes_lens=(98, 64, 64))
    reference = make_reference(model)
    assert model.max_caption_length == 96
    latents, captions = make_inputs(model, [96], (4, 4))
    time = torch.tensor([0.5])
    expected = run_reference(reference, latents, time, captions)
    assert distance(run(model, latents, time, captions), expected) < 1e-5
    with pytest.raises(ValueError, match="97 tokens; this model takes 1 to 96"):
        model.embed_captions([torch.zeros(97, 48)])
    assert make_model(axes_lens=(97, 64, 64)).max_caption_length == 64


def test_what_does_not_fit_is_refused() -> None:
    model = make_model(axes_lens=(128, 8, 4))
    with pytest.raises(ValueError, match="0 tokens; this model takes 1 to 96"):
        model.embed_captions([torch.zeros(0, 48)])
    with pytest.raises(ValueError, match=r"shape \(5, 47\); this model takes \(tokens, 48\)"):
        model.embed_captions([torch.zeros(5, 47)])
    caption = model.embed_captions([torch.zeros(5, 48)])
    model.condition(caption, 16, 8)
    with pytest.raises(ValueError, match="9x4 patches; this model has positions for 8x4"):
        model.condition(caption, 18, 8)
    with pytest.raises(ValueError, match="8x5 patches; this model has positions for 8x4"):
        model.condition(caption, 16, 10)


def test_fresh_weights_have_pad_tokens_that_are_not_zero() -> None:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(TINY)
    for token in (model.x_pad_token, model.cap_pad_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.5)
