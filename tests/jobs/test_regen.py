"""`zimage regen`: samples made again from an output alone, and what is said where they differ."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cli_calls import CHECKPOINT, CommandLine
from PIL import Image
from safetensors.torch import load_file, save_file

from jobs.writers import pixels_sha256

BATCHES = ["--set", "sampling.batch_size=3"]


@pytest.fixture
def made(zimage: CommandLine) -> CommandLine:
    """With an output `out` of 8 images in batches of up to 3, made with a copy of the model."""
    shutil.copytree(CHECKPOINT, zimage.folder / "model")
    zimage.run("--set", "model.path=model", *BATCHES, code=0)
    return zimage


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


def edit_rows(output: Path, index: int, **values: object) -> None:
    """Change a committed row."""
    for part in (output / "manifest").iterdir():
        table = pq.read_table(part)
        rows = table.to_pylist()
        if index in [row["index"] for row in rows]:
            for row in rows:
                row.update(values if row["index"] == index else {})
            pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), part)


def change_weights(model: Path) -> None:
    file = model / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["all_final_layer.2-1.linear.bias"] += 0.1
    save_file(tensors, file)


def write_adapter(file: Path, *, seed: int) -> None:
    """A LoRA of rank 2 for one layer of the tiny checkpoint."""
    name = "layers.0.attention.to_q"
    folder = CHECKPOINT / "transformer"
    weight = load_file(folder / "diffusion_pytorch_model.safetensors")[f"{name}.weight"]
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(2, weight.shape[1], generator=generator)
    up = torch.randn(weight.shape[0], 2, generator=generator)
    pair = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file({f"transformer.{key}": tensor for key, tensor in pair.items()}, file)


def test_every_sample_is_made_again_with_the_same_pixels(made: CommandLine) -> None:
    """Also those of one batch alone: the others of their batch are made with them."""
    before = tree(made.folder / "out")
    ended = made("regen", "out", *range(8), code=0)
    assert "8 of 8 samples made again with equal pixels\n" in ended.out
    batches = {len(row["batch"]) for row in made.rows()}
    assert max(batches) > 1
    index = next(row["index"] for row in made.rows() if len(row["batch"]) > 1)
    ended = made("regen", "out", index, "--write", "again", code=0)
    assert f"sample {index}: equal, in a batch of " in ended.out
    with Image.open(made.folder / f"again/t_{index:08d}.png") as image:
        assert pixels_sha256(np.asarray(image)) == made.rows()[index]["pixels_sha256"]
    assert len(list((made.folder / "again").iterdir())) == 1
    assert tree(made.folder / "out") == before


def test_other_weights_are_named_and_measured(made: CommandLine) -> None:
    change_weights(made.folder / "model")
    ended = made("regen", "out", 3, 4, "--json", code=1)
    report = json.loads(ended.out)
    assert [s["index"] for s in report["samples"]] == [3, 4] and report["equal"] == 0
    for sample in report["samples"]:
        assert not sample["equal"] and sample["made_sha256"] != sample["pixels_sha256"]
        assert 0 < sample["max_difference"] <= 255 and 0 < sample["differing"] <= 1
        assert sample["psnr"] > 0
    fingerprint = made.rows()[3]["model_fingerprint"]
    assert len(report["changed"]) == 1
    assert report["changed"][0].startswith(f"model weights: were {fingerprint}, now sha256:")
    ended = made("regen", "out", 3, code=1)
    assert (
        "sample 3: different: by up to " in ended.out and " dB, from the stored image" in ended.out
    )
    assert "what has changed since they were made:\n  model weights: were sha256:" in ended.out
    # the weights as they were, elsewhere
    made("regen", "out", 3, "--set", f"model.path={CHECKPOINT}", code=0)


def test_what_an_edited_row_says(made: CommandLine) -> None:
    output = made.folder / "out"
    (output / "metadata.parquet").unlink()
    edit_rows(output, 1, prompt="A cat")
    ended = made("regen", "out", 1, code=1)
    assert "sample 1: prompt: the row says 'A cat', the generator '" in ended.out
    edit_rows(output, 6, pixels_sha256="0" * 64)
    ended = made("regen", "out", 6, code=1)
    assert "equal to the stored image, whose pixels are not those of its row's hash" in ended.out
    assert "nothing that is recorded has changed since" in ended.out
    next(output.glob("images/*/t_00000006.png")).unlink()
    ended = made("regen", "out", 6, code=1)
    assert "the stored image cannot be compared: the file is missing" in ended.out


def test_other_versions_and_another_device_are_named(made: CommandLine) -> None:
    output = made.folder / "out"
    change_weights(made.folder / "model")
    for file in (output / "events").iterdir():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for event in lines:
            if event["event"] == "worker_ready":
                event["versions"]["transformers"] = "1.0"
        file.write_text("".join(json.dumps(event) + "\n" for event in lines))
    edit_rows(output, 0, device="NVIDIA H100 80GB HBM3")
    ended = made("regen", "out", 0, code=1)
    assert "\n  device: was NVIDIA H100 80GB HBM3, now cpu\n" in ended.out
    assert "\n  transformers: was 1.0, now " in ended.out


def test_samples_that_there_are_not(zimage: CommandLine) -> None:
    body = "assert index != 1\n        return f'A cat {index}'"
    generator = ["--set", f"prompts.generator={zimage.write_generator(body)}"]
    zimage.run(*generator, "--count", 4, code=3)
    words = zimage("regen", "out", 0, 4, code=2).err
    assert "sample 4: not planned; allowed: samples 0 to 3" in words
    words = zimage("regen", "out", 1, code=2).err
    assert "sample 1: failed (prompt_error: " in words and "--retry-failed" in words
    assert "value '-1': allowed: a whole number" in zimage("regen", "out", "-1", code=2).err
    assert "nowhere: no such folder" in zimage("regen", "nowhere", 1, code=2).err


def test_what_it_needs_is_gone_or_newer(made: CommandLine) -> None:
    (made.folder / "model").rename(made.folder / "moved")
    words = made("regen", "out", 0, code=5).err
    assert f"model.path: {made.folder / 'model'}: no such folder; say where they are with" in words
    made("regen", "out", 0, "--set", "model.path=moved", code=0)
    words = made("regen", "out", 0, "--set", "sampling.seed=3", code=2).err
    assert "--set: 'sampling.seed=3': allowed: KEY=PATH, KEY one of model.path, " in words
    words = made("regen", "out", 0, "--set", "model.path=7", code=2).err
    assert "--set: model.path: value '7': allowed: a path" in words
    words = made("regen", "out", 0, "--write", "out/again", code=2).err
    assert "out/again: is in the output, which regen never changes" in words
    record = made.folder / "out/job.json"
    content = json.loads(record.read_text())
    content["job"]["sampling"]["sharpness"] = 3
    record.write_text(json.dumps(content))
    words = made("regen", "out", 0, code=5).err
    assert "out/job.json: damaged: ValueError: job.sampling.sharpness is 3: " in words
    assert "newer version" in words
    record.write_text(json.dumps(content | {"schema_version": 2}))
    assert "schema_version 2" in made("regen", "out", 0, code=5).err


def test_starting_images_and_adapters(zimage: CommandLine) -> None:
    (zimage.folder / "starts").mkdir()
    for name, deviation in (("a.png", 60), ("b.png", 30)):
        noise = Image.effect_noise((32, 32), deviation).convert("RGB")
        noise.save(zimage.folder / "starts" / name)
    write_adapter(zimage.folder / "ink.safetensors", seed=1)
    zimage.write("p.csv", "prompt,image,loras\nA cat,a.png,ink\nA dog,b.png,ink\n")
    flags = {
        "prompts.generator": "table",
        "prompts.profiles": "p.csv",
        "prompts.images_root": "starts",
        "prompts.options": "{image_column: image}",
        "prompts.count": 2,
        "sampling.num_inference_steps": 2,
        "model.loras": "{ink: {path: ink.safetensors, scale: 0.8}}",
    }
    zimage.run(*[part for k, v in flags.items() for part in ("--set", f"{k}={v}")], code=0)
    assert zimage.rows()[0]["loras"] == "ink"
    assert "2 of 2 samples" in zimage("regen", "out", 0, 1, code=0).out
    write_adapter(zimage.folder / "ink.safetensors", seed=2)
    shutil.copy(zimage.folder / "starts/b.png", zimage.folder / "starts/a.png")
    ended = zimage("regen", "out", 0, code=1)
    assert "\n  adapter ink (" in ended.out and "ink.safetensors): was sha256:" in ended.out
    assert "\n  starting image a.png of sample 0: sha256 was " in ended.out
    (zimage.folder / "starts/a.png").unlink()
    words = zimage("regen", "out", 0, code=2).err
    assert "sample 0: starting image: a.png: " in words


def test_a_neighbour_that_was_made_again_since_is_taken_as_it_was(zimage: CommandLine) -> None:
    table = ["--set", "prompts.generator=table", "--set", "prompts.profiles=p.csv", *BATCHES]
    zimage.write("p.csv", "prompt\nA cat\nA dog\nA pig\n")
    zimage.run(*table, "--count", 3, code=0)
    assert zimage.rows()[0]["batch"] == [0, 1, 2]
    zimage.write("p.csv", "prompt\nA cat\nA cow\nA pig\n")
    zimage.run(*table, "--count", 3, "--accept-changes", code=0)
    assert zimage.rows()[1]["revision"] == 1
    assert "3 of 3 samples" in zimage("regen", "out", 0, 1, 2, code=0).out
