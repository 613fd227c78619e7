"""Shared fixtures. Every pipeline a test builds is checked for leaks and broken books when the test ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read when torch is first loaded: spinning OpenMP threads starve every other thread on a machine with few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from dists import Distributions
from hypothesis import settings

from lmcache_backends.cpu import CpuConfig
from lmcache_core.build import build
from lmcache_core.config import PipelineConfig, TierConfig
from lmcache_core.identity import Identity
from lmcache_core.keys import chunk_keys
from lmcache_core.lanes import Breaker
from lmcache_core.layout import KVLayout
from lmcache_core.pipeline import Pipeline
from lmcache_core.testing.faults import FaultInjector
from lmcache_core.testing.invariants import settle
from lmcache_core.types import ChunkKey, object_bytes, round_up

BuildPipeline = Callable[..., Pipeline]

settings.register_profile("lmcache", deadline=None)  # a slow machine is no defect
settings.load_profile("lmcache")


@pytest.fixture
def layout() -> KVLayout:
    """A chunk of 1 KiB: 2 layers, K and V, 16 tokens, 1 head of 8 bfloat16."""
    return KVLayout("lknhd", "bfloat16", 2, 2, 1, 8, chunk_tokens=16, block_tokens=4)


@pytest.fixture
def identity(layout: KVLayout) -> Identity:
    return Identity(model="org/model", weights="00ff", layout=layout)


@pytest.fixture
def keys(identity: Identity) -> list[ChunkKey]:
    """The keys of a sequence of 160 chunks."""
    return chunk_keys(identity, range(16 * 160))


@pytest.fixture
def quick_breaker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breakers that probe after milliseconds, so that a faulty tier is used again within a test."""
    monkeypatch.setattr(Breaker, "PAUSE_S", (0.002, 0.01))


@pytest.fixture
def pipelines(layout: KVLayout) -> Iterator[BuildPipeline]:
    """Build pipelines: `pipelines(*storage tiers, slots=8, injector=None, layout=..., verify="load")`.

    Slots are poisoned when they are freed. When the test ends, nothing may be held and all books must add up.
    """
    opened: list[tuple[Pipeline, FaultInjector | None]] = []

    def make(*tiers: TierConfig, slots: int = 8, injector: FaultInjector | None = None, **options: Any) -> Pipeline:
        kv = options.pop("layout", layout)
        # Staging of encoded tiers comes out of the same capacity.
        room = slots * round_up(object_bytes(kv.chunk_bytes)) + options.pop("staging", 0)
        memory = TierConfig(name="dram", capacity=room, backend=CpuConfig(pin=False))
        shared = options.pop("shared", False)
        config = PipelineConfig(chunk_tokens=kv.chunk_tokens, tiers=(memory, *tiers), **options)
        plugins = injector.plugins() if injector else None
        pipeline = build(config, kv, shared=shared, poison=True, plugins=plugins)
        opened.append((pipeline, injector))
        return pipeline

    yield make
    try:
        for pipeline, injector in opened:
            if injector is not None:
                injector.release()
            settle(pipeline)
    finally:
        for pipeline, _ in opened:
            pipeline.close()


@pytest.fixture
def dists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distributions]:
    """Distributions that are installed for one test only."""
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    yield Distributions(path)
    for name in [n for n, m in sys.modules.items() if str(path) in str(getattr(m, "__file__", None))]:
        del sys.modules[name]
