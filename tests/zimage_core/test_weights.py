"""Fetching a checkpoint only where one is missing, and fingerprints that follow content alone."""

import shutil
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest

from zimage_core.config import CheckpointError
from zimage_core.loader import checkpoint_files
from zimage_core.tiny.make import make_checkpoint
from zimage_core.weights import ensure_model_weights, weights_fingerprint

SMALL = {"layers": 1, "text_layers": 2, "vocab_size": 320, "vae_channels": (8, 8, 8, 8)}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("origin") / "tiny", **SMALL)


@pytest.fixture
def folder(origin, tmp_path):
    return shutil.copytree(origin, tmp_path / "copy")


@pytest.fixture
def hub(origin, monkeypatch):
    """Stand in for the hub: copies the checkpoint and remembers how it was asked."""
    calls = []

    def snapshot_download(repo_id, *, revision, local_dir, **options):
        calls.append((repo_id, revision, options))
        shutil.copytree(origin, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setitem(
        sys.modules, "modelscope", SimpleNamespace(snapshot_download=snapshot_download)
    )
    return calls


def test_complete_folder_is_returned_without_asking_the_hub(folder, hub):
    assert ensure_model_weights(folder) == folder
    assert ensure_model_weights(str(folder), "some/repo") == folder
    assert hub == []


def test_missing_folder_is_fetched_once(tmp_path, hub):
    path = tmp_path / "ckpts" / "new"
    assert ensure_model_weights(path, "some/repo", revision="v1") == path
    assert ensure_model_weights(path, "some/repo", revision="v1") == path
    ((repo, revision, options),) = hub
    assert (repo, revision) == ("some/repo", "v1")
    assert "*.safetensors" in options["allow_patterns"]
    assert "*.bin" not in options["allow_patterns"]


def test_interrupted_download_goes_on(folder, hub):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="file is missing"):
        ensure_model_weights(folder)
    assert ensure_model_weights(folder, "some/repo") == folder
    assert len(hub) == 1


def test_modelscope(tmp_path, hub, monkeypatch):
    ensure_model_weights(tmp_path / "new", "some/repo", source="modelscope")
    assert [call[0] for call in hub] == ["some/repo"]
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ValueError, match="pip install modelscope"):
        ensure_model_weights(tmp_path / "other", "some/repo", source="modelscope")


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such model folder; give"):
        ensure_model_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="source is 'ftp'; allowed: huggingface, modelscope"):
        ensure_model_weights(tmp_path / "nowhere", "some/repo", source="ftp")

    def fails(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(
        CheckpointError, match=r"fetching some/repo from huggingface failed: .*no route"
    ):
        ensure_model_weights(tmp_path / "nowhere", "some/repo")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: None)
    with pytest.raises(CheckpointError, match="no such folder"):
        ensure_model_weights(tmp_path / "nowhere", "some/repo")


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
