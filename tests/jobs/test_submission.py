"""Sending a job to a cluster: what is refused here, what is sent, and what comes back."""

import contextlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from loopback import free_port

from jobs import submission
from jobs.address import ADDRESS_VARIABLES, cluster_address
from jobs.errors import ClusterError, InputError
from jobs.job_file import JobFileError, read_job
from jobs.resources import bundle_root
from jobs.submission import connect, lost_on_the_way, submit
from jobs.upload import collect

BODY = (
    "name: a\nmodel: {path: tiny}\nprompts: {generator: avatars, profiles: data/p.csv}\n"
    "output: {uri: s3://bucket/a}\n"
)

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes below the working directory, which holds a whole job."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def write(name: str, text: str = "x") -> Path:
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    for name in ("data/p.csv", "tiny/model_index.json"):
        write(name)
    write("job.yaml", BODY)
    return write


def lost(path: Path | str = "job.yaml", **kwargs: Any) -> list[str]:
    config, layers = read_job(path, **kwargs)
    return lost_on_the_way(config, layers, collect(Path.cwd()))


# --- what would not survive the trip ------------------------------------------------------------


def test_a_job_that_is_uploaded_whole_is_fine(write: Write) -> None:
    write("base.yaml", "sampling: {seed: 1}\n")
    write("jobs/b.yaml", "extends: ../base.yaml\n" + BODY.replace("data/", "../data/"))
    write("over.yaml", "{}")
    overlays = [Path("over.yaml")]
    assert lost(overlays=overlays) == []
    assert lost("jobs/b.yaml", overlays=overlays, sets=["model.path=tiny"]) == []


def test_relative_output_is_refused_and_absolute_is_not(write: Write) -> None:
    (line,) = lost(flags={"output.uri": "output/a"})
    assert line.startswith("--output: output.uri: value 'output/a': relative to Ray's copy")
    assert lost(flags={"output.uri": "/shared/a"}) == []
    assert lost(flags={"output.uri": "gs://b/a"}) == []


def test_inputs_that_stay_behind_are_refused(write: Write, tmp_path: Path) -> None:
    (tmp_path / "p.csv").touch()
    (line,) = lost(sets=["prompts.profiles=../p.csv"])
    assert line.startswith("--set: prompts.profiles: value '../p.csv': the cluster would not have")
    assert "outside of the working directory" in line
    write("output/p.csv")
    (line,) = lost(sets=["prompts.profiles=output/p.csv"])
    assert "output/ and ckpts/ are left out" in line
    (line,) = lost(sets=["prompts.profiles=none.csv"])
    assert "it does not exist" in line
    assert lost(sets=[f"prompts.profiles={tmp_path}/p.csv"]) == []  # a shared file system
    assert lost(sets=["prompts.profiles=~/p.csv"]) == []


def test_weights_must_be_uploaded_or_fetched_or_absolute(write: Write) -> None:
    write("ckpts/m/w.safetensors")
    (line,) = lost(sets=["model.path=ckpts/m"])
    assert line.startswith("--set: model.path: value 'ckpts/m'")
    assert lost(sets=["model.path=ckpts/m", "model.repo=org/m"]) == []
    assert lost(sets=["model.path=/models/m"]) == []
    assert lost(sets=["model.path=tiny", "model.loras.x.path=none.safetensors"]) != []


def test_files_outside_are_refused_unless_absolute(write: Write, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "base.yaml").write_text("prompts: {images_root: pics}\n")
    outside = tmp_path / "shared" / "job.yaml"
    outside.write_text("extends: ./base.yaml\n" + BODY)
    assert lost(outside) == []  # and what it names in turn is there as well
    lines = lost(Path("../shared/job.yaml"))
    assert [line.split(":")[0] for line in lines] == [
        str(tmp_path / "shared" / "base.yaml"),
        str(outside),
    ]
    write("b.yaml", "extends: ../shared/base.yaml\n" + BODY)
    (line,) = lost("b.yaml")
    assert line.startswith(f"{tmp_path}/shared/base.yaml: the cluster would not have it")
    assert lost("job.yaml", overlays=[tmp_path / "shared" / "base.yaml"]) == []


def test_shipped_files_are_on_the_cluster_with_the_package(write: Write) -> None:
    assert lost("jobs/avatars.yaml", flags={"output.uri": "s3://b/a"}) == []
    write("c.yaml", "extends: z-image-tiny\n" + BODY.replace("model: {path: tiny}\n", ""))
    assert lost("c.yaml") == []


def test_submit_reports_all_that_is_lost_before_it_connects(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "connect", lambda _: pytest.fail("connected"))
    with pytest.raises(InputError) as caught:
        submit(
            "job.yaml",
            address="http://127.0.0.1:1",
            sets=["prompts.profiles=none.csv"],
            flags={"output.uri": "here"},
        )
    assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(JobFileError):
        submit("job.yaml", address="http://127.0.0.1:1", sets=["run.workers=0"])


# --- addresses ----------------------------------------------------------------------------------


def test_address_is_the_flags_then_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="give --address http://HEAD:8265 or set RAY_ADDRESS"):
        cluster_address(None)
    monkeypatch.setenv("RAY_ADDRESS", "http://one:8265/")
    assert cluster_address(None) == "http://one:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://two:8265")
    assert cluster_address(None) == "http://two:8265"
    assert cluster_address("http://three:1") == "http://three:1"


@pytest.mark.parametrize("form", ["http://127.0.0.1:{}", "127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_unreachable_cluster_is_an_error_that_names_it(form: str) -> None:
    address = form.format(free_port())
    started = time.monotonic()
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}: ") as caught:
        connect(address)
    assert caught.value.exit_code == 5
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("address", ["http://", "http://h:99999", "foo://127.0.0.1:{}"])
def test_nonsense_addresses_are_errors(address: str) -> None:
    with pytest.raises(ClusterError), socket.create_server(("127.0.0.1", 0)) as server:
        connect(address.format(server.getsockname()[1]))


def test_submission_ids_are_new_each_time() -> None:
    one, two = submission.submission_id("a.b"), submission.submission_id("a.b")
    assert one != two
    assert one.startswith("a.b-20")


# --- following ----------------------------------------------------------------------------------


class FakeClient:
    """A cluster whose log connection breaks once, and whose job ends as told."""

    def __init__(self, status: str, code: int | None, message: str = "") -> None:
        self.end = types.SimpleNamespace(
            status=submission.JobStatus(status), driver_exit_code=code, message=message
        )
        self.running = types.SimpleNamespace(status=submission.JobStatus.RUNNING)
        self.tails = iter([["one\n", "tw"], ["one\ntwo", "\nthree\n"]])
        self.left = 2

    async def tail_job_logs(self, submission_id: str) -> Any:
        self.left -= 1
        for text in next(self.tails):
            yield text
        if self.left:
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, submission_id: str) -> Any:
        return self.running if self.left else self.end


@pytest.mark.parametrize(
    ("status", "code", "message", "expected"),
    [
        ("SUCCEEDED", 0, "", 0),
        ("FAILED", 3, "", 3),
        ("FAILED", None, "Job entrypoint command failed with exit code 4, last logs", 4),
        ("STOPPED", None, "", 130),
    ],
)
def test_following_survives_a_broken_connection_and_returns_the_jobs_code(
    capsys: pytest.CaptureFixture[str],
    status: str,
    code: int | None,
    message: str,
    expected: int,
) -> None:
    client: Any = FakeClient(status, code, message)
    assert submission.follow_job(client, "http://c", "id") == expected
    assert capsys.readouterr().out.startswith("one\ntwo\nthree\n")


def test_a_job_that_the_cluster_lost_is_a_cluster_error() -> None:
    client: Any = FakeClient("FAILED", None, "The job supervisor actor died")
    with pytest.raises(ClusterError, match="supervisor actor died"):
        submission.follow_job(client, "http://c", "id")


def test_ctrl_c_ends_the_following_and_not_the_job(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client: Any = FakeClient("SUCCEEDED", 0)

    async def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submission, "_print_log", interrupted)
    assert submission.follow_job(client, "http://c", "id") == 130
    assert "the job goes on: ray job stop --address http://c id" in capsys.readouterr().out


# --- the script for `ray submit` ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["run", "{home}/ray_bootstrap_config.yaml"]),
        (["--limit", "8"], ["run", "{home}/ray_bootstrap_config.yaml", "--limit", "8"]),
        (["~/job.yaml", "--limit", "8"], ["run", "~/job.yaml", "--limit", "8"]),
    ],
)
def test_ray_submit_script_runs_the_clusters_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], expected: list[str]
) -> None:
    seen: list[tuple[list[str], str]] = []

    def fake_main(argv: list[str]) -> int:
        seen.append((argv, os.environ["RAY_ADDRESS"]))
        return 3

    monkeypatch.setitem(sys.modules, "jobs.cli", types.SimpleNamespace(main=fake_main))  # type: ignore[arg-type]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.delenv("RAY_ADDRESS")
    script = bundle_root() / "jobs" / "ray_submit.py"
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 3
    assert seen == [([part.format(home=tmp_path) for part in expected], "auto")]
    os.environ.pop("RAY_ADDRESS", None)


# --- a real cluster -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_head() -> Iterator[str]:
    """Start a Ray head on loopback with folders and ports of its own; return its address."""
    # Unix socket paths are limited to 107 bytes, so the folder's must be short.
    with tempfile.TemporaryDirectory(prefix="zr", dir="/tmp", ignore_cleanup_errors=True) as folder:
        dashboard = free_port()
        log = Path(folder) / "start.log"
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        for name in ADDRESS_VARIABLES:
            environment.pop(name, None)
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
            *(f"--port={free_port()}", f"--dashboard-port={dashboard}"),
            *(f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}/r"),
            *(f"--ray-client-server-port={free_port()}", "--num-cpus=2", "--num-gpus=0"),
            "--object-store-memory=100000000",
        ]
        with log.open("w") as output:
            head = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        address = f"http://127.0.0.1:{dashboard}"
        try:
            deadline = time.monotonic() + 90
            while True:
                try:
                    connect(address)
                    break
                except ClusterError:
                    assert head.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.5)
            yield address
        finally:
            # Never `ray stop`, which ends every Ray on the machine.
            family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=20)
            head.wait(timeout=20)


FAKE_CLI = textwrap.dedent(
    """
    import json, os, pathlib, signal, sys, time
    out = pathlib.Path(os.environ.get("OUT") or [a for a in sys.argv if a.startswith("/")][-1])
    (out / "seen.json").write_text(json.dumps({
        "argv": sys.argv[1:], "cwd": os.getcwd(), "ray": os.environ.get("RAY_ADDRESS"),
        "files": sorted(str(p) for p in pathlib.Path().rglob("*")
                        if p.is_file() and p.suffix != ".pyc"),
    }))
    print("first line of the job", flush=True)
    if "--limit" in sys.argv:
        def drain(*_):
            time.sleep(5)
            (out / "drained").touch()
            sys.exit(130)
        signal.signal(signal.SIGTERM, drain)
        (out / "ready").touch()
        time.sleep(100)
    print("last line of the job", flush=True)
    sys.exit(7)
    """
)


@pytest.fixture
def fake_project(write: Write, tmp_path: Path) -> Path:
    """A project whose own `jobs` package stands for ours on the cluster, so that no model loads."""
    write("jobs/__init__.py", "")
    write("jobs/__main__.py", FAKE_CLI)
    write("conf/job.yaml", BODY.replace("data/", "../data/").replace("tiny", "../tiny"))
    write("output/old.png")
    out = tmp_path / "out"
    out.mkdir()
    return out


@pytest.mark.ray
def test_submit_follows_a_real_cluster_and_returns_the_jobs_exit_code(
    ray_head: str,
    fake_project: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # --address must win over it
    code = submit(
        Path.cwd() / "conf" / "job.yaml",
        address=ray_head,
        follow=True,
        sets=["sampling.negative_prompt=a b; touch c"],
        flags={"output.uri": "s3://bucket/b", "prompts.count": 5, "prompts.start": None},
        arguments=["--log-to", str(fake_project)],
    )
    assert code == 7
    out = capfd.readouterr().out
    assert out.count("first line of the job") == 1
    assert out.count("last line of the job") == 1
    assert "submitted a-20" in out
    seen = json.loads((fake_project / "seen.json").read_text())
    assert seen["argv"] == [
        "run",
        "conf/job.yaml",
        "--set",
        "sampling.negative_prompt=a b; touch c",
        "--output=s3://bucket/b",
        "--count=5",
        "--log-to",
        str(fake_project),
    ]
    assert seen["files"] == [
        *("conf/job.yaml", "data/p.csv", "job.yaml", "jobs/__init__.py", "jobs/__main__.py"),
        "tiny/model_index.json",
    ]
    assert not seen["cwd"].startswith(str(Path.cwd()))
    assert seen["ray"]  # the job joins the cluster that runs it


@pytest.mark.long
@pytest.mark.ray
def test_stopping_a_job_leaves_it_time_to_drain(
    ray_head: str, fake_project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert submit("job.yaml", address=ray_head, arguments=["--limit", str(fake_project)]) == 0
    out = capfd.readouterr().out
    submitted = out.split("submitted ")[1].split(" ")[0]
    assert f"ray job stop --address {ray_head} {submitted}" in out
    deadline = time.monotonic() + 60
    while not (fake_project / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    client = connect(ray_head)
    client.stop_job(submitted)
    assert submission.follow_job(client, ray_head, submitted) == 130
    assert (fake_project / "drained").exists()  # Ray's own 3 s would have been too few


@pytest.mark.ray
def test_an_address_without_a_scheme_reaches_the_same_cluster(ray_head: str) -> None:
    assert connect(ray_head.removeprefix("http://")).get_version()


@pytest.mark.long
@pytest.mark.ray
def test_the_shipped_job_runs_from_an_uploaded_clone(
    ray_head: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(bundle_root())
    code = submit(
        "jobs/avatars.yaml",
        address=ray_head,
        follow=True,
        overlays=[Path("configs/z-image-tiny.yaml")],
        sets=["sampling.num_inference_steps=1", "run.workers=1"],
        flags={"output.uri": str(tmp_path / "out"), "prompts.count": 2},
    )
    assert code == 0, capfd.readouterr().out
    images = sorted(path.name for path in (tmp_path / "out").rglob("*.png"))
    assert images == ["avatars_00000000.png", "avatars_00000001.png"]
