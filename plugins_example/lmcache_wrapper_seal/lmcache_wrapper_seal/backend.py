"""A storage backend whose objects are encrypted on the way in and authenticated on the way out."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from lmcache_core.errors import CorruptChunk
from lmcache_core.protocols import BuildContext, Region, StorageBackend
from lmcache_core.types import ChunkKey, Got, Put, Usage, round_up
from lmcache_wrapper_seal.envelope import OVERHEAD, close_into, open_into
from lmcache_wrapper_seal.keys import Keyring, Masters


def staging_bytes(context: BuildContext, share: int) -> int:
    """Memory of a sealed tier: a share of `share` objects for each thread."""
    return context.threads * share * round_up(context.object_bytes)


class SealedBackend(StorageBackend):
    """Passes on what `inner` does. AES-GCM runs without the GIL, straight between the caller's buffer and staging."""

    def __init__(self, inner: StorageBackend, masters: Masters, object_bytes: int, threads: int, share: int) -> None:
        """`object_bytes`: largest encrypted object. Staging is cut here: `threads` shares of `share` objects."""
        self.contains_is_local = inner.contains_is_local  # type: ignore[misc]
        self._inner = inner
        self._ring = Keyring(masters)
        self._share = share
        size = round_up(object_bytes)
        memory = mmap.mmap(-1, threads * share * size)
        view = memoryview(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        try:
            inner.register(Region(address, len(view), view, owner=memory))
        except BaseException:
            inner.close()
            raise
        self._free: SimpleQueue[list[memoryview]] = SimpleQueue()
        for at in range(0, len(view), share * size):
            self._free.put([view[at + i * size : at + (i + 1) * size] for i in range(share)])

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return self._inner.contains(keys)

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results: list[Got] = []
        with self._staging() as rooms:
            for at in range(0, len(keys), self._share):
                some = keys[at : at + self._share]
                try:
                    found = list(zip(some, self._inner.get_into(some, rooms[: len(some)]), strict=True))
                except Exception as error:
                    results += [error] * len(some)
                    continue
                wanted = zip(found, rooms, buffers[at : at + self._share], strict=False)
                results += [self._opened(key, got, room, buffer) for (key, got), room, buffer in wanted]
        return results

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        results: list[Put] = []
        with self._staging() as rooms:
            for at in range(0, len(keys), self._share):
                some = keys[at : at + self._share]
                given = zip(some, buffers[at : at + self._share], rooms, strict=False)
                sealed = [close_into(self._ring, *each) for each in given]
                try:
                    results += [put for _, put in zip(some, self._inner.put_from(some, sealed), strict=True)]
                except Exception as error:
                    results += [error] * len(some)
        return results

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        self._inner.delete(keys)

    def clear(self) -> None:
        self._inner.clear()

    def scan(self) -> Iterator[tuple[ChunkKey, int]] | None:
        found = self._inner.scan()
        return None if found is None else ((key, max(0, nbytes - OVERHEAD)) for key, nbytes in found)

    def footprint(self, nbytes: int) -> int:
        return self._inner.footprint(nbytes + OVERHEAD)

    def usage(self) -> Usage | None:
        usage = self._inner.usage()
        if usage is None:
            return None
        return Usage(usage.objects, usage.object_bytes - usage.objects * OVERHEAD, usage.allocated_bytes)

    def stats(self) -> dict[str, Any]:
        return self._inner.stats()

    def close(self) -> None:
        self._inner.close()

    @contextmanager
    def _staging(self) -> Iterator[list[memoryview]]:
        rooms = self._free.get()
        try:
            yield rooms
        finally:
            self._free.put(rooms)

    def _opened(self, key: ChunkKey, got: Got, room: memoryview, buffer: memoryview) -> Got:
        """What the inner backend said of one key, and if it is bytes, those decrypted."""
        if not isinstance(got, int):
            return got
        if not 0 <= got <= len(room):
            return ValueError(f"get_into returned {got} for a buffer of {len(room)} bytes")
        try:
            return open_into(self._ring, key, room[:got], buffer)
        except CorruptChunk as error:
            return error
