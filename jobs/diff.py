"""`zimage diff`: which samples a change of the job would make again. Loads no model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.checkpoint_kind import takes_pictures_here
from jobs.config import JobConfig
from jobs.errors import EXIT_OK, ModelError
from jobs.fingerprint import adapter_fingerprint, node_fingerprint
from jobs.input_images import image_role
from jobs.plan import PromptError, Sample, job_generator, make_sample, num_prompts
from jobs.progress_bar import ProgressBar
from jobs.quantities import counted, index_ranges
from jobs.record import changed_keys
from jobs.resume import row_values
from jobs.settings import resolve_batch_size
from jobs.terminal import visible, visible_line
from prompt_generators import PromptGenerator

_SHOWN = 20
_SHOWN_JSON = 1000
_BEFORE = 30  # characters that are shown before the first that differs
_LONGEST = 100  # characters of a value that are shown
# Keys that a sample's own fields tell about: a row that brings its own seed does not change with
# `sampling.seed`.
_PER_SAMPLE = {
    *("sampling.width", "sampling.height", "sampling.seed", "sampling.negative_prompt"),
    *("sampling.images_per_prompt", "sampling.strength", "prompts.start"),
}
_OF_FILES = {  # the same pixels in other files
    *("name", "output.layout", "output.format", "output.png_level", "output.embed_metadata"),
}
_OF_GUIDANCE = {"sampling.cfg_normalization", "sampling.cfg_truncation"}


@dataclass
class JobDiff:
    """Two jobs, compared.

    Args:
        of_all: changed keys that have a say in every image, a line each.
        of_files: those that concern the files, not the pixels.
        refused: keys that `zimage run` refuses to change in one output.
        changed: indices that both jobs have, and that the second makes otherwise.
        fields: of them, how many for each field.
        samples: the first of them, with a line for each field.
        new: indices that only the second job has; `gone`: that only the first has.
        common: how many both have.
    """

    of_all: list[str]
    of_files: list[str]
    refused: list[str]
    changed: list[int] = field(default_factory=list)
    fields: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[int, list[str]]] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    common: int = 0


def diff(before: JobConfig, now: JobConfig, *, as_json: bool = False) -> int:
    """Print which samples `now` makes otherwise than `before`; exit code 0.

    Raises:
        InputError: a table, generator, adapter or count that does not fit.
    """
    found = compare_jobs(before, now)
    if as_json:
        print(json.dumps(_report(found), indent=2))
    else:
        print(visible(format_diff(found)))
    return EXIT_OK


def compare_jobs(before: JobConfig, now: JobConfig) -> JobDiff:
    """Compare two jobs key by key and sample by sample. Raises InputError, ModelError."""
    of_all, of_files, refused = _keys(before, now)
    found = JobDiff(of_all, of_files, refused)
    old_generator, new_generator = job_generator(before), job_generator(now)
    old, new = _indices(before, old_generator), _indices(now, new_generator)
    kinds = takes_pictures_here(before), takes_pictures_here(now)
    common = range(max(old.start, new.start), min(old.stop, new.stop))
    found.common = len(common)
    found.new = _without(new, old)
    found.gone = _without(old, new)
    adapters = _changed_adapters(before, now)
    with ProgressBar("comparing", len(common), "sample") as bar:
        for index in common:
            words = _sample_words(
                _sample(before, old_generator, index, kinds[0]),
                _sample(now, new_generator, index, kinds[1]),
                adapters,
                strength=(before.sampling.strength, now.sampling.strength),
            )
            bar.update()
            if words:
                found.changed.append(index)
                found.fields.update(words.keys())
                if len(found.samples) < _SHOWN_JSON:
                    found.samples.append((index, [f"{k}: {v}" for k, v in words.items()]))
    return found


def format_diff(found: JobDiff) -> str:
    """The comparison for a terminal."""
    lines = [f"every image: {words}" for words in found.of_all]
    lines += [f"every file, not its pixels: {words}" for words in found.of_files]
    for index, words in found.samples[:_SHOWN]:
        lines.append(f"sample {index}: {visible_line('; '.join(words))}")
    hidden = len(found.changed) - min(_SHOWN, len(found.samples))
    if hidden > 0:
        lines.append(f"... and {hidden:,} more")
    if found.changed:
        kinds = ", ".join(f"{name} {count:,}" for name, count in found.fields.most_common())
        lines.append(
            f"{len(found.changed):,} of {counted(found.common, 'sample')} changed ({kinds}): "
            f"{_ranges(found.changed)}"
        )
    elif not found.of_all:
        lines.append(f"{counted(found.common, 'sample')} the same")
    if found.new:
        lines.append(f"{len(found.new):,} new: {_ranges(found.new)}")
    if found.gone:
        lines.append(f"{len(found.gone):,} only in the first job: {_ranges(found.gone)}")
    redo = found.common if found.of_all else len(found.changed)
    lines.append(f"{redo:,} to make again, {len(found.new):,} to make for the first time")
    if found.refused or found.gone:
        keys = [*found.refused, *(["fewer samples"] if found.gone else [])]
        lines.append(f"in the same output zimage run refuses: {', '.join(keys)}")
    elif found.changed:
        lines.append("in the same output zimage run makes them with --accept-changes")
    return "\n".join(lines)


def _report(found: JobDiff) -> dict[str, Any]:
    """Keys are documented in docs/cli.md and stable."""
    return {
        "common": found.common,
        "every_image": found.of_all,
        "every_file": found.of_files,
        "refused": found.refused,
        "fields": dict(found.fields),
        "changed": index_ranges(found.changed),
        "new": index_ranges(found.new),
        "gone": index_ranges(found.gone),
        "samples": [{"index": index, "differences": words} for index, words in found.samples],
    }


def _keys(before: JobConfig, now: JobConfig) -> tuple[list[str], list[str], list[str]]:
    """Changed keys of every image, of every file, and the names of those that a run refuses."""
    unguided = before.sampling.guidance_scale == 0 == now.sampling.guidance_scale
    of_all, of_files, refused = [], [], []
    for key, (old, new) in changed_keys(before, now).items():
        if key == "sampling.batch_size":
            old, new = resolve_batch_size(before), resolve_batch_size(now)
            if old == new:
                continue
        refused.append(key)
        words = f"{key}: {_short(old)} -> {_short(new)}"
        if key in _OF_FILES:
            of_files.append(words)
        elif key not in _PER_SAMPLE and not (unguided and key in _OF_GUIDANCE):
            of_all.append(words)
    weights = _weights(before, now)
    if weights is not None:
        of_all.append(weights)
        refused.append("model weights")
    return of_all, of_files, refused


def _weights(before: JobConfig, now: JobConfig) -> str | None:
    """What is not the same in the weights: by name where it is one, else by content."""
    names = [
        (model.folder, model.parts, model.repo, model.source, model.revision)
        for model in (before.model, now.model)
    ]
    if names[0] == names[1]:
        return None
    old, new = before.model.folder, now.model.folder
    if not (old.is_dir() and new.is_dir()):
        gone = old if not old.is_dir() else new
        return f"model: {old} -> {new}, taken for others since {gone} is not here to be compared"
    try:
        prints = [node_fingerprint(c.model.folder, **c.model.parts) for c in (before, now)]
    except (ValueError, OSError) as error:
        raise ModelError(f"model.path: {error}") from error
    return None if prints[0] == prints[1] else f"model weights: {prints[0]} -> {prints[1]}"


def _changed_adapters(before: JobConfig, now: JobConfig) -> dict[str, str]:
    """Adapters of one name that are not the same, each with what changed."""
    changed: dict[str, str] = {}
    for name in before.model.loras.keys() & now.model.loras.keys():
        old, new = before.model.loras[name], now.model.loras[name]
        words = [f"scale {old.scale:g} -> {new.scale:g}"] if old.scale != new.scale else []
        if old.path != new.path:
            try:
                if adapter_fingerprint(old.path) != adapter_fingerprint(new.path):
                    words.append(f"file {old.path} -> {new.path}")
            except (ValueError, OSError) as error:
                words.append(f"file {old.path} -> {new.path}, not compared: {error}")
        if words:
            changed[name] = f"adapter {name}: {', '.join(words)}"
    return changed


def _indices(config: JobConfig, generator: PromptGenerator) -> range:
    per = config.sampling.images_per_prompt
    start = config.prompts.start * per
    return range(start, start + num_prompts(config, generator) * per)


def _sample(
    config: JobConfig, generator: PromptGenerator, index: int, takes_pictures: bool | None
) -> Sample | PromptError:
    try:
        return make_sample(config, generator, index, takes_pictures=takes_pictures)
    except PromptError as error:
        return error


def _sample_words(
    old: Sample | PromptError,
    new: Sample | PromptError,
    adapters: Mapping[str, str],
    *,
    strength: tuple[float, float],
) -> dict[str, str]:
    """By field, how two samples of one index differ."""
    if isinstance(old, PromptError) or isinstance(new, PromptError):
        said = [str(s) if isinstance(s, PromptError) else "fine" for s in (old, new)]
        return {} if said[0] == said[1] else {"error": _change(*said)}
    before, now = row_values(old), row_values(new)
    words = {key: _change(value, now[key]) for key, value in before.items() if value != now[key]}
    for name in set(old.loras) & set(new.loras) & adapters.keys():
        words.setdefault("loras", adapters[name])
    hashes = [[image.sha256 for image in sample.images] for sample in (old, new)]
    if hashes[0] != hashes[1]:
        names = [", ".join(image.name for image in s.images) or None for s in (old, new)]
        content = " (another content)" if names[0] == names[1] else ""
        word = image_role(new.edits or old.edits).word
        words[word] = f"{names[0]!r} -> {names[1]!r}{content}"
    elif new.init_image is not None and strength[0] != strength[1]:
        words["strength"] = f"{strength[0]:g} -> {strength[1]:g}"
    return words


def _change(old: object, new: object) -> str:
    """Two values; of long texts what is around the first difference."""
    if isinstance(old, str) and isinstance(new, str) and max(len(old), len(new)) > _LONGEST:
        begin = max(0, _common(old, new) - _BEFORE)
        old, new = (f"{'...' * (begin > 0)}{text[begin:]}" for text in (old, new))
    return f"{_short(old)} -> {_short(new)}"


def _common(a: str, b: str) -> int:
    """How many characters two texts begin alike with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _without(indices: range, others: range) -> list[int]:
    before = range(indices.start, min(indices.stop, others.start))
    return [*before, *range(max(indices.start, others.stop), indices.stop)]


def _ranges(indices: list[int]) -> str:
    ranges = index_ranges(indices).split(",")
    more = len(ranges) - _SHOWN
    return ", ".join(ranges[:_SHOWN]) + (f" and {more:,} more ranges" if more > 0 else "")
