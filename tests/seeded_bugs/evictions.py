"""Eviction policies with one bug each, over `lru`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lmcache_core.eviction.lru import Lru
from lmcache_core.protocols import EvictionPolicy
from lmcache_core.types import ChunkKey


class ForgetsAKey(Lru):
    """Takes in all but the last of a batch."""

    def add(self, keys: Sequence[ChunkKey]) -> None:
        super().add(keys[:-1] if len(keys) > 1 else keys)


class TouchForgets(Lru):
    """Puts a key that is used twice out of its own reach."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[ChunkKey] = set()

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        super().touch(keys)
        for key in keys:
            if key in self.used:
                self.remove(key)
            self.used.add(key)


class YieldsRemoved(Lru):
    """Forgets a batch only when it is asked next."""

    def remove_all(self, keys: Sequence[ChunkKey]) -> None:
        super().remove_all(keys[1:])


class YieldsTwice(Lru):
    """Enters a key again without looking."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[ChunkKey] = []

    def add(self, keys: Sequence[ChunkKey]) -> None:
        super().add(keys)
        self.queue += reversed(keys)

    def coldest(self) -> Iterator[ChunkKey]:
        return (key for key in self.queue if key in self._order)


class DeeperIsWarmer(Lru):
    """Plain LRU: the last key of a batch was used last."""

    def add(self, keys: Sequence[ChunkKey]) -> None:
        super().add(keys[::-1])


class DeeperIsWarmerOnceUsed(Lru):
    def touch(self, keys: Sequence[ChunkKey]) -> None:
        super().touch(keys[::-1])


class UnknownRaises(Lru):
    def remove(self, key: ChunkKey) -> None:
        del self._order[key]

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        for key in reversed(keys):
            self._order.move_to_end(key)


class UnknownIsAdded(Lru):
    """Takes a use for a store."""

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        self.add(keys)


class LateUseReturns(Lru):
    """Remembers what it removed: a use brings it back."""

    def __init__(self) -> None:
        super().__init__()
        self.ghosts: set[ChunkKey] = set()

    def remove_all(self, keys: Sequence[ChunkKey]) -> None:
        self.ghosts.update(key for key in keys if key in self._order)
        super().remove_all(keys)

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        back = [key for key in keys if key in self.ghosts]
        self.ghosts.difference_update(back)
        super().add(back)
        super().touch(keys)


class LookingRotates(Lru):
    """Moves what it yields to the other end, as if it were evicted."""

    def coldest(self) -> Iterator[ChunkKey]:
        for key in list(self._order):
            self._order.move_to_end(key)
            yield key


class SortsEverything(Lru):
    """Keeps scores, and sorts them whenever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self._order: OrderedDict[ChunkKey, None] = OrderedDict()

    def coldest(self) -> Iterator[ChunkKey]:
        places = {key: place for place, key in enumerate(self._order)}
        return iter(sorted(places, key=places.__getitem__))


class LinearUse(Lru):
    """Keeps keys in a list, and looks for them from its beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[ChunkKey] = []

    def add(self, keys: Sequence[ChunkKey]) -> None:
        self.remove_all(keys)
        self.keys += reversed(keys)
        super().add(keys)

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        self.add([key for key in keys if key in self._order])

    def remove_all(self, keys: Sequence[ChunkKey]) -> None:
        for key in keys:
            self.remove(key)

    def remove(self, key: ChunkKey) -> None:
        if key in self._order:
            self.keys.remove(key)
        super().remove(key)

    def coldest(self) -> Iterator[ChunkKey]:
        return iter(self.keys)


@dataclass(frozen=True)
class Bug:
    """A policy with a bug."""

    build: Callable[[], EvictionPolicy]
    contract: str
    """The contract it breaks."""


BUGS = {
    "forgets a key": Bug(ForgetsAKey, "every key"),
    "touch forgets": Bug(TouchForgets, "every key"),
    "yields twice": Bug(YieldsTwice, "every key"),
    "yields removed": Bug(YieldsRemoved, "removed keys"),
    "deeper is warmer": Bug(DeeperIsWarmer, "prefix order"),
    "deeper is warmer once used": Bug(DeeperIsWarmerOnceUsed, "prefix order"),
    "late use returns": Bug(LateUseReturns, "removed keys"),
    "unknown raises": Bug(UnknownRaises, "unknown keys"),
    "unknown is added": Bug(UnknownIsAdded, "unknown keys"),
    "looking rotates": Bug(LookingRotates, "iteration"),
    "sorts everything": Bug(SortsEverything, "quick"),
    "linear use": Bug(LinearUse, "quick"),
}
