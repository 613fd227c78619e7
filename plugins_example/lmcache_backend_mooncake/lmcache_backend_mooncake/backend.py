"""The backend: batches of sealed objects, moved between Mooncake's nodes and the core's own memory."""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

import numpy as np

from lmcache_backend_mooncake.client import (
    ABSENT,
    EXISTS,
    INVALID_PARAMS,
    LEASE_EXPIRED,
    NO_SPACE,
    NOT_FOUND,
    NOT_TRIED,
    PATIENCE,
    TRANSFER_FAIL,
    Client,
    Membership,
    code_name,
)
from lmcache_backend_mooncake.doors import Doors, Turns
from lmcache_core.errors import BackendError, CorruptChunk, NoSpace
from lmcache_core.protocols import BuildContext, Region, StorageBackend
from lmcache_core.types import ChunkKey, Got, MissReason, Put, round_up

STAGING_BUFFERS = 4
"""Each as large as the largest object of the tier."""

ADRIFT_S = 45.0
"""A transfer that failed after so long may have failed because Mooncake stopped waiting (after 60 s), not because the
transfer stopped: its bytes may still come."""

STALLED = 0.2
"""Part of a tier's deadline after which a transfer that still runs no longer makes others wait for their turn."""

PART_BYTES = 4 << 20
"""Least that is moved together over TCP."""

HUNG = 0.75
"""Part of the library's own patience after which it waited for a node that said nothing. A node that refuses costs up
to one second, the first time."""

LOST_S = 15.0
"""How long an object that no node delivered counts as absent: by then the master has noticed a dead node (10 s)."""

LOST_KEYS = 1 << 16
"""Most such objects remembered."""


class MooncakeBackend(StorageBackend):
    """Objects by name in a Mooncake cluster.

    A call waits at most for the library's own limits, which `client` sets below the tier's deadline, and never returns
    while the library may still read or write a buffer it was lent.
    """

    def __init__(
        self, member: Membership, context: BuildContext, *, prefix: str, replicas: int, soft_pin: bool
    ) -> None:
        """Join the cluster. Raise `BackendUnavailable`."""
        self.staged = member.protocol != "tcp"
        """Whether memory outside of the registered regions is copied through registered buffers of our own. TCP moves
        any memory."""
        self._part_bytes = PART_BYTES if member.protocol == "tcp" else None
        self._prefix = prefix
        self._deadline = context.deadline
        self._buffer_bytes = round_up(context.object_bytes)
        self._client = Client(member, context.deadline)
        self._doors = Doors(context.deadline)
        # A thread that waits for a transfer spins: beyond a few, they take the processor from the transfers.
        self._turns = Turns(max(1, len(os.sched_getaffinity(0)) // 4), STALLED * context.deadline)
        self._regions: list[tuple[int, int]] = []
        self._lost: dict[str, float] = {}
        """Objects that the master lists and no node delivered, and until when they count as absent."""
        self._staging: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._staging_lock = threading.Lock()
        self._has_staging = False
        library = self._client.library
        self._how = library.ReplicateConfig()
        self._how.replica_num = replicas
        if soft_pin:
            self._how.soft_pin_action = library.SoftPinAction.ENABLE

    def register(self, region: Region) -> None:
        self._client.register(region)
        self._regions = [*self._regions, (region.address, region.address + region.nbytes)]

    # -- the contract ----------------------------------------------------------------------------------------
    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        names = self._names(keys)
        if not names:
            return []
        with self._client.calling() as store:
            codes = _each(names, store.batch_is_exist(names))
        for code in codes:
            if code < 0:
                raise BackendError(f"asking which objects exist: {code_name(code)}")
        if self._lost:
            self._drop_old_losses()
            return [code == 1 and name not in self._lost for name, code in zip(names, codes, strict=True)]
        return [code == 1 for code in codes]

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        def get(store: Any, names: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
            codes = _each(names, store.batch_get_into(names, addresses, sizes))
            for i, code in enumerate(codes):
                if code == LEASE_EXPIRED:  # others of the batch took too long; alone it will not
                    codes[i] = store.get_into(names[i], addresses[i], sizes[i])
            return codes

        names = self._names(keys)
        results: list[Got] = []
        with self._doors.using(names):
            codes, slow = self._move(get, names, buffers, into=True)
        for name, code, buffer in zip(names, codes, buffers, strict=True):
            if code >= 0:
                self._lost.pop(name, None)
                results.append(code)
            elif code in ABSENT:
                results.append(None)
            elif code == TRANSFER_FAIL and not slow:
                # A dead node refuses: its objects are misses and no reason to pause the whole tier.
                self._lose(name)
                results.append(None)
            elif code == INVALID_PARAMS and (nbytes := self._size(name)) > len(buffer):
                # Stored by other settings; the core deletes it once.
                what = f"{nbytes} bytes, more than any object of this tier"
                results.append(CorruptChunk(MissReason.CORRUPT, what))
            else:
                if code == TRANSFER_FAIL:
                    self._lose(name)
                results.append(BackendError(f"reading an object: {code_name(code)}"))
        return results

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        def put(store: Any, names: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
            return _each(names, store.batch_put_from(names, addresses, sizes, self._how))

        names = self._names(keys)
        if self._lost:
            # Where a copy is that nobody can read, Mooncake would take the new one as already stored.
            self._remove([name for name in names if name in self._lost])
        with self._doors.using(names):
            codes, _ = self._move(put, names, buffers, into=False)
        return [_put_result(code, len(buffer)) for code, buffer in zip(codes, buffers, strict=True)]

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        self._remove(self._names(keys))

    def clear(self) -> None:
        pattern = f"^{self._prefix.replace('.', '[.]')}/[0-9a-f]+$"
        with self._doors.clearing(), self._client.calling() as store:
            code = store.remove_by_regex(pattern, True)
        if code < 0:
            raise BackendError(f"removing the objects of `{self._prefix}`: {code_name(code)}")
        self._lost.clear()

    def close(self) -> None:
        self._client.close(self._deadline)

    # -- moving bytes ----------------------------------------------------------------------------------------
    def _move(
        self,
        call: Callable[[Any, list[str], list[int], list[int]], list[int]],
        names: list[str],
        buffers: Sequence[memoryview],
        into: bool,
    ) -> tuple[list[int], bool]:
        """The code of each object, and whether the library waited for a node that said nothing."""
        if not names:
            return [], False
        first = {name: i for i, name in reversed(list(enumerate(names)))}
        if len(first) < len(names):
            # The library says that it filled every buffer of a name and fills one.
            once = sorted(first.values())
            moved, slow = self._move(call, [names[i] for i in once], [buffers[i] for i in once], into)
            code_of = {names[i]: code for i, code in zip(once, moved, strict=True)}
            for i, name in enumerate(names):
                if into and first[name] != i and code_of[name] > 0:
                    buffers[i][: code_of[name]] = buffers[first[name]][: code_of[name]]
            return [code_of[name] for name in names], slow
        addresses = [int(np.frombuffer(buffer, np.uint8).ctypes.data) for buffer in buffers]
        sizes = [len(buffer) for buffer in buffers]
        direct = [i for i in range(len(names)) if not self.staged or self.is_registered(addresses[i], sizes[i])]
        codes = [0] * len(names)
        rest = sorted(set(range(len(names))).difference(direct))
        parts = [*self._parts(direct, sizes), *([i] for i in rest)]
        slow = False
        with self._client.calling() as store, self._turns.one():
            begun = after = monotonic()
            for part in parts:
                before = after
                if before - begun >= (1 - PATIENCE) * self._deadline:
                    moved = [NOT_TRIED] * len(part)
                elif part[0] in rest:
                    moved = [self._move_staged(call, store, names[part[0]], buffers[part[0]], into)]
                else:
                    moved = call(store, *_of(part, names, addresses, sizes))
                after = monotonic()
                slow = slow or (TRANSFER_FAIL in moved and after - before >= HUNG * PATIENCE * self._deadline)
                for i, code in zip(part, moved, strict=True):
                    codes[i] = code
        if after - begun >= ADRIFT_S and TRANSFER_FAIL in codes:
            self._client.retire(store)
        return codes, slow

    def _parts(self, which: list[int], sizes: list[int]) -> Iterator[list[int]]:
        """What is moved together: over TCP only as much as makes questions to the master cheap beside it.

        Mooncake moves all objects of a call at the same time, by one thread over connections of their own; large ones
        are half as fast so as one after the other.
        """
        part: list[int] = []
        nbytes = 0
        for i in which:
            part.append(i)
            nbytes += sizes[i]
            if self._part_bytes is not None and nbytes >= self._part_bytes:
                yield part
                part, nbytes = [], 0
        if part:
            yield part

    def _move_staged(
        self,
        call: Callable[[Any, list[str], list[int], list[int]], list[int]],
        store: Any,
        name: str,
        buffer: memoryview,
        into: bool,
    ) -> int:
        """One object through registered memory of our own."""
        staging = self._take_staging()
        try:
            size = min(len(buffer), len(staging))
            if not into:
                if size < len(buffer):
                    raise BackendError(f"an object of {len(buffer)} bytes, announced were at most {len(staging)}")
                staging[:size] = buffer
            address = int(np.frombuffer(staging, np.uint8).ctypes.data)
            (code,) = call(store, [name], [address], [size])
            if into and code > 0:
                buffer[:code] = staging[:code]
            return code
        finally:
            self._staging.put(staging)

    def _take_staging(self) -> memoryview:
        with self._staging_lock:
            if not self._has_staging:
                nbytes = STAGING_BUFFERS * self._buffer_bytes
                memory = memoryview(mmap.mmap(-1, nbytes))
                address = int(np.frombuffer(memory, np.uint8).ctypes.data)
                self._client.register(Region(address, nbytes, memory))
                for at in range(0, nbytes, self._buffer_bytes):
                    self._staging.put(memory[at : at + self._buffer_bytes])
                self._has_staging = True
        with suppress(queue.Empty):
            return self._staging.get(timeout=self._deadline)
        raise BackendError(f"no staging buffer was free for {self._deadline:g} s")

    def is_registered(self, address: int, nbytes: int) -> bool:
        """Whether the library may move bytes in and out of this memory over any transport."""
        return any(begin <= address and address + nbytes <= end for begin, end in self._regions)

    # -- names -----------------------------------------------------------------------------------------------
    def _names(self, keys: Sequence[ChunkKey]) -> list[str]:
        return [f"{self._prefix}/{key.hex()}" for key in keys]

    def _size(self, name: str) -> int:
        """Bytes of an object; a negative code where nobody knows."""
        with self._client.calling() as store:
            return int(store.get_size(name))

    def _remove(self, names: list[str]) -> None:
        """Remove at once: waiting for a lease to end would keep the old object, and refuse a new one, for seconds."""
        if not names:
            return
        with self._doors.removing(names), self._client.calling() as store:
            codes = _each(names, store.batch_remove(names, True))
        for name, code in zip(names, codes, strict=True):
            if code not in (0, NOT_FOUND):
                raise BackendError(f"removing an object: {code_name(code)}")
            self._lost.pop(name, None)

    def _lose(self, name: str) -> None:
        if len(self._lost) >= LOST_KEYS:
            self._lost.clear()
        self._lost.pop(name, None)
        self._lost[name] = monotonic() + LOST_S

    def _drop_old_losses(self) -> None:
        now = monotonic()
        for name, until in list(self._lost.items()):
            if until > now:
                break  # later ones were lost later
            self._lost.pop(name, None)


def _of(
    part: list[int], names: list[str], addresses: list[int], sizes: list[int]
) -> tuple[list[str], list[int], list[int]]:
    return [names[i] for i in part], [addresses[i] for i in part], [sizes[i] for i in part]


def _each(names: Sequence[str], codes: Sequence[int]) -> list[int]:
    if len(codes) != len(names):
        raise BackendError(f"Mooncake gave {len(codes)} results for {len(names)} objects")
    return list(codes)


def _put_result(code: int, nbytes: int) -> Put:
    if code in (0, EXISTS):
        return None
    if code == NO_SPACE:
        return NoSpace(f"no node of the Mooncake cluster has room for {nbytes} bytes: {code_name(code)}")
    return BackendError(f"storing an object: {code_name(code)}")
