"""Train the tiny checkpoint from nothing: one command, about three hours on two cores.

    python -m zimage_core.tiny.train data/checkpoints/z-image-tiny

Stages: tokenizer, autoencoder, latents, text encoder, transformer and text encoder together (the
base model), guidance distilled into both, decoder. Each writes its state at least every two
minutes; the same command continues where the last one stopped. Give it the cores for itself.

Its defaults are what the shipped checkpoint was made with.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from zimage_core.tiny.settings import Settings
from zimage_core.tiny.state import Budget
from zimage_core.tiny.training import STAGES, Training

STATE = Path("/var/tmp/zimage-tiny-train")
STEPS = {"vae": 6972, "text": 1100, "dit": 8201, "distill": 1062, "decoder": 1450}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m zimage_core.tiny.train", description="Train the tiny checkpoint."
    )
    parser.add_argument("out", type=Path, help="folder to write; its neighbour gets the base")
    parser.add_argument("--state", type=Path, default=STATE, help="folder that it resumes from")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to do")
    parser.add_argument("--vocabularies", type=Path, help="folder; that of the clone by default")
    parser.add_argument("--vae", type=Path, help="folder of an autoencoder to take as it is")
    for name, steps in STEPS.items():
        parser.add_argument(f"--steps-{name}", type=int, default=steps)
        parser.add_argument(f"--minutes-{name}", type=float, help="instead of steps")
    for item in fields(Settings):
        kind = _numbers if isinstance(item.default, tuple) else type(item.default)
        parser.add_argument(f"--{item.name.replace('_', '-')}", type=kind, default=item.default)
    options = vars(parser.parse_args(arguments))
    budgets = {name: _budget(options, name) for name in STEPS}
    settings = Settings(**{item.name: options[item.name] for item in fields(Settings)})
    training = Training(
        options["state"],
        settings,
        budgets,
        vocabularies=options["vocabularies"],
        vae=options["vae"],
    )
    training.run(options["out"], options["until"])


def _budget(options: dict[str, Any], name: str) -> Budget:
    minutes: float | None = options[f"minutes_{name}"]
    if minutes is None:
        return Budget(steps=options[f"steps_{name}"])
    return Budget(minutes=minutes)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    main()
