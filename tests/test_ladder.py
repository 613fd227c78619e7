"""Several encodings of every chunk: which one is read, what happens when one is missing, and what is left behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pytest
from chunks import chunk, fill, keys, tier
from conftest import BuildPipeline

from lmcache_core import ladder
from lmcache_core.errors import BackendUnavailable
from lmcache_core.ladder import LadderTier, rung_key
from lmcache_core.pipeline import Pipeline
from lmcache_core.protocols import BackendConfig, BuildContext, Ladder, Serde, SerdeConfig, SerdeContext
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import DictBackend, DictConfig
from lmcache_core.types import ChunkKey, Got, MissReason

pytestmark = pytest.mark.timeout(60)

PARTS = (1, 2, 4)
"""Each rung keeps one byte of so many."""


class Every(Serde):
    def __init__(self, chunk_bytes: int, step: int) -> None:
        self.chunk_bytes, self.step, self.lossless = chunk_bytes, step, step == 1

    @property
    def codec(self) -> str:
        return f"every/{self.step}"

    def bound(self) -> int:
        return self.chunk_bytes // self.step

    def encode(self, chunks: Sequence[memoryview], out: Sequence[memoryview], starts: Sequence[int]) -> list[int]:
        for raw, room in zip(chunks, out, strict=True):
            room[: self.bound()] = raw[:: self.step]
        return [self.bound()] * len(chunks)

    def decode(self, blobs: Sequence[memoryview], out: Sequence[memoryview]) -> None:
        for blob, room in zip(blobs, out, strict=True):
            room[:] = bytes(byte for byte in blob for _ in range(self.step))


class LadderConfig(SerdeConfig):
    type: Literal["ladder"] = "ladder"

    def build(self, context: SerdeContext) -> Ladder:
        rungs = [Every(context.chunk_bytes, step) for step in PARTS]
        return Ladder(rungs, [1 / step for step in PARTS], target=1.0)


class Medium(DictBackend):
    """Keeps its own books, and delivers `rate` bytes a second of a clock of its own; `then` changes the rate."""

    clock, rate = 0.0, 1e6
    then: Iterator[float] = iter(())

    def scan(self) -> None:
        return None

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results = super().get_into(keys, buffers)
        Medium.clock += sum(got for got in results if isinstance(got, int)) / Medium.rate
        Medium.rate = next(Medium.then, Medium.rate)
        return results


class MediumConfig(BackendConfig):
    type: Literal["medium"] = "medium"
    objects: Any

    def build(self, context: BuildContext) -> Medium:
        return Medium(self.objects)


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> dict[ChunkKey, bytes]:
    Medium.clock, Medium.rate, Medium.then = 0.0, 1e6, iter(())
    monkeypatch.setattr(ladder, "monotonic", lambda: Medium.clock)
    return {}


def opened(pipelines: BuildPipeline, objects: dict[ChunkKey, bytes], slots: int = 32) -> tuple[Pipeline, LadderTier]:
    config = tier(
        "cold",
        backend=MediumConfig(objects=objects),
        serde=LadderConfig(),
        lossy=True,
        lane={"threads": 1},
    )
    pipeline = pipelines(config, slots=slots, staging=1 << 18)
    (cold,) = pipeline.tiers
    assert isinstance(cold, LadderTier)
    return pipeline, cold


def filled(pipelines: BuildPipeline, objects: dict[ChunkKey, bytes], count: int = 8) -> tuple[Pipeline, LadderTier]:
    pipeline, cold = opened(pipelines, objects)
    names = keys(count)
    assert pipeline.store(names, fill(names)) == count
    settle(pipeline)
    pipeline.clear("dram")
    return pipeline, cold


def taken(cold: LadderTier) -> list[int]:
    """How many chunks were read at each rung."""
    return [cold.counts[f"read_every/{step}"] for step in PARTS]


def read(cold: LadderTier, count: int, goal: float) -> list[object]:
    return list(cold.read(keys(count), range(count), Medium.clock + goal))


def test_every_encoding_is_stored(pipelines: BuildPipeline, objects: dict[ChunkKey, bytes]) -> None:
    pipeline, _ = filled(pipelines, objects, 2)
    size = pipeline.layout.chunk_bytes
    for key in keys(2):
        found = [len(objects[name]) - 4096 for name in (rung_key(key, "every/1"), rung_key(key, "every/2"), key)]
        assert found == [size, size // 2, size // 4]
    assert len(objects) == 6
    pipeline.tiers[0].forget(keys(2))
    assert not objects, "what is deleted, is deleted at every level"


def test_the_best_that_is_in_time(pipelines: BuildPipeline, objects: dict[ChunkKey, bytes]) -> None:
    pipeline, cold = filled(pipelines, objects)
    whole = pipeline.layout.chunk_bytes + 4096
    assert cold.choose(1e9, 1) == 2, "the smallest, as long as nothing is known"
    assert read(cold, 1, 0.0) == [None]
    assert taken(cold) == [0, 0, 1] and cold.stats()["bytes_per_s"] == 1_000_000
    seconds = 1.01 * whole / 1e6 / 0.85
    assert read(cold, 1, seconds) == [None]
    assert taken(cold) == [1, 0, 1]
    assert bytes(pipeline.slots.payload(0)) == chunk(keys(1)[0], pipeline.layout.chunk_bytes)
    assert read(cold, 1, 0.9 * seconds) == [None]
    assert taken(cold) == [1, 1, 1]
    assert read(cold, 1, 0.1 * seconds) == [None]
    assert taken(cold) == [1, 1, 2], "late anyway: the sooner the better"


def test_the_level_follows_the_bandwidth_within_a_stream(
    pipelines: BuildPipeline, objects: dict[ChunkKey, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, cold = filled(pipelines, objects)
    monkeypatch.setattr(ladder, "STEP_S", 0.0)
    whole = pipeline.layout.chunk_bytes + 4096
    read(cold, 1, 0.0)
    before = taken(cold)
    Medium.then = iter([1e6, 1e6, 1e6, 1e5])
    # Time for eight whole chunks at the speed of the first four.
    monkeypatch.setattr(type(cold.read_lane), "inflight_bytes", 8 * pipeline.slots.slot_bytes)
    read(cold, 8, 8.5 * whole / 1e6 / 0.85)
    assert [now - then for now, then in zip(taken(cold), before, strict=True)] == [5, 0, 3]


@pytest.mark.parametrize("harm", ["gone", "corrupt"])
def test_a_level_that_is_missing_or_broken(pipelines: BuildPipeline, objects: dict[ChunkKey, bytes], harm: str) -> None:
    pipeline, cold = filled(pipelines, objects, 2)
    read(cold, 1, 0.0)
    name = rung_key(keys(1)[0], "every/1")
    objects[name] = objects[name][:-1] + bytes([objects[name][-1] ^ 1])
    if harm == "gone":
        del objects[name]
    assert read(cold, 2, 60.0) == [None, None]
    assert taken(cold) == [1, 1, 1]
    assert name not in objects and keys(1)[0] in objects, "only the broken one is quarantined"
    assert cold.counts["quarantined_corrupt"] == (harm == "corrupt")
    for key in keys(2):
        del objects[key], objects[rung_key(key, "every/2")]
    assert read(cold, 2, 60.0) == [MissReason.RACED, None]
    pipeline.clear()


def test_through_the_pipeline(pipelines: BuildPipeline, objects: dict[ChunkKey, bytes]) -> None:
    pipeline, cold = filled(pipelines, objects)
    assert pipeline.fidelity.startswith("ladder/")
    with pipeline.retrieve(keys(8)) as lease:
        assert lease.sources == ["cold"] * 8
    assert sum(taken(cold)) == 8


def test_a_medium_whose_books_the_core_keeps(pipelines: BuildPipeline) -> None:
    with pytest.raises(BackendUnavailable, match="adaptive level needs a medium that keeps its own books"):
        pipelines(tier("disk", backend=DictConfig(), serde=LadderConfig(), lossy=True), staging=1 << 18)
