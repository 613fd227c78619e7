"""A tier that keeps every chunk in several encodings and reads the best one that arrives in time.

The idea of CacheGen (Liu et al., SIGCOMM 2024): bandwidth is not known beforehand and changes on the way, so the level
is chosen when a chunk is read, from the speed of the reads before it and the time that is left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import inf
from time import monotonic
from typing import Any

from lmcache_core.errors import BackendUnavailable
from lmcache_core.protocols import Ladder, Serde, StorageBackend
from lmcache_core.tier import Outcome, StorageTier, Write
from lmcache_core.types import HEADER_BYTES, IDENTITY_BYTES, ChunkKey, Got, MissReason

STEP_S = 0.02
"""Chunks that one thread reads in this time are read at once, after one choice; in seconds."""

_FORGET = 0.5
"""Weight that what was measured keeps when the next read comes: within a stream, bandwidth may halve at once."""

_MARGIN = 0.85
"""Part of the time left that is planned with: nothing arrives at a constant speed."""


def rung_key(key: ChunkKey, codec: str) -> ChunkKey:
    """Where one encoding of a chunk is stored, beside the smallest, which has the chunk's own key."""
    return ChunkKey(key[:IDENTITY_BYTES] + hashlib.sha256(key + codec.encode()).digest()[: len(key) - IDENTITY_BYTES])


class LadderTier(StorageTier):
    """See the module. The smallest encoding is written last and asked for: where it is, the chunk is."""

    def __init__(self, name: str, backend: StorageBackend, ladder: Serde | None, *args: Any, **options: Any) -> None:
        """As `StorageTier`. Raise `BackendUnavailable` for a medium whose books the core keeps: they know one object
        for each key."""
        assert isinstance(ladder, Ladder)
        super().__init__(name, backend, ladder, *args, **options)
        self.target = ladder.target
        self._ladder = ladder
        self._sizes = [HEADER_BYTES + part * self._slots.chunk_bytes for part in ladder.parts]
        """Bytes of an object of each rung, as measured last."""
        self._rate = 0.0
        """Bytes a second that the medium delivers to all threads together; 0 before the first read."""
        self._readers = 0
        self._done = 0
        """Chunks that jobs which still run have read: a lane counts a job until it ends."""
        if self.books.index is not None:
            self.stop()
            raise BackendUnavailable(
                f"tier `{name}`: an adaptive level needs a medium that keeps its own books, such as redis, s3 without "
                "a capacity, or mooncake; choose one level for this one"
            )

    # -- reading ---------------------------------------------------------------------------------------------
    def read(self, keys: Sequence[ChunkKey], slots: Sequence[int], goal: float = inf) -> list[Outcome]:
        with self._lock:
            self._readers += 1
        try:
            return super().read(keys, slots, goal)
        finally:
            with self._lock:
                self._readers -= 1
                self._done -= len(keys)

    def _read_some(
        self, keys: Sequence[ChunkKey], slots: Sequence[int], buffers: Sequence[memoryview], goal: float
    ) -> list[Outcome]:
        with self._lock:
            waiting = self.read_lane.inflight_bytes // self._slots.slot_bytes - self._done
            rung = self.choose(goal - monotonic(), waiting)
            together = STEP_S * self._rate / max(1, self._readers) / self._sizes[rung]
        count = min(len(keys), len(buffers), max(1, int(together)))
        outcomes: list[Outcome] = [MissReason.NOT_STORED] * count
        wanted = list(range(count))
        for serde in self._ladder.rungs[rung:]:
            # What was not stored at this level, or not well, may be there at the next.
            names = self._names(serde, [keys[i] for i in wanted])
            got = self._fetch(names, buffers[: len(wanted)], [slots[i] for i in wanted], serde)
            self.count(f"read_{serde.codec}", got.count(None))
            for i, outcome in zip(wanted, got, strict=True):
                outcomes[i] = outcome
            wanted = [i for i in wanted if outcomes[i] is not None]
            if not wanted:
                break
        with self._lock:
            self._done += count
        return outcomes

    def choose(self, seconds: float, chunks: int) -> int:
        """The best rung at which `chunks` chunks arrive in `seconds`; the last if none, or before anything is known."""
        for rung, size in enumerate(self._sizes):
            if self._rate and size * max(1, chunks) <= seconds * _MARGIN * self._rate:
                return rung
        return len(self._sizes) - 1

    def _names(self, serde: Serde, keys: Sequence[ChunkKey]) -> Sequence[ChunkKey]:
        return keys if serde is self._ladder.rungs[-1] else [rung_key(key, serde.codec) for key in keys]

    def _get(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        begun = monotonic()
        results = super()._get(keys, buffers)
        seconds = max(1e-6, monotonic() - begun)
        nbytes = sum(got for got in results if isinstance(got, int))
        if nbytes:
            with self._lock:
                now = nbytes / seconds * self._readers
                self._rate = now if not self._rate else _FORGET * self._rate + (1 - _FORGET) * now
        return results

    def _open(self, key: ChunkKey, obj: memoryview, serde: Serde | None, payload: memoryview | None) -> None:
        super()._open(key, obj, serde, payload)
        if serde is not None:
            rung = self._ladder.rungs.index(serde)
            self._sizes[rung] += (len(obj) - self._sizes[rung]) / 8

    # -- writing ---------------------------------------------------------------------------------------------
    def _encode(self, serde: Serde, new: Sequence[int], job: Write) -> None:
        for rung in self._ladder.rungs:
            # The last one's outcome is the chunk's: without the others it can still be served.
            told = job.outcomes if rung is self._ladder.rungs[-1] else list(job.outcomes)
            super()._encode(rung, new, job._replace(keys=self._names(rung, job.keys), outcomes=told))

    def _medium_delete(self, keys: Sequence[ChunkKey]) -> bool:
        return super()._medium_delete([name for serde in self._ladder.rungs for name in self._names(serde, keys)])

    def stats(self) -> dict[str, Any]:
        return {**super().stats(), "bytes_per_s": round(self._rate)}
