"""Tenants: who a chunk belongs to, how much each may hold in a tier, and whose chunks go when room is needed.

A tenant is known by its salt, made on the server from a secret (`identity.tenant_salt`), so that tenants never share
and none can guess another's keys. The salt is part of the identity, and the identity's digest is the first half of
every key: that half tells whose a chunk is. After a restart a medium knows keys only; until their tenant asks for
something, the chunks of each identity count as a tenant of their own.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from lmcache_core.identity import Identity, tenant_salt
from lmcache_core.protocols import EvictionPolicy
from lmcache_core.types import IDENTITY_BYTES, ChunkKey
from lmcache_core.units import Percent

Quota = int | Percent
"""Bytes in every tier, or a share of every tier's capacity."""


MAX_IDENTITIES = 4096
"""Models, adapters and salts of one tenant, all told, that are cached in the life of a process."""


class Tenancy:
    """Who the tenants are, and what each may hold."""

    def __init__(
        self,
        secret: bytes,
        quota: Quota | None = None,
        quotas: Mapping[str, Quota] | None = None,
        unmetered: Collection[str] = (),
    ) -> None:
        """`quota`: of every tenant that is not in `quotas`; None for no bound. `unmetered`: tiers without any."""
        self._secret = secret
        self._quota = quota
        self._quotas = dict(quotas or {})
        self._unmetered = unmetered
        self.names: dict[bytes, str] = {}
        """Identity prefix -> tenant, of every identity that was asked for."""
        self._identities: Counter[str] = Counter()

    def limits(self, tier: str) -> bool:
        """Whether any tenant has a quota in the tier of that name."""
        return (self._quota is not None or bool(self._quotas)) and tier not in self._unmetered

    def quota(self, tenant: str, capacity: int) -> int | None:
        """Bytes that a tenant may hold of a tier of `capacity` bytes; None without a bound."""
        quota = self._quotas.get(tenant, self._quota)
        return quota.of(capacity) if isinstance(quota, Percent) else quota

    def admit(self, prefix: bytes, tenant: str) -> bool:
        """Note whose an identity is; False when the tenant has too many: salts of its own must not fill memory."""
        if self._identities[tenant] >= MAX_IDENTITIES:
            return False
        self._identities[tenant] += 1
        self.names[prefix] = tenant
        return True

    def identity(self, identity: Identity, tenant: str) -> Identity:
        """The identity of a tenant's request. A salt that came with the request separates within the tenant only."""
        salt = tenant_salt(self._secret, tenant)
        return replace(identity, salt=salt if identity.salt is None else f"{salt}/{identity.salt}")


@dataclass(slots=True, eq=False)
class Share:
    """What one tenant holds in one tier, in the tier's unit: bytes, or slots of memory."""

    policy: EvictionPolicy
    quota: int | None
    used: int = 0
    writing: int = 0
    """Being written: not used yet, and no longer free."""
    owed: int = 0
    """Evicted, and still on the medium, which refused to delete it."""
    evicted: int = 0
    """Chunks evicted for the tenant's own quota, or for others."""

    def over(self, need: int) -> int:
        """By how much the tenant would be over its quota with `need` more; 0 or less when it is not."""
        return 0 if self.quota is None else self.used + self.writing + self.owed + need - self.quota


class Shares(EvictionPolicy):
    """The chunks of one tier by tenant, each with an eviction policy of its own. Called with the tier's lock held.

    A tenant over its quota makes room among its own chunks. Only when the quotas together are more than the tier does a
    store take from others: from the one that uses most of its quota.
    """

    def __init__(
        self,
        build: Callable[[], EvictionPolicy],
        capacity: int,
        quota: Callable[[str], int | None],
        name_of: Callable[[bytes], str | None],
    ) -> None:
        """`build` makes a policy, `quota` tells a tenant's, `name_of` the tenant of an identity prefix, if known."""
        self._build = build
        self._capacity = capacity
        self._quota = quota
        self._name_of = name_of
        self.size_of: Callable[[ChunkKey], int] = lambda _: 1
        """How much of `used` a key is. Set by the tier."""
        self._tenants: dict[str, Share] = {}
        self._unclaimed: dict[bytes, Share] = {}
        self._by_prefix: dict[bytes, Share] = {}
        """All of the above."""

    def of(self, key: ChunkKey) -> Share:
        """The share that a chunk counts for."""
        prefix = key[:IDENTITY_BYTES]
        share = self._by_prefix.get(prefix)
        if share is None:
            name = self._name_of(prefix)
            if name is not None:
                share = self._tenant(name)
            else:
                share = self._unclaimed[prefix] = Share(self._build(), self._quota(""))
            self._by_prefix[prefix] = share
        return share

    def _tenant(self, name: str) -> Share:
        share = self._tenants.get(name)
        if share is None:
            share = self._tenants[name] = Share(self._build(), self._quota(name))
        return share

    def claim(self, prefix: bytes, tenant: str) -> tuple[Share, Share] | None:
        """From now on chunks of an identity belong to `tenant`; those that are there already keep their order.

        Return the share they were counted for so far, which is gone now, and the tenant's; None when nothing changed.
        """
        before = self._unclaimed.pop(prefix, None)
        after = self._by_prefix[prefix] = self._tenant(tenant)
        if before is None:
            return None
        after.policy.add(list(before.policy.coldest())[::-1])
        after.used += before.used
        after.writing += before.writing
        after.owed += before.owed
        return before, after

    def groups(self, keys: Sequence[ChunkKey]) -> Iterator[tuple[Share | None, list[ChunkKey]]]:
        """Runs of keys with one owner each, in order; None where no chunk of that identity was ever here."""
        for prefix, run in groupby(keys, key=_prefix):
            yield self._by_prefix.get(prefix), list(run)

    # -- an eviction policy ----------------------------------------------------------------------------------
    def add(self, keys: Sequence[ChunkKey]) -> None:
        for share, run in self.groups(keys):
            (share or self.of(run[0])).policy.add(run)

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        for share, run in self.groups(keys):
            if share is not None:
                share.policy.touch(run)

    def remove(self, key: ChunkKey) -> None:
        share = self._by_prefix.get(key[:IDENTITY_BYTES])
        if share is not None:
            share.policy.remove(key)

    def remove_all(self, keys: Sequence[ChunkKey]) -> None:
        for share, run in self.groups(keys):
            if share is not None:
                share.policy.remove_all(run)

    def coldest(self) -> Iterator[ChunkKey]:
        """Always the coldest chunk of the tenant that then uses most of its quota."""
        heap = [
            (-share.used / (share.quota or self._capacity), number, share.used, share, iter(share.policy.coldest()))
            for number, share in enumerate(self)
        ]
        heapq.heapify(heap)
        while heap:
            _, number, used, share, keys = heap[0]
            key = next(keys, None)
            if key is None:
                heapq.heappop(heap)
                continue
            used -= self.size_of(key)
            heapq.heapreplace(heap, (-used / (share.quota or self._capacity), number, used, share, keys))
            yield key

    # -- books -----------------------------------------------------------------------------------------------
    def __iter__(self) -> Iterator[Share]:
        return iter([*self._tenants.values(), *self._unclaimed.values()])

    def stats(self) -> dict[str, dict[str, int | None]]:
        """Used, quota and evicted of every tenant; what no tenant has claimed yet is added up under an empty name."""
        found = {name: _numbers([share]) | {"quota": share.quota} for name, share in list(self._tenants.items())}
        if self._unclaimed:
            found[""] = _numbers(list(self._unclaimed.values()))
        return found


def _numbers(shares: Sequence[Share]) -> dict[str, int | None]:
    return {"used": sum(s.used for s in shares), "evicted": sum(s.evicted for s in shares), "quota": None}


def _prefix(key: ChunkKey) -> bytes:
    return key[:IDENTITY_BYTES]
