"""A table that names images to start from: made, refused, resumed; and one picture alone."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_calls import CommandLine
from PIL import Image

from jobs.input_images import InputImage, decode_image, find_images
from jobs.job_file import read_job
from jobs.plan import Sample, plan_batches
from jobs.submission import lost_on_the_way
from jobs.upload import collect
from jobs.worker import GenerationWorker
from jobs.writers import pixels_sha256
from zimage_core import generate, load_from_local_dir
from zimage_core.image_files import ImageFileError
from zimage_core.tiny.make import make_checkpoint

JOB = """
name: t
model: {path: CHECKPOINT, dtype: float32}
prompts: {generator: table, profiles: table.csv, images_root: pics, options: {image_column: photo}}
sampling: {width: 48, height: 32, num_inference_steps: 4, strength: 0.5, batch_size: 4}
output: {uri: out, shard_size: 8}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", layers=2)


@pytest.fixture
def job(zimage: CommandLine, checkpoint: Path) -> CommandLine:
    """The command line in a folder with a job, and a folder `pics` of three good images."""
    zimage.write("job.yaml", JOB.replace("CHECKPOINT", str(checkpoint)))
    pics = zimage.folder / "pics"
    (pics / "people").mkdir(parents=True)
    picture(1).save(pics / "a.png")
    picture(2, (90, 60)).save(pics / "people/b.jpg", quality=95)
    picture(3).save(pics / "c.png")
    return zimage


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(array.astype(np.uint8)).resize(size)


def table(job: CommandLine, *images: str) -> None:
    lines = [f"a cat {'' if i % 2 else 'and a dog'},{image}" for i, image in enumerate(images)]
    job.write("table.csv", "\n".join(["prompt,photo", *lines]) + "\n")


def by_index(job: CommandLine, output: str = "out") -> dict[int, dict]:
    return {row["index"]: row for row in job.rows(output)}


HOSTILE = {
    "gone.png": "gone.png: no such file below",
    "../secret.png": "../secret.png: allowed: a path relative to",
    "{folder}/pics/a.png": "pics/a.png: allowed: a path relative to",
    "out.png": "out.png: a link leads out of",
    "people": "people: a folder, pipe or device; allowed: a file",
    "notes.png": "notes.png: not an image, or damaged; allowed: PNG",
    "empty.png": "empty.png: the file is empty",
    "moving.gif": "moving.gif: GIF of more than one frame; allowed: a still image",
    "cut.png": "cut.png: damaged or cut off",
    "float.tif": "float.tif: image of mode 'F'; allowed: 8-bit grey",
    "bomb.png": "bomb.png: 9000 x 9000 pixels; allowed: at most 67,108,864",
}


def write_hostile(job: CommandLine) -> None:
    pics = job.folder / "pics"
    picture(9).save(job.folder / "secret.png")
    (pics / "out.png").symlink_to(job.folder / "secret.png")
    (pics / "notes.png").write_text("no picture")
    (pics / "empty.png").touch()
    picture(4).save(pics / "moving.gif", save_all=True, append_images=[picture(5)])
    (pics / "cut.png").write_bytes((pics / "a.png").read_bytes()[:-900])
    Image.new("F", (9, 9)).save(pics / "float.tif")
    Image.new("1", (9000, 9000)).save(pics / "bomb.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_job_with_good_and_hostile_images(job: CommandLine, checkpoint: Path) -> None:
    write_hostile(job)
    good = ["a.png", "people/b.jpg", "", "a.png", ""]
    bad = [name.format(folder=job.folder) for name in HOSTILE]
    names = [*good, *bad, "c.png"]
    table(job, *names)
    ended = job.run(code=3)
    assert "11 failed rows" in ended.err
    rows = by_index(job)
    assert len(rows) == len(names)

    for index, words in enumerate(HOSTILE.values(), start=len(good)):
        assert (rows[index]["status"], rows[index]["error_type"]) == ("failed", "prompt_error")
        assert words in rows[index]["error_message"]
    made = {index: row for index, row in rows.items() if row["status"] == "ok"}
    assert [names[i] for i in made] == ["a.png", "people/b.jpg", "", "a.png", "", "c.png"]
    for index, row in made.items():
        assert row["profile_init_image"] == (names[index] or None)
        assert bool(row["profile_init_image_sha256"]) == bool(names[index])
        assert len({bool(names[i]) for i in row["batch"]}) == 1, "text and image in one batch"
        assert row["batch_mode"] == "planned"
    assert rows[0]["profile_init_image_sha256"] == rows[3]["profile_init_image_sha256"]

    # what a worker makes is what `generate` makes of the same seed
    components = load_from_local_dir(checkpoint, device="cpu", dtype=torch.float32)
    for index, start in ((1, job.folder / "pics/people/b.jpg"), (2, None)):
        (expected,) = generate(
            **components,
            prompt=rows[index]["prompt"],
            image=None if start is None else Image.open(start),
            strength=0.5,
            height=32,
            width=48,
            num_inference_steps=4,
            generator=[torch.Generator().manual_seed(rows[index]["seed"])],
        )
        actual = np.asarray(Image.open(job.folder / "out" / rows[index]["file_name"]), int)
        assert np.abs(actual - np.asarray(expected, int)).max() <= 1


def test_a_changed_image_is_noticed(job: CommandLine) -> None:
    pics = job.folder / "pics"
    picture(3).save(pics / "c.bmp")
    table(job, "a.png", "people/b.jpg", "", "c.bmp")
    job.run(code=0)
    before = by_index(job)
    os.utime(pics / "a.png")
    assert "nothing to make" in job.run(code=0).err

    # the same time and size, other pixels
    status = (pics / "c.bmp").stat()
    picture(8).save(pics / "c.bmp")
    assert (pics / "c.bmp").stat().st_size == status.st_size
    os.utime(pics / "c.bmp", ns=(status.st_atime_ns, status.st_mtime_ns))
    ended = job.run(code=2)
    assert "starting images changed, and with it 1 of 4 samples" in ended.err
    assert "sample 3: starting image: c.bmp: the file's content is another one" in ended.err
    assert "--accept-changes" in ended.err
    assert "sample 3: starting image: c.bmp" in job("plan", "job.yaml", code=2).err

    ended = job.run("--accept-changes", code=0)
    assert "1 to make again because of changed prompts or images" in ended.err
    after = by_index(job)
    assert after[3]["pixels_sha256"] != before[3]["pixels_sha256"]
    assert after[3]["profile_init_image_sha256"] != before[3]["profile_init_image_sha256"]
    assert {i: after[i] for i in range(3)} == {i: before[i] for i in range(3)}
    assert "nothing to make" in job.run(code=0).err

    # an acceptance that was interrupted covers no further change of an image
    record = job.folder / "out/job.json"
    accepted = record.read_text()
    record.write_text(json.dumps(json.loads(accepted) | {"unaccepted": True}))
    kept = (pics / "c.bmp").read_bytes()
    picture(7).save(pics / "c.bmp")
    assert "sample 3: starting image: c.bmp" in job.run(code=2).err
    (pics / "c.bmp").write_bytes(kept)
    record.write_text(accepted)

    # another name for the same content makes no other image
    (pics / "people/b.jpg").rename(pics / "d.jpg")
    assert "sample 1: starting image: people/b.jpg: no such file" in job.run(code=2).err
    table(job, "a.png", "d.jpg", "", "c.bmp")
    assert "nothing to make" in job.run(code=0).err


def test_text_rows_that_get_an_image_are_named(job: CommandLine) -> None:
    table(job, "a.png", "c.png")
    text = ["--set", "prompts.options={image_column: null}"]
    job.run(*text, "--count", 1, code=0)
    ended = job.run("--count", 1, code=2)
    assert "prompts.options, starting images changed" in ended.err
    assert "sample 0: starting image: None -> 'a.png'" in ended.err
    ended = job.run("--accept-changes", code=0)
    assert [row["profile_init_image"] for row in job.rows()] == ["a.png", "c.png"]
    assert "sample 0: starting image: 'a.png' -> None" in job.run(*text, code=2).err


def test_a_mended_image_is_made_as_if_it_had_never_been_broken(
    job: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(job, "a.png", "people/b.jpg", "c.png")
    job.run(code=0)
    whole = (job.folder / "pics/c.png").read_bytes()
    (job.folder / "pics/c.png").write_bytes(whole[:-900])
    ended = job.run("--output", "other", code=3)
    assert "sample 2: prompt_error: c.png: damaged or cut off" in ended.err
    assert by_index(job, "other")[0]["batch"] == [0, 1]
    assert by_index(job, "other")[2]["prompt"] == "a cat and a dog"
    with monkeypatch.context() as patched:  # its neighbours are not made for nothing
        patched.setattr(GenerationWorker, "_generate", lambda *_: pytest.fail("made"))
        job.run("--output", "other", "--retry-failed", code=3)
    (job.folder / "pics/c.png").write_bytes(whole)
    job.run("--output", "other", code=3)  # failed rows stay until they are asked for
    job.run("--output", "other", "--retry-failed", code=0)
    mended, expected = by_index(job, "other")[2], by_index(job)[2]
    assert mended["batch"] == [0, 1, 2]
    assert mended["pixels_sha256"] == expected["pixels_sha256"]


def test_a_batch_of_images_that_all_fail(job: CommandLine) -> None:
    (job.folder / "pics/cut.png").write_bytes((job.folder / "pics/a.png").read_bytes()[:-900])
    table(job, "cut.png", "cut.png", "")
    job.run(code=3)
    assert [row["status"] for row in job.rows()] == ["failed", "failed", "ok"]


REFUSED = {
    "no root": (["prompts.images_root=null"], "images_root: null: the option image_column 'photo'"),
    "no folder": (["prompts.images_root=nope"], "--set: prompts.images_root: .*nope: no such fol"),
    "a file": (["prompts.images_root=table.csv"], "table.csv: no such folder"),
    "strength 0": (["sampling.strength=0"], "sampling.strength: strength: 0.0 must be above 0"),
    "no step": (["sampling.strength=1.0e-17"], "leaves no step of num_inference_steps 4 to run"),
    "strength 2": (["sampling.strength=2"], "sampling.strength: value 2: out of range"),
    "column": (
        ["prompts.options={image_column: foto}"],
        "column 'foto': no such column, but option image_column uses it",
    ),
    "no name": (
        ["prompts.options={image_column: 3}"],
        "option image_column must be the name of a column, got 3",
    ),
    "template": (
        ["prompts.generator=template", "prompts.options={template: x, image_column: foto}"],
        "column 'foto': no such column, but option image_column uses it",
    ),
    "template option": (
        ["prompts.generator=template", "prompts.options={template: x, image_column: ' '}"],
        "option image_column must be the name of a column, got ' '",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_made(job: CommandLine, case: str) -> None:
    table(job, "a.png")
    sets, words = REFUSED[case]
    flags = [part for assignment in sets for part in ("--set", assignment)]
    err = job.run(*flags, code=2).err
    assert all(word in err for word in words.split(".*")), err
    assert not (job.folder / "out").exists()


def test_cells_must_be_text(job: CommandLine) -> None:
    job.write("table.csv", "prompt,photo\nx,3\ny,4\n")
    err = job.run(code=2).err
    assert "table.csv, row 2, column 'photo': not text but of type int, got 3" in err


def test_a_template_starts_from_images(job: CommandLine) -> None:
    job.write("table.csv", "job,photo\nnurse,a.png\ncook,\n")
    options = "prompts.options={template: 'a {job}', image_column: photo}"
    report = job("plan", "job.yaml", "--json", "--set", "prompts.generator=template",
                 "--set", options, "--device", "h100", code=0)  # fmt: skip
    prompts = json.loads(report.out)["prompts"]
    assert [(p["prompt"], p["init_image"]) for p in prompts] == [
        ("a nurse", "a.png"),
        ("a cook", None),
    ]
    shown = job("plan", "job.yaml", "--set", "prompts.generator=template", "--set", options, code=0)
    assert "0  a nurse  from a.png\n" in shown.out
    assert shown.out.endswith("1  a cook\n")
    # half of the steps are run, and the encoder: less time than for text alone
    text = job("plan", "job.yaml", "--json", "--set", "prompts.options={}", "--set",
               "prompts.images_root=null", "--set", "prompts.generator=template", "--set",
               "prompts.options={template: x, image_column: null}", "--device", "h100",
               code=0)  # fmt: skip
    times = [json.loads(r.out)["time"]["seconds_per_image"] for r in (report, text)]
    assert 0 < times[0] < times[1]


OWN = {
    "several": (
        "return Prompt('x', images=['a.png', 'c.png'])",
        "a.png, c.png: 2 images, but the checkpoint takes none to edit; allowed: one to start",
    ),
    "kept name": (
        "return Prompt('x', images=['a.png'], metadata={'init_image': 'b'})",
        "metadata 'init_image' is 'b'; allowed: another name",
    ),
    "kept hash": (
        "return Prompt('x', metadata={'init_image_sha256': 'b'})",
        "metadata 'init_image_sha256' is 'b'; allowed: another name",
    ),
    "absolute": ("return Prompt('x', images=['/etc/hosts'])", "/etc/hosts: allowed: a path rel"),
}


@pytest.mark.parametrize("case", OWN)
def test_what_a_generator_of_your_own_may_say(job: CommandLine, case: str) -> None:
    body, words = OWN[case]
    own = ["--set", f"prompts.generator={job.write_generator(body)}", "--count", 1]
    own += ["--set", "prompts={profiles: null, options: null}"]
    report = job("plan", "job.yaml", "--json", *own, code=0)
    (prompt,) = json.loads(report.out)["prompts"]
    assert prompt["error"].startswith("generate_prompt(0): ")
    assert words in prompt["error"]
    report = job("plan", "job.yaml", "--json", *own, "--set", "prompts.images_root=null", code=0)
    if case in ("absolute", "kept name"):
        assert "the job has no prompts.images_root" in json.loads(report.out)["prompts"][0]["error"]


def test_samples_with_an_image_batch_among_themselves() -> None:
    image = InputImage("a.png", "0" * 64)
    samples = [
        Sample(i, i, "x", "", i, 16, 16, images=(image,) if i in (1, 2, 5) else ())
        for i in range(6)
    ]
    batches = plan_batches(samples, [10] * 6, 2)
    assert [[s.index for s in batch] for batch in batches] == [[0, 3], [1, 2], [4], [5]]


def test_a_file_is_hashed_again_only_where_it_changed(job: CommandLine) -> None:
    pics = job.folder / "pics"
    (first,) = find_images(pics, ("a.png",))
    assert find_images(pics, ("a.png",)) == (first,)
    assert decode_image(pics, first).size == (48, 32)
    shutil.copy(pics / "c.png", pics / "a.png")
    (second,) = find_images(pics, ("a.png",))
    assert second.sha256 != first.sha256
    with pytest.raises(ImageFileError, match=r"a\.png: changed while the job ran"):
        decode_image(pics, first)
    assert find_images(None, ()) == ()


def test_images_must_survive_the_trip_to_a_cluster(job: CommandLine, tmp_path: Path) -> None:
    table(job, "a.png")

    def lost(*sets: str) -> list[str]:
        config, layers = read_job("job.yaml", sets=["output.uri=/shared/out", *sets])
        return lost_on_the_way(config, layers, collect(Path.cwd()))

    assert lost() == []
    assert lost("prompts.images_root=/shared/pics") == []
    (line,) = lost("prompts.images_root=nope")
    assert line.startswith("--set: prompts.images_root: value 'nope': the cluster would not have")
    (job.folder / "output").mkdir()
    picture(1).save(job.folder / "output/a.png")
    assert "output/ and ckpts/ are left out" in lost("prompts.images_root=output")[0]
    (job.folder / "pics/.cache").symlink_to(job.folder / "output")  # hidden ones stay behind
    assert lost() == []
    (job.folder / "pics/more").symlink_to(job.folder / "output")
    (line,) = lost()
    assert line.startswith("job.yaml: prompts.images_root: value 'pics': the cluster would not")
    assert "pics/more is a link to a folder, which is not followed" in line


def test_one_picture_from_a_picture(job: CommandLine, checkpoint: Path) -> None:
    command = ["generate", "--model", checkpoint, "--prompt", "a cat", "--steps", 4]
    command += ["--width", 48, "--height", 32]
    start = ["--init-image", "pics/people/b.jpg"]
    assert "stretched" not in job(*command, *start, "-o", "one.png", code=0).err
    job(*command, *start, "--strength", 0.6, "-o", "two.png", code=0)
    job(*command, *start, "--strength", 1.0, "-o", "three.png", code=0)
    hashes = {
        name: pixels_sha256(np.asarray(Image.open(job.folder / f"{name}.png")))
        for name in ("one", "two", "three")
    }
    assert hashes["one"] == hashes["two"] != hashes["three"]
    wide = job(*command, "--init-image", "pics/a.png", "--width", 64, "-o", "four.png", code=0)
    assert "note: pics/a.png is 48x32 and is stretched to 64x32" in wide.err


PICTURE = {
    "no such file": (["--init-image", "x.png"], "--init-image: x.png: no such file"),
    "no image": (["--init-image", "job.yaml"], "--init-image: job.yaml: not an image, or damaged"),
    "strength alone": (["--strength", "0.5"], "--strength: 0.5: no --init-image is given"),
    "strength": (
        ["--init-image", "pics/a.png", "--strength", "1.5"],
        "--strength: 1.5 must be above 0 and at most 1",
    ),
    "text": (["--init-image", "pics/a.png", "--strength", "much"], "invalid float value: 'much'"),
    "edit": (
        ["--image", "pics/a.png", "--init-image", "pics/a.png"],
        "--image: pics/a.png: edited, and --init-image started from; allowed: one of the two",
    ),
}


@pytest.mark.parametrize("case", PICTURE)
def test_one_picture_is_refused(job: CommandLine, case: str) -> None:
    flags, words = PICTURE[case]
    known = ["generate", "--model", "nope", "--prompt", "a cat", "-o", "x.png"]
    assert words in job(*known, *flags, code=2).err
