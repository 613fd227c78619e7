"""Segments cut into slots, and which slots are free. Plain data: no I/O but `charge`, no locks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from lmcache_backends.gds.folder import Fd
from lmcache_backends.gds.geometry import extent_slack, slots_in
from lmcache_core.types import PAGE


@dataclass(slots=True, eq=False)
class Segment:
    """One preallocated file: a superblock page, then `slots` slots of `slot_bytes`."""

    number: int
    fd: Fd
    file_bytes: int
    slot_bytes: int
    generation: int
    retired: bool = False
    """Dropped or cleared: batches in flight may still use the file, but nothing in it counts any more."""
    slots: int = field(init=False)
    free: deque[int] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = slots_in(self.file_bytes, self.slot_bytes)
        self.free = deque(range(self.slots))

    @property
    def name(self) -> str:
        """File name in the folder."""
        return f"segment-{self.number:06d}"

    @property
    def empty(self) -> bool:
        """Whether no slot is stored in, being written or being read."""
        return len(self.free) == self.slots

    def offset(self, slot: int) -> int:
        """Where the slot begins in the file."""
        return PAGE + slot * self.slot_bytes

    def charge(self) -> int:
        """Most bytes the file will ever occupy on the medium."""
        return max(self.fd.allocated, self.file_bytes + extent_slack(self.slots))


@dataclass(slots=True, eq=False)
class Entry:
    """One stored object, or one being written."""

    segment: Segment
    slot: int
    nbytes: int
    readers: int = 0
    gone: bool = False
    """Deleted; the slot is free once the last reader has left."""
    unread: bool = False
    """The medium failed to read it when it was last asked for."""


class Slab:
    """All segments of a store by number, and those with room by slot size."""

    def __init__(self) -> None:
        self.segments: dict[int, Segment] = {}
        self._roomy: dict[int, list[Segment]] = {}

    def add(self, segment: Segment) -> None:
        """Take in a segment; its `free` says which slots may be used."""
        self.segments[segment.number] = segment
        if segment.free:
            self._roomy.setdefault(segment.slot_bytes, []).append(segment)

    def remove(self, segment: Segment) -> None:
        """Let go of a segment."""
        del self.segments[segment.number]
        if segment.free:
            self._roomy[segment.slot_bytes].remove(segment)

    def take(self, slot_bytes: int) -> tuple[Segment, int] | None:
        """A free slot of exactly that size."""
        roomy = self._roomy.get(slot_bytes)
        if not roomy:
            return None
        segment = roomy[-1]
        slot = segment.free.popleft()
        if not segment.free:
            roomy.pop()
        return segment, slot

    def take_larger(self, nbytes: int) -> tuple[Segment, int] | None:
        """A free slot of the smallest size that holds `nbytes`."""
        sizes = [size for size, roomy in self._roomy.items() if roomy and size >= nbytes]
        return self.take(min(sizes)) if sizes else None

    def give(self, segment: Segment, slot: int) -> None:
        """Make a slot free again."""
        if segment.retired:
            return
        if not segment.free:
            self._roomy.setdefault(segment.slot_bytes, []).append(segment)
        segment.free.append(slot)

    def largest_empty(self) -> Segment | None:
        """The largest segment that holds nothing."""
        return max((s for s in self.segments.values() if s.empty), key=lambda s: s.file_bytes, default=None)
