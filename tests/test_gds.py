"""The disk backend against a model, the disk's own figures, and everything a file system can do to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from faults.disk import (
    LAYOUT_ID,
    build,
    cannot_mount,
    disk,
    du,
    key_of,
    new_object,
    open_object,
    read_version,
    size_of,
    tmpfs,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pydantic import ValidationError

from lmcache_backends.gds import GdsConfig, files, journal, transfer
from lmcache_backends.gds.backend import DiskBackend
from lmcache_backends.gds.folder import Folder
from lmcache_backends.gds.geometry import Geometry, slot_sizes
from lmcache_backends.gds.journal import Kind, Record, record
from lmcache_core import _native, seal
from lmcache_core.errors import BackendError, BackendUnavailable, Closed, ConfigError, CorruptChunk, NoSpace
from lmcache_core.protocols import BuildContext
from lmcache_core.testing.memory import aligned
from lmcache_core.types import HEADER_BYTES, PAGE, round_up

MODES = ("segments", "files")
PAYLOAD = 16 << 10
OBJECT = HEADER_BYTES + PAYLOAD
SLOT = round_up(OBJECT)
CAPACITY = 2 << 20
SMALL = {"segments": 12 * SLOT + (256 << 10), "files": 12 * SLOT + (1200 << 10)}
"""Room for a dozen objects or so; the directories of `files` take 1.1 MB."""

needs_mounts = pytest.mark.skipif(bool(cannot_mount()), reason=cannot_mount() or "mounts are possible")


@pytest.fixture
def buffer() -> memoryview:
    """Room for any object here."""
    return aligned(4 * SLOT)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Callable[..., DiskBackend]]:
    """Open backends in `tmp_path/kv` (or `path`), closed in the end."""
    opened: list[DiskBackend] = []

    def make(path: Path = tmp_path / "kv", *, capacity: int = CAPACITY, object_bytes: int = OBJECT, **options: object):  # type: ignore[no-untyped-def]
        opened.append(build(path, capacity, object_bytes, **options))
        return opened[-1]

    yield make
    for backend in opened:
        backend.close()


def put(backend: DiskBackend, *numbers: int, version: int = 1, nbytes: int = PAYLOAD) -> list[Exception | None]:
    """Store test objects in one batch."""
    return backend.put_from([key_of(n) for n in numbers], [new_object(n, version, nbytes) for n in numbers])


def fill(backend: DiskBackend, first: int = 0) -> int:
    """Store objects until there is no space; how many there are."""
    for number in range(first, first + 10_000):
        [result] = put(backend, number)
        if result is not None:
            assert isinstance(result, NoSpace), repr(result)
            return number - first
    raise AssertionError("the store is never full")


def volume_of(backend: DiskBackend) -> Any:
    """What is inside, for tests that must look."""
    return backend._volume


def abandon(backend: DiskBackend) -> None:
    """Forget everything in memory, as kill -9 does."""
    volume_of(backend).abandon()
    backend._volume, backend._closed = None, True


# -- against a model -------------------------------------------------------------------------------------------------
class StoreMachine(RuleBasedStateMachine):
    """Random operations on a small store; the model is a dict in the order of use."""

    mode = ""
    KEYS = 12

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.model: OrderedDict[int, int] = OrderedDict()
        self.version = 0
        self.room = aligned(self.KEYS * SLOT)
        self.segment_slots = 2
        self.backend = self.open()

    def open(self) -> DiskBackend:
        options = {"segment_bytes": PAGE + self.segment_slots * SLOT} if self.mode == "segments" else {}
        return build(self.home / "kv", SMALL[self.mode], OBJECT, mode=self.mode, **options)

    def views(self, count: int) -> list[memoryview]:
        return [self.room[i * SLOT : (i + 1) * SLOT] for i in range(count)]

    numbers = st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=4)

    @rule(numbers=numbers)
    def put(self, numbers: list[int]) -> None:
        self.version += 1
        keys = [key_of(n) for n in numbers]
        objects = [new_object(n, self.version, size_of(n, self.version, PAYLOAD)) for n in numbers]
        for number, result in zip(numbers, self.backend.put_from(keys, objects), strict=True):
            if result is None:
                self.model.setdefault(number, self.version)
                self.model.move_to_end(number)
            else:
                assert isinstance(result, NoSpace), repr(result)
        # Keys that were present are touched when the batch begins, new ones enter when it ends; the last is coldest.
        old = [n for n in numbers if self.model.get(n, self.version) != self.version]
        new = [n for n in dict.fromkeys(reversed(numbers)) if self.model.get(n) == self.version]
        for number in [*reversed(old), *new]:
            self.model.move_to_end(number)

    @rule(numbers=st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=KEYS, unique=True))
    def get(self, numbers: list[int]) -> None:
        views = self.views(len(numbers))
        for number, view, got in zip(
            numbers, views, self.backend.get_into([key_of(n) for n in numbers], views), strict=True
        ):
            assert (got is not None) == (number in self.model)
            if number in self.model:
                assert isinstance(got, int)
                assert open_object(view[:got], number) == self.model[number]
        for number in reversed(numbers):
            if number in self.model:
                self.model.move_to_end(number)

    @rule()
    def contains(self) -> None:
        everything = range(self.KEYS)
        assert self.backend.contains([key_of(n) for n in everything]) == [n in self.model for n in everything]

    @rule(numbers=numbers)
    def delete(self, numbers: list[int]) -> None:
        self.backend.delete([key_of(n) for n in numbers])
        for number in numbers:
            self.model.pop(number, None)

    @rule()
    def clear(self) -> None:
        self.backend.clear()
        self.model.clear()

    @rule(segment_slots=st.integers(1, 4))
    def close_and_open(self, segment_slots: int) -> None:
        self.backend.close()
        self.segment_slots = segment_slots
        self.backend = self.open()
        self.found(in_order=True)

    @rule()
    def kill_and_open(self) -> None:
        abandon(self.backend)
        self.backend = self.open()
        self.found(in_order=False)

    @precondition(lambda self: self.mode == "segments")
    @rule()
    def lose_the_journal(self) -> None:
        self.backend.close()
        (self.home / "kv" / "journal").unlink()
        self.backend = self.open()
        # Deleted objects whose slots were not used again are found too, older versions of a key are not.
        numbers = {key_of(n): n for n in range(self.KEYS)}
        extra = {numbers[key] for key, _ in self.backend.scan()} - self.model.keys()
        self.backend.delete([key_of(n) for n in extra])
        self.found(in_order=False)
        ordered = [numbers[key] for key, _ in self.backend.scan()]
        self.model = OrderedDict((n, self.model[n]) for n in ordered)

    def found(self, *, in_order: bool) -> None:
        sizes = {key_of(n): HEADER_BYTES + size_of(n, v, PAYLOAD) for n, v in self.model.items()}
        found = list(self.backend.scan())
        assert dict(found) == sizes
        if in_order and self.mode == "segments":
            assert [key for key, _ in found] == [key_of(n) for n in self.model]
        elif self.mode == "segments":
            order = {key: i for i, (key, _) in enumerate(found)}
            self.model = OrderedDict(sorted(self.model.items(), key=lambda item: order[key_of(item[0])]))

    @invariant()
    def books(self) -> None:
        usage = self.backend.usage()
        assert usage is not None
        assert usage.objects == len(self.model)
        assert usage.object_bytes == sum(HEADER_BYTES + size_of(n, v, PAYLOAD) for n, v in self.model.items())
        assert usage.allocated_bytes == du(self.home / "kv") <= SMALL[self.mode]

    def teardown(self) -> None:
        self.backend.close()
        shutil.rmtree(self.home)


class SegmentMachine(StoreMachine):
    mode = "segments"


class FileMachine(StoreMachine):
    mode = "files"


_FEW = settings(max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
TestSegmentMachine = SegmentMachine.TestCase
TestSegmentMachine.settings = _FEW
TestFileMachine = FileMachine.TestCase
TestFileMachine.settings = _FEW


# -- integrity: whatever happens to the bytes ------------------------------------------------------------------------
BIG = 64 << 10


def unsealed(obj: memoryview, number: int, raw_bytes: int = BIG) -> bool:
    """Whether the core would take these bytes for the object."""
    try:
        seal.unseal(obj, key_of(number), LAYOUT_ID, seal.RAW_CODEC, raw_bytes)
    except CorruptChunk:
        return False
    return True


def test_every_flipped_bit_of_an_object_is_detected() -> None:
    obj = new_object(1, 1, BIG)
    assert unsealed(obj, 1)
    taken = 0
    for at in range(len(obj)):
        for bit in range(8):
            obj[at] ^= 1 << bit
            taken += unsealed(obj, 1)
            obj[at] ^= 1 << bit
    assert taken == 0
    assert unsealed(obj, 1)


def test_every_truncation_and_every_zeroed_tail_is_detected() -> None:
    obj = new_object(1, 1, BIG)
    assert not any(unsealed(obj[:length], 1) for length in range(len(obj)))
    torn = aligned(len(obj), 0)
    for length in range(0, len(obj), 61):
        torn[:length] = obj[:length]
        assert not unsealed(torn, 1), length


@pytest.mark.parametrize("cut", [1, HEADER_BYTES, HEADER_BYTES + 1, 3 * PAGE, HEADER_BYTES + BIG - 1])
def test_mixtures_of_two_objects_are_detected(cut: int) -> None:
    """Stale tails, stale heads, swapped halves, the object of another key."""
    one, other, older = new_object(1, 2, BIG), new_object(2, 2, BIG), new_object(1, 1, BIG)
    genuine = {bytes(one), bytes(older)}
    pieces = [(a[:cut], b[cut:]) for a in (one, other, older) for b in (one, other, older)]
    pieces += [(one[cut:], one[:cut])]
    for head, tail in pieces:
        mixed = aligned(len(one))
        mixed[: len(head)], mixed[len(head) :] = head, tail
        assert unsealed(mixed, 1) == (bytes(mixed) in genuine)


def object_file(path: Path, mode: str, number: int) -> tuple[Path, int]:
    """The file that holds a test object, and where it begins in it."""
    if mode == "files":
        return next(path.rglob(key_of(number).hex())), 0
    for file in path.glob("segment-*"):
        at = file.read_bytes().find(key_of(number), PAGE)
        if at >= 0:
            return file, at // PAGE * PAGE
    raise AssertionError(f"object {number} is in no segment")


def test_damage_on_the_disk_is_a_miss(store: Callable[..., DiskBackend], tmp_path: Path, mode: str) -> None:
    backend = store(mode=mode, object_bytes=HEADER_BYTES + BIG)
    assert put(backend, 1, 2, nbytes=BIG) == [None, None]
    file, start = object_file(tmp_path / "kv", mode, 1)
    room = aligned(round_up(HEADER_BYTES + BIG))
    good = bytes(new_object(1, 1, BIG))
    rng = Random(5)
    with file.open("r+b", buffering=0) as medium:

        def write(at: int, data: bytes) -> None:
            os.pwrite(medium.fileno(), data, start + at)

        for _ in range(200):
            at = rng.randrange(len(good))
            write(at, bytes([good[at] ^ 1 << rng.randrange(8)]))
            assert isinstance(read_version(backend, 1, room), CorruptChunk)
            write(at, good[at : at + 1])
        assert read_version(backend, 1, room) == 1
        for length in (0, 1, 4095, 4096, 4097, 40_000, len(good) - 1):
            write(length, bytes(len(good) - length))
            assert isinstance(read_version(backend, 1, room), CorruptChunk)
            write(0, good)
        write(0, bytes(new_object(2, 1, BIG)))
        assert isinstance(read_version(backend, 1, room), CorruptChunk)
        for length in (HEADER_BYTES + BIG - 1, 5000, 4096, 100, 0):
            os.ftruncate(medium.fileno(), start + length)
            assert isinstance(read_version(backend, 1, room), CorruptChunk)


# -- the journal -----------------------------------------------------------------------------------------------------
def a_journal(path: Path, records: int) -> tuple[Folder, list[Record], bytes]:
    """A journal with a snapshot of half the records and the others appended; its contents."""
    folder = Folder(path)
    rng = Random(records)
    batch = [
        record(Kind(1 + i % 3), key_of(i), rng.getrandbits(64), i, rng.getrandbits(32), rng.getrandbits(50))
        for i in range(records)
    ]
    it = journal.Journal(folder, 2 * records, 2 * records)
    it.rewrite(batch[: records // 2])
    it.append(batch[records // 2 : -1])
    it.append(batch[-1:])
    return folder, batch, (path / "journal").read_bytes()


def loaded(folder: Folder) -> list[Record] | None:
    records = journal.Journal(folder, 64, 64).load()
    return None if records is None else list(records)


def test_a_journal_torn_at_any_byte_tells_no_lies(tmp_path: Path) -> None:
    folder, batch, data = a_journal(tmp_path / "kv", 12)
    assert loaded(folder) == batch
    file = os.open(tmp_path / "kv/journal", os.O_RDWR)
    used = PAGE + 64 * len(batch)
    for tail in ("zeros", "nothing"):
        os.pwrite(file, data, 0)
        for length in reversed(range(used)):
            if tail == "zeros":
                os.pwrite(file, b"\0", length)
            else:
                os.ftruncate(file, length)
            records = loaded(folder)
            whole = max(0, length - PAGE) // 64
            if records is None:
                assert whole < 6 or length < PAGE, "a snapshot that is whole was refused"
            else:
                # The last bytes of a record may happen to be zeros already.
                assert max(6, whole) <= len(records) <= whole + 1
                assert records == batch[: len(records)]
    os.close(file)


def test_a_journal_with_any_bit_flipped_tells_no_lies(tmp_path: Path) -> None:
    folder, batch, data = a_journal(tmp_path / "kv", 10)
    file = os.open(tmp_path / "kv/journal", os.O_RDWR)
    used = [*range(48), *range(PAGE, PAGE + 64 * len(batch))]
    for at in used:
        for bit in range(8):
            os.pwrite(file, bytes([data[at] ^ 1 << bit]), at)
            records = loaded(folder)
            os.pwrite(file, data[at : at + 1], at)
            # A bad record with good ones behind it is a torn journal; only the last may just be missing.
            assert records is None or (records == batch[:-1] and at >= PAGE + 64 * 9) or (records == batch and at >= 32)
    os.close(file)
    assert loaded(folder) == batch


def test_a_journal_of_another_generation_is_not_believed(tmp_path: Path) -> None:
    folder, batch, data = a_journal(tmp_path / "kv", 10)
    _, _, other = a_journal(tmp_path / "kv", 10)
    (tmp_path / "kv/journal").write_bytes(other[: PAGE + 64 * 5] + data[PAGE + 64 * 5 :])
    assert loaded(folder) == batch[:5]
    (tmp_path / "kv/journal").write_bytes(other[:PAGE] + data[PAGE:])
    assert loaded(folder) is None


def test_a_record_of_a_segment_that_was_replaced_is_not_believed(
    store: Callable[..., DiskBackend], tmp_path: Path
) -> None:
    """A segment file that was dropped and made anew has its number again, but nothing of what it held."""
    backend = store(segment_bytes=PAGE + 4 * SLOT)
    assert put(backend, 0) == [None]
    backend.close()
    file = tmp_path / "kv/journal"
    generations: list[int] = []
    for step in (0, 1):
        journal_of = journal.Journal(Folder(tmp_path / "kv"), 0, 1 << 16)
        records = list(journal_of.load() or ())
        (_, generation, segment, _, word) = records[0]
        generations.append(generation)
        other = record(Kind.PUT, key_of(50 + step), generation + 1 - step, segment, 1 + step, word & ((1 << 56) - 1))
        journal_of.append([other])
    del journal_of
    backend = store(segment_bytes=PAGE + 4 * SLOT)
    # The second record is right in everything, which shows that only its generation keeps the first one out.
    assert backend.contains([key_of(0), key_of(50), key_of(51)]) == [True, False, True]
    assert generations[0] == generations[1] and file.exists()


@pytest.mark.parametrize("damage", ["missing", "empty", "zeros", "noise", "hole", "segment gone", "stale"])
def test_recovery_without_a_good_journal(
    store: Callable[..., DiskBackend], tmp_path: Path, buffer: memoryview, damage: str
) -> None:
    backend = store(segment_bytes=PAGE + 4 * SLOT)
    count = fill(backend)
    file = tmp_path / "kv/journal"
    stale = file.read_bytes()
    backend.delete([key_of(0)])
    assert put(backend, 1000, version=7) == [None]  # in the slot of object 0
    backend.close()
    data = file.read_bytes()
    lost = 0
    if damage == "missing":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "zeros":
        file.write_bytes(bytes(len(data)))
    elif damage == "noise":
        file.write_bytes(Random(1).randbytes(len(data)))
    elif damage == "hole":
        file.write_bytes(data[: PAGE + 64 * 5] + bytes(64) + data[PAGE + 64 * 6 :])
    elif damage == "segment gone":
        (tmp_path / "kv/segment-000000").unlink()
        lost = 3  # objects 1, 2 and 3, and 1000
    else:
        file.write_bytes(stale)
    backend = store(segment_bytes=PAGE + 4 * SLOT)
    versions = [read_version(backend, n, buffer) for n in range(count)]
    assert versions.count(1) == count - 1 - lost
    if damage == "stale":
        # The old journal says that object 0 is where object 1000 is now: its seal tells.
        assert isinstance(versions[0], CorruptChunk)
        assert read_version(backend, 1000, buffer) is None
    else:
        assert versions[0] is None
        assert read_version(backend, 1000, buffer) == (None if lost else 7)
    usage = backend.usage()
    assert usage is not None
    assert usage.allocated_bytes == du(tmp_path / "kv") <= CAPACITY


def test_the_order_of_use_survives(store: Callable[..., DiskBackend], buffer: memoryview) -> None:
    backend = store()
    put(backend, 0, 1, 2, 3)
    read_version(backend, 1, buffer)
    put(backend, 0)  # present: a use
    backend.close()
    backend = store()
    # Of a batch, a prefix, the deepest is the coldest.
    assert [key for key, _ in backend.scan()] == [key_of(n) for n in (3, 2, 1, 0)]
    read_version(backend, 2, buffer)
    put(backend, 4)  # journals the read too
    abandon(backend)
    assert [key for key, _ in store().scan()] == [key_of(n) for n in (3, 1, 0, 2, 4)]


def test_the_order_of_use_of_files(
    store: Callable[..., DiskBackend], buffer: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = store(mode="files")
    put(backend, *range(20))
    read_version(backend, 7, buffer)  # just written: not worth a change of its time
    monkeypatch.setattr(files, "TOUCH_SECONDS", 0)
    read_version(backend, 5, buffer)
    order = [key_of(n) for n in [*range(19, 5, -1), *range(4, -1, -1), 5]]
    assert [key for key, _ in store(mode="files").scan()] == order


# -- capacity --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "mode,capacity,nbytes",
    [
        ("segments", 300_000, 4096),
        ("segments", 300_000, 50_001),
        ("segments", 3_000_001, 4096),
        ("segments", 5_000_001, PAYLOAD),
        ("segments", 5_000_001, 50_001),
        ("files", 1_500_000, 4096),
        ("files", 3_000_001, PAYLOAD),
        ("files", 5_000_001, 50_001),
    ],
)
def test_a_full_store_is_within_its_capacity(
    store: Callable[..., DiskBackend], tmp_path: Path, mode: str, capacity: int, nbytes: int
) -> None:
    backend = store(mode=mode, capacity=capacity, object_bytes=HEADER_BYTES + nbytes)
    rng = Random(capacity)
    held: list[int] = []
    for number in range(2 * capacity // (HEADER_BYTES + nbytes)):
        while isinstance(put(backend, number, nbytes=nbytes)[0], NoSpace):
            backend.delete([key_of(held.pop(rng.randrange(len(held))))])
        held.append(number)
        if number % 97 == 0:
            usage = backend.usage()
            assert usage is not None
            assert (usage.objects, usage.allocated_bytes) == (len(held), du(tmp_path / "kv"))
            assert usage.allocated_bytes <= capacity
    if mode == "segments":
        # The core fills a tier until the footprints add up to the capacity.
        assert len(held) == capacity // backend.footprint(HEADER_BYTES + nbytes)
    abandon(backend)
    backend = store(mode=mode, capacity=capacity, object_bytes=HEADER_BYTES + nbytes)
    assert {key for key, _ in backend.scan()} == {key_of(n) for n in held}
    usage = backend.usage()
    assert usage is not None
    assert usage.allocated_bytes == du(tmp_path / "kv") <= capacity


def test_space_moves_between_sizes(store: Callable[..., DiskBackend], tmp_path: Path, buffer: memoryview) -> None:
    """Empty segments are cut anew, and smaller objects use larger slots when there is nothing else."""
    backend = store(segment_bytes=PAGE + 4 * SLOT)
    for nbytes in (PAYLOAD, 3000, 9000, 100, PAYLOAD):
        held = 0
        for number in range(1000):
            if isinstance(put(backend, number, nbytes=nbytes)[0], NoSpace):
                break
            held += 1
        assert held * round_up(HEADER_BYTES + nbytes) > 0.6 * CAPACITY
        assert du(tmp_path / "kv") <= CAPACITY
        assert all(read_version(backend, n, buffer) == 1 for n in range(held))
        backend.delete([key_of(0)])
        assert put(backend, 2000, nbytes=50) == [None]  # in the only free slot, which is larger
        backend.delete([key_of(n) for n in [*range(held), 2000]])
    assert read_version(backend, 1, buffer) is None


def test_another_configuration_finds_what_still_fits(
    store: Callable[..., DiskBackend], tmp_path: Path, mode: str
) -> None:
    room = aligned(8 * SLOT)
    backend = store(mode=mode, capacity=2 * CAPACITY)
    count = fill(backend)
    backend.close()
    # Half the capacity, then larger objects.
    backend = store(mode=mode)
    assert du(tmp_path / "kv") <= CAPACITY
    found = [n for n in range(count) if read_version(backend, n, room) == 1]
    assert count // 4 <= len(found) <= count // 2
    assert sorted(key for key, _ in backend.scan()) == sorted(key_of(n) for n in found)
    backend.close()
    backend = store(mode=mode, object_bytes=HEADER_BYTES + 4 * PAYLOAD)
    assert [n for n in range(count) if read_version(backend, n, room) == 1] == found
    assert all(backend.footprint(nbytes) >= nbytes for _, nbytes in backend.scan())
    # Whatever lies there, deleting makes room for larger ones.
    backend.delete([key_of(n) for n in found])
    assert put(backend, 5000, nbytes=4 * PAYLOAD) == [None]
    assert read_version(backend, 5000, room) == 1
    assert du(tmp_path / "kv") <= CAPACITY
    backend.close()
    backend = store(mode=mode)
    assert all(backend.footprint(nbytes) >= nbytes for _, nbytes in backend.scan())
    assert fill(backend, 6000) > 0
    assert du(tmp_path / "kv") <= CAPACITY


def test_slot_sizes_waste_little() -> None:
    for largest in (8192, 69_632, 5_902_336, 33_558_528):
        sizes = slot_sizes(largest)
        assert sizes[-1] == largest
        assert all(b - PAGE <= a * 1.0906 for a, b in itertools.pairwise(sizes))
        assert sizes[0] == round_up(largest // 8)


@pytest.mark.parametrize("capacity", [20 << 30, 2 << 40])
@pytest.mark.parametrize("nbytes", [HEADER_BYTES + (5898240), HEADER_BYTES + (32 << 20)])
def test_overhead_of_real_sizes_is_small(capacity: int, nbytes: int) -> None:
    plan = Geometry.plan(capacity, nbytes)
    assert plan.objects * nbytes >= 0.985 * capacity
    assert 60 <= capacity // plan.segment_bytes <= 520  # files kept open
    assert plan.objects <= capacity // plan.footprint(nbytes) <= plan.objects + 1


@needs_mounts
def test_the_free_space_floor_is_respected(tmp_path: Path, mode: str) -> None:
    with tmpfs(tmp_path / "t", 8 << 20) as where:
        backend = build(where / "kv", 64 << 20, OBJECT, mode=mode, free_floor="50%")
        assert fill(backend) > 50
        info = os.statvfs(where)
        assert 4 << 20 <= info.f_bavail * info.f_frsize <= 5 << 20
        backend.close()


def test_inodes_are_limited(store: Callable[..., DiskBackend], tmp_path: Path) -> None:
    backend = store(mode="files", inodes=100)
    count = 0
    for number in range(200):
        [result] = put(backend, number, nbytes=1)
        if result is None:
            count += 1
        else:
            assert isinstance(result, NoSpace)
    assert count > 20
    assert 90 < 1 + len(list((tmp_path / "kv").rglob("*"))) <= 100


# -- concurrency -----------------------------------------------------------------------------------------------------
def test_threads_never_see_other_bytes(store: Callable[..., DiskBackend], tmp_path: Path, mode: str) -> None:
    """Slots are reused at once and keys are shared: what is read is genuine, or absent."""
    backend = store(mode=mode, capacity=SMALL[mode])
    failures: list[BaseException] = []
    versions = iter(range(1, 1 << 30))

    def work(seed: int) -> None:
        rng = Random(seed)
        room = [aligned(SLOT) for _ in range(4)]
        try:
            for _ in range(400):
                numbers = rng.sample(range(10), 4)
                draw = rng.random()
                if draw < 0.4:
                    version = next(versions)
                    results = put(backend, *numbers, version=version, nbytes=rng.choice((PAYLOAD, 5000)))
                    assert all(r is None or isinstance(r, NoSpace) for r in results), results
                elif draw < 0.6:
                    backend.delete([key_of(n) for n in numbers])
                elif draw < 0.61:
                    backend.clear()
                else:
                    for n, view, got in zip(
                        numbers, room, backend.get_into([key_of(n) for n in numbers], room), strict=True
                    ):
                        if got is not None:
                            assert isinstance(got, int), repr(got)
                            open_object(view[:got], n)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    held = [n for n in range(10) if read_version(backend, n, aligned(SLOT)) is not None]
    usage = backend.usage()
    assert usage is not None
    assert (usage.objects, usage.allocated_bytes) == (len(held), du(tmp_path / "kv"))
    backend.delete([key_of(n) for n in held])
    assert fill(backend, 100) >= 10, "slots were lost"


def test_a_slot_being_read_is_not_reused(
    store: Callable[..., DiskBackend], buffer: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = store()
    count = fill(backend)
    read = transfer.read

    def slow_read(spans: Any) -> list[int]:
        # While the read is under way: delete the object, and store all that fits.
        monkeypatch.setattr(transfer, "read", read)
        backend.delete([key_of(0)])
        assert isinstance(put(backend, 5000)[0], NoSpace)
        return read(spans)

    monkeypatch.setattr(transfer, "read", slow_read)
    assert read_version(backend, 0, buffer) == 1
    assert put(backend, 5000) == [None]
    assert read_version(backend, 0, buffer) is None
    assert backend.usage().objects == count  # type: ignore[union-attr]


def test_clear_while_reading_and_writing(
    store: Callable[..., DiskBackend], buffer: memoryview, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    backend = store(mode=mode)
    put(backend, 0)
    for name in ("read", "write"):
        work = getattr(transfer, name)

        def cleared(spans: Any, name: str = name, work: Callable[[Any], list[int]] = work) -> list[int]:
            monkeypatch.setattr(transfer, name, work)
            backend.clear()
            return work(spans)

        monkeypatch.setattr(transfer, name, cleared)
        if name == "read":
            assert read_version(backend, 0, buffer) == 1
        else:
            assert put(backend, 1) == [None]
        assert backend.contains([key_of(0), key_of(1)]) == [False, False]
    abandon(backend)
    assert list(store(mode=mode).scan()) == []


def test_one_call_moves_a_batch_and_nothing_is_synced(
    store: Callable[..., DiskBackend], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    calls: list[int] = []
    for name in ("pread_batch", "pwrite_batch"):
        native = getattr(_native, name)
        monkeypatch.setattr(_native, name, lambda *a, native=native: (calls.append(len(a[0])), native(*a))[1])
    for name in ("fsync", "fdatasync", "sync"):
        monkeypatch.setattr(os, name, lambda *_: pytest.fail("synced on the data path"))
    backend = store(mode=mode)
    numbers = range(8)
    assert put(backend, *numbers) == [None] * 8
    room = [aligned(SLOT) for _ in numbers]
    assert backend.get_into([key_of(n) for n in numbers], room) == [OBJECT] * 8
    assert calls == [8, 8]
    fill(backend, 100)
    backend.delete([key_of(n) for n in numbers])
    backend.close()


def test_without_the_native_library(
    store: Callable[..., DiskBackend], buffer: memoryview, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(_native, "_library", None)
    backend = store(mode=mode)
    assert put(backend, 1, 2) == [None, None]
    backend.close()
    assert read_version(store(mode=mode), 2, buffer) == 1


def test_misuse_is_refused(store: Callable[..., DiskBackend], buffer: memoryview, mode: str) -> None:
    backend = store(mode=mode)
    put(backend, 1)
    with pytest.raises(ValueError, match="not aligned"):
        backend.get_into([key_of(1)], [buffer[1 : 1 + SLOT]])
    with pytest.raises(ValueError, match="not aligned"):
        backend.put_from([key_of(2)], [buffer[1 : 1 + OBJECT]])
    [got] = backend.get_into([key_of(1)], [buffer[:PAGE]])
    assert isinstance(got, Exception)
    assert isinstance(backend.put_from([key_of(3)], [buffer[:0]])[0], ValueError)
    if mode == "segments":
        assert isinstance(put(backend, 4, nbytes=PAYLOAD + 1)[0], ValueError)
    assert fill(backend, 10) > 10, "nothing is leaked by what was refused"
    backend.close()
    assert isinstance(put(backend, 1)[0], Closed)
    assert isinstance(backend.get_into([key_of(1)], [buffer])[0], Closed)
    assert backend.contains([key_of(1)]) == [False]


# -- what a file system does -----------------------------------------------------------------------------------------
SYSCALLS = (
    *((os, name) for name in ("open", "pwrite", "preadv", "posix_fallocate", "ftruncate", "rename", "unlink", "mkdir")),
    *((os, name) for name in ("fstat", "stat", "listdir", "fstatvfs", "fsync", "scandir")),
    *((_native, name) for name in ("pread_batch", "pwrite_batch")),
)


CODES = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENOMEM, errno.ENOENT)


class Failing:
    """Lets the n-th call of `name` fail (of anything in `SYSCALLS` when empty); with `sticky`, all calls after it."""

    def __init__(self, nth: int, code: int, *, name: str = "", sticky: bool = False) -> None:
        self.left, self.code, self.name, self.sticky = nth, code, name, sticky
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Failing:
        for module, name in SYSCALLS:
            self.patch.setattr(module, name, self._wrapped(name, getattr(module, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()

    @property
    def happened(self) -> bool:
        """Whether the n-th call came."""
        return self.left <= 0

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            first = not self.happened and self.name in ("", name)
            self.left -= first
            if self.happened and (first or self.sticky):
                if name.endswith("_batch"):
                    return np.full(len(args[0]), -self.code)
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **kwargs)

        return call


def scripted_life(backend: DiskBackend) -> None:
    """Every kind of operation, with room running out; nothing may escape but what callers expect."""
    buffer = aligned(SLOT)
    for number in range(40):
        [result] = put(backend, number, nbytes=PAYLOAD if number % 3 else 2000)
        assert result is None or isinstance(result, NoSpace | OSError | BackendError), repr(result)
        got = read_version(backend, number, buffer)
        # A refused put may be served or not, but never be wrong; EIO and the like are reported.
        assert got in (None, 1) or isinstance(got, OSError | BackendError), repr(got)
        if number % 4 == 3:
            with contextlib.suppress(OSError, BackendError):
                backend.delete([key_of(number - 1), key_of(number - 2)])
    with contextlib.suppress(BackendError, OSError):
        backend.clear()
    for number in range(50, 56):
        put(backend, number)


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "for good"])
def test_the_nth_system_call_fails(tmp_path: Path, mode: str, sticky: bool) -> None:
    """Each system call, at the 1st, 4th and 20th time."""
    codes = itertools.cycle(CODES)
    options = {"segment_bytes": PAGE + 3 * SLOT} if mode == "segments" else {}
    buffer = aligned(SLOT)
    happened: set[str] = set()
    names = ["open", "rename", "unlink", "fstat", "stat", "fstatvfs", "fsync", "pread_batch", "pwrite_batch"]
    names += ["pwrite", "posix_fallocate"] if mode == "segments" else ["ftruncate", "mkdir", "listdir"]
    for name, nth in itertools.product(names, (1, 4, 20)):
        code = next(codes)
        if (code, name) == (errno.ENOENT, "unlink"):
            code = errno.EIO  # what is not there need not be removed
        path = tmp_path / "kv"
        backend = build(path, SMALL[mode], OBJECT, mode=mode, **options)
        with Failing(nth, code, name=name, sticky=sticky) as failing:
            scripted_life(backend)
        if failing.happened:
            happened.add(name)
        # The medium is well again: no restart is needed.
        backend.clear()
        assert put(backend, 1, 2, 3, version=9) == [None] * 3
        assert [read_version(backend, n, buffer) for n in (1, 2, 3)] == [9, 9, 9]
        usage = backend.usage()
        assert usage is not None
        assert usage.objects == 3
        assert usage.allocated_bytes == du(path) <= SMALL[mode], (name, nth, code)
        backend.close()
        backend = build(path, SMALL[mode], OBJECT, mode=mode, **options)
        assert [read_version(backend, n, buffer) for n in (1, 2, 3)] == [9, 9, 9]
        backend.close()
        shutil.rmtree(path)
    assert happened == set(names)


def test_bad_blocks_are_given_up_at_the_second_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the object would stay in the index, fail every read, and never be stored anew."""
    backend = build(tmp_path / "kv", CAPACITY, OBJECT)
    put(backend, 1, 2)
    real, bad = _native.pread_batch, [0]

    def pread(fds: Any, offsets: Any, addresses: Any, lengths: Any) -> Any:
        done = real(fds, offsets, addresses, lengths)
        done[[offset == bad[0] for offset in offsets]] = -errno.EIO
        return done

    monkeypatch.setattr(_native, "pread_batch", pread)
    bad[0] = PAGE  # the first slot
    buffers = [aligned(SLOT), aligned(SLOT)]
    keys = [key_of(1), key_of(2)]
    found = [backend.get_into(keys, buffers) for _ in range(2)]
    failed = [[type(got) for got in results] for results in found]
    assert set(failed[0]) == {OSError, int}, found[0]
    at = failed[0].index(OSError)
    assert failed[1][at] is CorruptChunk, found[1]
    backend.delete([keys[at]])  # what the core does with it
    bad[0] = -1
    assert put(backend, at + 1, version=2) == [None]
    assert read_version(backend, at + 1, aligned(SLOT)) == 2

    # A failure that goes away costs nothing.
    bad[0] = PAGE
    backend.get_into(keys, buffers)
    bad[0] = -1
    assert all(isinstance(got, int) for got in backend.get_into(keys, buffers))
    bad[0] = PAGE
    assert CorruptChunk not in [type(got) for got in backend.get_into(keys, buffers)]
    backend.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE])
def test_the_nth_system_call_of_the_start_fails(tmp_path: Path, mode: str, code: int) -> None:
    path = tmp_path / "kv"
    backend = build(path, CAPACITY, OBJECT, mode=mode)
    put(backend, 1, 2, 3)
    backend.close()
    messages: set[str] = set()
    for nth in range(1, 1000):
        with Failing(nth, code) as failing:
            try:
                backend = build(path, CAPACITY, OBJECT, mode=mode)
            except BackendUnavailable as error:
                messages.add(str(error))
                continue
        # What could not be removed or read is made up for, or was not needed.
        buffer = aligned(SLOT)
        # On a full disk a segment may be given up for the journal.
        found = [read_version(backend, n, buffer) for n in (1, 2, 3)]
        assert found == [1, 1, 1] or (code == errno.ENOSPC and found == [None] * 3), nth
        backend.close()
        if not failing.happened:
            break
    else:
        raise AssertionError("the start never ends")
    assert messages
    assert all(str(path) in message for message in messages), messages


@needs_mounts
@pytest.mark.parametrize("inodes", [0, 40])
def test_a_full_file_system(tmp_path: Path, buffer: memoryview, mode: str, inodes: int) -> None:
    """ENOSPC of bytes or inodes: soft, reads go on, evicting or somebody else's deletion helps."""
    with tmpfs(tmp_path / "t", 2 << 20, inodes) as where:
        (where / "other").write_bytes(bytes(600 << 10))
        backend = build(where / "kv", 8 << 20, OBJECT, mode=mode)
        count = fill(backend)
        assert count > (10 if inodes else 30)
        assert all(read_version(backend, n, buffer) == 1 for n in range(count))
        for victim in range(3):  # a file may need two directories
            backend.delete([key_of(victim)])
            if put(backend, 1000) == [None]:
                break
        assert read_version(backend, 1000, buffer) == 1
        assert isinstance([put(backend, n)[0] for n in range(1001, 1004)][-1], NoSpace)
        (where / "other").unlink()
        if not inodes:
            assert put(backend, 1001, 1002, 1003) == [None] * 3
        # A restart on a full disk loses nothing either.
        fill(backend, 2000)
        usage = backend.usage()
        backend.close()
        backend = build(where / "kv", 8 << 20, OBJECT, mode=mode)
        assert backend.usage() == usage
        assert read_version(backend, 1000, buffer) == 1
        backend.close()


@needs_mounts
@pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs"])
@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_file_systems_and_their_counts(tmp_path: Path, buffer: memoryview, mode: str, io: str, kind: str) -> None:
    capacity = 8 << 20
    with tmpfs(tmp_path / "t", 16 << 20) if kind == "tmpfs" else disk(tmp_path, kind) as where:
        path = where / "kv" if isinstance(where, Path) else where.store
        backend = build(path, capacity, OBJECT, mode=mode, io=io)
        rng, held = Random(1), list[int]()
        for number in range(700):
            while isinstance(put(backend, number)[0], NoSpace):
                backend.delete([key_of(held.pop(rng.randrange(len(held))))])
            held.append(number)
        for _ in range(2):
            usage = backend.usage()
            assert usage is not None
            assert usage.objects == len(held)
            assert usage.allocated_bytes == du(path) <= capacity
            subprocess.run(["sync", "-f", str(path)], check=True)  # delayed allocations are made now
        assert all(read_version(backend, n, buffer) == 1 for n in held)
        backend.close()


@needs_mounts
def test_direct_io_is_used_where_it_can_be(tmp_path: Path) -> None:
    with disk(tmp_path, "ext4", 64) as where:
        assert Folder(where.store).direct_flag("auto") == os.O_DIRECT
        assert Folder(where.store).direct_flag("direct") == os.O_DIRECT
        assert Folder(where.store).direct_flag("buffered") == 0


def test_refused_direct_io_falls_back_or_is_an_error(
    tmp_path: Path, store: Callable[..., DiskBackend], buffer: memoryview, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """As on overlays and some network file systems: `open` with O_DIRECT gives EINVAL."""
    real = os.open

    def refusing(name: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    backend = store(mode=mode)
    assert put(backend, 1) == [None]
    assert read_version(backend, 1, buffer) == 1
    backend.close()
    with pytest.raises(BackendUnavailable, match="io: auto"):
        store(mode=mode, io="direct")


def test_short_writes_and_file_size_limits(tmp_path: Path, store: Callable[..., DiskBackend], mode: str) -> None:
    """RLIMIT_FSIZE cuts a write short, then gives EFBIG (Python ignores SIGXFSZ)."""
    backend = store(mode=mode, segment_bytes=PAGE + 4 * SLOT) if mode == "segments" else store(mode=mode)
    assert put(backend, 1) == [None]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PAGE, hard))
        results = [put(backend, n)[0] for n in (2, 3, 4, 5, 6, 7)]
        assert all(isinstance(r, OSError) and r.errno == errno.EFBIG for r in results), results
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert put(backend, 2, 3, 4, 5, 6, 7) == [None] * 6
    buffer = aligned(SLOT)
    assert [read_version(backend, n, buffer) for n in range(1, 8)] == [1] * 7


def test_no_descriptors_left(tmp_path: Path, store: Callable[..., DiskBackend], buffer: memoryview, mode: str) -> None:
    backend = store(mode=mode)
    assert put(backend, 1) == [None]
    before = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    blockers = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 10, hard))
        with contextlib.suppress(OSError):
            while True:
                blockers.append(os.open("/dev/null", os.O_RDONLY))
        results = [put(backend, n)[0] for n in range(2, 40)]
        got = read_version(backend, 1, buffer)
    finally:
        for fd in blockers:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert any(isinstance(r, OSError) and r.errno == errno.EMFILE for r in results), results
    assert got == 1 if mode == "segments" else isinstance(got, OSError)
    assert put(backend, 50) == [None]
    assert read_version(backend, 50, buffer) == 1
    assert len(os.listdir("/proc/self/fd")) <= before + 30


@needs_mounts
def test_immutable_files_are_readable(tmp_path: Path, buffer: memoryview) -> None:
    """As on a file system that has become read-only: puts fail, reads go on, and it mends without a restart."""
    with disk(tmp_path, "ext4", 64) as where:
        backend = build(where.store, 8 << 20, OBJECT)
        put(backend, 1, 2, 3)
        names = [str(p) for p in where.store.iterdir()]
        subprocess.run(["chattr", "+i", *names, str(where.store)], check=True)
        try:
            assert isinstance(put(backend, 4)[0], OSError)
            backend.delete([key_of(2)])
            assert isinstance(put(backend, 5)[0], OSError)
            assert [read_version(backend, n, buffer) for n in (1, 2, 3)] == [1, None, 1]
            with pytest.raises(BackendError, match="not cleared"):
                backend.clear()
        finally:
            subprocess.run(["chattr", "-i", *names, str(where.store)], check=True)
        assert put(backend, 4) == [None]
        assert [read_version(backend, n, buffer) for n in (1, 3, 4)] == [1, 1, 1]
        backend.close()


@needs_mounts
def test_a_read_only_remount(tmp_path: Path, buffer: memoryview, mode: str) -> None:
    with disk(tmp_path, "ext4", 64, "errors=remount-ro") as where:
        backend = build(where.store, 8 << 20, OBJECT, mode=mode)
        put(backend, 1)
        where.sync()
        # An aborted log makes the file system read-only even while files are open.
        subprocess.run(["mount", "-o", "remount,abort", str(where.mnt)], check=True)
        results = put(backend, 2)
        assert isinstance(results[0], OSError), results
        assert read_version(backend, 1, buffer) == 1
        where.unmount(lazy=True)
        assert isinstance(put(backend, 2)[0], BackendUnavailable)  # lets go of the old mount
        del results
        where.mount()
        assert put(backend, 2) == [None]
        assert read_version(backend, 2, buffer) == 1
        backend.close()


@needs_mounts
def test_a_vanished_mount(tmp_path: Path, buffer: memoryview, mode: str) -> None:
    """Nothing is written below the mount point, and the store is back when the disk is."""
    with disk(tmp_path, "ext4", 64) as where:
        backend = build(where.store, 8 << 20, OBJECT, mode=mode)
        put(backend, 1)
        where.unmount(lazy=True)
        for attempt in range(2):
            assert isinstance(put(backend, 2)[0], BackendUnavailable), attempt
            assert isinstance(read_version(backend, 1, buffer), BackendUnavailable)
        assert backend.contains([key_of(1)]) == [False]
        where.store.mkdir(mode=0o700)  # somebody makes the directory on the parent file system
        assert isinstance(put(backend, 2)[0], BackendUnavailable)
        with pytest.raises(BackendUnavailable, match="another file system"):
            backend.clear()
        assert list(where.store.iterdir()) == []
        where.store.rmdir()
        where.mount()
        assert read_version(backend, 1, buffer) == 1
        assert put(backend, 2) == [None]
        assert backend.contains([key_of(1), key_of(2)]) == [True, True]
        backend.close()


def test_a_directory_deleted_or_replaced(
    store: Callable[..., DiskBackend], tmp_path: Path, buffer: memoryview, mode: str
) -> None:
    path = tmp_path / "kv"
    backend = store(mode=mode)
    put(backend, 1)
    path.rename(tmp_path / "elsewhere")
    assert isinstance(put(backend, 2)[0], BackendUnavailable)
    assert isinstance(read_version(backend, 1, buffer), BackendUnavailable)
    assert not path.exists()
    (tmp_path / "elsewhere").rename(path)
    assert read_version(backend, 1, buffer) == 1
    shutil.rmtree(path)
    with pytest.raises(BackendUnavailable, match="does not exist"):
        backend.delete([key_of(1)])
    path.mkdir(mode=0o700)
    assert put(backend, 3) == [None]
    assert [read_version(backend, n, buffer) for n in (1, 3)] == [None, 1]
    shutil.rmtree(path)
    path.symlink_to(tmp_path)
    assert isinstance(put(backend, 4)[0], BackendUnavailable)
    assert [p.name for p in tmp_path.iterdir()] == ["kv"]
    path.unlink()


def test_a_batch_that_outlives_its_volume_changes_nothing(
    store: Callable[..., DiskBackend], tmp_path: Path, buffer: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kv"
    backend = store()
    put(backend, 1)
    write = transfer.write

    def long_write(spans: Any) -> list[int]:
        monkeypatch.setattr(transfer, "write", write)
        path.rename(tmp_path / "elsewhere")
        assert isinstance(read_version(backend, 1, buffer), BackendUnavailable)
        (tmp_path / "elsewhere").rename(path)
        assert fill(backend, 100) > 10
        return write(spans)

    monkeypatch.setattr(transfer, "write", long_write)
    assert isinstance(put(backend, 2)[0], BackendUnavailable)
    assert read_version(backend, 2, buffer) is None
    stored = list(backend.scan())
    abandon(backend)
    backend = store()
    assert list(backend.scan()) == stored
    torn = [key for key, _ in stored if isinstance(backend.get_into([key], [buffer])[0], Exception)]
    assert torn == []


# -- safety ----------------------------------------------------------------------------------------------------------
def test_the_directory_is_private(store: Callable[..., DiskBackend], tmp_path: Path, mode: str) -> None:
    backend = store(tmp_path / "a" / "b", mode=mode)
    put(backend, 1)
    backend.clear()
    put(backend, 1)
    for path in [tmp_path / "a" / "b", *(tmp_path / "a" / "b").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("bits", [0o770, 0o707, 0o777, 0o1777])
def test_a_directory_that_others_may_write_is_refused(tmp_path: Path, mode: str, bits: int) -> None:
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv").chmod(bits)
    with pytest.raises(BackendUnavailable, match=r"chmod 700"):
        build(tmp_path / "kv", CAPACITY, OBJECT, mode=mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make another user's directory")
def test_the_directory_of_another_user_is_refused(tmp_path: Path, mode: str) -> None:
    (tmp_path / "kv").mkdir(mode=0o700)
    os.chown(tmp_path / "kv", 65534, 65534)
    with pytest.raises(BackendUnavailable, match=r"uid 65534.*chown"):
        build(tmp_path / "kv", CAPACITY, OBJECT, mode=mode)


def test_links_and_other_files_are_refused(tmp_path: Path, mode: str) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "kv").symlink_to(tmp_path / "real")
    with pytest.raises(BackendUnavailable, match="symbolic link"):
        build(tmp_path / "kv", CAPACITY, OBJECT, mode=mode)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BackendUnavailable, match="not a directory"):
        build(tmp_path / "file", CAPACITY, OBJECT, mode=mode)
    assert list((tmp_path / "real").iterdir()) == []


@pytest.mark.parametrize("name", ["segment-000000", "journal", "journal.tmp", "segment-000001"])
def test_planted_links_are_never_followed(
    store: Callable[..., DiskBackend], tmp_path: Path, buffer: memoryview, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    path = tmp_path / "kv"
    path.mkdir(mode=0o700)
    (path / name).symlink_to(victim)
    backend = store(segment_bytes=PAGE + 4 * SLOT)
    count = fill(backend)
    assert count > 20
    backend.clear()
    put(backend, 1)
    backend.close()
    assert read_version(store(), 1, buffer) == 1
    assert victim.read_bytes() == b"precious"


def test_a_planted_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir(mode=0o700)
    (tmp_path / "kv/lock").symlink_to(tmp_path / "victim")
    with pytest.raises(BackendUnavailable, match="lock"):
        build(tmp_path / "kv", CAPACITY, OBJECT)
    assert not (tmp_path / "victim").exists()


def test_planted_links_among_files_are_never_followed(
    store: Callable[..., DiskBackend], tmp_path: Path, buffer: memoryview
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    bait = victim / key_of(1).hex()
    obj = new_object(1, 1, PAYLOAD)
    bait.write_bytes(obj)
    leaf = tmp_path / "kv" / files._path(key_of(1))
    backend = store(mode="files")
    leaf.mkdir(parents=True)
    (leaf / bait.name).symlink_to(bait)
    got = read_version(backend, 1, buffer)
    assert isinstance(got, OSError)
    assert got.errno == errno.ELOOP
    assert put(backend, 1, version=2) == [None]  # the rename replaces the link itself
    assert bait.read_bytes() == bytes(obj)
    assert read_version(backend, 1, buffer) == 2
    shutil.rmtree(leaf)
    leaf.symlink_to(victim)
    assert isinstance(put(backend, 2, 1)[1], Exception | None)
    backend.delete([key_of(1)]) if read_version(backend, 1, buffer) is None else None
    assert sorted(p.name for p in victim.iterdir()) == [bait.name]
    assert bait.read_bytes() == bytes(obj)


# -- several processes -----------------------------------------------------------------------------------------------
def test_a_second_process_is_told_who_is_there(store: Callable[..., DiskBackend], tmp_path: Path) -> None:
    store()
    script = f"from faults.disk import *; build(Path({str(tmp_path / 'kv')!r}), {CAPACITY}, {OBJECT})"
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"in use by process {os.getpid()}" in done.stderr
    assert "mode: files" in done.stderr
    for backend in (store(tmp_path / "other"),):
        assert put(backend, 1) == [None]


def test_processes_share_files(store: Callable[..., DiskBackend], tmp_path: Path, buffer: memoryview) -> None:
    one, two = store(mode="files"), store(mode="files")
    put(one, 1)
    assert two.contains([key_of(1), key_of(2)]) == [True, False]
    assert read_version(two, 1, buffer) == 1
    put(two, 2)
    put(two, 1, version=2)  # known to be there: nothing changes
    assert read_version(one, 2, buffer) == 1  # without having been asked about
    assert read_version(one, 1, buffer) == 1
    two.delete([key_of(1)])
    assert one.contains([key_of(1)]) == [True]  # as it knows, until it looks
    assert read_version(one, 1, buffer) is None
    assert one.contains([key_of(1)]) == [False]
    assert two.usage() is not None
    assert two.usage().allocated_bytes == du(tmp_path / "kv")  # type: ignore[union-attr]
    one.clear()
    assert read_version(two, 2, buffer) is None
    assert put(two, 3) == [None]
    assert read_version(one, 3, buffer) == 1


def test_processes_write_and_clear_files_at_once(tmp_path: Path) -> None:
    """Four backends, one directory: what is read is genuine, and whoever starts next finds the books in order."""
    path = tmp_path / "kv"
    failures: list[BaseException] = []

    def live(seed: int) -> None:
        rng = Random(seed)
        try:
            backend = build(path, 2 * CAPACITY, OBJECT, mode="files")
            room = aligned(SLOT)
            for step in range(150):
                number = rng.randrange(12)
                draw = rng.random()
                if draw < 0.45:
                    put(backend, number, version=1000 * seed + step)
                elif draw < 0.6:
                    backend.delete([key_of(number)])
                elif draw < 0.62:
                    with contextlib.suppress(BackendError):  # another one clears at the same moment
                        backend.clear()
                else:
                    got = read_version(backend, number, room)
                    assert got is None or isinstance(got, int), repr(got)
            backend.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=live, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    backend = build(path, 2 * CAPACITY, OBJECT, mode="files")
    held = [n for n in range(12) if read_version(backend, n, aligned(SLOT)) is not None]
    usage = backend.usage()
    assert usage is not None
    assert (usage.objects, usage.allocated_bytes) == (len(held), du(path))
    backend.close()


def test_litter_of_the_dead_is_reaped_and_of_the_living_is_not(
    store: Callable[..., DiskBackend], tmp_path: Path
) -> None:
    path = tmp_path / "kv"
    store(mode="files")
    (path / "tmp" / "dead").write_bytes(bytes(100))
    (path / "trash-dead" / "3").mkdir(parents=True)
    (path / "trash-dead" / "3" / "x").write_bytes(bytes(100))
    alive = os.open(path / "tmp" / "alive", os.O_CREAT | os.O_RDWR)
    fcntl.flock(alive, fcntl.LOCK_EX)
    (path / "notes.txt").write_bytes(b"somebody's")
    store(mode="files")
    assert sorted(p.name for p in path.iterdir()) == ["notes.txt", "objects", "tmp"]
    assert [p.name for p in (path / "tmp").iterdir()] == ["alive"]
    os.close(alive)
    store(mode="files")
    assert list((path / "tmp").iterdir()) == []


def test_litter_among_segments_is_reaped(store: Callable[..., DiskBackend], tmp_path: Path, buffer: memoryview) -> None:
    path = tmp_path / "kv"
    backend = store()
    put(backend, 1)
    backend.close()
    for name in ("journal.tmp", "probe-0123456789abcdef.tmp", "segment-000007", "segment-000008", "notes.txt"):
        (path / name).write_bytes(bytes(PAGE))
    good = (path / "segment-000000").read_bytes()
    (path / "segment-000008").write_bytes(good)  # a copy under another number
    (path / "lock").write_bytes(b"999999\n")  # nobody holds it
    backend = store()
    assert sorted(p.name for p in path.iterdir()) == ["journal", "lock", "notes.txt", "segment-000000"]
    assert (path / "lock").read_text().strip() == str(os.getpid())
    assert read_version(backend, 1, buffer) == 1


@pytest.mark.parametrize("at", [0, 8, 16, 24, 32, PAGE - 1])
def test_a_damaged_superblock_gives_its_room_back(
    store: Callable[..., DiskBackend], tmp_path: Path, buffer: memoryview, at: int
) -> None:
    backend = store(segment_bytes=PAGE + 4 * SLOT)
    count = fill(backend)
    backend.close()
    with (tmp_path / "kv/segment-000001").open("r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    backend = store(segment_bytes=PAGE + 4 * SLOT)
    assert [read_version(backend, n, buffer) for n in range(count)].count(1) == count - 4
    assert fill(backend, 5000) == 4
    assert du(tmp_path / "kv") <= CAPACITY


def test_the_modes_do_not_mix(store: Callable[..., DiskBackend], tmp_path: Path) -> None:
    for first, second in (MODES, MODES[::-1]):
        backend = store(tmp_path / first, mode=first)
        put(backend, 1)
        backend.close()
        with pytest.raises(BackendUnavailable, match=f"holds a store of `mode: {first}`"):
            store(tmp_path / first, mode=second)


# -- configuration ---------------------------------------------------------------------------------------------------
def context(capacity: int | None) -> BuildContext:
    return BuildContext(tier="nvme", object_bytes=OBJECT, capacity=capacity, threads=2)


@pytest.mark.parametrize(
    "options,capacity,setting,fix",
    [
        ({}, None, "capacity", "capacity: 20GiB"),
        ({}, 50_000, "capacity", "at least"),
        ({"mode": "files"}, 1_000_000, "capacity", "at least"),
        ({"segment_bytes": 8192}, CAPACITY, "backend.segment_bytes", f"at least {PAGE + SLOT} bytes"),
    ],
)
def test_sizes_that_cannot_work_are_errors(
    tmp_path: Path, options: dict[str, object], capacity: int | None, setting: str, fix: str
) -> None:
    config = GdsConfig.model_validate({"path": tmp_path / "kv", **options})
    with pytest.raises(ConfigError) as caught:
        config.build(context(capacity))
    [problem] = caught.value.problems
    assert problem.path == f"tiers.nvme.{setting}"
    assert fix in problem.fix
    assert not (tmp_path / "kv").exists()
    least = [int(word) for word in problem.fix.replace(",", "").split() if word.isdigit()]
    if least and setting == "capacity":  # what it asks for is enough
        backend = config.build(context(least[0]))
        assert put(backend, 1) == [None]
        backend.close()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"mode": "files", "segment_bytes": "1GiB"}, "segment_bytes has no meaning"),
        ({"inodes": 1000}, "inodes has no meaning"),
        ({"mode": "slabs"}, "mode"),
        ({"io": "mmap"}, "io"),
        ({"free_floor": "120%"}, "at most 100%"),
        ({"threads": 4}, "threads"),
    ],
)
def test_options_that_make_no_sense_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GdsConfig.model_validate({"path": "/var/cache/kv", **options})


def test_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert GdsConfig(path=Path("~/kv")).path == tmp_path / "kv"
    assert GdsConfig(path=Path("kv/../kw")).path == tmp_path / "kw"
    assert GdsConfig(path=Path("kw")).local_directory() == tmp_path / "kw"


def test_only_what_answers_from_memory_says_so(store: Callable[..., DiskBackend], tmp_path: Path) -> None:
    assert store(tmp_path / "s").contains_is_local
    assert not store(tmp_path / "f", mode="files").contains_is_local
