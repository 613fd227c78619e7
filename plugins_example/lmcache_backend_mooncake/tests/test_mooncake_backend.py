"""The conformance suite over a real cluster on loopback, and what Mooncake alone brings."""

from __future__ import annotations

import mmap
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
from lmcache_backend_mooncake import MooncakeBackend, MooncakeConfig
from lmcache_backend_mooncake.client import code_name
from lmcache_backend_mooncake.rig import Cluster, MooncakeRig, missing
from pydantic import ValidationError

from lmcache_core.errors import BackendUnavailable, Closed, NoSpace
from lmcache_core.plugins import Plugins
from lmcache_core.protocols import BuildContext, Region
from lmcache_core.testing.memory import aligned
from lmcache_core.testing.rig import Medium
from lmcache_core.testing.storage import OpenBackend, StorageBackendTests, key_of, new_object
from lmcache_core.types import ChunkKey, object_bytes, round_up

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

OBJECT = object_bytes(64 << 10)

UNTIDY = """
import sys, threading
from lmcache_backend_mooncake import MooncakeConfig
from lmcache_core.protocols import BuildContext
from lmcache_core.testing.memory import aligned

backend = MooncakeConfig(master=sys.argv[1]).build(BuildContext("store", 1 << 20, None, 4))
keys = [b"0" * 32]
backend.put_from(keys, [aligned(1 << 20)])
begun = threading.Semaphore(0)

def read():
    buffer = aligned(1 << 20)
    while True:
        backend.get_into(keys, [buffer])
        begun.release()

for _ in range(3):
    threading.Thread(target=read, daemon=True).start()
for _ in range(20):
    begun.acquire()
print("reading")
"""


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Medium]:
    with MooncakeRig().start(tmp_path_factory.mktemp("mooncake")) as medium:
        yield medium


def opened(medium: Medium, context: BuildContext | None = None) -> MooncakeBackend:
    assert isinstance(medium.config, MooncakeConfig)
    return medium.config.build(context or BuildContext("store", OBJECT, None, 4))


@pytest.fixture(scope="module")
def cleaner(medium: Medium) -> Iterator[MooncakeBackend]:
    backend = opened(medium)
    yield backend
    backend.close()


@pytest.fixture
def backend(cleaner: MooncakeBackend) -> Iterator[MooncakeBackend]:
    """One for several tests: leaving a cluster takes Mooncake a second."""
    yield cleaner
    cleaner.clear()


@pytest.fixture
def fresh(medium: Medium, cleaner: MooncakeBackend) -> Iterator[MooncakeBackend]:
    """One that a test may change or close."""
    backend = opened(medium)
    yield backend
    backend.close()
    cleaner.clear()


class TestMooncake(StorageBackendTests):
    @pytest.fixture
    def open_backend(self, medium: Medium, cleaner: MooncakeBackend) -> Iterator[OpenBackend]:
        self.medium = medium
        yield lambda context: opened(medium, context)
        cleaner.clear()

    def elsewhere(self) -> OpenBackend:
        assert isinstance(self.medium.config, MooncakeConfig)
        return self.medium.config.model_copy(update={"prefix": "elsewhere"}).build


def objects(count: int, nbytes: int = OBJECT) -> tuple[list[ChunkKey], list[memoryview]]:
    keys = [key_of(i) for i in range(count)]
    return keys, [new_object(key, nbytes) for key in keys]


@pytest.mark.parametrize("registered", [True, False], ids=["registered", "staged"])
def test_memory_that_must_be_registered(fresh: MooncakeBackend, registered: bool) -> None:
    """As RDMA wants it: registered slots directly, anything else through registered buffers of our own."""
    fresh.staged = True
    slot = round_up(OBJECT)
    arena = aligned(16 * slot)
    if registered:
        fresh.register(Region(*_place(arena), arena))
    slots = [arena[i * slot : (i + 1) * slot] for i in range(16)]
    keys, sealed = objects(8, OBJECT - 1)
    for here, obj in zip(slots, sealed, strict=False):
        here[: len(obj)] = obj
    assert fresh.put_from(keys, [here[: OBJECT - 1].toreadonly() for here in slots[:8]]) == [None] * 8
    wrong: list[int] = []

    def read(some: list[int]) -> None:
        for _ in range(10):
            got = fresh.get_into([keys[i] for i in some], [slots[8 + i] for i in some])
            wrong.extend(i for i, n in zip(some, got, strict=True) if n != OBJECT - 1 or slots[8 + i][:n] != sealed[i])

    threads = [threading.Thread(target=read, args=([i, i + 4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_key_twice_in_one_call(backend: MooncakeBackend) -> None:
    """Mooncake itself reports success for both buffers and fills one."""
    keys, sealed = objects(2)
    assert backend.put_from([keys[0], keys[1], keys[0]], [sealed[0], sealed[1], sealed[0]]) == [None] * 3
    buffers = [aligned(round_up(OBJECT)) for _ in range(4)]
    assert backend.get_into([keys[0], keys[1], keys[0], key_of(99)], buffers) == [OBJECT, OBJECT, OBJECT, None]
    assert [buffer[:OBJECT] for buffer in buffers[:3]] == [sealed[0], sealed[1], sealed[0]]


def test_delete_does_not_wait_for_leases(medium: Medium, backend: MooncakeBackend) -> None:
    """What any process read a moment ago is under a lease; deleted is deleted, and a new object takes the key."""
    keys, sealed = objects(1)
    other = opened(medium)
    try:
        assert backend.put_from(keys, sealed) == [None]
        assert other.get_into(keys, [aligned(round_up(OBJECT))]) == [OBJECT]
        backend.delete(keys)
        newer = new_object(keys[0], OBJECT - 4096, seed=1)
        assert backend.put_from(keys, [newer]) == [None]
        buffer = aligned(round_up(OBJECT))
        assert other.get_into(keys, [buffer]) == [len(newer)]
        assert buffer[: len(newer)] == newer
    finally:
        other.close()


def test_clear_removes_its_own_prefix_only(medium: Medium) -> None:
    assert isinstance(medium.config, MooncakeConfig)
    keys, sealed = objects(2)
    context = BuildContext("store", OBJECT, None, 4)
    backends = [medium.config.model_copy(update={"prefix": prefix}).build(context) for prefix in ("lm.a", "lmXa")]
    try:
        for backend in backends:
            assert backend.put_from(keys, sealed) == [None, None]
        for cleared, clearing in enumerate(backends, 1):
            clearing.clear()
            assert [backend.contains(keys) == [True, True] for backend in backends] == [i >= cleared for i in range(2)]
    finally:
        for backend in backends:
            backend.close()


def test_a_retired_client_is_replaced(fresh: MooncakeBackend) -> None:
    """Under traffic: calls meanwhile are refused, none is cut off, and registered memory is registered again."""
    keys, sealed = objects(4)
    fresh.staged = True
    arena = aligned(4 * round_up(OBJECT))
    fresh.register(Region(*_place(arena), arena))
    assert fresh.put_from(keys, sealed) == [None] * 4
    slots = [arena[i * round_up(OBJECT) :][: round_up(OBJECT)] for i in range(4)]
    stop = threading.Event()
    wrong: list[object] = []

    def read(i: int) -> None:
        while not stop.is_set():
            try:
                (got,) = fresh.get_into([keys[i]], [slots[i]])
            except BackendUnavailable:
                continue
            if got != OBJECT or slots[i][:OBJECT] != sealed[i]:
                wrong.append(got)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        with fresh._client.calling() as store:
            pass
        fresh._client.retire(store)
        _eventually(lambda: fresh.contains(keys) == [True] * 4)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_full_cluster_says_no_space(medium: Medium, backend: MooncakeBackend) -> None:
    """An object larger than all nodes together finds no room however much Mooncake evicts."""
    huge = memoryview(mmap.mmap(-1, 4 << 30))  # never touched
    (result,) = backend.put_from([key_of(1)], [huge])
    assert isinstance(result, NoSpace) and "NO_AVAILABLE_HANDLE (-200)" in str(result)


def test_after_close_calls_are_refused(fresh: MooncakeBackend) -> None:
    """Calling a closed client of Mooncake's would end the process."""
    fresh.close()
    with pytest.raises(Closed):
        fresh.contains([key_of(1)])


def test_a_process_may_end_without_closing(medium: Medium) -> None:
    """With threads inside the library, which aborts a process that ends under them."""
    assert isinstance(medium.config, MooncakeConfig)
    done = subprocess.run(
        [sys.executable, "-c", UNTIDY, medium.config.master], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "reading\n"), done.stderr


def test_no_master(unused_port: int) -> None:
    """A moment, not the minute and a half that Mooncake itself would try."""
    begin = monotonic()
    with pytest.raises(BackendUnavailable, match=rf"127\.0\.0\.1:{unused_port} cannot be reached.*mooncake_master"):
        MooncakeConfig(master=f"127.0.0.1:{unused_port}").build(BuildContext("store", OBJECT, None, 1))
    assert monotonic() - begin < 5


def test_configuration() -> None:
    assert Plugins().backend("mooncake") is MooncakeConfig
    config = MooncakeConfig.model_validate({"master": "store.example:50051", "global_segment_size": "4GiB"})
    assert config.global_segment_size == 4 << 30 and not config.in_memory
    context = BuildContext("store", OBJECT, None, 4)
    assert config.memory_bytes(context) == 0
    assert config.model_copy(update={"protocol": "rdma"}).memory_bytes(context) == 4 * round_up(OBJECT)
    MooncakeConfig(master="etcd://a:2379;b:2379")
    MooncakeConfig(master="[::1]:50051")
    for wrong in ("store.example", "store.example:", "host:99999", "http://", ""):
        with pytest.raises(ValidationError, match="host:port"):
            MooncakeConfig(master=wrong)
    for prefix in ("", "a/b", ".*", "a b", "(x)", "x" * 65):
        with pytest.raises(ValidationError, match="prefix"):
            MooncakeConfig(master="host:1", prefix=prefix)


def test_memory_of_this_process(tmp_path: Path) -> None:
    """A cluster of the master and this process alone; what it contributed leaves with it."""
    with Cluster(tmp_path) as cluster:
        cluster.start_master()
        config = MooncakeConfig(master=cluster.address, global_segment_size=64 << 20, soft_pin=True)
        context = BuildContext("store", OBJECT, None, 1)
        keys, sealed = objects(3)
        backend = config.build(context)
        try:
            assert backend.put_from(keys, sealed) == [None] * 3
            buffers = [aligned(round_up(OBJECT)) for _ in keys]
            assert backend.get_into(keys, buffers) == [OBJECT] * 3
            assert [buffer[:OBJECT] for buffer in buffers] == sealed
        finally:
            backend.close()
        backend = MooncakeConfig(master=cluster.address).build(context)
        try:
            assert backend.contains(keys) == [False] * 3
        finally:
            backend.close()


def test_codes_have_names() -> None:
    assert code_name(-800) == "TRANSFER_FAIL (-800)"
    assert code_name(-12345) == "code (-12345)"


def test_a_rig_leaves_nothing_behind(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_master()
        cluster.start_nodes()
    assert cluster.master.returncode is not None and cluster.nodes[0].returncode is not None
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", cluster.port), 1).close()


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port that nobody listens on, kept from everybody else."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def _place(view: memoryview) -> tuple[int, int]:
    return int(np.frombuffer(view, np.uint8).ctypes.data), len(view)


def _eventually(reached: Callable[[], bool], seconds: float = 20.0) -> None:
    end = monotonic() + seconds
    while True:
        with suppress(BackendUnavailable):
            if reached():
                return
        assert monotonic() < end, "did not happen"
        sleep(0.01)
