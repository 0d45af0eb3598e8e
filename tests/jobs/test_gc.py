"""`zimage gc`: what it lists and removes, and what it leaves alone."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from cli_calls import CommandLine
from job_runs import Job, kill_session, wait_for

DAY = 86400


@pytest.fixture
def made(zimage: CommandLine) -> CommandLine:
    """With an output `out` of 8 images in 2 shards."""
    zimage.run(code=0)
    return zimage


def leave(output: Path, name: str, *, age: float = 2 * DAY, content: bytes = b"x" * 100) -> Path:
    """A file that looks `age` seconds old."""
    file = output / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    then = time.time() - age
    os.utime(file, (then, then))
    return file


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_lists_and_removes_what_dead_attempts_left(made: CommandLine) -> None:
    output = made.folder / "out"
    before = tree(output)
    files = [
        leave(output, "images/00000000-aaaaaaaa/t_00000001.png"),
        leave(output, "images/00000000-aaaaaaaa/t_00000002.png#1"),
        leave(output, "images/00000001-bbbbbbbb/t_00000005.png"),
        leave(output, "manifest/00000001-r000-b0000-0000of0001-n00004-f00000.parquet#1"),
        leave(output, "events/000001-00000.jsonl#2"),
        leave(output, "job.json#1"),
        leave(output, "metadata.parquet#1"),
    ]
    files.append(leave(output, f"{made.rows()[0]['file_name']}#1"))  # beside a committed image
    os.utime(output / made.rows()[0]["file_name"], (0, 0))
    for row in made.rows():
        os.utime(output / row["file_name"], (0, 0))
    everything = tree(output)
    ended = made("gc", "out", code=0)
    assert "images/00000001-bbbbbbbb/t_00000005.png  100 B  uncommitted\n" in ended.out
    assert "job.json#1  100 B  staged\n" in ended.out
    assert ended.out.endswith("8 files, 800 B can go; --delete removes them\n")
    assert tree(output) == everything  # not so much as an event was written

    report = json.loads(made("gc", "out", "--delete", "--json", code=0).out)
    assert report["deleted"] and report["files"] == 8 and report["bytes"] == 800
    assert {f["file"] for f in report["leftovers"]} == {str(f.relative_to(output)) for f in files}
    after = tree(output)
    assert {k: v for k, v in after.items() if not k.startswith("events/")} == {
        k: v for k, v in before.items() if not k.startswith("events/")
    }
    assert not (output / "images/00000000-aaaaaaaa").exists()
    events = [json.loads(line) for line in (output / "events/000002-00000.jsonl").open()]
    assert [e["event"] for e in events] == ["epoch", "gc", "end", "heartbeat"]
    assert (events[1]["files"], events[1]["bytes"], events[2]["reason"]) == (8, 800, "done")
    assert "nothing to remove" in made("gc", "out", "--delete", code=0).out
    assert len(list((output / "events").iterdir())) == 2  # nothing to do takes no claim
    made("verify", "out", code=0)
    assert "nothing to make" in made.run(code=0).err


def test_young_attempts_are_left_unless_told_otherwise(made: CommandLine) -> None:
    output = made.folder / "out"
    leave(output, "images/00000000-aaaaaaaa/t_00000001.png")
    young = leave(output, "images/00000000-aaaaaaaa/t_00000002.png", age=DAY - 600)
    ended = made("gc", "out", "--delete", code=0)
    words = "left: 2 files (200 B) of attempts younger than 24 h 00 min (--min-age HOURS)"
    assert words in ended.out
    assert young.exists()  # and with it the older file of the same attempt
    assert "2 files, 200 B can go" in made("gc", "out", "--min-age", 23, code=0).out
    assert "removed 2 files, 200 B" in made("gc", "out", "--min-age", "0", "--delete", code=0).out
    assert not young.parent.exists()
    ended = made("gc", "out", "--min-age", "-1", code=2)
    assert "value '-1': allowed: a number of hours, 0 or more" in ended.err


def test_what_is_not_ours_and_links_are_left(made: CommandLine) -> None:
    output = made.folder / "out"
    theirs = made.folder / "theirs"
    victim = leave(theirs, "t_00000001.png")
    (output / "images/00000000-linklink").symlink_to(theirs)
    folder = output / "images/00000000-aaaaaaaa"
    leave(output, "images/00000000-aaaaaaaa/Thumbs.db")
    (folder / "t_00000002.png").symlink_to(victim)
    leave(output, "images/notes.txt")
    leave(output, "images/by hand/t_00000001.png")
    leave(output, "notes.txt#1")
    leave(output, "logs/notes.txt")
    before = tree(output)
    ended = made("gc", "out", "--delete", "--min-age", 0, code=0)
    assert "nothing to remove" in ended.out
    line = next(line for line in ended.out.splitlines() if line.startswith("not ours, left alone:"))
    for name in ("00000000-linklink", "notes.txt", "by hand", "aaaaaaaa/Thumbs.db"):
        assert f"images/{name}" in line or f"00000000-{name}" in line, line
    assert tree(output) == before and victim.exists()


def test_a_link_in_place_of_the_images_is_not_followed(made: CommandLine) -> None:
    output = made.folder / "out"
    (output / "images").rename(made.folder / "elsewhere")
    orphan = leave(made.folder, "elsewhere/00000000-aaaaaaaa/t_00000001.png")
    (output / "images").symlink_to(made.folder / "elsewhere")
    assert "not ours, left alone: images\n" in made("gc", "out", "--delete", code=0).out
    assert orphan.exists()


def test_superseded_images_go_only_when_asked_for(zimage: CommandLine) -> None:
    table = ["--set", "prompts.generator=table", "--set", "prompts.profiles=p.csv"]
    zimage.write("p.csv", "prompt\nA cat\nA dog\n")
    zimage.run(*table, "--count", 2, code=0)
    old = zimage.rows()[1]["file_name"]
    zimage.write("p.csv", "prompt\nA cat\nA cow\n")
    zimage.run(*table, "--count", 2, "--accept-changes", code=0)
    output = zimage.folder / "out"
    ended = zimage("gc", "out", "--delete", "--min-age", 0, code=0)
    assert "nothing to remove" in ended.out and "left: 1 image (" in ended.out
    assert "of rows that were made again since (--superseded)" in ended.out
    assert (output / old).exists()
    assert "removed 1 file" in zimage("gc", "out", "--superseded", "--delete", code=0).out
    assert not (output / old).exists()
    assert zimage("verify", "out", code=0).out.startswith("2 of 2 images as committed")


def test_a_manifest_that_lost_a_part_makes_no_leftovers(made: CommandLine) -> None:
    part = min((made.folder / "out/manifest").iterdir())
    content = part.read_bytes()
    part.unlink()
    ended = made("gc", "out", "--delete", "--min-age", 0, code=5)
    assert f"out/manifest/{part.name}: was committed and is gone; the images" in ended.err
    part.write_bytes(content[:-9])
    assert "damaged manifest part" in made("gc", "out", "--delete", "--min-age", 0, code=5).err
    part.unlink()
    made.run(code=0)
    assert "removed 4 files" in made("gc", "out", "--delete", "--min-age", 0, code=0).out
    made("verify", "out", code=0)


@pytest.mark.long
def test_refuses_while_a_driver_lives(zimage: CommandLine) -> None:
    body = "import time; time.sleep(0.2 if index else 0); return f'A cat, {index}'"
    flags = ["--local", "--set", f"prompts.generator={zimage.write_generator(body)}"]
    flags += ["--count", "600", "--set", "output.shard_size=2"]
    job = Job(zimage.folder / "job.yaml", zimage.folder / "out")
    driver = job.start(*flags)
    try:
        wait_for(lambda: list(job.output.glob("manifest/*.parquet")))
        for delete in ([], ["--delete"]):
            ended = zimage("gc", "out", *delete, "--min-age", 0, code=6)
            assert f"(pid {driver.pid}, epoch 1, " in ended.err
        driver.send_signal(signal.SIGKILL)
        driver.wait(30)
        ended = zimage("gc", "out", "--min-age", 0, code=0)  # a dead one is no hindrance
    finally:
        kill_session(driver)


def test_no_output(zimage: CommandLine) -> None:
    assert "nowhere: no such folder" in zimage("gc", "nowhere", code=2).err
    zimage.write("empty/notes.txt", "")
    assert "empty: has no job.json" in zimage("gc", "empty", code=2).err
