"""An eviction policy that raises or lies is replaced by `lru`, in place, and the engine sees nothing of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pytest
from chunks import OBJECT, keys, serve, store, tier, verify
from conftest import BuildPipeline

from lmcache_backends.cpu import CpuConfig
from lmcache_core.build import build
from lmcache_core.config import LaneConfig, PipelineConfig, TierConfig
from lmcache_core.eviction.guard import Guarded, trouble
from lmcache_core.eviction.lru import Lru
from lmcache_core.layout import KVLayout
from lmcache_core.protocols import EvictionConfig, EvictionPolicy
from lmcache_core.testing.invariants import settle
from lmcache_core.types import ChunkKey

pytestmark = pytest.mark.timeout(60)

LANE = LaneConfig(threads=1, deadline=30.0)


class Bad(EvictionPolicy):
    """First in, first out; and wrong in one way."""

    def __init__(self, fault: str) -> None:
        self._fault = fault
        self._keys: dict[ChunkKey, None] = {}

    def _may_raise(self, method: str) -> None:
        if self._fault == f"{method} raises":
            raise RuntimeError("a defect")
        if self._fault == f"{method} exits":
            raise SystemExit(3)

    def add(self, keys: Sequence[ChunkKey]) -> None:
        self._may_raise("add")
        for key in keys:
            if self._fault != "forgets" or len(self._keys) < 2:
                self._keys[key] = None

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        self._may_raise("touch")

    def remove(self, key: ChunkKey) -> None:
        self._may_raise("remove")
        if self._fault != "keeps":
            self._keys.pop(key, None)

    def coldest(self) -> Iterator[ChunkKey]:
        self._may_raise("coldest")
        for number, key in enumerate(self._keys):
            if self._fault == "raises while ranking" and number == 1:
                raise RuntimeError("a defect")
            yield key
            if self._fault == "repeats":
                yield key
            if self._fault == "invents":
                yield ChunkKey(bytes(32))
        while self._fault == "never ends" and self._keys:
            yield next(iter(self._keys))


FAULTS = (
    "add raises",
    "touch raises",
    "remove raises",
    "coldest raises",
    "add exits",
    "raises while ranking",
    "forgets",
    "keeps",
    "repeats",
    "invents",
    "never ends",
)


class BadConfig(EvictionConfig):
    type: Literal["bad"] = "bad"
    fault: str = ""

    def build(self) -> Bad:
        return Bad(self.fault)


def test_a_policy_that_is_right_is_believed() -> None:
    policy = Guarded(Bad(""), "bad")
    policy.add(keys(3))
    policy.touch(keys(1))
    assert list(policy.coldest()) == keys(3), "first in, first out, and not `lru`"
    policy.remove(keys(1)[0])
    policy.remove_all(keys(1, 1))
    assert list(policy.coldest()) == keys(1, 2)
    assert trouble(policy) == "" and trouble(Lru()) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_every_key_is_ranked_once_whatever_the_policy_does(fault: str) -> None:
    policy = Guarded(Bad(fault), "bad")
    policy.add(keys(4))
    policy.touch(keys(1, 2))
    policy.remove(keys(1, 1)[0])
    ranked = list(policy.coldest())
    assert sorted(ranked) == [keys(4)[0], *keys(4)[2:]]
    assert policy.trouble.startswith("bad: ")
    expected = Lru()
    expected.add(keys(4))
    expected.touch(keys(1, 2))
    expected.remove(keys(1, 1)[0])
    assert list(policy.coldest()) == list(expected.coldest()), "from then on it is `lru`"


def test_what_it_ranked_before_its_mistake_counts() -> None:
    policy = Guarded(Bad("raises while ranking"), "bad")
    policy.add(keys(4))
    assert next(policy.coldest()) == keys(4)[0] and not policy.trouble
    assert list(policy.coldest()) == [keys(4)[0], *reversed(keys(4)[1:])]
    assert policy.trouble == "bad: RuntimeError: a defect"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_storage_tier_goes_on_under_a_policy_that_misbehaves(pipelines: BuildPipeline, fault: str) -> None:
    config = tier(eviction=BadConfig(fault=fault), capacity=6 * OBJECT, lane=LANE)
    pipeline = pipelines(config, slots=32)
    for at in range(0, 20, 4):
        assert store(pipeline, keys(4, at)) == 4
        settle(pipeline)
        pipeline.clear("dram")
        assert serve(pipeline, keys(4, at)) == ["store"] * 4
        settle(pipeline)
    stats = pipeline.stats()["tiers"]["store"]
    assert stats["evicted"] == 14 and stats["used_bytes"] == 6 * OBJECT
    assert stats["eviction_trouble"].startswith("bad: ") and pipeline.stats()["tiers"]["dram"]["eviction_trouble"] == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_memory_goes_on_under_a_policy_that_misbehaves(layout: KVLayout, fault: str) -> None:
    memory: Any = TierConfig(
        name="dram", capacity=8 * 8192, backend=CpuConfig(pin=False), eviction=BadConfig(fault=fault)
    )
    pipeline = build(PipelineConfig(chunk_tokens=16, tiers=(memory,)), layout, poison=True)
    try:
        for at in range(0, 40, 4):
            assert store(pipeline, keys(4, at)) == 4
            with pipeline.retrieve(keys(4, at)) as lease:
                assert verify(pipeline, lease) == 4
        settle(pipeline)
        stats = pipeline.stats()["tiers"]["dram"]
        assert stats["evicted"] == 32 and stats["eviction_trouble"].startswith("bad: ")
    finally:
        pipeline.close()
