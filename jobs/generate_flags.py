"""The flags of `zimage generate`, and what stands for those that are not given."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jobs.errors import InputError
from jobs.resources import data_path

STRENGTH = 0.6
# What an image of `--from` says comes before these.
_DEFAULTS: dict[str, object] = {
    "negative_prompt": "",
    "seed": 42,
    "steps": 8,
    "guidance": 0.0,
    "dtype": "auto",
    "attention": "auto",
    "quantization": "none",
    "cfg_normalization": False,
    "cfg_truncation": 1.0,
    "max_sequence_length": 512,
}


def add_arguments(
    command: argparse.ArgumentParser,
    add_parts: Callable[[argparse.ArgumentParser], None],
    not_negative: Callable[[str], int],
    positive: Callable[[str], int],
) -> None:
    """Add them.

    Args:
        add_parts: adds the flags that replace parts of a checkpoint.
        not_negative, positive: types of numbers.
    """
    command.add_argument(
        "--model",
        type=data_path,
        metavar="DIR",
        help="a checkpoint; that of the output with --from",
    )
    add_parts(command)
    command.add_argument("--prompt", metavar="TEXT", help="required without --from")
    command.add_argument("--negative-prompt", metavar="TEXT", help="needs --guidance above 0")
    command.add_argument("--seed", type=not_negative, metavar="N", help="default 42")
    command.add_argument(
        "--width", type=positive, metavar="PIXELS", help="default 1024, or the last --image's"
    )
    command.add_argument(
        "--height", type=positive, metavar="PIXELS", help="default 1024, or the last --image's"
    )
    command.add_argument("--steps", type=positive, metavar="N", help="default 8")
    command.add_argument("--guidance", type=float, metavar="SCALE", help="default 0, which is off")
    command.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="auto, the default: bfloat16 on a GPU, float32 on a CPU",
    )
    command.add_argument(
        "--attention", metavar="BACKEND", help="auto, the default: the best that can run"
    )
    command.add_argument(
        "--offload",
        choices=["auto", "none", "phase", "model", "block"],
        default="auto",
        help="what leaves a small GPU while it is not needed; auto: as little as fits",
    )
    command.add_argument("--quantization", choices=["none", "int8"], help="int8: 8-bit weights")
    command.add_argument(
        "--lora", action="append", type=Path, metavar="FILE", help="an adapter; repeatable"
    )
    command.add_argument(
        "--lora-scale",
        action="append",
        type=float,
        metavar="SCALE",
        help="its strength, default 1; one for all, or one for each --lora",
    )
    command.add_argument("--init-image", type=Path, metavar="FILE", help="a picture to start from")
    command.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="white where --init-image is made anew, black where it is kept",
    )
    command.add_argument(
        "--strength",
        type=float,
        metavar="SHARE",
        help=f"how much of --init-image is replaced, above 0 to 1; default {STRENGTH}",
    )
    command.add_argument(
        "--cache",
        type=int,
        metavar="N",
        help="run one step of N in the middle of a long schedule, 2 to 4: quicker, and lossy",
    )
    command.add_argument(
        "--image",
        action="append",
        type=Path,
        metavar="FILE",
        help="a picture to edit, with an Edit checkpoint; repeatable",
    )
    command.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="make this image again, from what it says of itself, and compare",
    )
    command.add_argument(
        "--embed-metadata",
        choices=["full", "minimal", "none"],
        default="full",
        help="what the file says of how it was made; default full, prompt included",
    )
    command.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="required without --from"
    )
    command.set_defaults(cfg_normalization=None, cfg_truncation=None, max_sequence_length=None)


def check_given(args: argparse.Namespace) -> None:
    """Raise InputError where a flag is missing that only `--from` makes needless."""
    given = {"--model": args.model, "--prompt": args.prompt, "--output": args.output}
    for flag, value in given.items():
        if value is None and args.source is None:
            raise InputError(f"{flag}: not given; required without --from")


def fill_defaults(args: argparse.Namespace) -> None:
    """Set what neither a flag nor the image of `--from` has set."""
    for name, value in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
