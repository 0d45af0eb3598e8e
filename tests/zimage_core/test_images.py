from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from zimage_core.images import from_signed, to_float, to_pil, to_uint8


@pytest.fixture
def decoded() -> torch.Tensor:
    """What a decoder may return: out of range in places, and every half step of 8 bits."""
    values = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    values[0].view(-1)[:512] = torch.arange(512) / 255.0 - 1.0
    return values


def test_pixels_equal_diffusers(decoded: torch.Tensor) -> None:
    processor = VaeImageProcessor(vae_scale_factor=16)
    expected = [np.asarray(image) for image in processor.postprocess(decoded, output_type="pil")]
    images = from_signed(decoded)
    assert images.dtype == torch.float32
    assert np.array_equal(to_uint8(images), np.stack(expected))
    assert [np.array_equal(a, b) for a, b in zip(to_pil(images), expected, strict=True)] == [1, 1]
    assert np.array_equal(to_float(images), processor.postprocess(decoded, output_type="np"))


def test_layout_is_height_width_channels(decoded: torch.Tensor) -> None:
    images = from_signed(decoded)
    array = to_uint8(images)
    assert array.shape == (2, 64, 48, 3)
    assert array.dtype == np.uint8
    assert array.flags.c_contiguous
    assert to_float(images).flags.c_contiguous
    assert array[1, 5, 7, 2] == round(float(images[1, 2, 5, 7]) * 255)
    image = to_pil(images)[0]
    assert (image.mode, image.size) == ("RGB", (48, 64))


def test_half_precision_is_widened_before_it_is_scaled() -> None:
    # 0.00390625 * 0.5 + 0.5 needs more bits than bfloat16 has near one half.
    decoded = torch.full((1, 3, 2, 2), 0.00390625, dtype=torch.bfloat16)
    assert from_signed(decoded).unique().item() == 0.501953125
