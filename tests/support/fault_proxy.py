"""An HTTP proxy that stands before a storage server and does to its traffic what networks do.

Every request is put to a schedule, which names a fault or none:

    with s3_server() as server, FaultProxy(server.address, seeded(7, {Fault.DROP_AFTER: 0.1})) as p:
        environment = s3_environment(p.port)

and single requests can be picked out, to fail just those or to run code in the middle of them:

    p.once("PUT", r"events/000002-00000", Fault.DROP_AFTER)
    p.once("PUT", r"manifest/", before=take_over)

A schedule sees requests in the order of their arrival. With one client thread a seed therefore
gives the same history each time; with several, the same rates.
"""

import http.client
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import unquote


class Fault(StrEnum):
    """What can happen to a request."""

    UNAVAILABLE = "unavailable"  # 503, the server sees nothing
    THROTTLED = "throttled"  # 429, the server sees nothing
    FAIL_AFTER = "fail_after"  # the server does it, the answer is 500
    DROP_BEFORE = "drop_before"  # the connection breaks, the server sees nothing
    DROP_AFTER = "drop_after"  # the server does it, the connection breaks: a lost answer
    CUT = "cut"  # half of the answer's body, then the connection breaks
    DELAY = "delay"  # all is well, late
    LIE = "lie"  # 200 with no body, the server sees nothing; for writes


@dataclass(frozen=True)
class Request:
    """A request as schedules see it: `number` counts from 0 in the order of arrival."""

    number: int
    method: str
    path: str  # without the query, unquoted
    query: str
    bytes: int
    headers: Mapping[str, str]  # names in lower case

    @property
    def writes(self) -> bool:
        return self.method in ("PUT", "POST", "DELETE")


@dataclass(frozen=True)
class Seen:
    """An entry of the proxy's log."""

    request: Request
    fault: Fault | None
    status: int | None  # the server's, None where it saw nothing


# Without these a client does not take a scripted answer for an object.
_OBJECT_HEADERS = [("ETag", '"0"'), ("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")]

Schedule = Callable[[Request], Fault | None]


def seeded(
    seed: int, rates: Mapping[Fault, float], only: Callable[[Request], bool] = lambda _: True
) -> Schedule:
    """Each fault with its own probability, drawn for every request that `only` lets through."""
    draw = random.Random(seed)
    lock = threading.Lock()

    def schedule(request: Request) -> Fault | None:
        if not only(request):
            return None
        with lock:
            left = draw.random()
        for fault, rate in rates.items():
            left -= rate
            if left < 0:
                return fault
        return None

    return schedule


@dataclass
class _Rule:
    method: str
    pattern: re.Pattern[str]
    fault: Fault | None
    before: Callable[[], None] | None
    after: Callable[[], None] | None
    answer: tuple[int, bytes] | None
    left: int


class FaultProxy:
    """Listens on loopback while used as a context manager.

    Args:
        upstream: host and port of the real server.
        schedule: asked for each request that no rule of `once` takes.
        delay: seconds of `Fault.DELAY`.

    Writes go to the server one at a time: moto looks for an object and stores it in two steps,
    which two conditional writes at once could both pass. Real stores do that in one.
    """

    def __init__(
        self,
        upstream: tuple[str, int],
        schedule: Schedule = lambda _: None,
        *,
        delay: float = 0.5,
    ) -> None:
        self.schedule = schedule
        self.log: list[Seen] = []
        self._upstream = upstream
        self._delay = delay
        self._rules: list[_Rule] = []
        self._number = 0
        self._lock = threading.Lock()
        self._writes = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def once(
        self,
        method: str,
        pattern: str,
        fault: Fault | None = None,
        *,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
        answer: tuple[int, bytes] | None = None,
        times: int = 1,
    ) -> None:
        """Pick out the next `times` requests of a method whose path matches.

        Args:
            before: called before the server sees the request.
            after: called once the server has done it, before the client hears of it.
            answer: status and body, instead of the server's, which sees nothing.
        """
        rule = _Rule(method, re.compile(pattern), fault, before, after, answer, times)
        with self._lock:
            self._rules.append(rule)

    @property
    def faults(self) -> Counter[Fault]:
        """How often each fault has happened."""
        with self._lock:
            return Counter(seen.fault for seen in self.log if seen.fault is not None)

    def requests(self, method: str, pattern: str = "") -> list[Request]:
        """What has come in so far, in order."""
        with self._lock:
            found = [seen.request for seen in self.log]
        return [r for r in found if r.method == method and re.search(pattern, r.path)]

    def _admit(
        self, method: str, target: str, size: int, headers: Mapping[str, str]
    ) -> tuple[Request, _Rule]:
        path, _, query = target.partition("?")
        with self._lock:
            request = Request(self._number, method, unquote(path), query, size, headers)
            self._number += 1
            for rule in self._rules:
                if rule.left and rule.method == method and rule.pattern.search(request.path):
                    rule.left -= 1
                    return request, rule
        fault = self.schedule(request)
        return request, _Rule(method, re.compile(""), fault, None, None, None, 0)

    def _note(self, request: Request, fault: Fault | None, status: int | None) -> None:
        with self._lock:
            self.log.append(Seen(request, fault, status))

    def _forward(
        self, handler: BaseHTTPRequestHandler, request: Request, body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self._upstream, timeout=60)
        try:
            connection.putrequest(
                request.method, handler.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in handler.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.putheader("Connection", "close")
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError):  # clients break connections too
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet, or each answer waits for the client's ACK
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        proxy = self.owner
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:  # the client gave up, and the server never sees half a request
            self.close_connection = True
            return
        headers_in = {name.lower(): value for name, value in self.headers.items()}
        request, rule = proxy._admit(self.command, self.path, len(body), headers_in)
        fault = rule.fault
        if rule.before is not None:
            rule.before()
        if rule.answer is not None:
            proxy._note(request, fault, None)
            self._answer(rule.answer[0], _OBJECT_HEADERS, rule.answer[1])
            return
        if fault is Fault.DELAY:
            time.sleep(proxy._delay)
        if fault in (Fault.UNAVAILABLE, Fault.THROTTLED, Fault.DROP_BEFORE, Fault.LIE):
            proxy._note(request, fault, None)
            if fault is Fault.DROP_BEFORE:
                self._drop()
            elif fault is Fault.LIE:
                self._answer(200, [("ETag", '"0"')], b"")
            else:
                self._answer(503 if fault is Fault.UNAVAILABLE else 429, [], _error("SlowDown"))
            return
        if request.writes:
            with proxy._writes:
                status, headers, content = proxy._forward(self, request, body)
        else:
            status, headers, content = proxy._forward(self, request, body)
        proxy._note(request, fault, status)
        if rule.after is not None:
            rule.after()
        if fault is Fault.FAIL_AFTER:
            self._answer(500, [], _error("InternalError"))
        elif fault is Fault.DROP_AFTER:
            self._drop()
        else:
            self._answer(status, headers, content, cut=fault is Fault.CUT)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815 - names of http.server

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False
    ) -> None:
        length = str(len(content))
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() == "content-length":
                length = value  # of a HEAD, whose answer has no body
            elif name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if cut:
            self.wfile.write(content[: len(content) // 2])
            self._drop()
        elif self.command != "HEAD":
            self.wfile.write(content)

    def _drop(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        pass


def _error(code: str) -> bytes:
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f"<Error><Code>{code}</Code><Message>made by the proxy</Message></Error>"
    ).encode()
