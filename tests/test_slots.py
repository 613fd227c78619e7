"""Slots: states, pins, eviction, and the books behind them."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from lmcache_core import slots as slots_module
from lmcache_core.errors import BackendUnavailable
from lmcache_core.eviction.lru import Lru
from lmcache_core.protocols import Region
from lmcache_core.slots import POISON, Slots, map_shared
from lmcache_core.testing.memory import aligned
from lmcache_core.types import HEADER_BYTES, PAGE, ChunkKey

CHUNK = 1000


def keys(count: int, start: int = 0) -> list[ChunkKey]:
    return [ChunkKey(i.to_bytes(32, "big")) for i in range(start, start + count)]


def make(count: int = 8, *, poison: bool = False) -> Slots:
    nbytes = count * 2 * PAGE
    view = aligned(nbytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    return Slots(Region(address, nbytes, view), CHUNK, Lru(), poison=poison)


def publish(slots: Slots, names: Sequence[ChunkKey]) -> list[int]:
    taken = slots.take(len(names))
    assert len(taken) == len(names)
    slots.publish(names, taken, 1, sealed=False)
    return taken


def test_geometry() -> None:
    slots = make(4)
    assert slots.slot_bytes == 2 * PAGE and slots.count == 4
    assert slots.offsets([0, 3]).tolist() == [HEADER_BYTES, 3 * 2 * PAGE + HEADER_BYTES]
    assert len(slots.view(2)) == 2 * PAGE and len(slots.view(2, 10)) == 10 and len(slots.payload(2)) == CHUNK
    slots.payload(3)[:] = bytes([7]) * CHUNK
    at = int(slots.offsets([3])[0])
    assert bytes(slots.region.view[at : at + CHUNK]) == bytes([7]) * CHUNK
    assert slots.region.address % PAGE == 0


def test_taking_everything_and_nothing() -> None:
    slots = make(4)
    assert slots.take(0) == []
    taken = slots.take(9)
    assert sorted(taken) == [0, 1, 2, 3]
    assert slots.take(1) == []
    slots.check(elsewhere=4)
    slots.give_back(taken)
    slots.check(elsewhere=0)


def test_the_coldest_and_deepest_chunk_goes_first() -> None:
    slots = make(6)
    first, second = keys(3), keys(3, 10)
    publish(slots, first)
    publish(slots, second)
    slots.policy.touch(first)
    slots.publish(keys(1, 20), slots.take(1), 1, sealed=False)
    assert second[2] not in slots.index and slots.evicted == 1
    slots.give_back(slots.take(3))
    assert set(slots.index) == {*first[:2], *keys(1, 20)}, "then the rest of the colder prefix, then the warmer's tail"
    slots.check(0)


def test_pinned_and_dirty_chunks_stay() -> None:
    slots = make(4)
    taken = publish(slots, keys(4))
    slots.pins[taken[0]] += 1
    slots.dirty[taken[1]] = None
    assert sorted(slots.take(4)) == sorted(taken[2:])
    assert set(slots.index) == set(keys(2))
    slots.check(elsewhere=2)


def test_long_held_chunks_do_not_block_eviction_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """One eviction looks at a bounded number of chunks; what it could not evict is out of the way of the next."""
    monkeypatch.setattr(slots_module, "_SCAN", 3)
    slots = make(8)
    taken = publish(slots, keys(8)[::-1])  # coldest first: keys 0, 1, 2, ...
    for slot in taken[-6:]:
        slots.pins[slot] += 1
    got = [len(slots.take(1)) for _ in range(4)]
    assert got[0] == 0 and sum(got) == 2
    slots.check(elsewhere=2)


def test_hidden_chunks_are_freed_with_their_last_pin() -> None:
    slots = make(2, poison=True)
    taken = publish(slots, keys(2))
    slots.pins[taken[0]] += 2
    slots.dirty[taken[0]] = None
    for key in keys(2):
        slots.hide(key)
    assert not slots.index and not slots.dirty and slots.free == [taken[1]]
    slots.check(0)
    slots.sealed[taken[0]] = 1  # as a writer that still holds the slot does
    slots.unpin([taken[0]])
    assert slots.free == [taken[1]]
    slots.unpin([taken[0]])
    assert sorted(slots.free) == [0, 1] and slots.sealed[taken[0]] == 0
    slots.check(0)


def test_a_pin_dropped_twice_is_an_error() -> None:
    slots = make(2)
    taken = publish(slots, keys(1))
    slots.pins[taken[0]] += 1
    slots.unpin(taken)
    with pytest.raises(AssertionError, match="released more often"):
        slots.unpin(taken)


@pytest.mark.parametrize("how", ["give_back", "evict", "drop", "hide"])
def test_freed_slots_are_poisoned(how: str) -> None:
    slots = make(1, poison=True)
    [slot] = slots.take(1)
    slots.view(slot)[:] = bytes(slots.slot_bytes)
    if how == "give_back":
        slots.give_back([slot])
    else:
        slots.publish(keys(1), [slot], 1, sealed=True)
        if how == "evict":
            slots.take(1)
        elif how == "drop":
            slots.drop(keys(1)[0], slot)
        else:
            slots.hide(keys(1)[0])
    assert bytes(slots.view(slot)) == bytes([POISON]) * slots.slot_bytes
    assert not slots.sealed[slot]


def broken_books() -> Iterator[tuple[str, Slots]]:
    def fresh() -> Slots:
        slots = make(4)
        publish(slots, keys(2))
        slots.check(0)
        return slots

    yield "a slot is free twice", (slots := fresh())
    slots.free[0] = slots.free[1]
    yield "but 1 free", (slots := fresh())
    slots.free.pop()
    yield "a free slot is pinned", (slots := fresh())
    slots.pins[slots.free[0]] = 1
    slots.count += 1  # so that the sum is right: it is hidden as well
    yield "index and slots disagree", (slots := fresh())
    slots.key_of[slots.index[keys(1)[0]]] = keys(1, 9)[0]
    yield "a dirty slot is not ready", (slots := fresh())
    slots.dirty[slots.free[0]] = None
    yield "policy and index disagree", (slots := fresh())
    slots.policy.remove(keys(1)[0])
    yield "negative pins", (slots := fresh())
    slots.pins[slots.index[keys(1)[0]]] = -1


def test_check_finds_every_kind_of_broken_book() -> None:
    cases = list(broken_books())
    assert len(cases) == 7
    for message, slots in cases:
        with pytest.raises(AssertionError, match=message):
            slots.check(0)


@pytest.mark.parametrize("seed", range(5))
def test_random_operations_keep_the_books(seed: int) -> None:
    rng = random.Random(seed)
    slots = make(16, poison=True)
    taken: list[int] = []
    pinned: list[int] = []
    names = keys(40)
    for _ in range(3000):
        choice = rng.randrange(8)
        if choice == 0:
            taken += slots.take(rng.randrange(5))
        elif choice == 1 and taken:
            slots.give_back([taken.pop()])
        elif choice == 2 and taken:
            key = rng.choice(names)
            if key not in slots.index:
                slots.publish([key], [taken.pop()], 1, sealed=bool(rng.randrange(2)))
        elif choice == 3 and slots.index:
            slot = rng.choice(list(slots.index.values()))
            slots.pins[slot] += 1
            pinned.append(slot)
        elif choice == 4 and pinned:
            slots.unpin([pinned.pop(rng.randrange(len(pinned)))])
        elif choice == 5 and slots.index:
            slots.hide(rng.choice(list(slots.index)))
        elif choice == 6 and slots.index:
            slot = rng.choice(list(slots.index.values()))
            slots.dirty[slot] = None
        elif choice == 7 and slots.dirty:
            del slots.dirty[next(iter(slots.dirty))]
        slots.check(len(taken))
    slots.unpin(pinned)
    slots.give_back(taken)
    slots.check(0)


CHILD = """
import sys
from lmcache_core.slots import map_shared
region = map_shared({"pid": int(sys.argv[1]), "fd": int(sys.argv[2]), "nbytes": int(sys.argv[3])})
assert region.nbytes == int(sys.argv[3]) and region.address % 4096 == 0
print(bytes(region.view[5000:5005]).hex())
region.view[5000:5005] = b"child"
"""


def test_another_process_maps_the_same_bytes() -> None:
    nbytes = 2 * PAGE
    fd = os.memfd_create("test-arena")
    try:
        os.ftruncate(fd, nbytes)
        region = map_shared({"pid": os.getpid(), "fd": fd, "nbytes": nbytes})
        region.view[5000:5005] = b"owner"
        arguments = [sys.executable, "-c", CHILD, str(os.getpid()), str(fd), str(nbytes)]
        child = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=True)
        assert bytes.fromhex(child.stdout.strip()) == b"owner"
        assert bytes(region.view[5000:5005]) == b"child"
        # Address and view are the same memory.
        flat = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(region.address))
        assert bytes(flat[5000:5005]) == b"child"
        with pytest.raises(BackendUnavailable, match="has 8192 bytes, expected 4096"):
            map_shared({"pid": os.getpid(), "fd": fd, "nbytes": PAGE})
    finally:
        os.close(fd)
    with pytest.raises(BackendUnavailable, match="one user in one PID namespace"):
        map_shared({"pid": os.getpid(), "fd": fd, "nbytes": nbytes})
