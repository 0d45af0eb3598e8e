"""`zimage bench`: how long each stage takes on this machine, beside what is computed.

Everything that can be refused is refused before weights are read. What goes wrong later costs its
own rows: a size that does not fit into memory, a backend that fails. Rows are shown as they are
measured, and an interrupted run writes what it has.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jobs.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_UNUSABLE, InputError, ModelError
from jobs.resources import data_path
from jobs.terminal import visible

if TYPE_CHECKING:
    import torch

    from jobs.bench_rows import BenchRows, Configuration
    from zimage_core import ZImagePipeline
    from zimage_core.loader import CheckpointSummary

_SIZES = (512, 1024, 2048)
_STEPS = 8
_REPEATS = 7
_MIN_STEPS = 2
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_COMPILE = {"without": (False,), "with": (True,), "both": (False, True)}


def add_arguments(command: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Fill the parser of `zimage bench`.

    Args:
        positive: reads a whole number above 0.
    """
    add = command.add_argument
    add("--model", required=True, type=data_path, metavar="DIR", help="a checkpoint")
    add(
        "--sizes",
        nargs="+",
        type=positive,
        default=list(_SIZES),
        metavar="PIXELS",
        help="sides of square images; default 512 1024 2048",
    )
    add("--steps", type=positive, default=_STEPS, metavar="N", help="default 8")
    add("--batch-size", type=positive, default=1, metavar="N", help="images at once; default 1")
    add(
        "--attention",
        action="append",
        metavar="BACKEND",
        help="repeatable; default: all that can run here",
    )
    add("--compile", choices=list(_COMPILE), default="both", help="compiled blocks; default both")
    add("--dtype", choices=_DTYPES, default="auto", help="auto: bfloat16 on a GPU, else float32")
    add("--repeats", type=positive, default=_REPEATS, metavar="N", help="timed runs; default 7")
    add("--device", default="auto", metavar="NAME", help="cuda, cuda:1, mps, cpu; default auto")
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FILE.md",
        help="the page; default: DATE-bench-DEVICE.md in the working directory",
    )
    add("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Measure, show the rows, write the page.

    Raises:
        InputError: a flag does not fit, or a backend that is named cannot run here.
        ModelError: the checkpoint cannot be loaded on the device.
    """
    _check_flags(args)

    import torch

    from jobs.bench_page import format_page, format_row, limits
    from jobs.bench_rows import BenchRows, compared_with
    from jobs.conditions import conditions, find_device, page_path
    from jobs.device import DeviceError
    from jobs.roofline import CARDS
    from jobs.stage_times import PROMPT, SEED, WARM_UP_RUNS, StageTimes, Stopwatch

    started_at = datetime.now(UTC)
    device = find_device(args.device)
    name = args.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    summary = _checkpoint(args)
    configurations, not_run = _configurations(args, device, dtype, summary)
    found = conditions(device)
    card, no_card = compared_with(found["device"], device.type, dtype)
    page = page_path(args.output, started_at, found["device"])
    if args.output is not None and page.exists():
        _say(f"{page} is there and will be replaced")
    for each in not_run:
        _say(f"not run: {_words(each['attention'], each['compile'])}: {each['reason']}")

    pipeline = _load(args, device, dtype)
    try:
        stages = StageTimes(
            pipeline,
            Stopwatch(device, args.repeats),
            batch_size=args.batch_size,
            steps=args.steps,
        )
        for side in args.sizes:
            pipeline.latents_shape(1, side, side)
    except ValueError as error:
        raise InputError(f"--batch-size, --sizes: {error}") from error
    rows = BenchRows(
        stages,
        pipeline,
        card=card,
        num_stages=1 + len(args.sizes) * (4 + 2 * len(configurations)),
        on_row=lambda row: _say(format_row(row), sys.stderr if args.json else sys.stdout),
    )
    stopped, exit_code = None, EXIT_OK
    try:
        _measure(rows, configurations, args.sizes, not_run, device)
    except KeyboardInterrupt:
        stopped, exit_code = "interrupted", EXIT_INTERRUPTED
    except DeviceError as error:
        stopped, exit_code = f"the device failed: {error}", EXIT_UNUSABLE
    finally:
        rows.close()
    if stopped is not None:
        _say(f"stopped: {stopped}")
    if any(row.status == "failed" for row in rows.rows) or not rows.num_measured:
        exit_code = exit_code or EXIT_UNUSABLE

    report = {
        "date": started_at.isoformat(timespec="seconds"),
        "command": _command(args),
        "conditions": found,
        "model": {
            "name": args.model.resolve().name,
            "parameters": dict(summary.num_parameters),
            "published_size": rows.is_published_size,
        },
        "settings": {
            "sizes": args.sizes,
            "steps": args.steps,
            "batch_size": args.batch_size,
            "dtype": name,
            "repeats": args.repeats,
            "warm_up_runs": WARM_UP_RUNS,
            "prompt": PROMPT,
            "caption_tokens": stages.caption_tokens,
            "seed": SEED,
        },
        "limit": {
            "card": card,
            "peak_flops": card and CARDS[card].peak,
            "limit_flops": card and CARDS[card].floor,
            "reason": no_card,
        },
        "rows": [asdict(row) for row in rows.rows],
        "compile_seconds": rows.compile_seconds,
        "not_run": not_run,
        "stopped": stopped,
        "page": str(page),
    }
    if not args.json:
        _say("\n".join(("computed, not measured:", *limits(report))), sys.stdout)
    _write(page, format_page(report), args, report)
    return exit_code


def _check_flags(args: argparse.Namespace) -> None:
    from jobs.config import pixels_fault

    for side in args.sizes:
        fault = pixels_fault(side)
        if fault is not None:
            raise InputError(f"--sizes: {side}: {fault}")
    args.sizes = list(dict.fromkeys(args.sizes))
    if args.steps < _MIN_STEPS:
        raise InputError(
            f"--steps: {args.steps}: a step is timed from the end of the one before; allowed: "
            f"{_MIN_STEPS} or more"
        )
    if args.output is not None:
        if args.output.suffix != ".md" or args.output.is_dir():
            raise InputError(f"--output: {args.output}: allowed: a file that ends in .md")
        if not args.output.absolute().parent.is_dir():
            raise InputError(f"--output: {args.output}: no such folder: {args.output.parent}")
    if not args.model.is_dir():
        raise ModelError(f"--model: {args.model}: no such folder; allowed: a checkpoint folder")


def _checkpoint(args: argparse.Namespace) -> CheckpointSummary:
    """What the headers say; refuses sizes that the transformer has no positions for."""
    from zimage_core.config import CheckpointError
    from zimage_core.loader import check_checkpoint

    try:
        summary = check_checkpoint(args.model)
    except (CheckpointError, OSError) as error:
        raise ModelError(f"--model: {error}") from error
    largest = 16 * min(summary.transformer.axes_lens[1:])
    for side in args.sizes:
        if side > largest:
            raise InputError(
                f"--sizes: {side}: the transformer has no positions for it; allowed: up to "
                f"{largest}"
            )
    return summary


def _configurations(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, summary: CheckpointSummary
) -> tuple[list[Configuration], list[dict[str, Any]]]:
    """What is measured, and what cannot be, with the reason.

    Raises:
        InputError: what cannot run was asked for by name.
    """
    from jobs.bench_rows import Configuration
    from zimage_core.attention import (
        AttentionBackendError,
        attention_backends,
        best_backend,
        check_backend,
    )
    from zimage_core.compilation import CompileError, check_compile

    head_dim = summary.transformer.dim // summary.transformer.n_heads
    names, not_run = [], []
    for name in args.attention or attention_backends():
        try:
            if name == "auto":
                name = best_backend(device, dtype, head_dim)
            check_backend(name, device, dtype, head_dim)
        except AttentionBackendError as error:
            if args.attention:
                raise InputError(f"--attention: {error}") from error
            reason = str(error).partition("cannot run here: ")[2] or str(error)
            not_run.append({"attention": name, "compile": None, "reason": reason})
            continue
        except ValueError as error:
            raise InputError(
                f"--attention: {name!r}: unknown; allowed: "
                f"{', '.join((*attention_backends(), 'auto'))}"
            ) from error
        names.append(name)
    modes = _COMPILE[args.compile]
    if True in modes:
        try:
            check_compile(device)
        except CompileError as error:
            reason = str(error).partition(";")[0]
            if args.compile == "with":
                raise InputError(f"--compile: with: {reason}; allowed here: without") from error
            modes = (False,)
            not_run.append({"attention": None, "compile": True, "reason": reason})
    # All that is not compiled first: compiled blocks stay compiled.
    chosen = [Configuration(name, mode) for mode in modes for name in dict.fromkeys(names)]
    return chosen, not_run


def _load(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> ZImagePipeline:
    from jobs.device import is_out_of_memory
    from zimage_core import CheckpointError, ZImagePipeline, load_from_local_dir

    _say(f"loading {args.model}")
    try:
        # Any backend does, but one that ZIMAGE_ATTENTION names might not run.
        components = load_from_local_dir(args.model, device=device, dtype=dtype, attention="native")
    except (CheckpointError, OSError) as error:
        raise ModelError(f"--model: {error}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"--model: {args.model}: its models do not fit into the memory of {device} together; "
            f"`zimage doctor --model {args.model}` says what they need"
        ) from error
    return ZImagePipeline(**components)


def _measure(
    rows: BenchRows,
    configurations: list[Configuration],
    sizes: list[int],
    not_run: list[dict[str, Any]],
    device: torch.device,
) -> None:
    """Fill the rows; a configuration whose blocks do not compile goes to `not_run`."""
    rows.text_encoding()
    for configuration in configurations:
        reason = rows.configure(configuration, device)
        if reason is not None:
            not_run.append({**configuration._asdict(), "reason": reason})
            _say(f"not run: {_words(*configuration)}: {reason}")
            continue
        for side in sizes:
            rows.size(configuration, side)


def _command(args: argparse.Namespace) -> str:
    """The command as a page may show it: without the folders of this machine."""
    import shlex

    words = list(args.argv)
    for path in (args.model, args.output):
        words = [word.replace(str(path), path.name) if path else word for word in words]
    return shlex.join(["zimage", *words])


def _write(page: Path, text: str, args: argparse.Namespace, report: dict[str, Any]) -> None:
    """The page to its file, and what else was asked for to standard output."""
    if args.json:
        print(visible(json.dumps(report, indent=2), longest=None))
    replaced = ", in place of an earlier one" if page.exists() else ""
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        if not args.json:  # what took so long to measure is not to be lost
            print(visible(text, longest=None))
        raise InputError(f"--output: {page}: cannot be written: {error}") from error
    _say(f"{page}: written{replaced}", sys.stderr if args.json else sys.stdout)


def _words(attention: str | None, compile: bool | None) -> str:
    parts = [] if attention is None else [f"attention {attention}"]
    return ", ".join(parts + ["compiled"] * bool(compile))


def _say(text: str, stream: TextIO | None = None) -> None:
    from tqdm import tqdm

    stream = stream or sys.stderr
    tqdm.write(visible(text), file=stream)  # above a bar where there is one
    stream.flush()
