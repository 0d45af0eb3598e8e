"""`zimage weights ...` as a user types it, with a local server in place of the hubs."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import COMMIT, REPO, HubServer, serve

from jobs import shipped_manifests, weights_command
from zimage_core.hub import SOURCES
from zimage_core.source_record import RECORD_NAME
from zimage_core.tiny.make import make_checkpoint
from zimage_core.weights_manifest import FORMATS

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
CONFIG = "scheduler/scheduler_config.json"
SMALL = {"layers": 1, "text_layers": 2, "vocab_size": 320, "vae_channels": (8, 8, 8, 8)}


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("origin") / "tiny", **SMALL)


@pytest.fixture
def model(origin, tmp_path) -> Path:
    return shutil.copytree(origin, tmp_path / "model")


@pytest.fixture
def hub(origin, monkeypatch) -> Iterator[HubServer]:
    server = serve(origin)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.close()


@pytest.fixture
def shipped(origin, tmp_path, monkeypatch, zimage) -> Path:
    """A folder of shipped manifests that knows the small checkpoint as `some-model`."""
    folder = tmp_path / "manifests"
    folder.mkdir()
    zimage("weights", "manifest", origin, "-o", folder / "some-model.json", code=0)
    values = json.loads((folder / "some-model.json").read_text())
    values |= {"name": "some-model", "repo": "Some/Model"}
    (folder / "some-model.json").write_text(json.dumps(values))
    monkeypatch.setattr(shipped_manifests, "manifests_folder", lambda: folder)
    return folder


def test_choices_are_those_of_the_core() -> None:
    assert weights_command._SOURCES == SOURCES
    assert weights_command._FORMATS == FORMATS


@pytest.mark.parametrize("source", SOURCES)
def test_download_then_verify(zimage, hub, source) -> None:
    arguments = ("weights", "download", REPO, "--source", source)
    done = zimage(*arguments, code=0)
    assert done.out == (
        f"ckpts/Z-Image-Turbo: {REPO} at its main branch ({COMMIT}), from {source}; "
        "10 files, 1.4 MB\n"
    )
    assert "fetching 10 of 10 files, 1.4 MB" in done.err
    assert (zimage.folder / "ckpts/Z-Image-Turbo" / RECORD_NAME).is_file()
    again = zimage(*arguments, code=0)
    assert again.out == done.out[:-1] + ", all there already\n"

    checked = zimage("weights", "verify", "ckpts/Z-Image-Turbo", code=0)
    lines = checked.out.splitlines()
    assert lines[0].startswith("compared with what was noted when it was fetched: Tongyi-MAI/")
    assert lines[1] == "ckpts/Z-Image-Turbo: all 10 files as they should be, 1.4 MB read"


def test_download_as_json(zimage, hub, model) -> None:
    arguments = ("weights", "download", REPO, "here", "--revision", COMMIT, "--json")
    values = json.loads(zimage(*arguments, code=0).out)
    assert values == {
        "path": "here",
        "repo": REPO,
        "source": "huggingface",
        "revision": COMMIT,
        "commit": COMMIT,
        "fetched": True,
        "files": 10,
        "bytes": sum(path.stat().st_size for path in model.rglob("*.*") if path.is_file()),
    }
    again = json.loads(zimage(*arguments, code=0).out)
    assert again == values | {"fetched": False}
    by_hand = json.loads(zimage("weights", "download", REPO, model, "--json", code=0).out)
    assert by_hand["fetched"] is False
    assert by_hand["commit"] is by_hand["files"] is None


def test_refused_downloads(zimage, hub) -> None:
    assert "repository is 'turbo'" in zimage("weights", "download", "turbo", code=2).err
    assert (
        "invalid choice: 'ftp'"
        in zimage("weights", "download", REPO, "--source", "ftp", code=2).err
    )
    ended = zimage("weights", "download", "Tongyi-MAI/Nothing", code=5)
    assert ended.err.startswith("zimage weights: ckpts/Nothing: fetching Tongyi-MAI/Nothing from")
    (zimage.folder / "file").write_text("")
    assert "is a file; a model is" in zimage("weights", "download", REPO, "file", code=5).err
    zimage("weights", "download", REPO, "here", code=0)
    ended = zimage("weights", "download", REPO, "here", "--revision", "v2", code=5)
    assert f"here: holds {REPO} at its main branch ({COMMIT})" in ended.err


def test_repair_of_what_verify_finds(zimage, hub) -> None:
    zimage("weights", "download", REPO, "here", "--revision", "main", code=0)
    path = zimage.folder / "here" / TRANSFORMER
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (zimage.folder / "here/notes.txt").write_text("mine")
    found = zimage("weights", "verify", "here", code=1)
    lines = found.out.splitlines()[1:]
    assert lines[0].startswith(f"{TRANSFORMER}: has sha256:")
    assert lines[1:] == [
        "notes.txt: is not in the manifest (no difference)",
        "here: 1 of 10 files differ",
        f"remove those, and `zimage weights download {REPO} here --revision main` fetches them "
        "again",
    ]
    path.unlink()
    hub.sent.clear()
    zimage("weights", "download", REPO, "here", "--revision", "main", code=0)
    assert hub.paths == {TRANSFORMER}
    zimage("weights", "verify", "here", code=0)


def test_verify_as_json(zimage, model) -> None:
    zimage("weights", "manifest", model, "-o", "m.json", code=0)
    (model / CONFIG).unlink()
    (model / "README.md").write_text("")
    (model / "vae/config.json").write_text("{}")
    values = json.loads(
        zimage("weights", "verify", model, "--manifest", "m.json", "--json", code=1).out
    )
    assert list(values) == [
        "folder",
        "manifest",
        "repo",
        "ok",
        "files",
        "bytes",
        "differences",
        "surplus",
    ]
    assert (values["ok"], values["files"], values["manifest"]) == (False, 10, "m.json")
    assert values["surplus"] == ["README.md"]
    missing, size = values["differences"]
    assert missing == {"file": CONFIG, "problem": "missing", "expected": None, "found": None}
    assert (size["file"], size["problem"], size["found"]) == ("vae/config.json", "size", 2)


@pytest.mark.parametrize(
    ("file", "flags", "width"),
    [
        ("m.json", [], None),
        ("m.txt", ["--format", "json"], None),
        ("m.sha256", [], 64),
        ("m.txt", [], 32),
    ],
)
def test_manifest_in_every_form_is_verified(zimage, model, file, flags, width) -> None:
    done = zimage("weights", "manifest", model, "-o", file, *flags, code=0)
    assert done.out == f"{file}: 10 files, 1.4 MB\n"
    text = (zimage.folder / file).read_text()
    if width is None:
        assert set(json.loads(text)["files"][CONFIG]) == {"size", "md5", "sha256"}
    else:
        assert {len(line.split("  ")[0]) for line in text.splitlines()} == {width}
    zimage("weights", "verify", model, "--manifest", file, code=0)
    (model / TRANSFORMER).write_bytes(b"")
    zimage("weights", "verify", model, "--manifest", file, code=1)


def test_manifest_on_stdout_is_md5sum_s(zimage, model) -> None:
    text = zimage("weights", "manifest", model, code=0).out
    path = zimage.write("sums", text)
    subprocess.run(["md5sum", "-c", "--strict", path], cwd=model, check=True, capture_output=True)
    assert len(text.splitlines()) == 10


def test_manifest_of_any_folder(zimage) -> None:
    zimage.write("loras/a.safetensors", "x")
    ended = zimage("weights", "manifest", "loras", code=5)
    assert "loras/model_index.json: file is missing" in ended.err
    done = zimage("weights", "manifest", "loras", "--all", code=0)
    assert done.out == "9dd4e461268c8034f5c8564e155c67a6  a.safetensors\n"
    for _ in range(2):
        zimage("weights", "manifest", "loras", "--all", "-o", "loras/sums.md5", code=0)
    assert (zimage.folder / "loras/sums.md5").read_text() == done.out
    (zimage.folder / "empty").mkdir()
    assert "empty: holds no file" in zimage("weights", "manifest", "empty", "--all", code=2).err


def test_refused_manifests(zimage, model) -> None:
    assert "nowhere: no such folder" in zimage("weights", "manifest", "nowhere", code=2).err
    assert "nowhere: no such folder" in zimage("weights", "verify", "nowhere", code=2).err
    ended = zimage("weights", "manifest", model, "-o", "no/such/file", code=2)
    assert "--output: no/such/file: cannot be written" in ended.err
    bad = zimage.write("bad", "x\n")
    ended = zimage("weights", "verify", model, "--manifest", bad, code=2)
    assert f"{bad}: line 1 is 'x'" in ended.err


class TestWithoutManifest:
    def test_by_the_name_of_the_folder(self, zimage, shipped, model) -> None:
        named = model.rename(model.parent / "Some-Model")
        done = zimage("weights", "verify", named, code=0)
        assert "the shipped manifest some-model, whose name the folder has" in done.out
        shutil.rmtree(named / "transformer")
        done = zimage("weights", "verify", named, code=1)
        assert f"{TRANSFORMER}: is missing" in done.out
        assert f"`zimage weights download Some/Model {named}` fetches them again" in done.out

    def test_by_its_weight_files(self, zimage, shipped, model) -> None:
        done = zimage("weights", "verify", model, code=0)
        assert "the shipped manifest some-model, whose weight files it has" in done.out
        (model / "other.safetensors").write_bytes(b"")
        ended = zimage("weights", "verify", model, code=2)
        assert "no manifest of it is known" in ended.err
        assert "(some-model); give --manifest FILE" in ended.err

    def test_by_its_download(self, zimage, shipped, model) -> None:
        record = {
            "format": 1,
            "repo": "Some/Model",
            "source": "modelscope",
            "revision": None,
            "commit": None,
            "complete": True,
        }
        (model / RECORD_NAME).write_text(json.dumps(record))
        (model / "other.safetensors").write_bytes(b"")
        (model / CONFIG).unlink()
        done = zimage("weights", "verify", model, code=1)
        assert "the shipped manifest of Some/Model, where it was fetched from" in done.out
        assert f"`zimage weights download Some/Model {model} --source modelscope`" in done.out

    def test_of_a_download_that_did_not_end(self, zimage, model) -> None:
        record = {"format": 1, "repo": REPO, "source": "huggingface", "revision": None}
        (model / RECORD_NAME).write_text(json.dumps(record | {"commit": None, "complete": False}))
        ended = zimage("weights", "verify", model, code=2)
        assert f"did not end; `zimage weights download {REPO} {model}` goes on" in ended.err

    def test_the_published_one_is_shipped(self, zimage, model) -> None:
        named = model.rename(model.parent / "Z-Image-Turbo")
        done = zimage("weights", "verify", named, code=1)
        assert "the shipped manifest z-image-turbo, whose name the folder has" in done.out
        assert "model_index.json: has md5:" in done.out
        assert "16 files differ" in done.out
