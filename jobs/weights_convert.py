"""`zimage weights convert`: a checkpoint in any layout, written in diffusers' layout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.errors import EXIT_OK, InputError, ModelError, StorageError
from jobs.quantities import file_size

DTYPES = ("auto", "bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the parser of `zimage weights convert`."""
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="a .safetensors or .gguf file, or a folder"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; must not exist")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="a checkpoint that gives what SOURCE lacks: other models, configurations, tokenizer",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="auto: as stored, bfloat16 where that is float8 or quantised",
    )
    parser.add_argument("--vae", type=Path, metavar="FILE", help="take the autoencoder from here")
    parser.add_argument(
        "--text-encoder", type=Path, metavar="FILE", help="take the text encoder from here"
    )


def convert(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        InputError: OUT is there already, or a flag does not fit.
        ModelError: a source cannot be used.
        StorageError: the disk is too small or cannot be written.
    """
    import torch

    from zimage_core.config import CheckpointError
    from zimage_core.conversion import convert_checkpoint

    try:
        done = convert_checkpoint(
            args.source,
            args.out,
            base=args.base,
            dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
            vae=args.vae,
            text_encoder=args.text_encoder,
        )
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    except (ValueError, FileExistsError) as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise StorageError(str(error)) from error
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    for name, model in done.models.items():
        print(f"{name}: {model.dtype}, {file_size(model.num_bytes)}, from {model.source}")
    if done.missing:
        print(
            f"{done.out}: written, but to be a whole checkpoint it lacks "
            f"{', '.join(done.missing)}; --base DIR brings them"
        )
    else:
        print(f"{done.out}: written; it is a whole checkpoint")
    return EXIT_OK
