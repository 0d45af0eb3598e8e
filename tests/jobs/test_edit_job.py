"""Jobs of an Edit checkpoint: the images that prompts bring are edited, each encoded once."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_calls import CHECKPOINT, CommandLine
from PIL import Image
from stages import load, make_stages

from jobs.batch_images import BatchImages
from jobs.config import SamplingConfig
from jobs.edit_features import EditFeatures
from jobs.executor import WorkerSpec
from jobs.input_images import EDITED, InputImage, find_images
from jobs.job_file import load_job
from jobs.memory_needs import image_memory, memory_model
from jobs.plan import Sample, plan_batches
from jobs.worker import GenerationWorker
from zimage_core import ZImagePipeline, generate, load_from_local_dir
from zimage_core.pictures import prepare_picture
from zimage_core.tiny.make import make_checkpoint

SIZE = {"width": 48, "height": 32}
JOB = """
name: e
model: {path: CHECKPOINT, dtype: float32}
prompts:
  generator: table
  profiles: table.csv
  images_root: pics
  options: {column: instruction, image_column: [image, room]}
sampling: {width: 48, height: 32, num_inference_steps: 2, guidance_scale: 2.0, batch_size: 4}
output: {uri: out, shard_size: 32}
run: {max_failure_rate: 1.0}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "edit"
    return make_checkpoint(path, dtype=torch.float32, layers=1, siglip_dim=24)


@pytest.fixture
def job(zimage: CommandLine, checkpoint: Path) -> CommandLine:
    """The command line in a folder with a job, and a folder `pics` of good pictures."""
    zimage.write("job.yaml", JOB.replace("CHECKPOINT", str(checkpoint)))
    pics = zimage.folder / "pics"
    (pics / "more").mkdir(parents=True)
    picture(1).save(pics / "a.png")
    picture(2, (80, 66)).save(pics / "more/b.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(3, (66, 80)).save(pics / "turned.jpg", exif=turned, quality=95)  # 80 x 66 upright
    faint = picture(4).convert("RGBA")
    faint.putalpha(100)
    faint.save(pics / "faint.png")
    picture(5).quantize(16).save(pics / "palette.png")
    return zimage


def picture(seed: int, size: tuple[int, int] = (70, 100)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def table(job: CommandLine, *rows: Sequence[str]) -> None:
    """Rows of an instruction, an image and a room; the rest of a row is empty."""
    lines = [",".join([*row, "", ""][:3]) for row in rows]
    job.write("table.csv", "\n".join(["instruction,image,room", *lines]) + "\n")


def by_index(job: CommandLine, output: str = "out") -> dict[int, dict[str, Any]]:
    return {row["index"]: row for row in job.rows(output)}


def hashes(job: CommandLine, output: str = "out") -> dict[int, str]:
    return {index: row["pixels_sha256"] for index, row in by_index(job, output).items()}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many pictures and texts were encoded."""
    counted = {"pictures": 0, "texts": 0}
    pictures, text = ZImagePipeline.encode_pictures, ZImagePipeline.encode_edit_text

    def encode_pictures(self: Any, given: Sequence[Any], **options: Any) -> Any:
        counted["pictures"] += len(given)
        return pictures(self, given, **options)

    def encode_edit_text(self: Any, *args: Any, **options: Any) -> Any:
        counted["texts"] += 1
        return text(self, *args, **options)

    monkeypatch.setattr(ZImagePipeline, "encode_pictures", encode_pictures)
    monkeypatch.setattr(ZImagePipeline, "encode_edit_text", encode_edit_text)
    return counted


HOSTILE = {
    "gone.png": "gone.png: no such file below",
    "../secret.png": "../secret.png: allowed: a path relative to",
    "out.png": "out.png: a link leads out of",
    "more": "more: a folder, pipe or device; allowed: a file",
    "notes.png": "notes.png: not an image, or damaged; allowed: PNG",
    "empty.png": "empty.png: the file is empty",
    "moving.gif": "moving.gif: GIF of more than one frame; allowed: a still image",
    "cut.png": "cut.png: damaged or cut off",
    "bomb.png": "bomb.png: 9000 x 9000 pixels; allowed: at most 67,108,864",
    "small.png": "small.png: a picture of 70 x 20; allowed: 64 pixels or more a side",
    "long.png": "long.png: a picture of 700 x 70; allowed: one side at most 8 times the other",
}


def write_hostile(job: CommandLine) -> None:
    pics = job.folder / "pics"
    picture(9).save(job.folder / "secret.png")
    (pics / "out.png").symlink_to(job.folder / "secret.png")
    (pics / "notes.png").write_text("no picture")
    (pics / "empty.png").touch()
    picture(4).save(pics / "moving.gif", save_all=True, append_images=[picture(5)])
    (pics / "cut.png").write_bytes((pics / "a.png").read_bytes()[:-900])
    Image.new("1", (9000, 9000)).save(pics / "bomb.png")
    Image.new("RGB", (70, 20)).save(pics / "small.png")
    Image.new("RGB", (700, 70)).save(pics / "long.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_job_of_good_and_hostile_pictures(
    job: CommandLine, checkpoint: Path, calls: dict[str, int]
) -> None:
    write_hostile(job)
    good = [
        ("make it red", "a.png"),
        ("add a hat", "a.png"),
        ("put it in the room", "a.png", "more/b.png"),
        ("make it red", "turned.jpg"),
        ("a lamp",),
        ("make it red", "faint.png"),
        ("make it red", "", "palette.png"),
    ]
    bad = [("make it red", "a.png", name) for name in HOSTILE]
    table(job, *good, *bad)
    shown = job("plan", "job.yaml", code=0).out
    assert "0  make it red  edits a.png\n" in shown
    assert "2  put it in the room  edits a.png, more/b.png\n" in shown
    job.run(code=3)
    rows = by_index(job)
    for index, words in enumerate(HOSTILE.values(), start=len(good)):
        assert (rows[index]["status"], rows[index]["error_type"]) == ("failed", "prompt_error")
        assert words in rows[index]["error_message"]
    # 5 pictures; 4 texts, one of them about two pictures, and negatives for 0, 1 and 2 pictures
    assert calls == {"pictures": 5, "texts": 7}

    pics = job.folder / "pics"
    components = load_from_local_dir(checkpoint, device="cpu", dtype=torch.float32)
    for index, (instruction, *names) in enumerate(good):
        row, names = rows[index], [name for name in names if name]
        assert row["status"] == "ok" and row["batch_mode"] == "planned"
        assert row["profile_images"] == ("\n".join(names) or None)
        found = "\n".join(image.sha256 for image in find_images(pics, names))
        assert row["profile_images_sha256"] == (found or None)
        (expected,) = generate(
            **components,
            prompt=instruction,
            images=[[opened(pics / name) for name in names]],
            num_inference_steps=2,
            guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(row["seed"])],
            **SIZE,
        )
        made = Image.open(job.folder / "out" / row["file_name"])
        assert np.array_equal(np.asarray(made), np.asarray(expected)), index
    assert rows[0]["batch"] == rows[1]["batch"] == rows[5]["batch"] == [0, 1, 5, 6]
    assert "7 of 7 samples" in job("regen", "out", *range(7), code=0).out
    assert job("verify", "out", code=0)


def opened(path: Path) -> Image.Image:
    image = Image.open(path)
    return image.transpose(Image.Transpose.ROTATE_270) if path.suffix == ".jpg" else image


def test_a_picture_is_encoded_once(job: CommandLine, calls: dict[str, int]) -> None:
    table(job, *((f"change {i}", "a.png") for i in range(10)), ("another name", "copy.png"))
    (job.folder / "pics/copy.png").write_bytes((job.folder / "pics/a.png").read_bytes())
    flags = ["--set", "sampling.images_per_prompt=3", "--set", "sampling.num_inference_steps=1"]
    job.run(*flags, code=0)
    assert len(job.rows()) == 33
    assert calls == {"pictures": 1, "texts": 12}  # 11 instructions, and one negative prompt


def test_phases_give_the_same_pixels(job: CommandLine) -> None:
    (job.folder / "pics/cut.png").write_bytes((job.folder / "pics/a.png").read_bytes()[:-900])
    rows = [("red", "a.png", "more/b.png"), ("red", "a.png"), ("red", "cut.png"), ("red",)]
    table(job, *rows)
    job.run(code=3)
    job.run("--set", "model.offload=phase", "--output", "phases", code=3)
    assert hashes(job) == hashes(job, "phases")
    assert [row["status"] for row in job.rows("phases")] == ["ok", "ok", "failed", "ok"]


def test_a_changed_picture_is_noticed(job: CommandLine) -> None:
    pics = job.folder / "pics"
    table(job, ("red", "a.png", "more/b.png"), ("red", "a.png"), ("a lamp",))
    job.run("--count", 2, code=0)
    before = by_index(job)
    record = json.loads((job.folder / "out/job.json").read_text())
    assert record["fingerprint"]["takes_pictures"] is True
    picture(8, (80, 66)).save(pics / "more/b.png")
    ended = job.run(code=2)
    assert "pictures changed, and with it 1 of 2 samples" in ended.err
    assert "sample 0: picture: more/b.png: the file's content is another one\n" in ended.err
    ended = job("regen", "out", 0, 1, code=1)
    assert "sample 0: different" in ended.out and "sample 1: equal" in ended.out
    assert "\n  picture more/b.png of sample 0: sha256 was " in ended.out
    ended = job.run("--accept-changes", code=0)
    assert "1 to make again because of changed prompts or images" in ended.err
    after = by_index(job)
    assert after[0]["pixels_sha256"] != before[0]["pixels_sha256"]
    assert after[1] == before[1] and 2 in after
    assert "nothing to make" in job.run(code=0).err
    table(job, ("red", "more/b.png", "a.png"), ("red",), ("a lamp",))  # the order counts
    err = job.run(code=2).err
    assert "sample 0: picture: 'a.png, more/b.png' -> 'more/b.png, a.png'" in err
    assert "sample 1: picture: 'a.png' -> None" in err
    (pics / "a.png").unlink()
    table(job, ("red", "a.png", "more/b.png"), ("red", "a.png"), ("a lamp",))
    assert "sample 1: picture: a.png: no such file below" in job.run(code=2).err
    assert "sample 1: picture: a.png: no such file below" in job("regen", "out", 1, code=2).err


def test_what_images_are_for_depends_on_the_checkpoint(job: CommandLine, checkpoint: Path) -> None:
    table(job, ("red", "a.png", "more/b.png"), ("red", "a.png"))

    def planned(*flags: object) -> list[dict[str, Any]]:
        report = job("plan", "job.yaml", "--json", "--device", "h100", *flags, code=0)
        found: list[dict[str, Any]] = json.loads(report.out)["prompts"]
        return found

    edits = planned()
    assert [p["pictures"] for p in edits] == [["a.png", "more/b.png"], ["a.png"]]
    assert [p["init_image"] for p in edits] == [None, None]
    several, one = planned("--set", f"model.path={CHECKPOINT}")
    assert "a.png, more/b.png: 2 images, but the checkpoint takes none to edit" in several["error"]
    assert (one["init_image"], one["pictures"]) == ("a.png", [])
    # Where there is no checkpoint yet to say it, a plan goes by the number.
    several, one = planned("--set", "model.path=nowhere", "--set", "model.repo=some/model")
    assert several["pictures"] == ["a.png", "more/b.png"] and one["init_image"] == "a.png"
    # `strength` says nothing of edits.
    assert planned("--set", "sampling.strength=0") == edits
    said = job("diff", "job.yaml", "job.yaml", code=0).out
    assert "2 samples the same" in said


def test_a_worker_counts_the_pictures(job: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    table(job, ("red", "a.png"))
    asked: list[tuple[int, bool]] = []
    monkeypatch.setattr(
        "jobs.memory_needs.image_memory",
        lambda model, **work: asked.append((work["num_pictures"], work["from_image"])) or {},
    )
    for sets in (
        ["prompts.images_root=null", "prompts.options={image_column: null}"],
        ["prompts.options={image_column: image}"],
        [],
        [f"model.path={CHECKPOINT}", "prompts.options={image_column: image}"],
    ):
        config = load_job("job.yaml", sets=["output.uri=/shared/out", *sets])
        spec = WorkerSpec(config.model_dump_json(), str(job.folder / "x"), 1, "nonce")
        GenerationWorker(spec, "w0").memory_needed()
    assert asked == [(0, False), (1, False), (2, False), (0, True)]


def test_long_texts_leave_room_for_the_positions_of_pictures(checkpoint: Path) -> None:
    model = memory_model(checkpoint, {}, "float32", "none")
    few, many = (image_memory(model, height=64, width=64, num_pictures=n)["none"] for n in (0, 1))
    assert few < many


def test_the_shipped_job_edits_the_shipped_pictures(job: CommandLine, checkpoint: Path) -> None:
    small = ["--config", "configs/z-image-tiny-edit.yaml", "--set", f"model.path={checkpoint}"]
    report = json.loads(job("plan", "jobs/edit.yaml", *small, "--json", code=0).out)
    assert report["samples"] == 24
    first, *_ = report["prompts"]
    assert (first["prompt"], first["pictures"]) == ("make the background red", ["curls.png"])
    one = ["--set", "sampling.num_inference_steps=1", "--limit", 1, "--output", "o"]
    job("run", "jobs/edit.yaml", "--local", *small, *one, code=0)
    (row,) = job.rows("o-dry")
    assert (row["profile_image"], row["profile_images"]) == ("curls.png", "curls.png")


def test_an_own_generator_and_reserved_names(job: CommandLine) -> None:
    own = job.write_generator(
        "return Prompt('x', images=[['a.png'], ['a\\nb.png'], []][index],"
        " metadata=[{}, {}, {'images_sha256': 'b'}][index])"
    )
    (job.folder / "pics/a\nb.png").write_bytes((job.folder / "pics/a.png").read_bytes())
    flags = ["--set", f"prompts.generator={own}", "--count", 3]
    report = job("plan", "job.yaml", "--json", *flags, "--set",
                 "prompts={profiles: null, options: null}", code=0)  # fmt: skip
    first, lines, kept = json.loads(report.out)["prompts"]
    assert first["pictures"] == ["a.png"]
    assert "'a\\nb.png': allowed: a name of one line" in lines["error"]
    assert "metadata 'images_sha256' is 'b'; allowed: another name" in kept["error"]


def test_samples_batch_by_the_sizes_of_their_pictures() -> None:
    def sample(index: int, *sizes: tuple[int, int]) -> Sample:
        images = tuple(InputImage("a.png", str(index), size) for size in sizes)
        return Sample(index, index, "x", "", index, 64, 64, images=images, edits=True)

    square, wide = (100, 100), (2000, 1000)
    samples = [sample(0, square), sample(1), sample(2, square), sample(3, wide)]
    samples += [sample(4, square, wide), sample(5, (4000, 2000)), sample(6), sample(7, (101, 100))]
    batches = [[s.index for s in batch] for batch in plan_batches(samples, [9] * 8, 4)]
    # Both wide ones are brought to the area of the result, and then are of one size.
    assert batches == [[0, 2], [1, 6], [3, 5], [4], [7]]


def test_what_is_kept_is_bounded(checkpoint: Path, calls: dict[str, int]) -> None:
    pipeline = load(checkpoint)

    def ask(features: EditFeatures, seed: int) -> None:
        image = InputImage("a.png", str(seed), (70, 100))
        sample = Sample(0, 0, "x", "", 0, 48, 32, images=(image,), edits=True)
        prepared = prepare_picture(picture(seed), multiple=16)
        edits = features.texts([f"{seed}"], [sample])
        (edit,) = features.with_pictures(
            edits, [sample], BatchImages(pictures={(str(seed), (70, 100)): prepared})
        )
        assert [p.shape for p in edit.pictures] == [(16, 12, 8)] and len(edit.visual) == 1

    every = EditFeatures(pipeline, 64)
    for seed in (0, 1, 2, 0, 1, 2):
        ask(every, seed)
    assert calls == {"pictures": 3, "texts": 3}
    few = EditFeatures(pipeline, 64, max_bytes=every.num_bytes // 2)
    for seed in (0, 1, 2, 0):
        ask(few, seed)
        assert 0 < few.num_bytes <= every.num_bytes // 2
    ask(few, 0)
    assert calls == {"pictures": 7, "texts": 7}


def test_a_second_try_sees_the_picture_in_float32(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load(checkpoint, torch.bfloat16)
    picture(1).save(tmp_path / "a.png")
    given = []

    def denoise(self: Any, edits: Any, **options: Any) -> Any:
        for edit in (edits[0], options["negative_prompt_embeds"][0]):
            given.append((edit.text[0].dtype, edit.pictures[0], edit.visual[0]))
        return torch.full(self.latents_shape(1, 32, 48), float("nan"))

    monkeypatch.setattr(ZImagePipeline, "denoise", denoise)
    sampling = SamplingConfig(guidance_scale=2.0, **SIZE)
    stages = make_stages(pipeline, sampling, images_root=tmp_path, takes_pictures=True)
    images = find_images(tmp_path, ["a.png"])
    sample = Sample(0, 0, "make it red", "ugly", seed=0, images=images, edits=True, **SIZE)
    for _ in range(2):
        stages.make_in_float32(sample, stages.read([sample]))
    kinds = [(text, seen.dtype) for text, _, seen in given]
    assert kinds == ([(torch.bfloat16,) * 2] * 2 + [(torch.float32,) * 2] * 2) * 2
    wide = load(checkpoint, torch.bfloat16)
    assert wide.siglip is not None
    wide.vae.float()
    wide.siglip.float()
    (expected,) = wide.encode_pictures([picture(1)])
    (narrow,) = pipeline.encode_pictures([picture(1)])
    for i, (_, latents, seen) in enumerate(given):
        right = expected if i in (2, 3, 6, 7) else narrow
        assert torch.equal(latents, right.latents) and torch.equal(seen, right.visual)


def test_a_row_of_somebody_elses_making_is_told_apart() -> None:
    row = {"x_images": "a\nb", "x_images_sha256": "1"}
    assert EDITED.recorded(row, "x_") == (InputImage("a", "1"), InputImage("b", ""))
    assert EDITED.recorded({}, "x_") == ()
    assert EDITED.metadata(()) == {}


def test_hidden_orientation_is_no_other_picture(tmp_path: Path) -> None:
    """A PNG that is turned by data behind its pixels is planned by its header, and still edited."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture(1, (100, 70)).save(buffer, "PNG", exif=exif)
    content = buffer.getvalue()
    at = content.index(b"eXIf") - 4
    length = int.from_bytes(content[at : at + 4], "big") + 12
    late = content[:at] + content[at + length : -12] + content[at : at + length] + content[-12:]
    (tmp_path / "a.png").write_bytes(late)
    (image,) = find_images(tmp_path, ["a.png"])
    assert image.size == (100, 70)
    assert image.sizes(48 * 32).cropped == (96, 64)
