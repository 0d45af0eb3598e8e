"""`zimage status` of outputs in every state: at work, killed, half-written, not begun, not ours."""

import json
import shutil
import signal

import pytest
from cli_calls import CommandLine
from job_runs import Job, kill_session, wait_for

from jobs.epoch import Epoch
from jobs.storage import Storage

SLOW = "import time; time.sleep(0.2 if index else 0); return f'A cat, {index}'"


def report(command: CommandLine) -> dict:
    return json.loads(command("status", "out", "--json", code=0).out)


@pytest.mark.long
def test_at_work_killed_and_gone_on_with(zimage: CommandLine) -> None:
    flags = ["--local", "--set", f"prompts.generator={zimage.write_generator(SLOW)}"]
    flags += ["--count", "600", "--set", "output.shard_size=2"]
    job = Job(zimage.folder / "job.yaml", zimage.folder / "out")
    driver = job.start(*flags)
    try:
        wait_for(lambda: len(list(job.output.glob("manifest/*.parquet"))) > 1)
        found = report(zimage)
        assert (found["state"], found["planned"]) == ("running", 600)
        assert found["ok"] == 600 - found["left"] >= 4
        assert found["images_per_second"] > 0 and found["eta_seconds"] > 0
        assert found["driver"]["pid"] == driver.pid
        assert (found["driver"]["alive"], found["driver"]["ended"]) == (True, False)
        assert [worker["name"] for worker in found["workers"]] == ["local-0"]
        assert found["next"] is None
        driver.send_signal(signal.SIGKILL)
        driver.wait(30)
    finally:
        kill_session(driver)
    found = report(zimage)
    assert found["state"] == "stopped" and found["left"] > 0
    assert (found["driver"]["alive"], found["driver"]["ended"]) == (False, False)
    assert found["images_per_second"] is None and found["next"].startswith(
        f"zimage run {job.path} "
    )
    words = zimage("status", "out", code=0).out
    assert f"(pid {driver.pid}), dead, or its machine is, last seen " in words
    kept = found["ok"]
    rest = ["--local", "--count", "600", "--set", "output.shard_size=2"]
    fast = zimage.write_generator("return f'A cat, {index}'", module="quick")
    # another generator that says the same, as far as it was asked
    ended = zimage(
        *("run", "job.yaml", *rest, "--accept-changes", "--set", f"prompts.generator={fast}"),
        code=0,
    )
    assert f"{kept} images kept, {600 - kept} to make" in ended.err
    found = report(zimage)
    assert (found["state"], found["ok"], found["next"]) == ("complete", 600, None)
    assert found["driver"]["ended"]


def test_before_the_plan_is_written(zimage: CommandLine) -> None:
    storage = Storage(str(zimage.folder / "out"), create=True)
    assert (
        "out: has no job.json; allowed: the output of a job" in zimage("status", "out", code=2).err
    )
    epoch = Epoch.take(storage)
    try:
        words = zimage("status", "out", code=2).err
        assert "out: has no job.json yet: the driver on " in words
        assert "is starting; wait a moment" in words
    finally:
        epoch.close(reason="error")
    words = zimage("status", "out", code=2).err
    assert "ended before it had planned anything; run the job again" in words
    zimage.run(code=0)
    assert report(zimage)["state"] == "complete"


def test_only_a_plan(zimage: CommandLine) -> None:
    """The driver died after it had written job.json and before the first commit."""
    zimage.run(code=0)
    shutil.rmtree(zimage.folder / "out/manifest")
    shutil.rmtree(zimage.folder / "out/images")
    found = report(zimage)
    assert (found["state"], found["ok"], found["left"]) == ("stopped", 0, 8)
    assert found["shards"] == {"planned": 2, "complete": 0, "partly": 0}


@pytest.mark.parametrize("command", ["status", "verify", "gc"])
def test_job_file_that_is_gone_or_newer(zimage: CommandLine, command: str) -> None:
    zimage.run(code=0)
    file = zimage.folder / "out/job.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"schema_version": 2}))
    words = zimage(command, "out", code=5).err
    assert "out/job.json: schema_version 2; allowed: 1 (another version of this program" in words
    file.unlink()
    words = zimage(command, "out", code=2).err
    assert "out: holds 2 parts of a manifest, but its job.json is gone; put it back" in words
