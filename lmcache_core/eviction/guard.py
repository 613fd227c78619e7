"""An eviction policy of somebody else's, held at arm's length: what it does wrong must not stop a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lmcache_core.eviction.lru import Lru
from lmcache_core.protocols import EvictionPolicy
from lmcache_core.tenancy import Shares
from lmcache_core.types import ChunkKey

_MESSAGE_CHARS = 200


class Guarded(EvictionPolicy):
    """A policy that is believed until it raises, or ranks other keys than it was given.

    Then it is asked no more, and the keys are ranked by `lru`, which was told of everything as well. It is called with
    the lock of its tier held, so one that does not return is beyond help here.
    """

    def __init__(self, policy: EvictionPolicy, kind: str) -> None:
        """`kind`: the policy's `type`, for messages."""
        self._policy: EvictionPolicy | None = policy
        self._kind = kind
        self._lru = Lru()
        self.trouble = ""
        """What the policy did wrong; empty while it is believed."""

    def add(self, keys: Sequence[ChunkKey]) -> None:
        self._lru.add(keys)
        if self._policy is not None:
            self._tell(self._policy.add, keys)

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        self._lru.touch(keys)
        if self._policy is not None:
            self._tell(self._policy.touch, keys)

    def remove(self, key: ChunkKey) -> None:
        self.remove_all([key])

    def remove_all(self, keys: Sequence[ChunkKey]) -> None:
        self._lru.remove_all(keys)
        if self._policy is not None:
            self._tell(self._policy.remove_all, keys)

    def coldest(self) -> Iterator[ChunkKey]:
        """Every key once, coldest first: as the policy says, as far as it is right, and then by `lru`."""
        seen: set[ChunkKey] = set()
        if self._policy is not None:
            yield from self._believed(seen)
        if self._policy is None:
            yield from (key for key in self._lru.coldest() if key not in seen)

    def _believed(self, seen: set[ChunkKey]) -> Iterator[ChunkKey]:
        """What the policy says, up to its first mistake."""
        assert self._policy is not None
        try:
            for key in self._policy.coldest():
                if key in seen or key not in self._lru:
                    self._drop("it ranked a key twice" if key in seen else "it ranked a key that is not there")
                    return
                seen.add(key)
                yield key
        except (Exception, SystemExit) as error:
            self._drop(f"{type(error).__name__}: {error}")
            return
        if len(seen) < len(self._lru):
            self._drop(f"it ranked {len(seen)} of {len(self._lru)} keys")

    def _tell(self, method: Callable[[Sequence[ChunkKey]], None], keys: Sequence[ChunkKey]) -> None:
        try:
            method(keys)
        except (Exception, SystemExit) as error:
            self._drop(f"{type(error).__name__}: {error}")

    def _drop(self, why: str) -> None:
        self.trouble = f"{self._kind}: {why}"[:_MESSAGE_CHARS]
        self._policy = None


def trouble(policy: EvictionPolicy) -> str:
    """What a policy did wrong, after which `lru` took its place; empty while all is well."""
    if isinstance(policy, Shares):
        return next((said for share in policy if (said := trouble(share.policy))), "")
    return policy.trouble if isinstance(policy, Guarded) else ""
