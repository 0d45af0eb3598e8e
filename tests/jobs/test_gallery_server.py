"""`zimage gallery --serve`: who gets an answer, to what, and what a page sees of a running job."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gallery_output import SHARD, commit, make_output
from job_runs import ROOT, wait_for

from jobs import gallery_live
from jobs.errors import InputError
from jobs.gallery_server import GalleryServer
from jobs.rejected import read_rejected
from jobs.storage import Storage


@dataclass
class Answer:
    status: int
    body: bytes
    headers: http.client.HTTPMessage

    def json(self) -> Any:
        assert self.status == 200, self.body
        return json.loads(self.body)


class Client:
    """Requests to a server, with whatever path and headers."""

    def __init__(self, server: GalleryServer) -> None:
        self.port = server.server_address[1]
        self.base = f"/{server.token}/"

    def __call__(
        self, path: str, method: str = "GET", body: object = None, **headers: str
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection._encode_request = lambda line: line.encode()  # type: ignore[attr-defined]
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            content = b"" if body is None else json.dumps(body).encode()
            given = {"Host": f"127.0.0.1:{self.port}", "Content-Type": "application/json"}
            given |= {"Content-Length": str(len(content))} if body is not None else {}
            for name, value in (
                given | {k.replace("_", "-"): v for k, v in headers.items()}
            ).items():
                connection.putheader(name, value)
            connection.endheaders(content)
            response = connection.getresponse()
            return Answer(response.status, response.read(), response.headers)
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self(self.base + path)

    def mark(self, **mark: object) -> Answer:
        return self(f"{self.base}rejected", "POST", {"note": "", "rejected": True} | mark)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An output of 150 samples in two shards, the first of which is made."""
    return make_output(str(tmp_path / "out"), SHARD + 50, made=SHARD)


@pytest.fixture
def client(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(gallery_live, "_FRESH", 0.0)
    with GalleryServer(storage.uri, tmp_path / "thumbnails", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Client(server)
        server.shutdown()
        thread.join()


def rows(answer: dict[str, Any]) -> list[dict[str, Any]]:
    columns = {
        name: column.get("values") or [column["of"][place] for place in column["at"]]
        for name, column in answer["rows"]["columns"].items()
    }
    return [{n: v[i] for n, v in columns.items()} for i in range(answer["rows"]["rows"])]


def test_new_rows_are_seen_once(client: Client, storage: Storage) -> None:
    first = client.get("rows?after=0").json()
    assert [row["index"] for row in rows(first)] == list(range(SHARD))
    assert (first["planned"], first["ok"], first["failed"]) == (150, 99, 1)
    assert (first["state"], first["more"], first["problem"]) == ("stopped", False, None)
    again = client.get(f"rows?after={first['after']}").json()
    assert rows(again) == [] and again["after"] == first["after"]
    commit(storage, SHARD, SHARD + 50)
    second = wait_for(lambda: rows(client.get(f"rows?after={first['after']}").json()))
    assert [row["index"] for row in second] == list(range(SHARD, SHARD + 50))
    after = client.get(f"rows?after={first['after']}").json()["after"]
    commit(storage, 0, 3, revision=1)
    remade = wait_for(lambda: rows(client.get(f"rows?after={after}").json()))
    assert [row["index"] for row in remade] == [0, 1, 2]
    assert remade[0]["pixels_sha256"] != rows(first)[0]["pixels_sha256"]
    everything = client.get("rows?after=0").json()
    assert sorted(row["index"] for row in rows(everything)) == list(range(SHARD + 50))


def test_many_rows_come_in_pieces(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery_live, "_ROWS_AT_ONCE", 40)
    after, found = 0, []
    for more in (True, True, False):
        answer = client.get(f"rows?after={after}").json()
        assert answer["more"] is more
        after = answer["after"]
        found += [row["index"] for row in rows(answer)]
    assert found == list(range(SHARD))


def test_a_problem_with_the_output_is_said_and_passes(client: Client, storage: Storage) -> None:
    assert storage.root is not None
    record = storage.root / "job.json"
    content = record.read_text()
    client.get("rows?after=0").json()
    record.write_text("{")
    assert "job.json: damaged" in wait_for(lambda: client.get("rows?after=0").json()["problem"])
    record.write_text(content)
    wait_for(lambda: client.get("rows?after=0").json()["problem"] is None)


def test_images_and_thumbnails_of_current_rows(
    client: Client, storage: Storage, tmp_path: Path
) -> None:
    row = rows(client.get("rows?after=0").json())[7]
    image = client.get(f"image/7?{row['pixels_sha256']}")
    assert (image.status, image.headers["Content-Type"]) == (200, "image/png")
    assert image.body == storage.get(row["file_name"])
    name = row["pixels_sha256"][:32]
    thumbnail = client.get(f"thumbnail/{name}")
    assert (thumbnail.status, thumbnail.headers["Content-Type"]) == (200, "image/webp")
    assert (tmp_path / f"thumbnails/{name}.webp").read_bytes() == thumbnail.body
    assert client.get(f"thumbnail/{name}").body == thumbnail.body
    for answer in (image, thumbnail, client.get("")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert storage.root is not None
    (storage.root / row["file_name"]).write_bytes(b"<script>alert(1)</script>")
    changed = client.get("image/7")
    assert changed.status == 404 and b"is not the file that was committed" in changed.body


def test_nothing_else_is_sent(client: Client) -> None:
    client.get("rows?after=0").json()
    for path in (
        "job.json",
        "../job.json",
        "image/../job.json",
        "image/%2e%2e/job.json",
        "image/96",  # a failed row
        "image/300",
        "image/-1",
        "image/²",
        "image/images/00000000-r0aaaaaa/faces_00000000.png",
        "thumbnail/../out/job.json",
        "thumbnail/" + "0" * 32,
        "thumbnail/",
        "rejected",
        "rejected.csv",
        "rows/../rows",
    ):
        answer = client(client.base + path)
        assert answer.status == 404 and answer.body == b"nothing is here\n", path


def test_who_gets_no_answer(client: Client) -> None:
    for path in ("/", "/rows", "/x/", f"/{client.base[1:-2]}/rows", "//", f"/{'é'}/"):
        answer = client(path)
        assert answer.status == 403 and b"the whole address" in answer.body
    for host in ("evil.example", f"evil.example:{client.port}", "", "127.0.0.1.evil.example"):
        assert client(client.base, Host=host).status == 421
    for host in (f"localhost:{client.port}", "127.0.0.1:9000", "[::1]:80"):
        assert client(client.base, Host=host).status == 200
    for origin in ("https://evil.example", "null"):
        assert client(client.base, Origin=origin).status == 403
    assert client(client.base, Origin=f"http://127.0.0.1:{client.port}").status == 200
    assert client.get("rows?after=x").status == 400
    for method in ("PUT", "DELETE", "OPTIONS"):
        assert client(client.base, method).status == 501


def test_marks_are_written_to_the_output(client: Client, storage: Storage) -> None:
    first = client.get("rows?after=0").json()
    assert first["marks"] == 0 and "rejected" not in first
    image = rows(first)[7]["pixels_sha256"]
    client.mark(index=7, pixels_sha256=image, note=" six fingers ").json()
    (mark,) = read_rejected(storage)
    assert (mark.index, mark.pixels_sha256, mark.note) == (7, image, "six fingers")
    seen = client.get(f"rows?after=0&marks={first['marks']}").json()
    assert seen["rejected"] == [[7, image, "six fingers"]]
    assert "rejected" not in client.get(f"rows?after=0&marks={seen['marks']}").json()
    client.mark(index=7, pixels_sha256=image, rejected=False).json()
    assert read_rejected(storage) == []


def test_marks_that_do_not_fit(client: Client, storage: Storage) -> None:
    image = rows(client.get("rows?after=0").json())[7]["pixels_sha256"]
    for mark, status, words in (
        ({"index": 8, "pixels_sha256": image}, 409, "sample 8: has another image by now"),
        ({"index": 96, "pixels_sha256": image}, 409, "sample 96: has another image"),
        ({"index": 10**18, "pixels_sha256": image}, 409, "has another image"),
        ({"index": True, "pixels_sha256": image}, 400, "index: True does not fit"),
        ({"index": -7, "pixels_sha256": image}, 400, "index: no number"),
        ({"index": 7, "pixels_sha256": None}, 400, "pixels_sha256: None does not fit"),
        ({"index": 7, "pixels_sha256": image, "note": "x" * 501}, 400, "up to 500 characters"),
        ({"index": 7, "pixels_sha256": image, "more": 1}, 400, "allowed: an object of index,"),
        ({"index": 7, "pixels_sha256": image, "note": "x" * 20_000}, 413, "allowed: up to 16384"),
    ):
        answer = client.mark(**mark)
        assert answer.status == status and words in answer.body.decode(), mark
    place = f"{client.base}rejected"
    good = {"index": 7, "pixels_sha256": image, "note": "", "rejected": True}
    assert client(place, "POST", good, Content_Type="text/plain").status == 404
    assert client(place, "POST", good, Origin="https://evil.example").status == 403
    assert client("/rejected", "POST", good).status == 403
    assert client(place, "POST", [1]).status == 400
    assert read_rejected(storage) == []


def test_a_port_that_is_taken(client: Client, storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--port: {client.port}: Address already in use; allowed"):
        GalleryServer(storage.uri, tmp_path / "thumbnails", client.port)


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_it_listens_on_loopback_until_a_signal(
    name: signal.Signals, storage: Storage, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", "gallery", "out", "--serve", "--port", "0"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell ignores SIGINT for what it starts in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"out: http://127\.0\.0\.1:(\d+)/[\w-]{24}/\n", line)
    assert found is not None, line
    with socket.create_connection(("127.0.0.1", int(found[1])), timeout=10):
        end = f":{int(found[1]):04X}"
        sockets = map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:])
        listening = {s[1] for s in sockets if s[3] == "0A" and s[1].endswith(end)}
        assert listening == {f"0100007F{end}"}
    process.send_signal(name)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 0 and error.endswith("ended\n") and "Traceback" not in error
