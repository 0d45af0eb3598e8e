"""`zimage gallery`: the images of an output as a page, in a file or served while they are made."""

from __future__ import annotations

import argparse
import base64
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from jobs.errors import EXIT_DIFFERENCE, EXIT_OK, InputError
from jobs.page_file import check_page_file, replace_page_file
from jobs.quantities import counted, file_size
from jobs.terminal import visible

NAME = "gallery.html"
PORT = 8420
_SHOWN = 20
_MAX_PORT = 65535


def add_arguments(command: argparse.ArgumentParser, not_negative: Callable[[str], int]) -> None:
    """Fill the parser of `zimage gallery`.

    Args:
        not_negative: reads a whole number, 0 or more.
    """
    add = command.add_argument
    add("output", metavar="OUTPUT")
    add(
        "-o",
        "--page",
        type=Path,
        metavar="FILE",
        help=f"where the page goes; default OUTPUT/{NAME}, needed for an object store",
    )
    add("--embed", action="store_true", help="thumbnails inside of the page: one file to send")
    add(
        "--serve",
        action="store_true",
        help="show it at an address of this machine, live, until Ctrl-C; images can be rejected",
    )
    add("--port", type=not_negative, metavar="N", help=f"of --serve; default {PORT}, 0: any free")
    add(
        "--import-rejected",
        type=Path,
        metavar="FILE.csv",
        help="reject the images that a table names, and make no page",
    )


def run(args: argparse.Namespace) -> int:
    """Make the page, serve it, or read a table of rejected images.

    Raises:
        InputError: there is no output of a job, a flag or a table does not fit.
        StorageError: the output cannot be read, or the page not written.
    """
    asked = [flag for flag in ("embed", "page") if getattr(args, flag)]
    others = ["serve"] if args.serve else []
    others += ["import-rejected"] if args.import_rejected else []
    if len(others) > 1 or (others and asked):
        flags = " and ".join(f"--{flag}" for flag in [*asked, *others][:2])
        raise InputError(f"{flags}: allowed: one of the two")
    if args.port is not None and not args.serve:
        raise InputError(f"--port: {args.port}: allowed: with --serve alone")
    if args.port is not None and args.port > _MAX_PORT:
        raise InputError(f"--port: {args.port}: allowed: 0 to {_MAX_PORT}")
    if args.import_rejected:
        return import_rejected(args.output, args.import_rejected)
    if args.serve:
        return _serve(args.output, PORT if args.port is None else args.port)
    return write_page(args.output, args.page, embed=args.embed)


def thumbnail_folder(page: Path) -> Path:
    """Where a page's thumbnails are: beside it.

    Under a name that `datasets` leaves out (two underscores), so that `load_dataset("imagefolder")`
    of an output takes none of them for images of the job.
    """
    return page.with_name(f"__{page.stem}__")


def write_page(uri: str, page: Path | None, *, embed: bool) -> int:
    """Write the page and the thumbnails that are missing; exit code 0, or 1 if images are damaged.

    Args:
        page: the file; None for `gallery.html` in a local output.
        embed: hold the thumbnails in the page itself.
    """
    from jobs.gallery_html import html_page
    from jobs.gallery_rows import block, facts, linked, marks, progress, read_rows
    from jobs.output import Output
    from jobs.rejected import counting, read_rejected
    from jobs.thumbnails import ThumbnailFolder, make_thumbnails, thumbnail_name

    output = Output.open(uri)
    root = output.storage.root
    if page is None:
        if root is None:
            raise InputError(f"{uri}: is no local folder; allowed: with -o FILE for the page")
        page = root / NAME
    _check_page(page)
    rows = [row for _, some in read_rows(output, sorted(output.listing.parts)) for row in some]
    if not rows:
        raise InputError(f"{uri}: there is no image in it yet; --serve shows them as they come")
    rejected = read_rejected(output.storage)
    with ExitStack() as stack:
        shown = thumbnail_folder(page)
        if embed:  # an embedded page comes alone; what is there already is used
            folder = shown if shown.is_dir() else Path(stack.enter_context(TemporaryDirectory()))
        else:
            folder = shown
        thumbnails = ThumbnailFolder(folder)
        made_rows = [row for row in rows if row["status"] == "ok"]
        made, problems = make_thumbnails(output.storage, thumbnails, made_rows)
        names = {thumbnail_name(row["pixels_sha256"]) for row in made_rows}
        current = {name for name in names if name is not None}
        thumbnails.remove_others(current)
        for row in rows:
            row["problem"] = problems.get(row["index"])
        about = {
            **facts(output, uri),
            **progress(output, uri),
            "mode": "embed" if embed else "file",
            "thumbnails": None if embed else f"{quote(shown.name)}/",
            "images": None if embed else _images_prefix(root, page),
            "rejected": marks(counting(rejected, _hashes(rows)).values()),
        }
        blocks: dict[str, object] = {"rows": block([linked(row) for row in rows])}
        if embed:
            found = {name: thumbnails.read(name) for name in sorted(current)}
            blocks["thumbnails"] = {
                name[:-5]: base64.b64encode(content).decode()
                for name, content in found.items()
                if content is not None
            }
        content = html_page(about, blocks).encode()
        replace_page_file(page, content)
        there = len(current & thumbnails.names()) - made
    where = "inside" if embed else f"in {shown}"
    print(
        visible(
            f"{page}: {counted(len(made_rows), 'image')}, {about['failed']:,} failed "
            f"({file_size(len(content))}; thumbnails {where}: {made:,} made, {there:,} there)"
        )
    )
    return _report_problems(problems)


def import_rejected(uri: str, file: Path) -> int:
    """Take over the marks of a table; exit code 0.

    Raises:
        InputError: a cell of the table does not fit: file, row and column are named.
    """
    from jobs.output import Output
    from jobs.rejected import MAX_BYTES, PATH, add_rejected, counting, parse_rejected

    output = Output.open(uri)
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"--import-rejected: {file}: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise InputError(f"--import-rejected: {file}: allowed: up to {file_size(MAX_BYTES)}")
    current = {row["index"]: row["pixels_sha256"] for row in output.ok_rows(["pixels_sha256"])}
    found = parse_rejected(content, str(file), current)
    wanted = counting(found, current)
    new = add_rejected(output.storage, wanted.values())
    print(
        visible(
            f"{uri}/{PATH}: {counted(new, 'image')} rejected, {len(wanted) - new:,} already were"
        )
    )
    if wanted:
        print("zimage run JOB --redo-rejected makes them again", file=sys.stderr)
    if len(found) > len(wanted):
        count = counted(len(found) - len(wanted), "row")
        print(f"left out: {count} of images that were made again since")
    return EXIT_OK


def _serve(uri: str, port: int) -> int:
    from jobs.gallery_server import GalleryServer
    from jobs.output import Output

    root = Output.open(uri).storage.root
    with ExitStack() as stack:
        if root is not None and os.access(root, os.W_OK):
            folder = thumbnail_folder(root / NAME)
        else:  # kept while it serves
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="zimage-gallery-")))
        server = stack.enter_context(GalleryServer(uri, folder, port))
        print(visible(f"{uri}: {server.address}"), flush=True)
        print("Ctrl-C ends it; who has the address can look and reject", file=sys.stderr)
        server.serve_until_interrupted()
    print("ended", file=sys.stderr)
    return EXIT_OK


def _check_page(page: Path) -> None:
    """Refuse a place where no page can be, and a file of someone else's."""
    from jobs.gallery_html import GENERATOR

    if "://" in str(page) or page.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"-o: {page}: allowed: a local file that ends in .html")
    check_page_file(page, f'content="{GENERATOR}"', "page")


def _images_prefix(root: Path | None, page: Path) -> str | None:
    """Where the page finds the output's files, as a relative address."""
    if root is None:
        return None
    way = os.path.relpath(root, page.absolute().parent)
    return "" if way == "." else f"{quote(way)}/"


def _hashes(rows: list[dict[str, Any]]) -> dict[int, str | None]:
    return {row["index"]: row["pixels_sha256"] for row in rows}


def _report_problems(problems: dict[int, str]) -> int:
    for index, problem in list(problems.items())[:_SHOWN]:
        print(visible(f"sample {index}: {problem}"))
    if len(problems) > _SHOWN:
        print(f"... and {len(problems) - _SHOWN:,} more")
    if problems:
        print(f"{counted(len(problems), 'image')} cannot be shown: zimage verify tells more")
    return EXIT_DIFFERENCE if problems else EXIT_OK
