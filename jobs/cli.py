"""The command line: `zimage COMMAND ...`. Parses, calls, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from jobs import bench as bench_command
from jobs import command_help, generate_flags, weights_command
from jobs import gallery as gallery_command
from jobs import init_job as init_command
from jobs import report as report_command
from jobs.errors import EXIT_INTERRUPTED, InputError, JobError
from jobs.resources import data_path
from jobs.terminal import visible

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code (see the table in docs/cli.md)."""
    args = parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    args.is_process = argv is None  # and ends with this function
    command: Command = args.run_command
    try:
        return command(args)
    except JobError as error:
        print(visible(f"zimage {args.command}: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"zimage {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader of our output (`| head`) is gone: no error of ours, and nothing left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@functools.cache  # some 200 flags; a process that calls `main` again and again makes them once
def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
        prog="zimage",
        description="Batch image generation with Z-Image: from a spreadsheet to images.",
    )
    root.add_argument("--version", action="version", version=f"zimage {version('zimage-batch')}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    init = _command(commands, "init", init_command.run, "draft a job file for a table")
    init_command.add_arguments(init)

    run = _command(commands, "run", _run, "run a job, or resume it")
    _job_arguments(run)
    run.add_argument("--local", action="store_true", help="in this process, without Ray")
    _run_arguments(run)

    submit = _command(commands, "submit", _submit, "run a job on a Ray cluster, through Ray Jobs")
    _job_arguments(submit)
    _run_arguments(submit)
    submit.add_argument(
        "--address", metavar="URL", help="of the cluster's dashboard; default: RAY_ADDRESS"
    )
    submit.add_argument(
        "--follow", action="store_true", help="show the log; exit with the job's code"
    )

    plan = _command(commands, "plan", _plan, "check a job without loading a model")
    _job_arguments(plan)
    _redo_argument(plan)
    plan.add_argument("--gpus", type=_positive, metavar="N", help="estimate for N GPUs")
    plan.add_argument("--device", metavar="NAME", help="estimate for this card, such as h100")
    plan.add_argument("--json", action="store_true", help="one JSON object on stdout")

    status = _command(commands, "status", _status, "show the progress of an output")
    status.add_argument("output", metavar="OUTPUT")
    status.add_argument("--json", action="store_true", help="one JSON object on stdout")

    verify = _command(commands, "verify", _verify, "re-read every committed image")
    verify.add_argument("output", metavar="OUTPUT")
    verify.add_argument("--json", action="store_true", help="one JSON object on stdout")

    regen = _command(commands, "regen", _regen, "make samples again and compare")
    regen.add_argument("output", metavar="OUTPUT")
    regen.add_argument(
        "indices", metavar="INDEX", nargs="+", type=_not_negative, help="numbers of samples"
    )
    regen.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=PATH",
        help="where the job's model, adapters, table or images are now; repeatable",
    )
    regen.add_argument("--write", type=Path, metavar="DIR", help="keep what was made, as PNG")
    regen.add_argument("--json", action="store_true", help="one JSON object on stdout")

    diff = _command(commands, "diff", _diff, "say which samples a change of the job would redo")
    diff.add_argument("before", metavar="JOB", help="as it was")
    diff.add_argument("now", metavar="JOB", help="as it is to be")
    diff.add_argument("--json", action="store_true", help="one JSON object on stdout")

    gc = _command(commands, "gc", _gc, "list or remove what no commit refers to")
    gc.add_argument("output", metavar="OUTPUT")
    gc.add_argument("--delete", action="store_true", help="remove it; without, only list it")
    gc.add_argument(
        "--superseded",
        action="store_true",
        help="also images of rows that were made again since",
    )
    gc.add_argument(
        "--min-age",
        type=_hours,
        default=24.0,
        metavar="HOURS",
        help="leave attempts that are younger; default 24",
    )
    gc.add_argument("--json", action="store_true", help="one JSON object on stdout")

    export = _command(commands, "export", _export, "put the images into one folder")
    export.add_argument("output", metavar="OUTPUT")
    export.add_argument("folder", metavar="DIR", type=Path, help="not there yet, or empty")
    way = export.add_mutually_exclusive_group()
    way.add_argument("--copy", action="store_true", help="copy the images; the default")
    way.add_argument("--link", action="store_true", help="make hard links, which take no space")

    gallery = _command(
        commands, "gallery", gallery_command.run, "show the images as a page to look through"
    )
    gallery_command.add_arguments(gallery, _not_negative)

    report = _command(commands, "report", report_command.run, "say how an output went")
    report_command.add_arguments(report, _not_negative)

    generate = _command(commands, "generate", _generate, "make one picture, without a job")
    generate_flags.add_arguments(generate, _part_arguments, _not_negative, _positive)

    weights = _command(commands, "weights", _weights, "fetch, list and check checkpoints")
    weights_command.add_arguments(weights)

    bench = _command(
        commands, "bench", bench_command.run, "time each stage beside the computed limit"
    )
    bench_command.add_arguments(bench, _positive)

    doctor = _command(commands, "doctor", _doctor, "say what this machine can run")
    doctor.add_argument(
        "--model", type=data_path, metavar="DIR", help="a checkpoint to check as well"
    )
    _part_arguments(doctor)
    doctor.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return command_help.complete(root)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    function: Command,
    summary: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:])
    command.set_defaults(run_command=function)
    return command


def _part_arguments(command: argparse.ArgumentParser) -> None:
    for flag, words in (
        ("--transformer", "transformer"),
        ("--vae", "autoencoder"),
        ("--text-encoder", "text encoder"),
    ):
        command.add_argument(
            flag, type=Path, metavar="FILE", help=f"take the {words} from a file of its own"
        )


def _job_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "job", metavar="JOB", help="a job file, or a Ray cluster file with metadata.job"
    )
    command.add_argument("--start", type=_not_negative, metavar="I", help="first prompt index")
    command.add_argument("--count", type=_positive, metavar="N", help="number of prompts")
    command.add_argument("--workers", metavar="N", help="number of workers, or auto")
    command.add_argument("--output", metavar="URI", help="where the images go")
    command.add_argument(
        "--config",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="laid over the job file; repeatable, later wins",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one key, the value read as YAML; repeatable",
    )


def _run_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--limit", type=_positive, metavar="N", help="dry run: the first N samples, to OUTPUT-dry"
    )
    command.add_argument(
        "--retry-failed", action="store_true", help="make the samples again that failed before"
    )
    command.add_argument(
        "--accept-changes",
        action="store_true",
        help="make those again whose prompts or starting images changed",
    )
    _redo_argument(command)


def _redo_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--redo-rejected",
        action="store_true",
        help="make rejected images again, with their next seeds",
    )


def _flags(args: argparse.Namespace) -> dict[str, object]:
    """Named flags as keys of the job file."""
    keys = {
        "prompts.start": args.start,
        "prompts.count": args.count,
        "run.workers": int(args.workers) if (args.workers or "").isdigit() else args.workers,
        "output.uri": args.output,
    }
    return {key: value for key, value in keys.items() if value is not None}


def _positive(text: str) -> int:
    return _whole(text, 1)


def _not_negative(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not least <= value < 2**63:
        raise argparse.ArgumentTypeError(
            f"value {text!r}: allowed: a whole number, {least} or more"
        )
    return value


def _hours(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1_000_000:
        raise argparse.ArgumentTypeError(f"value {text!r}: allowed: a number of hours, 0 or more")
    return value


# Each command imports what it needs when it runs: `zimage status` must not wait for torch.


def _run(args: argparse.Namespace) -> int:
    from jobs.cluster import refuse_lost_output
    from jobs.job_file import load_job
    from jobs.preparation import RunOptions
    from jobs.runner import run_job

    with _interruptible(args.is_process):
        config = load_job(args.job, overlays=args.config, sets=args.set, flags=_flags(args))
        refuse_lost_output(config.output.uri)
        options = RunOptions(
            local=args.local,
            limit=args.limit,
            retry_failed=args.retry_failed,
            accept_changes=args.accept_changes,
            redo_rejected=args.redo_rejected,
            command=("zimage", *args.argv),
        )
        return run_job(config, options)


@contextlib.contextmanager
def _interruptible(is_process: bool) -> Iterator[None]:
    """SIGTERM as Ctrl-C, before the driver listens for both and after: exit 130 at any moment.

    While the process ends, which takes a moment after a run, it is ignored: all is committed, and
    the exit code is to be the run's. A handler would not do, since the interpreter takes handlers
    away before it is gone.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if is_process else before)


def _submit(args: argparse.Namespace) -> int:
    from jobs.submission import submit

    arguments = [f"--limit={args.limit}"] if args.limit else []
    arguments += ["--retry-failed"] * args.retry_failed
    arguments += ["--accept-changes"] * args.accept_changes
    arguments += ["--redo-rejected"] * args.redo_rejected
    return submit(
        args.job,
        arguments=arguments,
        address=args.address,
        follow=args.follow,
        overlays=args.config,
        sets=args.set,
        flags=_flags(args),
    )


def _plan(args: argparse.Namespace) -> int:
    from jobs.job_file import load_job
    from jobs.plan_report import plan_report

    config = load_job(args.job, overlays=args.config, sets=args.set, flags=_flags(args))
    return plan_report(
        config,
        gpus=args.gpus,
        device=args.device,
        as_json=args.json,
        redo_rejected=args.redo_rejected,
    )


def _status(args: argparse.Namespace) -> int:
    from jobs.status import status

    return status(args.output, as_json=args.json)


def _verify(args: argparse.Namespace) -> int:
    from jobs.verify import verify

    return verify(args.output, as_json=args.json)


def _regen(args: argparse.Namespace) -> int:
    from jobs.regen import regen

    return regen(args.output, args.indices, sets=args.set, write=args.write, as_json=args.json)


def _diff(args: argparse.Namespace) -> int:
    from jobs.diff import diff
    from jobs.job_file import load_job

    return diff(load_job(args.before), load_job(args.now), as_json=args.json)


def _export(args: argparse.Namespace) -> int:
    from jobs.export import export

    return export(args.output, args.folder, link=args.link)


def _gc(args: argparse.Namespace) -> int:
    from datetime import timedelta

    from jobs.gc import gc

    return gc(
        args.output,
        delete=args.delete,
        superseded=args.superseded,
        min_age=timedelta(hours=args.min_age),
        as_json=args.json,
    )


def _generate(args: argparse.Namespace) -> int:
    from jobs.generate import generate_file

    return generate_file(args)


def _weights(args: argparse.Namespace) -> int:
    return weights_command.run(args)


def _doctor(args: argparse.Namespace) -> int:
    import json

    from jobs.doctor import doctor, format_doctor

    parts = {"transformer": args.transformer, "vae": args.vae, "text_encoder": args.text_encoder}
    given = {name: path for name, path in parts.items() if path is not None}
    if given and args.model is None:
        name, path = next(iter(given.items()))
        raise InputError(
            f"--{name.replace('_', '-')}: {path}: needs --model, whose part it replaces"
        )
    report = doctor(args.model, given)
    print(json.dumps(report, indent=2) if args.json else visible(format_doctor(report)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
