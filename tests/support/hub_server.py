"""A local server that speaks as much of two model hubs as their client libraries use.

Hugging Face: `/api/models/REPO[/revision/R]`, `/REPO/resolve/R/FILE`, which leads large files on to
another path as the real one does. ModelScope: `/api/v1/models/REPO/repo/files`, `/repo`,
`/revisions`. A test says what goes wrong, and counts what was asked for and sent. What `hf upload`
sends to any repository is kept.
"""

import base64
import hashlib
import json
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

REPO = "Tongyi-MAI/Z-Image-Turbo"
COMMIT = "8" * 40
LARGE = 20_000  # bytes from which a file is stored by Git LFS
EXTRAS = {  # what repositories also hold, and loading does not read
    "README.md": b"# a model",
    "assets/showcase.jpg": b"j" * 50_000,
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"f" * 50_000,
    "text_encoder/generation_config.json": b"{}",
    "tokenizer/vocab.json": b"{}",
}


@dataclass
class Sent:
    """One request for a file and what went out."""

    path: str
    range: str | None
    token: str | None
    bytes: int = 0


@dataclass
class HubServer:
    """Serves the files of a folder as one repository.

    Attributes:
        files: content by path; what is listed is made of it when asked for.
        sent: requests for files, in order.
        listings: number of times the repository was listed.
        break_at: path to the number of bytes after which a connection is cut, and how often.
        hold_at: path to the number of bytes after which the answer waits for `release`.
        served: path to content that is sent in place of the listed one.
        statuses: path, or "" for the listing, to a status that is answered.
        error_codes: the same to an `X-Error-Code`.
        ranges: whether `Range` is heeded.
        patient: whether a refusal waits until an answer is held.
        uploads: content by `REPO/PATH` that was sent here.
        storage: where large files are led on to: a path, or another host with one.
    """

    files: dict[str, bytes]
    commits: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "master": COMMIT})
    sent: list[Sent] = field(default_factory=list)
    listings: int = 0
    break_at: dict[str, tuple[int, int]] = field(default_factory=dict)
    hold_at: dict[str, int] = field(default_factory=dict)
    served: dict[str, bytes] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    error_codes: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    patient: bool = False
    uploads: dict[str, bytes] = field(default_factory=dict)
    storage: str = "/storage"
    release: threading.Event = field(default_factory=threading.Event)
    held: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def environment(self) -> dict[str, str]:
        """What makes both client libraries talk to this server, and only to it."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "MODELSCOPE_ENDPOINT": self.url,
            "MODELSCOPE_DOWNLOAD_INTRA_CLOUD": "false",
            "NO_PROXY": "127.0.0.1",
        }

    def bytes_of(self, path: str) -> int:
        """Bytes of a file that went out, over all connections."""
        return sum(sent.bytes for sent in self.sent if sent.path == path)

    @property
    def paths(self) -> set[str]:
        """Files that were asked for."""
        return {sent.path for sent in self.sent}

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits.values() else self.commits.get(revision)

    def note(self, sent: Sent) -> Sent:
        with self._lock:
            self.sent.append(sent)
        return sent

    def breaks(self, path: str) -> int | None:
        """Where to cut this connection, if it is to be cut."""
        with self._lock:
            place, times = self.break_at.get(path, (0, 0))
            if not times:
                return None
            self.break_at[path] = (place, times - 1)
            return place


def serve(folder: Path, **options: Any) -> HubServer:
    """A server of a checkpoint folder, with files beside it that loading does not read."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    return HubServer(files | EXTRAS, **options)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file_or(head=True)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), {k: v[0] for k, v in parse_qs(url.query).items()}
        if path.startswith("/api/v1/models/"):
            self._modelscope(path.removeprefix("/api/v1/models/"), query)
        elif path.startswith("/api/models/"):
            self._huggingface(path.removeprefix("/api/models/"))
        else:
            self._file_or()

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).removeprefix("/api/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        repo = "/".join(path.split("/")[1:3])
        if path == "repos/create":
            asked = json.loads(body)
            self._json({"url": f"{self.hub.url}/{asked['organization']}/{asked['name']}"})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            answers = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in files
            ]
            self._json({"files": answers})
        elif "/commit/" in path:
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    value = entry["value"]
                    name = f"{repo}/{value['path']}"
                    self.hub.uploads[name] = base64.b64decode(value["content"])
            url = f"{self.hub.url}/{repo}/commit/{COMMIT}"
            self._json({"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:
            self._json({"error": f"no such path: {path}"}, 404)

    # Hugging Face

    def _huggingface(self, path: str) -> None:
        repo, _, revision = path.partition("/revision/")
        if self._refused(""):
            return
        if repo != REPO:
            self._json({"error": "Repository not found"}, 401, "RepoNotFound")
            return
        commit = self.hub.resolve(revision or "main")
        if commit is None:
            self._json({"error": "Invalid rev id"}, 404, "RevisionNotFound")
            return
        self.hub.listings += 1
        siblings = []
        for name, content in sorted(self.hub.files.items()):
            entry = {"rfilename": name, "size": len(content), "blobId": _git_sha1(content)}
            if len(content) >= LARGE:
                sha256 = hashlib.sha256(content).hexdigest()
                entry |= {
                    "blobId": _git_sha1(b"version https://git-lfs..."),
                    "lfs": {"size": len(content), "sha256": sha256, "pointerSize": 130},
                }
            siblings.append(entry)
        self._json({"id": repo, "modelId": repo, "sha": commit, "tags": [], "siblings": siblings})

    def _file_or(self, *, head: bool = False) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        if path.startswith("storage/"):
            self._send_file(path.removeprefix("storage/"), head=head)
            return
        repo, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repo != REPO or self.hub.resolve(revision) is None:
            self._json({"error": "Repository not found"}, 401, "RepoNotFound")
        elif self._refused(name):
            pass
        elif name not in self.hub.files:
            self._json({"error": "Entry not found"}, 404, "EntryNotFound")
        elif len(self.hub.files[name]) >= LARGE:
            self.send_response(302)
            self.send_header("Location", f"{self.hub.storage}/{quote(name)}")
            self.send_header("X-Repo-Commit", self.hub.resolve(revision) or "")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send_file(name, head=head)

    # ModelScope

    def _modelscope(self, path: str, query: dict[str, str]) -> None:
        for verb in ("/repo/files", "/repo", "/revisions"):
            if path.endswith(verb):
                repo = path.removesuffix(verb)
                break
        else:
            repo, verb = path, ""
        name = query.get("FilePath", "")
        if self._refused(name):
            return
        if repo != REPO:
            self._modelscope_json(None, 404, "record not found")
        elif verb == "/revisions":
            known = [{"Revision": name} for name in self.hub.commits if name != "main"]
            self._modelscope_json({"RevisionMap": {"Branches": known, "Tags": []}})
        elif verb == "/repo/files":
            self._modelscope_listing(query.get("Revision", "master"))
        elif verb == "/repo" and name in self.hub.files:
            self._send_file(name)
        else:
            self._modelscope_json(None, 404, "file not found")

    def _modelscope_listing(self, revision: str) -> None:
        self.hub.listings += 1
        commit = self.hub.resolve(revision)
        if commit is None or revision == "main":
            # a revision that does not exist is no error there
            self._modelscope_json({"Files": None, "LatestCommitter": None})
            return
        entries = [{"Path": "transformer", "Type": "tree", "Size": 0, "Revision": commit}]
        for number, (name, content) in enumerate(sorted(self.hub.files.items())):
            entries.append(
                {
                    "Path": name,
                    "Name": name.rpartition("/")[2],
                    "Type": "blob",
                    "Size": len(content),
                    "Sha256": hashlib.sha256(content).hexdigest(),
                    "IsLFS": len(content) >= LARGE,
                    "Revision": commit if number == 3 else "1" * 40,
                    "CommittedDate": 1_770_000_000 if number == 3 else 1_760_000_000,
                }
            )
        self._modelscope_json({"Files": entries})

    # both

    def _refused(self, name: str) -> bool:
        status = self.hub.statuses.get(name)
        if status is None:
            return False
        if self.hub.patient:
            self.hub.held.wait(60)
        self._json({"error": "no"}, status, self.hub.error_codes.get(name))
        return True

    def _send_file(self, name: str, *, head: bool = False) -> None:
        content = self.hub.served.get(name, self.hub.files.get(name, b""))
        wanted = self.headers.get("Range") if self.hub.ranges else None
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        sent = self.hub.note(
            Sent(name, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            last, size = len(content) - 1, len(content)
            self.send_header("Content-Range", f"bytes {start}-{last}/{size}")
        self.end_headers()
        if head:
            return
        cut, hold = self.hub.breaks(name), self.hub.hold_at.get(name)
        try:
            for place in range(start, len(content), 1000):
                if cut is not None and place >= cut:
                    self.close_connection = True
                    self.connection.close()
                    return
                if hold is not None and place >= hold and not self.hub.release.is_set():
                    self.wfile.flush()
                    self.hub.held.set()
                    self.hub.release.wait(60)
                piece = content[place : place + 1000]
                self.wfile.write(piece)
                sent.bytes += len(piece)
        except OSError:  # the client was killed
            self.close_connection = True

    def _modelscope_json(self, data: Any, status: int = 200, message: str = "success") -> None:
        self._json({"Code": status, "Data": data, "Message": message, "Success": status == 200})

    def _json(self, values: Any, status: int = 200, code: str | None = None) -> None:
        body = json.dumps(values).encode()
        if isinstance(values, dict) and values.get("Success") is False:
            status = values["Code"]
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body)


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
