"""Fetching a checkpoint only where one is missing, once for all, and fingerprints of content alone.

The hubs are a local server; what fetches are the real client libraries.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_clients import small_chunks, start_client
from hub_server import COMMIT, EXTRAS, REPO, HubServer, serve
from job_runs import wait_for

from zimage_core import download
from zimage_core.config import CheckpointError
from zimage_core.folder_lock import FolderLock
from zimage_core.hub_huggingface import HuggingFaceHub
from zimage_core.loader import checkpoint_files
from zimage_core.source_record import RECORD_NAME, read_record
from zimage_core.tiny.make import make_checkpoint
from zimage_core.weights import ensure_model_weights, weights_fingerprint

SMALL = {"layers": 1, "text_layers": 2, "vocab_size": 320, "vae_channels": (8, 8, 8, 8)}
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
SOURCES = ("huggingface", "modelscope")


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("origin") / "tiny", **SMALL)


@pytest.fixture
def folder(origin, tmp_path) -> Path:
    return shutil.copytree(origin, tmp_path / "copy")


@pytest.fixture
def hub(origin, monkeypatch) -> Iterator[HubServer]:
    server = serve(origin)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HuggingFaceHub, "retry_seconds", 0.0)
    small_chunks()
    yield server
    server.close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != RECORD_NAME
    }


@pytest.mark.parametrize("source", SOURCES)
def test_only_what_loading_reads_is_fetched(origin, tmp_path, hub, source) -> None:
    path = tmp_path / "ckpts" / "new"
    assert ensure_model_weights(path, REPO, source=source) == path
    assert files_of(path) == files_of(origin)
    assert not hub.paths & set(EXTRAS)
    assert all(hub.bytes_of(name) == len(hub.files[name]) for name in hub.paths)
    record = read_record(path)
    assert (record.repo, record.source, record.complete) == (REPO, source, True)
    assert (record.commit, record.revision) == (COMMIT, None)
    assert set(record.files) == set(files_of(origin))
    assert record.files[TRANSFORMER]["size"] == len(hub.files[TRANSFORMER])


@pytest.mark.parametrize("source", SOURCES)
def test_complete_folder_asks_nobody(folder, tmp_path, hub, source) -> None:
    assert ensure_model_weights(folder) == folder
    assert ensure_model_weights(str(folder), REPO, source=source, revision="v9") == folder
    fetched = tmp_path / "new"
    ensure_model_weights(fetched, REPO, source=source)
    asked = (hub.listings, len(hub.sent))
    hub.close()
    ensure_model_weights(fetched, REPO, source=source)
    ensure_model_weights(fetched)
    assert (hub.listings, len(hub.sent)) == asked


@pytest.mark.long
@pytest.mark.parametrize("source", SOURCES)
def test_processes_at_once_fetch_each_byte_once(origin, tmp_path, hub, source) -> None:
    for count in (2, 4):
        hub.sent.clear()
        hub.release.clear()
        hub.held.clear()
        hub.hold_at[TRANSFORMER] = 300_000
        path = tmp_path / f"of-{count}"
        clients = [
            start_client(path, tmp_path / f"{count}-{n}.log", hub.environment, REPO, source=source)
            for n in range(count)
        ]
        wait_for(hub.held.is_set, 120)
        wait_for(
            lambda clients=clients: sum("waiting" in c.said for c in clients) == len(clients) - 1
        )
        hub.release.set()
        words = [client.wait() for client in clients]
        assert files_of(path) == files_of(origin)
        for name in files_of(origin):
            assert hub.bytes_of(name) == len(hub.files[name]), name
        assert sum("fetching 10 of 10 files" in text for text in words) == 1
        assert sum(f"to end fetching {REPO}" in text for text in words) == count - 1


@pytest.mark.long
@pytest.mark.parametrize("source", SOURCES)
def test_killed_download_goes_on_where_it_was(origin, tmp_path, hub, source) -> None:
    path, log = tmp_path / "new", tmp_path / "log"
    hub.hold_at[TRANSFORMER] = 600_000
    killed = start_client(path, log, hub.environment, REPO, source=source)
    wait_for(hub.held.is_set, 120)

    def partial() -> int:
        return sum(
            part.stat().st_size
            for part in path.rglob("*")
            if part.is_file() and part.suffix in (".part", ".incomplete")
        )

    # the library keeps the last few thousand bytes to itself
    wait_for(lambda: partial() >= 590_000 and len(hub.paths) == len(files_of(origin)), 120)
    waiting = start_client(path, tmp_path / "waiting", hub.environment, REPO, source=source)
    wait_for(lambda: "waiting" in waiting.said, 120)
    with pytest.raises(CheckpointError, match=r"did not end; `zimage weights download .* goes on"):
        ensure_model_weights(path)
    kept = partial()
    first = hub.bytes_of(TRANSFORMER)
    hub.hold_at.clear()
    killed.kill()
    # whoever waited takes over, and asks for the rest alone
    waiting.wait()
    hub.release.set()
    again = [sent for sent in hub.sent if sent.path == TRANSFORMER][1:]
    assert [sent.range for sent in again] == [f"bytes={kept}-"]
    assert again[0].bytes == len(hub.files[TRANSFORMER]) - kept
    assert first <= 601_000
    assert files_of(path) == files_of(origin)
    assert not [part for part in path.rglob("*") if part.name.endswith(("part", "incomplete"))]


@pytest.mark.parametrize("source", SOURCES)
def test_files_that_are_there_are_not_fetched(folder, hub, source) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="file is missing"):
        ensure_model_weights(folder)
    ensure_model_weights(folder, REPO, source=source)
    assert hub.paths == {"vae/diffusion_pytorch_model.safetensors"}


def test_broken_files_are_replaced(folder, hub, capsys) -> None:
    (folder / TRANSFORMER).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid ...")
    vae = folder / "vae/diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-9])
    (folder / "vae/config.json").write_text("{")
    ensure_model_weights(folder, REPO)
    assert hub.paths == {TRANSFORMER, "vae/diffusion_pytorch_model.safetensors", "vae/config.json"}
    assert capsys.readouterr().err.count("replacing it") == 3


def test_somebodys_own_file_is_not_overwritten(folder, hub) -> None:
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    own = folder / "scheduler/scheduler_config.json"
    for text in (own.read_text().replace("3.0", "6.0"), own.read_text() + "\n"):
        own.write_text(text)
        with pytest.raises(
            CheckpointError, match=r"scheduler_config.json: is not the repository's"
        ):
            ensure_model_weights(folder, REPO)
        assert own.read_text() == text
    assert not hub.sent
    assert not (folder / RECORD_NAME).exists()


def test_download_of_another_revision(origin, tmp_path, hub, capsys) -> None:
    path = tmp_path / "new"
    hub.statuses["vae/config.json"] = 500
    with pytest.raises(CheckpointError, match=r"vae/config.json: the connection broke 4 times"):
        ensure_model_weights(path, REPO, revision="main")
    assert read_record(path).complete is False
    del hub.statuses["vae/config.json"]
    # the branch moved on meanwhile, and one file with it
    hub.commits["main"] = "9" * 40
    hub.files["scheduler/scheduler_config.json"] += b"\n"
    ensure_model_weights(path, REPO, revision="main")
    assert "scheduler_config.json: is not the repository's; replacing it" in capsys.readouterr().err
    assert read_record(path).commit == "9" * 40
    assert (path / "scheduler/scheduler_config.json").read_bytes().endswith(b"\n\n")

    asked = len(hub.sent)
    for revision in (None, "main", "9" * 40):
        ensure_model_weights(path, REPO, revision=revision)
    for repo, source, revision in (
        (REPO, "huggingface", COMMIT),
        (REPO, "modelscope", "main"),
        ("Tongyi-MAI/Z-Image", "huggingface", None),
    ):
        with pytest.raises(CheckpointError, match=rf"holds {REPO} at main \(9{{40}}\), from hugg"):
            ensure_model_weights(path, repo, source=source, revision=revision)
    assert len(hub.sent) == asked


def test_disk_is_checked_first(tmp_path, hub, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    total = sum(len(content) for name, content in hub.files.items() if name not in EXTRAS)
    with pytest.raises(CheckpointError, match=rf"{total} bytes \(1.4 MB\) must still .* only 1000"):
        ensure_model_weights(tmp_path / "ckpts" / "new", REPO)
    assert not hub.sent
    assert list(tmp_path.iterdir()) == []  # nothing is left of it, nor taken of what was there


def test_a_folder_that_another_process_takes_away_is_made_again(tmp_path, monkeypatch) -> None:
    folder, opened = tmp_path / "ckpts" / "new", []
    open_ = Path.open

    def open_too_late(self, *args, **kwargs):
        opened.append(self)
        if len(opened) < 3:
            shutil.rmtree(tmp_path / "ckpts")
        return open_(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_too_late)
    with FolderLock(folder, "a test"):
        assert len(opened) == 3 and folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such model folder; give"):
        ensure_model_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="source is 'ftp'; allowed: huggingface, modelscope"):
        ensure_model_weights(tmp_path / "nowhere", REPO, source="ftp")
    with pytest.raises(ValueError, match=r"repository is 'turbo'; allowed: OWNER/NAME"):
        ensure_model_weights(tmp_path / "nowhere", "turbo")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="file: is a file; a model is a folder"):
        ensure_model_weights(file, REPO)
    with pytest.raises(CheckpointError, match=r"file.new: cannot be written: .*Not a directory"):
        ensure_model_weights(file / "new", REPO)
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'zimage-batch\[modelscope\]'"):
        ensure_model_weights(tmp_path / "other", REPO, source="modelscope")
    assert not (tmp_path / "other").exists()


def test_broken_record(folder) -> None:
    for text in ("[]", "{", json.dumps({"format": 7}), json.dumps({"format": 1, "repo": "a/b"})):
        (folder / RECORD_NAME).write_text(text)
        with pytest.raises(CheckpointError, match=r"zimage-source.json: cannot be read as the rec"):
            ensure_model_weights(folder)


def test_needed_files_are_those_that_loading_reads(origin, tmp_path) -> None:
    sharded = make_checkpoint(tmp_path / "sharded", shard_size=60_000, **SMALL)
    for checkpoint in (origin, sharded):
        everything = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*.*")]
        expected = [
            path.relative_to(checkpoint).as_posix() for path in checkpoint_files(checkpoint)
        ]
        assert download.needed_files([*everything, *EXTRAS]) == expected
    both = ["vae/diffusion_pytorch_model.safetensors", "transformer/config.json"]
    shards = [
        "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors.index.json",
    ]
    assert download.needed_files(both + shards) == sorted(both)


def test_fingerprint_follows_content_not_place(origin, folder):
    fingerprint = weights_fingerprint(origin)
    assert fingerprint.startswith("sha256:") and len(fingerprint) == 7 + 64
    (folder / "README.md").write_text("not read by loading")
    (folder / "text_encoder" / "generation_config.json").write_text("{}")
    assert weights_fingerprint(folder) == fingerprint == weights_fingerprint(str(origin))


def test_fingerprint_sees_a_change_in_every_file_that_loading_reads(origin, folder):
    fingerprint = weights_fingerprint(origin)
    files = checkpoint_files(folder)
    assert len(files) == 10
    for path in files:
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        if path.name == "model_index.json":
            content[-2:] = b"}\n\n"
        path.write_bytes(content)
        assert weights_fingerprint(folder) != fingerprint, path
        shutil.copy(origin / path.relative_to(folder), path)
    assert weights_fingerprint(folder) == fingerprint


def test_fingerprint_of_shards_counts_the_index(tmp_path):
    sharded = make_checkpoint(tmp_path / "sharded", shard_size=60_000, **SMALL)
    files = checkpoint_files(sharded)
    assert files == sorted(files)
    index = sharded / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    assert {index, *(sharded / "transformer").glob("*.safetensors")} <= set(files)
    fingerprint = weights_fingerprint(sharded)
    index.write_text(index.read_text() + "\n")
    assert weights_fingerprint(sharded) != fingerprint
    with pytest.raises(CheckpointError, match="no such folder"):
        weights_fingerprint(tmp_path / "nowhere")
