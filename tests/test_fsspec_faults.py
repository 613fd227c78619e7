"""N6: object stores that fail in every way there is. A miss or a drop each time, never a wrong byte, never late."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from time import monotonic, sleep

import pytest
from conftest import BuildPipeline
from faults import fake_s3 as s3
from faults.fake_s3 import FakeS3, Fault
from lmcache_backend_s3 import S3Config
from media import served, store, tier

from lmcache_backends.fsspec_store import FsspecConfig
from lmcache_core.config import LaneConfig
from lmcache_core.errors import BackendUnavailable
from lmcache_core.protocols import BackendConfig, BuildContext, StorageBackend
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import aligned
from lmcache_core.testing.storage import key_of, new_object
from lmcache_core.types import ChunkKey

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("quick_breaker")]

DEADLINE_S = 0.6
SLACK_S = 0.5
"""Two cores, and others on them."""

LANE = LaneConfig(threads=2, deadline=DEADLINE_S, lookup_deadline=DEADLINE_S)

READS: dict[str, tuple[Fault, bool]] = {
    "500": (s3.status(500, "InternalError"), False),
    "503 SlowDown": (s3.status(503, "SlowDown"), False),
    "429": (s3.status(429, "TooManyRequests"), False),
    "403": (s3.status(403, "AccessDenied"), False),
    "404 behind a HEAD that saw it": (s3.lagging, False),
    "truncated, status 200": (s3.truncated, False),
    "header page only": (s3.beginning_only, False),
    "empty": (s3.empty, False),
    "too long": (s3.too_long, False),
    "a flipped bit": (s3.flipped, False),
    "another object": (s3.misdirected, False),
    "reset in the body": (s3.cut_off, False),
    "reset": (s3.reset, False),
    "no HTTP": (s3.garbage, False),
    "hang": (s3.hang, False),
    "hang in the body": (s3.hang_in_body, False),
    "byte by byte": (s3.trickle, False),
    "wrong ETag": (s3.wrong_etag, True),
}
"""Fault -> whether the chunk may be served all the same."""

WRITES: dict[str, Fault] = {
    "500": s3.status(500, "InternalError"),
    "503 SlowDown": s3.status(503, "SlowDown"),
    "403": s3.status(403, "AccessDenied"),
    "507": s3.status(507, "InsufficientStorage"),
    "reset": s3.reset,
    "no HTTP": s3.garbage,
    "hang": s3.hang,
    "success lost": s3.success_lost,
    "wrong ETag": s3.wrong_etag,
    "torn": s3.torn,
    "dropped": s3.dropped,
}


@pytest.fixture
def server() -> Iterator[FakeS3]:
    with s3.fake_s3() as server:
        yield server
    gc.collect()  # s3fs closes its sessions when they are collected: here, not in another test


def through_obstore(server: FakeS3) -> BackendConfig:
    options = {"key": "a", "secret": "b", "endpoint_url": server.endpoint}
    return FsspecConfig(url="s3://bucket/kv", storage_options=options)


def through_s3fs(server: FakeS3) -> BackendConfig:
    options = {"key": "a", "secret": "b", "endpoint_url": server.endpoint}
    return FsspecConfig(url="s3://bucket/kv", storage_options=options, client="fsspec")


def the_plugin(server: FakeS3) -> BackendConfig:
    keys = {"access_key_id": "a", "secret_access_key": "b"}
    return S3Config(url="s3://bucket/kv", endpoint=server.endpoint, allow_http=True, **keys)


Configure = Callable[[FakeS3], BackendConfig]
CLIENTS = [through_obstore, the_plugin]
fast_client = pytest.mark.parametrize("configure", CLIENTS)


def until_served(pipeline: object, keys: list[ChunkKey]) -> None:
    """Store and read until all of it comes from the store: breakers close again by themselves."""
    end = monotonic() + 20
    while True:
        pipeline.clear("dram")  # type: ignore[attr-defined]
        store(pipeline, keys)  # type: ignore[arg-type]
        settle(pipeline)  # type: ignore[arg-type]
        pipeline.clear("dram")  # type: ignore[attr-defined]
        if served(pipeline, keys) == len(keys):  # type: ignore[arg-type]
            return
        assert monotonic() < end, "the tier did not recover"
        sleep(0.02)


ASKED = ("500", "503 SlowDown", "403", "404 behind a HEAD that saw it", "reset", "no HTTP", "hang", "wrong ETag")
SLOW_CLIENT = ("500", "503 SlowDown", "truncated, status 200", "reset in the body", "hang in the body", "wrong ETag")
"""One of each kind for s3fs, which repeats what failed as often as the deadline allows."""

READ_CASES = [
    *((client, "GET", name) for client in CLIENTS for name in READS),
    *((client, "HEAD", name) for client in CLIENTS for name in ASKED),
    *((through_s3fs, "GET", name) for name in SLOW_CLIENT),
]


@pytest.mark.parametrize("configure, verb, name", READ_CASES)
def test_reads(
    name: str, verb: str, configure: Configure, server: FakeS3, pipelines: BuildPipeline, keys: list[ChunkKey]
) -> None:
    pipeline = pipelines(tier(backend=configure(server), lane=LANE))
    until_served(pipeline, keys[:4])
    assert len(server.objects) == 4
    pipeline.clear("dram")
    fault, harmless = READS[name]
    server.faults[verb] = fault
    began = monotonic()
    count = served(pipeline, keys[:4])
    took = monotonic() - began
    assert server.hit[verb] > 0
    assert harmless or verb == "HEAD" or count == 0
    assert took < 2 * DEADLINE_S + SLACK_S  # asking, and then reading
    server.recover()
    settle(pipeline)
    until_served(pipeline, keys[:4])


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("configure, capacity", [(through_obstore, 1 << 20), (the_plugin, None)])
def test_writes(
    configure: Configure,
    capacity: int | None,
    name: str,
    server: FakeS3,
    pipelines: BuildPipeline,
    keys: list[ChunkKey],
) -> None:
    """The engine's store ends at once; what the server kept of it is whole, or no hit."""
    pipeline = pipelines(tier(backend=configure(server), lane=LANE, capacity=capacity))
    server.faults["PUT"] = WRITES[name]
    began = monotonic()
    assert store(pipeline, keys[:4]) == 4
    assert monotonic() - began < SLACK_S
    settle(pipeline)
    assert monotonic() - began < 2 * DEADLINE_S + SLACK_S
    assert server.hit["PUT"] > 0
    pipeline.clear("dram")
    served(pipeline, keys[:4])
    server.recover()
    settle(pipeline)
    until_served(pipeline, keys[:4])


@fast_client
@pytest.mark.parametrize("fault", [s3.hang, s3.hang_in_body, s3.trickle], ids=["hang", "in the body", "byte by byte"])
def test_a_call_ends_within_the_deadline(configure: Configure, fault: Fault, server: FakeS3) -> None:
    """All its keys together, more of them than run at once; and nobody writes into a buffer afterwards."""
    backend = (
        configure(server).model_copy(update={"concurrency": 2}).build(BuildContext("t", 8192, None, 4, False, 0.5))
    )
    assert isinstance(backend, StorageBackend)
    try:
        keys = [key_of(i) for i in range(6)]
        assert backend.put_from(keys, [new_object(key, 8192) for key in keys]) == [None] * 6
        server.faults["GET"] = fault
        buffers = [aligned(8192) for _ in keys]
        began = monotonic()
        results = backend.get_into(keys, buffers)
        assert monotonic() - began < 0.5 + SLACK_S
        assert all(isinstance(result, Exception) for result in results)
        before = [bytes(buffer) for buffer in buffers]
        server.recover()
        assert backend.contains(keys) == [True] * 6
        assert [bytes(buffer) for buffer in buffers] == before
        assert backend.get_into(keys, buffers) == [8192] * 6
    finally:
        backend.close()


@fast_client
def test_a_put_that_hangs_lets_its_buffers_go(configure: Configure, server: FakeS3) -> None:
    """The client holds no view of them when the call has ended: they can be closed."""
    backend = configure(server).build(BuildContext("t", 1 << 20, None, 4, False, 0.5))
    assert isinstance(backend, StorageBackend)
    try:
        server.faults["PUT"] = s3.hang
        buffer = new_object(key_of(1), 1 << 20)
        began = monotonic()
        (result,) = backend.put_from([key_of(1)], [buffer])
        assert monotonic() - began < 0.5 + SLACK_S
        assert isinstance(result, Exception)
        assert "let go" not in str(result)
        buffer.release()  # raises while a view of it is used
    finally:
        backend.close()


@fast_client
def test_listings_that_lag_or_fail(
    configure: Configure, server: FakeS3, pipelines: BuildPipeline, keys: list[ChunkKey]
) -> None:
    """An object that is not listed at start-up is unknown, not wrong; a listing that fails stops the start."""
    first = pipelines(tier(backend=configure(server), lane=LANE, capacity=1 << 20))
    store(first, keys[:4])
    settle(first)
    first.close()
    server.faults["LIST"] = s3.lagging
    second = pipelines(tier(backend=configure(server), lane=LANE, capacity=1 << 20))
    assert served(second, keys[:4]) == 0
    store(second, keys[:4])
    settle(second)
    second.clear("dram")
    assert served(second, keys[:4]) == 4
    server.recover()
    third = pipelines(tier(backend=configure(server), lane=LANE, capacity=1 << 20))
    assert served(third, keys[:4]) == 4


@fast_client
@pytest.mark.parametrize("fault", [s3.status(403, "AccessDenied"), s3.hang, s3.garbage], ids=["403", "hang", "no HTTP"])
def test_a_store_that_cannot_be_used_stops_the_start(configure: Configure, fault: Fault, server: FakeS3) -> None:
    server.faults = dict.fromkeys(("GET", "HEAD", "LIST"), fault)
    began = monotonic()
    with pytest.raises(BackendUnavailable, match="tier `cold`"):
        configure(server).build(BuildContext("cold", 8192, None, 4, False, 0.6))
    assert monotonic() - began < 2 * 0.6 + SLACK_S
