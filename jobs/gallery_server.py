"""The gallery served on loopback: live while a job runs, and with a way to reject images.

Only this machine reaches it, and only with the address that the command prints: a random token is
its first part, so that neither another user of the machine nor a page of another site (whose
requests a browser may send here, under a name of its own too) gets an answer. What is sent is the
page, rows, thumbnails and the images that current rows name; no path of a request is ever opened.
"""

from __future__ import annotations

import json
import re
import secrets
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from jobs.errors import InputError, StorageError
from jobs.gallery_html import html_page, json_text
from jobs.gallery_live import LiveRows
from jobs.rejected import note_fault
from jobs.terminal import visible
from jobs.thumbnails import ImageProblemError, ThumbnailFolder, checked_image, make_thumbnail

_HOST = "127.0.0.1"
_HOSTS = ("127.0.0.1", "localhost", "[::1]")
_MAX_BODY = 16 * 1024
_SOCKET_SECONDS = 60.0
_MAKERS = 2  # thumbnails that are made at once
_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_HTML, _JSON = "text/html; charset=utf-8", "application/json"
_FOREVER = "private, max-age=31536000, immutable"


class GalleryServer(ThreadingHTTPServer):
    """Serves one output on loopback. Use as a context manager.

    Args:
        folder: for thumbnails.
        port: 0 for any that is free.

    Raises:
        InputError: there is no such output, or the port is taken.
        StorageError: the output cannot be read.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, uri: str, folder: Path, port: int) -> None:
        self.live = LiveRows(uri)
        self.thumbnails = ThumbnailFolder(folder)
        self.token = secrets.token_urlsafe(18)
        self.making = threading.Semaphore(_MAKERS)
        try:
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            raise InputError(
                f"--port: {port}: {error.strerror}; allowed: a free one, or 0 for any"
            ) from error

    @property
    def address(self) -> str:
        """What to open; only who knows it gets an answer."""
        return f"http://{_HOST}:{self.server_address[1]}/{self.token}/"

    def serve_until_interrupted(self) -> None:
        """Answer until Ctrl-C or SIGTERM."""
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            self.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong with a request, unless the browser just went away."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            print(visible(f"a request failed: {type(error).__name__}: {error}"), file=sys.stderr)


class _RefusedError(Exception):
    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: GalleryServer
    protocol_version = "HTTP/1.1"
    server_version = "zimage"
    sys_version = ""
    timeout = _SOCKET_SECONDS

    def do_GET(self) -> None:
        """Answer with the page or something of it."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Take a mark."""
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for what the user should see."""

    def _answer(self, method: Any) -> None:
        try:
            self._check_sender()
            body, kind, caching = method(*self._place())
        except _RefusedError as error:
            self._send(error.status, f"{error}\n".encode(), "text/plain; charset=utf-8")
            self.close_connection = True  # a body may not have been read
        except (StorageError, InputError, ImageProblemError) as error:
            status = 409 if isinstance(error, InputError) else 503
            status = 404 if isinstance(error, ImageProblemError) else status
            self._send(status, f"{visible(error)}\n".encode(), "text/plain; charset=utf-8")
        else:
            self._send(200, body, kind, caching)

    def _check_sender(self) -> None:
        """Refuse what comes by another name (DNS rebinding) or from another site's page."""
        host = self.headers.get("Host", "")
        if re.sub(r":\d+\Z", "", host).lower() not in _HOSTS:
            raise _RefusedError(421, "this address has another name here")
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise _RefusedError(403, "not from another site")

    def _place(self) -> tuple[str, dict[str, list[str]]]:
        """What is asked for, behind the token."""
        parts = urlsplit(self.path)
        token, slash, place = parts.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            raise _RefusedError(403, "open the whole address that zimage gallery printed")
        if not slash:
            raise _RefusedError(404, "the address ends with a slash")
        return place, parse_qs(parts.query)

    def _get(self, place: str, query: dict[str, list[str]]) -> tuple[bytes, str, str]:
        live = self.server.live
        kind, _, name = place.partition("/")
        if place == "":
            about = {**live.facts, "mode": "served", "thumbnails": None, "images": None}
            return html_page(about, {}).encode(), _HTML, "no-store"
        if place == "rows":
            answer = live.after(_number(query, "after"), _number(query, "marks"))
            return json_text(answer).encode(), _JSON, "no-store"
        if kind == "thumbnail":
            return self._thumbnail(f"{name}.webp"), _TYPES["webp"], _FOREVER
        if kind == "image" and name.isascii() and name.isdigit():
            row = live.row(int(name))
            if row is not None and row["status"] == "ok" and row["format"] in _TYPES:
                content = checked_image(live.output.storage, row)
                return content, _TYPES[row["format"]], "private, no-cache"
        raise _RefusedError(404, "nothing is here")

    def _thumbnail(self, name: str) -> bytes:
        row = self.server.live.row_of_thumbnail(name)
        if row is None:
            raise _RefusedError(404, "nothing is here")
        found = self.server.thumbnails.read(name)
        if found is not None:
            return found
        with self.server.making:
            made = make_thumbnail(checked_image(self.server.live.output.storage, row))
        self.server.thumbnails.write(name, made)
        return made

    def _post(self, place: str, query: dict[str, list[str]]) -> tuple[bytes, str, str]:
        if place != "rejected" or self.headers.get_content_type() != _JSON:
            raise _RefusedError(404, "nothing is here")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or int(length) > _MAX_BODY:
            raise _RefusedError(413, f"allowed: up to {_MAX_BODY} bytes")
        try:
            given = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _RefusedError(400, f"no JSON: {error}") from error
        kinds: dict[str, Any] = {
            "index": (int, str),
            "pixels_sha256": str,
            "note": str,
            "rejected": bool,
        }
        if not isinstance(given, dict) or given.keys() != kinds.keys():
            raise _RefusedError(400, f"allowed: an object of {', '.join(kinds)}")
        for key, kind in kinds.items():
            if not isinstance(given[key], kind) or (key == "index" and given[key] is True):
                raise _RefusedError(400, f"{key}: {given[key]!r:.80} does not fit")
        fault = note_fault(given["note"])
        index = str(given["index"])
        if fault is not None or not re.fullmatch(r"\d{1,19}", index, re.ASCII):
            raise _RefusedError(400, f"note: allowed: {fault}" if fault else "index: no number")
        self.server.live.mark(
            int(index), given["pixels_sha256"], given["note"].strip(), rejected=given["rejected"]
        )
        return b"{}", _JSON, "no-store"

    def _send(self, status: int, body: bytes, kind: str, caching: str = "no-store") -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", caching),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Content-Security-Policy", "frame-ancestors 'none'"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _number(query: dict[str, list[str]], name: str) -> int:
    text = query.get(name, ["0"])[0]
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise _RefusedError(400, f"{name}: allowed: a whole number")
    return int(text)
