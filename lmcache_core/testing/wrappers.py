"""Wrappers around any backend, put there through the build hook.

    slow = Wrapping({"store": lambda inner, context: Slow(inner, latency_s=0.002, bytes_per_s=1e9)})
    pipeline = build(config, layout, plugins=slow.plugins())

Faults have a wrapper of their own, `lmcache_core.testing.faults.FaultInjector`. `Forwarding` is also the base to write
a plugin's wrapper on: it passes every call on, so that a wrapper is the methods that it changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from time import perf_counter, sleep
from typing import Any

from lmcache_core.hookspecs import hookimpl
from lmcache_core.plugins import Plugins
from lmcache_core.protocols import BackendConfig, BuildContext, MemoryBackend, Region, StorageBackend
from lmcache_core.types import ChunkKey, Got, Put, Usage


class Forwarding(StorageBackend):
    """Does what `inner` does."""

    def __init__(self, inner: StorageBackend) -> None:
        self.inner = inner
        self.device_direct = inner.device_direct  # type: ignore[misc]
        self.contains_is_local = inner.contains_is_local  # type: ignore[misc]

    def register(self, region: Region) -> None:
        self.inner.register(region)

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return self.inner.contains(keys)

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        return self.inner.get_into(keys, buffers)

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        return self.inner.put_from(keys, buffers)

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        self.inner.delete(keys)

    def clear(self) -> None:
        self.inner.clear()

    def scan(self) -> Iterator[tuple[ChunkKey, int]] | None:
        return self.inner.scan()

    def footprint(self, nbytes: int) -> int:
        return self.inner.footprint(nbytes)

    def usage(self) -> Usage | None:
        return self.inner.usage()

    def stats(self) -> dict[str, Any]:
        return self.inner.stats()

    def close(self) -> None:
        self.inner.close()


class Slow(Forwarding):
    """A medium far away: every batch call takes `latency_s` longer, and all bytes share one line of `bytes_per_s`."""

    def __init__(self, inner: StorageBackend, *, latency_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        super().__init__(inner)
        if latency_s > 0:
            self.contains_is_local = False  # type: ignore[misc]
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        self._wait(0)
        return super().contains(keys)

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results = super().get_into(keys, buffers)
        self._wait(sum(result for result in results if isinstance(result, int)))
        return results

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        self._wait(sum(buffer.nbytes for buffer in buffers))
        return super().put_from(keys, buffers)

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        self._wait(0)
        super().delete(keys)

    def _wait(self, nbytes: int) -> None:
        now = perf_counter()
        until = now
        if nbytes and self._bytes_per_s:
            with self._lock:
                until = self._free_at = max(now, self._free_at) + nbytes / self._bytes_per_s
        sleep(until - now + self._latency_s)


class Wrapping:
    """The plugin object: puts wrappers in front of the tiers that it names. `wrapped` holds them, by tier."""

    def __init__(self, wrap: Mapping[str, Callable[[StorageBackend, BuildContext], StorageBackend]]) -> None:
        """`wrap` by tier name: what to make of the tier's backend."""
        self._wrap = dict(wrap)
        self.wrapped: dict[str, Any] = {}

    def plugins(self) -> Plugins:
        """A plugin manager with these wrappers in it, for `build`."""
        plugins = Plugins()
        plugins.register(self, "wrapping")
        return plugins

    @hookimpl(wrapper=True)
    def lmcache_build_backend(
        self, config: BackendConfig, context: BuildContext
    ) -> Generator[None, StorageBackend | MemoryBackend, StorageBackend | MemoryBackend]:
        inner = yield
        wrap = self._wrap.get(context.tier)
        if wrap is None or not isinstance(inner, StorageBackend):
            return inner
        wrapper = wrap(inner, context)
        self.wrapped[context.tier] = wrapper
        return wrapper
