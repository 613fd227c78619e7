"""The base for backends whose client is asynchronous, and threads that a hung call cannot keep a process alive with.

An author writes four coroutines for one key each, one that lists, and gets the blocking, batched, deadline-keeping
contract:

    class MyBackend(AsyncStorage):
        async def has(self, key): ...
        async def load(self, key, buffer): ...
        async def save(self, key, buffer): ...
        async def drop(self, key): ...
        async def stored(self): ...

The keys of a batch run side by side on one event loop, bounded by a semaphore for each kind of work, so that a long
queue of writes does not hold lookups up. What has not ended by the deadline is cancelled and counts as an error.

`has`, `load`, `save` and `drop` may also be plain methods that block: then they run on threads. For bodies of megabytes
that is faster: on a loop every piece that arrives costs a turn of it.
"""

from __future__ import annotations

import asyncio
import queue
import re
import threading
import traceback
import weakref
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future
from inspect import iscoroutinefunction
from time import sleep
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from lmcache_core.errors import BackendError, Closed
from lmcache_core.protocols import BuildContext, StorageBackend
from lmcache_core.types import IDENTITY_BYTES, ChunkKey, Got, Put

_T = TypeVar("_T")
_P = ParamSpec("_P")

WORK_SHARE = 0.9
"""Share of the deadline that the coroutines of a call get; the rest is for cancelling them and taking buffers back."""

_QUESTIONS = 4
"""Questions under way at once for each chunk that may be: they are small, and a lookup waits for all of them."""

_CANCEL_SHARE = 0.04
_POLL_S = 0.0005
_POLL_MOST_S = 0.02
_CLOSE_S = 2.0

_SCAN_S = 120.0
"""Longest wait for the listing at start-up, where nobody waits for a chunk yet."""

_CLEAR_ROUNDS = 3
_CLEAR_BATCH = 1000
_NAME = re.compile(r"[0-9a-f]{64}")


class Stored(NamedTuple):
    """What a listing tells of one object."""

    key: ChunkKey
    nbytes: int
    modified: float
    """When it was written, in Unix seconds; 0 where the store does not say."""


def object_name(key: ChunkKey) -> str:
    """`<h>/<h>/<key in hex>`, h being hex digits of the token chain: 256 directories, names made of the key alone."""
    first = key[IDENTITY_BYTES]  # the first half of a key is the same for a whole model
    return f"{first >> 4:x}/{first & 15:x}/{key.hex()}"


def key_of_path(path: str) -> ChunkKey | None:
    """The key whose `object_name` a path ends with; None for what is not an object of ours."""
    name = path.rpartition("/")[2]
    key = ChunkKey(bytes.fromhex(name)) if _NAME.fullmatch(name) else None
    return key if key is not None and f"/{path}".endswith(f"/{object_name(key)}") else None


class AsyncStorage(StorageBackend):
    """A storage backend made of per-key coroutines.

    `buffer` is a view that ends with the call: writing into it later raises `ValueError` instead of damaging what the
    core has put there since. A coroutine that is cancelled must let it go, and every part of it (`buffer[:n]`): a call
    does not end while a part is in use. A client that may hang on a thread gets a buffer of its own; one that takes a
    time limit is to have the call's (`limit`): only that ends a thread.
    """

    def __init__(
        self,
        context: BuildContext,
        *,
        concurrency: int = 32,
        timeout: float | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """`concurrency`: keys of one kind of work under way at once, and four times as many questions.

        `timeout`: seconds a call may take, where that is less than the tier's deadline allows. `loop`: a running loop
        of the client's, which then is not closed here.
        """
        self.deadline = context.deadline
        """Seconds by which every call has ended."""
        self.limit = min(timeout or context.deadline, WORK_SHARE * context.deadline)
        """Seconds that the coroutines of one call get."""
        self._lookup_limit = min(self.limit, WORK_SHARE * context.lookup_deadline)
        self._scannable = context.capacity is not None
        self._concurrency = concurrency
        self._gates: dict[str, asyncio.Semaphore] = {}
        self._closed = False
        self._pool = DaemonPool(concurrency, f"lmcache-{context.tier}-call")
        self._thread: threading.Thread | None = None
        if loop is None:
            loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=loop.run_forever, name=f"lmcache-{context.tier}-loop", daemon=True)
            self._thread.start()
        self._loop = loop

    # -- what authors write ------------------------------------------------------------------------------------
    @abstractmethod
    def has(self, key: ChunkKey) -> Awaitable[bool] | bool:
        """Whether the key is stored."""

    @abstractmethod
    def load(self, key: ChunkKey, buffer: memoryview) -> Awaitable[int | None] | int | None:
        """Read the object into `buffer`: bytes filled, or None when it is absent."""

    @abstractmethod
    def save(self, key: ChunkKey, buffer: memoryview) -> Awaitable[None] | None:
        """Store the object so that a reader sees all of it or nothing."""

    @abstractmethod
    def drop(self, key: ChunkKey) -> Awaitable[None] | None:
        """Forget the key; an absent one is fine."""

    @abstractmethod
    async def stored(self) -> Sequence[Stored]:
        """Everything there is."""

    async def shut(self) -> None:
        """Close the client. Runs once, on the loop."""

    # -- the contract ------------------------------------------------------------------------------------------
    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """Raise the first error: a store that cannot be asked is not a store without the key."""
        return _raised(self._batch("has", [(self.has, (key,)) for key in keys], []))

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        loans = [_Loan(buffer) for buffer in buffers]
        return self._batch("load", [(self.load, (k, loan.view)) for k, loan in zip(keys, loans, strict=True)], loans)

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        loans = [_Loan(buffer) for buffer in buffers]
        return self._batch("save", [(self.save, (k, loan.view)) for k, loan in zip(keys, loans, strict=True)], loans)

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        """Raise the first error, after every key was tried."""
        _raised(self._batch("drop", [(self.drop, (key,)) for key in keys], []))

    def clear(self) -> None:
        """List and drop until nothing is listed. Raise `BackendError` when a step or all rounds take too long."""
        for _ in range(_CLEAR_ROUNDS):
            keys = [item.key for item in self.run(self.stored(), self.limit)]
            if not keys:
                return
            for at in range(0, len(keys), _CLEAR_BATCH):
                self.delete(keys[at : at + _CLEAR_BATCH])
        if self.run(self.stored(), self.limit):
            raise BackendError(f"objects are still listed after {_CLEAR_ROUNDS} rounds of dropping them")

    def scan(self) -> Iterator[tuple[ChunkKey, int]] | None:
        """Everything listed, oldest first, when the tier has a capacity. Otherwise the store keeps the books."""
        if not self._scannable:
            return None
        found = sorted(self.run(self.stored(), _SCAN_S), key=lambda item: item.modified)
        return iter([(item.key, item.nbytes) for item in found])

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        closing = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        try:
            closing.result(min(self.deadline, _CLOSE_S))
        except TimeoutError:
            closing.cancel()
        finally:
            if self._thread is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(_CLOSE_S)
                if not self._thread.is_alive():
                    self._loop.close()

    # -- for authors -------------------------------------------------------------------------------------------
    def run(self, work: Coroutine[Any, Any, _T], timeout: float) -> _T:
        """Run a coroutine on the loop and wait for it. Raise what it raises, or `BackendError` after `timeout` s."""
        if self._closed:
            work.close()
            raise Closed(f"{type(self).__name__} is closed")
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout), self._loop)
        try:
            # A loop that a coroutine blocks keeps no time: this thread does.
            return future.result(timeout + _CANCEL_SHARE * self.deadline)
        except TimeoutError:
            future.cancel()
            raise BackendError(f"no answer within {timeout:.3g} s") from None

    async def side_by_side(self, kind: str, works: Sequence[Callable[[], Awaitable[_T]]]) -> list[_T | BaseException]:
        """Await them all, at most `concurrency` of one kind at a time; results and errors in their order."""
        gate = self._gate(kind)

        async def gated(work: Callable[[], Awaitable[_T]]) -> _T:
            async with gate:
                return await work()

        return await asyncio.gather(*map(gated, works), return_exceptions=True)

    # -- inside ------------------------------------------------------------------------------------------------
    async def _end(self) -> None:
        self._pool.shutdown()
        await self.shut()
        if self._thread is not None:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left, timeout=_CLOSE_S / 2)

    def _batch(self, kind: str, calls: Sequence[tuple[Callable[..., Any], Any]], loans: Sequence[_Loan]) -> list[Any]:
        """One call of the contract: a result or an exception for each key, within the deadline, buffers back.

        While a client still works in a buffer, it does not return, late or not: the core would put another chunk there.
        """
        if not calls:
            return []
        if self._closed:
            raise Closed(f"{type(self).__name__} is closed")
        limit = self._lookup_limit if kind == "has" else self.limit
        future = asyncio.run_coroutine_threadsafe(self._all(kind, calls, limit), self._loop)
        results: list[Any]
        try:
            results = future.result(limit + 2 * _CANCEL_SHARE * self.deadline)
        except TimeoutError:
            future.cancel()
            results = [BackendError("the event loop is blocked: a coroutine of this backend waits without awaiting")]
            results *= len(calls)
        except CancelledError:  # by `close`; a client's thread may still be at it
            results = [Closed(f"{type(self).__name__} was closed")] * len(calls)
        pause = _POLL_S
        while loans := [loan for loan in loans if not loan.ended()]:
            sleep(pause)
            pause = min(2 * pause, _POLL_MOST_S)
        return results

    async def _all(self, kind: str, calls: Sequence[tuple[Callable[..., Any], Any]], limit: float) -> list[Any]:
        gate = self._gate(kind)

        async def one(work: Callable[..., Any], arguments: Any) -> Any:
            async with gate:
                try:
                    if not iscoroutinefunction(work):
                        return await self._loop.run_in_executor(self._pool, work, *arguments)
                    return await work(*arguments)
                except SystemExit as error:  # asyncio would end the loop's thread with it
                    raise BackendError(repr(error)) from error

        tasks = [asyncio.ensure_future(one(*call)) for call in calls]
        try:
            late = (await asyncio.wait(tasks, timeout=limit))[1]
        finally:
            for task in tasks:
                task.cancel()
        if late:
            await asyncio.wait(late, timeout=_CANCEL_SHARE * self.deadline)
        return [_outcome(task, limit) for task in tasks]

    def _gate(self, kind: str) -> asyncio.Semaphore:
        many = self._concurrency * (_QUESTIONS if kind == "has" else 1)
        return self._gates.setdefault(kind, asyncio.Semaphore(many))


def _outcome(task: asyncio.Future[Any], limit: float) -> Any:
    late = BackendError(f"no answer within {limit:.3g} s")
    if not task.done():
        return late
    try:
        return task.result()
    except (Exception, asyncio.CancelledError) as error:
        _forget_frames(error)
        return error if isinstance(error, Exception) else late


def _raised(results: list[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _forget_frames(error: BaseException) -> None:
    """Drop what the frames of an error hold: a part of a buffer, perhaps."""
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is not None and link.__traceback__ is not None:
            traceback.clear_frames(link.__traceback__)
            links += (link.__context__, link.__cause__)
            link.__traceback__ = None


class _Loan:
    """A buffer as a coroutine sees it: a view that can be ended, and that tells whether parts of it are in use."""

    __slots__ = ("_exporter", "view")

    def __init__(self, buffer: memoryview) -> None:
        exporter = np.frombuffer(buffer, np.uint8)  # lives as long as a view, or a part of one, of anybody
        self._exporter = weakref.ref(exporter)
        self.view = exporter.data

    def ended(self) -> bool:
        """End the view. False while a client has it, or a part of it, in use."""
        try:
            self.view.release()
        except BufferError:
            return False
        return self._exporter() is None


class DaemonPool(Executor):
    """Threads for clients that only block. Unlike `ThreadPoolExecutor`, a process can exit while one of them hangs."""

    def __init__(self, threads: int, name: str) -> None:
        """At most `threads`, each begun when there is work and no thread is free."""
        self._most = threads
        self._name = name
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._free = 0
        self._closed = False

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Queue a call. Raise `Closed` after `shutdown`."""
        future: Future[_T] = Future()
        with self._lock:
            if self._closed:
                raise Closed(f"{self._name} is closed")
            if self._free < 1 and self._threads < self._most:
                try:
                    threading.Thread(target=self._work, name=f"{self._name}-{self._threads + 1}", daemon=True).start()
                except RuntimeError:  # the system has no thread left
                    if not self._threads:
                        raise
                else:
                    self._threads += 1
                    self._free += 1
            self._free -= 1
            self._queue.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:
        """Take no more calls; what is queued still runs. Never waits: a hung call would."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in range(self._threads):
                    self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, call = item
            if future.set_running_or_notify_cancel():
                try:
                    result = call()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            del item, future, call
            with self._lock:
                self._free += 1
