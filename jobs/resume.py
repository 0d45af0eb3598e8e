"""What a run has to do: the plan less what is committed, and the words that explain it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from jobs.commits import Listing, failed_indices, missing_indices
from jobs.config import JobConfig
from jobs.input_images import EDITED, STARTED_FROM, InputImage, image_role
from jobs.manifest import PROFILE_PREFIX
from jobs.moved_seeds import MovedSeed, planned_seed
from jobs.plan import JobPlan, PromptError, Sample, Shard, lost_sample, make_sample
from jobs.quantities import counted
from jobs.redo import Marks, Redo
from jobs.scheduler import Work
from prompt_generators import PromptGenerator
from zimage_core.image_files import ImageFileError

_COMPARED = ("prompt", "negative_prompt", "seed", "width", "height", "loras")
_IMAGE_WORDS = (f"{STARTED_FROM.word}: ", f"{EDITED.word}: ")


@dataclass
class Resume:
    """Everything that decides what is made again.

    Args:
        retry: failed indices to make again, by shard.
        changed: indices whose sample is another one now, by shard, each with what changed.
        marks: of rejected images, where these are to be made again.
    """

    plan: JobPlan
    listing: Listing
    retry: dict[int, set[int]] = field(default_factory=dict)
    changed: dict[int, dict[int, list[str]]] = field(default_factory=dict)
    marks: Marks | None = None

    @property
    def num_changed(self) -> int:
        """Samples that are another one now."""
        return sum(map(len, self.changed.values()))

    @property
    def num_retried(self) -> int:
        """Failed samples that are made again, changed ones left out."""
        return sum(
            len(indices - self.changed.get(shard, {}).keys())
            for shard, indices in self.retry.items()
        )

    @property
    def redone(self) -> list[Redo]:
        """Rejected images that are made again, changed samples left out."""
        shards = {} if self.marks is None else self.marks.redo
        return [
            redo
            for shard in sorted(shards)
            for index, redo in shards[shard].items()
            if index not in self.changed.get(shard, {})
        ]

    @property
    def num_again(self) -> int:
        """Samples that have a row and are made again."""
        return self.num_changed + self.num_retried + len(self.redone)

    @property
    def num_missing(self) -> int:
        """Samples that have no row yet."""
        return self.plan.num_samples - self.listing.num_rows

    @property
    def num_to_make(self) -> int:
        """Samples that this run makes."""
        return self.num_missing + self.num_again

    def work(self) -> Iterator[Work]:
        """The run's work, shard by shard, lazily."""
        for shard in self.plan.shards():
            state = self.listing.state(shard.id)
            if state.rows < len(shard):
                missing = missing_indices(self.listing, shard)
                yield Work(shard, 0, None if missing is None else frozenset(missing))
            redo = {} if self.marks is None else self.marks.redo.get(shard.id, {})
            again = self.retry.get(shard.id, set()) | self.changed.get(shard.id, {}).keys()
            again |= redo.keys()
            if again:
                failed = self.failed_in(shard) & again
                # Neighbours are made as their rows are now, which is what `regen` looks for.
                seeds = self.seeds_in(shard) | {index: r.next for index, r in redo.items()}
                revision = state.revision + 1
                yield Work(shard, revision, frozenset(again), frozenset(failed), seeds)

    def seeds_in(self, shard: Shard) -> dict[int, MovedSeed]:
        """Seeds of a shard's current rows that are not those of the plan."""
        if self.listing.state(shard.id).revision == 0:
            return {}
        table = self.listing.current(shard.id, ["seed", "planned_seed"])
        return {
            row["index"]: MovedSeed(row["planned_seed"], row["seed"])
            for row in table.to_pylist()
            if row["planned_seed"] is not None
        }

    def failed_in(self, shard: Shard) -> set[int]:
        """Indices of a shard whose current row is a failed one."""
        if not self.listing.state(shard.id).failed:
            return set()
        table = self.listing.current(shard.id, ["index", "status"]).to_pydict()
        pairs = zip(table["index"], table["status"], strict=True)
        return {index for index, status in pairs if status == "failed"}

    def words(self) -> str:
        """One line: what is kept, made and why."""
        listing = self.listing
        if not listing.num_rows:
            shards = counted(self.plan.num_shards, "shard")
            return f"{counted(self.plan.num_samples, 'image')} to make in {shards}"
        redone = self.redone
        remade = sum(
            len(indices.keys() - self.failed_in(self.plan.shard(shard)))
            for shard, indices in self.changed.items()
        )
        kept = listing.num_rows - listing.num_failed - remade - len(redone)
        parts = [f"{counted(kept, 'image')} kept"]
        if self.num_missing:
            partly = sum(
                0 < s.rows < len(self.plan.shard(shard)) for shard, s in listing.states.items()
            )
            note = f" ({counted(partly, 'shard')} partly done)" if partly else ""
            parts.append(f"{self.num_missing} to make{note}")
        if self.num_changed:
            all_words = (words for shard in self.changed.values() for words in shard.values())
            what = "prompts or images" if any(map(concerns_image, all_words)) else "prompts"
            parts.append(f"{self.num_changed} to make again because of changed {what}")
        if self.num_retried:
            parts.append(f"{counted(self.num_retried, 'failed row')} to make again")
        if redone:
            seeds = "its next seed" if len(redone) == 1 else "their next seeds"
            parts.append(f"{counted(len(redone), 'rejected image')} to make again with {seeds}")
        elif self.marks is not None:
            parts.append("no image is rejected")
        left = listing.num_failed - self.num_retried
        if left > 0 and not self.num_again:
            them = "it" if left == 1 else "them"
            rows = counted(left, "failed row")
            parts.append(f"{rows} left as is (--retry-failed makes {them} again)")
        if not self.num_to_make:
            parts.append("nothing to make")
        return ", ".join(parts)


def retry_failed(plan: JobPlan, listing: Listing) -> dict[int, set[int]]:
    """All failed current rows, by shard."""
    return {shard.id: indices for shard, indices in failed_indices(listing, plan)}


def changed_samples(
    config: JobConfig,
    generator: PromptGenerator,
    plan: JobPlan,
    listing: Listing,
    *,
    takes_pictures: bool,
) -> dict[int, dict[int, list[str]]]:
    """Committed samples that the job would now make from another prompt, seed, size or images.

    Args:
        takes_pictures: whether the output's checkpoint edits the images of prompts.
    """
    changed: dict[int, dict[int, list[str]]] = {}
    role = image_role(takes_pictures)
    columns = [*_COMPARED, "planned_seed", "error_type"]
    columns += [PROFILE_PREFIX + key for key in (role.name_key, role.hash_key)]
    tables = listing.current_tables(sorted(listing.parts), columns)
    if config.prompts.images_root is not None:  # all files are read: not done in a moment
        bar = tqdm(
            tables,
            desc=f"comparing {role.word}s",
            unit="shard",
            total=len(listing.parts),
            delay=1,
            disable=None,  # where no one looks
            leave=False,
        )
        tables = iter(bar)
    for shard_id, table in tables:
        for row in table.to_pylist():
            differences = _differences(config, generator, row, takes_pictures)
            if differences:
                changed.setdefault(shard_id, {})[row["index"]] = differences
    return changed


def row_values(sample: Sample) -> dict[str, object]:
    """The columns of a row by which two samples are told apart."""
    return {
        "prompt": sample.prompt,
        "negative_prompt": sample.negative_prompt or None,
        "seed": sample.seed,
        "width": sample.width,
        "height": sample.height,
        "loras": ",".join(sample.loras) or None,
    }


def _differences(
    config: JobConfig,
    generator: PromptGenerator,
    row: Mapping[str, object],
    takes_pictures: bool,
) -> list[str]:
    role, index = image_role(takes_pictures), row["index"]
    assert isinstance(index, int)
    if row["error_type"] == "prompt_error":
        return []  # there was no sample: a generator that was mended since makes it when retried
    try:
        sample = make_sample(config, generator, index, takes_pictures=takes_pictures)
    except PromptError as error:
        of_image = isinstance(error.__cause__, ImageFileError)
        return [f"{role.word}: {error.__cause__}" if of_image else f"{error}"]
    if row["error_type"] in ("worker_died", "worker_stalled") and row["prompt"] == "":
        # the worker died before it could say what the prompt was
        lost = lost_sample(config, index)
        # its seed had moved on from the prompt's
        moved = row["planned_seed"] is not None
        sample = replace(lost, seed=sample.seed) if moved else lost
    before, now = {**row, "seed": planned_seed(row)}, row_values(sample)
    words = [
        f"{key}: {before[key]!r} -> {now[key]!r}" for key in _COMPARED if before[key] != now[key]
    ]
    return words + [
        f"{role.word}: {change}"
        for change in _image_changes(role.recorded(row, PROFILE_PREFIX), sample.images)
    ]


def _image_changes(before: Sequence[InputImage], now: Sequence[InputImage]) -> list[str]:
    """By content: a file that only has another name gives the same image."""
    if [image.sha256 for image in before] == [image.sha256 for image in now]:
        return []
    names = [[image.name for image in images] for images in (before, now)]
    if names[0] == names[1]:
        return [
            f"{new.name}: the file's content is another one"
            for old, new in zip(before, now, strict=True)
            if old.sha256 != new.sha256
        ]
    shown = [", ".join(of_images) or None for of_images in names]
    return [f"{shown[0]!r} -> {shown[1]!r}"]


def concerns_image(words: Sequence[str]) -> bool:
    """Whether a sample is another one because of the images that it is made from."""
    return any(word.startswith(_IMAGE_WORDS) for word in words)
