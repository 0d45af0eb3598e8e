"""The sections of a report: facts of an output as headings, sentences and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jobs.config import JobConfig
from jobs.gallery_rows import progress
from jobs.lookalikes import BITS, RULE, Look, Pair
from jobs.output import Output
from jobs.page import Block, Command, Heading, Paragraph, Picture, Plot, Table
from jobs.quantities import counted, duration
from jobs.report_facts import MOST_FAILURES, Facts, Floats
from jobs.stage_clock import STAGES
from jobs.terminal import without_credentials

MOST_PAIRS = 50
_MOST_MAKERS = 64
_MOST_PROBLEMS = 5
_STAGE_WORDS = {
    "text": "text encoding",
    "pictures": "encoding of pictures",
    "denoise": "denoising",
    "decode": "decoding",
    "write": "encoding, hashing and writing files",
}


def summary(output: Output, uri: str, config: JobConfig) -> list[Block]:
    """What was asked for, and how far it is."""
    record = output.record
    settings, sampling = record.settings, config.sampling
    done = progress(output, uri)
    steps = f"{sampling.num_inference_steps} steps, guidance {sampling.guidance_scale:g}"
    rows = [
        ("output", without_credentials(uri)),
        ("state", str(done["state"])),
        ("model", f"{settings.model}, {settings.dtype} on {settings.device_type}"),
        ("sampling", f"{sampling.width} x {sampling.height}, {steps}"),
        ("prompts", config.prompts.generator),
        ("begun", record.created_at),
        ("last run", record.updated_at),
    ]
    planned = done["planned"]
    left = planned - done["ok"] - done["failed"]
    counts = [
        (name, f"{number:,}", _share(number, planned))
        for name, number in (
            ("planned", planned),
            ("made", done["ok"]),
            ("failed", done["failed"]),
            ("not made yet", left),
        )
    ]
    return [
        Table(("job", ""), rows),
        Heading("Samples"),
        Table(("", "#number", "#share"), counts),
    ]


def failures(facts: Facts, retry: str | None, plots: Sequence[Plot]) -> list[Block]:
    """Failed samples by class, the first of them, and what makes them again."""
    blocks: list[Block] = [Heading("Failures")]
    total = facts.failed_by_type.total()
    if not total:
        return [*blocks, Paragraph("No sample failed.")]
    kinds = [
        (kind, f"{number:,}", _share(number, total), tuple(_messages(facts, kind)))
        for kind, number in facts.failed_by_type.most_common()
    ]
    blocks.append(Table(("error_type", "#samples", "#share", "first messages"), kinds))
    blocks += [plot for plot in plots if plot.name == "failures"]
    if retry is not None:
        blocks += [Paragraph("Once the causes are mended, make them again:"), Command(retry)]
    rows = [
        (
            f"{row['index']}",
            row["error_type"] or "",
            row["error_message"] or "",
            row["prompt"] or "",
        )
        for row in facts.failures
    ]
    blocks.append(Table(("#index", "error_type", "message", "prompt"), rows))
    if total > MOST_FAILURES:
        blocks.append(
            Paragraph(
                f"The first {MOST_FAILURES} of {total:,}; `zimage status --json` lists them all."
            )
        )
    return blocks


def times(facts: Facts, gpus_per_worker: float, plots: Sequence[Plot]) -> list[Block]:
    """Seconds of an image, rates, and who made what."""
    blocks: list[Block] = [Heading("Time")]
    if not len(facts.created):
        return [*blocks, Paragraph("No image is made yet.")]
    blocks.append(Table(("", "#"), _time_rows(facts, gpus_per_worker)))
    blocks.append(
        Paragraph(
            "Seconds for an image are its batch's time divided by the batch, and its own writing."
        )
    )
    blocks += _stages(facts)
    blocks += [plot for plot in plots if plot.name in ("rate", "seconds")]
    devices = [
        (device or "unknown", f"{images:,}", _seconds(seconds, images), _hourly(images, seconds))
        for device, (images, seconds) in sorted(facts.device_seconds().items())
    ]
    blocks += [
        Heading("Devices and workers"),
        Table(("device", "#images", "#seconds for an image", "#images an hour of work"), devices),
    ]
    makers = sorted(facts.makers.items(), key=lambda item: (-item[1].images, item[0]))
    rows = [
        (
            *key,
            f"{maker.images:,}",
            _seconds(maker.seconds, maker.images),
            f"{maker.failed:,}",
        )
        for key, maker in makers[:_MOST_MAKERS]
    ]
    columns = ("worker", "node", "device", "#images", "#seconds for an image", "#failed")
    blocks.append(Table(columns, rows))
    if len(makers) > _MOST_MAKERS:
        blocks.append(Paragraph(f"The first {_MOST_MAKERS} of {len(makers):,} workers."))
    return [*blocks, *_slowest(facts)]


def look_alike_section(
    seen: Sequence[tuple[Mapping[str, Any], Look]],
    pairs: Sequence[Pair],
    problems: Sequence[str],
    remark: str,
) -> list[Block]:
    """Images that look like another one, with their prompts.

    Args:
        seen: what was compared.
        remark: how much of the output that was.
    """
    blocks: list[Block] = [Heading("Look-alikes"), Paragraph(remark)]
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        words = "; ".join(problems[:_MOST_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
        blocks.append(Paragraph(f"Not readable, see zimage verify: {words}."))
    if not pairs:
        return [*blocks, Paragraph("No two of them look alike.")] if len(seen) > 1 else blocks
    blocks.append(Paragraph(RULE))
    same = sum(seen[p.first][0]["prompt"] == seen[p.second][0]["prompt"] for p in pairs)
    of_prompt = f"; {same:,} of them of the same prompt" if same else "; none has the same prompt"
    verb = "looks" if len(pairs) == 1 else "look"
    shown = f" The {MOST_PAIRS} closest pairs:" if len(pairs) > MOST_PAIRS else ""
    blocks.append(
        Paragraph(f"{counted(len(pairs), 'image')} {verb} like an earlier one{of_prompt}.{shown}")
    )
    rows = []
    for pair in pairs[:MOST_PAIRS]:
        (one, first), (other, second) = seen[pair.first], seen[pair.second]
        alike = one["prompt"] == other["prompt"]
        rows.append(
            (
                Picture(first.picture, "webp", f"image {one['index']}"),
                Picture(second.picture, "webp", f"image {other['index']}"),
                (f"{one['index']}", f"{other['index']}"),
                (f"{one['seed']}", f"{other['seed']}"),
                f"{pair.bits} of {BITS}",
                f"{pair.color:.3f}",
                (
                    f"{one['index']}: {one['prompt']}",
                    f"{other['index']}: {'the same' if alike else other['prompt']}",
                ),
            )
        )
    columns = ("first", "second", "#index", "#seed", "#hash", "#color", "prompts")
    return [*blocks, Table(columns, rows)]


def _stages(facts: Facts) -> list[Block]:
    """Where the workers' time went."""
    seconds, made = facts.runs.stage_seconds, len(facts.created)
    if not seconds:
        return [
            Paragraph("The events have no times of stages: an older version made these images.")
        ]
    total = sum(seconds.values())
    rows = [
        (_STAGE_WORDS[name], duration(taken), _share(taken, total), f"{taken / made:.3g}")
        for name, taken in ((name, seconds[name]) for name in STAGES if name in seconds)
    ]
    return [
        Table(("stage", "#time", "#share", "#seconds for an image"), rows),
        Paragraph(
            "Of all workers together, work that was done again included. Writing goes on beside "
            "the next batch."
        ),
    ]


def _time_rows(facts: Facts, gpus_per_worker: float) -> list[tuple[str, str]]:
    made, runs = len(facts.created), facts.runs
    rows: list[tuple[str, str]] = []
    if len(facts.seconds):
        low, median, high, slow = _quantiles(facts.seconds)
        rows += [
            ("seconds for an image, median", f"{median:.3g}"),
            ("of nine images in ten, at most", f"{high:.3g}"),
            ("lowest and highest", f"{low:.3g} to {slow:.3g}"),
        ]
    span = float(facts.created[-1] - facts.created[0])
    rows.append(("from the first image to the last", duration(span)))
    if runs.number:
        rows.append(
            (f"with workers, in {counted(runs.number, 'run')}", duration(runs.active_seconds))
        )
        if runs.active_seconds:
            rows.append(("images a second meanwhile", f"{made / runs.active_seconds:.3g}"))
    for device, seconds in sorted(runs.worker_seconds.items()):
        images, _ = facts.device_seconds().get(device, (0, 0.0))
        if not seconds:
            continue
        on_gpu = device not in ("cpu", "mps")
        hours = seconds / 3600 * (gpus_per_worker if on_gpu else 1)
        unit = "a GPU-hour" if on_gpu else "a worker-hour"
        rows.append((f"images {unit}, {device}", f"{images / hours:,.0f}"))
    if runs.loading_seconds:
        middle, most = float(np.median(runs.loading_seconds)), max(runs.loading_seconds)
        rows.append(("loading of a worker, median and most", f"{middle:.1f} s, {most:.1f} s"))
    if runs.lost:
        rows.append(("workers that died or hung", f"{runs.lost:,}"))
    for mode in ("halved", "single"):
        if facts.batch_modes[mode]:
            words = "in batches halved for memory" if mode == "halved" else "made alone"
            rows.append((f"samples {words}", f"{facts.batch_modes[mode]:,}"))
    return rows


def _slowest(facts: Facts) -> list[Block]:
    if not facts.slowest:
        return []
    median = float(np.median(facts.seconds))
    rows = [
        (
            f"{row['index']}",
            f"{row['seconds']:.3g}",
            f"{row['seconds'] / median:.1f}" if median else "",
            f"{row['width']} x {row['height']}",
            row["batch_mode"],
            f"{row['worker']} on {row['node']}",
            row["prompt"],
        )
        for row in facts.slowest
    ]
    columns = ("#index", "#seconds", "#of the median", "size", "batch", "worker", "prompt")
    return [Heading("Slowest images"), Table(columns, rows)]


def _messages(facts: Facts, kind: str) -> list[str]:
    return [
        f"{message} ({number:,})" if number > 1 else message
        for message, number in facts.messages[kind].items()
    ]


def _quantiles(seconds: Floats) -> tuple[float, float, float, float]:
    low, median, high, most = np.percentile(seconds, (0, 50, 90, 100))
    return float(low), float(median), float(high), float(most)


def _share(number: float, of: float) -> str:
    return f"{number / of:.1%}" if of else ""


def _seconds(seconds: float, images: int) -> str:
    return f"{seconds / images:.3g}" if images else ""


def _hourly(images: int, seconds: float) -> str:
    return f"{3600 * images / seconds:,.0f}" if seconds else ""
