"""A server that speaks just enough of the Redis protocol to lie in it."""

from __future__ import annotations

import socket
import threading
from types import TracebackType

_HANDSHAKE = (b"AUTH", b"CLIENT", b"SELECT", b"PING", b"HELLO")


class FakeRedis:
    """An empty database, as far as it answers truly. `answer`: what it says to every command instead."""

    def __init__(self) -> None:
        self.answer = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> FakeRedis:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        queued = 0
        with sock, sock.makefile("rb") as stream:
            try:
                while line := stream.readline():
                    words = []
                    for _ in range(int(line[1:])):
                        size = int(stream.readline()[1:])
                        words.append(stream.read(size + 2)[:-2])
                    verb = words[0].upper()
                    if self.answer and verb not in _HANDSHAKE:
                        sock.sendall(self.answer)
                    elif verb == b"MULTI":
                        queued = 0
                        sock.sendall(b"+OK\r\n")
                    elif verb == b"EXEC":
                        sock.sendall(b"*%d\r\n" % queued + b"$0\r\n\r\n" * queued)
                    elif verb == b"EXISTS":
                        sock.sendall(b":0\r\n")
                    elif verb == b"GET":
                        sock.sendall(b"$-1\r\n")
                    else:
                        queued += 1
                        sock.sendall(b"+OK\r\n")
            except (OSError, ValueError):
                return
