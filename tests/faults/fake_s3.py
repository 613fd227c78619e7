"""An S3 server in this process that misbehaves as told: the few verbs a tier uses, over a dict."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

HANG_S = 30.0


class FakeS3(ThreadingHTTPServer):
    """`objects` by path (`/bucket/key`). `faults`: verb (GET, HEAD, PUT, DELETE, LIST) -> what goes wrong with it."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, Fault] = {}
        self.asked: Counter[str] = Counter()
        self.hit: Counter[str] = Counter()
        """Verbs that met their fault."""
        self.lock = threading.Lock()
        self.released = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def recover(self) -> None:
        """Behave again, and let everything that hangs go on."""
        self.faults = {}
        self.released.set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what this is about."""


@contextmanager
def fake_s3() -> Iterator[FakeS3]:
    server = FakeS3()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="fake-s3")
    thread.start()
    try:
        yield server
    finally:
        server.recover()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeS3

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.key = unquote(url.path)
        query = parse_qs(url.query)
        verb = "LIST" if "list-type" in query else self.command
        self.body = self._read_body()
        self.server.asked[verb] += 1
        fault = self.server.faults.get(verb)
        if fault is not None:
            self.server.hit[verb] += 1
            fault(self)
        else:
            self.behave(verb, query)

    do_GET = do_HEAD = do_PUT = do_DELETE = answer  # the names http.server looks for

    def behave(self, verb: str, query: dict[str, list[str]] | None = None) -> None:
        """Do what was asked."""
        objects = self.server.objects
        if verb == "LIST":
            prefix = f"{self.key.rstrip('/')}/{(query or {}).get('prefix', [''])[0]}"
            with self.server.lock:
                found = sorted((path, len(body)) for path, body in objects.items() if path.startswith(prefix))
            self.reply(200, _listing(found).encode(), "application/xml")
        elif verb == "PUT":
            self.keep()
            self.reply(200, b"", etag=_etag(self.body))
        elif verb == "DELETE":
            with self.server.lock:
                objects.pop(self.key, None)
            self.reply(204)
        elif self.key not in objects:
            self.reply(404, b"<Error><Code>NoSuchKey</Code><Message>absent</Message></Error>", "application/xml")
        else:
            self.give(objects[self.key])

    def keep(self, body: bytes | None = None) -> None:
        with self.server.lock:
            self.server.objects[self.key] = self.body if body is None else body

    def give(self, body: bytes, etag: str | None = None) -> None:
        """An object, or the part of it that was asked for."""
        wanted = self.headers.get("Range")
        etag = etag or _etag(body)
        if wanted is None:
            self.reply(200, body, etag=etag)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        end = min(int(last or len(body) - 1), len(body) - 1)
        extra = {"Content-Range": f"bytes {first}-{end}/{len(body)}"}
        self.reply(206, body[int(first) : end + 1], etag=etag, extra=extra)

    def reply(
        self,
        status: int,
        body: bytes = b"",
        kind: str = "application/octet-stream",
        *,
        etag: str | None = None,
        extra: dict[str, str] | None = None,
        announced: int | None = None,
    ) -> None:
        """`announced`: another Content-Length than the body's."""
        self.send_response(status)
        headers = {"Last-Modified": "Sun, 22 Nov 2026 12:00:00 GMT", "Content-Type": kind, **(extra or {})}
        headers["Content-Length"] = str(len(body) if announced is None else announced)
        if etag:
            headers["ETag"] = etag
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hang_up(self) -> None:
        """End the connection with a reset."""
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _read_body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" in (self.headers.get("Content-Encoding") or ""):
            raise AssertionError("this server knows plain bodies only")
        return body


Fault = Callable[[_Handler], None]


def status(code: int, name: str) -> Fault:
    """An error reply as S3 gives it."""
    return lambda handler: handler.reply(
        code, f"<Error><Code>{name}</Code><Message>scripted</Message></Error>".encode(), "application/xml"
    )


def truncated(handler: _Handler) -> None:
    """200, and a body that is complete as far as HTTP can tell, but only the beginning of the object."""
    handler.give(handler.server.objects[handler.key][:-100])


def beginning_only(handler: _Handler) -> None:
    """200, and nothing but the header page."""
    handler.give(handler.server.objects[handler.key][:4096])


def empty(handler: _Handler) -> None:
    handler.reply(200, b"", etag='"0"')


def too_long(handler: _Handler) -> None:
    handler.give(handler.server.objects[handler.key] + bytes(1 << 20))


def flipped(handler: _Handler) -> None:
    body = bytearray(handler.server.objects[handler.key])
    body[-1] ^= 1
    handler.give(bytes(body))


def misdirected(handler: _Handler) -> None:
    """The object of another key."""
    others = (body for path, body in sorted(handler.server.objects.items()) if path != handler.key)
    handler.give(next(others))


def cut_off(handler: _Handler) -> None:
    """The connection is reset in the middle of the body."""
    body = handler.server.objects[handler.key]
    handler.reply(200, body[: len(body) // 2], announced=len(body), etag=_etag(body))
    handler.wfile.flush()
    handler.hang_up()


def wrong_etag(handler: _Handler) -> None:
    if handler.command == "PUT":
        handler.keep()
        handler.reply(200, etag='"00000000000000000000000000000000"')
    else:
        handler.give(handler.server.objects[handler.key], etag='"00000000000000000000000000000000"')


def hang(handler: _Handler) -> None:
    """No answer, until the server recovers; then none either."""
    handler.server.released.wait(HANG_S)
    handler.hang_up()


def hang_in_body(handler: _Handler) -> None:
    body = handler.server.objects[handler.key]
    handler.reply(200, body[:4096], announced=len(body), etag=_etag(body))
    handler.wfile.flush()
    hang(handler)


def trickle(handler: _Handler) -> None:
    """The body comes byte by byte: never silent, never done."""
    body = handler.server.objects[handler.key]
    handler.reply(200, announced=len(body), etag=_etag(body))
    with suppress(OSError):
        for at in range(len(body)):
            handler.wfile.write(body[at : at + 1])
            if handler.server.released.wait(0.02):
                break
    handler.hang_up()


def reset(handler: _Handler) -> None:
    handler.hang_up()


def garbage(handler: _Handler) -> None:
    handler.wfile.write(b"\x00\x01 this is no HTTP at all\r\n\r\n" * 4)
    handler.hang_up()


def success_lost(handler: _Handler) -> None:
    """The object is stored; the answer never arrives."""
    handler.keep()
    handler.hang_up()


def torn(handler: _Handler) -> None:
    """Half of the object is stored and the server says it is all."""
    handler.keep(handler.body[: len(handler.body) // 2])
    handler.reply(200, etag=_etag(handler.body))


def dropped(handler: _Handler) -> None:
    """Nothing is stored and the server says it is."""
    handler.reply(200, etag=_etag(handler.body))


def lagging(handler: _Handler) -> None:
    """What was written is not seen yet."""
    if handler.command == "GET" and "list-type" in handler.path:
        handler.reply(200, _listing([]).encode(), "application/xml")
    else:
        handler.reply(404, b"<Error><Code>NoSuchKey</Code><Message>absent</Message></Error>", "application/xml")


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'


def _listing(found: list[tuple[str, int]]) -> str:
    contents = "".join(
        f"<Contents><Key>{escape(path.split('/', 2)[2])}</Key><Size>{size}</Size><ETag>e</ETag>"
        "<LastModified>2026-11-22T12:00:00.000Z</LastModified></Contents>"
        for path, size in found
    )
    return (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>'
        f"<IsTruncated>false</IsTruncated><KeyCount>{len(found)}</KeyCount>{contents}</ListBucketResult>"
    )
