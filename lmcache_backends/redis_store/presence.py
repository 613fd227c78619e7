"""Which keys are stored, known without asking: a list filled by SCAN and kept right by RESP3 tracking messages.

One thread holds one connection to each server. It asks for a message whenever a value under our prefix changes
(BCAST), then lists what is there. A message says only that a key changed, so the key is asked about; what this process
stores and deletes enters the list at once and is asked about as well. Whatever goes wrong, the list counts as
incomplete until it was filled anew, and everybody asks the servers meanwhile. A wrong answer is never more than a miss.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Sequence
from random import Random
from time import monotonic

from lmcache_backends.redis_store.format import Names
from lmcache_backends.redis_store.servers import Servers
from lmcache_backends.redis_store.wire import Address, Link, Push, Reply, ServerError, ServerFull, command
from lmcache_core.errors import BackendError
from lmcache_core.types import ChunkKey

_PAGE = 1000
_HEARTBEAT_S = 1.0
_PAUSE_S = (0.05, 5.0)
_GRACE_S = 0.1
"""How long a list that just became incomplete is still used: whoever saw it complete must not have to wait."""


class _Restart(Exception):
    """The list must be filled anew."""


class Presence:
    """The list of stored keys. All methods but `close` return at once."""

    def __init__(self, servers: Servers, names: Names, timeout: float, most: int) -> None:
        """`timeout`: seconds for an answer. `most`: keys after which it gives up."""
        self.why = "it was not filled yet"
        """Why the list is incomplete."""
        self._servers = servers
        self._names = names
        self._timeout = timeout
        self._most = most
        self._lock = threading.Lock()
        self._present: set[ChunkKey] = set()
        self._check: set[ChunkKey] = set()
        """Keys to ask about."""
        self._touched: dict[ChunkKey, bool] = {}
        """What this process stored (True) or found gone since it last began to ask."""
        self._epoch = 0
        """Raised when all is forgotten: what was asked before is void."""
        self._following = False
        """Whether changes are taken in: from before the list is filled until the connection is lost."""
        self._complete = False
        self._lost = -_GRACE_S
        self._closed = threading.Event()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="lmcache-redis-track", daemon=True)
        self._random = Random()

    # -- asked by the backend --------------------------------------------------------------------------------
    @property
    def complete(self) -> bool:
        """Whether the list can be used."""
        return self._complete

    def known(self, keys: Sequence[ChunkKey]) -> list[bool] | None:
        """Whether each key is stored; None when the server must be asked."""
        if not self._complete and monotonic() - self._lost >= _GRACE_S:
            return None
        present = self._present
        return [key in present for key in keys]

    def stored(self, keys: Sequence[ChunkKey]) -> None:
        """These were just stored."""
        self._note(keys, True)

    def gone(self, keys: Sequence[ChunkKey]) -> None:
        """These were just deleted, or found missing."""
        self._note(keys, False)

    def forget(self) -> None:
        """Everything was deleted."""
        with self._lock:
            self._epoch += 1
            self._check.update(self._present)  # some may have been stored after all
            self._present.clear()
            self._touched.clear()
        self._awake()

    def _note(self, keys: Sequence[ChunkKey], present: bool) -> None:
        if not keys or not self._following:
            return
        with self._lock:
            if present:
                self._present.update(keys)
            else:
                self._present.difference_update(keys)
            self._touched.update(dict.fromkeys(keys, present))
            self._check.update(keys)
        self._awake()

    # -- life ------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Begin to fill the list, on a thread of its own."""
        self._thread.start()

    def close(self) -> None:
        """Stop, waiting a moment for the thread. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._complete = False
        self._awake()
        if self._thread.is_alive():
            self._thread.join(2 * self._timeout)
        if not self._thread.is_alive():
            os.close(self._wake)

    def _awake(self) -> None:
        if not self._closed.is_set() or self._thread.is_alive():
            os.eventfd_write(self._wake, 1)

    # -- the thread ------------------------------------------------------------------------------------------
    def _run(self) -> None:
        pause, longest = _PAUSE_S
        while not self._closed.is_set():
            links: dict[Address, Link] = {}
            try:
                self._follow(links)
            except Exception as error:  # whatever it is, lookups go on without the list
                self.why = f"{type(error).__name__}: {error}"
            finally:
                if self._complete:
                    pause = _PAUSE_S[0]
                    self._lost = monotonic()
                    self._complete = False
                for link in links.values():
                    link.close()
            with self._lock:
                self._following = False
                self._check = set()
                self._touched = {}
            if len(self._present) > self._most:
                self.why = f"more than {self._most} keys are stored: raise track_keys to keep a list of them"
                self._closed.wait(2 * _GRACE_S)
                self._present = set()
                return
            self._closed.wait(pause * (1 + 0.2 * self._random.random()))
            pause = min(longest, 2 * pause)

    def _follow(self, links: dict[Address, Link]) -> None:
        """Fill the list and keep it right; ends by an exception, or when closed."""
        servers = self._servers
        servers.refresh(monotonic() + 2 * self._timeout)
        version = servers.version
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for address in servers.masters(self._soon()):
            link = links[address] = servers.dial(address, protocol=3)
            poll.register(link, select.POLLIN)
            track = (b"CLIENT", b"TRACKING", b"ON", b"BCAST", b"PREFIX", self._names.heads)
            if (answer := self._ask(link, *track)) != b"OK":
                raise BackendError(f"{link.where}: {answer!r}")
        with self._lock:
            self._following = True
            epoch = self._epoch
        found: set[ChunkKey] = set()
        for link in links.values():
            self._scan(link, found)
        if len(found) > self._most:
            self._present = found
            raise _Restart("too many keys")  # and what there is of the list is not all
        with self._lock:
            if epoch != self._epoch:
                raise _Restart("everything was deleted meanwhile")
            found.update(key for key, present in self._touched.items() if present)
            found.difference_update(key for key, present in self._touched.items() if not present)
            self._present = found
        self._verify(links)
        self._complete = True
        self.why = ""
        heard = monotonic()
        while not self._closed.is_set():
            # A message may have come with the reply to a question.
            at_once = any(link.buffered for link in links.values())
            ready = {fd for fd, _ in poll.poll(0 if at_once else 1e3 * _HEARTBEAT_S)}
            if self._wake in ready:
                os.eventfd_read(self._wake)
            for link in links.values():
                if link.fileno() in ready or link.buffered:
                    self._listen(link)
            if monotonic() - heard >= _HEARTBEAT_S:
                for link in links.values():
                    self._ask(link, b"PING")
                heard = monotonic()
            if servers.version != version:
                raise _Restart("other servers keep the keys now")
            self._verify(links)

    def _scan(self, link: Link, found: set[ChunkKey]) -> None:
        cursor = b"0"
        while not self._closed.is_set():
            page = self._ask(link, b"SCAN", cursor, b"MATCH", self._names.heads + b"*", b"COUNT", b"%d" % _PAGE)
            if not isinstance(page, list) or len(page) != 2:
                raise BackendError(f"{link.where}: unexpected answer to SCAN: {page!r}")
            cursor = page[0]
            found.update(self._keys(page[1]))
            if cursor == b"0" or len(found) > self._most:
                return

    def _verify(self, links: dict[Address, Link]) -> None:
        """Ask about keys that changed, until none is left."""
        while self._check and not self._closed.is_set():
            with self._lock:
                if len(self._present) > self._most:
                    raise _Restart("too many keys")
                keys = list(self._check)
                self._check = set()
                self._touched = {}
                epoch = self._epoch
            answers: dict[ChunkKey, bool] = {}
            for address, some in self._servers.share(keys, range(len(keys)), self._soon()):
                link = links.get(address)
                if link is None:
                    raise _Restart("other servers keep the keys now")
                for at in range(0, len(some), _PAGE):
                    page = [keys[i] for i in some[at : at + _PAGE]]
                    link.begin(self._soon())
                    link.send([self._names.exists(page)])
                    answers.update((key, self._answer(link) == 1) for key in page)
                    if link.codes:
                        raise _Restart(f"{link.where}: {', '.join(link.codes)}")
            with self._lock:
                if epoch != self._epoch:
                    self._check.update(keys)
                    continue
                for key, present in answers.items():
                    if key in self._touched:
                        continue  # it is to be asked about again
                    if present:
                        self._present.add(key)
                    else:
                        self._present.discard(key)

    # -- messages --------------------------------------------------------------------------------------------
    def _soon(self) -> float:
        return monotonic() + self._timeout

    def _ask(self, link: Link, *words: bytes) -> Reply:
        link.begin(self._soon())
        link.send([command(*words)])
        answer = self._answer(link)
        if isinstance(answer, (ServerError, ServerFull)):
            raise answer
        return answer

    def _answer(self, link: Link) -> Reply:
        """The next reply; messages before it are taken in."""
        while isinstance(reply := link.reply(), Push):
            self._hear(reply)
        return reply

    def _listen(self, link: Link) -> None:
        """Take in the messages that are there."""
        link.begin(self._soon())
        while True:
            message = link.reply()
            if not isinstance(message, Push):
                raise _Restart(f"{link.where}: a reply that nobody asked for")
            self._hear(message)
            if not link.buffered:
                return

    def _hear(self, message: Push) -> None:
        if len(message) == 2 and message[0] == b"invalidate":
            if message[1] is None:
                raise _Restart("the server was emptied")
            keys = self._keys(message[1])
            with self._lock:
                self._check.update(keys)

    def _keys(self, names: object) -> set[ChunkKey]:
        found = {self._names.key(name) for name in names if isinstance(name, bytes)} if isinstance(names, list) else ()
        return {key for key in found if key is not None}
