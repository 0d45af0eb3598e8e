"""What goes wrong with a hub, and what is said of it; what a broken connection costs."""

import errno
import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.file_download
import modelscope_hub._download
import modelscope_hub._legacy_api
import pytest
from hub_clients import small_chunks
from hub_server import COMMIT, REPO, HubServer

from zimage_core.config import CheckpointError
from zimage_core.hub import PARTS_FOLDER
from zimage_core.hub_huggingface import HuggingFaceHub
from zimage_core.partial_file import PartialFile
from zimage_core.weights import ensure_model_weights

SOURCES = ("huggingface", "modelscope")
LARGE = "transformer/diffusion_pytorch_model.safetensors"
CONTENT = bytes(range(256)) * 400
FILES = {
    "model_index.json": b'{"_class_name": "ZImagePipeline"}',
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/tokenizer.json": b"{}",
    "tokenizer/tokenizer_config.json": b'{"chat_template": ""}',
    "transformer/config.json": b"{}",
    "vae/config.json": b"{}",
    "text_encoder/config.json": b"{}",
    LARGE: CONTENT,
}


@pytest.fixture
def hub(monkeypatch) -> Iterator[HubServer]:
    server = HubServer(dict(FILES))
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HuggingFaceHub, "retry_seconds", 0.0)
    no_wait = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr(huggingface_hub.file_download, "time", no_wait)
    monkeypatch.setattr(modelscope_hub._legacy_api, "REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_RETRY_TIMES", 1)
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0.0)
    small_chunks()
    yield server
    server.close()


def failure(path: Path, source: str, repo: str = REPO, **options: str) -> str:
    """Why a folder cannot be fetched; one line, which names folder, repository and source."""
    with pytest.raises(CheckpointError) as caught:
        ensure_model_weights(path, repo, source=source, **options)
    text = str(caught.value)
    prefix = f"{path}: fetching {repo} from {source} failed: "
    assert text.startswith(prefix), text
    assert "\n" not in text
    return text.removeprefix(prefix)


@pytest.mark.parametrize("source", SOURCES)
class TestErrors:
    def test_no_such_repository(self, hub, tmp_path, source) -> None:
        text = failure(tmp_path / "new", source, "Tongyi-MAI/Z-Imag")
        assert "Tongyi-MAI/Z-Imag: no such repository, or a private one; check the name" in text
        assert hub.url in text
        assert not (tmp_path / "new").exists()

    def test_no_such_revision(self, hub, tmp_path, source) -> None:
        text = failure(tmp_path / "new", source, revision="v9")
        assert "has no revision 'v9'" in text
        assert source == "huggingface" or "there are: master" in text

    @pytest.mark.parametrize(
        ("status", "words"), [(401, "wants a login"), (403, "refuses"), (503, "answers 503")]
    )
    def test_refused_file(self, hub, tmp_path, source, status, words) -> None:
        hub.statuses[LARGE] = status
        text = failure(tmp_path / "new", source)
        assert LARGE in text
        if source == "huggingface" and status == 503:
            assert "the connection broke 4 times in a row at byte 0 of 102400" in text
        else:
            assert words in text
        if status != 503:
            assert "log in (`" in text

    def test_refused_listing(self, hub, tmp_path, source) -> None:
        hub.statuses[""] = 403
        assert f"refuses {REPO} (403); log in" in failure(tmp_path / "new", source)
        hub.statuses[""] = 500
        assert f"answers 500 for {REPO}; try again later" in failure(tmp_path / "new", source)

    def test_listed_file_is_not_there(self, hub, tmp_path, source) -> None:
        hub.statuses[LARGE] = 404
        text = failure(tmp_path / "new", source)
        assert f"lists {LARGE} but does not have it; try again, or another revision" in text

    def test_no_checkpoint(self, hub, tmp_path, source) -> None:
        del hub.files["model_index.json"], hub.files["vae/config.json"]
        text = failure(tmp_path / "new", source)
        assert "has no model_index.json, no vae/config.json: it is no checkpoint in diff" in text
        assert not hub.sent

    def test_nobody_answers(self, hub, tmp_path, source, monkeypatch) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
        for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
            monkeypatch.setenv(name, url)
        text = failure(tmp_path / "new", source)
        assert f"{url} cannot be reached (" in text
        assert "check the network, or fetch on a machine that reaches it and copy" in text

    def test_other_content_than_listed(self, hub, tmp_path, source) -> None:
        hub.served[LARGE] = CONTENT[::-1]
        text = failure(tmp_path / "new", source)
        assert LARGE in text
        assert hashlib.sha256(CONTENT).hexdigest()[:16] in text
        assert hashlib.sha256(CONTENT[::-1]).hexdigest()[:16] in text
        assert not (tmp_path / "new" / LARGE).exists()
        assert len([sent for sent in hub.sent if sent.path == LARGE]) >= 2

    def test_broken_connection_goes_on(self, hub, tmp_path, source) -> None:
        hub.break_at[LARGE] = (40_000, 1)
        # the files are no checkpoint; that is found out last
        with pytest.raises(CheckpointError, match=r"holds all of .* that cannot be loaded"):
            ensure_model_weights(tmp_path / "new", REPO, source=source)
        assert (tmp_path / "new" / LARGE).read_bytes() == CONTENT
        first, second = (sent for sent in hub.sent if sent.path == LARGE)
        assert first.range is None
        start = int(second.range.removeprefix("bytes=").rstrip("-"))
        assert 30_000 <= start <= 40_000
        assert second.bytes == len(CONTENT) - start

    def test_server_that_heeds_no_range(self, hub, tmp_path, source) -> None:
        hub.ranges = False
        hub.break_at[LARGE] = (40_000, 1)
        with pytest.raises(CheckpointError, match=r"holds all of .* that cannot be loaded"):
            ensure_model_weights(tmp_path / "new", REPO, source=source)
        assert (tmp_path / "new" / LARGE).read_bytes() == CONTENT
        assert hub.bytes_of(LARGE) == 40_000 + len(CONTENT)

    def test_parts_of_an_older_version_are_dropped(self, hub, tmp_path, source) -> None:
        hub.break_at[LARGE] = (40_000, 99)
        failure(tmp_path / "new", source)
        hub.break_at.clear()
        hub.files[LARGE] = CONTENT[::-1]
        with pytest.raises(CheckpointError, match=r"holds all of .* that cannot be loaded"):
            ensure_model_weights(tmp_path / "new", REPO, source=source)
        assert (tmp_path / "new" / LARGE).read_bytes() == CONTENT[::-1]


def test_gated_repository(hub, tmp_path) -> None:
    hub.statuses[LARGE], hub.error_codes[LARGE] = 403, "GatedRepo"
    text = failure(tmp_path / "new", "huggingface")
    assert f"{LARGE} of {REPO} is gated: accept its terms on {hub.url}/{REPO} and log in" in text


def test_token_goes_to_the_hub_and_not_to_its_storage(hub, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.storage = f"http://localhost:{hub.url.rpartition(':')[2]}/storage"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with pytest.raises(CheckpointError, match=r"holds all of .* that cannot be loaded"):
        ensure_model_weights(tmp_path / "new", REPO)
    for sent in hub.sent:
        assert sent.token == (None if sent.path == LARGE else "Bearer hf_secret")


@pytest.mark.parametrize("source", SOURCES)
def test_full_disk(hub, tmp_path, source, monkeypatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PartialFile, "write", full)
    monkeypatch.setattr(modelscope_hub._download, "_finish_download", full)
    with pytest.raises(CheckpointError, match=r"new: cannot be written: .*No space left.*goes on"):
        ensure_model_weights(tmp_path / "new", REPO, source=source)


def test_offline_mode_says_so(hub, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in failure(tmp_path / "new", "huggingface")
    assert not hub.listings


def test_commit_is_what_was_asked_for(hub, tmp_path) -> None:
    hub.commits["7" * 40] = COMMIT  # a mirror that answers with its newest
    text = failure(tmp_path / "new", "huggingface", revision="7" * 40)
    assert f"asked for commit {'7' * 40}, {hub.url} answered with {COMMIT}" in text
    assert not hub.sent


def test_a_failure_waits_for_no_silent_server(hub, tmp_path) -> None:
    """One file is refused while another's server says nothing; nothing is written afterwards."""
    hub.hold_at[LARGE] = 40_000
    hub.statuses["vae/config.json"] = 403
    hub.patient = True
    started = time.monotonic()
    assert "refuses vae/config.json" in failure(tmp_path / "new", "huggingface")
    assert time.monotonic() - started < 20
    (part,) = (tmp_path / "new" / PARTS_FOLDER).glob("transformer--diffusion*.part")
    before = part.stat().st_size
    hub.release.set()
    time.sleep(0.5)
    assert part.stat().st_size == before
    assert not (tmp_path / "new" / LARGE).exists()


def test_what_something_else_wrote_counts(tmp_path) -> None:
    """hf_transfer, which old libraries use when told to, writes by the file's name."""
    with PartialFile(tmp_path / "part", len(CONTENT), "sha256", id, threading.Event()) as part:
        Path(part.name).write_bytes(CONTENT)
        assert part.tell() == len(CONTENT)
        assert part.finish() == hashlib.sha256(CONTENT).hexdigest()
