"""Jobs with step caching: the key, what it pins, what repeats, and what users do wrong."""

import json

import pytest
from cli_calls import CHECKPOINT, CommandLine
from PIL import Image

from zimage_core.step_cache import computed_steps

CACHE = ("--set", "sampling.cache=2")
STEPS = 20


@pytest.fixture
def long_job(zimage: CommandLine) -> CommandLine:
    """With a schedule that leaves something to reuse, and guidance."""
    path = zimage.folder / "job.yaml"
    longer = f"num_inference_steps: {STEPS}, guidance_scale: 1.0"
    path.write_text(path.read_text().replace("num_inference_steps: 1", longer))
    return zimage


def hashes(zimage: CommandLine, output: str) -> list[str]:
    return [row["pixels_sha256"] for row in zimage.rows(output)]


@pytest.mark.long
def test_a_resume_and_regen_give_the_same_pixels(long_job: CommandLine) -> None:
    pairs = (*CACHE, "--set", "sampling.batch_size=2")
    long_job.run("--count", 1, "--output", "plain", code=0)
    long_job.run(*pairs, "--count", 3, "--output", "whole", code=0)
    long_job.run(*pairs, "--count", 2, code=0)
    assert_changes_are_refused(long_job)
    long_job.run(*pairs, "--count", 3, code=0)
    whole = hashes(long_job, "whole")
    assert len(set(whole)) == 3
    assert hashes(long_job, "out") == whole
    assert hashes(long_job, "plain") != whole[:1]
    ended = long_job("regen", "out", 1, code=0)
    assert "sample 1: equal, in a batch of 2" in ended.out


def assert_changes_are_refused(long_job: CommandLine) -> None:
    """In `out`, made with a cache, and in `plain`, whose record may be from before the key."""
    other = ("--set", "sampling.cache=3")
    for command in (["run", "job.yaml", "--local"], ["plan", "job.yaml"]):
        assert "sampling.cache: was 2, now 3" in long_job(*command, *other, code=2).err
    assert "sampling.cache: was 2, now None" in long_job.run(code=2).err
    path = long_job.folder / "plain" / "job.json"
    record = json.loads(path.read_text())
    assert record["job"]["sampling"].pop("cache") is None
    path.write_text(json.dumps(record))
    refused = long_job.run(*CACHE, "--count", 1, "--output", "plain", code=2).err
    assert "sampling.cache: was None, now 2" in refused
    assert "nothing to make" in long_job.run("--count", 1, "--output", "plain", code=0).err


def test_diff_tells_that_every_image_changes(long_job: CommandLine) -> None:
    (long_job.folder / "cached.yaml").write_text("extends: ./job.yaml\nsampling: {cache: 2}\n")
    out = long_job("diff", "job.yaml", "cached.yaml", code=0).out
    assert "every image: sampling.cache: None -> 2" in out


def test_plan_expects_the_forwards_that_are_run(long_job: CommandLine) -> None:
    def seconds(*flags: str) -> float:
        out = long_job("plan", "job.yaml", "--device", "h100", "--json", *flags, code=0).out
        found: float = json.loads(out)["time"]["seconds_per_image"]
        return found

    def steps(number: int) -> float:
        return seconds("--set", f"sampling.num_inference_steps={number}")

    computed = sum(computed_steps([True] * STEPS, 2))
    assert computed < STEPS
    assert seconds(*CACHE) == pytest.approx(steps(computed))
    assert seconds(*CACHE) < seconds() == pytest.approx(steps(STEPS))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("1", "value 1: out of range"),
        ("5", "value 5: out of range"),
        ("true", "value true: a boolean does not belong here"),
        ("2.5", "value 2.5: "),
        ("{threshold: 0.1}", "does not belong here"),
        ("'2'", "value '2': text does not belong here"),
    ],
)
def test_other_values_are_refused(long_job: CommandLine, value: str, words: str) -> None:
    error = long_job.run("--set", f"sampling.cache={value}", code=2).err
    assert "--set: sampling.cache: " in error and words in error
    allowed = (
        "allowed: null, or a whole number from 2 to 4 where sampling.num_inference_steps is 20"
    )
    assert allowed in error
    assert not (long_job.folder / "out").exists()


@pytest.mark.parametrize("command", ["run", "plan"])
def test_few_steps_are_refused(zimage: CommandLine, command: str) -> None:
    zimage.write(
        "turbo.yaml", "extends: ./job.yaml\nsampling: {num_inference_steps: 8, cache: 2}\n"
    )
    flags = ["--local"] if command == "run" else []
    error = zimage(command, "turbo.yaml", *flags, code=2).err
    words = "turbo.yaml: sampling.cache: value 2: without use for sampling.num_inference_steps 8"
    assert words in error
    assert "where sampling.num_inference_steps is 20 or more" in error


def test_a_strength_that_leaves_few_steps_is_refused(long_job: CommandLine) -> None:
    (long_job.folder / "images").mkdir()
    images = ("--set", "prompts.images_root=images", "--set", "sampling.strength=0.5")
    error = long_job.run(*CACHE, *images, code=2).err
    assert "--set: sampling.cache: cache: 2 for a run of 10 steps; allowed: None below 20" in error


def test_generate(zimage: CommandLine) -> None:
    make = ("generate", "--model", CHECKPOINT, "--prompt", "a red apple", "--width", 32)
    make = (*make, "--height", 32, "--steps", STEPS)
    zimage(*make, "-o", "plain.png", code=0)
    zimage(*make, "--cache", 2, "-o", "cached.png", code=0)
    pictures = [Image.open(zimage.folder / f"{name}.png") for name in ("plain", "cached")]
    assert pictures[0].size == pictures[1].size == (32, 32)
    assert pictures[0].tobytes() != pictures[1].tobytes()
    error = zimage(*make, "--cache", 9, "-o", "none.png", code=2).err
    assert "--cache: 9 must be None or one of 2, 3, 4" in error
    error = zimage(*make[:-1], 8, "--cache", 2, "-o", "none.png", code=2).err
    assert "--cache: 2 for a run of 8 steps; allowed: None below 20 steps" in error
    assert not (zimage.folder / "none.png").exists()
