"""What `model.attention` and `model.compile` come to: decided once, from the job and the device."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from job_runs import read_hashes

from jobs import capabilities, runner
from jobs.capabilities import (
    COMPILE_MIN_IMAGES,
    device_capabilities,
    resolve_attention,
    resolve_compile,
)
from jobs.cli import main
from jobs.config import JobConfig
from jobs.errors import InputError
from jobs.executor import WorkerInfo
from jobs.local_executor import LocalExecutor
from jobs.resources import bundle_root
from zimage_core import compilation

TINY = bundle_root() / "data" / "checkpoints" / "z-image-tiny"
GPU = {"node": "n", "device": "H100", "device_type": "cuda", "memory": 80 * 1024**3}


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZIMAGE_ATTENTION", raising=False)


def job(path: Path = TINY, workers: Any = "auto", **model: Any) -> JobConfig:
    return JobConfig.model_validate(
        {
            "name": "a",
            "model": {"path": str(path), **model},
            "prompts": {"generator": "avatars"},
            "output": {"uri": "out"},
            "run": {"workers": workers},
        }
    )


def gpu(**found: Any) -> WorkerInfo:
    return WorkerInfo(**{**GPU, "attention": ("_flash_3", "flash", "native"), **found})


def test_attention_auto_is_the_best_that_the_worker_reports() -> None:
    assert resolve_attention(job(), gpu()) == "_flash_3"
    assert resolve_attention(job(), gpu(attention=("native", "_native_flash"))) == "native"
    assert resolve_attention(job(attention="flash"), gpu()) == "flash"
    # Named but impossible there: the worker refuses it with its reason.
    assert resolve_attention(job(attention="_flash_3"), gpu(attention=("native",))) == "_flash_3"


def test_environment_before_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_ATTENTION", "_native_flash")
    assert resolve_attention(job(), gpu()) == "_native_flash"
    assert resolve_attention(job(attention="flash"), gpu()) == "flash"
    monkeypatch.setenv("ZIMAGE_ATTENTION", "auto")
    assert resolve_attention(job(), gpu()) == "_flash_3"
    monkeypatch.setenv("ZIMAGE_ATTENTION", "fast")
    with pytest.raises(InputError, match="ZIMAGE_ATTENTION: 'fast'; allowed: auto, native, "):
        resolve_attention(job(), gpu())


@pytest.mark.parametrize(
    ("asked", "info", "offload", "num_samples", "compiles"),
    [
        ("auto", gpu(compiles=True), "none", COMPILE_MIN_IMAGES, True),
        ("auto", gpu(compiles=True), "phase", COMPILE_MIN_IMAGES, True),
        ("auto", gpu(compiles=True), "none", COMPILE_MIN_IMAGES - 1, False),
        ("auto", gpu(compiles=True), "block", COMPILE_MIN_IMAGES, False),
        ("auto", gpu(compiles=False), "none", 10**6, False),
        (True, gpu(compiles=False), "none", 1, True),
        (False, gpu(compiles=True), "none", 10**6, False),
    ],
)
def test_compile_auto_asks_whether_the_job_pays_for_it(
    asked: Any, info: WorkerInfo, offload: str, num_samples: int, compiles: bool
) -> None:
    for workers in ("auto", 1, 512):
        config = job(compile=asked, workers=workers)
        assert resolve_compile(config, info, offload, num_samples) is compiles


def test_what_a_cpu_can_run(tmp_path: Path) -> None:
    for config in (job(), job(tmp_path / "not fetched yet")):
        found = device_capabilities(config, "cpu", "float32")
        assert found.attention == ("native", "_native_flash")
        assert found.compiles is False
    broken = tmp_path / "transformer" / "config.json"
    broken.parent.mkdir()
    broken.write_text("{", encoding="utf-8")
    assert device_capabilities(job(tmp_path), "cpu", "float32").attention[0] == "native"


def test_heads_are_those_of_the_checkpoint() -> None:
    assert capabilities._head_dim(job()) == 32
    assert capabilities._head_dim(job(TINY.parent)) == capabilities.PUBLISHED_HEAD_DIM


def run(made: Any, *flags: str) -> int:
    return main(["run", str(made.path), "--local", *flags])


def resolved(made: Any) -> dict[str, Any]:
    record = json.loads((made.output / "job.json").read_text())
    found: dict[str, Any] = record["fingerprint"]
    return found


def test_a_job_records_what_auto_came_to_and_keeps_it(
    make_job: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_job(count=4)
    assert run(made, "--count", "2") == 0
    assert resolved(made)["attention"] == "native"
    assert resolved(made)["compile"] is False
    # Another machine, another environment: the record stands.
    monkeypatch.setenv("ZIMAGE_ATTENTION", "_native_flash")
    monkeypatch.setattr(capabilities, "COMPILE_MIN_IMAGES", 1)
    assert run(made) == 0
    assert resolved(made)["attention"] == "native"
    assert resolved(made)["compile"] is False
    for change in ("model.compile=true", "model.attention=_native_flash"):
        assert run(made, "--count", "5", "--set", change) == 2
        assert f"{change.split('=')[0]}: was " in capsys.readouterr().err


def test_the_whole_plan_counts(make_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver passes on the samples of the plan: prompts times images of each."""
    seen: list[int] = []

    def spy(*arguments: Any) -> Any:
        seen.append(inspect.signature(resolve).bind(*arguments).arguments["num_samples"])
        return resolve(*arguments)

    resolve = runner.resolve
    monkeypatch.setattr(runner, "resolve", spy)
    assert run(make_job(count=3), "--set", "sampling.images_per_prompt=2") == 0
    assert seen == [6]


@pytest.fixture
def uncompilable(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: Any) -> str:
        return "on a CPU without a C++ compiler"

    monkeypatch.setattr(compilation, "_missing", missing)


@pytest.mark.usefixtures("uncompilable")
def test_what_cannot_compile_is_refused_before_any_image(
    make_job: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_job(count=4)
    assert run(made, "--set", "model.compile=true") == 2
    error = capsys.readouterr().err
    assert "model.compile: compile is not possible on a CPU without a C++ compiler" in error
    assert not (made.output / "images").exists()
    assert run(made) == 0


def test_true_reaches_the_workers_model(make_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from zimage_core import loader

    compiled: list[Any] = []
    monkeypatch.setattr(loader, "compile_blocks", lambda model, device: compiled.append(model))
    made = make_job(count=2)
    assert run(made, "--set", "model.compile=true") == 0
    assert resolved(made)["compile"] is True
    assert len(compiled) == 1
    log = next((made.output / "logs").iterdir()).read_text()
    assert "attention native, compile True" in log


def test_a_local_worker_reports_what_can_run(make_job: Any, monkeypatch: Any) -> None:
    infos: list[WorkerInfo] = []
    start = LocalExecutor.start

    def spy(self: LocalExecutor) -> WorkerInfo:
        infos.append(start(self))
        return infos[-1]

    monkeypatch.setattr(LocalExecutor, "start", spy)
    assert run(make_job(count=1)) == 0
    assert infos[0].attention == ("native", "_native_flash")
    assert infos[0].compiles is False


@pytest.mark.slow
def test_a_compiled_job_that_is_resumed_makes_the_same_bytes(make_job: Any) -> None:
    """The second process meets the last batches first, and compiles the same code."""
    made = make_job(count=11)
    compiled = ["--local", "--set", "model.compile=true", "--set", "sampling.batch_size=3"]
    other = made.output.with_name("resumed")
    for flags in ([], ["--count", "8", "--output", str(other)], ["--output", str(other)]):
        ended = made.run(*compiled, *flags)
        assert ended.returncode == 0, ended.stderr
    assert len(read_hashes(other)) == 11
    assert read_hashes(made.output) == read_hashes(other)
