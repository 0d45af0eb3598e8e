"""A real S3 server on loopback (moto's), and the environment that leads object stores to it."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

BUCKET = "zimage-bucket"
_CODE = (
    "import sys\n"
    "from moto.server import ThreadedMotoServer\n"
    "server = ThreadedMotoServer('127.0.0.1', 0, verbose=False)\n"
    "server.start()\n"
    "print(server.get_host_and_port()[1], flush=True)\n"
    "sys.stdin.read()\n"  # until the test's end of the pipe closes, however the test ends
)


@dataclass(frozen=True)
class S3Server:
    """Where the server listens. Its objects are gone when it stops."""

    port: int

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def make_bucket(self, name: str = BUCKET) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()


def s3_environment(port: int) -> dict[str, str]:
    """What a user sets for an S3 server of their own; `port` is a server's or a proxy's."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
    }


@contextmanager
def s3_server(bucket: str | None = BUCKET) -> Iterator[S3Server]:
    """Run a server in a process of its own, with one empty bucket."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"},
    )
    try:
        assert process.stdout is not None
        server = S3Server(int(process.stdout.readline()))
        if bucket is not None:
            _answers(server)
            server.make_bucket(bucket)
        yield server
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


def _answers(server: S3Server) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
