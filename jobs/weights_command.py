"""`zimage weights ...`: fetching checkpoints, their manifests of hashes, and checking against one.

Each sub-command is a parser below and a function that imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import weights_convert
from jobs.errors import EXIT_DIFFERENCE, EXIT_OK, InputError, ModelError
from jobs.quantities import counted, file_size

if TYPE_CHECKING:
    from zimage_core.weights_manifest import Difference

Verb = Callable[[argparse.Namespace], int]

_SOURCES = ("huggingface", "modelscope")
_FORMATS = ("md5", "sha256", "json")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Fill the parser of `zimage weights` with its sub-commands."""
    verbs = command.add_subparsers(dest="verb", required=True, metavar="VERB")

    download = _verb(verbs, "download", _download, "fetch a checkpoint into a folder")
    download.add_argument("repo", metavar="REPO", help="such as Tongyi-MAI/Z-Image-Turbo")
    download.add_argument(
        "folder", metavar="DIR", nargs="?", type=Path, help="default: ckpts/ and REPO's last part"
    )
    download.add_argument("--source", choices=_SOURCES, default="huggingface", help="the hub")
    download.add_argument("--revision", metavar="R", help="branch, tag or commit; default: main")
    download.add_argument("--json", action="store_true", help="one JSON object on stdout")

    manifest = _verb(verbs, "manifest", _manifest, "write down what each file holds")
    manifest.add_argument("folder", metavar="DIR", type=Path, help="a checkpoint")
    manifest.add_argument("-o", "--output", metavar="FILE", type=Path, help="default: stdout")
    manifest.add_argument(
        "--format",
        choices=_FORMATS,
        help="md5, sha256: columns for md5sum -c, sha256sum -c; json: both, and sizes; "
        "default: by FILE's ending, else md5",
    )
    manifest.add_argument(
        "--all", action="store_true", help="every file, not only those that loading reads"
    )

    verify = _verb(verbs, "verify", _verify, "compare a folder with a manifest")
    verify.add_argument("folder", metavar="DIR", type=Path, help="a checkpoint")
    verify.add_argument(
        "--manifest", metavar="FILE", type=Path, help="default: of its download, or a shipped one"
    )
    verify.add_argument("--json", action="store_true", help="one JSON object on stdout")

    weights_convert.add_arguments(
        _verb(verbs, "convert", weights_convert.convert, "write single files as a folder")
    )


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


@contextmanager
def _errors(folder: Path) -> Iterator[None]:
    """Turn the core's exceptions into those with exit codes."""
    from zimage_core import CheckpointError

    try:
        yield
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    except ValueError as error:  # of the manifest or the arguments
        raise InputError(str(error)) from error
    except OSError as error:
        raise ModelError(f"{folder}: {error}") from error


def _download(args: argparse.Namespace) -> int:
    from zimage_core.source_record import read_record
    from zimage_core.weights import ensure_model_weights

    folder: Path = args.folder or Path("ckpts") / args.repo.rpartition("/")[2]
    with _errors(folder):
        before = read_record(folder)
        path = ensure_model_weights(folder, args.repo, source=args.source, revision=args.revision)
        record = read_record(path)
    if args.json:
        values = {
            "path": str(path),
            "repo": args.repo,
            "source": record.source if record else None,
            "revision": record.revision if record else None,
            "commit": record.commit if record else None,
            "fetched": record != before,
            "files": len(record.files) if record else None,
            "bytes": sum(file["size"] for file in record.files.values()) if record else None,
        }
        print(json.dumps(values, indent=2))
    elif record is None:
        print(f"{path}: is complete; nothing says where it came from")
    else:
        size = file_size(sum(file["size"] for file in record.files.values()))
        already = "" if record != before else ", all there already"
        print(f"{path}: {record.describe()}; {len(record.files)} files, {size}{already}")
    return EXIT_OK


def _manifest(args: argparse.Namespace) -> int:
    from zimage_core.byte_progress import ByteProgress
    from zimage_core.loader import checkpoint_files
    from zimage_core.weights_manifest import folder_files, format_manifest, make_manifest

    folder, output = _existing(args.folder), args.output
    form = args.format
    if form is None:
        ending = output.suffix.lstrip(".") if output else ""
        form = ending if ending in _FORMATS else "md5"
    with _errors(folder):
        if args.all:
            paths = folder_files(folder)
        else:
            paths = [path.relative_to(folder).as_posix() for path in checkpoint_files(folder)]
        if output is not None:  # an older one of the same name is no part of itself
            paths = [path for path in paths if (folder / path).resolve() != output.resolve()]
        if not paths:
            raise InputError(f"{folder}: holds no file")
        total = sum((folder / path).stat().st_size for path in paths)
        with ByteProgress(f"hashing {folder}", total) as progress:
            manifest = make_manifest(folder, paths, progress.add)
        text = format_manifest(manifest, form)
    if output is None:
        sys.stdout.write(text)
        return EXIT_OK
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output: {output}: cannot be written: {error}") from error
    print(f"{output}: {counted(len(paths), 'file')}, {file_size(total)}")
    return EXIT_OK


def _verify(args: argparse.Namespace) -> int:
    from jobs.shipped_manifests import known_manifest
    from zimage_core.byte_progress import ByteProgress
    from zimage_core.weights_manifest import bytes_to_read, compare, folder_files, read_manifest

    folder = _existing(args.folder)
    with _errors(folder):
        if args.manifest is not None:
            manifest, why = read_manifest(args.manifest), f"{args.manifest}"
        else:
            manifest, why = known_manifest(folder)
        total = bytes_to_read(folder, manifest)
        with ByteProgress(f"checking {folder}", total) as progress:
            differences = compare(folder, manifest, progress.add)
        surplus = [name for name in folder_files(folder) if name not in manifest.files]
        again = _download_again(folder, manifest.repo)
    if args.json:
        values = {
            "folder": str(folder),
            "manifest": why,
            "repo": manifest.repo,
            "ok": not differences,
            "files": len(manifest.files),
            "bytes": total,
            "differences": [vars(difference) for difference in differences],
            "surplus": surplus,
        }
        print(json.dumps(values, indent=2))
    else:
        files = counted(len(manifest.files), "file")
        _print_verified(folder, why, files, total, differences, surplus, again)
    return EXIT_DIFFERENCE if differences else EXIT_OK


def _print_verified(
    folder: Path,
    why: str,
    files: str,
    total: int,
    differences: list[Difference],
    surplus: list[str],
    again: str | None,
) -> None:
    print(f"compared with {why}")
    for difference in differences:
        print(difference.describe())
    for name in surplus:
        print(f"{name}: is not in the manifest (no difference)")
    if not differences:
        print(f"{folder}: all {files} as they should be, {file_size(total)} read")
        return
    print(f"{folder}: {len(differences)} of {files} differ")
    if again is not None:
        print(f"remove those, and `{again}` fetches them again")


def _download_again(folder: Path, repo: str | None) -> str | None:
    """The command that fetches what is missing of a folder, where that is known."""
    from zimage_core.source_record import read_record

    record = read_record(folder)
    if record is None:
        return repo and f"zimage weights download {repo} {folder}"
    source = f" --source {record.source}" if record.source != _SOURCES[0] else ""
    revision = f" --revision {record.revision}" if record.revision else ""
    return f"zimage weights download {record.repo} {folder}{source}{revision}"


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    return folder
