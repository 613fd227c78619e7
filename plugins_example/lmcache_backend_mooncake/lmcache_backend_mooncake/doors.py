"""Who may enter the library when: removal of a name apart from its use, and few transfers at a time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from lmcache_core.errors import BackendError


class Doors:
    """Many may use a name at once; removal waits for those inside and keeps others out meanwhile.

    Mooncake protects what is being read with a lease of seconds, which a forced removal ignores: without this, memory
    that a read still copies from could be given to another object.
    """

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds after which waiting raises `BackendError`."""
        self._timeout = timeout
        self._state = threading.Condition()
        self._inside: Counter[str] = Counter()
        self._leaving: Counter[str] = Counter()
        self._clearing = 0

    @contextmanager
    def using(self, names: Sequence[str]) -> Iterator[None]:
        """Read or write these names."""
        with self._state:
            self._wait(lambda: not self._clearing and self._leaving.keys().isdisjoint(names))
            self._inside.update(names)
        try:
            yield
        finally:
            with self._state:
                _subtract(self._inside, names)
                self._state.notify_all()

    @contextmanager
    def removing(self, names: Sequence[str]) -> Iterator[None]:
        """Remove these names."""
        with self._state:
            self._leaving.update(names)
        try:
            with self._state:
                self._wait(lambda: self._inside.keys().isdisjoint(names))
            yield
        finally:
            with self._state:
                _subtract(self._leaving, names)
                self._state.notify_all()

    @contextmanager
    def clearing(self) -> Iterator[None]:
        """Remove every name."""
        with self._state:
            self._clearing += 1
        try:
            with self._state:
                self._wait(lambda: not self._inside)
            yield
        finally:
            with self._state:
                self._clearing -= 1
                self._state.notify_all()

    def _wait(self, free: Callable[[], bool]) -> None:
        if not self._state.wait_for(free, self._timeout):
            raise BackendError(f"an earlier call on the same keys has not ended for {self._timeout:g} s")


class Turns:
    """A few at a time; one that takes very long is no longer counted, so that it holds up nobody."""

    def __init__(self, limit: int, stalled_s: float) -> None:
        self._limit = limit
        self._stalled_s = stalled_s
        self._state = threading.Condition()
        self._begun: dict[object, float] = {}

    @contextmanager
    def one(self) -> Iterator[None]:
        """Wait for a turn and have it."""
        turn = object()
        with self._state:
            while True:
                now = monotonic()
                left = [begun + self._stalled_s - now for begun in self._begun.values()]
                counted = [seconds for seconds in left if seconds > 0]
                if len(counted) < self._limit:
                    break
                self._state.wait(min(counted))
            self._begun[turn] = now
        try:
            yield
        finally:
            with self._state:
                del self._begun[turn]
                self._state.notify()


def _subtract(counts: Counter[str], names: Sequence[str]) -> None:
    for name in names:
        counts[name] -= 1
        if not counts[name]:
            del counts[name]
