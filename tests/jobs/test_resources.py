"""Finding the shipped files in a clone and in a wheel."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from jobs import resources
from jobs.errors import InputError
from jobs.job_file import load_job


def test_clone_root_holds_what_the_wheel_bundles() -> None:
    root = resources.bundle_root()
    assert (root / "configs").is_dir()
    assert (root / "jobs" / "avatars.yaml").is_file()
    assert list(resources.presets()) == [
        "z-image",
        "z-image-edit",
        "z-image-tiny",
        "z-image-tiny-edit",
        "z-image-turbo",
    ]
    assert list(resources.shipped_jobs()) == [
        "jobs/avatars.yaml",
        "jobs/edit.yaml",
        "jobs/food.yaml",
        "jobs/gaming.yaml",
    ]


def test_shipped_names_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = resources.bundle_root()
    assert resources.find_job("jobs/avatars.yaml") == root / "jobs" / "avatars.yaml"
    assert resources.find_job("configs/z-image-tiny.yaml") == root / "configs/z-image-tiny.yaml"
    # Nothing but job files is served from there, and a missing file stays what was asked for.
    for name in ("pyproject.toml", "tests/x.yaml", "jobs/none.yaml", "../jobs/avatars.yaml"):
        assert resources.find_job(name) == Path(name)
    assert resources.find_job("a" * 300 + ".yaml") == Path("a" * 300 + ".yaml")


def test_presets_are_found_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    preset = resources.bundle_root() / "configs/z-image-tiny.yaml"
    for name in ("z-image-tiny", "configs/z-image-tiny.yaml", Path("z-image-tiny")):
        assert resources.find_overlay(name) == preset
    assert resources.find_overlay("z-image-none") == Path("z-image-none")
    assert resources.find_overlay("avatars") == Path("avatars")  # no preset, but a job
    (tmp_path / "z-image-tiny").touch()
    assert resources.find_overlay("z-image-tiny") == Path("z-image-tiny")


def test_shipped_tables_and_checkpoints_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = resources.bundle_root()
    for name in ("data/profiles/avatars.xlsx", "data/checkpoints/z-image-tiny"):
        assert resources.data_path(name) == root / name
    for name in ("data/none", "data/../configs/z-image-tiny.yaml", "configs/z-image.yaml", "data2"):
        assert resources.data_path(name) == Path(name)
    (tmp_path / "data/checkpoints/z-image-tiny").mkdir(parents=True)
    assert resources.data_path("data/checkpoints/z-image-tiny") == Path(
        "data/checkpoints/z-image-tiny"
    )


def test_a_file_that_exists_wins_over_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "avatars.yaml").touch()
    assert resources.find_job("jobs/avatars.yaml") == Path("jobs/avatars.yaml")


def test_missing_bundle_is_an_error_that_says_how_to_mend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "jobs")
    with pytest.raises(InputError, match="install the package again"):
        resources.bundle_root()


@pytest.fixture
def wheel_layout(tmp_path: Path) -> Path:
    """A site-packages folder as the wheel's force-include lays it out."""
    root = resources.bundle_root()
    site = tmp_path / "site"
    shutil.copytree(
        root / "jobs", site / "jobs", ignore=shutil.ignore_patterns("*.yaml", "__pycache__")
    )
    bundled = site / "jobs" / "bundled"
    shutil.copytree(root / "configs", bundled / "configs")
    (bundled / "jobs").mkdir()
    for path in resources.shipped_jobs().values():
        shutil.copy(path, bundled / "jobs")
    (bundled / "data" / "profiles").mkdir(parents=True)
    (bundled / "data" / "profiles" / "avatars.xlsx").touch()
    (bundled / "data" / "checkpoints" / "z-image-tiny").mkdir(parents=True)
    return site


def test_wheel_reads_its_own_files_and_keeps_weights_out_of_site_packages(
    wheel_layout: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    script = (
        "from jobs.job_file import load_job\n"
        "from jobs.resources import bundle_root\n"
        "a = load_job('jobs/avatars.yaml')\n"
        "b = load_job('jobs/avatars.yaml', overlays=['configs/z-image-tiny.yaml'])\n"
        "print(bundle_root(), a.prompts.profiles, a.model.path, b.model.path, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=work,
        env={"PYTHONPATH": str(wheel_layout)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    bundled = wheel_layout / "jobs" / "bundled"
    assert done.stdout.splitlines() == [
        str(bundled),
        str(bundled / "data" / "profiles" / "avatars.xlsx"),
        str(work / "ckpts" / "Z-Image-Turbo"),
        str(bundled / "data" / "checkpoints" / "z-image-tiny"),
    ]


@pytest.mark.parametrize("name", ["avatars", "food", "gaming"])
def test_shipped_jobs_load_as_they_are_and_on_the_tiny_checkpoint(name: str) -> None:
    root = resources.bundle_root()
    job = load_job(root / "jobs" / f"{name}.yaml")
    assert (job.name, job.prompts.generator, job.prompts.count) == (name, name, 6000)
    assert job.output.uri == f"output/{name}"
    assert job.model.path == root / "ckpts" / "Z-Image-Turbo"
    assert job.model.repo == "Tongyi-MAI/Z-Image-Turbo"
    assert (job.sampling.num_inference_steps, job.sampling.guidance_scale) == (8, 0.0)
    tiny = load_job(
        root / "jobs" / f"{name}.yaml", overlays=[root / "configs" / "z-image-tiny.yaml"]
    )
    assert tiny.model.path == root / "data" / "checkpoints" / "z-image-tiny"
    assert tiny.model.repo is None
    assert (tiny.sampling.width, tiny.sampling.height, tiny.model.dtype) == (128, 128, "float32")


@pytest.mark.parametrize("name", ["local", "example-aws"])
def test_cluster_files_carry_a_job_and_pass_rays_own_schema(name: str) -> None:
    path = resources.bundle_root() / "configs" / "clusters" / f"{name}.yaml"
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    cluster = yaml.safe_load(path.read_text(encoding="utf-8"))
    jsonschema.validate(cluster, json.loads(schema.read_text(encoding="utf-8")))
    job = load_job(path)
    assert job.prompts.generator == "avatars"
    assert job.source == path
