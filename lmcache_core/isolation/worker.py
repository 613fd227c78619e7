"""The I/O worker: one storage backend in a plain process, served over a few sockets.

Started by `IsolatedStorage` as `python -m lmcache_core.isolation.worker MEMORY ROOM SOCKET...` with descriptors of
shared memory and of one socket for each call that may run at a time. Every socket has a thread and a place of ROOM
bytes in the memory. The worker ends when a socket closes, which is also what happens when the engine dies.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from time import monotonic_ns
from typing import Any

from lmcache_core.errors import BackendError
from lmcache_core.isolation import wire
from lmcache_core.isolation.wire import Message
from lmcache_core.plugins import Plugins
from lmcache_core.protocols import BuildContext, StorageBackend
from lmcache_core.types import ChunkKey

_SCAN_BATCH = 4096
_CLOSE_S = 2.0
_PLUGIN_ERRORS = (Exception, SystemExit)


class Desk:
    """One socket, its place in memory and the calls that come through it."""

    def __init__(self, backend: StorageBackend, sock: socket.socket, place: memoryview) -> None:
        self._backend = backend
        self._sock = sock
        self._place = place

    def serve(self) -> None:
        """Answer until the engine hangs up, then end the whole process."""
        try:
            while (request := wire.receive(self._sock)) is not None:
                for answer in self._answers(request):
                    try:
                        wire.send(self._sock, {"id": request["id"], **answer})
                    except (TypeError, ValueError) as error:  # what the backend returned cannot be said in JSON
                        wire.send(self._sock, {"id": request["id"], "error": wire.from_error(error)})
        except OSError:
            pass  # hung up in the middle of an answer
        leave(self._backend)

    def _answers(self, request: Message) -> Iterator[Message]:
        try:
            if request["op"] == "scan":
                yield from self._scan()
            else:
                yield self._answer(request)
        except _PLUGIN_ERRORS as error:
            yield {"error": wire.from_error(error)}

    def _answer(self, request: Message) -> Message:
        op, backend = request["op"], self._backend
        keys = [ChunkKey(bytes.fromhex(key)) for key in request.get("keys", ())]
        if op == "get":
            return {"got": _outcome(_only(backend.get_into(keys, [self._place])))}
        if op == "put":
            put = _only(backend.put_from(keys, [self._place[: request["nbytes"]]]))
            return {"put": _outcome(put), **_usage(backend)}
        if op == "contains":
            return {"contains": [bool(there) for there in backend.contains(keys)]}
        if op == "delete":
            backend.delete(keys)
        elif op == "clear":
            backend.clear()
        elif op == "footprint":
            return {"footprint": backend.footprint(request["nbytes"])}
        elif op == "close":
            backend.close()
        else:
            raise BackendError(f"unknown request {op!r}")
        return _usage(backend)

    def _scan(self) -> Iterator[Message]:
        """Keys, sizes and footprints in batches; an empty batch ends them, None means that the medium cannot say."""
        found = self._backend.scan()
        if found is None:
            yield {"scan": None}
            return
        while some := list(islice(found, _SCAN_BATCH)):
            yield {"scan": [(key.hex(), nbytes, self._backend.footprint(nbytes)) for key, nbytes in some]}
        yield {"scan": []}


def _only(results: list[Any]) -> Any:
    if len(results) != 1:
        raise BackendError(f"{len(results)} results for one key")
    return results[0]


def _outcome(result: Any) -> Any:
    return wire.from_error(result) if isinstance(result, Exception) else result


def _usage(backend: StorageBackend) -> Message:
    """What is stored, and when the count began: it holds every change that was answered with an earlier time."""
    began = monotonic_ns()
    usage = backend.usage()
    return {"usage": usage and [usage.objects, usage.object_bytes, usage.allocated_bytes], "counted_ns": began}


def leave(backend: StorageBackend) -> None:
    """End the process, after closing the backend if that does not take long."""
    closing = threading.Thread(target=backend.close, daemon=True)
    closing.start()
    closing.join(_CLOSE_S)
    os._exit(0)


def main(argv: list[str]) -> int:
    """Build the backend that the first message describes, then serve it."""
    # The engine decides when we end: Ctrl-C at its terminal must not tear a write.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    memory, room, *descriptors = (int(word) for word in argv)
    sockets = [socket.socket(fileno=number) for number in descriptors]
    view = memoryview(mmap.mmap(memory, room * len(sockets)))
    os.close(memory)
    first = sockets[0]
    order = wire.receive(first)
    if order is None:
        return 0
    try:
        config = Plugins().backend(order["type"]).model_validate(order["config"])
        backend = config.build(BuildContext(**order["context"]))
        if not isinstance(backend, StorageBackend):
            raise BackendError(f"backend `{order['type']}` holds no objects: it cannot be isolated")
        ready = {"ready": backend.footprint(order["context"]["object_bytes"]), **_usage(backend)}
    except _PLUGIN_ERRORS as error:
        wire.send(first, {"id": order["id"], "error": wire.from_error(error)})
        return 1
    wire.send(first, {"id": order["id"], **ready})
    desks = [Desk(backend, sock, view[i * room : (i + 1) * room]) for i, sock in enumerate(sockets)]
    for desk in desks[1:]:
        threading.Thread(target=desk.serve, daemon=True).start()
    desks[0].serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
