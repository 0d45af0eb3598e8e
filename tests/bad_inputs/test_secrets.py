"""Credentials come from the environment and go nowhere: no file, no message, no log."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from bounds import Refuser
from cli_calls import CommandLine, Ended
from s3_server import BUCKET, S3Server, s3_environment, s3_server

from jobs.storage import Storage

CANARY = "canary7Qx"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}SecretKey",
    "AWS_SESSION_TOKEN": f"{CANARY}SessionToken",
    "HF_TOKEN": f"hf_{CANARY}",
    "MODELSCOPE_API_TOKEN": f"ms-{CANARY}",
    "AZURE_STORAGE_ACCOUNT_KEY": f"{CANARY}==",
    "RAY_AUTH_TOKEN": CANARY,
}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def with_secrets(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    for name, value in {**s3_environment(port), **SECRETS}.items():
        monkeypatch.setenv(name, value)


def check_silent(folder: Path, *ended: Ended, objects: Mapping[str, bytes] | None = None) -> None:
    """Assert that no secret is in what was printed, nor in any file."""
    for command in ended:
        assert CANARY not in command.out + command.err
    for name, content in (objects or {}).items():
        assert CANARY.encode() not in content + name.encode(), name
    for path in folder.rglob("*"):
        assert CANARY not in path.name
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path


def objects_of(prefix: str) -> dict[str, bytes]:
    storage = Storage(f"s3://{BUCKET}/{prefix}")
    return {path: storage.get(path) or b"" for path, _, _ in storage.list("")}


def test_a_job_on_an_object_store(
    refuse: Refuser, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_secrets(monkeypatch, server.port)
    zimage, uri = refuse.zimage, f"s3://{BUCKET}/made"
    body = "if index == 3: raise ValueError(f'no {index}')\n        return f'A cat, {index}'"
    generator = zimage.write_generator(body)
    flags = ["--output", uri, "--set", f"prompts.generator={generator}"]
    ran = zimage.run(*flags, code=3)
    told = [zimage(command, uri, code=0) for command in ("status", "verify", "gc")]
    told.append(zimage("export", uri, "tidy", code=0))
    told.append(zimage("plan", "job.yaml", *flags, code=0))
    objects = objects_of("made")
    assert {"job.json", "metadata.parquet"} < objects.keys()
    assert any(name.startswith("events/") for name in objects)
    assert any(name.startswith("images/") for name in objects)
    check_silent(refuse.folder, ran, *told, objects=objects)


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_on_ray(refuse: Refuser, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with_secrets(monkeypatch, server.port)
    uri = f"s3://{BUCKET}/ray"
    ran = refuse.zimage.process("run", "job.yaml", "--workers", 2, "--output", uri, code=0)
    objects = objects_of("ray")
    assert any(name.startswith("logs/") for name in objects)
    check_silent(refuse.folder, ran, objects=objects)


class _Reflecting(BaseHTTPRequestHandler):
    """Refuses everything, and repeats in its answer all that it was told, as some stores do."""

    def _refuse(self) -> None:
        told = "".join(f"<{name}>{value}</{name}>" for name, value in self.headers.items())
        secrets = "".join(f"<Token-0>{value}</Token-0>" for value in SECRETS.values())
        body = (
            "<?xml version='1.0'?><Error><Code>InvalidToken</Code><Message>The provided token is "
            f"malformed.</Message>{told}{secrets}</Error>"
        ).encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self._refuse
        raise AttributeError(name)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def reflecting_server() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Reflecting)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_store_that_repeats_what_it_was_told(
    refuse: Refuser, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reflecting_server() as port:
        with_secrets(monkeypatch, port)
        commands = (
            ["run", "job.yaml", "--local", "--output", f"s3://{BUCKET}/x"],
            ["plan", "job.yaml", "--output", f"s3://{BUCKET}/x"],
            ["status", f"s3://{BUCKET}/x"],
        )
        ended = [refuse(*command, code=5, words=["refused (403"]) for command in commands]
    check_silent(refuse.folder, *ended)


def test_stores_that_fail(
    refuse: Refuser, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_secrets(monkeypatch, server.port)
    run = ["run", "job.yaml", "--local", "--output"]
    missing = refuse(*run, "s3://no-such-bucket/x", code=5, words=["no bucket 'no-such-bucket'"])
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    plain = refuse(*run, f"s3://{BUCKET}/x", code=5, words=["set AWS_ALLOW_HTTP=true"])
    check_silent(refuse.folder, missing, plain)


ADDRESSES = [
    f"s3://AKIA:{CANARY}@bucket/x",
    f"s3://{CANARY}@bucket/x",
    f"az://container/x?sv=1&sig={CANARY}",
    f"s3://bucket/x?X-Amz-Security-Token={CANARY}",
]


@pytest.mark.parametrize("uri", ADDRESSES)
def test_credentials_in_an_address_are_refused(refuse: Refuser, uri: str) -> None:
    words = "holds credentials, which belong into the environment; allowed: a path, s3://BUCKET"
    for command in (["run", "job.yaml", "--local"], ["plan", "job.yaml"]):
        ended = refuse(*command, "--output", uri, code=2, words=["output.uri: value ", words])
        check_silent(refuse.folder, ended)


@pytest.mark.slow  # it is tried again for a while
def test_a_hub_that_cannot_be_reached(refuse: Refuser, monkeypatch: pytest.MonkeyPatch) -> None:
    zimage: CommandLine = refuse.zimage
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert "HF_TOKEN" in os.environ
    ended = zimage.process("weights", "download", "owner/name", "ckpt", code=5)
    assert "owner/name" in ended.err
    check_silent(refuse.folder, ended)
