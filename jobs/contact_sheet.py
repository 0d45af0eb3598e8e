"""The pictures of an output side by side, as one image file.

    python -m jobs.contact_sheet output/demo output/demo.png --columns 8

For a look at a small output; it reads what is committed, of a job that is still running too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from jobs.errors import EXIT_OK, InputError, JobError
from jobs.output import IMAGE_COLUMNS, Output, read_image_bytes
from jobs.terminal import visible
from jobs.writers import decode_image
from zimage_core.contact_sheet import contact_sheet


def sheet_of(uri: str, *, columns: int = 8, limit: int = 96) -> Image.Image:
    """Put the first pictures of an output in rows, in the order of their indices, on white.

    Args:
        uri: output of a job.
        columns: pictures of a row.
        limit: most pictures that are shown.

    Returns:
        RGB, each picture in a cell of the size of the largest.

    Raises:
        InputError: there is no output of a job at `uri`, or it holds no picture yet.
        StorageError: it cannot be read.
    """
    pictures = list(islice(_pictures(Output.open(uri)), limit))
    if not pictures:
        raise InputError(f"{uri}: holds no picture yet; allowed: an output with at least one")
    return contact_sheet(pictures, columns)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.contact_sheet",
        description="Put the pictures of an output side by side in one image file.",
    )
    parser.add_argument("output", metavar="OUTPUT")
    parser.add_argument("file", type=Path, metavar="FILE", help=".png, .jpg or .webp")
    parser.add_argument("--columns", type=int, default=8, metavar="N")
    parser.add_argument("--limit", type=int, default=96, metavar="N", help="most pictures")
    args = parser.parse_args(arguments)
    try:
        for flag in ("columns", "limit"):
            if getattr(args, flag) < 1:
                raise InputError(f"--{flag}: {getattr(args, flag)}: allowed: 1 or more")
        sheet = sheet_of(args.output, columns=args.columns, limit=args.limit)
        try:
            sheet.save(args.file, quality=90)  # without meaning for PNG
        except (OSError, ValueError) as error:
            raise InputError(f"{args.file}: cannot be written: {error}") from error
    except JobError as error:
        print(visible(error), file=sys.stderr)
        return error.exit_code
    print(f"{args.file}: {sheet.width}x{sheet.height}")
    return EXIT_OK


def _pictures(output: Output) -> Iterator[Image.Image]:
    """Committed pictures in index order; one that is gone or broken is an error, not a gap."""
    for row in output.ok_rows(IMAGE_COLUMNS):
        content = read_image_bytes(output.storage, row)
        if content is None:
            raise InputError(f"{row['file_name']}: the file is missing; see zimage verify")
        try:
            yield Image.fromarray(decode_image(content))
        except OSError as error:
            raise InputError(
                f"{row['file_name']}: cannot be decoded ({error}); see zimage verify"
            ) from error


if __name__ == "__main__":
    raise SystemExit(main())
