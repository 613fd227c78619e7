"""The pipeline's semantics over media that work: write modes, promotion, demotion, leases, remote tiers, clearing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from chunks import OBJECT, fill, keys, serve, store, tier, verify
from conftest import BuildPipeline

from lmcache_core.config import LaneConfig
from lmcache_core.errors import Closed
from lmcache_core.pipeline import Lease, Transfer
from lmcache_core.testing.faults import FaultInjector, Rates
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import DictConfig
from lmcache_core.types import ChunkKey, MissReason

pytestmark = pytest.mark.timeout(60)

PATIENT = LaneConfig(threads=2, deadline=30.0, lookup_deadline=15.0)


def held(objects: dict[ChunkKey, bytes], names: Sequence[ChunkKey]) -> list[bool]:
    return [name in objects for name in names]


def remote(**options: Any) -> DictConfig:
    """A medium that must be asked over its lane."""
    return DictConfig(scannable=False, local=False, **options)


# -- storing and serving from memory -----------------------------------------------------------------------------
def test_what_was_stored_is_served(pipelines: BuildPipeline) -> None:
    pipeline = pipelines()
    names = keys(6)
    assert pipeline.lookup(names).count == 0 and pipeline.lookup(names).reason is MissReason.NOT_STORED
    assert store(pipeline, names[:4]) == 4
    hit = pipeline.lookup(names)
    assert (hit.count, hit.sources, hit.reason) == (4, ["dram"] * 4, MissReason.NOT_STORED)
    assert pipeline.lookup(names[:4]).reason is None
    with pipeline.retrieve(names) as lease:
        assert verify(pipeline, lease) == 4 and lease.reason is MissReason.NOT_STORED
        assert lease.offsets.tolist() == [slot * 8192 + 4096 for slot in lease.slots]
        assert (lease.addresses - lease.offsets == pipeline.slots.region.address).all()
    assert pipeline.stats()["hits"]["dram"] == 4 and pipeline.stats()["misses"] == {"not_stored": 2}


def test_only_what_is_missing_is_reserved(pipelines: BuildPipeline) -> None:
    pipeline = pipelines()
    names = keys(6)
    store(pipeline, names[1:3])
    with pipeline.reserve(names[:5]) as first:
        assert first.positions == [0, 3, 4] and len(first) == 3
        with pipeline.reserve(names) as second:
            assert second.positions == [5], "what somebody else fills is not reserved twice"
        assert pipeline.lookup(names).count == 0
    with pipeline.reserve(names, first=4) as later:
        assert later.positions == [4, 5]


def test_a_reservation_ends_once(pipelines: BuildPipeline) -> None:
    pipeline = pipelines()
    names = keys(2)
    reservation = pipeline.reserve(names)
    fill(names)(reservation)
    assert reservation.commit() == 2
    for use in (reservation.commit, lambda: reservation.slots, lambda: reservation.view(0)):
        with pytest.raises(Closed):
            use()
    reservation.abort()
    assert serve(pipeline, names) == ["dram"] * 2
    aborted = pipeline.reserve(keys(2, 10))
    aborted.abort()
    aborted.abort()
    with pytest.raises(Closed):
        aborted.commit()
    assert pipeline.lookup(keys(2, 10)).count == 0


def test_a_fill_that_fails_stores_nothing(pipelines: BuildPipeline) -> None:
    pipeline = pipelines()

    def fail(_: object) -> None:
        raise RuntimeError("the engine's copy failed")

    with pytest.raises(RuntimeError):
        pipeline.store(keys(3), fail)
    assert pipeline.lookup(keys(3)).count == 0
    assert pipeline.store(keys(0), fail) == 0, "nothing to fill"


@pytest.mark.parametrize("call", ["reserve", "fetch"])
def test_repeated_keys_are_refused_and_leave_nothing(pipelines: BuildPipeline, call: str) -> None:
    pipeline = pipelines(tier())
    store(pipeline, keys(1))
    with pytest.raises(ValueError, match="keys repeat"):
        getattr(pipeline, call)([*keys(3), keys(3)[2]])
    settle(pipeline)


def test_no_keys_at_all(pipelines: BuildPipeline) -> None:
    pipeline = pipelines(tier())
    assert pipeline.lookup([]).count == 0 and pipeline.lookup([]).reason is None
    with pipeline.retrieve([]) as lease:
        assert len(lease) == 0 and lease.reason is None and lease.addresses.tolist() == []
    pipeline.prefetch([])
    assert store(pipeline, []) == 0


def test_a_prefix_that_grows_keeps_its_beginning(pipelines: BuildPipeline) -> None:
    """Stored piece by piece, as engines do: the deepest chunk is the coldest, whatever came last."""
    pipeline = pipelines(slots=8)
    whole = keys(8)
    for end in range(1, 9):
        store(pipeline, whole[:end])
    store(pipeline, keys(3, 100))
    assert pipeline.lookup(whole).count == 5


def test_a_prefix_longer_than_memory_keeps_its_beginning(pipelines: BuildPipeline) -> None:
    pipeline = pipelines(slots=8)
    whole = keys(12)
    for end in (6, 12):
        store(pipeline, whole[:end])
    assert pipeline.lookup(whole).count == 8
    assert pipeline.stats()["dropped"] == {"no_room": 4}


# -- write modes -------------------------------------------------------------------------------------------------
def test_write_through_back_and_never(pipelines: BuildPipeline) -> None:
    media: dict[str, dict[ChunkKey, bytes]] = {"through": {}, "back": {}, "never": {}}
    names = keys(3)
    pipeline = pipelines(
        *(tier(mode, write=mode, backend=DictConfig(objects=media[mode]), lane=PATIENT) for mode in media), slots=16
    )
    store(pipeline, names)
    assert pipeline.tiers[0].write_lane.drain(10)
    assert held(media["through"], names) == [True] * 3
    assert not media["back"] and pipeline.stats()["tiers"]["dram"]["dirty"] == 3
    assert pipeline.flush(10)
    assert held(media["back"], names) == [True] * 3 and pipeline.stats()["tiers"]["dram"]["dirty"] == 0
    assert not media["never"]


def test_demotion_comes_ahead_of_need_and_loses_nothing(pipelines: BuildPipeline) -> None:
    objects: dict[ChunkKey, bytes] = {}
    pipeline = pipelines(tier(write="back", backend=DictConfig(objects=objects), lane=PATIENT), slots=8)
    names = keys(64)
    for key in names:
        assert store(pipeline, [key]) == 1, "never a store refused for dirty chunks"
        assert pipeline.slots.count - len(pipeline.slots.dirty) >= 4, "half of memory can always be evicted"
        pipeline.tiers[0].write_lane.drain(10)
    assert pipeline.flush(10)
    assert held(objects, names) == [True] * 64
    assert serve(pipeline, names[:8]) == ["store"] * 8


def test_a_full_lane_delays_demotion_and_loses_nothing(pipelines: BuildPipeline) -> None:
    """Memory full of dirty chunks refuses stores; when the medium goes on, so do they."""
    injector = FaultInjector({"store": Rates()})
    objects: dict[ChunkKey, bytes] = {}
    lane = LaneConfig(threads=1, queue=1, deadline=30.0)
    pipeline = pipelines(tier(write="back", backend=DictConfig(objects=objects), lane=lane), slots=8, injector=injector)
    injector["store"].hold("put_from")
    stored = [key for key in keys(40) if store(pipeline, [key])]
    assert len(stored) == 8 and pipeline.stats()["dropped"] == {"no_room": 32}
    injector.release()
    for key in keys(20, 100):
        stored += [key] * store(pipeline, [key])
        pipeline.tiers[0].write_lane.drain(10)
    assert len(stored) >= 8 + 15
    assert pipeline.flush(10)
    assert held(objects, stored) == [True] * len(stored)


def test_two_write_back_tiers_both_get_everything(pipelines: BuildPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """One lane is full and refuses again and again; what it refused stays dirty for it."""
    injector = FaultInjector({"slow": Rates(), "fast": Rates()})
    media: dict[str, dict[ChunkKey, bytes]] = {"slow": {}, "fast": {}}
    lane = LaneConfig(threads=1, queue=1, deadline=30.0)
    tiers = [tier(name, write="back", backend=DictConfig(objects=media[name]), lane=lane) for name in media]
    pipeline = pipelines(*tiers, slots=64, injector=injector)
    monkeypatch.setattr(pipeline, "_batch_chunks", 2)  # several jobs for one demotion: more than the queue takes
    injector["slow"].hold("put_from")
    names = keys(40)
    for key in names:
        store(pipeline, [key])
        pipeline.tiers[1].write_lane.drain(10)
    assert not pipeline.flush(0.05)
    pipeline.check()
    injector.release()
    assert pipeline.flush(10)
    for name in media:
        assert held(media[name], names) == [True] * 40, name


def test_a_broken_write_back_tier_does_not_fill_memory(pipelines: BuildPipeline) -> None:
    """What it fails to write counts as clean: the cache loses chunks, never its room."""
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(write="back", lane=PATIENT), slots=8, injector=injector)
    injector["store"].fail["put_from"] = OSError(5, "no")
    for key in keys(40):
        assert store(pipeline, [key]) == 1
        pipeline.tiers[0].write_lane.drain(10)
    assert pipeline.stats()["tiers"]["store"]["write_paused"]
    assert pipeline.stats()["tiers"]["store"]["dropped_breaker"] > 0
    assert pipeline.flush(10)


# -- promotion ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["through", "back", "never"])
@pytest.mark.parametrize("promote", [True, False])
def test_a_hit_in_a_farther_tier_moves_up(pipelines: BuildPipeline, mode: Any, promote: bool) -> None:
    """Into memory and every nearer tier that takes writes, unless the tier that served says no."""
    near: dict[ChunkKey, bytes] = {}
    pipeline = pipelines(
        tier("near", write=mode, backend=DictConfig(objects=near), lane=PATIENT),
        tier("far", promote=promote, lane=PATIENT),
        slots=32,
    )
    names = keys(3)
    store(pipeline, names)
    settle(pipeline)
    pipeline.clear("near")
    pipeline.clear("dram")
    assert serve(pipeline, names) == ["far"] * 3
    settle(pipeline)
    arrives = promote and mode != "never"
    assert held(near, names) == [arrives] * 3
    assert serve(pipeline, names) == ["dram" if promote else "far"] * 3
    pipeline.clear("dram")
    assert serve(pipeline, names) == ["near" if arrives else "far"] * 3


def test_one_prefix_from_several_tiers(pipelines: BuildPipeline) -> None:
    pipeline = pipelines(tier("near", lane=PATIENT), tier("far", lane=PATIENT))
    names = keys(8)
    store(pipeline, names)
    settle(pipeline)
    pipeline.clear("dram")
    pipeline.tiers[0].forget(names[2:4])
    pipeline.tiers[1].forget(names[4:6])
    store(pipeline, names[6:7])
    settle(pipeline)
    expected = ["near"] * 2 + ["far"] * 2 + ["near"] * 2 + ["dram", "near"]
    assert pipeline.lookup(names).sources == expected
    transfer = pipeline.fetch(names)
    assert transfer.located and transfer.count == 8 and transfer.sources == expected
    with transfer.result() as lease:
        assert verify(pipeline, lease) == 8 and lease.sources == expected


def test_two_requests_for_one_prefix_read_it_once(pipelines: BuildPipeline) -> None:
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(lane=PATIENT), injector=injector)
    names = keys(4)
    store(pipeline, names)
    settle(pipeline)
    pipeline.clear("dram")
    reads: list[int] = []
    injector["store"].forge["get_into"] = lambda results: reads.append(len(results)) or results
    injector["store"].hold("get_into")
    first = pipeline.fetch(names)
    second = pipeline.fetch(names[:3])
    assert not first.done and not second.done and second.sources == ["store"] * 3
    assert pipeline.reserve(names).positions == [], "what is on its way is not stored again"
    injector.release()
    with first.result() as one, second.result() as two:
        assert verify(pipeline, one) == 4 and verify(pipeline, two) == 3
        assert one.slots[:3] == two.slots
    assert sum(reads) == 4


# -- leases and transfers ----------------------------------------------------------------------------------------
def test_a_lease_is_released_once_whoever_releases_it(pipelines: BuildPipeline) -> None:
    pipeline = pipelines()
    names = keys(4)
    store(pipeline, names)
    for _ in range(50):
        leases = [pipeline.retrieve(names) for _ in range(2)]
        barrier = threading.Barrier(8)

        def release(barrier: threading.Barrier = barrier, lease: Lease = leases[0]) -> None:
            barrier.wait()
            lease.release()

        threads = [threading.Thread(target=release) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert verify(pipeline, leases[1]) == 4 and set(pipeline.slots.pins) == {0, 1}
        leases[1].release()
    for use in (lambda: leases[1].slots, lambda: leases[1].view(0), lambda: leases[1].addresses):
        with pytest.raises(Closed):
            use()


def test_a_lease_survives_a_clear(pipelines: BuildPipeline) -> None:
    pipeline = pipelines(tier(lane=PATIENT), slots=4)
    names = keys(3)
    store(pipeline, names)
    with pipeline.retrieve(names) as lease:
        pipeline.clear()
        assert pipeline.lookup(names).count == 0
        assert store(pipeline, keys(4, 50)) == 1, "its slots are not given to anybody"
        assert pipeline.flush(10) and verify(pipeline, lease) == 3
        assert store(pipeline, names) == 1, "nor does what it holds stand in the way of the same chunk"
        assert pipeline.flush(10) and verify(pipeline, lease) == 3
    assert store(pipeline, keys(4, 70)) == 4


def test_the_result_of_a_transfer_is_taken_once(pipelines: BuildPipeline) -> None:
    pipeline = pipelines(tier(lane=PATIENT))
    names = keys(3)
    store(pipeline, names)
    settle(pipeline)
    for clear in (False, True):
        if clear:
            pipeline.clear("dram")
        taken = pipeline.fetch(names)
        taken.result().release()
        with pytest.raises(Closed):
            taken.result()
        taken.cancel()
        cancelled = pipeline.fetch(names)
        cancelled.cancel()
        cancelled.cancel()
        with pytest.raises(Closed):
            cancelled.result()


def test_a_cancelled_read_still_fills_the_cache(pipelines: BuildPipeline) -> None:
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(lane=PATIENT), injector=injector)
    names = keys(3)
    store(pipeline, names)
    settle(pipeline)
    pipeline.clear("dram")
    injector["store"].hold("get_into")
    transfer = pipeline.fetch(names)
    transfer.cancel()
    injector.release()
    settle(pipeline)
    assert serve(pipeline, names) == ["dram"] * 3


def test_a_failed_chunk_ends_the_prefix_before_it(pipelines: BuildPipeline) -> None:
    objects: dict[ChunkKey, bytes] = {}
    pipeline = pipelines(tier(backend=DictConfig(objects=objects), lane=PATIENT))
    names = keys(6)
    store(pipeline, names)
    settle(pipeline)
    pipeline.clear("dram")
    objects[names[3]] = objects[names[3]][:-1] + b"!"
    with pipeline.retrieve(names) as lease:
        assert verify(pipeline, lease) == 3 and lease.reason is MissReason.CORRUPT
    assert serve(pipeline, names) == ["dram"] * 3
    assert pipeline.lookup(names[4:]).count == 2, "what came behind it is kept for whoever recomputes the gap"


def test_a_prefix_that_does_not_fit_is_cut(pipelines: BuildPipeline) -> None:
    pipeline = pipelines(tier(lane=PATIENT), slots=4)
    names = keys(8)
    for at in (0, 4):
        store(pipeline, names[at : at + 4])
        settle(pipeline)
    with pipeline.retrieve(names) as lease:
        assert verify(pipeline, lease) == 4 and lease.reason is MissReason.NO_ROOM
        with pipeline.retrieve(keys(8)[4:]) as other:
            assert len(other) == 0 and other.reason is MissReason.NO_ROOM


# -- prefetch ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", [DictConfig, remote], ids=["local", "remote"])
def test_prefetch_brings_chunks_into_memory_and_holds_nothing(pipelines: BuildPipeline, backend: Any) -> None:
    pipeline = pipelines(tier(backend=backend(), lane=PATIENT))
    names = keys(4)
    store(pipeline, names)
    settle(pipeline)
    pipeline.clear("dram")
    pipeline.prefetch([*names, *keys(2, 100)])
    settle(pipeline)
    assert serve(pipeline, names) == ["dram"] * 4


@pytest.mark.parametrize("method", ["contains", "get_into"])
def test_prefetch_holds_the_beginning_until_the_rest_has_come(pipelines: BuildPipeline, method: str) -> None:
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(backend=remote(), lane=PATIENT), slots=4, injector=injector)
    names = keys(4)
    store(pipeline, names)
    settle(pipeline)
    pipeline.clear("dram")
    store(pipeline, names[:2])
    settle(pipeline)
    injector["store"].hold(method)
    pipeline.prefetch(names)
    injector["store"].wait_held()
    assert sum(pipeline.slots.pins) == 2
    injector.release()
    settle(pipeline)
    assert serve(pipeline, names) == ["dram"] * 4


# -- remote tiers ------------------------------------------------------------------------------------------------
def test_a_remote_tier_answers_later(pipelines: BuildPipeline) -> None:
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(backend=remote(), lane=PATIENT), injector=injector)
    names = keys(5)
    store(pipeline, names[:4])
    settle(pipeline)
    pipeline.clear("dram")
    store(pipeline, names[:1])
    injector["store"].hold("contains")
    hit = pipeline.lookup(names)
    assert hit.pending and hit.count == 1 and hit.reason is MissReason.NOT_STORED
    transfer = pipeline.fetch(names)
    assert not transfer.located and not transfer.done and transfer.count == 1
    assert not hit.wait(0.01) and not transfer.wait(0.01)
    injector.release()
    assert hit.wait(10) and not hit.pending and hit.count == 4 and hit.sources == ["dram"] + ["store"] * 3
    with transfer.result() as lease:
        assert transfer.located and transfer.count == 4
        assert verify(pipeline, lease) == 4 and lease.reason is MissReason.NOT_STORED


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_transfer_cancelled_before_it_is_located(pipelines: BuildPipeline, when: str) -> None:
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(backend=remote(), lane=PATIENT), injector=injector)
    names = keys(3)
    store(pipeline, names)
    settle(pipeline)
    pipeline.clear("dram")
    store(pipeline, names[:1])
    settle(pipeline)
    injector["store"].hold("contains")
    transfer = pipeline.fetch(names)
    if when == "before":
        transfer.cancel()
        assert not any(pipeline.slots.pins)
    injector.release()
    settle(pipeline) if when == "before" else pipeline.tiers[0].read_lane.drain(10)
    transfer.cancel()
    with pytest.raises(Closed):
        transfer.result()
    assert pipeline.lookup(names[1:]).sources[:1] != ["dram"] or when == "after"


def test_a_remote_tier_that_cannot_be_asked_is_the_reason(pipelines: BuildPipeline) -> None:
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(backend=remote(), lane=PATIENT), injector=injector)
    injector["store"].fail["contains"] = OSError(5, "no")
    reasons = [pipeline.retrieve(keys(1)).reason for _ in range(6)]
    assert reasons == [MissReason.ERROR] * 5 + [MissReason.BREAKER]
    hit = pipeline.lookup(keys(1))
    assert not hit.pending and hit.reason is MissReason.BREAKER


# -- clearing ----------------------------------------------------------------------------------------------------
def test_clear_of_one_tier_and_of_all(pipelines: BuildPipeline) -> None:
    pipeline = pipelines(tier("near", lane=PATIENT), tier("far", lane=PATIENT))
    names = keys(3)
    store(pipeline, names)
    settle(pipeline)
    pipeline.clear("near")
    assert pipeline.lookup(names).sources == ["dram"] * 3
    pipeline.clear("dram")
    assert pipeline.lookup(names).sources == ["far"] * 3
    pipeline.clear()
    assert pipeline.lookup(names).count == 0
    with pytest.raises(ValueError, match="no tier 'fast'; there are dram, near, far"):
        pipeline.clear("fast")


def test_a_reservation_from_before_a_clear_publishes_nothing(pipelines: BuildPipeline) -> None:
    pipeline = pipelines(tier(lane=PATIENT))
    reservation = pipeline.reserve(keys(2))
    fill(keys(2))(reservation)
    pipeline.clear()
    assert reservation.commit() == 0
    settle(pipeline)
    assert pipeline.lookup(keys(2)).count == 0


@pytest.mark.parametrize("anew", [True, False])
def test_a_read_from_before_a_clear_serves_nothing(pipelines: BuildPipeline, anew: bool) -> None:
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(lane=PATIENT), injector=injector)
    names = keys(3)
    store(pipeline, names)
    settle(pipeline)
    pipeline.clear("dram")
    begun, gate = threading.Event(), threading.Event()

    def after_the_read(results: list[Any]) -> list[Any]:
        begun.set()
        assert gate.wait(30)
        return results

    injector["store"].forge["get_into"] = after_the_read  # the bytes are in the slots when the clear comes
    transfer = pipeline.fetch(names)
    assert begun.wait(30)
    pipeline.clear()
    assert transfer.done, "whoever waits is told at once"
    assert pipeline.lookup(names).count == 0 and pipeline.reserve(names[:0]).positions == []
    if anew:
        assert store(pipeline, names) == 3, "and nothing stands in the way of storing the same chunks anew"
    gate.set()
    with transfer.result() as lease:
        assert len(lease) == 0 and lease.reason is MissReason.RACED
    settle(pipeline)
    assert serve(pipeline, names) == (["dram"] * 3 if anew else [])


def test_clears_race_with_everything(pipelines: BuildPipeline) -> None:
    """Nothing stored before a clear is served after it: every round stores one generation, and clears it."""
    injector = FaultInjector({"near": Rates(slow=0.5, slow_s=0.001), "far": Rates(slow=0.5, slow_s=0.001)})
    pipeline = pipelines(
        tier("near", lane=PATIENT, capacity=20 * OBJECT), tier("far", lane=PATIENT, backend=remote(), write="back"),
        slots=24, injector=injector,
    )  # fmt: skip
    stop = threading.Event()
    errors: list[BaseException] = []

    def use() -> None:
        try:
            while not stop.is_set():
                for start in (0, 8, 16):
                    names = keys(8, start)
                    store(pipeline, names)
                    pipeline.prefetch(names)
                    serve(pipeline, names, timeout=0.002)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for name in ["near", "far", "dram", None] * 10:
        pipeline.clear(name)
        pipeline.check()
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    pipeline.clear()
    settle(pipeline)
    assert [pipeline.retrieve(keys(8, start)).keys for start in (0, 8, 16)] == [[], [], []]
    assert injector["far"].inner.usage().objects == injector["near"].inner.usage().objects == 0


# -- life --------------------------------------------------------------------------------------------------------
def test_after_close_nothing_new_begins_and_what_is_held_stays_valid(pipelines: BuildPipeline) -> None:
    objects: dict[ChunkKey, bytes] = {}
    pipeline = pipelines(tier(write="back", backend=DictConfig(objects=objects), lane=PATIENT))
    names = keys(2)
    store(pipeline, names)
    lease = pipeline.retrieve(names)
    reservation = pipeline.reserve(keys(1, 10))
    pipeline.close()
    pipeline.close()
    assert held(objects, names) == [True] * 2, "close writes down what must be written"
    for call in (pipeline.lookup, pipeline.fetch, pipeline.reserve, pipeline.retrieve, pipeline.prefetch):
        with pytest.raises(Closed):
            call(names)
    assert verify(pipeline, lease) == 2
    lease.release()
    assert reservation.commit() == 0


def test_a_fetch_that_a_close_overtakes_says_so(pipelines: BuildPipeline) -> None:
    """Between the look at memory and the moves nothing is locked."""
    pipeline = pipelines(tier(lane=PATIENT))
    names = keys(4)
    store(pipeline, names)
    settle(pipeline)
    pipeline.clear("dram")
    locate = pipeline._locate

    def close_first(*args: Any) -> Any:
        pipeline.close()
        return locate(*args)

    pipeline._locate = close_first  # type: ignore[method-assign]
    with pipeline.retrieve(names) as lease:
        assert len(lease) == 0 and lease.reason is MissReason.CLOSED


def test_close_while_everything_is_busy(pipelines: BuildPipeline) -> None:
    injector = FaultInjector({"store": Rates(slow=1.0, slow_s=0.002)})
    pipeline = pipelines(tier(lane=PATIENT, capacity=30 * OBJECT), slots=24, injector=injector)
    errors: list[BaseException] = []
    begun = threading.Semaphore(0)

    def use(start: int) -> None:
        try:
            for round_ in range(10_000):
                names = keys(6, start + 6 * (round_ % 5))
                store(pipeline, names)
                pipeline.prefetch(names)
                serve(pipeline, names, timeout=0.002)
                begun.release()
        except Closed:
            pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(start,)) for start in (0, 1000, 2000)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        assert begun.acquire(timeout=30)
    closers = [threading.Thread(target=pipeline.close) for _ in range(3)]
    for thread in [*closers, *threads]:
        thread.start() if thread in closers else None
    for thread in [*closers, *threads]:
        thread.join(30)
        assert not thread.is_alive()
    assert not errors
    pipeline.check(idle=True)


def test_stats_are_plain_and_complete(pipelines: BuildPipeline) -> None:
    import json

    pipeline = pipelines(tier(capacity=2 * OBJECT, lane=PATIENT), slots=4)
    store(pipeline, keys(3))
    settle(pipeline)
    serve(pipeline, keys(5))
    stats = json.loads(json.dumps(pipeline.stats()))
    assert stats["stored"] == 3 and stats["hits"] == {"dram": 3, "store": 0}
    assert stats["tiers"]["dram"] == {
        "slots": 4, "slot_bytes": 8192, "ready": 3, "free": 1, "dirty": 0, "evicted": 0, "pinned": 0,
        "eviction_trouble": "", "remark": "not pinned: `pin` is false",
    }  # fmt: skip
    store_stats = stats["tiers"]["store"]
    assert (store_stats["used_bytes"], store_stats["objects"], store_stats["written"]) == (2 * OBJECT, 2, 2)
    assert store_stats["dropped_no_room"] == 1 and store_stats["last_error"] == ""


def test_check_names_what_is_left_behind(pipelines: BuildPipeline) -> None:
    pipeline = pipelines(tier(lane=PATIENT))
    store(pipeline, keys(2))
    settle(pipeline)
    held_things: list[tuple[str, Any, Any]] = [
        ("pins left behind", lambda: pipeline.retrieve(keys(2)), Lease.release),
        ("neither committed nor aborted", lambda: pipeline.reserve(keys(1, 9)), lambda r: r.abort()),
        ("pins left behind|neither taken nor cancelled", lambda: pipeline.fetch(keys(2)), Transfer.cancel),
        ("neither taken nor cancelled", lambda: pipeline.fetch(keys(1, 9)), Transfer.cancel),
    ]
    for message, take, give_back in held_things:
        thing = take()
        pipeline.check()
        with pytest.raises(AssertionError, match=message):
            pipeline.check(idle=True)
        give_back(thing)
        pipeline.check(idle=True)


def test_a_flipped_bit_in_memory_is_never_served(pipelines: BuildPipeline) -> None:
    """With `verify: serve`; the tier's copy takes over, and the damaged one is quarantined once."""
    pipeline = pipelines(tier(lane=PATIENT), verify="serve")
    names = keys(4)
    store(pipeline, names)
    settle(pipeline)
    for bit in (0, 7, 8 * 1023 + 3):
        payload = pipeline.slots.payload(pipeline.slots.index[names[2]])
        payload[bit // 8] ^= 1 << bit % 8
        with pipeline.retrieve(names) as lease:
            assert verify(pipeline, lease) == 2 and lease.reason is MissReason.CORRUPT
        assert serve(pipeline, names) == ["dram"] * 2 + ["store", "dram"]
    assert pipeline.stats()["quarantined"] == 3
