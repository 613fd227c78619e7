"""`IsolatedStorage`: a storage backend whose I/O happens in another process.

A thread stuck in a dead network file system cannot be interrupted, and a process that has one cannot end. Here only the
worker gets stuck: calls give up at their deadline, a worker all of whose threads are stuck is killed and replaced, and
the engine's process ends when it likes. Bytes pass through shared memory that is cut once, one place for each call that
may run at a time; a late answer can only touch its own place, never a slot of the engine.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from time import monotonic
from typing import Any

import numpy as np

from lmcache_core import _native
from lmcache_core.errors import BackendError, BackendUnavailable, Closed
from lmcache_core.isolation import wire
from lmcache_core.isolation.wire import Message
from lmcache_core.protocols import BackendConfig, BuildContext, StorageBackend
from lmcache_core.types import ChunkKey, Got, Put, Usage, round_up

MOST_LEAKED = 2
"""Killed workers that the kernel cannot end yet. With so many, no further one is started until one has gone."""

_START_S = 60.0
"""Most time a worker may take to start, recovery of its medium included."""
_RETRY_S = (1.0, 60.0)
_GRACE_S = 1.0
_SIZES = 1 << 14


def places(context: BuildContext) -> int:
    """Calls that may run at a time, each with a place in shared memory."""
    return max(2, context.threads)


def memory_bytes(context: BuildContext) -> int:
    """Bytes of shared memory that isolating a backend takes."""
    return places(context) * round_up(context.object_bytes)


class _Desk:
    """One socket to the worker and its place in shared memory. Used by one call at a time."""

    def __init__(self, sock: socket.socket, address: int) -> None:
        self.address = address
        self.busy = False
        """A call has it. Changed with the lock held."""
        self.stuck = False
        """A call gave up on it; it is free again when the late answer has come."""
        self.writing = ""
        """Key of the object that the worker stores from this place, as long as that may still happen."""
        self._sock = sock
        self._last = 0

    def send(self, request: Message, end: float) -> None:
        """Raise `OSError`."""
        self._last += 1
        self.writing = request["keys"][0] if request.get("op") == "put" else ""
        self._sock.settimeout(max(0.001, end - monotonic()))
        try:
            wire.send(self._sock, {**request, "id": self._last})
        except TimeoutError as error:
            raise ConnectionError("half a request is with a worker that does not read") from error

    def answer(self, end: float) -> Message:
        """The next answer to what was sent last. Raise `_Raised`, `TimeoutError` or `ConnectionError`."""
        while True:
            self._sock.settimeout(max(0.001, end - monotonic()))
            answer = wire.receive(self._sock)
            if answer is None:
                raise ConnectionError("the I/O worker has ended")
            if answer["id"] == self._last:
                break
        if "error" in answer:
            raise _Raised(wire.to_error(answer["error"]))
        return answer

    def recovered(self) -> bool:
        """Whether something has come late. Answers to requests of before are told by their number."""
        try:
            poll = select.poll()  # `select` knows no descriptor above 1023
            poll.register(self._sock, select.POLLIN)
            return bool(poll.poll(0))
        except (OSError, ValueError):
            return False

    def hang_up(self) -> None:
        """End the conversation, and with it the worker. Whoever waits for an answer is told."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Nobody may be using it."""
        self._sock.close()


class _Raised(Exception):
    """Carries what the backend raised, which may be an `OSError` of its own, past those of the socket."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _Worker:
    """One worker process with its memory and desks."""

    def __init__(self, order: Message, room: int, desks: int) -> None:
        """Start the process and let it build the backend. Raise what that raises, or `BackendUnavailable`."""
        self._map = mmap.mmap(-1, 1)
        with contextlib.ExitStack() as stack:
            memory = os.memfd_create("lmcache-io")
            stack.callback(os.close, memory)
            os.ftruncate(memory, room * desks)
            self._map = mmap.mmap(memory, room * desks, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            base = _native.address_of(memoryview(self._map))
            pairs = [socket.socketpair() for _ in range(desks)]
            for _, other in pairs:
                stack.callback(other.close)
            theirs = [other.fileno() for _, other in pairs]
            self.desks = [_Desk(ours, base + i * room) for i, (ours, _) in enumerate(pairs)]
            stack.callback(self._close_if_not_started)
            command = [sys.executable, "-m", "lmcache_core.isolation.worker", str(memory), str(room)]
            self.process = subprocess.Popen(
                [*command, *map(str, theirs)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[memory, *theirs],
                # The same modules as here, also those that no installation knows.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"},
                # Not in the terminal's group: the worker ends when the engine hangs up, not by Ctrl-C.
                start_new_session=True,
            )
        self.free = list(self.desks)
        self.dead = False
        end = monotonic() + _START_S
        try:
            self.desks[0].send(order, end)
            ready = self.desks[0].answer(end)
        except _Raised as error:
            self.kill()
            raise error.error from None
        except OSError as error:
            said = "has not opened the medium in time" if isinstance(error, TimeoutError) else "ended while it started"
            code = self.process.poll()
            self.kill()
            raise BackendUnavailable(f"its I/O worker {said} (exit {code}): {error}") from error
        self.footprint = int(ready["ready"])
        self.ready = ready

    def _close_if_not_started(self) -> None:
        if not hasattr(self, "process"):
            for desk in self.desks:
                desk.close()

    @property
    def ended(self) -> bool:
        """Whether the process is no more."""
        return self.process.poll() is not None

    @property
    def stuck(self) -> bool:
        """Whether no desk can be used."""
        return all(desk.stuck for desk in self.desks)

    def kill(self) -> None:
        """End the process as soon as the kernel lets it, and give its memory back now. Does not wait.

        Desks that are in use are closed by `give`.
        """
        self.dead = True
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        for desk in self.desks:
            desk.hang_up()
        for desk in self.desks:
            if not desk.busy:
                desk.close()
        self._give_memory_back()
        _ENDING.append(self.process)
        _ENDING[:] = [process for process in _ENDING if process.poll() is None]

    def _give_memory_back(self) -> None:
        """Once no call copies from or to it. Late writes of the kernel may bring a page back: at most those of calls
        that are stuck."""
        if not any(desk.busy for desk in self.desks):
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_REMOVE)

    def take(self) -> _Desk:
        """A free desk for a call. Lock held."""
        desk = self.free.pop()
        desk.busy = True
        return desk

    def give(self, desk: _Desk) -> None:
        """Take a desk back from a call. Lock held."""
        desk.busy = False
        if self.dead:
            desk.close()
            self._give_memory_back()
        elif not desk.stuck:
            self.free.append(desk)


_ENDING: list[subprocess.Popen[bytes]] = []
"""Killed workers that may still be stuck in the kernel: nobody waits for them."""


class IsolatedStorage(StorageBackend):
    """The backend that `config` describes, in a worker process."""

    def __init__(self, config: BackendConfig, context: BuildContext) -> None:
        """Start the worker and open the medium. Raise as `config.build(context)` does."""
        self._order = {"type": config.type, "config": wire.plain(config), "context": asdict(context)}
        self._name = f"tier `{context.tier}`"
        self._room = round_up(context.object_bytes)
        self._desks = places(context)
        # The core gives up at the deadline: this call has ended by then, and its thread is free.
        self._timeout = 0.9 * context.deadline
        self._turn = threading.Condition()
        self._closed = False
        self._reviving = False
        self._pause = _RETRY_S[0]
        self._not_before = 0.0
        self._leaked: list[_Worker] = []
        self._footprints: dict[int, int] = {}
        self._why = ""
        """Why there is no worker."""
        self._usage: list[int] | None = None
        self._counted_ns = 0
        self._books = threading.Lock()
        self.restarts = 0
        """Workers that were replaced."""
        self._worker: _Worker | None = self._start()

    # -- the contract ------------------------------------------------------------------------------------------
    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [bool(there) for there in self._ask({"op": "contains", "keys": _hex(keys)})["contains"]]

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        """Read each object into its place, then copy it."""

        def take(desk: _Desk, answer: Message, i: int) -> Got:
            got = answer["got"]
            if isinstance(got, dict):
                return wire.to_error(got)
            if got is None:
                return None
            if type(got) is not int or not 0 <= got <= min(len(buffers[i]), self._room):
                return BackendError(f"{self._name}: {got!r} bytes read into a buffer of {len(buffers[i])}")
            _copy(_native.address_of(buffers[i]), desk.address, got)
            return got

        requests = [{"op": "get", "keys": [key.hex()]} for key in keys]
        return self._each(requests, lambda desk, i: None, take)

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        """Copy each object into a place, from where the worker stores it."""

        def fill(desk: _Desk, i: int) -> None:
            if len(buffers[i]) > self._room:
                raise BackendError(f"{self._name}: an object of {len(buffers[i])} bytes, the largest is {self._room}")
            _copy(desk.address, _native.address_of(buffers[i]), len(buffers[i]))

        def take(desk: _Desk, answer: Message, i: int) -> Put:
            return wire.to_error(answer["put"]) if answer["put"] is not None else None

        requests = [
            {"op": "put", "keys": [key.hex()], "nbytes": len(buffer)} for key, buffer in zip(keys, buffers, strict=True)
        ]
        return self._each(requests, fill, take)

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        names = _hex(keys)
        self._not_being_written(names)
        self._ask({"op": "delete", "keys": names})

    def clear(self) -> None:
        self._not_being_written(None)
        self._ask({"op": "clear"})

    def scan(self) -> Iterator[tuple[ChunkKey, int]] | None:
        """What the medium holds, in one go: it is asked for once, at start-up."""
        end = monotonic() + _START_S
        found: list[tuple[ChunkKey, int]] = []
        with self._borrowed(end) as (worker, desk):
            try:
                desk.send({"op": "scan"}, end)
                while rows := desk.answer(end)["scan"]:
                    for key, nbytes, footprint in rows:
                        self._footprints[nbytes] = footprint
                        found.append((ChunkKey(bytes.fromhex(key)), nbytes))
            except _Raised as error:
                raise error.error from None
            except OSError as error:
                raise self._lost(worker, desk, error) from error
        return None if rows is None else iter(found)

    def footprint(self, nbytes: int) -> int:
        known = self._footprints.get(nbytes)
        if known is None:
            known = int(self._ask({"op": "footprint", "nbytes": nbytes})["footprint"])
            if len(self._footprints) >= _SIZES:
                self._footprints.clear()
            self._footprints[nbytes] = known
        return known

    def usage(self) -> Usage | None:
        """As of the latest change: nobody waits for the medium to learn it."""
        usage = self._usage
        return Usage(*usage) if usage else None

    def close(self) -> None:
        """Let the worker close the medium, for a second at most; then it ends in its own time."""
        with self._turn:
            if self._closed:
                return
            self._closed = True
            worker, self._worker = self._worker, None
            self._turn.notify_all()
        if worker is None:
            return
        end = monotonic() + _GRACE_S
        if worker.free:
            with contextlib.suppress(_Raised, OSError):
                worker.free[0].send({"op": "close"}, end)
                worker.free[0].answer(end)
        for desk in worker.desks:
            desk.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(0.1, end - monotonic()))
        with self._turn:
            worker.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(0.1)

    # -- calls -------------------------------------------------------------------------------------------------
    def _ask(self, request: Message) -> Message:
        """One request that moves no object."""
        end = monotonic() + self._timeout
        with self._borrowed(end) as (worker, desk):
            try:
                desk.send(request, end)
                answer = desk.answer(end)
            except _Raised as error:
                raise error.error from None
            except OSError as error:
                raise self._lost(worker, desk, error) from error
        self._note(answer)
        return answer

    def _each(
        self,
        requests: Sequence[Message],
        fill: Callable[[_Desk, int], None],
        take: Callable[[_Desk, Message, int], Any],
    ) -> list[Any]:
        """One request for each object, as many at a time as there are desks free; an outcome for each."""
        end = monotonic() + self._timeout
        outcomes: list[Any] = [None] * len(requests)
        at = 0
        while at < len(requests):
            with contextlib.ExitStack() as stack:
                try:
                    borrowed = [stack.enter_context(self._borrowed(end))]
                    while len(borrowed) < len(requests) - at and (more := self._spare()) is not None:
                        borrowed.append(stack.enter_context(self._returning(*more)))
                except (BackendError, Closed) as error:
                    return outcomes[:at] + [error] * (len(requests) - at)
                sent: list[tuple[_Worker, _Desk, int]] = []
                for worker, desk in borrowed:
                    try:
                        fill(desk, at)
                        desk.send(requests[at], end)
                        sent.append((worker, desk, at))
                    except OSError as error:
                        outcomes[at] = self._lost(worker, desk, error)
                    except BackendError as error:
                        outcomes[at] = error
                    at += 1
                for worker, desk, i in sent:
                    try:
                        answer = desk.answer(end)
                        outcomes[i] = take(desk, answer, i)
                        self._note(answer)
                    except _Raised as error:
                        outcomes[i] = error.error
                    except OSError as error:
                        outcomes[i] = self._lost(worker, desk, error)
        return outcomes

    def _not_being_written(self, names: Sequence[str] | None) -> None:
        """Raise `BackendUnavailable` while a put that was given up may still store one of them (None: anything): what
        comes after the deletion would be in nobody's books."""
        with self._turn:
            worker = self._worker
            if worker is None:
                return  # the question itself will say why
            late = {desk.writing for desk in worker.desks if desk.stuck and desk.writing and not desk.recovered()}
            if late and (names is None or not late.isdisjoint(names)):
                raise BackendUnavailable(f"{self._name}: its I/O worker is still storing what is to be deleted")

    def _note(self, answer: Message) -> None:
        """Keep the latest count: answers of calls that run at a time overtake each other."""
        if "usage" not in answer:
            return
        with self._books:
            if answer["counted_ns"] >= self._counted_ns:
                self._usage, self._counted_ns = answer["usage"], answer["counted_ns"]

    def _lost(self, worker: _Worker, desk: _Desk, error: OSError) -> BackendUnavailable:
        """A desk that gave no answer in time is not used again before it has; what the caller is told."""
        desk.stuck = True
        if not isinstance(error, TimeoutError):
            desk.hang_up()  # what it would say now has no beginning
            return BackendUnavailable(f"{self._name}: its I/O worker {worker.process.pid} has ended: {error}")
        return BackendUnavailable(
            f"{self._name}: its I/O worker {worker.process.pid} has not answered within {self._timeout:g} s"
        )

    @contextlib.contextmanager
    def _borrowed(self, end: float) -> Iterator[tuple[_Worker, _Desk]]:
        """A free desk, waiting for one at most until `end`. Raise `BackendUnavailable` or `Closed`."""
        with self._turn:
            while True:
                if self._closed:
                    raise Closed(f"{self._name} is closed")
                worker = self._usable()
                if worker.free:
                    desk = worker.take()
                    break
                if not self._turn.wait(min(0.05, max(0.0, end - monotonic()))) and monotonic() >= end:
                    raise BackendUnavailable(f"{self._name}: every thread of its I/O worker is busy")
        with self._returning(worker, desk) as found:
            yield found

    def _spare(self) -> tuple[_Worker, _Desk] | None:
        """Another desk, if one is free and others leave one."""
        with self._turn:
            worker = self._worker
            return (worker, worker.take()) if worker is not None and len(worker.free) > 1 else None

    @contextlib.contextmanager
    def _returning(self, worker: _Worker, desk: _Desk) -> Iterator[tuple[_Worker, _Desk]]:
        try:
            yield worker, desk
        finally:
            with self._turn:
                worker.give(desk)
                self._turn.notify()

    # -- the worker's life -------------------------------------------------------------------------------------
    def _usable(self) -> _Worker:
        """The worker, unless it has ended or is stuck altogether. Lock held. Raise `BackendUnavailable`."""
        worker = self._worker
        if worker is not None:
            for desk in worker.desks:
                if desk.stuck and not desk.busy and desk.recovered():
                    desk.stuck = False
                    worker.free.append(desk)
            if not worker.ended and not worker.stuck:
                return worker
            self._why = "has ended" if worker.ended else f"is stuck: no answer within {self._timeout:g} s on any thread"
            self._why = f"its I/O worker {worker.process.pid} {self._why}"
            self._worker = None
            worker.kill()
            self._leaked.append(worker)
        self._leaked = [old for old in self._leaked if not old.ended]
        if len(self._leaked) >= MOST_LEAKED:
            raise BackendUnavailable(
                f"{self._name}: {self._why}; {len(self._leaked)} killed workers are still stuck in the medium"
            )
        if not self._reviving and monotonic() >= self._not_before:
            self._reviving = True
            try:
                threading.Thread(target=self._revive, name="lmcache-io-start", daemon=True).start()
            except RuntimeError as error:
                self._reviving = False
                raise BackendUnavailable(f"{self._name}: {self._why}; no thread can be started: {error}") from error
        raise BackendUnavailable(f"{self._name}: {self._why}; another one is being started")

    def _revive(self) -> None:
        try:
            worker = self._start()
        except Exception as error:
            with self._turn:
                self._why = f"its I/O worker cannot be started: {error}"
                self._pause = min(_RETRY_S[1], self._pause * 2)
                self._not_before = monotonic() + self._pause
                self._reviving = False
            return
        with self._turn:
            self._pause = _RETRY_S[0]
            self._reviving = False
            self.restarts += 1
            if not self._closed:
                self._worker = worker
                self._turn.notify_all()
                return
        worker.kill()

    def _start(self) -> _Worker:
        worker = _Worker(self._order, self._room, self._desks)
        self._footprints[self._order["context"]["object_bytes"]] = worker.footprint
        self._note(worker.ready)
        return worker


def _hex(keys: Sequence[ChunkKey]) -> list[str]:
    return [key.hex() for key in keys]


def _copy(to: int, source: int, nbytes: int) -> None:
    """Without the GIL."""
    one = np.array([to, source, nbytes], dtype=np.int64)
    _native.copy_batch(one[0:1], one[1:2], one[2:3])
