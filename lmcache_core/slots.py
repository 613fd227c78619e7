"""The arena cut into slots, and who holds them.

A slot is room for one sealed object: a header page, then the raw chunk. Its memory goes as it is to a storage
backend and comes back from one, so a chunk is copied exactly once on its way in and once on its way out.

Every slot is in exactly one state: free, filling (reserved by a store), loading (being read), or ready (in the
index). Ready slots carry pins; only a clean, unpinned, ready slot is evicted. A pinned slot may be taken out of the
index; it is freed with its last pin. Changes are made with the pipeline's lock held; nothing here does I/O.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np

from lmcache_core.errors import BackendUnavailable
from lmcache_core.protocols import EvictionPolicy, Region
from lmcache_core.tenancy import Share, Shares
from lmcache_core.types import HEADER_BYTES, ChunkKey, round_up

_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14

if TYPE_CHECKING:
    from numpy.typing import NDArray

POISON = 0xDB
_SCAN = 4096
"""Pinned and dirty chunks passed over in one eviction, so that it stays short."""


class Slots:
    """Fixed slots in one region, an index of the ready ones, and their pins."""

    def __init__(self, region: Region, chunk_bytes: int, policy: EvictionPolicy, *, poison: bool = False) -> None:
        self.region = region
        self.chunk_bytes = chunk_bytes
        self.slot_bytes = round_up(HEADER_BYTES + chunk_bytes)
        self.count = region.nbytes // self.slot_bytes
        self.policy = policy
        self.index: dict[ChunkKey, int] = {}
        """Ready chunks."""
        self.free: list[int] = list(range(self.count - 1, -1, -1))
        self.pins: list[int] = [0] * self.count
        self.key_of: list[ChunkKey | None] = [None] * self.count
        self.created: list[int] = [0] * self.count
        self.starts: list[int] = [-1] * self.count
        """Tokens of its sequence before the chunk; -1 where that is not known."""
        self.sealed = bytearray(self.count)
        """1 where the header page is valid for the raw chunk."""
        self.dirty: dict[int, None] = {}
        """Ready slots that a write-back tier does not have yet and that are not on their way, longest waiting first."""
        self.evicted = 0
        self.freed: Callable[[Sequence[int]], None] | None = None
        """Told of slots whose chunks are gone, by whoever keeps copies of them."""
        self.shares = policy if isinstance(policy, Shares) else None
        """Whose the slots are, where tenants have quotas; counted in slots, from `take` until they are free."""
        self._share_of: list[Share | None] = [None] * self.count
        self._poison = poison

    # -- addresses -------------------------------------------------------------------------------------------
    def view(self, slot: int, nbytes: int | None = None) -> memoryview:
        """The whole slot, or its first `nbytes`, header page included."""
        start = slot * self.slot_bytes
        return self.region.view[start : start + (self.slot_bytes if nbytes is None else nbytes)]

    def payload(self, slot: int) -> memoryview:
        """The raw chunk in the slot."""
        start = slot * self.slot_bytes + HEADER_BYTES
        return self.region.view[start : start + self.chunk_bytes]

    def offsets(self, slots: Sequence[int]) -> NDArray[np.int64]:
        """Payload offsets in the region, in bytes."""
        return np.array(slots, dtype=np.int64) * self.slot_bytes + HEADER_BYTES

    # -- states ----------------------------------------------------------------------------------------------
    def take(self, want: int, owner: ChunkKey | None = None) -> list[int]:
        """Take up to `want` slots out of free or cold ready ones; they belong to the caller now.

        With quotas, `owner` is a key of the tenant they are for: one at its quota gets slots of its own only.
        """
        free = self.free
        share = None if self.shares is None or owner is None else self.shares.of(owner)
        if share is not None and share.quota is not None and share.over(want) > 0:
            self._evict(share.over(want), share.policy)
            want = min(want, share.quota - share.used)
        if len(free) < want:
            self._evict(want - len(free), self.policy)
        if want <= 0:
            return []
        taken = free[-want:]
        taken.reverse()
        del free[-want:]
        if share is not None:
            share.used += len(taken)
            for slot in taken:
                self._share_of[slot] = share
        return taken

    def _evict(self, want: int, policy: EvictionPolicy) -> None:
        victims: list[ChunkKey] = []
        slots: list[int] = []
        kept: list[ChunkKey] = []
        index, pins, dirty = self.index, self.pins, self.dirty
        for key in islice(policy.coldest(), _SCAN + want):
            slot = index[key]
            if pins[slot] or slot in dirty:
                kept.append(key)
                continue
            victims.append(key)
            slots.append(slot)
            if len(slots) == want:
                break
        if len(kept) >= _SCAN:
            # Held for long, perhaps by a hung tier: out of the way of the next eviction.
            kept.reverse()
            self.policy.touch(kept)
        # `drop` for all of them at once: eviction is on the path of every store into a full memory.
        self.policy.remove_all(victims)
        key_of, sealed = self.key_of, self.sealed
        for key, slot in zip(victims, slots, strict=True):
            del index[key]
            key_of[slot] = None
            sealed[slot] = 0
        if self._poison:
            for slot in slots:
                self._scrub(slot)
        if self.shares is not None:
            for slot in slots:
                share = self._share_of[slot]
                if share is not None:
                    share.evicted += 1
        self._free(slots)
        self.evicted += len(slots)

    def place(self, slots: Sequence[int], positions: Sequence[int], before: int, chunk_tokens: int) -> None:
        """Note where in their sequence the chunks of taken slots begin: chunk `positions[i]` after `before` tokens."""
        starts = self.starts
        for slot, position in zip(slots, positions, strict=True):
            starts[slot] = before + position * chunk_tokens

    def publish(self, keys: Sequence[ChunkKey], slots: Sequence[int], created: int, *, sealed: bool) -> None:
        """Make taken slots ready. The keys must not be in the index."""
        index, key_of, at, flags = self.index, self.key_of, self.created, self.sealed
        mark = int(sealed)
        for key, slot in zip(keys, slots, strict=True):
            index[key] = slot
            key_of[slot] = key
            at[slot] = created
            flags[slot] = mark
        self.policy.add(keys)

    def publish_loaded(self, keys: Sequence[ChunkKey], slots: Sequence[int], now: int) -> None:
        """Make slots ready that a tier filled; where the tier left a raw object, its header stays valid."""
        index, key_of, at = self.index, self.key_of, self.created
        for key, slot in zip(keys, slots, strict=True):
            index[key] = slot
            key_of[slot] = key
            at[slot] = now
        self.policy.add(keys)

    def give_back(self, slots: Sequence[int]) -> None:
        """Return taken slots that never became ready."""
        for slot in slots:
            self.sealed[slot] = 0
            self._scrub(slot)
        self._free(slots)

    def drop(self, key: ChunkKey, slot: int) -> None:
        """Forget a ready, unpinned chunk and free its slot."""
        del self.index[key]
        self.policy.remove(key)
        self.key_of[slot] = None
        self.sealed[slot] = 0
        self.dirty.pop(slot, None)
        self._scrub(slot)
        self._free([slot])

    def hide(self, key: ChunkKey) -> None:
        """Take a ready chunk out of the index though it may be pinned; its slot is freed with its last pin."""
        slot = self.index[key]
        if self.pins[slot] == 0:
            self.drop(key, slot)
            return
        del self.index[key]
        self.policy.remove(key)
        self.key_of[slot] = None
        self.sealed[slot] = 0
        self.dirty.pop(slot, None)

    def unpin(self, slots: Sequence[int]) -> None:
        """Drop one pin from each slot."""
        pins, key_of = self.pins, self.key_of
        for slot in slots:
            left = pins[slot] - 1
            if left < 0:
                raise AssertionError(f"slot {slot} was released more often than it was pinned")
            pins[slot] = left
            if left == 0 and key_of[slot] is None:
                self.sealed[slot] = 0  # a writer may have sealed it after it was hidden
                self._scrub(slot)
                self._free([slot])

    def _free(self, slots: Sequence[int]) -> None:
        self.free.extend(slots)
        if self.freed is not None:
            self.freed(slots)
        if self.shares is not None:
            for slot in slots:
                share, self._share_of[slot] = self._share_of[slot], None
                if share is not None:
                    share.used -= 1

    def claim(self, prefix: bytes, tenant: str) -> None:
        """Chunks of an identity belong to `tenant` from now on; see `Shares.claim`."""
        moved = None if self.shares is None else self.shares.claim(prefix, tenant)
        if moved is not None:
            before, after = moved
            self._share_of = [after if share is before else share for share in self._share_of]

    def _scrub(self, slot: int) -> None:
        if self._poison:
            ctypes.memset(self.region.address + slot * self.slot_bytes, POISON, self.slot_bytes)

    def check(self, elsewhere: int) -> None:
        """Raise `AssertionError` when the books do not add up; `elsewhere` slots are filling or loading."""
        hidden = sum(1 for slot, key in enumerate(self.key_of) if key is None and self.pins[slot])
        states = len(self.free) + len(self.index) + hidden + elsewhere
        assert states == self.count, (
            f"{self.count} slots, but {len(self.free)} free + {len(self.index)} ready + {hidden} hidden + "
            f"{elsewhere} filling or loading"
        )
        assert len(set(self.free)) == len(self.free), "a slot is free twice"
        assert all(self.key_of[slot] == key for key, slot in self.index.items()), "index and slots disagree"
        assert all(p >= 0 for p in self.pins), "negative pins"
        assert all(not self.pins[slot] for slot in self.free), "a free slot is pinned"
        assert self.dirty.keys() <= set(self.index.values()), "a dirty slot is not ready"
        assert set(self.policy.coldest()) == self.index.keys(), "eviction policy and index disagree"
        for share in self.shares or ():
            assert share.used == self._share_of.count(share), "a tenant's slots and its books disagree"


def map_shared(share: dict[str, int]) -> Region:
    """Map another process's arena by its `Region.share`. Raise `BackendUnavailable` with the likely cause."""
    path = f"/proc/{share['pid']}/fd/{share['fd']}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise BackendUnavailable(
            f"cannot open the shared arena {path}: {error.strerror}; "
            "both processes must run as one user in one PID namespace"
        ) from error
    try:
        size = os.fstat(fd).st_size
        if size != share["nbytes"]:
            raise BackendUnavailable(f"the shared arena {path} has {size} bytes, expected {share['nbytes']}")
        memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
    finally:
        os.close(fd)
    address = int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
    # The pages are there, but this process would fault each of them in on its first copy. Beside the engine, without
    # the GIL; a region that is unmapped meanwhile ends it.
    Thread(target=_advise, args=(address, size, _MADV_POPULATE_WRITE), name="lmcache-map", daemon=True).start()
    return Region(address, size, memoryview(memory), share, owner=memory)


def prefer_huge_pages(address: int, nbytes: int) -> bool:
    """Ask for huge pages in memory that nobody has touched yet: first copies into it then fault 512 times less. Whether
    the kernel took the advice."""
    start = round_up(address)
    return _advise(start, (address + nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE, _MADV_HUGEPAGE)


def _advise(address: int, nbytes: int, advice: int) -> bool:
    """`madvise` of memory that is not Python's own."""
    if not sys.platform.startswith("linux") or nbytes <= 0:
        return False
    return int(ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), advice)) == 0
