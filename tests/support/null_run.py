"""`zimage run` with workers that make nothing: all is real but the work of the device.

Model, plan, leases, PNG files, rows and commits are those of any run; where a batch would be
encoded, denoised and decoded, each sample gets the same few pixels at once. So a job of tens of
thousands of samples takes a minute, and what grows with their number shows.

    python -m null_run run JOB [flags]

with `tests/support` on PYTHONPATH, where the actors of a run on Ray find this module too.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from jobs.plan import Sample
from jobs.writers import Pixels


def make_nothing() -> None:
    """Let the workers of this process give `fixed_pixels`."""
    from jobs.batch_stages import BatchStages

    BatchStages.make = fixed_pixels  # type: ignore[method-assign,assignment]


def fixed_pixels(stages: object, batch: Sequence[Sample], *_: object) -> list[Pixels]:
    """Pixels (H, W, 3) for each sample, all the same."""
    return [_noise(sample.height, sample.width) for sample in batch]


@functools.cache
def _noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def main(arguments: list[str]) -> int:
    """The command line, in this process and in the actors that it starts."""
    from jobs import ray_executor
    from jobs.cli import main as command_line
    from jobs.ray_worker import WorkerActor

    class NullActor(WorkerActor):
        def __init__(self, *args: Any) -> None:
            make_nothing()
            super().__init__(*args)

    make_nothing()
    of_nothing = functools.partial(ray_executor.RayExecutor, actor=NullActor)
    ray_executor.RayExecutor = of_nothing  # type: ignore[assignment,misc]
    return command_line(arguments)


if __name__ == "__main__":
    # under the name by which actors find what is in here
    from null_run import main as named_main

    sys.exit(named_main(sys.argv[1:]))
