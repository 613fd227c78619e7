"""Defects found in a peer, as tests that this project passes: the letters are those of our notes on it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import TypeVar

import numpy as np
import pytest
from conftest import BuildPipeline
from media import PATIENT, InFiles, InSegments, Medium, chunk, served, store, tier

from lmcache_backends.gds import GdsConfig
from lmcache_core.config import LaneConfig, PipelineConfig
from lmcache_core.identity import Identity
from lmcache_core.keys import chunk_keys
from lmcache_core.layout import KVLayout
from lmcache_core.testing.faults import FaultInjector, Rates
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import DictConfig
from lmcache_core.types import ChunkKey, MissReason, object_bytes

pytestmark = pytest.mark.timeout(60)

T = TypeVar("T")
MODES = ("segments", "files")
SOON = 20.0
"""Seconds that a call takes at most which must not hang; far more than it needs, far less than for ever."""


def on_disk(path: Path, mode: str, layout: KVLayout) -> Medium:
    return InFiles(path) if mode == "files" else InSegments(path, object_bytes(layout.chunk_bytes))


def soon(call: Callable[[], T]) -> T:
    """Run in a thread; fail if it does not return."""
    result: list[T] = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    thread.join(SOON)
    assert not thread.is_alive(), "the call hangs"
    return result[0]


@pytest.mark.parametrize("mode", MODES)
def test_d1_a_read_that_memory_has_no_room_for_is_a_miss(
    pipelines: BuildPipeline, keys: list[ChunkKey], tmp_path: Path, layout: KVLayout, mode: str
) -> None:
    """Defect: with too little staging, objects that were never read were returned, and a lock stayed held."""
    pipeline = pipelines(
        tier(backend=on_disk(tmp_path / "tier", mode, layout).config(), capacity=8 << 20, lane=PATIENT), slots=6
    )
    for at in range(0, 12, 4):
        store(pipeline, keys[at : at + 4])
        settle(pipeline)
    pipeline.clear("dram")
    with pipeline.retrieve(keys[:4]) as held:
        with pipeline.retrieve(keys[:12]) as lease:
            assert len(lease) == 6 and lease.reason is MissReason.NO_ROOM
            assert all(bytes(lease.view(i)) == chunk(keys[i], layout.chunk_bytes) for i in range(6))
            with pipeline.retrieve(keys[8:12]) as none:
                assert len(none) == 0 and none.reason is MissReason.NO_ROOM
        assert len(held) == 4
    for _ in range(3):
        assert soon(lambda: served(pipeline, keys[6:12])) == 6
        assert soon(lambda: served(pipeline, keys[:6])) == 6
        pipeline.clear("dram")


@pytest.mark.parametrize("mode", MODES)
def test_d2_what_is_cleared_or_evicted_is_credited(
    pipelines: BuildPipeline, keys: list[ChunkKey], tmp_path: Path, layout: KVLayout, mode: str
) -> None:
    """Defect: an emptied disk tier still counted its chunks and refused to store ever after."""
    config = GdsConfig(path=tmp_path / "tier", mode=mode, free_floor="0B")
    capacity = 200 << 10 if mode == "segments" else 1400 << 10
    pipeline = pipelines(tier(backend=config, capacity=capacity, lane=PATIENT), slots=160)
    held: list[int] = []
    for _ in range(3):
        for key in keys:
            store(pipeline, [key])
            assert pipeline.flush(SOON)
        settle(pipeline)
        stats = pipeline.stats()["tiers"]["store"]
        held.append(stats["objects"])
        assert 0 < stats["objects"] < len(keys)
        assert stats["used_bytes"] <= capacity and stats["allocated_bytes"] <= capacity
        assert not stats.get("dropped_no_room")
        pipeline.clear()
        stats = pipeline.stats()["tiers"]["store"]
        assert stats["objects"] == stats["used_bytes"] == 0
    assert min(held) == held[0]  # later rounds hold as much as the first


@pytest.mark.parametrize("mode", MODES)
def test_d3_a_truncated_object_is_a_miss(
    pipelines: BuildPipeline, keys: list[ChunkKey], tmp_path: Path, layout: KVLayout, mode: str
) -> None:
    """Defect: a file shorter than its chunk was a hit whose tail was whatever lay in memory."""
    medium = on_disk(tmp_path / "tier", mode, layout)
    config = tier(backend=medium.config(), capacity=8 << 20, lane=PATIENT)
    pipeline = pipelines(config)
    store(pipeline, keys[:3])
    settle(pipeline)
    pipeline.clear("dram")
    for key, keep in ((keys[0], 4600), (keys[1], 4096), (keys[2], 100)):
        medium.write(key, medium.read(key)[:keep])
    for key in keys[:3]:
        with pipeline.retrieve([key]) as lease:
            assert len(lease) == 0 and lease.reason is MissReason.CORRUPT
    assert pipeline.stats()["quarantined"] == 3


@pytest.mark.parametrize("mode", MODES)
def test_d4_a_restart_knows_what_is_on_disk(
    pipelines: BuildPipeline, keys: list[ChunkKey], tmp_path: Path, layout: KVLayout, mode: str
) -> None:
    """Defect: after a restart the files were there, but no key was known and no byte counted."""
    config = tier(backend=on_disk(tmp_path / "tier", mode, layout).config(), capacity=8 << 20, lane=PATIENT)
    pipeline = pipelines(config)
    store(pipeline, keys[:6])
    settle(pipeline)
    before = pipeline.stats()["tiers"]["store"]
    pipeline.close()
    pipeline = pipelines(config)
    after = pipeline.stats()["tiers"]["store"]
    assert after["recovered"] == after["objects"] == before["objects"] == 6
    assert after["used_bytes"] == before["used_bytes"] > 6 * layout.chunk_bytes
    assert pipeline.lookup(keys[:7]).count == 6
    assert served(pipeline, keys[:6]) == 6


@pytest.mark.parametrize("hung", ["", "get_into", "put_from", "contains", "get_into put_from contains"])
def test_d5_close_returns(pipelines: BuildPipeline, keys: list[ChunkKey], hung: str) -> None:
    """Defect: closing a remote tier always hung, waiting for itself. Ours returns even when the medium never does."""
    injector = FaultInjector({"store": Rates()})
    lane = LaneConfig(threads=1, deadline=0.2)
    pipeline = pipelines(tier(backend=DictConfig(scannable=False, local=False), lane=lane), injector=injector)
    store(pipeline, keys[:2])
    settle(pipeline)
    pipeline.clear("dram")
    injector["store"].hold(*hung.split())
    transfer = pipeline.fetch(keys[:2])
    store(pipeline, keys[4:6])
    if hung:
        injector["store"].wait_held()
    begun = monotonic()
    soon(lambda: pipeline.close(1.0))
    assert monotonic() - begun < SOON
    transfer.cancel()
    soon(pipeline.close)


def test_d6_a_full_memory_answers_at_once(pipelines: BuildPipeline, keys: list[ChunkKey]) -> None:
    """Defect: allocating from a full pool never returned."""
    pipeline = pipelines(tier(lane=PATIENT), slots=4)
    store(pipeline, keys[:4])
    settle(pipeline)
    with pipeline.retrieve(keys[:4]) as lease:
        assert len(lease) == 4
        with pipeline.reserve(keys[4:8]) as reservation:
            assert len(reservation) == 0
        assert soon(lambda: store(pipeline, keys[4:8])) == 0
        assert pipeline.stats()["dropped"][MissReason.NO_ROOM] >= 4
    with pipeline.reserve(keys[4:8]) as all_slots:
        assert len(all_slots) == 4
        with pipeline.retrieve(keys[:4]) as lease:
            assert len(lease) == 0 and lease.reason is MissReason.NO_ROOM
    assert store(pipeline, keys[4:8]) == 4


def test_d7_the_hash_is_what_it_says(identity: Identity) -> None:
    """Defect: a configured hash that was missing was silently replaced by Python's, different in every process."""
    tokens = np.arange(32, dtype="<i4")
    state = sha256(identity.digest).digest()
    expected = []
    for i in range(2):
        state = sha256(state + tokens[16 * i : 16 * i + 16].tobytes()).digest()
        expected.append(identity.digest[:16] + state[:16])
    assert chunk_keys(identity, tokens) == expected
    assert not [name for name in PipelineConfig.model_fields if "hash" in name]
    program = (
        "from lmcache_core.identity import Identity; from lmcache_core.layout import KVLayout;"
        "from lmcache_core.keys import chunk_keys;"
        "l = KVLayout('lknhd', 'bfloat16', 2, 2, 1, 8, chunk_tokens=16, block_tokens=4);"
        "print(chunk_keys(Identity(model='org/model', weights='00ff', layout=l), range(32))[1].hex())"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert result.stdout.strip() == expected[1].hex(), result.stderr


@pytest.mark.parametrize("write", ["", "through", "back"])
def test_d8_a_burst_is_admitted(pipelines: BuildPipeline, identity: Identity, write: str) -> None:
    """Defect: of a burst larger than memory only the first third was kept, then a fifth of 20 stores a second."""
    tiers = [tier(write=write, lane=PATIENT, capacity=100 << 10)] if write else []
    pipeline = pipelines(*tiers, slots=32)
    names = [chunk_keys(identity, [i] * 16)[0] for i in range(156)]
    for key in names:
        assert store(pipeline, [key]) == 1
        assert pipeline.lookup([key]).sources == ["dram"]
        if write == "back":
            assert pipeline.flush(SOON)  # a burst that the medium cannot follow is bounded, not swallowed
    assert not pipeline.stats()["dropped"]
    settle(pipeline)
    # At most a quarter of memory is held by older chunks that were still being written.
    assert all(served(pipeline, [key]) for key in names[-24:])


@pytest.mark.parametrize("mode", MODES)
def test_d9_overwritten_bytes_are_a_miss(
    pipelines: BuildPipeline, keys: list[ChunkKey], tmp_path: Path, layout: KVLayout, mode: str
) -> None:
    """Defect: a file with 64 bytes overwritten was a hit, and wrong values reached the engine."""
    medium = on_disk(tmp_path / "tier", mode, layout)
    pipeline = pipelines(tier(backend=medium.config(), capacity=8 << 20, lane=PATIENT))
    store(pipeline, keys[:2])
    settle(pipeline)
    pipeline.clear("dram")
    obj = medium.read(keys[0])
    medium.write(keys[0], obj[:4500] + b"\x3c" * 64 + obj[4564:])
    with pipeline.retrieve(keys[:2]) as lease:
        assert len(lease) == 0 and lease.reason is MissReason.CORRUPT
    assert pipeline.stats()["quarantined"] == 1
    assert store(pipeline, keys[:1]) == 1
    settle(pipeline)
    pipeline.clear("dram")
    assert served(pipeline, keys[:2]) == 2
