"""A TCP proxy that hurts what goes through it: latency, slices, a bandwidth, silence, resets at an exact byte.

with FaultProxy(("127.0.0.1", 6379)) as proxy:
    client = connect("127.0.0.1", proxy.port)
    proxy.faults = Faults(slice_bytes=1, latency_s=0.01)
    proxy.faults = Faults(reset_down=17)      # RST once 17 more bytes went from the server to clients
    proxy.faults = Faults(silent=True)        # nothing moves any more, and nothing is closed
    proxy.heal()
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Literal, TypeVar

Way = Literal["up", "down"]
_RESET = struct.pack("ii", 1, 0)
_CHUNK = 64 << 10
_PATIENCE_S = 0.2
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Faults:
    """What happens to the bytes of all connections. Up is from client to server."""

    latency_s: float = 0.0
    """Wait before each forwarded chunk."""
    slice_bytes: int = 0
    """Most bytes forwarded at once."""
    bandwidth: float = 0.0
    """Bytes per second each way of each connection."""
    reset_up: int | None = None
    """All connections are reset once so many bytes went up since these faults were set."""
    reset_down: int | None = None
    """All connections are reset once so many bytes went down since these faults were set."""
    silent: bool = False
    """Nothing is forwarded, nothing is closed; connections are still accepted by the system."""
    refuse: bool = False
    """New connections are reset at once."""


class _Pipe:
    """One client's connection and ours to the server."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.ended = 0
        """Directions in which everything was forwarded."""

    def reset(self) -> None:
        """End both with RST: what is under way is lost."""
        for sock in (self.client, self.server):
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                sock.shutdown(socket.SHUT_RD)  # wakes the thread that reads
            except OSError:
                pass  # closed before
            sock.close()


class FaultProxy:
    """Listens on a port of loopback and forwards to `upstream`. `faults` may be set at any time."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream = upstream
        self.accepted = 0
        """Connections accepted so far."""
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self._changed = threading.Condition()
        self._faults = Faults()
        self._moved: dict[Way, int] = {"up": 0, "down": 0}
        self._pipes: set[_Pipe] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False

    # -- for tests -------------------------------------------------------------------------------------------
    @property
    def faults(self) -> Faults:
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        with self._changed:
            self._faults = faults
            self._moved = {"up": 0, "down": 0}
            self._changed.notify_all()

    def heal(self) -> None:
        """No faults any more."""
        self.faults = Faults()

    def moved(self, way: Way) -> int:
        """Bytes forwarded that way since the faults were set last."""
        with self._changed:
            return self._moved[way]

    @property
    def open(self) -> int:
        """Connections open now."""
        with self._changed:
            return len(self._pipes)

    def reset_all(self) -> None:
        """Reset every connection now."""
        with self._changed:
            pipes, self._pipes = self._pipes, set()
        for pipe in pipes:
            pipe.reset()

    # -- life ------------------------------------------------------------------------------------------------
    def __enter__(self) -> FaultProxy:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset_all()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive(), "a proxy thread does not end"

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    # -- threads ---------------------------------------------------------------------------------------------
    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            try:
                if self._faults.refuse:
                    raise OSError("refused")
                server = socket.create_connection(self.upstream, 5.0)
            except OSError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                client.close()
                continue
            for sock in (client, server):
                sock.settimeout(_PATIENCE_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pipe = _Pipe(client, server)
            with self._changed:
                self._pipes.add(pipe)
                closed = self._closed
            if closed:
                self.reset_all()
                return
            self._start(self._pump, pipe, client, server, "up")
            self._start(self._pump, pipe, server, client, "down")

    def _pump(self, pipe: _Pipe, source: socket.socket, sink: socket.socket, way: Way) -> None:
        try:
            while data := self._patiently(pipe, lambda: source.recv(_CHUNK)):
                rest = memoryview(data)
                while rest:
                    count = self._admit(way, len(rest))
                    if count == 0:
                        self.reset_all()
                        return
                    sent, rest = rest[:count], rest[count:]
                    while sent:
                        sent = sent[self._patiently(pipe, lambda some=sent: sink.send(some)) :]
            sink.shutdown(socket.SHUT_WR)
            with self._changed:
                pipe.ended += 1
                if pipe.ended == 2:
                    self._pipes.discard(pipe)
                    pipe.client.close()
                    pipe.server.close()
        except OSError:
            # An end is gone: so is the other.
            with self._changed:
                self._pipes.discard(pipe)
            pipe.reset()

    def _patiently(self, pipe: _Pipe, move: Callable[[], _T]) -> _T:
        """Try until it works or the connection is given up: an end that takes nothing must not keep the thread."""
        while True:
            try:
                return move()
            except TimeoutError:
                if pipe not in self._pipes:
                    raise

    def _admit(self, way: Way, want: int) -> int:
        """How many bytes may go now, after waiting as the faults say; 0 when connections are to be reset."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._faults.silent)
            faults = self._faults
            count = min(want, faults.slice_bytes or want)
            pause = faults.latency_s + (count / faults.bandwidth if faults.bandwidth else 0.0)
            end = monotonic() + pause
            while pause and not self._closed and self._faults is faults and monotonic() < end:
                self._changed.wait(end - monotonic())
            if self._closed:
                return 0
            faults = self._faults
            limit = faults.reset_up if way == "up" else faults.reset_down
            if limit is not None:
                count = min(count, limit - self._moved[way])
            self._moved[way] += count
            return count
