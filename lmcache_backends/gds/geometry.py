"""The sizes of a segment store: slots, segments, journal, and what each may occupy on the medium. All in bytes."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from lmcache_backends.gds import journal
from lmcache_core.types import PAGE, round_up

_PER_DOUBLING = 8
_DOUBLINGS = 3

_SLACK_PER_SLOT = 64
"""File systems describe a preallocated file in extents of 12 (ext4) or 16 (xfs) bytes; writing slots in random order
splits them, at worst two a slot in half-filled blocks. Measured: 13 (ext4) and 17 (xfs) bytes a slot."""

_NAME_BYTES = 64
"""Room in the directory for one file name, generously."""


class TooSmall(ValueError):
    """A size that cannot hold one object and what the store itself needs."""

    def __init__(self, setting: str, value: int, least: int) -> None:
        self.setting = setting
        """Its path below the tier."""
        self.value = value
        self.least = least
        super().__init__(f"{setting} is {value} bytes, at least {least} are needed")


def slots_in(file_bytes: int, slot_bytes: int) -> int:
    """Slots in a segment file of that size, behind its superblock page."""
    return max(0, file_bytes - PAGE) // slot_bytes


def extent_slack(slots: int) -> int:
    """Most bytes a file system adds to a segment for describing its extents."""
    return round_up(_SLACK_PER_SLOT * slots) + 2 * PAGE


def slot_sizes(largest: int) -> tuple[int, ...]:
    """Slot sizes in ascending order: `largest`, and eight a doubling below it down to an eighth.

    Raw chunks have one size and so one slot size; of an encoded one at most 9% of the slot is padding.
    """
    steps = range(_PER_DOUBLING * _DOUBLINGS + 1)
    return tuple(sorted({round_up(math.ceil(largest * 2 ** (-step / _PER_DOUBLING))) for step in steps}))


@dataclass(frozen=True, slots=True)
class Geometry:
    """What follows from a capacity and the largest object."""

    capacity: int
    slot_sizes: tuple[int, ...]
    segment_bytes: int
    """Most bytes of one segment file."""
    journal_records: int
    """Most records of the journal: twice as many as there can be objects."""
    overhead: int
    """What everything but the segments may occupy: the journal twice (it is replaced by renaming), lock, directory."""
    objects: int
    """Objects of the largest size that fit."""

    @classmethod
    def plan(
        cls, capacity: int, object_bytes: int, segment_bytes: int | None = None, journal_records: int | None = None
    ) -> Geometry:
        """Choose what is not given. Raise `TooSmall`."""
        sizes = slot_sizes(object_bytes)
        largest = sizes[-1]
        if segment_bytes is None:
            # About 64 segments, so that space can move between slot sizes; never many more than 512 open files, and no
            # segments of so few slots that their own overhead counts.
            few = min(8 * largest, capacity // 4)
            segment_bytes = max(min(capacity // 64, 4 << 30), capacity // 512, few, PAGE + largest)
        slots = slots_in(segment_bytes, largest)
        if slots < 1:
            raise TooSmall("backend.segment_bytes", segment_bytes, PAGE + largest)
        segment_bytes = PAGE + slots * largest
        if journal_records is None:
            journal_records = 2 * (capacity // sizes[0]) + 64
        journals = 2 * (journal.file_bytes(journal_records) + 2 * PAGE)
        overhead = journals + 4 * PAGE + round_up(_NAME_BYTES * (capacity // segment_bytes))
        least = overhead + PAGE + largest + extent_slack(1)
        if capacity < least:
            raise TooSmall("capacity", capacity, least)
        room, objects = capacity - overhead, 0
        while (size := _file_bytes(segment_bytes, largest, room)) > 0:
            objects += slots_in(size, largest)
            room -= size + extent_slack(slots_in(size, largest))
        return cls(capacity, sizes, segment_bytes, journal_records, overhead, objects)

    def slot_bytes(self, nbytes: int) -> int:
        """Slot size for an object of `nbytes`. Raise `ValueError` when it is empty or larger than any."""
        if nbytes < 1:
            raise ValueError("an object of 0 bytes")
        at = bisect.bisect_left(self.slot_sizes, nbytes)
        if at == len(self.slot_sizes):
            raise ValueError(f"an object of {nbytes} bytes is larger than the tier's largest, {self.slot_sizes[-1]}")
        return self.slot_sizes[at]

    def file_bytes(self, slot_bytes: int, room: int) -> int:
        """Size of a new segment for that slot size where `room` bytes are left; 0 when none fits."""
        return _file_bytes(self.segment_bytes, slot_bytes, room)

    def footprint(self, nbytes: int) -> int:
        """The slot of such an object with its share of all overhead: the tier is full when these add up to capacity.

        An object larger than any slot can only be one that was stored under another configuration.
        """
        largest = self.slot_sizes[-1]
        slot_bytes = self.slot_bytes(nbytes) if nbytes <= largest else round_up(nbytes)
        return slot_bytes * self.capacity // (self.objects * largest)


def _file_bytes(segment_bytes: int, slot_bytes: int, room: int) -> int:
    slots = slots_in(segment_bytes, slot_bytes)
    while slots and PAGE + slots * slot_bytes + extent_slack(slots) > room:
        slots = min(slots - 1, slots_in(room - extent_slack(slots), slot_bytes))
    return PAGE + slots * slot_bytes if slots else 0
