from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as Reference
from diffusers.pipelines.z_image.pipeline_z_image import (
    calculate_shift as reference_shift,
)
from diffusers.pipelines.z_image.pipeline_z_image import (
    get_default_z_image_sigmas,
)

from zimage_core.config import CheckpointError
from zimage_core.scheduler import FlowMatchEulerDiscreteScheduler, calculate_shift

STEPS = [1, 2, 3, 4, 7, 8, 9, 20, 28, 50, 100, 250]


def reference_sigmas(
    num_steps: int, image_seq_len: int, config: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, Reference]:
    reference = Reference(**config)
    read = reference.config.get
    mu = reference_shift(
        image_seq_len,
        read("base_image_seq_len"),
        read("max_image_seq_len"),
        read("base_shift"),
        read("max_shift"),
    )
    reference.set_timesteps(sigmas=get_default_z_image_sigmas(num_steps), mu=mu)
    return reference.sigmas, (1000 - reference.timesteps) / 1000, reference


@pytest.mark.parametrize(
    "config",
    [
        {"shift": 1.0},
        {"shift": 3.0},
        {"shift": 6.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.3, "max_shift": 1.9},
        {"use_dynamic_shifting": True, "base_image_seq_len": 64, "max_image_seq_len": 1024},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    ],
    ids=lambda config: "-".join(f"{k}={v}" for k, v in config.items()),
)
def test_schedule_equals_diffusers(config: dict[str, Any]) -> None:
    ours = FlowMatchEulerDiscreteScheduler(**config)
    for num_steps in STEPS:
        for image_seq_len in (16, 1024, 4096, 4864):
            sigmas = ours.sigmas(num_steps, image_seq_len=image_seq_len)
            expected, times, _ = reference_sigmas(num_steps, image_seq_len, config)
            assert sigmas.dtype == torch.float32
            assert torch.equal(sigmas, expected)
            assert torch.equal(ours.model_times(sigmas), times)


def test_n_steps_are_n_forwards_and_end_at_zero() -> None:
    sigmas = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas(8, image_seq_len=4096)
    expected = [1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0.0]
    assert sigmas.tolist() == pytest.approx(expected, abs=5e-5)
    assert (sigmas.diff() < 0).all()


def test_step_equals_diffusers() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 8, 8, generator=generator)
    ours = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas = ours.sigmas(5, image_seq_len=16)
    _, _, reference = reference_sigmas(5, 16, {"shift": 3.0})
    expected = latents
    for i, timestep in enumerate(reference.timesteps):
        velocity = torch.randn(latents.shape, generator=generator)
        expected = reference.step(velocity, timestep, expected, return_dict=False)[0]
        before = latents.clone()
        after = ours.step(velocity, latents, sigmas, i)
        assert torch.equal(latents, before)
        latents = after
    torch.testing.assert_close(latents, expected, rtol=1e-6, atol=1e-6)


def test_shift_equals_diffusers() -> None:
    for image_seq_len in (1, 256, 1024, 4096, 16384):
        assert calculate_shift(image_seq_len) == reference_shift(image_seq_len)
        assert calculate_shift(image_seq_len, 64, 2048, 0.1, 2.0) == reference_shift(
            image_seq_len, 64, 2048, 0.1, 2.0
        )
    assert calculate_shift(256) == pytest.approx(0.5)
    assert calculate_shift(4096) == pytest.approx(1.15)


def test_it_has_no_state() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    first = scheduler.sigmas(8, image_seq_len=16)
    scheduler.sigmas(3, image_seq_len=16)
    assert torch.equal(first, scheduler.sigmas(8, image_seq_len=16))
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheduler.shift = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("num_steps", [0, -3])
def test_no_steps(num_steps: int) -> None:
    with pytest.raises(ValueError, match="num_inference_steps"):
        FlowMatchEulerDiscreteScheduler().sigmas(num_steps, image_seq_len=16)


def write(path: Path, config: object) -> Path:
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def test_reads_what_diffusers_writes(tmp_path: Path) -> None:
    Reference(shift=6.0, use_dynamic_shifting=True, max_shift=1.3).save_pretrained(tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler.from_json(tmp_path / "scheduler_config.json")
    assert scheduler == FlowMatchEulerDiscreteScheduler(
        shift=6.0, use_dynamic_shifting=True, max_shift=1.3
    )


def test_reads_the_short_form(tmp_path: Path) -> None:
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.36.0.dev0",
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": False,
        "shift": 3.0,
    }
    scheduler = FlowMatchEulerDiscreteScheduler.from_json(write(tmp_path / "s.json", config))
    assert scheduler == FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shfit": 3.0}, "unknown key 'shfit' with value 3.0; allowed: .*shift"),
        ({"shift": "3"}, "shift: '3' must be a number"),
        ({"shift": 0}, "shift: 0 must be a positive number"),
        ({"shift": True}, "shift: True must be a number"),
        ({"num_train_timesteps": 0}, "num_train_timesteps: 0"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps: 1000.0"),
        ({"use_dynamic_shifting": 1}, "use_dynamic_shifting: 1 must be a bool"),
        ({"base_shift": None}, "base_shift: None must be a number"),
        ({"max_image_seq_len": 256}, "max_image_seq_len: 256 must be greater"),
        (
            {"time_shift_type": "cubic"},
            "time_shift_type: 'cubic' must be 'exponential' or 'linear'",
        ),
        ({"use_karras_sigmas": True}, "use_karras_sigmas: True is not supported"),
        ({"shift_terminal": 0.1}, "shift_terminal: 0.1 is not supported"),
        ([1], "must hold a JSON object"),
    ],
)
def test_a_bad_file_names_file_key_and_value(tmp_path: Path, config: object, message: str) -> None:
    path = write(tmp_path / "scheduler_config.json", config)
    with pytest.raises(CheckpointError, match=f"scheduler_config.json: {message}"):
        FlowMatchEulerDiscreteScheduler.from_json(path)


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing\.json: file is missing"):
        FlowMatchEulerDiscreteScheduler.from_json(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"broken\.json: cannot be read"):
        FlowMatchEulerDiscreteScheduler.from_json(tmp_path / "broken.json")
