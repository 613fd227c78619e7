"""The Redis protocol on a connection's own socket: no copy between the socket and the caller's buffers.

redis-py opens the connection (TLS, AUTH, SELECT, HELLO); from then on this module speaks RESP itself. Every send and
receive ends by the call's own deadline. After any failure the connection's state is unknown, so it must be closed.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

from lmcache_core.errors import BackendError, BackendUnavailable, NoSpace

Address = tuple[str, int]
"""Host and port; path and 0 for a unix socket."""

_BUFFER = 64 << 10
_SIP = 128
"""Bytes to read at once where a piece of an object may follow: what is read too much is copied."""
_IOV = 512
_TIMEVAL = struct.Struct("@ll")
_TICK_S = 0.004
"""The kernel ends a timed receive on a clock tick, up to this much late."""
_YES_OR_NO = {b":0", b":1"}
_MAX_ITEMS = 1 << 20
_MAX_DEPTH = 4


class ServerError(BackendError):
    """An error reply; `code` is its first word."""

    def __init__(self, text: str, where: str) -> None:
        self.code = text.split(" ", 1)[0]
        super().__init__(f"{where}: {text[:200]}")


class Moved(ServerError):
    """The cluster keeps this key on another node now."""


class ServerFull(NoSpace):
    """The server is at its `maxmemory` and may not evict."""


class Late(BackendUnavailable):
    """The call's time was over before the server answered."""


class Turns:
    """One call at a time for each server, in the order they came. A Redis server has one thread: calls side by side
    only take the client's processor from each other (measured on two cores: 2.5 GB/s by four threads, 3.3 in turn)."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queues: dict[Address, deque[object]] = {}
        """By server: who has the turn, then who waits."""

    @contextmanager
    def turn(self, server: Address, until: float) -> Iterator[None]:
        """Wait for the turn, at most until then, and have it. Raise `Late`."""
        me = object()
        with self._changed:
            queue = self._queues.setdefault(server, deque())
            queue.append(me)
            if not self._changed.wait_for(lambda: queue[0] is me, max(0.0, until - monotonic())):
                queue.remove(me)
                self._changed.notify_all()
                raise Late(f"{told(server)}: others are still writing to it")
        try:
            yield
        finally:
            with self._changed:
                queue.popleft()
                self._changed.notify_all()


class Lost(BackendUnavailable):
    """The connection broke, or what came over it was not the Redis protocol."""


class Push(list[Any]):
    """A message the server sent unasked (RESP3)."""


Reply = bytes | int | None | list[Any] | ServerError | ServerFull


def told(address: Address) -> str:
    """The server, in messages."""
    host, port = address
    return f"Redis at {host}:{port}" if port else f"Redis at {host}"


def command(*words: bytes) -> bytes:
    """One command."""
    return b"*%d\r\n%b" % (len(words), b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words))


class Link:
    """One connection. `until`: `monotonic()` time by which everything on it must have happened."""

    def __init__(self, connection: Any, address: Address) -> None:
        """`connection`: redis-py's, connected; it stays the owner of the socket."""
        self.address = address
        self.where = told(address)
        self.until = 0.0
        self.codes: set[str] = set()
        """Codes of the error replies seen since `begin`."""
        self._connection = connection
        self._sock: socket.socket = connection._sock
        self._tls = isinstance(self._sock, ssl.SSLSocket)
        if not self._tls:
            self._sock.settimeout(None)
        self._poll = select.poll()
        self._poll.register(self._sock, select.POLLOUT)
        self._readable = select.poll()
        self._readable.register(self._sock, select.POLLIN)
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._at = self._end = 0

    # -- life ------------------------------------------------------------------------------------------------
    def begin(self, until: float) -> None:
        """Start a call on this connection."""
        self.until = until
        self.codes.clear()

    @property
    def quiet(self) -> bool:
        """Whether nothing waits to be read: on an idle connection, anything means that it is dead or out of step."""
        return self._at == self._end and not self._readable.poll(0)

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def buffered(self) -> bool:
        """Whether bytes of the next reply were read already."""
        return self._at < self._end or (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending() > 0)

    def close(self) -> None:
        """Close the socket, without a word to the server."""
        try:
            self._connection.disconnect()
        except (OSError, ValueError):
            self._sock.close()

    def left(self) -> float:
        """Seconds left, above 0. Raise `Late`."""
        left = self.until - monotonic()
        if left <= 0:
            raise Late(f"{self.where}: no answer in time")
        return left

    # -- sending ---------------------------------------------------------------------------------------------
    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send all of `buffers`, in order."""
        try:
            if self._tls:
                for buffer in buffers:
                    self._sock.settimeout(self.left())
                    self._sock.sendall(buffer)
                return
            todo = list(buffers)
            at = 0
            while at < len(todo):
                try:
                    sent = self._sock.sendmsg(todo[at : at + _IOV], (), socket.MSG_DONTWAIT)
                except BlockingIOError:
                    self._poll.poll(self.left() * 1e3)
                    self.left()
                    continue
                while at < len(todo) and sent >= len(todo[at]):
                    sent -= len(todo[at])
                    at += 1
                if sent:
                    todo[at] = memoryview(todo[at])[sent:]
        except TimeoutError:
            raise Late(f"{self.where}: it takes no data") from None
        except (OSError, ValueError) as error:
            raise Lost(f"{self.where}: {error}") from error

    # -- receiving -------------------------------------------------------------------------------------------
    def _receive(self, view: memoryview, flags: int) -> int:
        """Some bytes into `view`, all of it with `MSG_WAITALL` unless time is over."""
        left = self.left()
        try:
            if self._tls:
                self._sock.settimeout(left)
                got = self._sock.recv_into(view)
            else:
                micros = max(1000, int((left - _TICK_S) * 1e6))
                timeout = _TIMEVAL.pack(*divmod(micros, 1_000_000))
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
                got = self._sock.recv_into(view, len(view), flags)
        except (BlockingIOError, TimeoutError):
            raise Late(f"{self.where}: no answer in time") from None
        except (OSError, ValueError) as error:
            raise Lost(f"{self.where}: {error}") from error
        if got == 0:
            raise Lost(f"{self.where}: it closed the connection")
        return got

    def _fill(self, most: int) -> None:
        """Read up to `most` more bytes into the buffer."""
        if self._at == self._end:
            self._at = self._end = 0
        elif self._at and self._end + most > _BUFFER:
            rest = self._end - self._at
            self._buffer[:rest] = self._buffer[self._at : self._end]
            self._at, self._end = 0, rest
        room = min(most, _BUFFER - self._end)
        if not room:
            raise Lost(f"{self.where}: a line of more than {_BUFFER} bytes")
        self._end += self._receive(self._view[self._end : self._end + room], 0)

    def _line(self, most: int) -> bytes:
        start = self._at
        while (end := self._buffer.find(b"\r\n", start, self._end)) < 0:
            known = self._end - self._at
            self._fill(most)
            start = max(self._at, self._at + known - 1)
        line = bytes(self._view[self._at : end])
        self._at = end + 2
        return line

    def integers(self, count: int) -> list[int | ServerError | ServerFull]:
        """The next `count` replies, each an integer or an error, where nothing else is outstanding."""
        found: list[bytes] = []
        while len(found) < count:
            end = self._buffer.rfind(b"\r\n", self._at, self._end)
            if end < 0:
                self._fill(_BUFFER)
                continue
            found += bytes(self._view[self._at : end]).split(b"\r\n")
            self._at = end + 2
        if len(found) > count:
            raise Lost(f"{self.where}: more replies than commands")
        if set(found) <= _YES_OR_NO:  # thousands at once, and hardly ever anything else
            return [line == b":1" for line in found]
        for line in found:
            if line[:1] not in b":-" or not line:
                raise self._garbled(line)
        return [self.error(line) if line[:1] == b"-" else self._integer(line) for line in found]

    def bulk(self) -> int | ServerError | ServerFull | None:
        """Length of the value that comes next: read it with `body`, then `end`. None for no value, or the error."""
        line = self._line(_SIP)
        if line[:1] == b"-":
            return self.error(line)
        if line[:1] != b"$":
            raise self._garbled(line)
        length = self._integer(line)
        return None if length < 0 else length

    def body(self, view: memoryview) -> None:
        """Fill `view` with the next bytes of a value."""
        have = min(self._end - self._at, len(view))
        view[:have] = self._view[self._at : self._at + have]
        self._at += have
        while have < len(view):
            have += self._receive(view[have:], socket.MSG_WAITALL)

    def skip(self, nbytes: int) -> None:
        """Read bytes of a value, and forget them."""
        while nbytes:
            if self._at == self._end:
                self._fill(min(nbytes, _BUFFER))
            some = min(nbytes, self._end - self._at)
            self._at += some
            nbytes -= some

    def end(self) -> None:
        """Read the end of a value."""
        while self._end - self._at < 2:
            self._fill(_SIP)
        if self._buffer[self._at : self._at + 2] != b"\r\n":
            raise self._garbled(bytes(self._view[self._at : self._at + 2]))
        self._at += 2

    def reply(self, depth: int = 0) -> Reply:
        """The next reply or message, whole; for small ones."""
        line = self._line(_BUFFER)
        kind = line[:1]
        if kind in b"+,(#" and kind:
            return line[1:]
        if kind == b"-":
            return self.error(line)
        if kind == b":":
            return self._integer(line)
        if kind == b"_":
            return None
        if kind in b"$=" and kind:
            length = self._integer(line)
            if length < 0:
                return None
            if length > _MAX_ITEMS:
                raise self._garbled(line)
            value = bytearray(length)
            self.body(memoryview(value))
            self.end()
            return bytes(value)
        if kind in b"*~>%" and kind:
            count = self._integer(line) * (2 if kind == b"%" else 1)
            if count < 0:
                return None
            if count > _MAX_ITEMS or depth == _MAX_DEPTH:
                raise self._garbled(line)
            items = [self.reply(depth + 1) for _ in range(count)]
            return Push(items) if kind == b">" else items
        raise self._garbled(line)

    def error(self, line: bytes) -> ServerError | ServerFull:
        """The error reply of this line."""
        text = line[1:].decode("utf-8", "replace")
        if text.startswith("OOM"):
            self.codes.add("OOM")
            return ServerFull(f"{self.where}: {text[:200]}")
        error = Moved(text, self.where) if text.startswith("MOVED ") else ServerError(text, self.where)
        self.codes.add(error.code)
        return error

    def _integer(self, line: bytes) -> int:
        try:
            return int(line[1:])
        except ValueError:
            raise self._garbled(line) from None

    def _garbled(self, line: bytes) -> Lost:
        return Lost(f"{self.where}: not the Redis protocol: {line[:40]!r}")
