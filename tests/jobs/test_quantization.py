"""Jobs with 8-bit weights: the key, what it pins, and what users do wrong."""

import json

import pytest
import torch
from cli_calls import CHECKPOINT, CommandLine
from lora_files import FORMATS, train, write

import zimage_core.quantization as quantization_module
from jobs.worker import GenerationWorker
from zimage_core import ZImageTransformer2DModel, load_from_local_dir

INT8 = ("--set", "model.quantization=int8")


@pytest.fixture
def adapter(zimage: CommandLine) -> None:
    model = load_from_local_dir(CHECKPOINT, device="cpu", dtype=torch.float32)["transformer"]
    assert isinstance(model, ZImageTransformer2DModel)
    tensors = FORMATS["kohya, musubi-tuner"][0](train(model, ("layers.0.attention.to_q",), seed=1))
    write(zimage.folder / "ink.safetensors", tensors)


def test_a_job_with_8_bit_weights_says_so_and_repeats(zimage: CommandLine) -> None:
    zimage.run("--count", 2, code=0)
    zimage.run(*INT8, "--count", 2, "--output", "int8", code=0)
    zimage.run(*INT8, "--count", 2, "--output", "again", code=0)
    plain, int8, again = (zimage.rows(output) for output in ("out", "int8", "again"))
    pixels = [[row["pixels_sha256"] for row in rows] for rows in (plain, int8, again)]
    assert pixels[1] == pixels[2] != pixels[0]
    assert {row["model"] for row in plain} == {"z-image-tiny"}
    assert {row["model"] for row in int8} == {"z-image-tiny with int8 weights"}
    assert {row["model_fingerprint"] for row in int8} == {plain[0]["model_fingerprint"]}
    record = json.loads((zimage.folder / "int8" / "job.json").read_text())
    assert record["job"]["model"]["quantization"] == "int8"
    assert record["versions"]["torchao"] != "not installed"
    assert "torchao" not in json.loads((zimage.folder / "out" / "job.json").read_text())["versions"]


def test_a_change_is_refused(zimage: CommandLine) -> None:
    zimage.run("--count", 1, code=0)
    for command in (["run", "job.yaml", "--local"], ["plan", "job.yaml"]):
        error = zimage(*command, *INT8, code=2).err
        assert "model.quantization: was 'none', now 'int8'" in error
    assert len(zimage.rows()) == 1


def test_a_record_from_before_the_key_means_none(zimage: CommandLine) -> None:
    zimage.run("--count", 1, code=0)
    path = zimage.folder / "out" / "job.json"
    record = json.loads(path.read_text())
    del record["job"]["model"]["quantization"]
    path.write_text(json.dumps(record))
    assert "was 'none', now 'int8'" in zimage.run(*INT8, code=2).err
    zimage.run("--count", 2, code=0)
    assert len(zimage.rows()) == 2
    assert json.loads(path.read_text())["job"]["model"]["quantization"] == "none"


@pytest.mark.parametrize("command", ["run", "plan"])
def test_adapters_are_refused_before_anything_is_loaded(
    zimage: CommandLine, adapter: None, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(GenerationWorker, "load", lambda *_: pytest.fail("loaded"))
    flags = ["--local"] if command == "run" else []
    lora = ["--set", "model.loras.ink.path=ink.safetensors"]
    error = zimage(command, "job.yaml", *flags, *INT8, *lora, code=2).err
    assert "--set: model.quantization: 'int8': adapters (model.loras)" in error
    assert "allowed: 'none', or model.loras: null" in error
    assert not (zimage.folder / "out").exists()


def test_a_missing_torchao_ends_a_run_before_any_image(
    zimage: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise quantization_module.QuantizationError(
            f"'int8' needs torchao, which is missing: {quantization_module.INSTALL}"
        )

    monkeypatch.setattr(quantization_module, "_config", gone)
    error = zimage.run(*INT8, code=2).err
    assert "model.quantization: 'int8' needs torchao, which is missing: pip install" in error
    assert not list((zimage.folder / "out" / "manifest").glob("*.parquet"))
    make = ("generate", "--model", CHECKPOINT, "--prompt", "a cat", "--quantization", "int8")
    error = zimage(*make, "--width", 32, "--height", 32, "-o", "cat.png", code=2).err
    assert "--quantization: 'int8' needs torchao" in error


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_generate(zimage: CommandLine, dtype: str) -> None:
    make = ("generate", "--model", CHECKPOINT, "--prompt", "a red apple", "--steps", 2)
    size = ("--width", 64, "--height", 64, "--dtype", dtype)
    zimage(*make, *size, "-o", "plain.png", code=0)
    zimage(*make, *size, "--quantization", "int8", "-o", "int8.png", code=0)
    plain, int8 = ((zimage.folder / f"{name}.png").read_bytes() for name in ("plain", "int8"))
    assert plain != int8


def test_generate_refuses_adapters(zimage: CommandLine, adapter: None) -> None:
    make = ("generate", "--model", CHECKPOINT, "--prompt", "a cat", "--quantization", "int8")
    error = zimage(*make, "--lora", "ink.safetensors", "-o", "cat.png", code=2).err
    assert "--quantization: 'int8': --lora cannot be put into 8-bit weights; allowed:" in error


def test_other_values_are_refused(zimage: CommandLine) -> None:
    error = zimage.run("--set", "model.quantization=int4", code=2).err
    assert "model.quantization: value 'int4'" in error and "none" in error and "int8" in error
