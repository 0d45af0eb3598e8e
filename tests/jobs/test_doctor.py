"""What `zimage doctor` says of this machine, and of ones it is made to believe in."""

import json
import re
import socket
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest

from jobs import canary_check
from jobs import doctor as doctor_module
from jobs.address import ADDRESS_VARIABLES
from jobs.doctor import MINIMUM, doctor, format_doctor
from jobs.resources import bundle_root
from zimage_core import ZImagePipeline

KEYS = [
    "ok",
    "versions",
    "cpu",
    "device",
    "gpus",
    "attention",
    "attention_auto",
    "compile",
    "disk",
    "ray",
    "model",
    "canary",
    "problems",
]
CANARY_KEYS = [
    *("device", "dtype", "attention", "batches_agree", "difference", "tolerance"),
    *("seconds", "reason"),
]
TINY = bundle_root() / "data" / "checkpoints" / "z-image-tiny"


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def fixes(report: dict[str, Any]) -> str:
    return "\n".join(f"{entry['problem']} => {entry['fix']}" for entry in report["problems"])


def fake_torch(**gpu: Any) -> Any:
    """A torch that finds one GPU, or with no arguments none though it is built for CUDA."""
    found = {"name": "GPU", "total_memory": 80 * 1024**3, "major": 9, "minor": 0} | gpu
    cuda = types.SimpleNamespace(
        is_available=lambda: bool(gpu),
        device_count=lambda: 1,
        get_device_properties=lambda _: types.SimpleNamespace(**found),
        mem_get_info=lambda _: (found["total_memory"] // 2, found["total_memory"]),
    )
    return types.SimpleNamespace(cuda=cuda, version=types.SimpleNamespace(cuda="12.8"))


def test_report_of_this_machine_is_complete_and_json() -> None:
    report = json.loads(json.dumps(doctor()))
    assert list(report) == KEYS
    assert report["cpu"]["cores"] >= 1
    assert report["cpu"]["memory_bytes"] > 2**28
    assert report["disk"]["path"] == str(Path.cwd())
    assert 0 <= report["disk"]["free_bytes"] <= report["disk"]["total_bytes"]
    assert re.match(r"\d+\.\d+", report["versions"]["torch"])
    assert report["attention"]["native"] == {"runs": True, "reason": None}
    assert report["attention"]["_flash_3"]["runs"] or report["attention"]["_flash_3"]["reason"]
    assert report["attention_auto"] in report["attention"]
    assert report["compile"]["runs"] == (report["compile"]["reason"] is None)
    assert report["ray"] == {"address": None, "reachable": None, "reason": None}
    assert report["model"] is None
    assert report["ok"] == (report["problems"] == [])


def test_text_says_what_the_report_says() -> None:
    text = format_doctor(doctor())
    for word in (
        "torch ",
        "cores",
        "attention  native: can run",
        "attention  auto picks ",
        "compile    ",
        " free in ",
        "zimage run",
    ):
        assert word in text
    report = doctor()
    report |= {"ok": False, "problems": [{"problem": "it is broken", "fix": "mend --it"}]}
    report["gpus"] = [
        {
            "index": 0,
            "name": "H100",
            "memory_bytes": 2**36,
            "free_bytes": 2**35,
            "capability": "9.0",
        }
    ]
    text = format_doctor(report)
    assert "PROBLEM    it is broken\n           mend it: mend --it\n1 problem(s)" in text
    assert "H100, 64.0 GiB (32.0 GiB free), compute capability 9.0" in text


def test_minimum_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((bundle_root() / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = {}
    for requirement in project["project"]["dependencies"]:
        name, _, number = requirement.partition(">=")
        wanted[name.partition("[")[0]] = tuple(map(int, number.split(".")))
    assert {name: wanted[name] for name in MINIMUM} == MINIMUM


def test_old_and_missing_packages_come_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "MINIMUM", {"torch": (99, 0)})
    monkeypatch.setattr(doctor_module, "PACKAGES", ("torch",))
    assert "is older than 99.0 => pip install 'torch>=99.0'" in fixes(doctor())
    monkeypatch.setattr(doctor_module, "MINIMUM", {"no-such-package": (1, 0)})
    monkeypatch.setattr(doctor_module, "PACKAGES", ("no-such-package",))
    report = doctor()
    assert report["versions"]["no-such-package"] is None
    assert "=> pip install 'no-such-package>=1.0'" in fixes(report)


def test_versions_compare_as_numbers() -> None:
    assert doctor_module._release("2.13.0+cpu") == (2, 13)
    assert doctor_module._release("2.9rc1") > doctor_module._release("2.5")
    assert doctor_module._release("4.100.0") > (4, 51)


def test_a_torch_that_cannot_be_imported_is_a_problem_and_no_crash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> None:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor_module.importlib, "import_module", broken)
    report = doctor()
    assert report["attention"] == {}
    assert report["gpus"] == []
    assert "libcudart.so.12" in fixes(report)
    assert format_doctor(report)


@pytest.mark.parametrize(
    ("cuda", "word"), [(None, "whl/cu128"), ("12.8", "torch finds no GPU => nvidia-smi")]
)
def test_a_gpu_that_torch_does_not_see_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str | None, word: str
) -> None:
    driver = tmp_path / "version"
    driver.touch()
    monkeypatch.setattr(doctor_module, "_NVIDIA_DRIVER", driver)
    problems = doctor_module._Problems()
    torch = fake_torch()
    torch.version.cuda = cuda
    assert doctor_module._gpus(torch, problems) == []
    assert word in fixes({"problems": problems})


def test_gpus_are_listed_and_old_ones_warned_of() -> None:
    problems = doctor_module._Problems()
    (gpu,) = doctor_module._gpus(fake_torch(name="H100"), problems)
    assert gpu == {
        "index": 0,
        "name": "H100",
        "memory_bytes": 80 * 1024**3,
        "free_bytes": 40 * 1024**3,
        "capability": "9.0",
    }
    assert problems == []
    doctor_module._gpus(fake_torch(name="T4", major=7, minor=5), problems)
    assert "T4" in fixes({"problems": problems})
    assert "model.dtype=float16" in fixes({"problems": problems})


def test_little_disk_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "MIN_FREE_BYTES", 2**80)
    assert "of disk are free" in fixes(doctor())


def test_ray_address_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{port}")
        assert doctor()["ray"]["reachable"] is True
    report = doctor()
    assert report["ray"]["reachable"] is False
    assert f"no Ray cluster answers at http://127.0.0.1:{port}" in fixes(report)
    assert f"http://127.0.0.1:{port}: " in format_doctor(report)


def test_a_model_is_summed_up_or_its_fault_named(tmp_path: Path) -> None:
    report = doctor(TINY)
    model = report["model"]
    assert model["ok"] is True
    assert set(model["parameters"]) == {"transformer", "vae", "text_encoder"}
    assert model["bytes"] > 100_000
    assert model["files"] >= 8
    canary = report["canary"]
    assert list(canary) == CANARY_KEYS
    assert canary["batches_agree"] is True and canary["reason"] is None
    assert 0 <= canary["difference"] <= canary["tolerance"] == 1e-4
    assert (canary["device"], canary["dtype"]) == ("cpu", "float32")
    assert canary["attention"] == report["attention_auto"]
    assert report["ok"] and report["problems"] == []
    text = format_doctor(report)
    assert "complete" in text
    assert "canary     images of a batch agree with the same made alone, on cpu (float32" in text

    report = doctor(tmp_path / "nothing")
    assert report["model"]["ok"] is False
    assert report["canary"] is None
    assert str(tmp_path / "nothing") in report["model"]["error"]
    assert report["ok"] is False
    assert "cannot be used" in format_doctor(report)


@pytest.mark.long
def test_batches_that_are_wrong_on_this_machine_are_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    denoise = ZImagePipeline.denoise

    def wrong(self: Any, prompts: Any, **kwargs: Any) -> Any:
        return denoise(self, prompts, **kwargs) * (1.5 if len(prompts) > 1 else 1.0)

    monkeypatch.setattr(ZImagePipeline, "denoise", wrong)
    report = doctor(TINY)
    assert report["canary"]["batches_agree"] is False
    assert report["canary"]["difference"] > 0.1
    assert report["ok"] is False
    assert "on cpu with attention native: workers make every image alone here" in fixes(report)
    assert "DIFFER from the same made alone" in format_doctor(report)


@pytest.mark.long
def test_a_model_too_large_for_this_machine_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary_check, "available_memory", lambda: 5_000_000)
    report = doctor(TINY)
    assert report["canary"]["batches_agree"] is None
    assert "too little for this model" in report["canary"]["reason"]
    assert report["ok"], "the machine is in order, and so is the model"
    assert "nothing to compare on cpu" in format_doctor(report)


def test_a_gpu_too_small_for_any_image_is_a_problem(tmp_path: Path) -> None:
    from zimage_core.tiny.make import make_checkpoint

    problems = doctor_module._Problems()
    gpus = doctor_module._gpus(fake_torch(total_memory=1_000_000), problems)
    doctor_module._model(make_checkpoint(tmp_path / "tiny"), gpus, problems)
    assert "the least that the model needs is" in fixes({"problems": problems})


def test_docs_name_every_key() -> None:
    docs = bundle_root() / "docs" / "cli.md"
    section = docs.read_text(encoding="utf-8").partition("## doctor")[2].partition("\n## ")[0]
    report = doctor()
    for key in KEYS:
        assert f"`{key}`" in section
    report["canary"] = dict.fromkeys(CANARY_KEYS)
    for key in ("cpu", "disk", "ray", "canary"):
        for name in report[key]:
            assert f"`{name}`" in section, name
