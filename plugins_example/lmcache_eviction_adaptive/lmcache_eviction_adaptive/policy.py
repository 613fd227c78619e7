"""The policy. Three ways of ranking chunks compete on a sample of the keys; the real order follows the winner.

Chunks stand in one of four queues by how often they were reused, each in order of last use. A chunk is worth the time
of its last use plus its queue's credit; time is counted in chunks added. Credits never fall from one queue to the next,
and every use of a chunk is a use of its whole prefix, so a prefix is worth at least as much as what follows it.

* `LRU`: no credits. Hard to beat where sessions come back soon.
* `REUSED`: chunks that were reused outlive those that were not, by one cache size for each reuse.
* `GUARDED`: as `REUSED`, but three of four new prefixes go first, so that those that stay live to be reused: for caches
  so small that everything is evicted before it returns (bimodal insertion, Qureshi et al., ISCA 2007).

Each has a shadow: the same queues without any data, holding one key in `SAMPLE` (sampling by hash: SHARDS, Waldspurger
et al., FAST 2015; competing on samples: set duelling, Qureshi et al.). What a shadow would have hit is its score.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import sqrt
from random import Random

from lmcache_core.protocols import EvictionPolicy
from lmcache_core.types import ChunkKey

SAMPLE = 8
"""One key in this many is in the shadows."""
FEWEST = 8
"""Least size of a shadow, in keys."""
_SAME_USE = 16
"""Uses closer together than this fraction of a cache turn-over are one: a lookup and the store that follows it."""
_DECISIONS = 4
"""Decisions in one turn-over."""
_MEMORY = 0.9
"""Part of a score that the next decision still counts."""
_CERTAINTY = 1.5
"""By how many standard deviations, about, a score must be ahead of that of LRU."""


@dataclass(frozen=True, slots=True)
class Mode:
    """One way of ranking."""

    credits: tuple[float, ...]
    """What chunks reused 0, 1, 2, ... times are worth beyond their last use, in cache sizes; never falling."""
    admitted: float = 1.0
    """Share of new prefixes that begin in queue 1 instead of 0."""


LRU = Mode((0, 0, 0, 0))
REUSED = Mode((-1, 0, 1, 2))
GUARDED = Mode((-4, 0, 1, 2), admitted=0.25)
MODES = (LRU, REUSED, GUARDED)


class Queues:
    """Keys in queues by reuse, ranked by a mode that may change at any time."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.clock = 0
        """Time: as many chunks were added so far."""
        self._queues: tuple[OrderedDict[ChunkKey, int], ...] = tuple(OrderedDict() for _ in mode.credits)
        self._queue_of: dict[ChunkKey, int] = {}
        self._random = Random(0)

    def __len__(self) -> int:
        return len(self._queue_of)

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._queue_of

    def add(self, keys: Sequence[ChunkKey]) -> None:
        """Take in keys of one prefix, shallowest first; those it has already are touched."""
        queue = int(self._random.random() < self.mode.admitted)
        for key in keys:
            if key not in self._queue_of:
                self._queue_of[key] = queue
                self._queues[queue][key] = self.clock
        self.touch(keys)

    def touch(self, keys: Sequence[ChunkKey]) -> int:
        """Note a use of a prefix; how many of its keys were reused."""
        early = self.clock - len(self) // _SAME_USE
        deepest_queue, reused = 0, 0
        for key in reversed(keys):
            queue = self._queue_of.get(key)
            if queue is None:
                continue
            if self._queues[queue].pop(key) < early:
                reused += 1
                queue = min(queue + 1, len(self._queues) - 1)
            # What is deeper has been used no more often: were it ranked higher, by another draw at its admission or
            # because this key was evicted in between, it would outlive its own prefix.
            queue = deepest_queue = max(queue, deepest_queue)
            self._queue_of[key] = queue
            self._queues[queue][key] = self.clock
        return reused

    def remove(self, key: ChunkKey) -> None:
        """Forget a key, if it is known."""
        queue = self._queue_of.pop(key, None)
        if queue is not None:
            del self._queues[queue][key]

    def coldest(self) -> Iterator[ChunkKey]:
        """Keys, least worth first; each takes constant time."""
        return (key for _, _, key in heapq.merge(*map(self._ranked, range(len(self._queues)))))

    def _ranked(self, queue: int) -> Iterator[tuple[float, int, ChunkKey]]:
        credit = self.mode.credits[queue] * len(self)
        return ((used + credit, queue, key) for key, used in self._queues[queue].items())


class _Shadow:
    """What a mode would hold, and its score."""

    def __init__(self, mode: Mode) -> None:
        self.queues = Queues(mode)
        self.score = 0.0

    def use(self, keys: Sequence[ChunkKey], capacity: int, clock: int) -> None:
        """See a request's sampled keys go by, at a time that is the same for every shadow."""
        queues = self.queues
        queues.clock = clock
        self.score += queues.touch(keys)
        new = [key for key in keys if key not in queues]
        if new:
            queues.add(new)
        over = len(queues) - capacity
        if over > 0:
            for key in list(islice(queues.coldest(), over)):
                queues.remove(key)


class Adaptive(EvictionPolicy):
    """See the module. Deterministic: the same calls give the same order."""

    def __init__(self) -> None:
        self._queues = Queues(LRU)
        self._shadows = [_Shadow(mode) for mode in MODES]
        self._decided_at = 0

    @property
    def mode(self) -> Mode:
        """The mode in force."""
        return self._queues.mode

    def add(self, keys: Sequence[ChunkKey]) -> None:
        self._queues.clock += len(keys)
        self._queues.add(keys)

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        self._queues.touch(keys)
        sampled = _sampled(keys)
        if sampled:
            capacity = max(FEWEST, len(self._queues) // SAMPLE)
            for shadow in self._shadows:
                shadow.use(sampled, capacity, self._queues.clock // SAMPLE)
        if (self._queues.clock - self._decided_at) * _DECISIONS > len(self._queues):
            self._decided_at = self._queues.clock
            self._decide()

    def remove(self, key: ChunkKey) -> None:
        self._queues.remove(key)

    def coldest(self) -> Iterator[ChunkKey]:
        return self._queues.coldest()

    def _decide(self) -> None:
        """Leave LRU only for what is better by more than chance, and stay there while it is better at all."""
        lru, best = self._shadows[0].score, max(self._shadows, key=lambda shadow: shadow.score)
        ahead = best.score - lru
        kept = best.queues.mode is self.mode
        needed = 0.0 if kept else _CERTAINTY * sqrt(best.score + lru)
        self._queues.mode = best.queues.mode if ahead > needed else LRU
        for shadow in self._shadows:
            shadow.score *= _MEMORY


def _sampled(keys: Iterable[ChunkKey]) -> list[ChunkKey]:
    return [key for key in keys if key[-1] % SAMPLE == 0]
