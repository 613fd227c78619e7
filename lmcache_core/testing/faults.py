"""Planted faults: a backend that fails on purpose, at random from a seed or exactly when a test says so.

    injector = FaultInjector({"store": Rates(error=0.02, flip=0.01)}, seed=7)
    pipeline = build(config, layout, plugins=injector.plugins())
    injector["store"].hold("get_into")          # the next reads hang until `release()`

The injector is a pluggy plugin object: it wraps `lmcache_build_backend`, so it reaches every backend, anybody's.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from time import sleep
from typing import Any, TypeVar

from lmcache_core.errors import NoSpace
from lmcache_core.hookspecs import hookimpl
from lmcache_core.plugins import Plugins
from lmcache_core.protocols import BackendConfig, BuildContext, MemoryBackend, Region, StorageBackend
from lmcache_core.types import HEADER_BYTES, ChunkKey, Got, Put, Usage

_T = TypeVar("_T")

METHODS = ("contains", "get_into", "put_from", "delete", "clear", "scan", "footprint", "usage", "close")
"""Every method of a storage backend that the core calls."""

LANE_METHODS = ("contains", "get_into", "put_from", "delete")
"""Those that run on a lane, where nobody waits for them without a deadline."""

HANG_S = 60.0
"""Longest a held call waits: a test that forgets to release fails, it does not hang."""


class InjectedFault(OSError):
    """What a planted error raises."""


@dataclass(frozen=True, slots=True)
class Rates:
    """How often each fault happens, 0 to 1. Drawn from the injector's seed."""

    error: float = 0.0
    """Calls that raise before they do anything."""
    late_error: float = 0.0
    """Calls that do their work and raise then."""
    slow: float = 0.0
    """Calls that take `slow_s` longer."""
    slow_s: float = 0.002
    """Seconds."""
    hang: float = 0.0
    """Calls on a lane that wait for `FaultyBackend.release`."""
    refuse: float = 0.0
    """Keys whose result is an error."""
    no_space: float = 0.0
    """Puts of a key that are refused with `NoSpace`."""
    lost_put: float = 0.0
    """Puts of a key that store nothing and report success."""
    torn_put: float = 0.0
    """Puts of a key that store only the beginning and report success."""
    lost_get: float = 0.0
    """Gets of a stored key that say it is absent."""
    flip: float = 0.0
    """Gets of a key with one bit flipped on the way."""
    truncate: float = 0.0
    """Gets of a key that deliver fewer bytes than were stored."""
    zero_tail: float = 0.0
    """Gets of a key whose last part reads as zeros, as after a power cut."""
    misdirect: float = 0.0
    """Gets of a key that deliver the object of another one."""
    keep: float = 0.0
    """Gets whose buffer is kept, and written into during the next get. No cache survives a backend that does this: it
    proves that an oracle sees it."""
    lie: float = 0.0
    """Answers of `contains` that are wrong."""


class FaultyBackend(StorageBackend):
    """A backend with faults in front of it. `counts` says how often each was injected."""

    def __init__(self, inner: StorageBackend, rates: Rates, seed: int) -> None:
        self.inner = inner
        self.rates = rates
        self.device_direct = inner.device_direct  # type: ignore[misc]
        self.contains_is_local = inner.contains_is_local  # type: ignore[misc]
        self.counts: Counter[str] = Counter()
        self.fail: dict[str, BaseException] = {}
        """Method name -> what every call of it raises."""
        self.forge: dict[str, Callable[[Any], Any]] = {}
        """Method name -> what its result is turned into."""
        self._random = Random(seed)
        self._state = threading.Condition()
        self._held: set[str] = set()
        self._hanging = 0
        self._releases = 0
        self._seen: list[ChunkKey] = []
        self._kept: list[memoryview] = []

    # -- for tests -------------------------------------------------------------------------------------------
    def hold(self, *methods: str) -> None:
        """Let calls of these methods hang from now on, until `release`."""
        with self._state:
            self._held.update(methods)

    def release(self) -> None:
        """Let everything that hangs go on, and hold nothing any more."""
        with self._state:
            self._held.clear()
            self._releases += 1
            self._state.notify_all()

    def wait_held(self, count: int = 1, timeout: float = HANG_S) -> None:
        """Wait until `count` calls hang. Raise `AssertionError` after `timeout` seconds."""
        with self._state:
            met = self._state.wait_for(lambda: self._hanging >= count, timeout)
            assert met, f"{self._hanging} calls hang, expected {count}"

    # -- the contract ----------------------------------------------------------------------------------------
    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        with self._around("contains"):
            answers = [present != self._draw("lie") for present in self.inner.contains(keys)]
            return self._forged("contains", answers)

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        with self._around("get_into"):
            for buffer in self._kept:
                buffer[HEADER_BYTES] ^= 1
            self._kept = [buffer for buffer in buffers if self._draw("keep")]
            asked = [self._other(key) if self._draw("misdirect") else key for key in keys]
            results = self.inner.get_into(asked, buffers)
            return self._forged("get_into", [self._spoil(*pair) for pair in zip(results, buffers, strict=True)])

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        with self._around("put_from"):
            results: list[Put] = [None] * len(keys)
            todo: list[int] = []
            views: list[memoryview] = []
            for i, buffer in enumerate(buffers):
                if self._draw("refuse"):
                    results[i] = InjectedFault(5, "refused")
                elif self._draw("no_space"):
                    results[i] = NoSpace("injected")
                elif not self._draw("lost_put"):
                    todo.append(i)
                    views.append(buffer[: self._below(len(buffer))] if self._draw("torn_put") else buffer)
            for i, result in zip(todo, self.inner.put_from([keys[i] for i in todo], views), strict=True):
                results[i] = result
            with self._state:
                self._seen = [*self._seen[-64:], *keys]
            return self._forged("put_from", results)

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        with self._around("delete"):
            self.inner.delete(keys)

    def clear(self) -> None:
        with self._around("clear"):
            self.inner.clear()

    # These are asked at start-up, for every object, or under locks: they fail when told to, never at random.
    def register(self, region: Region) -> None:
        self.inner.register(region)

    def scan(self) -> Iterator[tuple[ChunkKey, int]] | None:
        self._raise("scan")
        return self._forged("scan", self.inner.scan())

    def footprint(self, nbytes: int) -> int:
        self._raise("footprint")
        return self._forged("footprint", self.inner.footprint(nbytes))

    def usage(self) -> Usage | None:
        self._raise("usage")
        return self._forged("usage", self.inner.usage())

    def stats(self) -> dict[str, Any]:
        return self.inner.stats()

    def close(self) -> None:
        self._raise("close")
        self.inner.close()

    # -- inside ----------------------------------------------------------------------------------------------
    @contextmanager
    def _around(self, method: str) -> Generator[None]:
        """What happens before and after the work of a call."""
        with self._state:
            if method in self._held or (method in LANE_METHODS and self._happens("hang")):
                now = self._releases
                self._hanging += 1
                self._state.notify_all()
                self._state.wait_for(lambda: self._releases != now, HANG_S)
                self._hanging -= 1
        if self._draw("slow"):
            sleep(self.rates.slow_s)
        self._raise(method)
        if self._draw("error"):
            raise InjectedFault(5, f"{method} failed before its work")
        yield
        if self._draw("late_error"):
            raise InjectedFault(5, f"{method} failed after its work")

    def _raise(self, method: str) -> None:
        if method in self.fail:
            raise self.fail[method]

    def _forged(self, method: str, result: _T) -> _T:
        if method in self.forge:
            result = self.forge[method](result)
        return result

    def _draw(self, fault: str) -> bool:
        with self._state:
            return self._happens(fault)

    def _happens(self, fault: str) -> bool:
        rate = getattr(self.rates, fault)
        happens = bool(rate) and self._random.random() < rate
        self.counts[fault] += happens
        return happens

    def _below(self, bound: int) -> int:
        with self._state:
            return self._random.randrange(bound)

    def _other(self, key: ChunkKey) -> ChunkKey:
        with self._state:
            return self._random.choice(self._seen) if self._seen else key

    def _spoil(self, got: Got, buffer: memoryview) -> Got:
        """One result of a read, perhaps with a fault in it."""
        if self._draw("refuse"):
            return InjectedFault(5, "refused")
        if not isinstance(got, int) or got == 0:
            return got
        if self._draw("lost_get"):
            return None
        if self._draw("flip"):
            # Half of the flips hit the header, which chance would hardly ever meet.
            at = self._below(min(HEADER_BYTES, got) if self._below(2) else got)
            buffer[at] ^= 1 << self._below(8)
        if self._draw("truncate"):
            return self._below(got)
        if self._draw("zero_tail"):
            keep = self._below(got)
            buffer[keep:got] = bytes(got - keep)
        return got


class FaultInjector:
    """The plugin object: puts a `FaultyBackend` in front of the storage tiers that `rates` names."""

    def __init__(self, rates: Mapping[str, Rates], seed: int = 0) -> None:
        """`rates` by tier name; a tier named with `Rates()` fails only when a test says so."""
        self._rates = dict(rates)
        self._seed = seed
        self._backends: dict[str, FaultyBackend] = {}

    def __getitem__(self, tier: str) -> FaultyBackend:
        """The backend in front of a tier, once it is built."""
        return self._backends[tier]

    def plugins(self) -> Plugins:
        """A plugin manager with this injector in it, for `build`."""
        plugins = Plugins()
        plugins.register(self, "fault-injector")
        return plugins

    def release(self) -> None:
        """Let everything that hangs, in every tier, go on."""
        for backend in self._backends.values():
            backend.release()

    @hookimpl(wrapper=True)
    def lmcache_build_backend(
        self, config: BackendConfig, context: BuildContext
    ) -> Generator[None, StorageBackend | MemoryBackend, StorageBackend | MemoryBackend]:
        inner = yield
        rates = self._rates.get(context.tier)
        if rates is None or not isinstance(inner, StorageBackend):
            return inner
        seed = self._seed * 1000 + list(self._rates).index(context.tier)
        self._backends[context.tier] = FaultyBackend(inner, rates, seed)
        return self._backends[context.tier]
