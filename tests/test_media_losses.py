"""Clients that close, find no thread or fail while they clean up: calls end with their buffers, media come back."""

from __future__ import annotations

import errno
import ftplib
import io
import os
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from redis_servers import build, configure

from lmcache_backends.fsspec_store.backend import FsspecBackend
from lmcache_backends.fsspec_store.stores import Files, LocalFiles
from lmcache_backends.redis_store import RedisConfig
from lmcache_backends.redis_store.rig import Server
from lmcache_backends.redis_store.servers import Servers
from lmcache_core.aio import AsyncStorage, DaemonPool
from lmcache_core.errors import BackendError, CorruptChunk, NoSpace
from lmcache_core.protocols import BuildContext
from lmcache_core.testing.memory import aligned
from lmcache_core.testing.storage import key_of, new_object

pytestmark = pytest.mark.timeout(60)


class Blocking(AsyncStorage):
    def __init__(self, context: BuildContext) -> None:
        self.go, self.inside = threading.Event(), threading.Event()
        super().__init__(context, concurrency=4)

    async def has(self, key: Any) -> bool:
        return True

    async def save(self, key: Any, buffer: memoryview) -> None: ...

    async def drop(self, key: Any) -> None: ...

    async def stored(self) -> Any:
        return []

    def load(self, key: Any, buffer: memoryview) -> Any:
        part = buffer[:64]
        self.inside.set()
        self.go.wait(5)
        part[:] = b"L" * 64
        return 64


def test_closing_does_not_end_a_call_whose_buffer_is_in_use() -> None:
    storage = Blocking(BuildContext("t", 8192, 1 << 20, 4, False, 2.0))
    buffer = aligned(4096, 0)
    ended = threading.Event()

    def call() -> None:
        with suppress(BackendError):
            storage.get_into([key_of(0)], [buffer])
        ended.set()

    threading.Thread(target=call, daemon=True).start()
    assert storage.inside.wait(5)
    storage.close()
    early = ended.wait(0.3)
    if early:
        buffer[:64] = b"N" * 64  # somebody else's now
    storage.go.set()
    assert ended.wait(5)
    sleep(0.1)
    assert not early, f"the call ended with its buffer in use, and then there was {bytes(buffer[:8])!r} instead of N"


def no(self: object) -> None:
    raise RuntimeError("can't start new thread")


def test_a_pool_starts_threads_again_after_it_could_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = DaemonPool(2, "t")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                pool.submit(int)
    assert pool.submit(int).result(1) == 0
    pool.shutdown()


def test_redis_connects_again_after_no_thread_could_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(tmp_path) as server:
        config = RedisConfig(url=f"redis://127.0.0.1:{server.port}")
        backend = build(configure(config, track=False, connections=2), deadline=1.0)
        backend.servers.suspect(("127.0.0.1", server.port))  # its connection is closed
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no)
            for _ in range(2):
                with pytest.raises((RuntimeError, BackendError)):
                    backend.contains([key_of(0)])
        assert backend.servers.opened == 0
        assert backend.contains([key_of(0)]) == [False]
        backend.close()


def test_the_map_is_asked_for_again_after_no_thread_could_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(tmp_path) as server:
        config = RedisConfig(url=f"redis://127.0.0.1:{server.port}", mode="cluster", track=False)
        servers = Servers(config.target(), 2, 0.5)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no)
            with pytest.raises((RuntimeError, BackendError)):
                servers.refresh(monotonic() + 0.3)
        with pytest.raises(BackendError, match=r"CLUSTER|cluster"):  # it is not one, but it is asked
            servers.refresh(monotonic() + 2)
        servers.close()


def test_a_list_that_is_too_long_from_the_start_is_never_used(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        config = RedisConfig(url=f"redis://127.0.0.1:{server.port}")
        some = [key_of(n) for n in range(3000)]
        writer = build(configure(config, track=False))
        writer.put_from(some, [aligned(64)] * len(some))
        writer.close()
        reader = build(configure(config, track_keys=1000))
        try:
            reader.contains([])
            end = monotonic() + 2
            while monotonic() < end and "track_keys" not in reader.presence.why:
                found = reader.contains(some)
                assert all(found), f"{found.count(False)} of {len(found)} stored keys are said to be absent"
                sleep(0.02)
            assert "track_keys" in reader.presence.why
        finally:
            reader.close()


class Ftp(MemoryFileSystem):
    """Removes what is absent as fsspec's `ftp` does: with an error that is no `FileNotFoundError`."""

    protocol, full = "ftp-like", False

    def rm_file(self, path: str) -> None:
        try:
            super().rm_file(path)
        except (FileNotFoundError, KeyError):
            raise ftplib.error_perm("550 no such file") from None

    def mv(self, old: str, new: str, **kwargs: Any) -> None:
        self.pipe_file(new, self.cat_file(old))
        super().rm_file(old)

    def pipe_file(self, path: str, value: Any, **kwargs: Any) -> Any:
        if self.full:
            raise OSError(errno.ENOSPC, "full")
        return super().pipe_file(path, value, **kwargs)


def test_a_put_that_succeeded_succeeded() -> None:
    store = Files(Ftp(skip_instance_cache=True), "/root", atomic=False, threads=1, name="t")
    store._write("/root/a/b/c", memoryview(b"12345"))
    assert store._size("/root/a/b/c") == 5


def test_a_full_medium_is_said_to_be_full() -> None:
    fs = Ftp(skip_instance_cache=True)
    fs.full = True
    with pytest.raises(NoSpace):
        Files(fs, "/root", atomic=False, threads=1, name="t")._write("/root/x/y/z", memoryview(b"12345"))


class Slow:
    """A rename that takes until it is let go, and has its effect then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cls: type[Files]) -> None:
        self.go, self.begun, self.done, self.on = threading.Event(), threading.Event(), threading.Event(), True
        real = cls._rename

        def rename(store: Any, temporary: str, path: str) -> None:
            if not self.on:
                real(store, temporary, path)
                return
            self.begun.set()
            self.go.wait(20)
            real(store, temporary, path)
            self.done.set()

        monkeypatch.setattr(cls, "_rename", rename)


def files_backend(tmp_path: Path, local: bool) -> FsspecBackend:
    context = BuildContext("t", 16 << 10, 1 << 20, threads=2, deadline=0.3)
    if local:
        made: Files = LocalFiles(fsspec.filesystem("file"), str(tmp_path / "kv"), atomic=False, threads=4, name="t")
        root = str(tmp_path / "kv")
    else:
        root = f"/{tmp_path.name}"
        made = Files(MemoryFileSystem(), root, atomic=False, threads=4, name="t")
    return FsspecBackend(made, root, context, concurrency=4, timeout=None, secrets=frozenset())


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("meanwhile", ["deleted", "cleared", "replaced"])
def test_a_rename_that_ends_after_its_put_was_given_up_brings_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool, meanwhile: str
) -> None:
    backend = files_backend(tmp_path, local)
    slow = Slow(monkeypatch, LocalFiles if local else Files)
    try:
        (put,) = backend.put_from([key_of(1)], [new_object(key_of(1), 4096)])
        assert isinstance(put, Exception) and slow.begun.is_set()
        slow.on = False
        if meanwhile == "cleared":
            # The temporary file as well; so what is renamed here is one that a server has in hand already.
            monkeypatch.setattr(FsspecBackend, "_reap", lambda self, age: _nothing())
            backend.clear()
        else:
            backend.delete([key_of(1)])
        if meanwhile == "replaced":
            assert backend.put_from([key_of(1)], [new_object(key_of(1), 4096)]) == [None]
        slow.go.set()
        assert slow.done.wait(10)
        for _ in range(100):
            if not backend.contains([key_of(1)])[0]:
                break
            threading.Event().wait(0.01)
        if meanwhile == "replaced":  # either is right: nothing but the object's own bytes, or a miss
            got = backend.get_into([key_of(1)], [aligned(2 * 4096)])[0]
            assert got is None or isinstance(got, int)
        else:
            assert backend.contains([key_of(1)]) == [False]
    finally:
        slow.go.set()
        backend.close()


async def _nothing() -> None:
    pass


def test_a_local_file_on_bad_blocks_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalFiles(None, str(tmp_path), atomic=False, threads=1, name="t")
    path = tmp_path / "object"
    path.write_bytes(b"x" * 10)
    buffer = memoryview(bytearray(16))

    class Bad(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda fd, mode, **_: Bad(fd))
        with pytest.raises(OSError, match="Input/output"):
            store._read(str(path), buffer)
        with pytest.raises(CorruptChunk, match="twice in a row"):
            store._read(str(path), buffer)
    assert store._read(str(path), buffer) == 10
