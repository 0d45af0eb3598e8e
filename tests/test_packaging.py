"""The names that an installation takes, and the wheel."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
DISTRIBUTION = PROJECT["project"]["name"]
# What a build reads. Copied, so that it neither sees nor leaves anything in the work tree.
BUILT_FROM = (".ci", "configs", "data", "jobs", "prompt_generators", "zimage_core")
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")


def test_the_packages_are_the_three() -> None:
    assert PACKAGES == ["zimage_core", "prompt_generators", "jobs"]
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_name_is_ours(package: str) -> None:
    spec = find_spec(package)
    assert spec is not None and spec.origin == str(ROOT / package / "__init__.py")
    assert set(packages_distributions().get(package, [])) <= {DISTRIBUTION}


@pytest.mark.parametrize("package", PACKAGES)
def test_types_are_published(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in BUILT_FROM:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_takes_no_other_name(names: list[str]) -> None:
    version = PROJECT["project"]["version"]
    info = f"{DISTRIBUTION.replace('-', '_')}-{version}.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
    assert len(names) == len(set(names))


def test_wheel_holds_every_module_and_every_shipped_file(names: list[str]) -> None:
    for package in PACKAGES:
        modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*.py")}
        assert modules | {f"{package}/py.typed"} <= set(names)
    for folder in ("zimage_core/published", "jobs/gallery_page"):
        for path in (ROOT / folder).iterdir():
            assert path.relative_to(ROOT).as_posix() in names
    shipped = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "jobs").glob("*.yaml")]
    shipped += [path for path in (ROOT / "data").rglob("*") if path.is_file()]
    for path in shipped:
        assert f"jobs/bundled/{path.relative_to(ROOT).as_posix()}" in names
    for path in (ROOT / "data" / "vocabularies").glob("*.json"):
        assert f"prompt_generators/vocabularies/{path.name}" in names
    assert not [name for name in names if re.match(r"jobs/[^/]+\.yaml$", name)]
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


def test_wheel_says_what_it_is(wheel: Path, names: list[str]) -> None:
    archive = zipfile.ZipFile(wheel)
    (path,) = [name for name in names if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(archive.read(path).decode())
    assert metadata["Name"] == DISTRIBUTION
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [r for r in metadata.get_all("Requires-Dist") or [] if "extra ==" not in r]
    assert required and all(">=" in requirement for requirement in required)
    assert not [r for r in required if r.startswith(("diffusers", "datasets", "flash"))]
    (entry,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "zimage = jobs.cli:main" in archive.read(entry).decode()


@pytest.mark.slow
def test_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """From another folder, with only the dependencies of this environment beside it."""
    venv, work = tmp_path / "venv", tmp_path / "work"
    work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    query = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    here, there = (
        Path(
            subprocess.run(
                [p, "-c", query], capture_output=True, text=True, check=True
            ).stdout.strip()
        )
        for p in (sys.executable, python)
    )
    # The dependencies are linked one by one: a .pth to all of it would bring the clone along.
    for entry in here.iterdir():
        if (
            not entry.name.startswith("pip")
            and "zimage_batch" not in entry.name
            and not (there / entry.name).exists()
        ):
            (there / entry.name).symlink_to(entry)

    def zimage(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")
        }
        done = subprocess.run(
            [venv / "bin" / "zimage", *arguments],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done

    assert zimage("--version").stdout == f"zimage {PROJECT['project']['version']}\n"
    where = subprocess.run(
        [python, "-c", "import jobs; print(jobs.__file__)"],
        cwd=work,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(there))
    tiny = ("jobs/avatars.yaml", "--config", "configs/z-image-tiny.yaml", "--count", "4")
    assert "avatars: 4 samples" in zimage("plan", *tiny).stdout
    zimage("run", *tiny, "--local", "--output", "out")
    assert len(list((work / "out" / "images").rglob("*.png"))) == 4
    assert "4 of 4 images as committed" in zimage("verify", "out").stdout
    # weights of a preset are looked for where the user is, not inside the package
    assert str(work / "ckpts" / "Z-Image-Turbo") in zimage("plan", "jobs/avatars.yaml").stdout
