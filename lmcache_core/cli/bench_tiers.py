"""Measurements of the memory tier and the control plane: copies against memcpy, lookups, keys, bookkeeping."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from lmcache_core import _native
from lmcache_core.cli.bench_common import (
    CHUNK_TOKENS,
    Arena,
    Arm,
    Effort,
    Ratio,
    copy_arms,
    fresh_keys,
    interleave,
    pipeline_of,
    seconds_of,
)
from lmcache_core.cli.layouts import flat
from lmcache_core.copies import PagedKV, PageGeometry
from lmcache_core.errors import LMCacheError
from lmcache_core.identity import Identity
from lmcache_core.keys import chunk_keys
from lmcache_core.layout import KVLayout
from lmcache_core.types import ChunkKey, object_bytes, round_up

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Copy = Callable[[NDArray[np.int64]], None]
    """Copy one batch between slots at the given addresses and the engine's side."""

TOKENS = 128 * 1024
LOOKUP = 1000
CONTROL_BATCH = 128
BLOCK_TOKENS = 16
TINY = flat(1, CHUNK_TOKENS)
"""Chunks of 256 bytes, where only bookkeeping is measured."""


class MemoryTier:
    """A full memory tier: every put evicts the oldest batch, every get takes the one that was idle longest."""

    def __init__(self, layout: KVLayout, slots: int, size: int) -> None:
        self.size = size
        self._nbytes = size * layout.chunk_bytes
        self._room = slots // size
        self._pipeline = pipeline_of(layout, self._room * size)
        self._idle: deque[list[ChunkKey]] = deque()

    def put(self, copy: Copy) -> float:
        """Reserve, copy in, commit; bytes per second."""
        keys = fresh_keys(self.size)
        begun = perf_counter()
        with self._pipeline.reserve(keys) as room:
            copy(room.addresses)
            stored = room.commit()
        seconds = perf_counter() - begun
        if stored != self.size:
            raise LMCacheError(f"{stored} of {self.size} chunks were stored: the measurement is void")
        if len(self._idle) == self._room:
            self._idle.popleft()
        self._idle.append(keys)
        return self._nbytes / seconds

    def get(self, copy: Copy) -> float:
        """Fetch, copy out, release; bytes per second."""
        keys = self._idle.popleft()
        self._idle.append(keys)
        begun = perf_counter()
        with self._pipeline.fetch(keys).result() as lease:
            copy(lease.addresses)
        seconds = perf_counter() - begun
        if len(lease) != self.size:
            raise LMCacheError(f"{len(lease)} of {self.size} chunks were found: the measurement is void")
        return self._nbytes / seconds

    def fill(self, copy: Copy) -> None:
        """Put until the next put must evict."""
        for _ in range(self._room):
            self.put(copy)

    @property
    def batches(self) -> int:
        """Batches that fit."""
        return self._room

    def close(self) -> None:
        """Release the memory."""
        self._pipeline.close()


def measure_copies(layout: KVLayout, effort: Effort, threads: int = 1) -> dict[str, Ratio]:
    """Put, get and first puts into a fresh pool against memcpy; for layouts with layers also from and to paged KV."""
    chunk = layout.chunk_bytes
    source, target = Arena(chunk, effort.span), Arena(chunk, effort.span)
    source.fill()
    size = max(1, min(effort.copy_batch // chunk, source.chunks // 2))
    lengths = np.full(size, chunk, dtype=np.int64)

    def copy_in(slots: NDArray[np.int64]) -> None:
        _native.copy_batch(slots, source.addresses(source.take(size)), lengths, threads)

    def copy_out(slots: NDArray[np.int64]) -> None:
        _native.copy_batch(target.addresses(target.take(size)), slots, lengths, threads)

    controls = copy_arms(source, target, size, threads)
    names = list(controls)
    tier = MemoryTier(layout, source.chunks, size)
    tier.fill(copy_in)
    puts: dict[str, Arm] = {"put": lambda _: tier.put(copy_in)}
    gets: dict[str, Arm] = {"get": lambda _: tier.get(copy_out)}
    if layout.num_layers > 1:
        gather, scatter = _paged(layout, source, size, threads), _paged(layout, target, size, threads)
        puts["gather"] = lambda _: tier.put(gather.gather)
        gets["scatter"] = lambda _: tier.get(scatter.scatter)
    ratios: dict[str, Ratio] = {}
    # Apart from each other: a put into slots that a get has just read finds them in the cache.
    for arms in (puts, gets):
        rates = interleave({**controls, **arms}, effort.copy_rounds)
        ratios |= {name: Ratio.of(rates, name, names) for name in arms}
    tier.close()
    ratios["cold"] = _measure_cold(layout, effort, controls, copy_in, size, source.chunks)
    return ratios


def _measure_cold(
    layout: KVLayout, effort: Effort, controls: dict[str, Arm], copy_in: Copy, size: int, slots: int
) -> Ratio:
    """The first put into every slot of pools that were just built."""
    rates: dict[str, list[float]] = {}
    for _ in range(effort.cold_builds):
        tier = MemoryTier(layout, slots, size)
        arms: dict[str, Arm] = {**controls, "cold": lambda _, tier=tier: tier.put(copy_in)}  # type: ignore[misc]
        for name, found in interleave(arms, tier.batches).items():
            rates.setdefault(name, []).extend(found)
        tier.close()
    return Ratio.of(rates, "cold", list(controls))


class _Pages:
    """An engine's paged KV in an arena: NHD blocks of 16 tokens, K and V of each layer in tensors of their own."""

    def __init__(self, paged: PagedKV, arena: Arena, blocks: int, size: int) -> None:
        self._paged = paged
        self._arena = arena
        self._size = size
        # Requests own scattered blocks: a fixed random permutation.
        self._ids = np.random.default_rng(1).permutation(arena.chunks * blocks).reshape(arena.chunks, blocks)

    def gather(self, slots: NDArray[np.int64]) -> None:
        """Pages to slots."""
        self._paged.gather(self._ids[self._arena.take(self._size)], slots)

    def scatter(self, slots: NDArray[np.int64]) -> None:
        """Slots to pages."""
        self._paged.scatter(self._ids[self._arena.take(self._size)], slots)


def _paged(layout: KVLayout, arena: Arena, size: int, threads: int) -> _Pages:
    blocked = replace(layout, block_tokens=BLOCK_TOKENS)
    chunks = arena.chunks
    tensor = chunks * layout.chunk_bytes // (layout.num_layers * layout.planes)
    start = int(arena.addresses(np.zeros(1, dtype=np.int64))[0])
    bases = start + np.arange(layout.planes * layout.num_layers, dtype=np.int64) * tensor
    paged = PagedKV(
        bases.reshape(layout.planes, layout.num_layers),
        PageGeometry.nhd(blocked),
        chunks * blocked.blocks,
        threads=threads,
        owner=arena,
    )
    return _Pages(paged, arena, blocked.blocks, size)


def measure_control(effort: Effort) -> dict[str, dict[str, float]]:
    """Microseconds per key of batches of 128 keys, medians: into free slots, and into a full pool (`evicting`).

    `store` = reserve + slot addresses + commit; `lookup`; `load` = fetch + result + slot addresses + release; `total`
    is all three, as one request that stores a prefix and one that loads it would do. No data is copied and no
    storage tier is there.
    """
    found: dict[str, dict[str, float]] = {}
    for mode, slots in (("free", (effort.small_rounds + 1) * CONTROL_BATCH), ("evicting", 8 * CONTROL_BATCH)):
        pipeline = pipeline_of(TINY, slots)
        rows: list[tuple[float, float, float]] = []
        if mode == "evicting":
            for _ in range(8):
                pipeline.store(fresh_keys(CONTROL_BATCH), lambda room: None)
        for _ in range(effort.small_rounds):
            keys = fresh_keys(CONTROL_BATCH)
            begun = perf_counter()
            with pipeline.reserve(keys) as room:
                _ = room.addresses
                stored = room.commit()
            committed = perf_counter()
            hit = pipeline.lookup(keys)
            looked = perf_counter()
            with pipeline.fetch(keys).result() as lease:
                _ = lease.addresses
            released = perf_counter()
            if not stored == hit.count == len(lease) == CONTROL_BATCH:
                raise LMCacheError(f"{stored} stored, {hit.count} found, {len(lease)} held of {CONTROL_BATCH} keys")
            rows.append((committed - begun, looked - committed, released - looked))
        pipeline.close()
        columns = [[seconds * 1e6 / CONTROL_BATCH for seconds in column] for column in zip(*rows, strict=True)]
        found[mode] = {
            name: round(statistics.median(column), 3)
            for name, column in zip(("store", "lookup", "load"), columns, strict=True)
        }
        found[mode]["total"] = round(statistics.median(map(sum, zip(*columns, strict=True))), 3)
    return found


def measure_lookup(effort: Effort) -> dict[str, float]:
    """Milliseconds of one lookup of 1,000 chunks, medians: all in memory, and none anywhere."""
    pipeline = pipeline_of(TINY, LOOKUP)
    keys, absent = fresh_keys(LOOKUP), fresh_keys(LOOKUP)
    pipeline.store(keys, lambda room: None)
    if pipeline.lookup(keys).count != LOOKUP or pipeline.lookup(absent).count:
        raise LMCacheError("the lookup found the wrong chunks: the measurement is void")
    found = {
        "memory": milliseconds(lambda: pipeline.lookup(keys), effort.small_rounds),
        "absent": milliseconds(lambda: pipeline.lookup(absent), effort.small_rounds),
    }
    pipeline.close()
    return found


def measure_keys(effort: Effort) -> dict[str, float]:
    """Million tokens per second from token ids to keys, 128k tokens in one call, medians, by type of the ids."""
    identity = Identity(model="bench/model", weights="0" * 64, layout=flat(4096, CHUNK_TOKENS))
    tokens = np.random.default_rng(2).integers(0, 150_000, TOKENS, dtype=np.int32)
    given = {"int32": tokens, "int64": tokens.astype(np.int64), "list": tokens.tolist()}
    rounds = max(5, effort.small_rounds // 2)
    return {
        name: round(TOKENS / milliseconds(lambda ids=ids: chunk_keys(identity, ids), rounds) / 1e3, 1)  # type: ignore[misc]
        for name, ids in given.items()
    }


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    """Median wall time of a call, after one that does not count."""
    work()
    return round(statistics.median(seconds_of(work) for _ in range(rounds)) * 1e3, 4)


def arena_bytes(layout: KVLayout, effort: Effort) -> int:
    """Memory that `measure_copies` holds at once: source, target and one pool."""
    slot = round_up(object_bytes(layout.chunk_bytes))
    return 3 * max(2, effort.span // slot) * slot
