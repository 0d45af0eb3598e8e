"""`zimage init`: a job file for a table, from a look at it."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import EXIT_OK, InputError, ModelError
from jobs.resources import data_path
from jobs.terminal import visible_line

if TYPE_CHECKING:
    from jobs.job_draft import JobDraft
    from jobs.proposal import Proposal
    from jobs.table_view import Sheet

_IMAGES = 8  # of a dry run, and prompts that are shown
_SMALL = 200_000_000  # parameters of a transformer that a CPU runs while one waits
_TURBO_SHIFT = 4.5  # of the scheduler: Turbo has 3, Z-Image 6
_TRIES = 3  # to answer a question


Asker = Callable[[str, Sequence[str], str], str]
"""Asks a question with possible answers, the first of which is the default; what it is about."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Fill the parser of `zimage init`."""
    add = command.add_argument
    add(
        "table",
        metavar="TABLE",
        type=data_path,
        help="a CSV or XLSX file, columns named in row 1",
    )
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the job file; default: the table's name with .yaml, in the working directory",
    )
    add("--sheet", metavar="NAME", help="of an XLSX file; default: the only one with rows")
    add(
        "--model",
        type=data_path,
        metavar="DIR",
        help="a checkpoint; default: the preset z-image-turbo",
    )
    add("--yes", action="store_true", help="ask nothing, take what is likeliest")
    add("--force", action="store_true", help="replace a job file that is there")


def run(args: argparse.Namespace) -> int:
    """Look at the table, write the job file, show prompts and, with a model at hand, images.

    Returns:
        0, or the exit code of the dry run.

    Raises:
        InputError: a table that cannot be used, a file that is there.
        ModelError: the checkpoint cannot be used.
    """
    from jobs.job_draft import JobDraft, job_name
    from jobs.proposal import prompt_columns, propose
    from jobs.quantities import counted
    from jobs.table_view import column_lines, columns_of
    from jobs.yaml_file import display
    from prompt_generators import ProfileError, make_generator

    name = job_name(args.table.stem)
    path = args.output or Path(f"{name}.yaml")
    _check_path(path, args.force)
    preset, is_small = ("z-image-turbo", False) if args.model is None else _preset(args.model)
    ask = _asker(args.yes)
    try:
        sheet, only = _sheet(args.table, args.sheet, ask)
        profiles = sheet.profiles
        assert profiles is not None
        columns = columns_of(profiles)
        place = display(args.table) + (f", sheet {sheet.name!r}" if sheet.name else "")
        size = counted(len(columns), "column")
        _say(f"{place}: {counted(len(profiles), 'row')}, {size}")
        for line in column_lines(columns):
            _say(f"  {line}")
        _say("")
        found = prompt_columns(columns)
        prompt = found[0] if found else None
        if len(found) > 1:
            prompt = ask("Which column holds the prompts?", found, "column")
        proposal = propose(profiles, columns, prompt)
        generator = make_generator(
            proposal.generator,
            profiles=args.table,
            sheet=sheet.name,
            options=proposal.options,
        )
    except ProfileError as error:
        raise InputError(str(error)) from error
    _say_proposal(proposal)
    draft = JobDraft(
        path=path,
        name=name,
        profiles=profiles,
        sheet=None if only else sheet.name,
        proposal=proposal,
        preset=preset,
        model=args.model,
        output=_free_output(f"output/{name}"),
    )
    _write(path, draft.text(), args.force)
    _say("first prompts")
    _say_prompts(generator, len(profiles))
    _say(f"written   {display(path)}: {counted(len(profiles), 'prompt')}, into {draft.output}")
    code = _dry_run(draft, is_small)
    shown = shlex.quote(display(path))
    commands = [f"plan {shown}", f"run {shown} --local --limit {_IMAGES}", f"run {shown}"]
    if code is not None:
        del commands[1]
    for command in commands:
        _say(f"{'next' if command == commands[0] else '':<8}  zimage {command}")
    return EXIT_OK if code is None else code


def _check_path(path: Path, force: bool) -> None:
    """Refuse what a job file cannot be called, or would replace."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise InputError(f"--output: {path}: allowed: a name that ends in .yaml or .yml")
    if path.is_dir():
        raise InputError(f"--output: {path}: is a folder; allowed: a file")
    if os.path.lexists(path) and not force:
        raise InputError(f"{path}: is there already; allowed: another -o FILE, or --force")


def _sheet(table: Path, name: str | None, ask: Asker) -> tuple[Sheet, bool]:
    """The sheet to use, and whether the file has no other.

    Raises:
        ProfileError: no sheet is a table of profiles.
    """
    from jobs.table_view import read_sheets, sheet_line

    sheets = read_sheets(table, name)
    usable = [sheet for sheet in sheets if sheet.profiles is not None]
    if not usable:
        problems = [sheet.problem for sheet in sheets if sheet.problem is not None]
        # an empty sheet beside a table with a mistake is not what its owner wants to hear of
        raise next((p for p in problems if p.row is not None), problems[0])
    if len(sheets) > 1:
        for sheet in sheets:
            _say(f"sheet {sheet_line(sheet)}")
    # a sheet of one column beside a wider one is a list or a remark
    wide = [s for s in usable if s.profiles is not None and len(s.profiles.columns) > 1]
    usable = wide or usable
    chosen = usable[0]
    if len(usable) > 1:
        names = [str(sheet.name) for sheet in usable]
        answer = ask("Which sheet holds the profiles?", names, "sheet")
        chosen = usable[names.index(answer)]
    return chosen, len(sheets) == 1 and name is None


def _asker(yes: bool) -> Asker:
    def ask(question: str, answers: Sequence[str], what: str) -> str:
        default = answers[0]
        if not yes and sys.stdin.isatty() and sys.stdout.isatty():
            return _answer(question, answers)
        others = ", ".join(map(repr, answers[1:]))
        why = "--yes" if yes else "no terminal to ask on"
        _say(f"{what} {default!r} taken ({why}); also possible: {others}")
        return default

    return ask


def _answer(question: str, answers: Sequence[str]) -> str:
    _say(question)
    for number, answer in enumerate(answers, start=1):
        _say(f"  {number}  {answer}")
    for _ in range(_TRIES):
        try:
            given = input("number, or Enter for 1: ").strip()
        except EOFError:
            _say("")
            return answers[0]
        if given in answers:
            return given
        if not given or (given.isdecimal() and 1 <= int(given) <= len(answers)):
            return answers[int(given or 1) - 1]
        _say(f"{given!r}: allowed: 1 to {len(answers)}")
    raise InputError(f"{question} No answer among 1 to {len(answers)} in {_TRIES} tries")


def _preset(model: Path) -> tuple[str, bool]:
    """The preset for a checkpoint, and whether it is small. Raises ModelError."""
    import json

    from zimage_core.loader import check_checkpoint

    if not model.is_dir():
        raise ModelError(f"--model: {model}: no such folder; allowed: a checkpoint folder")
    try:
        summary = check_checkpoint(model)
        scheduler = json.loads((model / "scheduler/scheduler_config.json").read_bytes())
        shift = float(scheduler.get("shift", 0))
    except (ValueError, OSError, TypeError, AttributeError) as error:
        raise ModelError(f"--model: {error}") from error
    if summary.num_parameters["transformer"] < _SMALL:
        return "z-image-tiny", True
    if summary.transformer.siglip_feat_dim is not None:
        return "z-image-edit", False
    return ("z-image-turbo" if shift < _TURBO_SHIFT else "z-image"), False


def _say_proposal(proposal: Proposal) -> None:
    _say(f"generator {proposal.generator}: {proposal.why}")
    _say(f"  used      {', '.join(proposal.used)}")
    for why, names in proposal.reasons().items():
        _say(f"  not used  {', '.join(names)}: {why}")
    if "template" in proposal.options:
        _say(f"  template  {proposal.options['template']}")
    for note in proposal.notes:
        _say(f"  note      {note}")
    _say("")


def _say_prompts(generator: object, count: int) -> None:
    from prompt_generators import PromptGenerator, prompt_at

    assert isinstance(generator, PromptGenerator)
    for index in range(min(count, _IMAGES)):
        _say(f"  {index:>6}  {prompt_at(generator, index).text}")
    _say("")


def _free_output(uri: str) -> str:
    """The output, or another name where something is in its place."""
    free, number = uri, 1
    while os.path.lexists(free) or os.path.lexists(f"{free}-dry"):
        number += 1
        free = f"{uri}-{number}"
    return free


def _write(path: Path, text: str, force: bool) -> None:
    """Let the file appear whole; without `force` only where none is. Raises InputError."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        if force:
            part.replace(path)
        else:
            os.link(part, path)
    except FileExistsError as error:
        raise InputError(f"{path}: is there already; allowed: another -o FILE") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _dry_run(draft: JobDraft, is_small: bool) -> int | None:
    """Eight images where a model is at hand that makes them soon; the exit code, None for none."""
    from jobs.job_file import load_job
    from jobs.preparation import RunOptions, output_uri
    from jobs.yaml_file import display

    config = load_job(draft.path)  # also shows that the file is one
    if not is_small:
        if draft.model is None and not config.model.folder.is_dir():
            return None
        from jobs.device import device_type

        if device_type() == "cpu":
            if draft.model is not None:
                _say("no images: a model of this size takes long without a GPU")
            return None

    from jobs.contact_sheet import sheet_of
    from jobs.runner import run_job

    command = ("zimage", "run", display(draft.path), "--local", "--limit", str(_IMAGES))
    code = run_job(config, RunOptions(local=True, limit=_IMAGES, command=command))
    uri = output_uri(config, _IMAGES)
    file = Path(f"{uri}.png")
    try:
        sheet_of(uri, columns=4, limit=_IMAGES).save(file)
    except (InputError, OSError, ValueError) as error:
        _say(f"no contact sheet: {error}")
    else:
        _say(f"look      {file}: the first images side by side")
    return code


def _say(text: str) -> None:
    print(visible_line(text), flush=True)
