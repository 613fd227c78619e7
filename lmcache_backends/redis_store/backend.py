"""The Redis backend: batches over one connection, pieces streamed from and into the caller's buffers.

What goes wrong with a server is the result of the keys it keeps; keys on other servers are served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from lmcache_backends.redis_store.format import Head, Names
from lmcache_backends.redis_store.presence import Presence
from lmcache_backends.redis_store.servers import Servers, Target
from lmcache_backends.redis_store.transfer import OPEN, Reader, Refused, Writer, head_in, read_head, unlink
from lmcache_backends.redis_store.wire import Address, Link, Moved, ServerError, Turns, command
from lmcache_core.errors import BackendError, Closed
from lmcache_core.protocols import StorageBackend
from lmcache_core.types import ChunkKey, Got, Put

_RATE = 64 << 20
"""Bytes per second that a call's time allows for."""
_CONNECT_S = 2.0
"""Least time for each step of opening a connection, in the background."""
_START_S = 5.0
"""Least time to reach each server at start-up."""
_ADOPT_MS = 10_000
"""How long pieces outlive the deadline of their write when it never gets to the head."""
_SCAN_PAGE = b"1000"

_Work = Callable[[Address, list[int]], None]


class RedisBackend(StorageBackend):
    """Objects in Redis or Valkey. Thread-safe; a call takes a connection for each server it needs."""

    def __init__(
        self,
        target: Target,
        *,
        prefix: str,
        ttl: float | None,
        part_bytes: int,
        connections: int,
        spare: int,
        timeout: float,
        deadline: float,
        track_keys: int,
    ) -> None:
        """`connections`: most to each server, `spare` of which only speed up puts. `timeout`, `deadline`: seconds.
        `track_keys`: most keys to keep a list of, 0 to ask always."""
        # No call waits for a connection longer than it may: one that is being opened serves the next call.
        self.servers = Servers(target, connections, max(timeout, _CONNECT_S))
        self._names = Names(prefix)
        self._part_bytes = part_bytes
        self._timeout = timeout
        # What the call itself costs after its last wait must fit as well.
        self._deadline = deadline - min(0.02, deadline / 10)
        self._ttl = None if ttl is None else b"%d" % max(1, round(ttl * 1e3))
        self._adopt = b"%d" % (deadline * 1e3 + _ADOPT_MS)
        self._writing = Turns()
        self._spare = spare
        self._closed = False
        self._asked = False
        self.presence = Presence(self.servers, self._names, timeout, track_keys) if track_keys else None

    # The core looks before each question: while the list of keys is complete no lookup waits, otherwise it goes over
    # the tier's threads. Those it makes at start-up, where this says that there are questions to ask; so it does then.
    @property
    def contains_is_local(self) -> bool:  # type: ignore[override]
        """Whether the list of keys is complete now; False before the first question."""
        return self._asked and self.presence is not None and self.presence.complete

    def check(self) -> None:
        """Reach every server once, patiently. Raise `BackendError`."""
        until = monotonic() + max(self._deadline, _START_S)
        for address in self.servers.masters(until):
            with self.servers.link(address, until) as link:
                link.send([command(b"PING")])
                answer = link.reply()
                if isinstance(answer, Refused) and not link.codes & {"LOADING", "NOPERM"}:
                    raise answer
        if self.presence is not None:
            self.presence.start()

    # -- presence --------------------------------------------------------------------------------------------
    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        self._asked = True
        if self.presence is not None:
            known = self.presence.known(keys)
            if known is not None:
                return known
        self._check_open()
        until = self._until(0)
        found: list[bool | Exception] = [False] * len(keys)

        def ask(link: Link, some: list[int]) -> None:
            link.send([self._names.exists(keys[i] for i in some)])
            for i, answer in zip(some, link.integers(len(some)), strict=True):
                found[i] = answer == 1 if isinstance(answer, int) else answer

        failures = self._everywhere(keys, found, until, self._linked(ask, until))
        answers = [answer for answer in found if not isinstance(answer, Exception)]
        if failures and not answers:
            raise failures[0]
        return [answer is True for answer in found]

    # -- reading ---------------------------------------------------------------------------------------------
    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        self._check_open()
        results: list[Got] = [None] * len(keys)
        until = self._until(sum(len(buffer) for buffer in buffers))
        broken: dict[int, Head] = {}

        def read(link: Link, some: list[int]) -> None:
            Reader(link, self._names, self._part_bytes, keys, buffers, results, broken).run(some)
            remains = [i for i in some if i in broken]
            if remains:
                self._sweep(link, keys, remains, broken)

        self._everywhere(keys, results, until, self._linked(read, until))
        if self.presence is not None:
            self.presence.gone([key for key, got in zip(keys, results, strict=True) if got is None])
        # On its way to another node: not here, and no fault of the server's.
        return [None if isinstance(got, ServerError) and got.code == "ASK" else got for got in results]

    def _sweep(self, link: Link, keys: Sequence[ChunkKey], some: list[int], broken: dict[int, Head]) -> None:
        """Delete what is left of objects that lost a piece, unless they were written anew meanwhile."""
        names = self._names
        link.send([b"".join([read_head(names.head(keys[i])) for i in some])])
        heads = [(keys[i], head_in(link.reply()), broken[i].generation) for i in some]
        unlink(link, names, [(key, head) for key, head, lost in heads if head is not None and head.generation == lost])

    # -- writing ---------------------------------------------------------------------------------------------
    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        self._check_open()
        results: list[Put] = [None] * len(keys)
        until = self._until(sum(len(buffer) for buffer in buffers))

        def write(address: Address, some: list[int]) -> None:
            # Whoever waits for a turn keeps no connection from others.
            with self._writing.turn(address, until), self.servers.links(address, until, 1 + self._spare) as links:
                Writer(links, self._names, self._part_bytes, self._ttl, self._adopt, keys, buffers, results).run(some)

        self._everywhere(keys, results, until, write)
        if self.presence is not None:
            self.presence.stored([key for key, put in zip(keys, results, strict=True) if put is None])
        return results

    # -- forgetting ------------------------------------------------------------------------------------------
    def delete(self, keys: Sequence[ChunkKey]) -> None:
        self._check_open()
        until = self._until(0)
        results: list[Exception | None] = [None] * len(keys)

        def forget(link: Link, some: list[int]) -> None:
            names = self._names
            link.send([b"".join([read_head(names.head(keys[i])) for i in some])])
            heads: dict[int, Head | None] = {}
            for i in some:
                answer = link.reply()
                if isinstance(answer, Refused):
                    results[i] = answer
                elif not answer:
                    results[i] = None
                else:
                    heads[i] = head_in(answer)
            refused = unlink(link, names, [(keys[i], head) for i, head in heads.items()])
            for i, refusal in zip(heads, refused, strict=True):
                results[i] = refusal

        failures = self._everywhere(keys, results, until, self._linked(forget, until))
        if self.presence is not None:
            self.presence.gone([key for key, failure in zip(keys, results, strict=True) if failure is None])
        if failures:
            raise failures[0]

    def clear(self) -> None:
        self._check_open()
        for address in self.servers.masters(self._until(0)):
            self._clear(address)
        if self.presence is not None:
            self.presence.forget()

    def _clear(self, address: Address) -> None:
        """Delete all that begins with our prefix. Takes as long as the server has keys to go through."""
        cursor = b"0"
        while True:
            with self.servers.link(address, self._until(0)) as link:
                link.send([command(b"SCAN", cursor, b"MATCH", self._names.everything + b"*", b"COUNT", _SCAN_PAGE)])
                page = link.reply()
                if isinstance(page, Refused):
                    raise page
                if not isinstance(page, list) or len(page) != 2 or not isinstance(page[1], list):
                    raise BackendError(f"{link.where}: unexpected answer to SCAN")
                cursor, names = page
                link.send([command(b"UNLINK", name) for name in names])
                for _ in names:
                    answer = link.reply()
                    if isinstance(answer, Refused):
                        raise answer
                if cursor == b"0":
                    return

    def close(self) -> None:
        self._closed = True
        if self.presence is not None:
            self.presence.close()
        self.servers.close()

    # -- inside ----------------------------------------------------------------------------------------------
    def _until(self, nbytes: int) -> float:
        return monotonic() + min(self._deadline, self._timeout + nbytes / _RATE)

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the Redis backend is closed")

    def _linked(self, work: Callable[[Link, list[int]], None], until: float) -> _Work:
        """`work`, with a connection to the server."""

        def linked(address: Address, some: list[int]) -> None:
            with self.servers.link(address, until) as link:
                work(link, some)

        return linked

    def _everywhere(self, keys: Sequence[ChunkKey], results: list[Any], until: float, work: _Work) -> list[Exception]:
        """Let `work` set the results of keys on the server that keeps them; what goes wrong is their result instead.

        Where a cluster answers that keys have moved, ask it for its map and try those once more. Return the errors.
        """
        todo = list(range(len(keys)))
        for last in (False, True):
            for i in todo:
                results[i] = OPEN
            try:
                for address, some in self.servers.share(keys, todo, until) if todo else ():
                    try:
                        work(address, some)
                    except BackendError as error:
                        _settle(results, some, error)
                if last or not (todo := [i for i in todo if isinstance(results[i], Moved)]):
                    break
                self.servers.refresh(until)
            except BackendError as error:
                _settle(results, todo, error)
                break
        return [result for result in results if isinstance(result, Exception)]


def _settle(results: list[Any], some: Sequence[int], error: Exception) -> None:
    """Make `error` the result of those that have none."""
    for i in some:
        if results[i] is OPEN:
            results[i] = error
