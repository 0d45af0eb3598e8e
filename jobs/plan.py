"""The plan: which samples there are, how they form shards and batches.

All of it is a pure function of the job. No worker, arrival order or clock has a part in it, so
that the same job gives the same bytes on one worker or on many, now or in a resume.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobs.config import JobConfig, pixels_fault
from jobs.errors import InputError
from jobs.input_images import InputImage, check_use, find_images, image_role
from prompt_generators import (
    ProfileError,
    PromptGenerator,
    generator_length,
    make_generator,
    prompt_at,
)
from zimage_core.image_files import ImageFileError

MAX_SEED = 2**63  # seeds are int64 in the manifest and wrap here
CAPTION_MULTIPLE = 32


class PromptError(ValueError):
    """A generator's answer for one index that cannot be made into a sample."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A contiguous range of sample indices [start, stop): unit of lease, retry and commit."""

    id: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Extent:
    """Samples [start, stop) that were planned at one time, cut into shards of `shard_size`.

    A job whose count grows gets a further extent; its shards never reach back into this one.
    """

    start: int
    stop: int
    first_shard: int
    shard_size: int

    @property
    def num_shards(self) -> int:
        """Number of shards, the last of which may be short."""
        return -(-(self.stop - self.start) // self.shard_size)

    def shard(self, shard_id: int) -> Shard:
        """The shard `shard_id`, counted over all extents."""
        start = self.start + (shard_id - self.first_shard) * self.shard_size
        return Shard(shard_id, start, min(start + self.shard_size, self.stop))


@dataclass(frozen=True, slots=True)
class Sample:
    """One image to make.

    Args:
        planned_seed: what the plan had, where `seed` is another (`moved_seeds`).
        images: that it is made from, in order.
        edits: whether they are edited; else there is at most one, which it starts from.
    """

    index: int
    prompt_index: int
    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    loras: tuple[str, ...] = ()
    images: tuple[InputImage, ...] = ()
    edits: bool = False
    metadata: Mapping[str, object] = field(default_factory=dict)
    planned_seed: int | None = None

    @property
    def init_image(self) -> InputImage | None:
        """The image that it starts from."""
        return self.images[0] if self.images and not self.edits else None

    @property
    def pictures(self) -> tuple[InputImage, ...]:
        """The pictures that are edited."""
        return self.images if self.edits else ()


@dataclass(frozen=True)
class JobPlan:
    """The extents of a job, oldest first."""

    extents: tuple[Extent, ...]

    @property
    def num_samples(self) -> int:
        """Number of planned samples over all extents."""
        return sum(e.stop - e.start for e in self.extents)

    @property
    def num_shards(self) -> int:
        """Number of shards over all extents."""
        return sum(e.num_shards for e in self.extents)

    @property
    def start(self) -> int:
        """First planned sample index."""
        return self.extents[0].start

    @property
    def stop(self) -> int:
        """One past the last planned sample index."""
        return self.extents[-1].stop

    def shards(self) -> Iterator[Shard]:
        """All shards in order; nothing is held in memory."""
        for extent in self.extents:
            for shard_id in range(extent.first_shard, extent.first_shard + extent.num_shards):
                yield extent.shard(shard_id)

    def shard(self, shard_id: int) -> Shard:
        """The shard of that number. Raises KeyError if there is none."""
        for extent in self.extents:
            if extent.first_shard <= shard_id < extent.first_shard + extent.num_shards:
                return extent.shard(shard_id)
        raise KeyError(shard_id)

    def shard_of(self, index: int) -> Shard:
        """The shard that a sample is in. Raises KeyError if it is not planned."""
        for extent in self.extents:
            if extent.start <= index < extent.stop:
                within = (index - extent.start) // extent.shard_size
                return extent.shard(extent.first_shard + within)
        raise KeyError(index)

    def extended_to(self, stop: int, shard_size: int) -> JobPlan:
        """This plan with a further extent up to `stop`, if that is beyond the last one."""
        if stop <= self.stop:
            return self
        return JobPlan((*self.extents, Extent(self.stop, stop, self.num_shards, shard_size)))


def new_plan(start: int, stop: int, shard_size: int) -> JobPlan:
    """A plan of one extent over the sample indices [start, stop)."""
    return JobPlan((Extent(start, stop, 0, shard_size),))


def job_generator(config: JobConfig, working_dir: str | None = None) -> PromptGenerator:
    """The job's prompt generator.

    Args:
        working_dir: where `package.module:Class` is looked up before anywhere else, as `python -m`
            does; None for this process's own.

    Raises:
        InputError: with the table's or the options' fault.
    """
    prompts = config.prompts
    if ":" in prompts.generator:
        folder = working_dir or str(Path.cwd())
        # On another node of a cluster the folder may not be there: Ray puts its copy on the path.
        if folder not in sys.path and Path(folder).is_dir():
            sys.path.insert(0, folder)
    try:
        return make_generator(
            prompts.generator,
            profiles=prompts.profiles,
            sheet=prompts.sheet,
            options=dict(prompts.options),
        )
    except (ProfileError, OSError) as error:
        raise InputError(f"{config.place('prompts.profiles')}: {error}") from error
    except ValueError as error:
        raise InputError(f"{config.place('prompts.generator')}: {error}") from error


def num_prompts(config: JobConfig, generator: PromptGenerator) -> int:
    """How many prompts the job asks for.

    Raises:
        InputError: more than the generator has, or no count where it is endless.
    """
    prompts = config.prompts
    try:
        length = generator_length(generator)
    except ValueError as error:
        raise InputError(f"{config.place('prompts.generator')}: {error}") from error
    start, count = config.place("prompts.start"), config.place("prompts.count")
    name = f"generator {prompts.generator!r}"
    if length is None:
        if prompts.count is None:
            raise InputError(
                f"{count}: null: {name} is endless; allowed: a whole number, 1 or more"
            )
        return prompts.count
    available = length - prompts.start
    if available < 1:
        raise InputError(
            f"{start}: {prompts.start}: {name} has {length} prompts; allowed: 0 to "
            f"{max(length - 1, 0)}"
        )
    if prompts.count is None:
        return available
    if prompts.count > available:
        raise InputError(
            f"{count}: {prompts.count}: {name} has {length} prompts, {available} of them from "
            f"prompts.start {prompts.start} on; allowed: 1 to {available}, or null for all"
        )
    return prompts.count


def make_sample(
    config: JobConfig, generator: PromptGenerator, index: int, *, takes_pictures: bool | None
) -> Sample:
    """Sample `index` from the prompt `index // images_per_prompt`.

    Images are looked for below `prompts.images_root` and hashed, but not decoded.

    Args:
        takes_pictures: whether the checkpoint edits images; else one is started from. None where
            that is not known: one image is then taken to be started from, several to be edited.

    Raises:
        PromptError: the generator raised, gave something that is no prompt, a size that is not
            divisible by 16, a LoRA twice or one that the job does not declare, or an image that
            is not there or cannot be used.
    """
    sampling, loras = config.sampling, config.model.loras
    prompt_index, k = divmod(index, sampling.images_per_prompt)
    try:
        prompt = prompt_at(generator, prompt_index)
    except (Exception, SystemExit) as error:
        raise PromptError(
            f"generate_prompt({prompt_index}) raised {type(error).__name__}: {error}"
        ) from error
    for name in prompt.loras:
        if name not in loras:
            raise PromptError(
                f"generate_prompt({prompt_index}): LoRA {name!r} is not declared in model.loras; "
                f"allowed: {', '.join(loras) or 'none'}"
            )
        if prompt.loras.count(name) > 1:
            raise PromptError(f"generate_prompt({prompt_index}): LoRA {name!r} is named twice")
    width = prompt.width if prompt.width is not None else sampling.width
    height = prompt.height if prompt.height is not None else sampling.height
    for side, value in (("width", width), ("height", height)):
        fault = pixels_fault(value)
        if fault is not None:
            raise PromptError(f"generate_prompt({prompt_index}): {side} {value}: {fault}")
    try:
        images = find_images(config.prompts.images_root, prompt.images)
        edits = len(images) > 1 if takes_pictures is None else takes_pictures
        check_use(images, edits, width * height)
    except ImageFileError as error:
        raise PromptError(f"generate_prompt({prompt_index}): images: {error}") from error
    role = image_role(edits)
    metadata: dict[str, object] = dict(prompt.metadata)
    added = role.metadata(images)
    for key in sorted({role.hash_key, *added} & metadata.keys()):
        if metadata[key] != added.get(key):
            raise PromptError(
                f"generate_prompt({prompt_index}): metadata {key!r} is {metadata[key]!r}; allowed: "
                f"another name, since this one is kept for the {role.word}"
            )
    seed = sampling.seed + index if prompt.seed is None else prompt.seed + k
    negative = prompt.negative_text
    return Sample(
        index=index,
        prompt_index=prompt_index,
        prompt=prompt.text,
        negative_prompt=sampling.negative_prompt if negative is None else negative,
        seed=seed % MAX_SEED,
        width=width,
        height=height,
        loras=tuple(sorted(prompt.loras)),  # their order has no part in the image
        images=images,
        edits=edits,
        metadata=metadata | added,
    )


def plan_batches(
    samples: Sequence[Sample], caption_lengths: Sequence[int], batch_size: int
) -> list[list[Sample]]:
    """The batches of a shard: samples alike in size, caption bucket, loras, in whether they start
    from an image and in the sizes of the pictures that they edit, in index order.

    A caption's bucket is its own length rounded up to a multiple of 32, the length that the
    transformer sees; a batch of one bucket needs no attention mask.

    Args:
        samples: in index order.
        caption_lengths: tokens of each sample's prompt, template included.
        batch_size: at most so many samples together.

    Returns:
        Batches in the order of work; every sample is in exactly one.
    """
    groups: dict[tuple[object, ...], list[Sample]] = {}
    for sample, length in zip(samples, caption_lengths, strict=True):
        bucket = -(-length // CAPTION_MULTIPLE)
        starts = sample.init_image is not None  # such samples skip the first steps
        pictures = tuple(p.sizes(sample.width * sample.height) for p in sample.pictures)
        key = (sample.width, sample.height, bucket, sample.loras, starts, pictures)
        groups.setdefault(key, []).append(sample)
    batches = [
        group[i : i + batch_size]
        for group in groups.values()
        for i in range(0, len(group), batch_size)
    ]
    return sorted(batches, key=work_order)


def work_order(batch: Sequence[Sample]) -> tuple[tuple[str, ...], int]:
    """What the batches of a shard are sorted by: one set of LoRAs after the other, then index.

    A worker changes its model's weights between two sets, which takes longer than a small batch.
    """
    return batch[0].loras, batch[0].index


def lost_sample(config: JobConfig, index: int) -> Sample:
    """Stands in a row for a sample whose prompt could not be made."""
    sampling = config.sampling
    return Sample(
        index=index,
        prompt_index=index // sampling.images_per_prompt,
        prompt="",
        negative_prompt=sampling.negative_prompt,
        seed=(sampling.seed + index) % MAX_SEED,
        width=sampling.width,
        height=sampling.height,
    )
