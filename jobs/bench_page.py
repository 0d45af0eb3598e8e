"""The page that a benchmark writes: rows as tables, limits, conditions, how it was measured."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.conditions import company
from jobs.quantities import counted, memory_size, scaled, short_time
from jobs.roofline import CARDS, PUBLISHED, denoising_flops

if TYPE_CHECKING:
    from jobs.bench_rows import Row

_STATES = {"out_of_memory": "out of memory", "failed": "failed"}
_NAMES = {
    "text_encoding": "text encoding",
    "step": "one denoising step",
    "denoise": "denoising",
    "decode": "decoding",
    "png": "PNG",
    "jpeg": "JPEG",
    "webp": "WebP",
    "end_to_end": "end to end",
}

_SUMMED = ("text_encoding", "denoise", "decode", "png")
_WIDTH = 120  # characters
_Values = dict[str, Any]
_Column = tuple[str, Callable[[_Values], str]]


def format_row(row: Row) -> str:
    """A row as a line for the terminal."""
    values = asdict(row)
    where = f"{row.pixels} px" if row.pixels else ""
    how = ""
    if row.attention:
        how = f"{row.attention}{', compiled' if row.compile else ''}"
    line = f"{_NAMES[row.stage]:<19}{where:<8}{how:<24}"
    if row.status != "ok":
        return f"{line}{_STATES[row.status]}: {row.reason}"
    facts = [
        f"{_median(values)} ({_spread(values)})",
        _rate(values),
        f"MFU {_mfu(values)}" if row.mfu is not None else "",
        f"computed limit {_seconds(row.limit_seconds)}" if row.limit_seconds else "",
        f"{row.images_per_second:.3g} images/s" if row.images_per_second else "",
        f"peak {_peak(values)}" if row.peak_bytes else "",
    ]
    return line + ", ".join(fact for fact in facts if fact)


def format_page(report: _Values) -> str:
    """The report as Markdown, fit for docs/benchmarks."""
    settings, found, limit = report["settings"], report["conditions"], report["limit"]
    rows: list[_Values] = report["rows"]
    batch = counted(settings["batch_size"], "image")
    lines = [
        f"# Z-Image on {found['device']}",
        "",
        f"`{report['command']}`, {report['date'][:10]}. {report['model']['name']}, "
        f"{settings['dtype']}, {settings['steps']} steps, {batch} at once. Median of "
        f"{counted(settings['repeats'], 'run')} after {settings['warm_up_runs']} that did not "
        "count.",
    ]
    if report["stopped"] is not None:
        lines += ["", f"**Not complete: {report['stopped']}.** What was measured before is below."]
    for words in company(found):
        lines += ["", f"**Not alone**: {words}."]
    if not report["model"]["published_size"]:
        lines += ["", "**Not the published model**: its figures say nothing about Z-Image itself."]
    lines += ["", "## Images", "", *_images(rows), "", _mfu_words(limit)]
    lines += ["", "## Where the time goes", "", *_shares(rows)]
    lines += ["", "## Every stage", "", *_every_stage(rows, found["device_type"])]
    lines += ["", "## Not run", "", *_not_run(report["not_run"])]
    lines += ["", "## Limits, computed and not measured", "", *limits(report)]
    lines += ["", "## Conditions", "", *_conditions(report)]
    lines += ["", "## How it was measured", "", *_method(report), ""]
    return "\n".join(_wrapped(line) for line in lines)


def _wrapped(line: str) -> str:
    """Prose in lines as the other pages have them; tables and headings as they are."""
    if line.startswith(("|", "#")):
        return line
    return textwrap.fill(
        line,
        _WIDTH,
        subsequent_indent="  " if line.startswith("- ") else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _images(rows: Iterable[_Values]) -> list[str]:
    """A line for each size and configuration."""
    groups: dict[tuple[Any, ...], dict[str, _Values]] = {}
    for row in rows:
        if row["attention"] is not None:
            key = row["pixels"], row["attention"], row["compile"]
            groups.setdefault(key, {})[row["stage"]] = row
    found = [groups[key] | {"key": key} for key in sorted(groups, key=lambda key: key[0])]

    def of(stage: str, text: Callable[[_Values], str]) -> Callable[[_Values], str]:
        return lambda group: text(group[stage]) if stage in group else ""

    return _table(
        found,
        [
            ("pixels", lambda g: f"{g['key'][0]} x {g['key'][0]}"),
            ("attention", lambda g: f"`{g['key'][1]}`"),
            ("compiled", lambda g: "yes" if g["key"][2] else "no"),
            ("one step", of("step", _median)),
            ("denoising", of("denoise", _median)),
            ("end to end", of("end_to_end", _median)),
            ("images/s", of("end_to_end", _images_per_second)),
            ("achieved", of("denoise", _rate)),
            ("MFU", of("denoise", _mfu)),
            (
                "denoising, computed limit",
                of("denoise", lambda row: _seconds(row["limit_seconds"])),
            ),
            ("peak memory", of("end_to_end", _peak)),
            ("forwards", of("denoise", lambda row: str(row["forwards"] or ""))),
            ("differs by", of("denoise", _difference)),
        ],
        numbers_from=3,
    )


def _shares(rows: Sequence[_Values]) -> list[str]:
    """For each size the stages of the fastest configuration, one after the other."""
    ok = [row for row in rows if row["status"] == "ok"]
    found = []
    for side in dict.fromkeys(row["pixels"] for row in ok if row["stage"] == "end_to_end"):
        of_side = [row for row in ok if row["pixels"] in (None, side)]
        best = min(
            (row for row in of_side if row["stage"] == "end_to_end"),
            key=lambda row: float(row["median_seconds"]),
        )
        stages = {
            row["stage"]: row
            for row in of_side
            if row["attention"] is None
            or (row["attention"], row["compile"]) == (best["attention"], best["compile"])
        }
        found.append({"best": best, **stages})
    if not found:
        return ["No image was made."]

    table = _table(
        found,
        [
            ("pixels", lambda group: f"{group['best']['pixels']} x {group['best']['pixels']}"),
            ("fastest", lambda group: _configuration(group["best"])),
            *((_NAMES[name], partial(_share, name)) for name in (*_SUMMED, "end_to_end")),
        ],
        numbers_from=2,
    )
    return [
        *table,
        "",
        "Each stage was timed by itself; shares are of their sum. A job encodes and writes images "
        "while the next batch is made, and so does not wait for PNG.",
    ]


def _share(stage: str, group: _Values) -> str:
    if stage not in group:
        return ""
    total = sum(group[name]["median_seconds"] for name in _SUMMED if name in group)
    share = 100 * group[stage]["median_seconds"] / total
    return _median(group[stage]) + (f" ({share:.1f} %)" if stage in _SUMMED else "")


def _every_stage(rows: Iterable[_Values], device_type: str) -> list[str]:
    return _table(
        list(rows),
        [
            ("stage", lambda row: _NAMES[row["stage"]]),
            ("pixels", lambda row: str(row["pixels"] or "")),
            ("how", _configuration),
            ("median", _median),
            ("lowest to highest", _spread),
            ("timed", lambda row: str(row["runs"] or "")),
            # waiting for a GPU keeps a CPU busy
            ("CPU time", lambda row: _seconds(row["cpu_seconds"]) if device_type == "cpu" else ""),
            ("achieved", _rate),
            ("MFU", _mfu),
            ("peak memory", _peak),
            ("file", lambda row: f"{row['file_bytes'] / 1000:.1f} kB" if row["file_bytes"] else ""),
            ("remark", lambda row: (row["reason"] or "").replace("|", "\\|")),
        ],
        numbers_from=3,
    )


def _not_run(entries: Sequence[_Values]) -> list[str]:
    if not entries:
        return ["Nothing was left out."]
    return [f"- {_configuration(entry)}: {entry['reason']}" for entry in entries]


def _mfu_words(limit: _Values) -> str:
    if limit["card"] is None:
        return f"Model FLOP utilisation (MFU) is left out: {limit['reason']}."
    return (
        f"MFU is of the card's dense 16-bit peak, {limit['peak_flops'] / 1e12:g} TFLOP/s by its "
        "data sheet."
    )


def limits(report: _Values) -> list[str]:
    """What is computed from operations alone, as items of a list."""
    steps = report["settings"]["steps"]
    published = denoising_flops(PUBLISHED, 1024, 1024, steps)
    h100, rtx4090 = CARDS["h100"], CARDS["rtx4090"]
    lines = [
        f"- The published 6B transformer needs {published / 1e12:.0f} TFLOP for an image of "
        f"1024 x 1024 pixels in {steps} steps with a caption of 64 tokens: "
        f"{published / h100.floor:.2f} s on an H100 at {h100.floor / 1e12:.0f} TFLOP/s, which "
        f"large matrix products reach, {published / rtx4090.floor:.1f} s on an RTX 4090 at its "
        f"peak of {rtx4090.floor / 1e12:g}."
    ]
    flops = {row["pixels"]: row["flops"] for row in report["rows"] if row["stage"] == "denoise"}
    for side, number in flops.items():
        if number is None:
            continue
        words = f"- Denoising a batch of this run at {side} x {side}: {scaled(number, 'FLOP')}"
        if report["limit"]["card"] is not None:
            rate = report["limit"]["limit_flops"]
            words += f", {_seconds(number / rate)} on this card at {rate / 1e12:g} TFLOP/s"
        lines.append(words + ".")
    return lines


def _conditions(report: _Values) -> list[str]:
    found, settings, model = report["conditions"], report["settings"], report["model"]
    memory = found["memory_bytes"] and (
        f"{memory_size(found['memory_bytes'])}, {memory_size(found['free_bytes'])} free before"
    )
    parameters = ", ".join(f"{name} {n / 1e6:,.1f} M" for name, n in model["parameters"].items())
    facts = {
        "date": report["date"],
        "device": found["device"],
        "memory": memory,
        "driver": found["driver"],
        "CUDA": found["cuda"],
        "CPU": f"{found['cpu']}, {counted(found['cores'], 'core')}",
        "threads": found["threads"],
        "load before": found["load_average"],
        "system": found["system"],
        "versions": ", ".join(
            f"{name} {number}"
            for name, number in found["versions"].items()
            if number != "not installed"
        ),
        "commit": found["commit"],
        "model": f"{model['name']}: {parameters}",
        "dtype": settings["dtype"],
        "prompt": f"`{settings['prompt'].format(1)}`, {settings['caption_tokens']} tokens",
        "seed": settings["seed"],
    }
    known = [{"fact": k, "is": str(v)} for k, v in facts.items() if v is not None]
    return _table(known, [("what", lambda row: row["fact"]), ("is", lambda row: row["is"])], 2)


def _method(report: _Values) -> list[str]:
    compiled = ", ".join(
        f"{_seconds(seconds)} (`{name}`)" for name, seconds in report["compile_seconds"].items()
    )
    if compiled:
        compiled = f" Compiling took {compiled}, the first with the start of the compiler."
    return [
        "The device is waited for before and after each timed run. A step, a forward of the "
        "transformer and the scheduler's Euler step, is timed from the end of the one before, "
        "inside of a denoising run that nothing waits in. Denoising begins with the features of "
        "the prompts, decoding ends with 8-bit pixels in the host's memory. Files are encoded on "
        f"one thread. Configurations were run one after the other.{compiled}",
        "",
        "The forwards of the transformer are counted in every run and equal the steps. FLOP/s are "
        "of its matrix products and attention (of the decoder: of its convolutions too), a "
        'multiplication and an addition counted as two. "Differs by" is the distance of the '
        "latents to those of the first configuration, relative to their norm. Peak memory is what "
        "PyTorch allocated on the device, weights of all models included.",
    ]


def _table(rows: Sequence[_Values], columns: Sequence[_Column], numbers_from: int) -> list[str]:
    """Markdown; columns that say nothing in any row are left out."""
    if not rows:
        return ["Nothing was measured."]
    cells = [[text(row) for row in rows] for _, text in columns]
    kept = [i for i, column in enumerate(cells) if any(column)]
    head = [columns[i][0] for i in kept]
    rule = ["---:" if i >= numbers_from else "---" for i in kept]
    body = [[cells[i][j] for i in kept] for j in range(len(rows))]
    return [f"| {' | '.join(line)} |" for line in (head, rule, *body)]


def _configuration(row: _Values) -> str:
    parts = [] if row["attention"] is None else [f"`{row['attention']}`"]
    return ", ".join(parts + ["compiled"] * bool(row["compile"]))


def _median(row: _Values) -> str:
    return _STATES.get(row["status"]) or _seconds(row["median_seconds"])


def _spread(row: _Values) -> str:
    if row["status"] != "ok":
        return ""
    return f"{_seconds(row['lowest_seconds'])} to {_seconds(row['highest_seconds'])}"


def _images_per_second(row: _Values) -> str:
    rate = row["images_per_second"]
    return "" if rate is None else f"{rate:#.3g}".rstrip(".")


def _rate(row: _Values) -> str:
    rate = row["flops_per_second"]
    return "" if rate is None else scaled(rate, "FLOP/s")


def _mfu(row: _Values) -> str:
    return "" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"


def _peak(row: _Values) -> str:
    return "" if row["peak_bytes"] is None else memory_size(row["peak_bytes"])


def _difference(row: _Values) -> str:
    difference = row["difference"]
    return "" if difference is None else f"{difference:.1e}" if difference else "0"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else short_time(seconds)
