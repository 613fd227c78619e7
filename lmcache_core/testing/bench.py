"""How fast a backend moves objects, what that costs the processor, and how late its slowest calls are.

    figures = measure(RedisConfig(url="redis://127.0.0.1:6379"), object_bytes=8 << 20, seconds=5.0)

It asks the backend as a tier's lanes do: batches of page-aligned sealed objects, from several threads at once.
"""

from __future__ import annotations

import math
import operator
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass, field
from itertools import cycle
from random import Random
from statistics import median
from time import perf_counter

import numpy as np

from lmcache_core.aio import DaemonPool
from lmcache_core.errors import BackendError
from lmcache_core.protocols import BackendConfig, BuildContext, MemoryBackend, StorageBackend
from lmcache_core.seal import RAW_CODEC, seal
from lmcache_core.testing.memory import aligned
from lmcache_core.types import HEADER_BYTES, IDENTITY_BYTES, KEY_BYTES, ChunkKey, Got, Put, round_up

GB = 1e9

WORKING_SET = 1 << 30
"""Bytes stored at a time, unless `measure` is told otherwise."""

EXISTENCE_KEYS = 1000
EXISTENCE_CALLS = 20
DEADLINE_S = 30.0
_DELETED_AT_ONCE = 256
_LAYOUT_ID = b"lmcache-measure!"


@dataclass(frozen=True, slots=True)
class Figures:
    """What `measure` found. GB are 1e9 bytes; latencies are those of one call with a whole batch."""

    put_gb_s: float
    get_gb_s: float
    exists_1000_ms: float
    """Milliseconds of one `contains` of 1,000 keys, half of them stored (fewer where less was stored); the median."""
    cpu_s_per_gb: float
    """Processor seconds this process spent on each GB put or got, user and system together."""
    put_p99_ms: float
    get_p99_ms: float
    object_bytes: int
    threads: int
    batch: int
    """Objects in a call."""


@dataclass(slots=True)
class _Phase:
    """Sums over the timed rounds of one direction."""

    nbytes: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    calls_s: list[float] = field(default_factory=list)

    def p99_ms(self) -> float:
        ordered = sorted(self.calls_s)
        return 1000 * ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]


def measure(
    config: BackendConfig,
    *,
    object_bytes: int,
    seconds: float,
    threads: int = 4,
    batch: int = 4,
    working_set: int = WORKING_SET,
) -> Figures:
    """Measure the medium that `config` reaches, which must be empty and is left empty: about `2 * seconds` in all.

    Objects of `object_bytes` are put until `working_set` bytes are stored, by `threads` threads that hand over `batch`
    objects a call. That fills the medium, off the clock. Then every put makes room first, as in a full cache: as many
    objects are deleted before it, on the clock. The gets read everything in turn.

    Memory backends are measured by copying in and out of a region. Raise `BackendError` where the backend fails or
    returns other bytes than were stored: such a backend has no speed.
    """
    per_round = max(2 * threads, working_set // (object_bytes * batch))
    stored = per_round * batch * round_up(object_bytes)
    # A tier tells of its readers and its writers; here only one kind is at work at a time.
    context = BuildContext("bench", object_bytes, 2 * stored + (64 << 20), 2 * threads, deadline=DEADLINE_S)
    built = config.build(context)
    backend = _Copies(built, object_bytes, per_round * batch) if isinstance(built, MemoryBackend) else built
    with DaemonPool(threads, "measure") as pool:
        run = _Run(backend, pool, object_bytes, threads, batch, per_round)
        try:
            return run.figures(seconds)
        finally:
            if not run.hung:  # what a hung call still uses stays
                backend.close()


class _Run:
    def __init__(
        self,
        backend: StorageBackend,
        pool: Executor,
        object_bytes: int,
        threads: int,
        batch: int,
        per_round: int,
    ) -> None:
        self.backend = backend
        self.pool = pool
        self.hung = False
        self.threads = threads
        self.batch = batch
        self.batches = [[_key(at * batch + i) for i in range(batch)] for at in range(per_round)]
        # Every call puts the same bytes, from memory that all threads share; gets land in memory of each thread's own.
        self.sources = [_object(_key(i), object_bytes) for i in range(batch)]
        self.targets = [[aligned(round_up(object_bytes)) for _ in range(batch)] for _ in range(threads)]
        self.object_bytes = object_bytes
        self.random = Random(0)

    def figures(self, seconds: float) -> Figures:
        put, get = _Phase(), _Phase()
        # Connections, and memory and blocks that the medium touches for the first time. A slow one is cut off here.
        self.batches = self.batches[: self.round(_Phase(), self.put, self.shared(self.batches), seconds)]
        # What is evicted lies here and there.
        keys = [key for batch in self.batches for key in batch]
        self.random.shuffle(keys)
        self.batches = [keys[at : at + self.batch] for at in range(0, len(keys), self.batch)]
        # Each thread has batches of its own: no object is replaced by two at once.
        own = [cycle(self.batches[thread :: self.threads]) for thread in range(self.threads)]
        self.round(put, self.replace, own, seconds)
        exists_ms = self.exists_ms(seconds)
        self.round(_Phase(), self.get, self.shared(self.batches[: self.threads]), math.inf)
        self.round(get, self.get, self.shared(cycle(self.batches)), seconds)
        self.verify()
        self.empty(self.batches)
        return Figures(
            put_gb_s=put.nbytes / put.wall_s / GB,
            get_gb_s=get.nbytes / get.wall_s / GB,
            exists_1000_ms=exists_ms,
            cpu_s_per_gb=(put.cpu_s + get.cpu_s) / (put.nbytes + get.nbytes) * GB,
            put_p99_ms=put.p99_ms(),
            get_p99_ms=get.p99_ms(),
            object_bytes=self.object_bytes,
            threads=self.threads,
            batch=self.batch,
        )

    def shared(self, batches: Iterable[list[ChunkKey]]) -> list[Iterator[list[ChunkKey]]]:
        """All threads take from one source."""
        return [iter(batches)] * self.threads

    def round(
        self,
        phase: _Phase,
        call: Callable[[int, Sequence[ChunkKey]], None],
        sources: Sequence[Iterator[list[ChunkKey]]],
        seconds: float,
    ) -> int:
        """Let each thread make calls until its source is empty or `seconds` are over; add it to `phase`. Calls made."""
        began, cpu = perf_counter(), _cpu_s()

        def work(thread: int) -> list[float]:
            taken: list[float] = []
            before = perf_counter()
            while (not taken or before - began < seconds) and (keys := next(sources[thread], None)) is not None:
                call(thread, keys)
                after = perf_counter()
                taken.append(after - before)
                before = after
            return taken

        futures = [self.pool.submit(work, thread) for thread in range(self.threads)]
        limit = 2 * DEADLINE_S + (seconds if math.isfinite(seconds) else 0.0)
        self.hung = True
        try:
            self.hung = bool(wait(futures, limit).not_done)
        except BaseException:  # interrupted: calls that end get the time to
            self.hung = bool(wait(futures, 5.0).not_done)
            raise
        if self.hung:
            raise BackendError(f"a call of the backend has not ended within {limit:g} s")
        calls = [taken for future in futures for taken in future.result()]
        phase.wall_s += perf_counter() - began
        phase.cpu_s += _cpu_s() - cpu
        phase.calls_s += calls
        phase.nbytes += len(calls) * self.batch * self.object_bytes
        return len(calls)

    def put(self, thread: int, keys: Sequence[ChunkKey]) -> None:
        for result in self.backend.put_from(keys, self.sources):
            if result is not None:
                raise BackendError(f"the backend did not store an object: {result!r}") from result

    def replace(self, thread: int, keys: Sequence[ChunkKey]) -> None:
        """A put into a full medium makes room first."""
        self.backend.delete(keys)
        self.put(thread, keys)

    def get(self, thread: int, keys: Sequence[ChunkKey]) -> None:
        for result in self.backend.get_into(keys, self.targets[thread]):
            if result != self.object_bytes:
                cause = result if isinstance(result, Exception) else None
                raise BackendError(f"of a stored object of {self.object_bytes} bytes came {result!r}") from cause

    def exists_ms(self, seconds: float) -> float:
        """One `contains` of 1,000 keys, in milliseconds: of several, fewer when they take longer than `seconds`."""
        present = [key for keys in self.batches for key in keys][: EXISTENCE_KEYS // 2]
        absent = [_key(i, b"absent") for i in range(EXISTENCE_KEYS - len(present))]
        keys = present + absent
        self.random.shuffle(keys)
        stored = set(present)
        wanted = [key in stored for key in keys]
        taken: list[float] = []
        for _ in range(EXISTENCE_CALLS):
            began = perf_counter()
            answers = self.backend.contains(keys)
            taken.append(1000 * (perf_counter() - began))
            if answers != wanted:
                raise BackendError(f"`contains` was wrong about {sum(map(operator.ne, answers, wanted))} keys")
            if len(taken) >= 3 and sum(taken) > 1000 * seconds:
                break
        return median(taken)

    def verify(self) -> None:
        """Compare one batch with what was put, and put together."""
        self.get(0, self.batches[0])
        for target, source in zip(self.targets[0], self.sources, strict=True):
            if target[: self.object_bytes] != source:
                raise BackendError("the backend returned other bytes than were stored")

    def empty(self, batches: Sequence[list[ChunkKey]]) -> None:
        keys = [key for batch in batches for key in batch]
        for at in range(0, len(keys), _DELETED_AT_ONCE):
            self.backend.delete(keys[at : at + _DELETED_AT_ONCE])


class _Copies(StorageBackend):
    """A memory backend's region, used as storage of objects of one size: what a slot costs to fill and to read."""

    def __init__(self, memory: MemoryBackend, object_bytes: int, count: int) -> None:
        self.memory = memory
        self.step = round_up(object_bytes)
        self.object_bytes = object_bytes
        self.region = memory.allocate(self.step * count)
        self.bytes = np.frombuffer(self.region.view, np.uint8)
        self.free = list(range(count))
        self.places: dict[ChunkKey, int] = {}

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [key in self.places for key in keys]

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        for key, buffer in zip(keys, buffers, strict=True):
            np.copyto(np.frombuffer(buffer, np.uint8)[: self.object_bytes], self._slot(self.places[key]))
        return [self.object_bytes] * len(keys)

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        for key, buffer in zip(keys, buffers, strict=True):
            place = self.places.get(key)
            place = self.free.pop() if place is None else place
            np.copyto(self._slot(place), np.frombuffer(buffer, np.uint8))
            self.places[key] = place
        return [None] * len(keys)

    def _slot(self, place: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        return self.bytes[place * self.step :][: self.object_bytes]

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        self.free += [place for key in keys if (place := self.places.pop(key, None)) is not None]

    def clear(self) -> None:
        self.delete(list(self.places))

    def close(self) -> None:
        self.memory.close()


def _key(number: int, chain: bytes = b"") -> ChunkKey:
    return ChunkKey(
        b"lmcache-measure".ljust(IDENTITY_BYTES, b"-") + (chain + b"%d" % number).rjust(16, b"0")[:KEY_BYTES]
    )


def _object(key: ChunkKey, nbytes: int) -> memoryview:
    """A sealed object of `nbytes` bytes in all, which does not compress."""
    obj = aligned(nbytes)
    payload = nbytes - HEADER_BYTES
    np.frombuffer(obj, np.uint8)[HEADER_BYTES:] = np.random.default_rng(int.from_bytes(key[-8:], "big")).integers(
        0, 256, payload, dtype=np.uint8
    )
    seal(obj, key, _LAYOUT_ID, RAW_CODEC, payload, payload, 0)
    return obj


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
