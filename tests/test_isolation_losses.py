"""Workers that answer late, die in the middle or cannot be started: no byte is uncounted, and the tier comes back."""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest

from lmcache_backends.gds import GdsConfig
from lmcache_core.errors import BackendUnavailable
from lmcache_core.isolation import storage as module
from lmcache_core.isolation import wire, worker
from lmcache_core.isolation.worker import Desk
from lmcache_core.protocols import BuildContext
from lmcache_core.testing.memory import aligned
from lmcache_core.testing.storage import key_of, new_object
from lmcache_core.types import object_bytes, round_up

pytestmark = pytest.mark.timeout(60)


OBJECT = object_bytes(16 << 10)


def until(true: Callable[[], object], what: str, seconds: float = 10.0) -> None:
    end = monotonic() + seconds
    while not true():
        assert monotonic() < end, what
        sleep(0.01)


@pytest.fixture
def isolated(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    opened: list[Any] = []

    def make(threads: int = 2, deadline: float = 0.5) -> Any:
        config = GdsConfig.model_validate(
            {"path": tmp_path / "kv", "mode": "files", "isolate": "always", "free_floor": 0}
        )
        backend = config.build(BuildContext("nfs", OBJECT, 64 << 20, threads, deadline=deadline))
        opened.append(backend)
        return backend

    yield make
    for backend in opened:
        backend.close()


def test_a_late_answer_is_noticed_whatever_the_number_of_the_descriptor(isolated: Callable[..., Any]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    many = [os.open("/dev/null", os.O_RDONLY) for _ in range(1030)]
    try:
        backend = isolated(threads=4)
        key = key_of(0)
        obj = new_object(key, OBJECT)
        assert backend.put_from([key], [obj]) == [None]
        worker = backend._worker
        os.kill(worker.process.pid, signal.SIGSTOP)
        assert isinstance(backend.get_into([key], [aligned(round_up(OBJECT), 0)])[0], BackendUnavailable)
        os.kill(worker.process.pid, signal.SIGCONT)
        sleep(0.3)
        backend.contains([key])
        backend.contains([key])
        assert len(worker.free) == len(worker.desks)
    finally:
        for fd in many:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_worker_is_started_again_after_no_thread_could_be(
    isolated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = isolated()
    pid = backend._worker.process.pid
    start = threading.Thread.start

    def no(self: object) -> None:
        raise RuntimeError("can't start new thread")

    os.kill(pid, signal.SIGKILL)
    until(lambda: backend._worker.ended, "it lives")
    monkeypatch.setattr(threading.Thread, "start", no)
    for _ in range(2):
        with pytest.raises((BackendUnavailable, RuntimeError)):
            backend.contains([key_of(0)])
    monkeypatch.setattr(threading.Thread, "start", start)

    def works() -> bool:
        try:
            return backend.contains([key_of(0)]) == [False]
        except BackendUnavailable:
            return False

    until(works, "the tier never comes back", 5)


def test_a_copy_out_of_a_worker_that_ends_meanwhile(
    isolated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = isolated()
    key = key_of(0)
    obj = new_object(key, OBJECT)
    assert backend.put_from([key], [obj]) == [None]
    copying, go = threading.Event(), threading.Event()
    copy = module._copy

    def slow(*a: Any) -> None:
        copying.set()
        go.wait(5)
        copy(*a)

    monkeypatch.setattr(module, "_copy", slow)
    buffer = aligned(round_up(OBJECT), 0)
    out: list[Any] = []
    thread = threading.Thread(target=lambda: out.extend(backend.get_into([key], [buffer])))
    thread.start()
    assert copying.wait(5)
    os.kill(backend._worker.process.pid, signal.SIGKILL)
    until(lambda: backend._worker.ended, "it lives")
    with pytest.raises(BackendUnavailable):
        backend.contains([key])
    go.set()
    thread.join()
    assert out != [OBJECT] or bytes(buffer[:OBJECT]) == bytes(obj), f"{out}: {bytes(buffer[:8])}"


LARGE = object_bytes(48 << 20)


def test_a_key_is_not_deleted_while_its_late_put_may_still_land(tmp_path: Path) -> None:
    config = GdsConfig.model_validate({"path": tmp_path / "kv", "mode": "files", "isolate": "always", "free_floor": 0})
    backend = config.build(BuildContext("nfs", LARGE, 1 << 30, 4, deadline=0.6))
    try:
        key = key_of(0)
        obj = new_object(key, LARGE)
        pid = backend._worker.process.pid
        os.kill(pid, signal.SIGSTOP)
        (put,) = backend.put_from([key], [obj])
        assert isinstance(put, BackendUnavailable)
        threading.Timer(0.1, os.kill, (pid, signal.SIGCONT)).start()
        try:
            backend.delete([key])  # what the core does with a doubtful key
            deleted = True
        except BackendUnavailable:
            deleted = False  # then the core keeps it in its books, and tries again
        end = monotonic() + 1.5
        while monotonic() < end and any(desk.stuck for desk in backend._worker.desks):
            sleep(0.02)
            with suppress(BackendUnavailable):
                backend.contains([key])
        sleep(0.3)
        there = backend.contains([key])[0]
        assert not (deleted and there), "deleted, and there: nobody counts these bytes, and nobody will evict them"
        assert backend._worker.process.pid == pid
        backend.delete([key])
        assert backend.contains([key]) == [False]
    finally:
        backend.close()


class Odd:
    def get_into(self, keys: Any, buffers: Any) -> list[Any]:
        return [np.int64(5)]

    def contains(self, keys: Any) -> list[bool]:
        return [True for _ in keys]

    def usage(self) -> None: ...

    def close(self) -> None: ...


def test_a_result_that_cannot_be_sent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "leave", lambda backend: None)
    odd: Any = Odd()
    ours, theirs = socket.socketpair()
    ours.settimeout(1)
    thread = threading.Thread(target=Desk(odd, theirs, memoryview(bytearray(64))).serve, daemon=True)
    thread.start()
    wire.send(ours, {"op": "get", "keys": ["00" * 32], "id": 1})
    try:
        answer = wire.receive(ours)
    except TimeoutError:
        answer = None
    ours.close()
    thread.join(5)
    theirs.close()
    assert (answer is not None and "error" in answer) or (answer and answer.get("got") == 5), "no answer, ever"
