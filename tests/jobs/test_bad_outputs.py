"""Outputs that a command must refuse: in the way, full, damaged, in use, or another job's."""

import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cli_calls import CHECKPOINT, CommandLine
from job_runs import Job, kill_session, wait_for
from safetensors.torch import load_file, save_file

TABLE = ["--set", "prompts.generator=table", "--set", "prompts.profiles=p.csv"]


@pytest.fixture
def made(zimage: CommandLine) -> CommandLine:
    """With an output `out` of 8 images."""
    zimage.run(code=0)
    return zimage


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def images(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("out/images/*/*.png")}


@pytest.mark.parametrize("output", ["file", "file/deep/out"])
def test_a_file_in_the_way(zimage: CommandLine, output: str) -> None:
    zimage.write("file", "not a folder")
    for command in (["run", "job.yaml", "--local"], ["plan", "job.yaml"]):
        ended = zimage(*command, "--output", output, code=5)
        words = f"output '{output}' cannot be opened: {zimage.folder / 'file'} is a file; allowed:"
        assert words in ended.err
    assert (zimage.folder / "file").read_text() == "not a folder"


def test_read_only_disk(zimage: CommandLine, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for command in (["run", "job.yaml", "--local"], ["plan", "job.yaml"]):
        ended = zimage(*command, "--output", small_disk / "out", code=5)
        assert str(small_disk) in ended.err
        assert "Read-only file system" in ended.err or "cannot be written" in ended.err


PINNED = {
    "name": "other",
    "sampling.num_inference_steps": 2,
    "sampling.seed": 7,
    "sampling.guidance_scale": 2.5,
    "sampling.width": 48,
    "sampling.images_per_prompt": 2,
    "sampling.max_sequence_length": 64,
    "model.dtype": "bfloat16",
    "output.shard_size": 8,
    "output.format": "jpeg",
    "run.threads_per_worker": 2,
    "prompts.start": 1,
}


def test_each_pinned_field_that_changed_is_named(made: CommandLine) -> None:
    before = images(made.folder)
    for key, value in PINNED.items():
        for command in (["run", "job.yaml", "--local"], ["plan", "job.yaml"]):
            ended = made(*command, "--set", f"{key}={value}", code=2)
            assert "out was made by another job; this one differs in\n" in ended.err
            named = [line for line in ended.err.splitlines() if line.startswith(f"  {key}: was ")]
            assert len(named) == 1 and named[0].endswith(f", now {value!r}"), ended.err
    sets = [part for key, value in PINNED.items() for part in ("--set", f"{key}={value}")]
    ended = made.run(*sets, code=2)
    assert all(f"  {key}: was " in ended.err for key in PINNED)  # all at once
    ended = made.run("--count", 4, code=2)
    assert "prompts.count: was 8, now 4 (it may grow, not shrink)" in ended.err
    assert images(made.folder) == before
    made.run(code=0)


def test_other_weights(made: CommandLine) -> None:
    shutil.copytree(CHECKPOINT, made.folder / "ckpt")
    file = made.folder / "ckpt/transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["x_pad_token"] += 1
    save_file(tensors, file)
    for flags in ([], ["--count", 12]):
        ended = made.run(*flags, "--set", "model.path=ckpt", code=2)
        assert "  model weights: was sha256:" in ended.err
        assert "Put the old weights back, or choose another --output." in ended.err
    assert len(images(made.folder)) == 8
    shutil.copytree(CHECKPOINT, made.folder / "moved")  # the same weights elsewhere are the same
    made.run("--count", 9, "--set", "model.path=moved", code=0)


def test_a_changed_profile_row_is_named_and_remade_alone(zimage: CommandLine) -> None:
    lines = ["prompt,mood", *[f"A cat of {year},calm" for year in range(2000, 2008)]]
    zimage.write("p.csv", "\n".join(lines))
    zimage.run(*TABLE, code=0)
    before, files = zimage.rows(), images(zimage.folder)
    lines[6] = "A dog of 2005,calm"
    zimage.write("p.csv", "\n".join(lines))
    ended = zimage.run(*TABLE, code=2)
    assert "out: the profile table's content changed, and with it 1 of 8 samples" in ended.err
    assert "  sample 5: prompt: 'A cat of 2005' -> 'A dog of 2005'\n" in ended.err
    assert "--accept-changes" in ended.err
    assert zimage.rows() == before and images(zimage.folder) == files

    ended = zimage.run(*TABLE, "--accept-changes", code=0)
    assert "7 images kept, 1 to make again because of changed prompts" in ended.err
    after = zimage.rows()
    assert after[:5] + after[6:] == before[:5] + before[6:]  # created_at and files too
    assert (after[5]["prompt"], after[5]["revision"]) == ("A dog of 2005", 1)
    assert after[5]["seed"] == before[5]["seed"]
    assert after[5]["pixels_sha256"] != before[5]["pixels_sha256"]
    assert all((zimage.folder / "out" / row["file_name"]).is_file() for row in before)
    assert "nothing to make" in zimage.run(*TABLE, code=0).err
    zimage("verify", "out", code=0)


# Outputs that somebody laid hands on.


def test_verify_finds_changed_missing_and_truncated_images(made: CommandLine) -> None:
    assert made("verify", "out", code=0).out == "8 of 8 images as committed\n"
    names = [made.folder / "out" / row["file_name"] for row in made.rows()]
    changed = bytearray(names[1].read_bytes())
    changed[-20] ^= 1
    names[1].write_bytes(changed)
    names[4].unlink()
    names[6].write_bytes(names[6].read_bytes()[:100])
    ended = made("verify", "out", code=1)
    assert "sample 1: images/" in ended.out and ": sha256 " in ended.out
    assert "t_00000004.png: the file is missing" in ended.out
    assert "t_00000006.png: 100 bytes, committed " in ended.out
    assert "5 of 8 images as committed" in ended.out
    report = json.loads(made("verify", "out", "--json", code=1).out)
    assert [d["index"] for d in report["differences"]] == [1, 4, 6]


DAMAGES = {
    "truncated": ('{"schema_version": 1,', "out/job.json: damaged: JSONDecodeError"),
    "emptied": ("{}", "out/job.json: damaged: KeyError: 'schema_version'"),
    "a list": ("[]", "out/job.json: damaged: TypeError"),
    "newer": ('{"schema_version": 99}', "out/job.json: schema_version 99; allowed: 1"),
    "not UTF-8": (b'{"a": "\xff"}', "out/job.json: damaged: UnicodeDecodeError"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_job_file_of_an_output(made: CommandLine, case: str) -> None:
    content, words = DAMAGES[case]
    record = made.folder / "out/job.json"
    record.write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in (["run", "job.yaml", "--local"], ["plan", "job.yaml"], ["status", "out"]):
        assert words in made(*command, code=5).err


def test_damaged_manifest_part(made: CommandLine) -> None:
    part = min((made.folder / "out/manifest").iterdir())
    content = part.read_bytes()
    part.write_bytes(content[:-10])
    (made.folder / "out/metadata.parquet").unlink()
    for command in (["run", "job.yaml", "--local"], ["verify", "out"]):
        ended = made(*command, code=5)
        assert f"out/manifest/{part.name}: damaged manifest part" in ended.err
        assert "delete it" in ended.err
    part.unlink()  # what the message says: its images are made again
    assert "4 images kept, 4 to make" in made.run(code=0).err
    made("verify", "out", code=0)


def test_foreign_files(made: CommandLine) -> None:
    made.write("theirs/manifest/data.parquet", "x")
    ended = made.run("--output", "theirs", code=2)
    assert "theirs: holds a manifest but no job.json; allowed: an empty folder" in ended.err
    made.write("out/events/notes.jsonl", "not ours")
    made.write("out/manifest/notes.txt", "not ours")
    made.run("--count", 9, code=0)
    made.write("out/manifest/copy.parquet", "x")
    ended = made.run("--count", 9, code=5)
    assert "out/manifest: 'copy.parquet' is not the name of a manifest part" in ended.err


def test_damaged_event_file(made: CommandLine) -> None:
    last = max((made.folder / "out/events").iterdir())
    last.write_bytes(last.read_bytes()[:-5])
    for command in (["run", "job.yaml", "--local", "--count", 9], ["status", "out"]):
        ended = made(*command, code=5)
        assert f"out/events/{last.name}: line " in ended.err and "is damaged" in ended.err


# What takes longer: other processes, and time limits.


@pytest.mark.parametrize("form", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "http://x:8265"])
def test_unreachable_cluster(
    zimage: CommandLine, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = form.format(port=port)
    monkeypatch.setenv("RAY_ADDRESS", address)
    started = time.monotonic()
    ended = zimage("run", "job.yaml", code=5)
    assert f"zimage run: RAY_ADDRESS: '{address}': " in ended.err
    assert time.monotonic() - started < 30
    zimage.run("--count", 1, code=0)  # the claim on the output was given back


@pytest.mark.long
def test_full_disk(zimage: CommandLine, small_disk: Path) -> None:
    output = small_disk / "out"
    flags = ["--local", "--output", output, "--count", 40]
    flags += ["--set", "sampling.width=64", "--set", "sampling.height=64"]
    (small_disk / "ballast").write_bytes(bytes(4 * 2**20 - 250_000))
    ended = zimage.process("run", "job.yaml", *flags, code=5)
    assert "No space left on device" in ended.err
    assert ended.err.splitlines()[-1].startswith(f"zimage run: {output}/")
    # nothing torn: what is committed is whole, and no image is half a file
    parts = list(output.glob("manifest/*.parquet"))
    kept = sum(pq.read_metadata(part).num_rows for part in parts)
    assert 0 < kept < 40
    zimage("verify", output, code=0)

    (small_disk / "ballast").unlink()
    ended = zimage.process("run", "job.yaml", *flags, code=0)
    assert f"{kept} images kept, {40 - kept} to make" in ended.err
    assert "40 of 40 images as committed\n" in zimage("verify", output, code=0).out


@pytest.mark.long
def test_second_driver(zimage: CommandLine) -> None:
    body = "import time; time.sleep(0.2 if index else 0); return f'A cat, {index}'"
    flags = ["--set", f"prompts.generator={zimage.write_generator(body)}", "--count", 600]
    command = ["run", "job.yaml", "--local", "--set", "output.shard_size=2", *flags]
    job = Job(zimage.folder / "job.yaml", zimage.folder / "out")
    first = job.start(*map(str, command[2:]))
    try:
        wait_for(lambda: list(job.output.glob("manifest/*.parquet")))
        ended = zimage(*command, code=6)
        host = socket.gethostname()
        assert f"out is in use by a driver on {host} (pid {first.pid}, epoch 1, " in ended.err
        assert "wait for it, or stop it, and run again" in ended.err
        assert "running" in zimage("status", "out", code=0).out
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) == 130
        assert "stopped" in zimage("status", "out", code=0).out
    finally:
        kill_session(first)
    assert len(zimage.rows()) < 600
