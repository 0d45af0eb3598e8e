"""`zimage weights ...`: fetching checkpoints, their manifests of hashes, and checking against one.

Each sub-command is a parser below and a function that imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from jobs.errors import InputError

Verb = Callable[[argparse.Namespace], int]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Fill the parser of `zimage weights` with its sub-commands."""
    verbs = command.add_subparsers(dest="verb", required=True, metavar="VERB")

    download = _verb(verbs, "download", _download, "fetch a checkpoint into a folder")
    download.add_argument("repo", metavar="REPO", help="such as Tongyi-MAI/Z-Image-Turbo")


def run(args: argparse.Namespace) -> int:
    """Run the sub-command that was parsed; its exit code."""
    verb: Verb = args.run_verb
    return verb(args)


def _verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    function: Verb,
    summary: str,
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:])
    parser.set_defaults(run_verb=function)
    return parser


def _download(args: argparse.Namespace) -> int:
    raise InputError(f"{args.repo}: downloading is not available yet")
