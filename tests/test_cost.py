"""The cost rule: a tier that is slower than computing is left out, measured again now and then, and comes back."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from time import monotonic
from typing import Any, Literal

import pytest
from chunks import keys, serve, store, tier
from conftest import BuildPipeline

from lmcache_core.config import LaneConfig, RecomputeConfig, load
from lmcache_core.cost import ReadSpeed, Recompute
from lmcache_core.errors import ConfigError
from lmcache_core.layout import KVLayout
from lmcache_core.pipeline import Pipeline
from lmcache_core.protocols import BuildContext
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import DictBackend, DictConfig
from lmcache_core.types import ChunkKey, Got, MissReason

pytestmark = pytest.mark.timeout(60)

LANE = LaneConfig(threads=1, deadline=30.0, lookup_deadline=15.0)
MIB = 1 << 20


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# -- speeds ------------------------------------------------------------------------------------------------------
def test_nothing_is_known_before_the_first_batch() -> None:
    speed = ReadSpeed(4)
    assert speed.estimate() is None and speed.seconds(MIB, MIB) is None
    assert speed.stats() == {"batch_ms": None, "bytes_per_s_per_thread": None, "batches": 0}


def test_the_fixed_part_and_the_part_per_byte_are_told_apart() -> None:
    speed = ReadSpeed(1)
    for size in (1, 8, 2, 6, 4, 8, 1):
        speed.note(size * MIB, 0.010 + size * 0.002)
    found = speed.estimate()
    assert found is not None
    assert found.fixed_s == pytest.approx(0.010) and found.per_byte_s == pytest.approx(0.002 / MIB)
    assert speed.seconds(3 * MIB, 8 * MIB) == pytest.approx(0.016)
    assert speed.stats() == {"batch_ms": 10.0, "bytes_per_s_per_thread": 500 * MIB, "batches": 7}


def test_batches_of_one_size_are_all_per_byte() -> None:
    speed = ReadSpeed(1)
    for _ in range(5):
        speed.note(4 * MIB, 0.020)
    found = speed.estimate()
    assert found is not None and found.fixed_s == pytest.approx(0, abs=1e-9)
    assert found.per_byte_s == pytest.approx(0.005 / MIB)


@pytest.mark.parametrize("small, large", [(0.030, 0.010), (0.001, 0.050)], ids=["falling", "steeper than the origin"])
def test_an_impossible_line_is_not_believed(small: float, large: float) -> None:
    """Noise must not make a part negative: then more bytes, or a smaller batch, would take less than no time."""
    speed = ReadSpeed(1)
    for _ in range(4):
        speed.note(1 * MIB, small)
        speed.note(8 * MIB, large)
    found = speed.estimate()
    assert found is not None and found.fixed_s >= 0 and found.per_byte_s >= 0
    low, high = sorted((small, large))
    assert low <= found.fixed_s + 4.5 * MIB * found.per_byte_s <= high


def test_what_was_measured_long_ago_fades() -> None:
    speed = ReadSpeed(1)
    for _ in range(50):
        speed.note(MIB, 1.0)
    for _ in range(20):
        speed.note(MIB, 0.001)
    taken = speed.seconds(MIB, MIB)
    assert taken is not None and 0.001 < taken < 0.05


def test_threads_share_the_work_and_what_is_queued_comes_first() -> None:
    speed = ReadSpeed(4)
    speed.note(MIB, 0.010)
    assert speed.seconds(4 * MIB, 8 * MIB) == pytest.approx(0.010), "four threads, one MiB each"
    assert speed.seconds(32 * MIB, 2 * MIB) == pytest.approx(4 * 0.020), "four rounds of batches of two MiB"
    assert speed.seconds(4 * MIB, 8 * MIB, ahead=4 * MIB) == pytest.approx(0.020)


def test_one_probe_tells_how_much_faster_a_tier_became() -> None:
    clock = Clock()
    speed = ReadSpeed(1, clock)
    for size in (8, 6, 8, 4) * 5:
        speed.note(size * MIB, 1.0 + size * 0.1)
    assert not speed.take_probe(), "it was measured just now"
    clock.now += ReadSpeed.PROBE_S
    assert speed.take_probe() and not speed.take_probe(), "one in a period"
    speed.note(MIB, 1.1 / 100, probe=True)
    assert speed.seconds(8 * MIB, 8 * MIB) == pytest.approx(1.8 / 100), "the line keeps its shape"
    for _ in range(5):
        speed.note(8 * MIB, 0.5)
    assert speed.seconds(8 * MIB, 8 * MIB) == pytest.approx(0.5, rel=0.1), "and what is really read counts more"


def test_a_probe_of_a_tier_never_read_is_a_measurement() -> None:
    speed = ReadSpeed(1)
    speed.note(MIB, 0.5, probe=True)
    assert speed.seconds(MIB, MIB) == pytest.approx(0.5)


def test_the_speed_of_computing_is_told_or_measured_or_unknown() -> None:
    assert Recompute().limit(1000) is None
    told = Recompute(0.5, 1 / 2000)
    told.note(1000, 60.0)
    assert told.limit(1000) == pytest.approx(0.25), "what was told is not measured"
    measured = Recompute(0.5, measure=True)
    assert measured.limit(1000) is None
    measured.note(1000, 1.0)
    assert measured.limit(1000) == pytest.approx(0.5)
    for _ in range(30):
        measured.note(100, 0.01)
    assert measured.limit(1000) == pytest.approx(0.05, rel=0.05), "the latest counts most"
    for tokens, seconds in ((0, 1.0), (10, 0.0), (10, -1.0)):
        measured.note(tokens, seconds)
    assert measured.limit(1000) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("rate", [0, -1, "fast", "nan"])
def test_a_speed_of_computing_that_makes_no_sense_is_refused(rate: Any) -> None:
    tiers = [{"name": "dram", "backend": {"type": "cpu"}, "capacity": "1MiB"}]
    with pytest.raises(ConfigError) as raised:
        load({"recompute": {"tokens_per_s": rate}, "tiers": tiers})
    assert [problem.path for problem in raised.value.problems] == ["recompute.tokens_per_s"]
    assert load({"recompute": {"tokens_per_s": 1000}, "tiers": tiers}).config.recompute.tokens_per_s == 1000


# -- pipelines ---------------------------------------------------------------------------------------------------
class SlowBackend(DictBackend):
    """Reads take as long as told, or until told."""

    def __init__(self, config: SlowConfig) -> None:
        super().__init__(config.objects, scannable=config.scannable, local=False)
        self.pace = 0.0
        """Seconds for each key read."""
        self.reads: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        assert self.go.wait(30)
        self.reads.append(len(keys))
        threading.Event().wait(self.pace * len(keys))
        return super().get_into(keys, buffers)


class SlowConfig(DictConfig):
    type: Literal["slow"] = "slow"  # type: ignore[assignment]

    def build(self, context: BuildContext) -> SlowBackend:
        return SlowBackend(self)


def slow_of(pipeline: Pipeline, number: int = 0) -> SlowBackend:
    backend = pipeline.tiers[number].backend
    assert isinstance(backend, SlowBackend)
    return backend


def filled(pipelines: BuildPipeline, *tiers: Any, names: Sequence[ChunkKey], **options: Any) -> Pipeline:
    pipeline = pipelines(*tiers, slots=32, **options)
    store(pipeline, names)
    settle(pipeline)
    pipeline.clear("dram")
    return pipeline


def rate(layout: KVLayout, seconds_per_chunk: float) -> RecomputeConfig:
    """Computing a chunk takes that long, and all of it may be spent."""
    return RecomputeConfig(tokens_per_s=layout.chunk_tokens / seconds_per_chunk, factor=1.0)


@pytest.mark.parametrize("scannable", [True, False], ids=["local", "remote"])
def test_a_tier_slower_than_computing_is_left_out_and_comes_back(
    pipelines: BuildPipeline, layout: KVLayout, scannable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = keys(8)
    pipeline = filled(
        pipelines, tier(backend=SlowConfig(scannable=scannable), lane=LANE), names=names, recompute=rate(layout, 1.0)
    )
    slow, speed = slow_of(pipeline), pipeline.tiers[0].speed
    clock = Clock()
    speed._clock = clock
    assert serve(pipeline, names) == ["store"] * 8
    pipeline.clear("dram")
    # One and a half times as slow as computing: measured on a read, as if it had taken that long.
    for _ in range(40):
        speed.note(8 * pipeline.slots.slot_bytes, 8 * 1.5)
    slow.reads.clear()
    hit = pipeline.lookup(names)
    assert hit.wait(30) and (hit.count, hit.reason) == (0, MissReason.COST)
    with pipeline.retrieve(names) as lease:
        assert len(lease) == 0 and lease.reason is MissReason.COST
    stats = pipeline.stats()
    assert stats["misses"] == {"cost": 8} and stats["tiers"]["store"]["bypassed_cost"] == 1 and not slow.reads
    assert stats["recompute"] == {"tokens_per_s": layout.chunk_tokens, "factor": 1.0}
    # Time for a probe: one chunk, which nobody waits for.
    clock.now += ReadSpeed.PROBE_S
    assert serve(pipeline, names) == []
    settle(pipeline)
    assert slow.reads == [1] and serve(pipeline, names[:1]) == ["dram"], "what was read is not wasted"
    pipeline.clear("dram")
    assert serve(pipeline, names) == ["store"] * 8, "it was fast, so it is used again"


def test_a_fast_tier_is_not_touched_by_a_slow_one(pipelines: BuildPipeline, layout: KVLayout) -> None:
    names = keys(8)
    pipeline = filled(
        pipelines,
        tier("slow", backend=SlowConfig(), lane=LANE),
        tier("fast", lane=LANE),
        names=names,
        recompute=rate(layout, 1.0),
    )
    for number in range(2):
        pipeline.tiers[number].speed.note(8 * pipeline.slots.slot_bytes, 100.0 if number == 0 else 0.001)
    assert serve(pipeline, names) == ["fast"] * 8
    assert pipeline.stats()["tiers"]["slow"]["bypassed_cost"] == 1
    assert "bypassed_cost" not in pipeline.stats()["tiers"]["fast"]


def test_what_lies_before_the_slow_tier_is_served(pipelines: BuildPipeline, layout: KVLayout) -> None:
    """Only the tokens from its first chunk on can be lost, so only those count as gain."""
    names = keys(8)
    pipeline = filled(pipelines, tier(backend=SlowConfig(), lane=LANE), names=names, recompute=rate(layout, 1.0))
    store(pipeline, names[:3])
    pipeline.tiers[0].speed.note(pipeline.slots.slot_bytes, 1.5)
    with pipeline.retrieve(names) as lease:
        assert lease.sources == ["dram"] * 3 and lease.reason is MissReason.COST
    assert pipeline.stats()["misses"] == {"cost": 5}


def test_what_the_lane_has_to_read_before_counts(pipelines: BuildPipeline, layout: KVLayout) -> None:
    names, others = keys(4), keys(12, 100)
    pipeline = filled(
        pipelines, tier(backend=SlowConfig(), lane=LANE), names=[*names, *others], recompute=rate(layout, 1.0)
    )
    pipeline.tiers[0].speed.note(pipeline.slots.slot_bytes, 0.4)
    assert pipeline.lookup(names).count == 4, "four times 0.4 s, against four of computing"
    slow = slow_of(pipeline)
    slow.go.clear()
    transfer = pipeline.fetch(others)
    assert pipeline.lookup(names).reason is MissReason.COST, "and twelve before them"
    slow.go.set()
    transfer.result().release()
    settle(pipeline)
    pipeline.tiers[0].speed = ReadSpeed(1)
    assert pipeline.lookup(names).count == 4


def test_a_tier_of_unknown_speed_is_waited_for_no_longer_than_computing_takes(
    pipelines: BuildPipeline, layout: KVLayout
) -> None:
    names = keys(8)
    pipeline = filled(pipelines, tier(backend=SlowConfig(), lane=LANE), names=names, recompute=rate(layout, 0.01))
    slow = slow_of(pipeline)
    for _ in range(5):
        pipeline.tiers[0].speed = ReadSpeed(1)
        slow.go.clear()
        begin = monotonic()
        with pipeline.retrieve(names) as lease:
            assert len(lease) == 0 and lease.reason is MissReason.COST
        assert monotonic() - begin < 1.0
        slow.go.set()
        settle(pipeline)
        assert serve(pipeline, names) == ["dram"] * 8, "the read went on, and was not wasted"
        pipeline.clear("dram")
    assert pipeline.tiers[0].read_lane.breaker.stats()["trips"] == 0, "the medium is not to blame"


def test_the_rule_is_off_while_nobody_knows_how_fast_computing_is(pipelines: BuildPipeline, layout: KVLayout) -> None:
    names = keys(4)
    recompute = RecomputeConfig(tokens_per_s="measure")
    pipeline = filled(pipelines, tier(backend=SlowConfig(), lane=LANE), names=names, recompute=recompute)
    for _ in range(9):
        pipeline.tiers[0].speed.note(pipeline.slots.slot_bytes, 100.0)
    assert pipeline.stats()["recompute"]["tokens_per_s"] is None
    assert pipeline.lookup(names).count == 4
    pipeline.note_prefill(10 * layout.chunk_tokens, 10.0)
    assert pipeline.stats()["recompute"]["tokens_per_s"] == layout.chunk_tokens
    assert pipeline.lookup(names).reason is MissReason.COST


def test_real_reads_are_measured(pipelines: BuildPipeline) -> None:
    names = keys(4)
    pipeline = filled(pipelines, tier(backend=SlowConfig(), lane=LANE), names=names)
    slow_of(pipeline).pace = 0.02
    assert serve(pipeline, names) == ["store"] * 4
    settle(pipeline)
    speed = pipeline.tiers[0].speed
    taken = speed.seconds(4 * pipeline.slots.slot_bytes, 1 << 30)
    assert speed.samples == 1 and taken is not None and 0.08 <= taken < 5


def test_reads_that_fail_are_not_measured(pipelines: BuildPipeline) -> None:
    names = keys(4)
    objects: dict[ChunkKey, bytes] = {}
    pipeline = filled(pipelines, tier(backend=DictConfig(objects=objects), lane=LANE), names=names)
    objects.pop(names[2])
    assert serve(pipeline, names) == ["store"] * 2
    settle(pipeline)
    assert pipeline.tiers[0].speed.samples == 0
