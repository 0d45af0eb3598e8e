"""Train the tiny edit checkpoint from the tiny text-to-image one, on two cores.

    python -m zimage_core.tiny.train_edit data/checkpoints/z-image-tiny OUT

Stages: pairs of drawings, vision encoder, all three models together. Each writes its state at least
every two minutes; the same command continues where the last one stopped. Give it the cores for
itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from zimage_core.tiny.edit_training import EditSettings, EditTraining
from zimage_core.tiny.state import Budget

STATE = Path("/var/tmp/zimage-tiny-edit-train")
STEPS = {"vision": 800, "edit": 1249}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m zimage_core.tiny.train_edit", description="Train the tiny edit checkpoint."
    )
    parser.add_argument("base", type=Path, help="the text-to-image checkpoint to begin with")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--state", type=Path, default=STATE, help="folder that it resumes from")
    parser.add_argument("--vocabularies", type=Path, help="folder; that of the clone by default")
    parser.add_argument("--look", type=int, default=24, help="edits of each look at it, ten times")
    for name, steps in STEPS.items():
        parser.add_argument(f"--steps-{name}", type=int, default=steps)
        parser.add_argument(f"--minutes-{name}", type=float, help="instead of steps")
    for item in fields(EditSettings):
        name = item.name.replace("_", "-")
        parser.add_argument(f"--{name}", type=type(item.default), default=item.default)
    options = vars(parser.parse_args(arguments))
    budgets = {}
    for name in STEPS:
        minutes = options[f"minutes_{name}"]
        steps = options[f"steps_{name}"]
        budgets[name] = Budget(steps=steps) if minutes is None else Budget(minutes=minutes)
    settings = EditSettings(**{item.name: options[item.name] for item in fields(EditSettings)})
    training = EditTraining(
        options["base"],
        options["state"],
        settings,
        budgets,
        vocabularies=options["vocabularies"],
        looked_at=options["look"],
    )
    training.run(options["out"])


if __name__ == "__main__":
    main()
