"""A pipeline over media that misbehave: every fault is a miss or a drop with a reason, and nothing is left held."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pytest
from conftest import BuildPipeline

from lmcache_core import slots as slots_module
from lmcache_core.config import LaneConfig, TierConfig
from lmcache_core.errors import BackendError, CorruptChunk
from lmcache_core.identity import Identity
from lmcache_core.keys import chunk_keys
from lmcache_core.pipeline import Pipeline, Reservation
from lmcache_core.protocols import Serde, SerdeConfig, SerdeContext
from lmcache_core.testing.faults import METHODS, FaultInjector, Rates
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import DictConfig
from lmcache_core.types import ChunkKey, MissReason

pytestmark = pytest.mark.timeout(60)

SLOW = LaneConfig(threads=1, deadline=30.0)
QUICK = LaneConfig(threads=1, deadline=0.05)


def chunk(key: ChunkKey, nbytes: int) -> bytes:
    """The bytes that belong to a key in these tests."""
    return (key * (nbytes // len(key) + 1))[:nbytes]


def fill(keys: Sequence[ChunkKey]) -> Any:
    def write(reservation: Reservation) -> None:
        for i, position in enumerate(reservation.positions):
            view = reservation.view(i)
            view[:] = chunk(keys[position], len(view))

    return write


def store(pipeline: Pipeline, keys: Sequence[ChunkKey]) -> int:
    return pipeline.store(keys, fill(keys))


def served(pipeline: Pipeline, keys: Sequence[ChunkKey], timeout: float | None = None) -> int:
    """Retrieve and check every byte; the number of chunks that came."""
    with pipeline.retrieve(keys, timeout) as lease:
        for i, key in enumerate(lease.keys):
            assert bytes(lease.view(i)) == chunk(key, pipeline.layout.chunk_bytes)
        assert (lease.reason is None) == (len(lease) == len(keys))
        return len(lease)


def tier(name: str = "store", **options: Any) -> TierConfig:
    options.setdefault("backend", DictConfig())
    return TierConfig(name=name, **options)


@pytest.fixture
def keys(identity: Identity) -> list[ChunkKey]:
    return chunk_keys(identity, range(16 * 40))


def test_reads_queued_behind_a_hang_expire(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    """A queued read whose time is over is cancelled by the next fetch, which must not wait for its own lock."""
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(lane=QUICK), injector=injector)
    store(pipeline, keys[:6])
    settle(pipeline)
    pipeline.clear("dram")
    injector["store"].hold("get_into")
    first = pipeline.fetch(keys[:1])
    injector["store"].wait_held()
    second = pipeline.fetch(keys[1:2])
    assert first.wait() and second.wait()
    third = pipeline.fetch(keys[2:3])
    assert [len(t.result()) for t in (first, second)] == [0, 0]
    assert third.result().reason in (MissReason.DEADLINE, MissReason.BREAKER)
    assert pipeline.stats()["misses"][MissReason.DEADLINE] >= 2


def test_writes_queued_behind_a_hang_expire(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(lane=QUICK), injector=injector, slots=16)
    injector["store"].hold("put_from")
    store(pipeline, keys[:1])
    injector["store"].wait_held()
    store(pipeline, keys[1:2])
    threading.Event().wait(0.1)
    store(pipeline, keys[2:3])
    assert pipeline.stats()["tiers"]["store"]["dropped_deadline"] >= 1
    assert served(pipeline, keys[:3]) == 3
