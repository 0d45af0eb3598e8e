"""Manifests in three forms, two of which the system's own tools check; comparing by file."""

import hashlib
import io
import json
import re
import subprocess
from pathlib import Path

import pytest

from zimage_core.byte_progress import ByteProgress, byte_size
from zimage_core.file_hashes import hash_file
from zimage_core.weights_manifest import (
    FORMATS,
    Difference,
    Expected,
    Manifest,
    ManifestError,
    bytes_to_read,
    compare,
    folder_files,
    format_manifest,
    make_manifest,
    read_manifest,
)

FILES = {"model_index.json": b"{}", "vae/a b.safetensors": b"v" * 9_000_000, "vae/config.json": b""}


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "model"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def manifest(folder) -> Manifest:
    return make_manifest(folder, sorted(FILES))


def test_hashes_are_those_of_hashlib_and_git(folder) -> None:
    path = folder / "vae/a b.safetensors"
    content = FILES["vae/a b.safetensors"]
    seen: list[int] = []
    found = hash_file(path, ["md5", "sha256", "git_sha1"], seen.append)
    assert found.size == sum(seen) == len(content)
    assert found.hashes["md5"] == hashlib.md5(content).hexdigest()
    assert found.hashes["sha256"] == hashlib.sha256(content).hexdigest()
    git = subprocess.run(["git", "hash-object", path], capture_output=True, text=True, check=True)
    assert found.hashes["git_sha1"] == git.stdout.strip()


@pytest.mark.parametrize("form", FORMATS)
def test_a_manifest_reads_as_it_was_written(manifest, tmp_path, folder, form) -> None:
    path = tmp_path / "m.txt"
    path.write_text(format_manifest(manifest, form))
    read = read_manifest(path)
    assert set(read.files) == set(FILES)
    for name, expected in read.files.items():
        whole = manifest.files[name]
        if form == "json":
            assert expected == whole
        else:
            assert vars(expected) == {"size": None, "md5": None, "sha256": None} | {
                form: getattr(whole, form)
            }
    assert compare(folder, read) == []


@pytest.mark.parametrize("form", ["md5", "sha256"])
def test_columns_are_those_of_the_system_s_tools(manifest, tmp_path, folder, form) -> None:
    path = tmp_path / "sums"
    path.write_text(format_manifest(manifest, form))
    command = [f"{form}sum", "--check", "--strict", path]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (folder / "model_index.json").write_bytes(b"[]")
    assert subprocess.run(command, cwd=folder, check=False, capture_output=True).returncode == 1


def test_columns_of_others_are_read(tmp_path) -> None:
    path = tmp_path / "z-image-turbo.txt"
    path.write_text(
        "# Format: <md5hash>  <filepath>\n\n"
        f"{'A' * 32}  model_index.json\n"
        f"{'b' * 64} *./vae/a b.safetensors\n"
    )
    assert read_manifest(path).files == {
        "model_index.json": Expected(md5="a" * 32),
        "vae/a b.safetensors": Expected(sha256="b" * 64),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model_index.json\n", "line 1 is 'model_index.json'; allowed: an MD5 or SHA-256 in hex"),
        (f"# x\n{'a' * 31}  f\n", "line 2 is"),
        (f"{'a' * 32}  f\n{'b' * 32}  f\n", "line 2 names 'f' again"),
        (f"{'a' * 32}  ../f\n", "names '../f'; allowed: a path inside the folder"),
        (f"{'a' * 32}  /etc/passwd\n", "names '/etc/passwd'; allowed: a path inside"),
        ("# nothing\n", "names no file"),
        ("{", "cannot be read as JSON"),
        ('{"format": 2}', "format is 2; allowed: 1"),
        ('{"format": 1, "files": []}', "files must be an object"),
        ('{"format": 1, "files": {"f": "x"}}', "'f' must be an object with size, md5, sha256"),
        ('{"format": 1, "files": {"f": {"size": -1}}}', "'f' has size -1; allowed: size in bytes"),
        ('{"format": 1, "files": {"f": {"md5": "0"}}}', "'f' has md5 '0'"),
        ('{"format": 1, "files": {"f": {"sha1": "0"}}}', "'f' has sha1 '0'"),
    ],
)
def test_what_is_no_manifest(tmp_path, text, words) -> None:
    path = tmp_path / "m"
    path.write_text(text)
    with pytest.raises(ManifestError, match=re.escape(f"{path}: ") + ".*" + re.escape(words)):
        read_manifest(path)


def test_a_manifest_that_cannot_be_read(tmp_path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ManifestError, match="cannot be read as a manifest"):
            read_manifest(path)
    (tmp_path / "model").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="cannot be read as a manifest"):
        read_manifest(tmp_path / "model")


def test_a_path_that_columns_cannot_hold(folder) -> None:
    manifest = make_manifest(folder, ["model_index.json"])
    odd = Manifest("odd", {"two\nlines": manifest.files["model_index.json"]})
    assert "two\\nlines" in format_manifest(odd, "json")
    with pytest.raises(ManifestError, match="only the format json can hold"):
        format_manifest(odd, "md5")


def test_every_difference_is_named(folder, manifest) -> None:
    (folder / "model_index.json").write_bytes(b"[]")
    (folder / "vae/a b.safetensors").write_bytes(b"v" * 8)
    (folder / "vae/config.json").unlink()
    before, after = (hashlib.sha256(content).hexdigest() for content in (b"{}", b"[]"))
    found = compare(folder, manifest)
    assert found == [
        Difference("model_index.json", "hash", f"sha256:{before}", f"sha256:{after}"),
        Difference("vae/a b.safetensors", "size", 9_000_000, 8),
        Difference("vae/config.json", "missing"),
    ]
    assert [difference.describe() for difference in found] == [
        f"model_index.json: has sha256:{after}, the manifest says sha256:{before}",
        "vae/a b.safetensors: has 8 bytes, the manifest says 9000000",
        "vae/config.json: is missing",
    ]


def test_a_file_of_another_size_is_not_read(folder, manifest) -> None:
    (folder / "vae/a b.safetensors").write_bytes(b"v" * 8)
    seen: list[int] = []
    compare(folder, manifest, seen.append)
    assert sum(seen) == bytes_to_read(folder, manifest) == 2


def test_an_md5_alone_is_compared(folder) -> None:
    wrong = Manifest("m", {"model_index.json": Expected(md5="0" * 32)})
    right = Manifest("m", {"model_index.json": Expected(md5=hashlib.md5(b"{}").hexdigest())})
    assert [difference.problem for difference in compare(folder, wrong)] == ["hash"]
    assert compare(folder, right) == []


def test_a_folder_in_place_of_a_file_is_missing(folder, manifest) -> None:
    (folder / "vae/config.json").unlink()
    (folder / "vae/config.json").mkdir()
    assert compare(folder, manifest) == [Difference("vae/config.json", "missing")]


def test_a_file_that_cannot_be_read_is_one_difference_of_all(folder, manifest) -> None:
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").symlink_to("/proc/self/mem")  # reads as an error, even for root
    (folder / "vae/config.json").unlink()
    files = {name: Expected(sha256=expected.sha256) for name, expected in manifest.files.items()}
    found = compare(folder, Manifest("m", files))
    assert [(difference.file, difference.problem) for difference in found] == [
        ("model_index.json", "unreadable"),
        ("vae/config.json", "missing"),
    ]
    assert "Input/output error" in found[0].describe()
    with pytest.raises(OSError, match="Input/output error"):
        make_manifest(folder, ["model_index.json"])


def test_hidden_files_are_no_part_of_a_folder(folder) -> None:
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("")
    (folder / "vae/.DS_Store").write_text("")
    assert folder_files(folder) == sorted(FILES)


def test_progress_is_plain_lines_where_there_is_no_terminal(monkeypatch) -> None:
    clock = iter([0.0, 5.0, 10.0, 15.0, 30.0])
    monkeypatch.setattr("zimage_core.byte_progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with ByteProgress("fetching x", 10_000_000_000, stream) as progress:
        progress.add(1_000_000_000, found=True)
        progress.add(500_000_000)
        progress.add(500_000_000)
        progress.add(-2_000_000_000)
    assert stream.getvalue().splitlines() == [
        "fetching x: 1.50 GB of 10.00 GB, 50.0 MB/s, about 3 min left",
        "fetching x: 0 B of 10.00 GB",
    ]


def test_progress_is_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with ByteProgress("fetching x", 1000, stream) as progress:
        progress.add(1000)
        progress.say("a word")
    assert "fetching x: 100%" in stream.getvalue()
    assert "a word\n" in stream.getvalue()


def test_sizes_are_decimal() -> None:
    assert [byte_size(n) for n in (0, 999, 1000, 1_500_000, 32_900_000_000, 10**13)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.5 MB",
        "32.90 GB",
        "10000.00 GB",
    ]


def test_the_shipped_manifest_is_that_of_the_original_repository() -> None:
    path = Path(__file__).parents[2] / "data/manifests/z-image-turbo.json"
    values = json.loads(path.read_text())
    manifest = read_manifest(path)
    assert (manifest.name, manifest.repo) == ("z-image-turbo", "Tongyi-MAI/Z-Image-Turbo")
    assert values["origin"].startswith("https://github.com/Tongyi-MAI/Z-Image/")
    assert len(manifest.files) == 16
    shard = "transformer/diffusion_pytorch_model-00001-of-00003.safetensors"
    assert manifest.files[shard] == Expected(md5="54889d0dd179b4fa2fd7bd0e487d856e")
