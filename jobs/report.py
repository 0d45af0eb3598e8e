"""`zimage report`: how an output went, as one page in HTML or Markdown."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import EXIT_OK, InputError
from jobs.page_file import check_page_file, replace_page_file
from jobs.terminal import visible_line

if TYPE_CHECKING:
    from jobs.output import Output
    from jobs.page import Block, Plot
    from jobs.report_facts import Facts

GENERATOR = "zimage report"
COMPARED = 2000
"""Images of a local output that are compared if nothing is said."""
_SUFFIXES = {".html": "html", ".htm": "html", ".md": "md"}


def add_arguments(command: argparse.ArgumentParser, not_negative: Callable[[str], int]) -> None:
    """Fill the parser of `zimage report`.

    Args:
        not_negative: reads a whole number, 0 or more.
    """
    add = command.add_argument
    add("output", metavar="OUTPUT")
    add(
        "-o",
        "--page",
        type=Path,
        metavar="FILE|DIR",
        help="where the report goes; default OUTPUT/report.html, needed for an object store",
    )
    add("--format", choices=["html", "md"], help="default: as FILE ends, else html")
    add(
        "--compare",
        type=not_negative,
        metavar="N",
        help=f"look for look-alikes among the first N images; default {COMPARED}, and 0 where they "
        "would have to be fetched",
    )


def run(args: argparse.Namespace) -> int:
    """Write the report; exit code 0.

    Raises:
        InputError: there is no output of a job, or a flag does not fit.
        StorageError: the output cannot be read, or the page not written.
    """
    from jobs import page
    from jobs.config import JobConfig
    from jobs.output import Output
    from jobs.report_facts import read_facts
    from jobs.report_plots import INSTALL, can_plot, draw_plots
    from jobs.report_sections import failures, summary, times
    from jobs.status import next_command
    from jobs.yaml_file import display

    output = Output.open(args.output)
    file, kind = _page_file(output.storage.root, args.output, args.page, args.format)
    facts = read_facts(output)
    plots = draw_plots(facts) if can_plot() else []
    retry = next_command(output, args.output, running=False, left=0)
    alike, words = _look_alikes(output, args.compare)
    # as it is read, not as it is written: a record may leave out what has a default
    config = JobConfig.model_validate(output.record.config)
    blocks: list[Block] = [
        *summary(output, args.output, config),
        *failures(facts, retry, plots),
        *times(facts, config.run.gpus_per_worker, plots),
        *alike,
    ]
    if not can_plot():
        blocks.append(page.Paragraph(f"Without plots: {INSTALL}"))
    title = f"{config.name}: report"
    if kind == "html":
        files = {file: page.html_page(title, blocks, GENERATOR).encode()}
    else:
        text = page.markdown_page(title, blocks, GENERATOR, file.stem)
        # the page last: what it shows is there by then
        files = {file.with_name(page.plot_file(file.stem, plot)): plot.svg for plot in plots}
        files[file] = text.encode()
    for path, content in files.items():
        replace_page_file(path, content)
    for line in [*_lines(output, facts), words]:
        print(visible_line(line))
    if not can_plot():
        print(f"no plots: {INSTALL}")
    print(visible_line(f"written   {display(file)}{_beside(plots) if kind == 'md' else ''}"))
    return EXIT_OK


def _look_alikes(output: Output, asked: int | None) -> tuple[list[Block], str]:
    """The section on images that look alike, and a line on it for the terminal."""
    from jobs.lookalikes import look_alikes, read_looks
    from jobs.output import IMAGE_COLUMNS
    from jobs.quantities import counted
    from jobs.report_sections import look_alike_section

    made = output.listing.num_rows - output.listing.num_failed
    is_local = output.storage.root is not None
    most = (COMPARED if is_local else 0) if asked is None else asked
    if not most:
        where = "" if is_local else ", which would have to be fetched"
        remark = f"Images were not compared{where}: --compare N compares the first N of them."
        return look_alike_section([], [], [], remark), f"alike     {remark}"
    columns = (*IMAGE_COLUMNS, "sha256", "prompt", "seed")
    rows: list[Mapping[str, Any]] = list(islice(output.ok_rows(columns), most))
    seen, problems = read_looks(output.storage, rows)
    pairs = look_alikes([look for _, look in seen])
    compared = f"{len(seen):,} of {counted(made, 'image')}"
    remark = f"Compared: {compared}"
    remark += f", the first ones; --compare {made} compares all." if made > len(rows) else "."
    number = f"{counted(len(pairs), 'image')} like an earlier one"
    line = f"alike     {number}, of {compared} compared"
    line += f"; {counted(len(problems), 'image')} not readable" if problems else ""
    return look_alike_section(seen, pairs, problems, remark), line


def _lines(output: Output, facts: Facts) -> list[str]:
    """The report in short, for the terminal."""
    import numpy as np

    from jobs.quantities import counted

    planned = output.record.plan.num_samples
    failed = facts.failed_by_type.total()
    name = output.record.config["name"]
    lines = [f"{name}: {len(facts.created):,} of {counted(planned, 'image')}, {failed:,} failed"]
    if failed:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in facts.failed_by_type.items())
        lines.append(f"failures  {kinds}")
    if len(facts.seconds):
        line = f"time      {float(np.median(facts.seconds)):.3g} s for an image (median)"
        if facts.runs.active_seconds:
            line += f", {len(facts.created) / facts.runs.active_seconds:.3g} images a second"
        lines.append(line)
    return lines


def _page_file(
    root: Path | None, uri: str, given: Path | None, form: str | None
) -> tuple[Path, str]:
    """Where the page goes, and its format. Raises InputError where it cannot go there."""
    kind = form or "html"
    if given is None:
        if root is None:
            raise InputError(f"{uri}: is no local folder; allowed: with -o FILE for the report")
        file = root / f"report.{kind}"
    elif re.match(r"[a-z][a-z0-9+.-]*:/", str(given)):  # a path has one of an address's slashes
        raise InputError(f"-o: {given}: allowed: a local file or folder")
    elif given.is_dir():
        file = given / f"report.{kind}"
    else:
        file = given
        by_name = _SUFFIXES.get(file.suffix.lower())
        if by_name is None:
            raise InputError(
                f"-o: {given}: allowed: a folder that is there, or a file that ends in .html or .md"
            )
        if form not in (None, by_name):
            raise InputError(f"--format: {form}: allowed: {by_name}, as -o {given} ends")
        kind = by_name
    check_page_file(file, GENERATOR, "report")
    return file, kind


def _beside(plots: Sequence[Plot]) -> str:
    from jobs.quantities import counted

    return f", with {counted(len(plots), 'plot')} beside it" if plots else ""
