"""`zimage diff`: which samples a change of the job would redo, and that a run agrees."""

import json
import time
from pathlib import Path

import pytest
from cli_calls import CommandLine

JOB = """
name: t
model: {path: model}
prompts: {generator: table, profiles: p.csv}
sampling: {width: 32, height: 32, num_inference_steps: 1}
output: {uri: out, shard_size: 4}
"""


@pytest.fixture
def jobs(zimage: CommandLine) -> CommandLine:
    """With `a.yaml` over a table `p.csv` of 12 prompts."""
    zimage.write("a.yaml", JOB)
    write_table(zimage, "p.csv")
    return zimage


def write_table(command: CommandLine, name: str, number: int = 12, **changed: str) -> Path:
    prompts = [changed.get(f"p{i}", f"A cat of {2000 + i}") for i in range(number)]
    return command.write(name, "\n".join(["prompt", *prompts]) + "\n")


def compare(jobs: CommandLine, before: str, now: str) -> dict:
    return json.loads(jobs("diff", before, now, "--json", code=0).out)


def change(jobs: CommandLine, *replacements: tuple[str, str]) -> None:
    text = JOB
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    jobs.write("b.yaml", text)


def test_the_same_job(jobs: CommandLine) -> None:
    change(jobs, ("uri: out", "uri: elsewhere"))
    ended = jobs("diff", "a.yaml", "b.yaml", code=0)
    assert ended.out == "12 samples the same\n0 to make again, 0 to make for the first time\n"


def test_edited_rows_are_named_and_growth_is_told_from_change(jobs: CommandLine) -> None:
    write_table(jobs, "q.csv", 15, p3="A dog", p4="A cow")
    change(jobs, ("p.csv", "q.csv"))
    ended = jobs("diff", "a.yaml", "b.yaml", code=0)
    assert "sample 3: prompt: 'A cat of 2003' -> 'A dog'\n" in ended.out
    assert "2 of 12 samples changed (prompt 2): 3-4\n3 new: 12-14\n" in ended.out
    assert "2 to make again, 3 to make for the first time\n" in ended.out
    assert "in the same output zimage run makes them with --accept-changes" in ended.out
    ended = jobs("diff", "b.yaml", "a.yaml", code=0)
    assert "3 only in the first job: 12-14\n" in ended.out
    assert "in the same output zimage run refuses: fewer samples\n" in ended.out


def test_it_names_what_a_run_makes_again(zimage: CommandLine) -> None:
    table = ["--set", "prompts.generator=table", "--set", "prompts.profiles=p.csv"]
    write_table(zimage, "p.csv", 8)
    zimage.run(*table, code=0)
    text = (
        (zimage.folder / "job.yaml").read_text().replace("generator: avatars", "generator: table")
    )
    for letter in "pq":
        zimage.write(
            f"{letter}.yaml", text.replace("count: 8", f"count: 8, profiles: {letter}.csv")
        )
    write_table(zimage, "q.csv", 8, p1="A dog", p6="A cow")
    found = compare(zimage, "p.yaml", "q.yaml")
    before = {row["index"]: row["attempt"] for row in zimage.rows()}
    zimage("run", "q.yaml", "--local", "--accept-changes", code=0)
    again = [row["index"] for row in zimage.rows() if row["attempt"] != before[row["index"]]]
    assert found["changed"] == ",".join(map(str, again)) == "1,6"


CASES = {
    "seed": ([("steps: 1", "steps: 1, seed: 9")], "seed", ["sampling.seed"]),
    "size": ([("width: 32", "width: 48")], "width", ["sampling.width"]),
    "negative": (
        [("steps: 1", "steps: 1, negative_prompt: ugly")],
        "negative_prompt",
        ["sampling.negative_prompt"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_fields_of_samples(jobs: CommandLine, case: str) -> None:
    replacements, field, refused = CASES[case]
    change(jobs, *replacements)
    found = compare(jobs, "a.yaml", "b.yaml")
    assert (found["changed"], found["fields"]) == ("0-11", {field: 12})
    assert (found["every_image"], found["refused"]) == ([], refused)


def test_a_seed_that_a_row_brings_is_not_that_of_the_job(jobs: CommandLine) -> None:
    jobs.write("p.csv", "prompt,seed\nA cat,5\nA dog,\n")
    change(jobs, ("steps: 1", "steps: 1, seed: 9"))
    assert compare(jobs, "a.yaml", "b.yaml")["changed"] == "1"


def test_keys_of_every_image_and_of_every_file(jobs: CommandLine) -> None:
    change(
        jobs,
        ("steps: 1", "steps: 2, guidance_scale: 3.0"),
        ("name: t", "name: u"),
        ("uri: out", "uri: out, png_level: 9, embed_metadata: none"),
    )
    ended = jobs("diff", "a.yaml", "b.yaml", code=0)
    assert "every image: sampling.guidance_scale: 0.0 -> 3.0\n" in ended.out
    assert "every image: sampling.num_inference_steps: 1 -> 2\n" in ended.out
    assert "every file, not its pixels: name: 't' -> 'u'\n" in ended.out
    assert "every file, not its pixels: output.png_level: 1 -> 9\n" in ended.out
    assert "every file, not its pixels: output.embed_metadata: 'full' -> 'none'\n" in ended.out
    assert "12 to make again" in ended.out
    # without guidance its options have no say; a batch size that `auto` stands for is no change
    change(jobs, ("steps: 1", "steps: 1, cfg_truncation: 0.5, batch_size: 8"))
    assert compare(jobs, "a.yaml", "b.yaml")["every_image"] == []
    change(jobs, ("path: model", "path: other"))
    words = compare(jobs, "a.yaml", "b.yaml")["every_image"]
    assert len(words) == 1 and "taken for others since " in words[0]


def test_failing_prompts_and_long_ones(jobs: CommandLine) -> None:
    write_table(jobs, "p.csv", p0="A cat " + "and a dog " * 50 + "asleep")
    write_table(jobs, "q.csv", p0="A cat " + "and a dog " * 50 + "awake")
    change(jobs, ("p.csv", "q.csv"))
    ended = jobs("diff", "a.yaml", "b.yaml", code=0)
    both = [f"'...nd a dog and a dog and a dog {word}'" for word in ("asleep", "awake")]
    assert f"prompt: {both[0]} -> {both[1]}\n" in ended.out
    generator = jobs.write_generator("assert index != 1\n        return f'A cat of {2000 + index}'")
    change(jobs, ("table, profiles: p.csv", f"'{generator}', count: 12"))
    write_table(jobs, "p.csv")
    (sample,) = compare(jobs, "a.yaml", "b.yaml")["samples"]
    assert (
        sample["index"] == 1 and "error: 'fine' -> 'generate_prompt(1)" in sample["differences"][0]
    )


@pytest.mark.slow
def test_a_hundred_thousand_samples(jobs: CommandLine) -> None:
    write_table(jobs, "p.csv", 100_000)
    write_table(jobs, "q.csv", 100_000, **{f"p{i}": "A dog" for i in range(0, 100_000, 3)})
    change(jobs, ("p.csv", "q.csv"))
    started = time.monotonic()
    ended = jobs("diff", "a.yaml", "b.yaml", code=0)
    assert time.monotonic() - started < 25
    assert "33,334 of 100,000 samples changed (prompt 33,334): 0, 3, 6, " in ended.out
    assert len(ended.out) < 4000
