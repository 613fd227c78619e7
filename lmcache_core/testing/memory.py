"""A storage backend in a dict, and page-aligned buffers: the smallest medium a test can stand on."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from lmcache_core.errors import CorruptChunk, NoSpace
from lmcache_core.protocols import BackendConfig, BuildContext, StorageBackend
from lmcache_core.types import ChunkKey, Got, MissReason, Put, Usage


def aligned(nbytes: int, fill: int = 0xDB) -> memoryview:
    """A writable, page-aligned buffer of `nbytes` bytes, filled with poison."""
    memory = mmap.mmap(-1, nbytes)
    ctypes.memset((ctypes.c_char * nbytes).from_buffer(memory), fill, nbytes)
    return memoryview(memory)


class DictBackend(StorageBackend):
    """Objects in a dict that outlives the backend, as a medium outlives a process.

    `scannable`: whether `scan` tells what is there, so that the core keeps the index. `local`: what `contains_is_local`
    says. `capacity`: bytes after which a put is refused with `NoSpace`.
    """

    def __init__(
        self,
        objects: dict[ChunkKey, bytes],
        *,
        scannable: bool = True,
        local: bool = True,
        capacity: int | None = None,
    ) -> None:
        self.objects = objects
        self.contains_is_local = local  # type: ignore[misc]
        self._scannable = scannable
        self._capacity = capacity
        self._lock = threading.Lock()

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [key in self.objects for key in keys]

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results: list[Got] = []
        for key, buffer in zip(keys, buffers, strict=True):
            obj = self.objects.get(key)
            if obj is not None and len(obj) > len(buffer):  # stored by other settings
                results.append(CorruptChunk(MissReason.CORRUPT, f"{len(obj)} bytes, more than any object of this tier"))
                continue
            if obj is not None:
                buffer[: len(obj)] = obj
            results.append(None if obj is None else len(obj))
        return results

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        results: list[Put] = []
        for key, buffer in zip(keys, buffers, strict=True):
            obj = bytes(buffer)
            with self._lock:
                free = self._free(key)
                if free is not None and len(obj) > free:
                    results.append(NoSpace(f"{len(obj)} bytes do not fit into the {free} that are free"))
                else:
                    self.objects[key] = obj
                    results.append(None)
        return results

    def _free(self, key: ChunkKey) -> int | None:
        """Bytes an object under `key` may take; None without a limit."""
        if self._capacity is None:
            return None
        return self._capacity - sum(len(obj) for other, obj in list(self.objects.items()) if other != key)

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        for key in keys:
            self.objects.pop(key, None)

    def clear(self) -> None:
        self.objects.clear()

    def scan(self) -> Iterator[tuple[ChunkKey, int]] | None:
        return iter([(key, len(obj)) for key, obj in list(self.objects.items())]) if self._scannable else None

    def usage(self) -> Usage:
        sizes = [len(obj) for obj in list(self.objects.values())]
        return Usage(len(sizes), sum(sizes), sum(sizes))

    def close(self) -> None:
        pass


class DictConfig(BackendConfig):
    """`DictBackend` as a tier. Only Python can write this configuration: it carries the dict itself."""

    type: Literal["dict"] = "dict"
    objects: Any = Field(default_factory=dict)
    scannable: bool = True
    local: bool = True
    limit: int | None = None
    """Bytes the medium itself holds, whatever the tier's capacity says."""

    def build(self, context: BuildContext) -> DictBackend:
        return DictBackend(self.objects, scannable=self.scannable, local=self.local, capacity=self.limit)
