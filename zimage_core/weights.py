"""Where a checkpoint comes from and which it is: fetching its folder, hashing its content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from zimage_core.checkpoint import Part, find_source, named_checkpoint_files
from zimage_core.config import CheckpointError
from zimage_core.download import download_checkpoint
from zimage_core.file_hashes import hash_files
from zimage_core.folder_lock import FolderLock
from zimage_core.hub import SOURCES, HubError, check_repository, open_hub
from zimage_core.loader import check_checkpoint
from zimage_core.model_kind import KINDS
from zimage_core.source_record import SourceRecord, read_record


def ensure_model_weights(
    model_path: Path | str,
    repo_id: str | None = None,
    *,
    source: str = "huggingface",
    revision: str | None = None,
    transformer: Part = None,
    vae: Part = None,
    text_encoder: Part = None,
) -> Path:
    """Return a complete checkpoint folder, fetched first if it is not there and may be.

    Any number of processes of a machine may call this at once: one fetches, the others wait. A
    folder that is complete is returned without asking the network. A download that was broken off,
    even by `kill -9`, goes on where it ended. Only the files that loading reads are fetched, and
    each is compared with the hash that the hub lists. Progress goes to standard error.

    Args:
        model_path: the folder; a download goes into it, with a record in `.zimage-source.json`.
        repo_id: repository to fetch from, `Tongyi-MAI/Z-Image-Turbo`; None never fetches.
        source: `huggingface` or `modelscope` (which needs the package `modelscope-hub`).
        revision: branch, tag or commit of the repository; None is its main branch.
        transformer: a file or folder that replaces the checkpoint's transformer, whose weights are
            then neither asked for nor fetched.
        vae: the same for the autoencoder.
        text_encoder: the same for the text encoder.

    Returns:
        `model_path` as a path.

    Raises:
        FileNotFoundError: no such folder, and no repository to fetch it from.
        CheckpointError: the folder is there but incomplete or broken, and no repository is given;
            it is complete, but was fetched from another repository or at another revision; the
            disk is too small; the download failed, or what it brought is no complete checkpoint.
        ValueError: `source` or `repo_id` is none, or the package of `source` is not installed.
        OSError: a file that is there cannot be read.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}; allowed: {', '.join(SOURCES)}")
    if repo_id is not None:
        check_repository(repo_id)
    path = Path(model_path).expanduser()
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    if _is_complete(path, repo_id, source, revision, parts):
        return path
    if repo_id is None:
        raise FileNotFoundError(
            f"{path}: no such model folder; give the folder of a checkpoint, or a repository to "
            "fetch it from (Tongyi-MAI/Z-Image-Turbo)"
        )
    hub = open_hub(source)
    with FolderLock(path, f"fetching {repo_id}"):
        if _is_complete(path, repo_id, source, revision, parts):
            return path
        for name, part in parts.items():
            find_source(KINDS[name], path, part)  # before anything is fetched
        try:
            download_checkpoint(hub, source, repo_id, revision, path, parts)
        except HubError as error:
            raise CheckpointError(
                f"{path}: fetching {repo_id} from {source} failed: {error}"
            ) from error
    return path


def _is_complete(
    path: Path,
    repo: str | None,
    source: str,
    revision: str | None,
    parts: Mapping[str, Part],
) -> bool:
    """Whether a folder needs no download.

    Raises:
        CheckpointError: it is incomplete and there is no repository, or it is another's.
    """
    if not path.is_dir():
        if path.exists():
            raise CheckpointError(f"{path}: is a file; a model is a folder")
        return False
    record = read_record(path)
    try:
        if record is not None and not record.complete:
            raise CheckpointError(
                f"{path}: fetching {record.describe()}, did not end; "
                f"`zimage weights download {record.repo} {path}` goes on with it"
            )
        check_checkpoint(path, **parts)
    except CheckpointError:
        if repo is None:
            raise
        return False
    if record is not None and repo is not None:
        _refuse_other(path, record, repo, source, revision)
    return True


def _refuse_other(
    path: Path, record: SourceRecord, repo: str, source: str, revision: str | None
) -> None:
    same = record.repo == repo and (
        revision is None
        or revision == record.commit
        or (revision, source) == (record.revision, record.source)
    )
    if not same:
        asked = SourceRecord(repo, source, revision, None).describe()
        raise CheckpointError(
            f"{path}: holds {record.describe()}; asked for is {asked}. Give another folder, or "
            "remove this one to fetch it anew"
        )


def weights_fingerprint(
    model_dir: Path | str,
    *,
    transformer: Part = None,
    vae: Part = None,
    text_encoder: Part = None,
) -> str:
    """Identify a checkpoint by content, wherever its folder lies and whatever it is called.

    Every file that loading reads counts, so that a changed configuration or tokenizer changes the
    fingerprint as changed weights do. Reads all of them: tens of seconds for 30 GB.

    Args:
        model_dir: a checkpoint folder.
        transformer: a file or folder that replaces its transformer, and counts in its stead by
            content, wherever it lies and whatever it is called.
        vae: the same for the autoencoder.
        text_encoder: the same for the text encoder.

    Returns:
        `sha256:` and the hash, over the sorted lines `<name> NUL <sha256> LF`, where a name is the
        path in the folder, or what `named_checkpoint_files` gives a file that lies elsewhere.

    Raises:
        CheckpointError: a file that loading needs is missing.
        OSError: a file cannot be read.
    """
    files = named_checkpoint_files(
        model_dir, transformer=transformer, vae=vae, text_encoder=text_encoder
    )
    hashes = {}
    paths = list(dict.fromkeys(files.values()))  # one file may give several models
    for path, content in zip(paths, hash_files([(p, ["sha256"]) for p in paths]), strict=True):
        if isinstance(content, OSError):
            raise content
        hashes[path] = content.hashes["sha256"]
    lines = sorted(f"{name}\0{hashes[path]}\n" for name, path in files.items())
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()
