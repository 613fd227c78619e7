"""Mooncake's client library behind a door: who is inside, whether the master answers, and what its numbers mean.

The library keeps its own connections and comes back by itself after the master or a node was restarted. This adds what
it lacks. A call made while the master is gone would wait 4.3 s for it, so a thread holds a connection to the master and
calls are refused at once while there is none. Closing a client under a running call, and calling a closed one, end the
process, so calls are counted and `close` waits for them.
"""

from __future__ import annotations

import atexit
import os
import re
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lmcache_core.errors import BackendUnavailable, Closed
from lmcache_core.protocols import Region

PATIENCE = 0.4
"""Part of a tier's deadline that one step inside the library may wait: a question to the master, a stalled transfer."""

CONNECT_S = 1.0
BACKOFF_S = (0.1, 2.0)
SETUP_ATTEMPTS = 3

CODES = {
    -1: "INTERNAL_ERROR",
    -2: "NOT_TRIED",
    -10: "BUFFER_OVERFLOW",
    -100: "SHARD_INDEX_OUT_OF_RANGE",
    -101: "SEGMENT_NOT_FOUND",
    -102: "SEGMENT_ALREADY_EXISTS",
    -103: "CLIENT_NOT_FOUND",
    -200: "NO_AVAILABLE_HANDLE",
    -300: "INVALID_VERSION",
    -400: "INVALID_KEY",
    -500: "WRITE_FAIL",
    -600: "INVALID_PARAMS",
    -601: "ILLEGAL_CLIENT",
    -700: "INVALID_WRITE",
    -701: "INVALID_READ",
    -702: "INVALID_REPLICA",
    -703: "REPLICA_IS_NOT_READY",
    -704: "OBJECT_NOT_FOUND",
    -705: "OBJECT_ALREADY_EXISTS",
    -706: "OBJECT_HAS_LEASE",
    -707: "LEASE_EXPIRED",
    -708: "OBJECT_HAS_REPLICATION_TASK",
    -709: "OBJECT_NO_REPLICATION_TASK",
    -710: "REPLICA_NOT_FOUND",
    -711: "REPLICA_ALREADY_EXISTS",
    -712: "REPLICA_IS_GONE",
    -800: "TRANSFER_FAIL",
    -900: "RPC_FAIL",
    -901: "RPC_TIMEOUT",
    -1010: "UNAVAILABLE_IN_CURRENT_STATUS",
    -1011: "UNAVAILABLE_IN_CURRENT_MODE",
}
"""What the library's numbers are called in its own messages and documentation; -2 is ours."""

NOT_TRIED = -2
"""Others of the call took so long that this one could not have come in time."""
NO_SPACE = -200
INVALID_PARAMS = -600
NOT_READY = -703
NOT_FOUND = -704
EXISTS = -705
LEASE_EXPIRED = -707
TRANSFER_FAIL = -800
ABSENT = frozenset({NOT_READY, NOT_FOUND, -710, -712})
"""Not there, not yet there, no longer there."""

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})")


@dataclass(frozen=True, slots=True)
class Membership:
    """How a process takes part in a cluster; `MooncakeConfig` says what each means."""

    master: str
    metadata_server: str
    local_hostname: str
    protocol: str
    device_name: str
    global_segment_size: int


def host_and_port(master: str) -> tuple[str, int] | None:
    """The address in `host:port`; None for anything else."""
    found = _ADDRESS.fullmatch(master)
    if found is None or not 0 < int(found[2]) < 65536:
        return None
    return found[1].strip("[]"), int(found[2])


def code_name(code: int) -> str:
    """For example `TRANSFER_FAIL (-800)`."""
    return f"{CODES.get(code, 'code')} ({code})"


class Client:
    """One membership of a Mooncake cluster."""

    def __init__(self, member: Membership, deadline: float) -> None:
        """Join. Raise `BackendUnavailable`."""
        self._member = member
        self._address = host_and_port(member.master)
        self._state = threading.Condition()
        self._calls = 0
        self._closing = False
        self._closed = False
        self._parting = False
        """A client of the library is being closed after it was retired."""
        self._regions: list[Region] = []
        self._reachable = True
        _limit_waiting(deadline)  # before the library reads the environment
        try:
            import mooncake.store as library
        except ImportError as error:
            raise BackendUnavailable(
                f"Mooncake Store cannot be imported: {error}; `pip install mooncake-transfer-engine-non-cuda`, and the "
                "libraries it loads: `apt-get install libibverbs1 libnuma1 libcurl4`"
            ) from error
        self.library: Any = library
        self._wake, self._waker = socket.socketpair()
        try:
            self._store: Any = self._join()
        except BaseException:
            self._wake.close()
            self._waker.close()
            raise
        self._keeper = threading.Thread(target=self._keep, name="lmcache-mooncake", daemon=True)
        self._keeper.start()
        # A process that ends with a thread inside the library aborts.
        atexit.register(self.close, deadline)

    @contextmanager
    def calling(self) -> Iterator[Any]:
        """The library's client, which is not closed before the end of the block.

        Raise `BackendUnavailable` at once while the master does not answer, `Closed` after `close`.
        """
        with self._state:
            if self._closing:
                raise Closed("the mooncake backend is closed")
            if not self._reachable:
                raise BackendUnavailable(f"the master {self._member.master} does not answer; trying again")
            if self._store is None:
                raise BackendUnavailable(f"joining the cluster of {self._member.master} again")
            store = self._store
            self._calls += 1
        try:
            yield store
        finally:
            with self._state:
                self._calls -= 1
                if not self._calls:
                    self._state.notify_all()

    def register(self, region: Region) -> None:
        """Let the library move bytes in and out of a region directly. Raise `BackendUnavailable`."""
        with self.calling() as store:
            self._register(store, region)
        with self._state:
            self._regions.append(region)

    def retire(self, store: Any) -> None:
        """Part from the library's client, with its threads and all they still do, and join anew in the background.

        Called outside of `calling`; returns when that client is closed.
        """
        with self._state:
            mine = self._store is store
            if mine:
                self._store = None
                self._parting = True
                self._state.wait_for(lambda: not self._calls)
            else:
                self._state.wait_for(lambda: not self._parting)
        if mine:
            store.close()
            with self._state:
                self._parting = False
                self._state.notify_all()
                if not self._closed:
                    self._waker.send(b"\0")

    def close(self, timeout: float) -> None:
        """Leave the cluster; a client with a call that does not end in `timeout` seconds is left as it is."""
        with self._state:
            if self._closing:
                return
            self._closing = True
            atexit.unregister(self.close)
            idle = self._state.wait_for(lambda: not self._calls and not self._parting, timeout)
            store, self._store = self._store, None
        self._waker.send(b"\0")
        self._keeper.join(timeout)
        if idle and store is not None:
            store.close()
        if not self._keeper.is_alive():
            with self._state:
                self._closed = True
                self._wake.close()
                self._waker.close()

    def _join(self) -> Any:
        member = self._member
        own = member.local_hostname
        if self._address is not None:
            try:
                with socket.create_connection(self._address, CONNECT_S) as sock:
                    own = own or sock.getsockname()[0]
            except OSError as error:
                raise BackendUnavailable(
                    f"the Mooncake master {member.master} cannot be reached: {error}; start `mooncake_master` there, "
                    "or correct `master`"
                ) from error
        store = self.library.MooncakeDistributedStore()
        code = store.setup(
            own or socket.gethostname(),
            member.metadata_server,
            member.global_segment_size,
            0,
            member.protocol,
            member.device_name,
            member.master,
        )
        if code:
            raise BackendUnavailable(
                f"joining the Mooncake cluster of {member.master} over {member.protocol} failed: {code_name(code)}; "
                "Mooncake's own messages on stderr say more"
            )
        try:
            for region in self._regions:
                self._register(store, region)
        except BackendUnavailable:
            store.close()
            raise
        return store

    def _register(self, store: Any, region: Region) -> None:
        code = store.register_buffer(region.address, region.nbytes)
        if code:
            raise BackendUnavailable(
                f"Mooncake cannot register {region.nbytes} bytes of memory: {code_name(code)}; with RDMA the limit of "
                "locked memory must allow it (`ulimit -l unlimited`)"
            )

    # -- the keeper's thread ---------------------------------------------------------------------------------
    def _keep(self) -> None:
        """Know whether the master answers, and join anew where the client was retired."""
        pause = BACKOFF_S[0]
        while not self._closing:
            well = self._look()
            pause = BACKOFF_S[0] if well else min(BACKOFF_S[1], 2 * pause)
            if not well:
                self._sleep(None, pause)

    def _look(self) -> bool:
        """One connection to the master, as long as it lasts; False when there was none or no way into the cluster."""
        sock = None
        if self._address is not None:
            try:
                sock = socket.create_connection(self._address, CONNECT_S)
            except OSError:
                self._reachable = False
                return False
            # A host that vanishes says nothing: ask it.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3)):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        try:
            self._reachable = True
            while not self._closing:
                if self._store is None and not self._parting and not self._rejoin():
                    return False
                if self._sleep(sock, None):
                    return True
            return True
        finally:
            if sock is not None:
                sock.close()

    def _rejoin(self) -> bool:
        try:
            store = self._join()
        except BackendUnavailable:
            return False
        with self._state:
            if not self._closing:
                self._store = store
                return True
        store.close()
        return False

    def _sleep(self, sock: socket.socket | None, seconds: float | None) -> bool:
        """Wait until woken or for `seconds`; True when `sock` came to its end meanwhile."""
        poll = select.poll()  # `select` knows no descriptor above 1023
        for each in [self._wake] if sock is None else [self._wake, sock]:
            poll.register(each, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(None if seconds is None else 1e3 * seconds)}
        if self._wake.fileno() in ready:
            self._wake.recv(64)
        if sock is not None and sock.fileno() in ready:
            with suppress(OSError):
                return not sock.recv(4096)
            return True
        return False


def _limit_waiting(deadline: float) -> None:
    """Tell the library, which knows only the environment, how long it may wait. What the operator set stays.

    The first tier that a process builds decides for all of it: the library reads most of these once.
    """
    seconds = str(max(1, int(PATIENCE * deadline)))
    milliseconds = str(max(1, int(1000 * PATIENCE * deadline)))
    for name, value in {
        "MC_RPC_TIMEOUT_MS": milliseconds,
        "MC_RPC_CONNECT_TIMEOUT_MS": milliseconds,
        "MC_TCP_STATUS_TIMEOUT_SEC": seconds,
        "MC_TCP_PROGRESS_TIMEOUT_SEC": seconds,
        "MC_TCP_ADMISSION_TIMEOUT_MS": milliseconds,
        "MC_SLICE_TIMEOUT": seconds,
        "MC_STORE_CLIENT_SETUP_RETRIES": str(SETUP_ATTEMPTS),
        "MC_LOG_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(name, value)
