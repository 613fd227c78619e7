"""A storage backend under watch: calls that hang, raise or answer out of form are told from those that are wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from lmcache_core.protocols import Region, StorageBackend
from lmcache_core.testing.contracts import ContractBroken, demand
from lmcache_core.types import ChunkKey, Got, Put, Usage

_T = TypeVar("_T")
_Outcome = tuple[Any, BaseException | None]

GRACE_S = 1.0
"""What a call may take beyond its deadline: a busy machine is no defect."""


class Watched(StorageBackend):
    """Makes each call on a thread that may be left behind, and checks the form of its results.

    Calls that follow each other run on one thread, so that what a backend keeps per thread stays there.
    """

    def __init__(self, inner: StorageBackend, deadline: float, contract: str = "errors") -> None:
        """Calls must end after `deadline` seconds; one that raises broke `contract`."""
        self.inner = inner
        self.device_direct = inner.device_direct  # type: ignore[misc]
        self.contains_is_local = inner.contains_is_local  # type: ignore[misc]
        self._deadline = deadline
        self._contract = contract
        self._idle: list[SimpleQueue[tuple[Callable[[], Any], SimpleQueue[_Outcome]] | None]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def take_turns(self) -> None:
        """Let the next call come from another thread than the last."""
        if len(self._idle) < 2:
            parked, self._idle = self._idle, []
            self.guard("nothing", lambda: None)  # starts a thread
            self._idle = parked + self._idle
        else:
            self._idle.insert(0, self._idle.pop())

    def register(self, region: Region) -> None:
        self.guard("register", lambda: self.inner.register(region))

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        answers = self.guard("contains", lambda: self.inner.contains(keys))
        _check_form("contains", answers, len(keys), "a bool", lambda answer: isinstance(answer, bool))
        return answers

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results = self.guard("get_into", lambda: self.inner.get_into(keys, buffers))
        _check_form("get_into", results, len(keys), "an int, None or an exception", _is_got)
        return results

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        results = self.guard("put_from", lambda: self.inner.put_from(keys, buffers))
        _check_form("put_from", results, len(keys), "None or an exception", _is_put)
        return results

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        self.guard("delete", lambda: self.inner.delete(keys))

    def clear(self) -> None:
        self.guard("clear", self.inner.clear)

    def scan(self) -> Iterator[tuple[ChunkKey, int]] | None:
        def listed() -> list[tuple[ChunkKey, int]] | None:
            found = self.inner.scan()
            return None if found is None else list(found)

        found = self.guard("scan", listed)
        return None if found is None else iter(found)

    def footprint(self, nbytes: int) -> int:
        return self.guard("footprint", lambda: self.inner.footprint(nbytes))

    def usage(self) -> Usage | None:
        return self.guard("usage", self.inner.usage)

    def stats(self) -> dict[str, Any]:
        return self.guard("stats", self.inner.stats)

    def close(self) -> None:
        self.guard("close", self.inner.close)

    def dismiss(self) -> None:
        """Let the threads that do not hang end."""
        while self._idle:
            self._idle.pop().put(None)

    def guard(self, method: str, work: Callable[[], _T]) -> _T:
        """The result of `work`, which calls `method`. Raise `ContractBroken` when it hangs or raises."""
        try:
            tasks = self._idle.pop()
        except IndexError:
            tasks = SimpleQueue()
            threading.Thread(target=_serve, args=(tasks,), name="lmcache-kit", daemon=True).start()
        done: SimpleQueue[_Outcome] = SimpleQueue()
        tasks.put((work, done))
        try:
            result, error = done.get(timeout=self._deadline + GRACE_S)
        except Empty:
            tasks.put(None)  # should it ever come back, it ends
            raise ContractBroken("deadline", f"{method} did not return within {self._deadline} s") from None
        self._idle.append(tasks)
        if isinstance(error, Exception):
            raise ContractBroken(self._contract, f"{method} raised {type(error).__name__}: {error}") from error
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]


def _serve(tasks: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[_Outcome]] | None]) -> None:
    while (task := tasks.get()) is not None:
        work, done = task
        try:
            outcome: _Outcome = (work(), None)
        except BaseException as error:
            outcome = (None, error)
        done.put(outcome)
        # While this thread is idle it holds on to nothing: buffers are lent for the call only.
        del task, work, done, outcome


def _check_form(method: str, results: object, count: int, form: str, fits: Callable[[object], bool]) -> None:
    if not isinstance(results, list):
        raise ContractBroken("results", f"{method} returned {type(results).__name__}, not a list")
    demand(len(results) == count, "results", f"{method} returned {len(results)} results for {count} keys")
    for result in results:
        demand(fits(result), "results", f"{method}: a result is {form}, not {result!r}")


def _is_got(result: object) -> bool:
    number = isinstance(result, int) and not isinstance(result, bool) and result >= 0
    return result is None or number or isinstance(result, Exception)


def _is_put(result: object) -> bool:
    return result is None or isinstance(result, Exception)
