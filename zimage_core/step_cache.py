"""Step caching, lossy: on some steps the transformer is not run, its velocity is extrapolated.

Which steps these are is fixed before the first of them, from the schedule alone. So an image
depends neither on its neighbours nor on a comparison that another device could decide otherwise,
and the host waits for nothing. docs/adr/0016-step-cache.md has the reasons and the alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

INTERVALS = (2, 3, 4)
"""What `cache` may be: between head and tail one step of so many is computed."""
MIN_STEPS = 20
"""Steps below which caching is refused: hardly any lie between head and tail."""
# Shares of the schedule in which every step is computed. At its beginning the velocity turns
# fastest, and at its end steps are longest in sigma: an error costs most there.
_HEAD, _TAIL = 0.2, 0.15
# Of the slope between the last two computed velocities. A whole one carries their noise on, twice
# as far for the second reused step; none lags behind.
_DAMPING = 0.5


def check_cache(cache: int | None, num_steps: int) -> None:
    """Refuse a setting before any work is done.

    Args:
        cache: an interval of `INTERVALS`; None is off.
        num_steps: steps that are run, so without those that a starting image leaves out.

    Raises:
        ValueError: another value, or too few steps for any to be reused.
    """
    if cache is None:
        return
    if isinstance(cache, bool) or cache not in INTERVALS:
        allowed = ", ".join(map(str, INTERVALS))
        raise ValueError(f"cache: {cache!r} must be None or one of {allowed}")
    if num_steps < MIN_STEPS:
        raise ValueError(
            f"cache: {cache} for a run of {num_steps} steps; allowed: None below {MIN_STEPS} "
            "steps, where reuse costs more likeness than it saves time"
        )


def computed_steps(guided: Sequence[bool], cache: int | None) -> list[bool]:
    """Plan for each step that is run whether the transformer is evaluated.

    Args:
        guided: for each of these steps whether guidance acts, see `Guidance.acts_at`.
        cache: as in `check_cache`.

    Raises:
        ValueError: see `check_cache`.
    """
    num_steps = len(guided)
    check_cache(cache, num_steps)
    if cache is None:
        return [True] * num_steps
    head, tail = ceil(_HEAD * num_steps), ceil(_TAIL * num_steps)
    computed = [
        i < head or i >= num_steps - tail or (i - head + 1) % cache == 0 for i in range(num_steps)
    ]
    # Without guidance there are other velocities, of which two must be known again.
    for i in range(1, num_steps):
        if guided[i] != guided[i - 1]:
            computed[i : i + 2] = [True] * len(computed[i : i + 2])
    return computed


class StepCache:
    """Velocities of one batch, computed or extrapolated as `computed_steps` plans.

    Each entry of an evaluation, so each branch of guidance of each image, is extrapolated by
    itself.

    Args:
        computed: for each step that is run.
        times: model times of these steps.
    """

    def __init__(self, computed: Sequence[bool], times: Sequence[float]) -> None:
        self._computed = list(computed)
        self._times = list(times)
        self._keeps = not all(computed)
        self._known: list[tuple[float, Tensor]] = []

    def velocity(self, step: int, evaluate: Callable[[], Tensor]) -> Tensor:
        """The velocities of a step.

        Args:
            step: number of the step among those that are run.
            evaluate: runs the transformer; called where the step is a computed one.

        Returns:
            What `evaluate` returns: float32, an entry for each caption.
        """
        time = self._times[step]
        if not self._computed[step]:
            (before, earlier), (last, velocity) = self._known
            weight = _DAMPING * (time - last) / (last - before)
            return velocity + weight * (velocity - earlier)
        velocity = evaluate()
        if self._keeps:
            same = [known for known in self._known if known[1].shape == velocity.shape]
            self._known = [*same, (time, velocity)][-2:]
        return velocity
