"""Which server keeps a key, and a bounded set of connections to each.

redis-py resolves names, connects, negotiates TLS and authenticates, and asks Sentinels and cluster nodes who is who.
None of that can be held to a deadline, so it runs on short-lived threads, and a call waits for their result no longer
than it may: what comes later serves the next call.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, Literal

from lmcache_backends.redis_store.wire import Address, Late, Link, Reply, command, told
from lmcache_core.errors import BackendError, BackendUnavailable, Closed
from lmcache_core.types import ChunkKey

Mode = Literal["single", "sentinel", "cluster"]
Protocol = Literal[2, 3]

_LOST_CODES = {"NOAUTH", "NOPERM", "WRONGPASS", "READONLY", "MASTERDOWN", "UNBLOCKED"}
"""After these a connection is of no more use: the next one may be let in, or reach another server."""
_SLOTS = 16384


def redis_py() -> Any:
    """The client library. Raise `BackendUnavailable`."""
    try:
        import redis
        import redis.backoff
        import redis.connection
        import redis.crc
        import redis.retry
        import redis.sentinel
    except ImportError as error:
        raise BackendUnavailable(f"redis-py is missing ({error}): pip install lmcache-core[redis]") from error
    return redis


@dataclass(frozen=True, slots=True)
class Target:
    """What the configuration says about reaching the servers."""

    mode: Mode
    seeds: tuple[Address, ...]
    """The server, or Sentinels or cluster nodes to ask."""
    service: str
    tls: Mapping[str, Any] | None = field(repr=False)
    """redis-py's TLS options; None for plain connections."""
    login: Mapping[str, Any] = field(repr=False)
    """redis-py's `username`, `password`, `db`."""
    sentinel_login: Mapping[str, Any] = field(repr=False)


class Servers:
    """Connections to one server, a master behind Sentinels, or the masters of a cluster."""

    def __init__(self, target: Target, connections: int, timeout: float) -> None:
        """`connections`: most to each server. `timeout`: seconds for each step of connecting."""
        self.mode = target.mode
        self.connections = connections
        self._target = target
        self._timeout = timeout
        self._redis = redis_py()
        self._changed = threading.Condition()
        self._closed = False
        self._idle: defaultdict[Address, list[Link]] = defaultdict(list)
        self._count: Counter[Address] = Counter()
        """Connections open and being opened, to each server."""
        self._dialing: Counter[Address] = Counter()
        """Those being opened."""
        self._waiting: Counter[Address] = Counter()
        """Calls that wait for a connection."""
        self._failure: dict[Address, tuple[float, str]] = {}
        """When connecting to a server last failed, and why."""
        self._trouble: dict[Address, float] = {}
        """When a call last failed at a server."""
        single = target.mode == "single"
        self._masters: tuple[Address, ...] = target.seeds[:1] if single else ()
        self._slots: list[int] = []
        """Cluster: for each hash slot the index of its master, -1 for none."""
        self._stale = not single
        self._asking = False
        self._asked_error = ""
        self._asked = 0
        self.version = 0
        """Raised whenever other servers keep the keys."""

    # -- who keeps what --------------------------------------------------------------------------------------
    def masters(self, until: float) -> tuple[Address, ...]:
        """The servers that keep objects. Raise `BackendUnavailable`."""
        if self._stale:
            self.refresh(until)
        return self._masters

    def share(self, keys: Sequence[ChunkKey], some: Sequence[int], until: float) -> list[tuple[Address, list[int]]]:
        """The positions `some` of `keys` by the server that keeps each; servers with recent trouble come last."""
        masters = self.masters(until)
        if self.mode != "cluster":
            return [(masters[0], list(some))]
        shares: dict[int, list[int]] = {}
        slot = self._redis.crc.key_slot
        slots = self._slots
        for i in some:
            shares.setdefault(slots[slot(keys[i].hex().encode())], []).append(i)
        if -1 in shares:
            raise BackendError(f"no node of the cluster keeps {len(shares[-1])} of these keys")
        found = [(masters[at], share) for at, share in shares.items()]
        found.sort(key=lambda entry: self._trouble.get(entry[0], 0.0))
        return found

    def refresh(self, until: float) -> None:
        """Ask anew who keeps what. Raise `BackendUnavailable` when nobody tells in time."""
        with self._changed:
            if self.mode == "single":
                return
            asked = self._asked
            if not self._asking:
                _begin(self._ask, "lmcache-redis-topology")
                self._asking = True
            done = self._changed.wait_for(lambda: self._asked != asked or self._closed, until - monotonic())
            self._check_open()
            if not done:
                raise Late(f"no answer in time from {_listed(self._target.seeds)}")
            if self._asked_error:
                raise BackendUnavailable(self._asked_error)

    def suspect(self, address: Address) -> None:
        """A call failed there: idle connections are closed, and who is who will be asked again."""
        with self._changed:
            self._trouble[address] = monotonic()
            self._stale = self.mode != "single"
            idle = self._idle.pop(address, [])
            self._count[address] -= len(idle)
            self._changed.notify_all()
        for link in idle:
            link.close()

    def _ask(self) -> None:
        error: Exception | None = None
        masters, slots = self._masters, self._slots
        try:
            masters, slots = self._sentinels() if self.mode == "sentinel" else self._nodes()
        except Exception as raised:
            error = _unavailable(raised, f"asking {_listed(self._target.seeds)}")
        with self._changed:
            self.version += (masters, slots) != (self._masters, self._slots)
            self._masters, self._slots = masters, slots
            self._stale = error is not None
            self._asked_error = str(error or "")
            self._asked += 1
            self._asking = False
            self._changed.notify_all()

    def _sentinels(self) -> tuple[tuple[Address, ...], list[int]]:
        target = self._target
        sentinel = self._redis.sentinel.Sentinel(
            list(target.seeds), sentinel_kwargs={**self._options(2), **target.sentinel_login, **_ssl(target)}
        )
        try:
            host, port = sentinel.discover_master(target.service)
        finally:
            for client in sentinel.sentinels:
                client.close()
        return ((str(host), int(port)),), []

    def _nodes(self) -> tuple[tuple[Address, ...], list[int]]:
        """The cluster's map, from the first node that tells it: known masters, then the seeds."""
        errors: list[str] = []
        for host, port in dict.fromkeys([*self._masters, *self._target.seeds]):
            try:
                link = self.dial((host, port))
            except (self._redis.RedisError, OSError) as error:
                errors.append(f"{host}:{port}: {error}")
                continue
            try:
                link.begin(monotonic() + self._timeout)
                link.send([command(b"CLUSTER", b"SLOTS")])
                masters, slots = _read_map(link.reply(), host)
            except BackendError as error:
                errors.append(str(error))
                continue
            finally:
                link.close()
            if masters:
                return masters, slots
            errors.append(f"{host}:{port}: it serves no slot")
        raise BackendUnavailable("; ".join(errors))

    # -- connections -----------------------------------------------------------------------------------------
    @contextmanager
    def link(self, address: Address, until: float) -> Iterator[Link]:
        """A connection for one call; whatever is raised inside closes it. Raise `BackendUnavailable`."""
        with self.links(address, until, 1) as (link,):
            yield link

    @contextmanager
    def links(self, address: Address, until: float, want: int) -> Iterator[list[Link]]:
        """As `link`: one connection, and up to `want` where others are idle. What is missing is opened for later."""
        links = [self._take(address, until)]
        links += self._spare(address, want - 1)
        for link in links:
            link.begin(until)
        try:
            yield links
        except BaseException:
            for link in links:
                self._give_back(link, usable=False)
            self.suspect(address)
            raise
        lost = [link for link in links if not link.codes.isdisjoint(_LOST_CODES)]
        for link in links:
            self._give_back(link, usable=link not in lost)
        if lost:
            self.suspect(address)

    def _take(self, address: Address, until: float) -> Link:
        started = monotonic()
        while True:
            with self._changed:
                self._waiting[address] += 1
                try:
                    link = self._wait(address, started, until)
                finally:
                    self._waiting[address] -= 1
            if link.quiet:
                return link
            self._give_back(link, usable=False)

    def _wait(self, address: Address, started: float, until: float) -> Link:
        """An idle connection, opening one where there is room. Called with the lock held."""
        while True:
            self._check_open()
            if self._idle[address]:
                return self._idle[address].pop()
            when, why = self._failure.get(address, (0.0, ""))
            if why and when >= started:
                raise BackendUnavailable(why)
            if self._dialing[address] < self._waiting[address]:
                self._dial_more(address, 1)
            if not self._changed.wait(until - monotonic()) and monotonic() >= until:
                raise Late(f"no connection to {_listed([address])} in time")

    def _spare(self, address: Address, want: int) -> list[Link]:
        """Up to `want` idle connections; nobody waits."""
        with self._changed:
            idle = self._idle[address]
            links = [idle.pop() for _ in range(min(want, len(idle)))]
            with suppress(BackendUnavailable):
                self._dial_more(address, want - len(links) - self._dialing[address])
        for link in [link for link in links if not link.quiet]:
            links.remove(link)
            self._give_back(link, usable=False)
        return links

    def _dial_more(self, address: Address, want: int) -> None:
        """Begin to open up to `want` connections, where there is room. Called with the lock held."""
        for _ in range(min(want, self.connections - self._count[address])):
            _begin(partial(self._open, address), "lmcache-redis-connect")
            self._count[address] += 1
            self._dialing[address] += 1

    def _open(self, address: Address) -> None:
        """Open a connection for whoever waits for one, on a thread of its own."""
        link, error = None, None
        try:
            link = self.dial(address)
        except Exception as raised:
            error = _unavailable(raised, f"connecting to {_listed([address])}")
            if link is not None:
                link.close()
                link = None
        with self._changed:
            self._dialing[address] -= 1
            if link is not None and not self._closed:
                self._idle[address].append(link)
            else:
                self._count[address] -= 1
            if error is not None:
                self._failure[address] = (monotonic(), str(error))
            self._changed.notify_all()
            closed = self._closed
        if link is not None and closed:
            link.close()

    def dial(self, address: Address, protocol: Protocol = 2) -> Link:
        """A new connection, outside the bounded set; may take several times `timeout`. Raise what redis-py raises."""
        module = self._redis.connection
        host, port = address
        options = {**self._options(protocol), **self._target.login}
        make: Callable[..., Any]
        place: dict[str, Any]
        if not port:
            make, place = module.UnixDomainSocketConnection, {"path": host}
        elif self._target.tls is not None:
            make, place = module.SSLConnection, {"host": host, "port": port, **self._target.tls}
        else:
            make, place = module.Connection, {"host": host, "port": port}
        connection = make(**place, **options)
        connection.connect()
        return Link(connection, address)

    def _options(self, protocol: Protocol) -> dict[str, Any]:
        return {
            "socket_timeout": self._timeout,
            "socket_connect_timeout": self._timeout,
            "retry": self._redis.retry.Retry(self._redis.backoff.NoBackoff(), 0),
            "protocol": protocol,
        }

    def _give_back(self, link: Link, *, usable: bool) -> None:
        with self._changed:
            usable = usable and not self._closed
            if usable:
                self._idle[link.address].append(link)
            else:
                self._count[link.address] -= 1
            self._changed.notify_all()
        if not usable:
            link.close()

    @property
    def opened(self) -> int:
        """Connections open and being opened now."""
        with self._changed:
            return self._count.total()

    # -- life ------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Close what is idle now, and the rest when its call ends. Waits for nobody."""
        with self._changed:
            self._closed = True
            idle = [link for links in self._idle.values() for link in links]
            for address, links in self._idle.items():
                self._count[address] -= len(links)
                links.clear()
            self._changed.notify_all()
        for link in idle:
            link.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the Redis backend is closed")


def _read_map(answer: Reply, host: str) -> tuple[tuple[Address, ...], list[int]]:
    """The masters in an answer to CLUSTER SLOTS, and which of them keeps each slot. `host`: who answered."""
    if isinstance(answer, Exception):
        raise answer
    masters: dict[Address, int] = {}
    slots = [-1] * _SLOTS
    try:
        for first, last, master, *_ in answer:  # type: ignore[misc, union-attr]
            # A node that does not know its own name leaves it empty: it is the one that was asked.
            address = ((master[0] or b"").decode() or host, int(master[1]))
            at = masters.setdefault(address, len(masters))
            slots[first : last + 1] = [at] * (last + 1 - first)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise BackendError(f"Redis at {host}: unexpected answer to CLUSTER SLOTS: {error}") from error
    if len(slots) != _SLOTS:
        raise BackendError(f"Redis at {host}: unexpected answer to CLUSTER SLOTS: {len(slots)} slots")
    return tuple(masters), slots


def _begin(work: Callable[[], None], name: str) -> None:
    """Run it on a thread of its own. Raise `BackendUnavailable` where the system has none left."""
    try:
        threading.Thread(target=work, name=name, daemon=True).start()
    except RuntimeError as error:
        raise BackendUnavailable(f"{name}: {error}") from error


def _unavailable(error: Exception, doing: str) -> BackendError:
    """What to tell of an error of redis-py, which never names a password."""
    if isinstance(error, BackendError):
        return error
    return BackendUnavailable(f"{doing}: {type(error).__name__}: {error}")


def _ssl(target: Target) -> dict[str, Any]:
    return {} if target.tls is None else {"ssl": True, **target.tls}


def _listed(addresses: Sequence[Address]) -> str:
    return ", ".join(map(told, addresses))
