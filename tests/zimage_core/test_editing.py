"""The transformer with pictures beside the image, against diffusers and its description."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel as Reference
from edit_reference import reference_velocity
from random_transformer import random_transformer
from torch import Tensor

from zimage_core.config import TransformerConfig
from zimage_core.edit_layout import edit_layout
from zimage_core.editing import Edit, EditEntries
from zimage_core.patchify import patchify, unpatchify
from zimage_core.transformer import ZImageTransformer2DModel

EDIT = TransformerConfig(
    all_patch_size=(2,),
    all_f_patch_size=(1,),
    in_channels=4,
    dim=48,
    n_layers=2,
    n_refiner_layers=2,
    n_heads=2,
    n_kv_heads=2,
    norm_eps=1e-5,
    qk_norm=True,
    cap_feat_dim=40,
    siglip_feat_dim=20,
    rope_theta=256.0,
    t_scale=1000.0,
    axes_dims=(8, 8, 8),
    axes_lens=(512, 64, 64),
)
# Rows and columns of latents, and of visual features: of each picture, all different.
PICTURES = [((8, 12), (4, 6)), ((10, 6), (5, 3)), ((16, 16), (1, 1))]
CASES = {
    "no picture": ([40], []),
    "one": ([5, 33, 2], PICTURES[:1]),
    "one, exact segments": ([32, 64, 32], PICTURES[:1]),
    "two": ([5, 2, 33, 2], PICTURES[:2]),
    "three": ([5, 2, 2, 70, 3], PICTURES),
}
SIZE = (12, 8)


def make_model(**shape: Any) -> ZImageTransformer2DModel:
    return random_transformer(dataclasses.replace(EDIT, **shape))


def make_edit(segments: list[int], pictures: list[Any], seed: int = 0) -> Edit:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    return Edit(
        text=[3 * draw(length, EDIT.cap_feat_dim) for length in segments],
        pictures=[draw(EDIT.in_channels, *latents) for latents, _ in pictures],
        visual=[draw(*seen, EDIT.siglip_feat_dim or 0) for _, seen in pictures],
    )


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def ours(
    model: ZImageTransformer2DModel, edits: list[Edit], latents: Tensor, time: float, aligned: bool
) -> Tensor:
    entries = EditEntries(model, edits, range(len(edits)), *latents.shape[2:], aligned=aligned)
    modulation = model.modulate(torch.tensor([time]))
    return unpatchify(entries.velocity(patchify(latents, 2), modulation), 2, *latents.shape[2:])


def theirs(reference: Reference, edits: list[Edit], latents: Tensor, time: float) -> Tensor:
    pictures = [len(edit.pictures) for edit in edits]
    out = reference(
        [
            [*(p[:, None] for p in edit.pictures), noisy[:, None]]
            for edit, noisy in zip(edits, latents, strict=True)
        ],
        torch.full((len(edits),), time),
        [list(edit.text) for edit in edits],
        siglip_feats=[[*edit.visual, None] if edit.visual else None for edit in edits],
        image_noise_mask=[[0] * n + [1] for n in pictures],
        return_dict=False,
    )[0]
    return torch.stack([image[:, 0] for image in out])


@pytest.fixture(scope="module")
def model() -> ZImageTransformer2DModel:
    return make_model()


@pytest.fixture(scope="module")
def reference(model: ZImageTransformer2DModel) -> Reference:
    made = Reference(**dataclasses.asdict(model.config)).eval().requires_grad_(False)
    made.load_state_dict(model.state_dict(), strict=True)
    return made


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers_with_its_positions(
    model: ZImageTransformer2DModel, reference: Reference, case: str
) -> None:
    edit = make_edit(*CASES[case])
    latents = torch.randn(1, EDIT.in_channels, *SIZE, generator=torch.Generator().manual_seed(1))
    expected = theirs(reference, [edit], latents, 0.3)
    assert distance(ours(model, [edit], latents, 0.3, False), expected) < 1e-5
    aligned = distance(ours(model, [edit], latents, 0.3, True), expected)
    # Their positions differ where a segment that is not the last one has pads.
    same = case in ("no picture", "one, exact segments")
    assert aligned < 1e-5 if same else aligned > 1e-4


def test_a_batch_equals_diffusers(model: ZImageTransformer2DModel, reference: Reference) -> None:
    """Different texts, which diffusers pads and masks."""
    edits = [
        make_edit([5, length, 2], PICTURES[:1], seed) for seed, length in enumerate((9, 100, 40))
    ]
    latents = torch.randn(3, EDIT.in_channels, *SIZE, generator=torch.Generator().manual_seed(1))
    expected = theirs(reference, edits, latents, 0.8)
    found = ours(model, edits, latents, 0.8, False)
    assert distance(found, expected) < 1e-5
    for i, edit in enumerate(edits):
        alone = ours(model, [edit], latents[i : i + 1], 0.8, False)
        assert torch.equal(alone[0], found[i])


@pytest.mark.parametrize("case", CASES)
def test_equals_the_description(model: ZImageTransformer2DModel, case: str) -> None:
    """By default every segment has its own positions, which no other implementation has right."""
    edit = make_edit(*CASES[case])
    latents = torch.randn(1, EDIT.in_channels, *SIZE, generator=torch.Generator().manual_seed(1))
    expected = reference_velocity(
        dict(model.state_dict()),
        dataclasses.asdict(EDIT),
        edit.text,
        edit.pictures,
        edit.visual,
        latents[0],
        0.3,
    )
    assert distance(ours(model, [edit], latents, 0.3, True)[0], expected.float()) < 1e-5


def test_layout_of_one_picture() -> None:
    layout = edit_layout([3, 2, 1], [(4, 4), (2, 4)], [(2, 2)])
    first = layout.text[:, 0].tolist()
    assert first == [*range(1, 33), *range(6, 38), *range(10, 42)]
    assert layout.images[:5].tolist() == [[4, 0, 0], [4, 0, 1], [4, 1, 0], [4, 1, 1], [0, 0, 0]]
    assert layout.images[32:35].tolist() == [[8, 0, 0], [8, 0, 1], [0, 0, 0]]
    assert layout.visual[:5].tolist() == [[5, 0, 0], [5, 0, 3], [5, 3, 0], [5, 3, 3], [0, 0, 0]]
    assert layout.visual[32:].tolist() == [[0, 0, 0]] * 32
    noisy = [layout.text_noisy, layout.images_noisy, layout.visual_noisy]
    assert [mark.tolist() for mark in noisy] == [
        [False] * 32 + [True] * 64,
        [False] * 32 + [True] * 32,
        [False] * 32 + [True] * 32,
    ]


def test_what_does_not_fit_is_refused(model: ZImageTransformer2DModel) -> None:
    def entries(edit: Edit, height: int = 8) -> None:
        EditEntries(model, [edit], [0], height, 8)

    with pytest.raises(ValueError, match="2 segments and 1 sets of features for 1 pictures; allow"):
        entries(make_edit([5, 5], PICTURES[:1]))
    with pytest.raises(ValueError, match="need 70 positions of the row axis; this model has 64"):
        entries(make_edit([5], []), height=140)
    with pytest.raises(ValueError, match="a caption has 0 tokens"):
        entries(make_edit([5, 0, 5], PICTURES[:1]))
    text = [400, 120, 1]
    with pytest.raises(ValueError, match="need 557 positions of the first axis"):
        entries(make_edit(text, PICTURES[:1]))
    plain = make_model(siglip_feat_dim=None)
    with pytest.raises(ValueError, match="takes no pictures: its siglip_feat_dim is null"):
        EditEntries(plain, [make_edit([5, 5, 5], PICTURES[:1])], [0], 8, 8)
