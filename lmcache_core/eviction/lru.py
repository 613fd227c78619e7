"""`lru`: least recently used, aware of prefixes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Literal

from lmcache_core.hookspecs import hookimpl
from lmcache_core.protocols import EvictionConfig, EvictionPolicy
from lmcache_core.types import ChunkKey


class Lru(EvictionPolicy):
    """Least recently used first; within one use, the deepest chunk is the coldest.

    Each batch is entered deepest first, so that the end of a sequence goes before its beginning: a chunk whose
    prefix is gone can never be used again, while a prefix without its tail still can.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[ChunkKey, None] = OrderedDict()

    def add(self, keys: Sequence[ChunkKey]) -> None:
        order = self._order
        for key in reversed(keys):
            order[key] = None
            order.move_to_end(key)

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        order = self._order
        move = order.move_to_end
        try:
            for key in reversed(keys):
                move(key)
        except KeyError:
            for key in reversed(keys):
                if key in order:
                    move(key)

    def remove(self, key: ChunkKey) -> None:
        self._order.pop(key, None)

    def remove_all(self, keys: Sequence[ChunkKey]) -> None:
        order = self._order
        for key in keys:
            if key in order:
                del order[key]

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._order

    def __len__(self) -> int:
        return len(self._order)

    def coldest(self) -> Iterator[ChunkKey]:
        return iter(self._order)


class LruConfig(EvictionConfig):
    """Least recently used, deepest chunk of a prefix coldest."""

    type: Literal["lru"] = "lru"

    def build(self) -> Lru:
        return Lru()


@hookimpl
def lmcache_evictions() -> list[type[EvictionConfig]]:
    return [LruConfig]
