"""Lossy encodings: never by accident, and never mixed with exact chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest
from chunks import fill, tier
from conftest import BuildPipeline

from lmcache_core.errors import ConfigError
from lmcache_core.identity import Identity
from lmcache_core.keys import chunk_keys
from lmcache_core.pipeline import Pipeline
from lmcache_core.protocols import Serde, SerdeConfig, SerdeContext
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import DictConfig
from lmcache_core.types import ChunkKey
from lmcache_serde.zstd import ZstdConfig

pytestmark = pytest.mark.timeout(60)

STAGING = 1 << 20


class HalfSerde(Serde):
    """Keeps the upper half of every byte: as lossy as can be seen."""

    lossless = False

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes

    @property
    def codec(self) -> str:
        return "half-1"

    def bound(self) -> int:
        return self._chunk_bytes

    def encode(self, chunks: Sequence[memoryview], out: Sequence[memoryview], starts: Sequence[int]) -> list[int]:
        for chunk, buffer in zip(chunks, out, strict=True):
            buffer[:] = bytes(byte & 0xF0 for byte in chunk)
        return [self._chunk_bytes] * len(chunks)

    def decode(self, blobs: Sequence[memoryview], out: Sequence[memoryview]) -> None:
        for blob, buffer in zip(blobs, out, strict=True):
            buffer[:] = blob


class HalfConfig(SerdeConfig):
    type: Literal["half"] = "half"

    def build(self, context: SerdeContext) -> HalfSerde:
        return HalfSerde(context.chunk_bytes)


def keys_of(pipeline: Pipeline, identity: Identity) -> list[ChunkKey]:
    """As adapters make them: with the fidelity of the pipeline they ask."""
    return chunk_keys(replace(identity, fidelity=pipeline.fidelity), range(16 * 4))


def test_a_lossy_serde_must_be_asked_for(pipelines: BuildPipeline) -> None:
    with pytest.raises(ConfigError) as raised:
        pipelines(tier("cold", serde=HalfConfig()), staging=STAGING)
    (problem,) = raised.value.problems
    assert problem.path == "tiers.cold.serde" and "'half' is lossy" in problem.what
    assert "add `lossy: true` to tier `cold`" in problem.fix


def test_a_pipeline_says_what_its_bytes_may_have_been_through(pipelines: BuildPipeline) -> None:
    exact = pipelines(tier(serde=ZstdConfig(), lossy=True), staging=STAGING)
    assert exact.fidelity == "" and exact.stats()["fidelity"] == "exact"
    lossy = pipelines(
        tier("a", serde=ZstdConfig()), tier("b", serde=HalfConfig(), lossy=True), tier("c"), staging=STAGING
    )
    assert lossy.fidelity == "half-1" and lossy.stats()["fidelity"] == "half-1"


def test_exact_chunks_keep_the_keys_they_had_before_fidelity_was_known(identity: Identity) -> None:
    assert identity.digest.hex() == "c147f97112f54fbdcfb64aad9b768569b2ff04f6b47750b1287331ad8da980d8"
    assert replace(identity, fidelity="half-1").prefix != identity.prefix


def test_lossy_bytes_are_never_served_as_exact_ones(pipelines: BuildPipeline, identity: Identity) -> None:
    """Two pipelines share a lossless medium; one of them fills it with what it read from a lossy one."""
    shared: dict[ChunkKey, bytes] = {}
    lossy = pipelines(
        tier("shared", backend=DictConfig(objects=shared)),
        tier("cold", serde=HalfConfig(), lossy=True),
        staging=STAGING,
        slots=16,
    )
    names = keys_of(lossy, identity)
    lossy.store(names, fill(names))
    settle(lossy)
    lossy.clear("dram")
    lossy.clear("shared")
    with lossy.retrieve(names) as lease:
        assert lease.sources == ["cold"] * 4
        damaged = bytes(lease.view(0))
    settle(lossy)
    assert set(shared) == set(names), "promoted into the lossless tier, as raw objects"
    exact = pipelines(tier("shared", backend=DictConfig(objects=shared)))
    wanted = keys_of(exact, identity)
    assert len(shared) == 4 and exact.lookup(wanted).count == 0
    exact.store(wanted, fill(wanted))
    settle(exact)
    exact.clear("dram")
    with exact.retrieve(wanted) as lease:
        assert lease.sources == ["shared"] * 4 and bytes(lease.view(0)) != damaged
    assert len(shared) == 8


def test_pipelines_of_equal_fidelity_share(pipelines: BuildPipeline, identity: Identity) -> None:
    cold = tier("cold", backend=DictConfig(), serde=HalfConfig(), lossy=True)
    first = pipelines(cold, staging=STAGING, slots=16)
    names = keys_of(first, identity)
    first.store(names, fill(names))
    settle(first)
    second = pipelines(cold, staging=STAGING, slots=16)
    assert keys_of(second, identity) == names and second.lookup(names).count == 4
