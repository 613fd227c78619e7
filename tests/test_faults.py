"""A pipeline over media that misbehave: every fault is a miss or a drop with a reason, and nothing is left held."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Literal

import pytest
from conftest import BuildPipeline
from media import PATIENT, chunk, fill, served, store, tier

from lmcache_core import slots as slots_module
from lmcache_core.config import LaneConfig
from lmcache_core.errors import BackendError, CorruptChunk
from lmcache_core.lanes import Breaker
from lmcache_core.protocols import Serde, SerdeConfig, SerdeContext
from lmcache_core.testing.faults import METHODS, FaultInjector, Rates
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import DictConfig
from lmcache_core.types import ChunkKey, MissReason

pytestmark = pytest.mark.timeout(60)

QUICK = LaneConfig(threads=1, deadline=0.05)


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


def test_a_hung_load_is_a_gap_not_a_wait(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    """A key whose read is overdue is missing at once for the next request, can be stored again, and is served then."""
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(lane=QUICK), injector=injector)
    store(pipeline, keys[:3])
    settle(pipeline)
    pipeline.clear("dram")
    injector["store"].hold("get_into")
    first = pipeline.fetch(keys[:3])
    injector["store"].wait_held()
    assert first.result().reason is MissReason.DEADLINE
    hit = pipeline.lookup(keys[:3])
    assert hit.count == 0 and hit.reason is MissReason.DEADLINE
    second = pipeline.fetch(keys[:3])
    assert second.done
    assert second.result().reason is MissReason.DEADLINE
    assert store(pipeline, keys[:3]) == 3
    assert served(pipeline, keys[:3]) == 3
    injector.release()
    settle(pipeline)
    assert served(pipeline, keys[:3]) == 3


def test_a_store_and_a_load_of_one_key_at_once(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    """Whichever ends first stays; the other's slot comes back (it used to leak)."""
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(lane=PATIENT), injector=injector)
    store(pipeline, keys[:2])
    settle(pipeline)
    pipeline.clear("dram")

    reservation = pipeline.reserve(keys[:2])
    assert served(pipeline, keys[:2]) == 2
    fill(keys)(reservation)
    assert reservation.commit() == 0
    settle(pipeline)

    pipeline.clear("dram")
    reservation = pipeline.reserve(keys[:2])
    injector["store"].hold("get_into")
    transfer = pipeline.fetch(keys[:2])
    injector["store"].wait_held()
    fill(keys)(reservation)
    assert reservation.commit() == 2
    injector.release()
    with transfer.result() as lease:
        assert [bytes(lease.view(i)) for i in range(2)] == [chunk(key, 1024) for key in keys[:2]]
    settle(pipeline)
    assert pipeline.stats()["tiers"]["dram"]["ready"] == 2


def test_clear_forgets_what_waits_to_be_written(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    """A write queued before `clear` must not bring its chunk back afterwards."""
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(lane=PATIENT), injector=injector, slots=16)
    injector["store"].hold("put_from")
    store(pipeline, keys[:1])
    injector["store"].wait_held()
    store(pipeline, keys[1:2])
    pipeline.clear()
    assert store(pipeline, keys[2:3]) == 1
    injector.release()
    settle(pipeline)
    assert [pipeline.lookup([key]).count for key in keys[:3]] == [0, 0, 1]
    assert injector["store"].inner.contains(keys[:3]) == [False, False, True]


def test_clear_forgets_what_is_being_read(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    """While a tier is being cleared, nothing of it is served any more, and so nothing of it comes back."""
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(lane=PATIENT), injector=injector)
    store(pipeline, keys[:2])
    settle(pipeline)
    pipeline.clear("dram")
    injector["store"].hold("clear")
    clearing = threading.Thread(target=pipeline.clear)
    clearing.start()
    injector["store"].wait_held()
    assert served(pipeline, keys[:2]) == 0
    injector.release()
    clearing.join()
    assert pipeline.lookup(keys[:2]).count == 0
    assert served(pipeline, keys[:2]) == 0


def test_clear_tries_every_tier_and_says_what_failed(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    injector = FaultInjector({"near": Rates(), "far": Rates()})
    pipeline = pipelines(tier("near"), tier("far"), injector=injector)
    store(pipeline, keys[:2])
    settle(pipeline)
    injector["near"].fail["clear"] = OSError(5, "no")
    with pytest.raises(BackendError, match=r"near.*no"):
        pipeline.clear()
    assert pipeline.stats()["tiers"]["far"]["objects"] == 0
    assert pipeline.stats()["tiers"]["near"]["wiping"]
    assert served(pipeline, keys[:2]) == 0  # out of service: what was to be forgotten is not served
    injector["near"].fail.clear()
    pipeline.clear()
    assert store(pipeline, keys[:2]) == 2
    settle(pipeline)
    pipeline.clear("dram")
    with pipeline.retrieve(keys[:2]) as lease:
        assert lease.sources == ["near"] * 2


def test_cold_dirty_chunks_do_not_block_memory(
    pipelines: BuildPipeline, keys: list[ChunkKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the coldest chunks are all dirty, a store without room demotes them instead of failing for ever."""
    monkeypatch.setattr(slots_module, "_SCAN", 0)
    pipeline = pipelines(tier(write="back", lane=PATIENT), slots=8)
    store(pipeline, keys[:4])  # as many as may be dirty without demotion
    with pipeline.reserve(keys[4:8]):
        pass
    other = keys[4:8]
    store(pipeline, other)
    settle(pipeline)
    monkeypatch.setattr(pipeline._down, "dirty_limit", 8)
    store(pipeline, keys[8:12])
    with pipeline.retrieve(other):
        pass
    stored = 0
    for _ in range(3):
        stored += store(pipeline, keys[12:14])
        for lane in pipeline.tiers:
            lane.write_lane.drain(10)
    assert stored == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [RuntimeError("plugin bug"), SystemExit(3)], ids=["raises", "exits"])
@pytest.mark.parametrize("scannable", [True, False])
def test_a_backend_that_raises_everywhere(
    pipelines: BuildPipeline, keys: list[ChunkKey], method: str, error: BaseException, scannable: bool
) -> None:
    injector = FaultInjector({"store": Rates()})
    backend = DictConfig(scannable=scannable, local=False)
    lane = LaneConfig(threads=2, deadline=30.0, lookup_deadline=15.0)
    pipeline = pipelines(tier(backend=backend, lane=lane), injector=injector)
    store(pipeline, keys[:2])
    settle(pipeline)
    injector["store"].fail[method] = error
    for _ in range(2):
        assert served(pipeline, keys[:2]) == 2
        store(pipeline, keys[2:4])
        pipeline.stats()
        if method != "clear":
            pipeline.clear("dram")
        assert served(pipeline, keys[:2]) in (0, 2)
        store(pipeline, keys[:2])
        settle(pipeline)
    injector["store"].fail.clear()
    store_tier = pipeline.tiers[0]
    store_tier.ask_breaker, store_tier.read_lane.breaker, store_tier.write_lane.breaker = (
        Breaker(),
        Breaker(),
        Breaker(),
    )
    # The lanes are alive: the tier works again.
    pipeline.clear()
    store(pipeline, keys[:2])
    settle(pipeline)
    pipeline.clear("dram")
    assert served(pipeline, keys[:2]) == 2


FORGERIES: dict[str, list[Any]] = {
    "get_into": [
        lambda r: r[:-1], lambda r: [*r, None], lambda r: None, lambda r: ["1024"] * len(r), lambda r: [1.5] * len(r),
        lambda r: [-1] * len(r), lambda r: [1 << 62] * len(r), lambda r: [0] * len(r), lambda r: [True] * len(r),
        lambda r: [KeyboardInterrupt()] * len(r), lambda r: [CorruptChunk("made up")] * len(r), lambda r: iter(r),
    ],
    "put_from": [
        lambda r: r[:-1], lambda r: [*r, None], lambda r: None, lambda r: ["yes"] * len(r), lambda r: [True] * len(r),
        lambda r: [KeyboardInterrupt()] * len(r),
    ],
    "contains": [
        lambda r: r[:-1], lambda r: [*r, True], lambda r: None, lambda r: iter(r), lambda r: ["no"] * len(r),
    ],
    "footprint": [lambda n: "many", lambda n: None],
}  # fmt: skip


@pytest.mark.parametrize(
    "method, forged", [pytest.param(m, f, id=f"{m}-{i}") for m, all_ in FORGERIES.items() for i, f in enumerate(all_)]
)
def test_a_backend_that_returns_nonsense(
    pipelines: BuildPipeline, keys: list[ChunkKey], method: str, forged: Any
) -> None:
    injector = FaultInjector({"store": Rates()})
    backend = DictConfig(scannable=method != "contains", local=False)
    lane = LaneConfig(threads=1, deadline=30.0, lookup_deadline=15.0)
    pipeline = pipelines(tier(backend=backend, lane=lane), injector=injector)
    store(pipeline, keys[:2])
    settle(pipeline)
    injector["store"].forge[method] = forged
    pipeline.clear("dram")
    served(pipeline, keys[:3])
    store(pipeline, keys[:4])
    settle(pipeline)
    injector["store"].forge.clear()
    pipeline.clear()
    store(pipeline, keys[:2])
    settle(pipeline)
    pipeline.clear("dram")
    assert served(pipeline, keys[:2]) == 2


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("batch", [2, 8])
def test_a_tier_never_exceeds_its_capacity(
    pipelines: BuildPipeline, keys: list[ChunkKey], threads: int, batch: int
) -> None:
    """Neither a batch larger than the tier nor several writers at once may overdraw it."""
    objects: dict[ChunkKey, bytes] = {}
    injector = FaultInjector({"store": Rates(slow=1.0, slow_s=0.001)})
    capacity = 5 * (4096 + 1024) + 100
    config = tier(
        backend=DictConfig(objects=objects), capacity=capacity, lane=LaneConfig(threads=threads, deadline=30.0)
    )
    pipeline = pipelines(config, injector=injector, slots=40)
    most: list[int] = []

    def measure(results: list[Any]) -> list[Any]:
        most.append(sum(map(len, list(objects.values()))))
        return results

    injector["store"].forge["put_from"] = measure
    for at in range(0, 40, batch):
        store(pipeline, keys[at : at + batch])
    settle(pipeline)
    assert max(most) <= capacity
    assert len(objects) == 5
    assert served(pipeline, keys[:40]) == 40


class FlipSerde(Serde):
    """Stores the complement of every byte; `broken` says how it misbehaves."""

    codec = "flip/1"

    def __init__(self, chunk_bytes: int, broken: str) -> None:
        self._chunk_bytes = chunk_bytes
        self._broken = broken

    def bound(self) -> int:
        return self._chunk_bytes

    def encode(self, chunks: Sequence[memoryview], out: Sequence[memoryview], starts: Sequence[int]) -> list[int]:
        for chunk_, buffer in zip(chunks, out, strict=True):
            assert len(buffer) == self._chunk_bytes
            buffer[:] = bytes(255 - byte for byte in chunk_)
        sizes = {"long": self._chunk_bytes + 1, "negative": -1}
        if self._broken == "encode":
            raise ValueError("cannot encode")
        if self._broken == "few":
            return []
        return [sizes.get(self._broken, self._chunk_bytes)] * len(chunks)

    def decode(self, blobs: Sequence[memoryview], out: Sequence[memoryview]) -> None:
        if self._broken == "decode":
            raise ValueError("cannot decode")
        if self._broken == "corrupt":
            raise CorruptChunk("no such reason")
        for blob, buffer in zip(blobs, out, strict=True):
            buffer[:] = bytes(255 - byte for byte in blob)


class FlipConfig(SerdeConfig):
    type: Literal["flip"] = "flip"
    broken: str = ""

    def build(self, context: SerdeContext) -> FlipSerde:
        return FlipSerde(context.chunk_bytes, self.broken)


STAGING = 4 * 8192
"""Bytes of staging for each thread of a lane: two buffers to read, two to write."""


@pytest.mark.parametrize("broken", ["encode", "few", "long", "negative", "decode", "corrupt"])
def test_a_serde_that_misbehaves(pipelines: BuildPipeline, keys: list[ChunkKey], broken: str) -> None:
    config = tier(serde=FlipConfig(broken=broken), lane=PATIENT)
    pipeline = pipelines(config, staging=STAGING)
    store(pipeline, keys[:2])
    settle(pipeline)
    pipeline.clear("dram")
    assert served(pipeline, keys[:2]) == 0
    counts = pipeline.stats()["tiers"]["store"]
    if broken in ("decode", "corrupt"):
        assert counts["quarantined_corrupt"] == 2
    else:
        assert counts["dropped_error"] == 2
    settle(pipeline)


def test_threads_of_an_encoded_tier_share_its_staging(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    """A large batch on one thread must leave the other threads their buffers."""
    injector = FaultInjector({"store": Rates()})
    config = tier(serde=FlipConfig(), lane=LaneConfig(threads=2, deadline=30.0, lookup_deadline=15.0))
    pipeline = pipelines(config, staging=2 * STAGING, slots=40, injector=injector)
    injector["store"].hold("put_from")
    store(pipeline, keys[:8])
    injector["store"].wait_held(1)
    store(pipeline, keys[8:10])
    injector["store"].wait_held(2)
    injector.release()
    settle(pipeline)
    pipeline.clear("dram")
    injector["store"].hold("get_into")
    transfer = pipeline.fetch(keys[:10])
    injector["store"].wait_held(2)
    injector.release()
    with transfer.result() as lease:
        assert len(lease) == 10
        assert bytes(lease.view(9)) == chunk(keys[9], 1024)


def test_a_prefix_longer_than_the_lane_is_read_whole(
    pipelines: BuildPipeline, keys: list[ChunkKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queue and in-flight bounds refuse work, they do not cut a prefix that memory has room for."""
    lane = LaneConfig(threads=1, queue=2, inflight=8192, deadline=30.0)
    pipeline = pipelines(tier(lane=lane), slots=40)
    monkeypatch.setattr(pipeline, "_batch_chunks", 2)
    for key in keys[:30]:
        store(pipeline, [key])
        assert pipeline.flush(10)
    pipeline.clear("dram")
    assert served(pipeline, keys[:30]) == 30


def test_a_full_queue_refuses_at_once(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(lane=LaneConfig(threads=1, queue=1, deadline=30.0)), slots=16, injector=injector)
    for key in keys[:3]:
        store(pipeline, [key])
        assert pipeline.flush(10)
    pipeline.clear("dram")
    injector["store"].hold("get_into", "put_from")
    running = pipeline.fetch(keys[:1])
    injector["store"].wait_held(1)
    waiting = pipeline.fetch(keys[1:2])
    with pipeline.retrieve(keys[2:3]) as lease:
        assert lease.reason is MissReason.BUSY
    for key in keys[10:13]:
        store(pipeline, [key])
    assert pipeline.stats()["tiers"]["store"]["dropped_busy"] >= 1
    injector.release()
    for transfer in (running, waiting):
        with transfer.result() as lease:
            assert len(lease) == 1


def test_a_slot_sealed_while_it_was_forgotten_keeps_no_seal(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    """A write that is under way when memory is cleared leaves no old header for the slot's next chunk."""
    injector = FaultInjector({"coded": Rates(), "store": Rates()})
    pipeline = pipelines(
        tier("store", lane=PATIENT), tier("coded", serde=FlipConfig(), lane=PATIENT, write="through"),
        staging=STAGING, slots=2, injector=injector,
    )  # fmt: skip
    store(pipeline, keys[:1])
    settle(pipeline)
    pipeline.clear("store")
    pipeline.clear("dram")
    injector["store"].hold("put_from")
    store(pipeline, keys[1:2])
    injector["store"].wait_held()
    pipeline.clear("dram")  # hidden and pinned; then sealed again by the writer as it may
    slot = next(slot for slot, pins in enumerate(pipeline.slots.pins) if pins)
    pipeline.slots.sealed[slot] = 1
    injector.release()
    settle(pipeline)
    assert not any(pipeline.slots.sealed)
    # The chunk of the encoded tier lands in a slot without a header and is written on under one of its own.
    assert served(pipeline, keys[:1]) == 1
    settle(pipeline)
    pipeline.clear("coded")
    pipeline.clear("dram")
    assert served(pipeline, keys[:1]) == 1


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("path", ["stored", "loaded"])
def test_a_bit_flip_in_memory_is_found_when_serving(
    pipelines: BuildPipeline, keys: list[ChunkKey], path: str, coded: bool
) -> None:
    config = tier(serde=FlipConfig() if coded else None, lane=PATIENT)
    pipeline = pipelines(config, staging=STAGING if coded else 0, verify="serve")
    store(pipeline, keys[:3])
    settle(pipeline)
    if path == "loaded":
        pipeline.clear("dram")
        assert served(pipeline, keys[:3]) == 3
    slot = pipeline.slots.index[keys[1]]
    pipeline.slots.payload(slot)[77] ^= 4
    with pipeline.retrieve(keys[:3]) as lease:
        assert len(lease) == 1 and lease.reason is MissReason.CORRUPT
    assert pipeline.stats()["quarantined"] == 1
    settle(pipeline)
    assert served(pipeline, keys[:3]) == 3  # from the tier


def test_a_paused_tier_is_named_as_the_reason(
    pipelines: BuildPipeline, keys: list[ChunkKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(lane=PATIENT), injector=injector)
    store(pipeline, keys[:2])
    settle(pipeline)
    pipeline.clear("dram")
    injector["store"].fail["get_into"] = OSError(5, "no")
    for _ in range(5):
        with pipeline.retrieve(keys[:2]) as lease:
            assert lease.reason is MissReason.ERROR
    assert pipeline.lookup(keys[:2]).reason is MissReason.BREAKER
    with pipeline.retrieve(keys[:2]) as lease:
        assert lease.reason is MissReason.BREAKER


def test_a_tier_that_never_answers_lookups_is_paused(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    injector = FaultInjector({"store": Rates()})
    backend = DictConfig(scannable=False, local=False)
    pipeline = pipelines(tier(backend=backend, lane=QUICK), injector=injector)
    injector["store"].hold("contains")
    reasons = [pipeline.retrieve(keys[:2]).reason for _ in range(4)]
    assert reasons[0] is MissReason.DEADLINE
    assert reasons[3] is MissReason.BREAKER


def test_the_reason_is_that_of_the_first_gap(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    """Chunk 0 fails, chunk 1 of another tier hangs: the lease ends at chunk 0, for its reason."""
    near, far = DictConfig(), DictConfig()
    injector = FaultInjector({"near": Rates(), "far": Rates()})
    pipeline = pipelines(
        tier("near", backend=near, lane=QUICK), tier("far", backend=far, lane=QUICK), injector=injector
    )
    store(pipeline, keys[:2])
    settle(pipeline)
    pipeline.clear("dram")
    pipeline.tiers[0].forget(keys[1:2])
    pipeline.tiers[1].forget(keys[:1])
    injector["near"].fail["get_into"] = OSError(5, "no")
    injector["far"].hold("get_into")
    transfer = pipeline.fetch(keys[:2])
    injector["far"].wait_held()
    with transfer.result() as lease:
        assert len(lease) == 0 and lease.reason is MissReason.ERROR


def test_flush_after_close_returns(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(write="back"), injector=injector)
    store(pipeline, keys[:2])
    pipeline.close()
    assert pipeline.flush(30.0)
    assert injector["store"].inner.contains(keys[:2]) == [True, True]


@pytest.mark.parametrize("promote", [True, False])
def test_promotion_is_the_choice_of_the_tier_that_served(
    pipelines: BuildPipeline, keys: list[ChunkKey], promote: bool
) -> None:
    """Without it a chunk is read for whoever waits, and kept neither in memory nor in a nearer tier."""
    pipeline = pipelines(tier("near", lane=PATIENT), tier("far", lane=PATIENT, promote=promote))
    store(pipeline, keys[:3])
    settle(pipeline)
    pipeline.clear("dram")
    pipeline.clear("near")
    with pipeline.retrieve(keys[:3]) as lease:
        assert lease.sources == ["far"] * 3
        assert bytes(lease.view(2)) == chunk(keys[2], 1024)
        pipeline.check()
    settle(pipeline)
    assert pipeline.lookup(keys[:3]).sources == (["dram"] if promote else ["far"]) * 3
    assert pipeline.stats()["tiers"]["near"]["objects"] == (3 if promote else 0)
    assert served(pipeline, keys[:3]) == 3
    pipeline.prefetch(keys[:3])


@pytest.mark.parametrize("scannable", [True, False])
def test_a_discard_that_could_not_delete_says_so(
    pipelines: BuildPipeline, keys: list[ChunkKey], scannable: bool
) -> None:
    injector = FaultInjector({"store": Rates()})
    backend = DictConfig(scannable=scannable)
    pipeline = pipelines(tier(lane=PATIENT, backend=backend), injector=injector)
    names = keys[:2]
    store(pipeline, names)
    settle(pipeline)
    injector["store"].fail["delete"] = OSError(30, "Read-only file system")
    with pytest.raises(BackendError, match="may be served again: store"):
        pipeline.discard(names)
    assert len(backend.objects) == 2 and served(pipeline, names) == 0
    injector["store"].fail.clear()
    pipeline.discard(names)
    assert not backend.objects
