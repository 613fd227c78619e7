"""A serde is told how many tokens precede each chunk, whichever way the chunk came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest
from chunks import keys, store, tier
from conftest import BuildPipeline

from lmcache_core.pipeline import Pipeline
from lmcache_core.protocols import SerdeConfig, SerdeContext
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import DictConfig
from lmcache_core.types import ChunkKey
from lmcache_serde.raw import Raw

pytestmark = pytest.mark.timeout(60)

HEARD: dict[bytes, int] = {}
"""What `encode` was told, by the first bytes of the chunk: those of its key."""


class Listening(Raw):
    @property
    def codec(self) -> str:
        return "listening/1"

    def encode(self, chunks: Sequence[memoryview], out: Sequence[memoryview], starts: Sequence[int]) -> list[int]:
        for chunk, start in zip(chunks, starts, strict=True):
            HEARD[bytes(chunk[:32])] = start
        return super().encode(chunks, out, starts)


class ListeningConfig(SerdeConfig):
    type: Literal["listening"] = "listening"

    def build(self, context: SerdeContext) -> Listening:
        return Listening(context)


@pytest.fixture
def names() -> list[ChunkKey]:
    HEARD.clear()
    return keys(6)


def listening(name: str = "encoded", **options: Any) -> Any:
    return tier(name, serde=ListeningConfig(), **options)


def heard(pipeline: Pipeline, names: Sequence[ChunkKey]) -> list[int | None]:
    settle(pipeline)
    return [HEARD.get(name) for name in names]


def test_a_store(pipelines: BuildPipeline, names: list[ChunkKey]) -> None:
    pipeline = pipelines(listening(), staging=1 << 18)
    step = pipeline.layout.chunk_tokens
    store(pipeline, names[:2])
    with pipeline.reserve(names, 2) as room:
        for i in range(4):
            room.view(i)[:32] = names[room.positions[i]]
        room.commit()
    assert heard(pipeline, names) == [i * step for i in range(6)]


@pytest.mark.parametrize("mode", ["through", "back"])
def test_a_promotion_behind_what_the_engine_has(pipelines: BuildPipeline, names: list[ChunkKey], mode: str) -> None:
    shared: dict[ChunkKey, bytes] = {}
    store(first := pipelines(tier(backend=DictConfig(objects=shared))), names)
    settle(first)
    pipeline = pipelines(listening(write=mode), tier("plain", backend=DictConfig(objects=shared)), staging=1 << 18)
    step = pipeline.layout.chunk_tokens
    with pipeline.fetch(names[2:], preceding=2).result() as lease:
        assert len(lease) == 4
    assert pipeline.flush(10)
    assert heard(pipeline, names) == [None, None, *(i * step for i in range(2, 6))]
