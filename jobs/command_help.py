"""What `--help` shows of every command beside its arguments, and what completion knows of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

EXAMPLES = {
    "zimage": "zimage run jobs/avatars.yaml --local --limit 8",
    "zimage init": "zimage init people.xlsx --model data/checkpoints/z-image-tiny",
    "zimage run": "zimage run jobs/avatars.yaml --local --limit 8",
    "zimage submit": "zimage submit jobs/avatars.yaml --output s3://bucket/avatars",
    "zimage plan": "zimage plan jobs/avatars.yaml --gpus 6 --device rtx4090",
    "zimage status": "zimage status output/avatars",
    "zimage verify": "zimage verify output/avatars",
    "zimage regen": "zimage regen output/avatars 12 4711 --write again",
    "zimage diff": "zimage diff jobs/avatars.yaml jobs/mine.yaml",
    "zimage gc": "zimage gc output/avatars --delete",
    "zimage export": "zimage export output/avatars avatars --link",
    "zimage gallery": "zimage gallery output/avatars --serve",
    "zimage report": "zimage report output/avatars",
    "zimage generate": 'zimage generate --model DIR --prompt "a red apple" -o apple.png',
    "zimage weights": "zimage weights download Tongyi-MAI/Z-Image-Turbo",
    "zimage weights download": "zimage weights download Tongyi-MAI/Z-Image-Turbo",
    "zimage weights manifest": "zimage weights manifest ckpts/Z-Image-Turbo -o turbo.json",
    "zimage weights verify": "zimage weights verify ckpts/Z-Image-Turbo",
    "zimage weights convert": "zimage weights convert tuned.gguf tuned --base ckpts/Z-Image-Turbo",
    "zimage bench": "zimage bench --model ckpts/Z-Image-Turbo --sizes 1024 --steps 8",
    "zimage doctor": "zimage doctor --model ckpts/Z-Image-Turbo",
}
# how shtab, which completes from a parser, says that an argument is a path
_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
_FOLDERS = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/", "tcsh": "d"}


def complete(root: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give every command of the command line a usage of one line and an example; returns `root`.

    argparse's own usage names every flag, which the list below it does again: for `generate` these
    are 11 lines, which also stand before every error.
    """
    for command in commands(root):
        for action in command._actions:
            if action.metavar == "OUTPUT":  # the same in every command
                action.help = "the output of a job: a folder, s3://, gs:// or az://"
            if action.type is Path or action.dest in ("job", "before", "now", "output"):
                is_folder = "DIR" in (action.metavar or "")
                action.complete = _FOLDERS if is_folder else _FILES  # type: ignore[attr-defined]
        command.usage = _usage(command)
        command.epilog = f"example: {EXAMPLES[command.prog]}"
    return root


def commands(root: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser, and those of all commands and sub-commands in it."""
    yield root
    for action in root._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from commands(command)


def _usage(command: argparse.ArgumentParser) -> str:
    words = ["%(prog)s"]
    positional: list[str] = []
    optional = False
    for action in command._actions:
        name = str(action.metavar or action.dest)
        if isinstance(action, argparse._SubParsersAction):
            positional += [name, "..."]
        elif not action.option_strings:
            shown = {"?": f"[{name}]", "+": f"{name}..."}
            positional.append(shown.get(str(action.nargs), name))
        elif action.required:
            words += [action.option_strings[-1], name]
        else:
            optional = optional or action.dest != "help"
    return " ".join([*words, *positional, *(["[options]"] if optional else [])])
