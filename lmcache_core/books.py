"""The books of one storage tier: what it holds, the bytes each object takes, whose it is, and what is to be deleted.

Memory only. The tier calls every method with its lock held and does the I/O in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from lmcache_core.protocols import EvictionPolicy
from lmcache_core.tenancy import Share, Shares
from lmcache_core.types import ChunkKey

MOST_TOMBSTONES = 4096
"""Keys remembered, without an index, that the medium should not have any more."""


class Books:
    """See the module. `index` is None for a medium that keeps its own: then there is nothing to count or evict."""

    def __init__(self, policy: EvictionPolicy, capacity: int | None, counts: Counter[str]) -> None:
        """`counts`: the tier's counters."""
        self.policy = policy
        self.capacity = capacity
        self.shares = policy if isinstance(policy, Shares) else None
        """Whose the objects are, where tenants have quotas; counted in bytes of the index."""
        if self.shares is not None:
            self.shares.size_of = self.size
        self.index: dict[ChunkKey, int] | None = None
        self.used = 0
        self.held = 0
        """Bytes set aside: objects being written, and those out of the index that the medium may still hold."""
        self.deleting: dict[ChunkKey, int] = {}
        """Out of the index, not yet off the medium, with their bytes. With an index, not written again before they are
        gone."""
        self.undeleted: dict[ChunkKey, int] = {}
        """Those the medium refused to delete, until it does. Without an index they count as absent meanwhile."""
        self._owed: dict[ChunkKey, int] = {}
        """Bytes that count as `Share.owed`, by key: from the refusal until they are deleted."""
        self._counts = counts

    def open(self, found: Iterable[tuple[ChunkKey, int]] | None, footprint: Callable[[int], int]) -> None:
        """Take in what the medium says it has, coldest first; None when it keeps its own books."""
        if found is None:
            self.shares = None
            return
        self.index = {}
        for key, nbytes in found:
            self.enter([key], [footprint(nbytes)])
        self._counts["recovered"] = len(self.index)

    def size(self, key: ChunkKey) -> int:
        """Bytes of an object, 0 when it is not here."""
        return 0 if self.index is None else self.index.get(key, 0)

    def enter(self, keys: Sequence[ChunkKey], sizes: Sequence[int]) -> None:
        """These are stored now."""
        if self.index is None:
            for key in keys:
                self.undeleted.pop(key, None)
                self.deleting.pop(key, None)
            return
        for key, nbytes in zip(keys, sizes, strict=True):
            more = nbytes - self.index.get(key, 0)
            self.used += more
            self.index[key] = nbytes
            if self.shares is not None:
                self.shares.of(key).used += more
        self.policy.add(keys)

    def wipe(self) -> None:
        """Nothing is stored any more."""
        if self.index is not None:
            for key in self.index:
                self.policy.remove(key)
            self.index = {}
            self.used = 0
            for share in self.shares or ():
                share.used = 0

    def parts(self, objects: Sequence[tuple[ChunkKey, int]]) -> list[list[int]]:
        """How to put objects, given with their bytes: positions, in parts of at most a quarter of the tier, so that its
        threads do not take each other's room. With quotas, a part is one tenant's, and at most a quarter of its quota.
        """
        quarter = None if self.capacity is None or self.index is None else self.capacity // 4
        owners = [None if self.shares is None else self.shares.of(key) for key, _ in objects]
        parts: list[list[int]] = []
        for owner in dict.fromkeys(owners):
            most = quarter if owner is None or owner.quota is None else owner.quota // 4
            nbytes = 0
            parts.append([])
            for at, (_, size) in enumerate(objects):
                if owners[at] is owner:
                    if parts[-1] and most is not None and nbytes + size > most:
                        parts.append([])
                        nbytes = 0
                    parts[-1].append(at)
                    nbytes += size
        return parts

    # -- room ------------------------------------------------------------------------------------------------
    def make_room(
        self, need: int, spare: int, chain: Sequence[ChunkKey], share: Share | None
    ) -> dict[ChunkKey, int] | None:
        """Evict until `need` more bytes of `share` fit, at least `spare` keys; None when they never will.

        `chain` stays: a prefix that evicted its own beginning could never be used.
        """
        if self.index is None:
            return {}
        over = 0 if self.capacity is None else self.used + self.held + need - self.capacity
        own: dict[ChunkKey, int] = {}
        if share is not None and share.over(need) > 0:
            found = self._coldest(share.policy, share.over(need), 0, chain, own)
            if found is None:
                return None
            own = found
        left = self._coldest(self.policy, over - sum(own.values()), spare - len(own), chain, own)
        if left is None:
            return None
        victims = [*own, *left]
        self._counts["evicted"] += len(victims)
        if self.shares is not None:
            for key in victims:
                self.shares.of(key).evicted += 1
        return self.take_out(victims)

    def _coldest(
        self,
        policy: EvictionPolicy,
        over: int,
        spare: int,
        chain: Sequence[ChunkKey],
        beside: dict[ChunkKey, int],
    ) -> dict[ChunkKey, int] | None:
        """The coldest keys of `over` bytes or more, at least `spare`, and not those `beside`; None when too few."""
        assert self.index is not None
        if over > self.used:
            return None
        victims: dict[ChunkKey, int] = {}
        freed = 0
        if over > 0 or spare > 0:
            kept = set(chain)
            for key in policy.coldest():
                if key in kept or key in beside:
                    continue
                victims[key] = self.index[key]
                freed += victims[key]
                if freed >= over and len(victims) >= spare:
                    break
        return None if freed < over else victims

    # -- deletions -------------------------------------------------------------------------------------------
    def take_out(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, int]:
        """Take keys out of the index, to be deleted; their bytes stay set aside until they are."""
        assert self.index is not None
        gone: dict[ChunkKey, int] = {}
        for key in dict.fromkeys(keys):
            gone[key] = self.index.pop(key)
            self.policy.remove(key)
            if self.shares is not None:
                self.shares.of(key).used -= gone[key]
        self.used -= sum(gone.values())
        return self.doubt(gone)

    def doubt(self, gone: dict[ChunkKey, int]) -> dict[ChunkKey, int]:
        """The medium may have these though the index does not: set their bytes aside until they are deleted. Return
        what to delete: these, with the bytes that are set aside for them already."""
        self.held += sum(gone.values())
        gone = {key: nbytes + self.undeleted.pop(key, 0) for key, nbytes in gone.items()}
        self.deleting.update(gone)
        return gone

    def again(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, int]:
        """Those of the keys that the medium refused to delete, to be deleted now."""
        return {key: self.undeleted.pop(key) for key in [*keys] if key in self.undeleted}

    def deleted(self, gone: dict[ChunkKey, int], keep: int = 0) -> None:
        """These are off the medium; `keep` of their bytes stay set aside, for what takes their place."""
        self.held -= sum(gone.values()) - keep
        for key in gone:
            self.deleting.pop(key, None)
            self._owe(key, 0)

    def refused(self, gone: dict[ChunkKey, int]) -> None:
        """The medium did not delete these: they are tried again. Without an index only the latest are remembered."""
        for key, nbytes in gone.items():
            if key in self.deleting:
                self.undeleted[key] = nbytes
                self._owe(key, nbytes)
            else:
                self.held -= nbytes  # replaced or deleted by somebody else meanwhile
        while self.index is None and len(self.undeleted) > MOST_TOMBSTONES:
            oldest = next(iter(self.undeleted))
            del self.undeleted[oldest], self.deleting[oldest]

    def _owe(self, key: ChunkKey, nbytes: int) -> None:
        """The medium keeps so many bytes of a key that it was to delete: they stay in the quota of their tenant."""
        if self.shares is not None and (more := nbytes - self._owed.pop(key, 0)):
            self.shares.of(key).owed += more
        if self.shares is not None and nbytes:
            self._owed[key] = nbytes

    # -- invariants ------------------------------------------------------------------------------------------
    def check(self, name: str) -> None:
        """Raise `AssertionError` when index, policy and usage disagree. Call when nothing is being read or written."""
        owed = sum(self.undeleted.values())
        assert self.held == owed, f"tier {name}: {self.held} bytes set aside, {owed} to be deleted"
        assert self.deleting == self.undeleted, f"tier {name}: deletions without an end"
        if self.index is None:
            return
        total = sum(self.index.values())
        assert self.used == total, f"tier {name}: {self.used} bytes in the books, {total} in the index"
        for share in self.shares or ():
            held = sum(map(self.size, share.policy.coldest()))
            assert share.used == held and not share.writing, f"tier {name}: a tenant's books do not add up"
        assert set(self.policy.coldest()) == self.index.keys(), f"tier {name}: policy and index disagree"
        if self.capacity is not None:
            assert total <= self.capacity, f"tier {name}: {total} bytes over its capacity {self.capacity}"
