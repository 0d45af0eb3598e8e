"""Choosing and packing what a cluster gets."""

import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import upload as upload_module
from jobs.errors import InputError
from jobs.upload import collect

Write = Callable[..., Path]

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: bytes = b"x") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


def names(root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in collect(root).files]


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True)


def test_leaves_out_what_is_hidden_made_or_cached(write: Write, tmp_path: Path) -> None:
    kept = ["a.yaml", "data/output/table.csv", "jobs/a.py"]
    for name in [
        *kept,
        ".env",
        ".ssh/id",
        "data/.secret",
        ".venv/lib/x.py",
        "output/a/1.png",
        "ckpts/m/w.safetensors",
        "jobs/__pycache__/a.pyc",
        "jobs/b.pyc",
        "venv/x",
    ]:
        write(name)
    assert names(tmp_path) == kept


@needs_git
def test_gitignore_counts_in_a_work_tree(write: Write, tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    write(".gitignore", b"*.log\n/private/\n")
    for name in ("a.yaml", "b.log", "private/p.csv", "sub/c.log", "sub/d.yaml", "sub/é.txt"):
        write(name)
    git(tmp_path, "add", "a.yaml")
    write("sub/broken").unlink()
    (tmp_path / "sub" / "broken").symlink_to("nowhere")
    assert names(tmp_path) == ["a.yaml", "sub/d.yaml", "sub/é.txt"]
    assert names(tmp_path / "sub") == ["d.yaml", "é.txt"]  # a folder inside the work tree
    chosen = collect(tmp_path)
    assert chosen.missing(tmp_path / "private" / "p.csv") == ".gitignore leaves it out"
    assert chosen.missing(tmp_path / "sub") == "sub/c.log is not uploaded: .gitignore leaves it out"


def test_refuses_to_guess_when_git_does_not_answer(write: Write, tmp_path: Path) -> None:
    write("a.yaml")
    write(".git", b"gitdir: /nowhere\n")
    with pytest.raises(InputError, match=r"cannot ask Git what \.gitignore leaves out"):
        collect(tmp_path)


def test_says_why_a_path_is_missing(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_module, "MAX_FILE_BYTES", 2**20)
    good, hidden, weights = write("a.csv"), write(".x/a.csv"), write("ckpts/w.safetensors")
    large = write("big.bin", bytes(2**20 + 1))
    write("folder/b.csv")
    write("folder/.DS_Store")
    (tmp_path / "empty").mkdir()
    chosen = collect(tmp_path)
    assert chosen.too_large == (large,)
    assert chosen.missing(good) is None
    assert chosen.missing(tmp_path / "folder") is None
    assert "hidden names" in str(chosen.missing(hidden))
    assert "ckpts/" in str(chosen.missing(weights))
    assert "over 1 MiB" in str(chosen.missing(large))
    assert "does not exist" in str(chosen.missing(tmp_path / "none"))
    assert "outside of the working directory" in str(chosen.missing(Path("/")))
    assert "empty folder" in str(chosen.missing(tmp_path / "empty"))
    assert "big.bin is not uploaded" in str(chosen.missing(tmp_path))


def test_too_much_names_the_largest(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_module, "MAX_TOTAL_BYTES", 3 * 2**20)
    write("small.csv")
    write("a.bin", bytes(2**20))
    write("sub/b.bin", bytes(5 * 2**20 // 2))
    with pytest.raises(InputError, match=r"Largest: sub/b.bin \(2.5 MiB\), a.bin \(1.0 MiB\)"):
        collect(tmp_path)
    monkeypatch.setattr(upload_module, "MAX_FILES", 2)
    with pytest.raises(InputError, match="over 2 files"):
        collect(tmp_path)


def test_archive_holds_the_files_and_depends_on_contents_alone(
    write: Write, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    write("root/a.yaml", b"name: a\n")
    script = write("root/bin/run.sh", b"#!/bin/sh\n")
    script.chmod(0o755)
    archives = [tmp_path / "1.zip", tmp_path / "2.zip"]
    collect(root).pack(archives[0])
    (root / "a.yaml").touch()
    collect(root).pack(archives[1])
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with zipfile.ZipFile(archives[0]) as archive:
        assert archive.namelist() == ["a.yaml", "bin/run.sh"]
        assert archive.read("a.yaml") == b"name: a\n"
        assert archive.getinfo("bin/run.sh").external_attr >> 16 == 0o100755
        assert archive.getinfo("a.yaml").external_attr >> 16 == 0o100644
