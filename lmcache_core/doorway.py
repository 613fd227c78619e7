"""The doorway between memory and a medium: chunks leave it sealed, perhaps encoded, and are checked on their way in."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TypeVar

from lmcache_core import seal
from lmcache_core.errors import BackendError, CorruptChunk
from lmcache_core.protocols import Region, Serde
from lmcache_core.slots import Slots
from lmcache_core.types import HEADER_BYTES, ChunkKey, MissReason, object_bytes, round_up

_T = TypeVar("_T")

PLUGIN_ERRORS = (Exception, SystemExit)
"""What a plugin may raise without taking anything else with it."""


class Staging:
    """A fixed pool of buffers for encoded objects, cut at start-up into an equal share for each lane thread."""

    def __init__(self, region: Region, buffer_bytes: int, threads: int) -> None:
        self.region = region
        count = region.nbytes // buffer_bytes
        self._share = count // threads
        self._free = [region.view[i * buffer_bytes : (i + 1) * buffer_bytes] for i in range(count)]
        self._lock = threading.Lock()

    def take(self, want: int) -> list[memoryview]:
        """Buffers for one thread: `want`, at most its share."""
        with self._lock:
            taken = [self._free.pop() for _ in range(min(want, self._share))]
        if not taken:
            raise AssertionError("staging has no buffer for each lane thread")
        return taken

    def give_back(self, buffers: Sequence[memoryview]) -> None:
        with self._lock:
            self._free.extend(buffers)


class Doorway:
    """See the module. Objects lie in slots when they are raw, in staging buffers when they are encoded."""

    def __init__(self, slots: Slots, layout_id: bytes) -> None:
        self._slots = slots
        self._layout_id = layout_id

    def seal(self, key: ChunkKey, slot: int) -> memoryview:
        """The slot as a sealed raw object. Two tiers may do this at once: they write the same bytes."""
        slots, size = self._slots, self._slots.chunk_bytes
        view = slots.view(slot, object_bytes(size))
        if not slots.sealed[slot]:
            seal.seal(view, key, self._layout_id, seal.RAW_CODEC, size, size, slots.created[slot])
            slots.sealed[slot] = 1
        return view

    def encode(
        self, serde: Serde, chunks: Sequence[tuple[ChunkKey, int]], buffers: Sequence[memoryview]
    ) -> list[memoryview]:
        """Encode chunks, given with their slots, and seal each in a buffer: the objects. Raise what the serde does, or
        `BackendError` for sizes that cannot be."""
        slots, bound = self._slots, serde.bound()
        bodies = [buffer[HEADER_BYTES : HEADER_BYTES + bound] for buffer in buffers[: len(chunks)]]
        payloads = [slots.payload(slot) for _, slot in chunks]
        sizes = each(chunks, serde.encode(payloads, bodies, [slots.starts[slot] for _, slot in chunks]))
        if not all(0 <= size <= bound for size in sizes):
            raise BackendError(f"serde {serde.codec}: sizes {sizes} are not within its bound of {bound}")
        objects = []
        for (key, slot), buffer, size in zip(chunks, buffers, sizes, strict=False):
            objects.append(buffer[: object_bytes(size)])
            created = slots.created[slot]
            seal.seal(objects[-1], key, self._layout_id, serde.codec, slots.chunk_bytes, size, created)
        return objects

    def open(self, key: ChunkKey, obj: memoryview, serde: Serde | None, payload: memoryview | None) -> None:
        """Check an object; with a serde, decode it into `payload`. Raise `CorruptChunk`."""
        size = self._slots.chunk_bytes
        head = seal.unseal(obj, key, self._layout_id, serde.codec if serde else seal.RAW_CODEC, size)
        if serde is None or payload is None:
            if head.stored_bytes != size:
                raise CorruptChunk(MissReason.CORRUPT, f"raw chunk of {head.stored_bytes} bytes, expected {size}")
            return
        try:
            serde.decode([obj[HEADER_BYTES:]], [payload])
        except CorruptChunk:
            raise
        except PLUGIN_ERRORS as error:
            # A serde's own surprise on bytes it wrote is a defect of the object as far as a reader can tell.
            raise CorruptChunk(MissReason.CORRUPT, f"{type(error).__name__} while decoding: {error}") from error


def each(keys: Sequence[object], results: Sequence[_T]) -> Sequence[_T]:
    """The results, if there is one for each key: anything else would attach outcomes to the wrong chunks."""
    if len(results) != len(keys):
        raise BackendError(f"{len(results)} results for {len(keys)} keys: a plugin returns exactly one for each")
    return results


def staging_buffer_bytes(serde: Serde) -> int:
    """Room for one sealed, encoded object, page aligned."""
    return round_up(HEADER_BYTES + serde.bound())
