"""Strength of a change to a starting image: which steps of the schedule are run."""

from __future__ import annotations


def first_step(num_inference_steps: int, strength: float) -> int:
    """Index of the first step that is run; those before it are skipped, all from it on are run.

    Of n steps the last n * strength are run, a part of one counting as a whole: 8 steps at 0.6
    are the 5 steps 3 to 7, so 5 transformer evaluations. The image is brought to the noise level of
    that first step. At 1.0 every step is run, from pure noise: the image has no effect but that
    its encoding draws from the generators. As in diffusers' ZImageImg2ImgPipeline.

    Args:
        num_inference_steps: n, of the whole schedule.
        strength: above 0, at most 1.

    Raises:
        ValueError: `strength` is out of range, or so small that no step is left.
    """
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength: {strength} must be above 0 and at most 1")
    # Not ceil(n * strength): the difference of floats decides which steps the reference runs.
    first = int(num_inference_steps - num_inference_steps * strength)
    if first >= num_inference_steps:
        raise ValueError(
            f"strength: {strength} leaves no step of num_inference_steps {num_inference_steps} to "
            "run; allowed: a larger strength, at most 1"
        )
    return first
