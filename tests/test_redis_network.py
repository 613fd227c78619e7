"""The network between us and a Redis server fails in every way a proxy can think of, and servers freeze."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from typing import Any

import pytest
from chunks import keys, serve, store, tier
from conftest import BuildPipeline
from faults.proxy import FaultProxy, Faults
from redis_servers import build, client, configure, poll, tracked, untracked

from lmcache_backends.redis_store import RedisConfig
from lmcache_backends.redis_store.backend import RedisBackend
from lmcache_backends.redis_store.rig import Server
from lmcache_backends.redis_store.wire import Link
from lmcache_core.config import LaneConfig
from lmcache_core.errors import BackendError
from lmcache_core.layout import KVLayout
from lmcache_core.testing.memory import aligned
from lmcache_core.types import ChunkKey

pytestmark = pytest.mark.timeout(120)

SLACK_S = 0.05
"""How much longer than its deadline a call may take on a busy machine."""
LAYOUT = KVLayout("lknhd", "bfloat16", 2, 2, 1, 64, chunk_tokens=16, block_tokens=4)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(autouse=True)
def empty(server: Server) -> None:
    with client(server) as ask:
        ask.flushall()


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    with FaultProxy(("127.0.0.1", server.port)) as proxy:
        yield proxy


@pytest.fixture
def config(proxy: FaultProxy) -> RedisConfig:
    return RedisConfig(url=f"redis://127.0.0.1:{proxy.port}", track=False, part_bytes=4096)


def small(config: RedisConfig, deadline: float = 5.0, spare: int = 0) -> RedisBackend:
    """A backend that cuts objects of 150 bytes into three pieces, so that every byte of an exchange can be the last."""
    backend = RedisBackend(
        config.target(),
        prefix="s:",
        ttl=None,
        part_bytes=154,
        connections=2 + spare,
        spare=spare,
        timeout=deadline / 2,
        deadline=deadline,
        track_keys=0,
    )
    backend.check()
    return backend


KEY = keys(1)[0]
BYTES = bytes(range(150))


def write(backend: RedisBackend) -> list[Exception | None]:
    return backend.put_from([KEY], [memoryview(BYTES)])


def read(backend: RedisBackend) -> bytes | None:
    """The object. Raise what prevented that."""
    buffer = aligned(4096)
    (got,) = backend.get_into([KEY], [buffer])
    if isinstance(got, Exception):
        raise got
    return None if got is None else bytes(buffer[:got])


def open_three(backend: RedisBackend) -> None:
    """Three connections, so that a put of three pieces uses one for each."""
    (address,) = backend.servers.masters(monotonic() + 5)
    links: list[Link] = []
    while len(links) < 3:
        with backend.servers.links(address, monotonic() + 5, 3) as links:
            sleep(0.001)


EXCHANGES: dict[str, Callable[[RedisBackend], Any]] = {
    "put": write,
    "put on three": write,
    "get": read,
    "contains": lambda backend: backend.contains([KEY]),
    "delete": lambda backend: backend.delete([KEY]),
}


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("name", EXCHANGES)
def test_a_reset_at_every_byte(proxy: FaultProxy, server: Server, config: RedisConfig, name: str, way: str) -> None:
    """Whole or nothing, for the caller and for whoever reads afterwards; and the next call works."""
    straight = small(RedisConfig(url=f"redis://127.0.0.1:{server.port}"))
    call = EXCHANGES[name]
    spare = 2 if name == "put on three" else 0
    backend = small(config, spare=spare)
    put = name.startswith("put")
    step = 3 if spare else 1
    offset, failed = 0, 0
    try:
        while True:
            if not put or offset % 2:
                assert write(straight) == [None]
            else:
                straight.delete([KEY])
            if spare:
                open_three(backend)
            assert backend.contains([KEY]) is not None  # a connection is open: none of the bytes go to opening one
            proxy.faults = Faults(reset_up=offset) if way == "up" else Faults(reset_down=offset)
            answer: Any = None
            try:
                answer = call(backend)
                broken = put and answer[0] is not None
            except BackendError:
                broken = True
            whole = proxy.moved("up" if way == "up" else "down") < offset
            proxy.heal()
            failed += broken
            if not broken:
                match name:
                    case "get":
                        assert answer == BYTES
                    case "contains":
                        assert answer == [True]
                    case "put" | "put on three":
                        assert read(straight) == BYTES
                    case "delete":
                        assert read(straight) is None
            assert read(straight) in (BYTES, None)
            if whole:
                break
            offset += step
    finally:
        backend.close()
        straight.close()
    assert failed * step >= offset - 24, "all but the last bytes matter"
    assert offset > {"up": 80, "down": 4}[way], f"only {offset} bytes went {way}"
    with client(server) as ask:
        heads, pieces = (list(ask.scan_iter(match=f"s:{kind}:*")) for kind in "op")
        kept = [piece for piece in pieces if ask.ttl(piece) < 0]
        assert len(kept) == 2 * len(heads), "pieces that nobody will ever delete"


def test_bytes_one_by_one(proxy: FaultProxy, config: RedisConfig) -> None:
    backend = small(config)
    proxy.faults = Faults(slice_bytes=1)
    for _ in range(3):
        assert write(backend) == [None]
        assert backend.contains([KEY, *keys(3)]) == [True, True, False, False]
        assert read(backend) == BYTES
    backend.delete([KEY])
    assert read(backend) is None
    assert backend.servers.opened == 1
    backend.close()


def test_latency_is_paid_once_for_many_keys(proxy: FaultProxy, config: RedisConfig) -> None:
    backend = small(config)
    proxy.faults = Faults(latency_s=0.02)
    start = monotonic()
    assert backend.contains(keys(1000)) == [False] * 1000
    assert monotonic() - start < 0.5, "1000 keys in one round trip"
    backend.close()


FROZEN = {
    "silent": lambda proxy, server: setattr(proxy, "faults", Faults(silent=True)),
    "slow": lambda proxy, server: setattr(proxy, "faults", Faults(bandwidth=20_000)),
    "late": lambda proxy, server: setattr(proxy, "faults", Faults(latency_s=3.0)),
    "stopped": lambda proxy, server: server.freeze(),
    "paused": lambda proxy, server: pause(server),
}


def pause(server: Server) -> None:
    with client(server) as ask:
        ask.execute_command("CLIENT", "PAUSE", "2000", "ALL")


def heal(proxy: FaultProxy, server: Server) -> None:
    server.thaw()
    proxy.heal()
    with client(server) as ask:
        ask.ping()


@pytest.mark.parametrize("fault", FROZEN)
@pytest.mark.parametrize("connected", [True, False])
def test_calls_end_by_their_deadline(
    proxy: FaultProxy, server: Server, config: RedisConfig, fault: str, connected: bool
) -> None:
    """Whatever is frozen, connections are bounded, and after the thaw everything works without a restart."""
    deadline, nbytes = 0.4, 100_000
    backend = build(configure(config, connections=2), deadline=deadline)
    buffers = [aligned(nbytes) for _ in range(4)]
    some = keys(4)
    poll(lambda: backend.put_from(some, buffers) == [None] * 4)
    if not connected:
        proxy.reset_all()
    late: list[float] = []
    try:
        FROZEN[fault](proxy, server)
        for call in (
            lambda: backend.contains(some),
            lambda: backend.get_into(some, buffers),
            lambda: backend.put_from(some, buffers),
            lambda: backend.delete(some[:1]),
        ):
            start = monotonic()
            try:
                results = call() or []
            except BackendError as error:
                results = [error]
            late.append(monotonic() - start - deadline)
            assert any(isinstance(result, Exception) for result in results) or fault == "slow"
        assert max(late) <= SLACK_S, late
        assert backend.servers.opened <= 2 and proxy.open <= 4
    finally:
        heal(proxy, server)
    poll(lambda: not outcome_of(lambda: backend.contains(some)))
    poll(lambda: backend.put_from(some, buffers) == [None] * 4)
    poll(lambda: backend.get_into(some, buffers) == [nbytes] * 4)
    backend.close()


@pytest.mark.usefixtures("quick_breaker")
def test_an_engine_waits_for_a_frozen_server_no_longer_than_it_said(pipelines: BuildPipeline, server: Server) -> None:
    """The deadline and 5 ms, every time. What sleepers in the same process oversleep meanwhile is the machine's."""
    deadline, chunks, others = 0.15, keys(4), keys(4, 100)
    config = RedisConfig(url=f"redis://127.0.0.1:{server.port}", part_bytes=4096, timeout=5.0)
    lane = LaneConfig(threads=4, deadline=deadline)
    pipeline = pipelines(tier("redis", backend=config, lane=lane), layout=LAYOUT, slots=4)

    def only_in_redis() -> bool:
        store(pipeline, chunks)
        store(pipeline, others)  # memory holds four
        return pipeline.flush(10) and pipeline.lookup(chunks).sources == ["redis"] * 4

    late: list[float] = []
    overslept: list[float] = []

    def sleeper() -> None:
        start = monotonic()
        threading.Event().wait(deadline)
        overslept.append(monotonic() - start - deadline)

    for _ in range(12):
        poll(only_in_redis)
        sleepers = [threading.Thread(target=sleeper) for _ in range(3)]
        server.freeze()
        try:
            for thread in sleepers:
                thread.start()
            start = monotonic()
            with pipeline.retrieve(chunks) as lease:
                late.append(monotonic() - start - deadline)
                assert len(lease) == 0
        finally:
            server.thaw()
        for thread in sleepers:
            thread.join()
    assert max(late) > -deadline / 2, "it was waited for"
    assert max(late) <= 0.005 + max(overslept), (sorted(late)[-3:], sorted(overslept)[-3:])


def outcome_of(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except BackendError as error:
        return error
    return None


def test_a_crowd_before_a_silent_server(proxy: FaultProxy, config: RedisConfig) -> None:
    """More callers than connections: all end in time, and no connection is opened beyond the bound."""
    backend = build(configure(config, connections=3), deadline=0.3)
    proxy.reset_all()
    proxy.faults = Faults(silent=True)
    took: list[float] = []

    def ask() -> None:
        for _ in range(3):
            start = monotonic()
            assert outcome_of(lambda: backend.contains(keys(2)))
            took.append(monotonic() - start)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(took) == 36 and max(took) <= 0.3 + 2 * SLACK_S
    assert backend.servers.opened <= 3
    start = monotonic()
    backend.close()
    assert monotonic() - start < 1.0, "closing waits for nobody"


def test_the_list_of_keys_survives_its_connection(proxy: FaultProxy, config: RedisConfig, server: Server) -> None:
    """While it is lost servers are asked; then it is filled anew, with what changed meanwhile."""
    backend = tracked(build(configure(config, track=True)))
    other = build(RedisConfig(url=f"redis://127.0.0.1:{server.port}", track=False, part_bytes=4096))
    some = keys(3)
    obj = aligned(8192)
    try:
        assert other.put_from(some[:1], [obj]) == [None]
        poll(lambda: backend.contains(some) == [True, False, False])
        proxy.faults = Faults(refuse=True)
        proxy.reset_all()
        untracked(backend)
        assert other.put_from(some[1:2], [obj]) == [None]
        other.delete(some[:1])
        assert outcome_of(lambda: backend.contains(some)), "it would rather not know than be wrong"
        proxy.heal()
        poll(lambda: not outcome_of(lambda: backend.contains(some)))
        assert backend.contains(some) == [False, True, False]
        tracked(backend)
        assert backend.contains(some) == [False, True, False]
        with client(server) as ask:
            ask.flushall()
        poll(lambda: backend.contains(some) == [False] * 3)
    finally:
        backend.close()
        other.close()


def test_a_silent_connection_of_the_list_is_noticed(proxy: FaultProxy, config: RedisConfig) -> None:
    backend = tracked(build(configure(config, track=True), deadline=1.0))
    proxy.faults = Faults(silent=True)
    poll(lambda: not backend.contains_is_local, 10)
    proxy.heal()
    tracked(backend)
    backend.close()


@pytest.mark.usefixtures("quick_breaker")
def test_a_bad_network_under_a_pipeline(pipelines: BuildPipeline, proxy: FaultProxy, config: RedisConfig) -> None:
    """Every fault in turn, with traffic: no wrong byte, the engine never waits long, and it recovers by itself."""
    lane = LaneConfig(threads=2, deadline=0.4)
    pipeline = pipelines(tier("redis", backend=configure(config, track=True), lane=lane), layout=LAYOUT, slots=8)
    faults = [
        Faults(),
        Faults(latency_s=0.002),
        Faults(slice_bytes=100),
        Faults(reset_up=5000),
        Faults(reset_down=5000),
        Faults(silent=True),
        Faults(bandwidth=125_000),
        Faults(refuse=True),
    ]
    longest, total = 0.0, 0
    chunks: list[list[ChunkKey]] = [keys(4, 10 * n) for n in range(6)]
    for fault in faults:
        proxy.faults = fault
        for some in chunks:
            start = monotonic()
            store(pipeline, some)
            longest = max(longest, monotonic() - start)
            total += serve(pipeline, chunks[0]).count("redis")
    assert longest < 0.2, "a store never waits"
    proxy.heal()
    fresh = keys(4, 900)

    def back() -> bool:
        store(pipeline, fresh)
        pipeline.flush(1)
        for some in chunks:
            store(pipeline, some)
        return serve(pipeline, fresh) == ["redis"] * 4

    poll(back)
