"""What a worker makes of a lease before it makes any image: its samples, in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jobs.config import JobConfig
from jobs.executor import Lease, Planned, Result
from jobs.image_output import Made
from jobs.moved_seeds import with_moved_seed
from jobs.plan import PromptError, Sample, lost_sample, make_sample, plan_batches, work_order
from prompt_generators import PromptGenerator


@dataclass(frozen=True)
class LeasePlan:
    """The batches of a lease's shard, in the order of work.

    Args:
        failures: by index, results of samples whose prompt failed; each is a batch of its own.
    """

    batches: list[list[Sample]]
    failures: Mapping[int, Result]

    @property
    def message(self) -> Planned:
        """What the driver is told."""
        samples = [sample for batch in self.batches for sample in batch]
        return Planned(
            samples=tuple(sorted(samples, key=lambda s: s.index)),
            batches=tuple(tuple(s.index for s in batch) for batch in self.batches),
        )


def plan_lease(
    lease: Lease,
    *,
    config: JobConfig,
    generator: PromptGenerator,
    caption_lengths: Callable[[Sequence[str], int], Sequence[int]],
    batch_size: int,
    takes_pictures: bool,
    on_sample: Callable[[int], None],
) -> LeasePlan:
    """Ask the generator for the samples of a lease's shard and group them.

    Args:
        caption_lengths: tokens of each prompt, cut to `sampling.max_sequence_length`.
        takes_pictures: whether the checkpoint edits the images of prompts.
        on_sample: called with each index before its prompt is asked for.
    """
    indices = lease.wanted if lease.isolate else range(lease.shard.start, lease.shard.stop)
    samples: list[Sample] = []
    failures: dict[int, Result] = {}
    lost: list[Sample] = []
    for index in indices:
        on_sample(index)
        try:
            sample = make_sample(config, generator, index, takes_pictures=takes_pictures)
            samples.append(with_moved_seed(sample, lease.seeds))
        except PromptError as error:
            made = Made(index, lease.attempt, (index,), "planned")
            failures[index] = made.failed("prompt_error", str(error))
            sample, moved = lost_sample(config, index), lease.seeds.get(index)
            lost.append(sample if moved is None else moved.into(sample))
    lengths = caption_lengths([s.prompt for s in samples], config.sampling.max_sequence_length)
    size = 1 if lease.isolate else batch_size
    batches = plan_batches(samples, lengths, size) + [[s] for s in lost]
    batches.sort(key=work_order)
    return LeasePlan(batches, failures)
