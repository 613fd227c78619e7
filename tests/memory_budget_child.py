"""What `test_memory_budget` runs in a memory cgroup: limit itself to baseline + budget + 64 MiB, then misbehave.

    python memory_budget_child.py CGROUP CHUNK_TOKENS BUDGET FACTOR DIRECTORY SECONDS

Everything is imported and one small pipeline has lived before the baseline is taken, so that it holds what any process
with lmcache-core has, and nothing of this cache. FACTOR is what the memory tier takes of its budget: more than 1 is a
cache that cheats. Prints one JSON object.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from pathlib import Path
from time import monotonic

import numpy as np
from chunks import keys
from numpy.typing import NDArray

from lmcache_backends.cpu import CpuConfig
from lmcache_backends.gds import GdsConfig
from lmcache_core.build import build
from lmcache_core.config import LaneConfig, PipelineConfig, TierConfig
from lmcache_core.layout import KVLayout
from lmcache_core.pipeline import Pipeline, Reservation
from lmcache_core.types import ChunkKey
from lmcache_serde.zstd import ZstdConfig

MIB = 1 << 20
SLACK = 64 * MIB
USERS = 4


class Cgroup:
    """The memory controller of version 1 or 2, seen from inside."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.v2 = (path / "memory.max").exists()

    def read(self, v1: str, v2: str) -> int:
        return int((self.path / (v2 if self.v2 else v1)).read_text())

    @property
    def used(self) -> int:
        """Bytes that the kernel cannot take back: all but the page cache."""
        lines = (self.path / "memory.stat").read_text().splitlines()
        stat = {name: int(value) for name, value in (line.split() for line in lines)}
        total = self.read("memory.usage_in_bytes", "memory.current")
        return total - stat["file" if self.v2 else "total_cache"]

    @property
    def peak(self) -> int:
        return self.read("memory.max_usage_in_bytes", "memory.peak")

    def limit(self, nbytes: int) -> None:
        (self.path / ("memory.max" if self.v2 else "memory.limit_in_bytes")).write_text(str(nbytes))


def make(chunk_tokens: int, capacity: int, directory: Path) -> Pipeline:
    layout = KVLayout("lknhd", "bfloat16", 4, 2, 2, 32, chunk_tokens, 1)
    lane = LaneConfig(threads=2, deadline=2.0)
    disk = 6 * capacity
    config = PipelineConfig(
        chunk_tokens=chunk_tokens,
        tiers=(
            TierConfig(name="dram", capacity=capacity, backend=CpuConfig()),
            TierConfig(
                name="near",
                capacity=disk,
                write="back",
                lane=lane,
                backend=GdsConfig(path=directory / "near", free_floor="0B"),
            ),
            TierConfig(
                name="far",
                capacity=disk,
                lane=lane,
                serde=ZstdConfig(),
                backend=GdsConfig(path=directory / "far", mode="files", free_floor="0B"),
            ),
        ),
    )
    return build(config, layout)


def misbehave(pipeline: Pipeline, seed: int, end: float, noise: NDArray[np.uint8]) -> int:
    """Far more chunks than fit, held leases, hints for everything, abandoned work; return how many chunks came."""
    rng = random.Random(seed)
    everything = 4 * pipeline.slots.count
    longest = max(2, min(512, pipeline.slots.count // 2))
    served = 0
    held = []

    def fill(reservation: Reservation) -> None:
        for i in range(len(reservation)):
            view = reservation.view(i)
            np.frombuffer(view, np.uint8)[:] = noise[: len(view)]

    while monotonic() < end:
        names: list[ChunkKey] = keys(rng.randint(1, longest), rng.randrange(everything))
        pipeline.store(names, fill)
        pipeline.prefetch(keys(longest, rng.randrange(everything)))
        pipeline.fetch(keys(longest, rng.randrange(everything))).cancel()
        with pipeline.retrieve(names, 0.2) as lease:
            served += len(lease)
        held.append(pipeline.retrieve(keys(4, rng.randrange(everything)), 0.05))
        if len(held) > 2:
            held.pop(0).release()
        if rng.random() < 0.02:
            pipeline.clear("dram")
    for lease in held:
        lease.release()
    return served


def main(path: str, chunk_tokens: str, budget: str, factor: str, directory: str, seconds: str) -> None:
    cgroup = Cgroup(Path(path))
    # What the engine copies in, not ours: noise, so that nothing compresses.
    noise = np.random.default_rng(0).integers(0, 256, 1024 * int(chunk_tokens) + MIB, dtype=np.uint8)
    warm = make(16, 4 * MIB, Path(directory) / "warm")
    misbehave(warm, 0, monotonic() + 0.3, noise)
    warm.close()
    del warm
    baseline = cgroup.used
    limit = baseline + int(budget) + SLACK
    cgroup.limit(limit)
    pipeline = make(int(chunk_tokens), int(int(budget) * float(factor)), Path(directory))
    served: list[int] = []
    end = monotonic() + float(seconds)
    users = [
        threading.Thread(target=lambda seed=seed: served.append(misbehave(pipeline, seed, end, noise)))  # type: ignore[misc]
        for seed in range(USERS)
    ]
    for user in users:
        user.start()
    for user in users:
        user.join()
    pipeline.flush(0.5)
    stats = pipeline.stats()
    result = {
        "baseline": baseline,
        "limit": limit,
        "used": cgroup.used,
        "peak": cgroup.peak,
        "chunk_bytes": pipeline.layout.chunk_bytes,
        "slots": pipeline.slots.count,
        "served": sum(served),
        "users": len(served),
        "hits": stats["hits"],
        "evicted": stats["tiers"]["dram"]["evicted"],
    }
    pipeline.close(0.5)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
