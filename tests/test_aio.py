"""Backends made of coroutines: the contract, deadlines, and buffers that come back in time."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from time import monotonic

import numpy as np
import pytest

from lmcache_core.aio import AsyncStorage, DaemonPool, Stored, key_of_path, object_name
from lmcache_core.errors import BackendError, Closed, CorruptChunk
from lmcache_core.protocols import BuildContext
from lmcache_core.testing.memory import aligned
from lmcache_core.testing.storage import OpenBackend, StorageBackendTests, key_of
from lmcache_core.types import ChunkKey, MissReason

pytestmark = pytest.mark.timeout(60)

DEADLINE_S = 1.0
SLACK_S = 0.5
CONTEXT = BuildContext("t", 8192, 1 << 20, 4, False, DEADLINE_S)


class DictStorage(AsyncStorage):
    """Objects in a dict, with an await in every place."""

    def __init__(self, objects: dict[ChunkKey, bytes], context: BuildContext, concurrency: int = 4) -> None:
        self.objects = objects
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.shut_down = 0
        super().__init__(context, concurrency=concurrency)

    async def busy(self, kind: str) -> None:
        self.running[kind] += 1
        self.most[kind] = max(self.most[kind], self.running[kind])
        await asyncio.sleep(0)
        self.running[kind] -= 1

    async def has(self, key: ChunkKey) -> bool:
        await self.busy("has")
        return key in self.objects

    async def load(self, key: ChunkKey, buffer: memoryview) -> int | None:
        await self.busy("load")
        obj = self.objects.get(key)
        if obj is None:
            return None
        if len(obj) > len(buffer):
            raise CorruptChunk(MissReason.CORRUPT, f"{len(obj)} bytes")
        buffer[: len(obj)] = obj
        return len(obj)

    async def save(self, key: ChunkKey, buffer: memoryview) -> None:
        obj = bytes(buffer)
        await self.busy("save")
        self.objects[key] = obj

    async def drop(self, key: ChunkKey) -> None:
        await self.busy("drop")
        self.objects.pop(key, None)

    async def stored(self) -> Sequence[Stored]:
        return [Stored(key, len(obj), 0.0) for key, obj in self.objects.items()]

    async def shut(self) -> None:
        self.shut_down += 1


class TestAsyncStorage(StorageBackendTests):
    @pytest.fixture
    def open_backend(self) -> OpenBackend:
        objects: dict[ChunkKey, bytes] = {}
        return lambda context: DictStorage(objects, context)


class Slow(DictStorage):
    """One key hangs in the way its author chose."""

    def __init__(self, how: str) -> None:
        super().__init__({key_of(i): bytes(100) for i in range(3)}, CONTEXT)
        self.how = how
        self.release = threading.Event()
        self.kept: list[object] = []

    async def load(self, key: ChunkKey, buffer: memoryview) -> int | None:
        if key == key_of(1):
            if self.how == "waits":
                await asyncio.sleep(60)
            elif self.how == "ignores the cancellation":
                while not self.release.is_set():
                    try:
                        await asyncio.sleep(0.01)
                    except asyncio.CancelledError:
                        continue
                buffer[0] = 1
            elif self.how == "blocks the loop":
                self.release.wait(30)
            elif self.how == "exits":
                raise SystemExit(3)
            elif self.how == "keeps a part":
                self.kept.append(buffer[:10])
            elif self.how == "keeps it in use":
                self.kept.append(np.frombuffer(buffer, np.uint8))
        return await super().load(key, buffer)


@pytest.fixture
def slow(request: pytest.FixtureRequest) -> Iterator[Slow]:
    backend = Slow(request.param)
    yield backend
    backend.release.set()
    backend.close()


@pytest.mark.parametrize("slow", ["waits", "ignores the cancellation", "blocks the loop"], indirect=True)
def test_a_key_that_hangs_costs_the_deadline_and_nothing_else(slow: Slow) -> None:
    keys = [key_of(i) for i in range(3)]
    buffers = [aligned(8192) for _ in keys]
    began = monotonic()
    results = slow.get_into(keys, buffers)
    assert monotonic() - began < DEADLINE_S + SLACK_S
    assert isinstance(results[1], BackendError)
    if slow.how == "blocks the loop":
        assert "without awaiting" in str(results[1])
        slow.release.set()
    else:
        assert results[0] == results[2] == 100
    before = [bytes(buffer) for buffer in buffers]
    slow.release.set()
    assert slow.contains(keys) == [True] * 3
    assert [bytes(buffer) for buffer in buffers] == before  # nobody writes into them any more


@pytest.mark.parametrize("slow", ["exits"], indirect=True)
def test_an_exit_in_a_coroutine_ends_neither_loop_nor_process(slow: Slow) -> None:
    results = slow.get_into([key_of(1), key_of(0)], [aligned(8192), aligned(8192)])
    assert isinstance(results[0], BackendError)
    assert results[1] == 100


@pytest.mark.parametrize("slow", ["keeps a part", "keeps it in use"], indirect=True)
def test_a_call_does_not_end_while_its_buffer_is_in_use(slow: Slow) -> None:
    """The core would put another chunk there. (It has given up on the call by then: that is its side's business.)"""
    results: list[object] = []
    call = threading.Thread(target=lambda: results.extend(slow.get_into([key_of(1)], [aligned(8192)])))
    call.start()
    call.join(DEADLINE_S + SLACK_S)
    assert call.is_alive()
    slow.kept.clear()
    call.join(10)
    assert not call.is_alive()
    assert results == [100]


def test_parts_in_the_frames_of_an_error_are_no_use() -> None:
    """An error that is kept must not keep the buffer."""

    class Failing(DictStorage):
        async def load(self, key: ChunkKey, buffer: memoryview) -> int | None:
            part = buffer[:10]
            try:
                raise ConnectionResetError(len(part))
            except ConnectionResetError as error:
                raise OSError("no good") from error

    backend = Failing({}, CONTEXT)
    try:
        buffer = aligned(8192)
        (result,) = backend.get_into([key_of(0)], [buffer])
        assert isinstance(result, OSError)
        buffer.release()
    finally:
        backend.close()


def test_work_is_bounded_by_kind() -> None:
    backend = DictStorage({}, CONTEXT, concurrency=3)
    try:
        keys = [key_of(i) for i in range(40)]
        backend.put_from(keys, [aligned(100) for _ in keys])
        backend.contains(keys)
        assert backend.most["save"] == 3
        assert backend.most["has"] == 12
    finally:
        backend.close()


def test_errors_stay_with_their_keys() -> None:
    class Picky(DictStorage):
        async def save(self, key: ChunkKey, buffer: memoryview) -> None:
            if key == key_of(1):
                raise OSError(28, "No space left on device")
            await super().save(key, buffer)

        async def has(self, key: ChunkKey) -> bool:
            if key == key_of(1):
                raise ConnectionResetError("reset")
            return await super().has(key)

    backend = Picky({}, CONTEXT)
    try:
        keys = [key_of(i) for i in range(3)]
        results = backend.put_from(keys, [aligned(100) for _ in keys])
        assert [type(result) for result in results] == [type(None), OSError, type(None)]
        assert backend.contains(keys[2:]) == [True]
        with pytest.raises(ConnectionResetError):  # not "absent": it could not be asked
            backend.contains(keys)
    finally:
        backend.close()


def test_a_clear_that_does_not_clear_says_so() -> None:
    class Keeper(DictStorage):
        async def drop(self, key: ChunkKey) -> None:
            pass

    backend = Keeper({key_of(0): b"x"}, CONTEXT)
    try:
        with pytest.raises(BackendError, match="still listed"):
            backend.clear()
    finally:
        backend.close()


def test_scan_is_oldest_first_and_only_with_a_capacity() -> None:
    class Aged(DictStorage):
        async def stored(self) -> Sequence[Stored]:
            return [Stored(key_of(i), 100 + i, modified) for i, modified in enumerate([30.0, 10.0, 20.0])]

    backend = Aged({}, CONTEXT)
    try:
        found = backend.scan()
        assert found is not None
        assert list(found) == [(key_of(1), 101), (key_of(2), 102), (key_of(0), 100)]
    finally:
        backend.close()
    unlimited = Aged({}, BuildContext("t", 8192, None, 4))
    assert unlimited.scan() is None
    unlimited.close()


def test_closing_ends_what_runs_and_refuses_what_comes() -> None:
    before = threading.active_count()
    backend = DictStorage({}, CONTEXT)
    backend.close()
    backend.close()
    assert backend.shut_down == 1
    assert threading.active_count() == before
    for call in (backend.contains, backend.delete):
        with pytest.raises(Closed):
            call([key_of(0)])
    with pytest.raises(Closed):
        backend.clear()


def test_names_come_from_keys_alone() -> None:
    key = ChunkKey(bytes(range(16)) + b"\xa7" + bytes(15))
    assert object_name(key) == f"a/7/{key.hex()}"
    for path in (object_name(key), f"bucket/prefix/{object_name(key)}", f"/{object_name(key)}"):
        assert key_of_path(path) == key
    for path in (f"a/8/{key.hex()}", f"xa/7/{key.hex()}", f"a/7/{key.hex()}0", f"a/7/{key.hex().upper()}", "a/7/x", ""):
        assert key_of_path(path) is None


# -- threads for clients that block ----------------------------------------------------------------------------------
def test_a_pool_runs_side_by_side_and_no_more() -> None:
    pool = DaemonPool(3, "pool")
    gate, lock = threading.Event(), threading.Lock()
    inside = most = 0

    def work(number: int) -> int:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        gate.wait(10)
        with lock:
            inside -= 1
        return number

    futures = [pool.submit(work, i) for i in range(9)]
    end = monotonic() + 10
    while inside < 3 and monotonic() < end:
        threading.Event().wait(0.001)
    gate.set()
    assert [future.result(10) for future in futures] == list(range(9))
    assert most == 3
    pool.shutdown()
    with pytest.raises(Closed):
        pool.submit(work, 0)


class Blocking(DictStorage):
    """`load` blocks, until two of them are at it."""

    def __init__(self) -> None:
        self.both = threading.Barrier(2)
        super().__init__({key_of(0): b"one", key_of(1): b"two"}, CONTEXT)

    def load(self, key: ChunkKey, buffer: memoryview) -> int | None:  # type: ignore[override]
        self.both.wait(10)
        data = self.objects[key]
        buffer[: len(data)] = data
        return len(data)


def test_plain_methods_run_on_threads() -> None:
    backend = Blocking()
    buffers = [aligned(8192), aligned(8192)]
    assert backend.get_into([key_of(0), key_of(1)], buffers) == [3, 3]
    assert [bytes(buffer[:3]) for buffer in buffers] == [b"one", b"two"]
    backend.close()


def test_a_plain_method_that_goes_on_after_the_deadline_writes_nothing() -> None:
    backend = Blocking()
    buffer = aligned(8192)
    buffer[:] = bytes(8192)
    (late,) = backend.get_into([key_of(0)], [buffer])
    assert isinstance(late, BackendError)
    backend.both.wait(10)  # the thread goes on
    backend.close()
    for thread in threading.enumerate():
        if thread.name.startswith("lmcache-t-call"):
            thread.join(10)
    assert not any(buffer)


def test_a_pool_hands_errors_over() -> None:
    pool = DaemonPool(1, "pool")
    failed: Future[int] = pool.submit(list[int]().pop)
    with pytest.raises(IndexError):
        failed.result(10)
    assert pool.submit(lambda: 7).result(10) == 7
    pool.shutdown()


def test_a_process_can_exit_while_a_call_hangs() -> None:
    program = (
        "import threading; from lmcache_core.aio import DaemonPool\n"
        "begun = threading.Event()\n"
        "DaemonPool(1, 'p').submit(lambda: (begun.set(), threading.Event().wait()))\n"
        "assert begun.wait(10); print('done')"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "done\n", "")
