"""One storage tier: capacity to the byte, eviction by depth, quarantine once, and a medium that misbehaves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from chunks import OBJECT, chunk, keys
from seeded_bugs.serdes import Correct

from lmcache_core import seal
from lmcache_core.doorway import Staging, staging_buffer_bytes
from lmcache_core.errors import BackendError, CorruptChunk, NoSpace
from lmcache_core.eviction.lru import Lru
from lmcache_core.lanes import Breaker
from lmcache_core.layout import KVLayout
from lmcache_core.protocols import Region, Serde, SerdeContext, StorageBackend
from lmcache_core.slots import Slots
from lmcache_core.testing.faults import FaultyBackend, Rates
from lmcache_core.testing.memory import DictBackend, aligned
from lmcache_core.tier import StorageTier
from lmcache_core.types import PAGE, ChunkKey, MissReason, Usage

pytestmark = pytest.mark.timeout(60)

SIZE = 1024


class Medium(DictBackend):
    """A dict that can be told to go wrong, and remembers how full it ever was."""

    def __init__(self, objects: dict[ChunkKey, bytes] | None = None, **options: Any) -> None:
        super().__init__({} if objects is None else objects, **options)
        self.peak = 0
        self.deleted: list[ChunkKey] = []
        self.before_put: Callable[[Sequence[ChunkKey]], None] = lambda _: None
        self.fail_delete = False

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Exception | None]:
        self.before_put(keys)
        results = super().put_from(keys, buffers)
        self.peak = max(self.peak, sum(map(len, self.objects.values())))
        return results

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        if self.fail_delete:
            raise OSError(30, "Read-only file system")
        self.deleted += keys
        super().delete(keys)


def slots_for(layout: KVLayout, count: int = 64) -> Slots:
    view = aligned(count * 2 * PAGE)
    return Slots(Region(0, len(view), view), layout.chunk_bytes, Lru())


@pytest.fixture
def make(layout: KVLayout) -> Iterator[Callable[..., StorageTier]]:
    made: list[StorageTier] = []

    def make(backend: StorageBackend, *, slots: Slots | None = None, serde: Serde | None = None, **options: Any) -> Any:
        options = {
            "write": "through", "promote": True, "capacity": None, "threads": 2, "queue": 8, "inflight": 1 << 20,
            "deadline": 30.0, "lookup_deadline": 15.0, "staging": None, **options,
        }  # fmt: skip
        slots = slots or slots_for(layout)
        built = StorageTier("store", backend, serde, Lru(), slots, layout.id, **options)
        made.append(built)
        return built

    yield make
    for built in made:
        built.check()
        assert built.close(10)


def put(tier: StorageTier, names: Sequence[ChunkKey], chain: Sequence[ChunkKey] = ()) -> list[MissReason | None]:
    """Write chunks through slots 0, 1, ..."""
    slots = tier._slots
    for slot, key in enumerate(names):
        slots.sealed[slot] = 0
        slots.payload(slot)[:] = chunk(key, SIZE)
    return tier.write(names, range(len(names)), chain=chain or names)


def get(tier: StorageTier, names: Sequence[ChunkKey]) -> list[MissReason | None]:
    """Read chunks into slots 32, 33, ... and check every byte of what arrived."""
    numbers = range(32, 32 + len(names))
    outcomes = tier.read(names, numbers)
    for key, slot, outcome in zip(names, numbers, outcomes, strict=True):
        assert outcome is not None or bytes(tier._slots.payload(slot)) == chunk(key, SIZE)
    return outcomes


# -- capacity ----------------------------------------------------------------------------------------------------
def test_capacity_is_kept_to_the_byte_at_every_moment(make: Callable[..., StorageTier]) -> None:
    medium = Medium()
    tier = make(medium, capacity=5 * OBJECT)
    for at in range(0, 40, 4):
        assert put(tier, keys(4, at)) == [None] * 4
        assert tier.used == sum(map(len, medium.objects.values()))
    assert medium.peak == tier.used == 5 * OBJECT
    tier.check()


def test_used_counts_what_the_medium_takes_not_what_it_is_given(make: Callable[..., StorageTier]) -> None:
    class Coarse(Medium):
        def footprint(self, nbytes: int) -> int:
            return -(-nbytes // 8192) * 8192 + 100

    tier = make(Coarse(), capacity=3 * 8292 + 8291)
    put(tier, keys(5))
    assert tier.used == 3 * 8292


def test_an_object_larger_than_the_tier_evicts_nothing(make: Callable[..., StorageTier]) -> None:
    class Growing(Medium):
        bytes_each = 0

        def footprint(self, nbytes: int) -> int:
            return nbytes + self.bytes_each

    medium = Growing()
    tier = make(medium, capacity=5 * OBJECT)
    put(tier, keys(3))
    medium.bytes_each = 5 * OBJECT
    assert put(tier, keys(1, 10)) == [MissReason.NO_ROOM]
    assert set(medium.objects) == set(keys(3)) and not medium.deleted


def test_writers_at_once_never_overdraw(make: Callable[..., StorageTier], layout: KVLayout) -> None:
    medium = Medium()
    slots = slots_for(layout, 256)
    tier = make(medium, slots=slots, capacity=6 * OBJECT + 17)
    barrier = threading.Barrier(4)
    medium.before_put = lambda _: threading.Event().wait(0.0005)  # type: ignore[assignment]

    def write(worker: int) -> None:
        barrier.wait()
        for round_ in range(15):
            names = keys(8, worker * 1000 + round_ * 8)
            numbers = range(worker * 8, worker * 8 + 8)
            for slot, key in zip(numbers, names, strict=True):
                slots.sealed[slot] = 0
                slots.payload(slot)[:] = chunk(key, SIZE)
            tier.write(names, numbers)

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert medium.peak <= 6 * OBJECT + 17
    assert tier.used == sum(map(len, medium.objects.values())) == 6 * OBJECT
    tier.check()


def test_a_smaller_tier_after_a_restart_sheds_its_coldest(make: Callable[..., StorageTier]) -> None:
    objects: dict[ChunkKey, bytes] = {}
    put(make(Medium(objects)), keys(6))
    medium = Medium(objects)  # scanned coldest first: keys 0, 1, ...
    tier = make(medium, capacity=4 * OBJECT)
    assert tier.counts["recovered"] == 6 and tier.used == 4 * OBJECT
    assert set(objects) == set(keys(6)[2:])
    assert get(tier, keys(6)[2:]) == [None] * 4


# -- eviction ----------------------------------------------------------------------------------------------------
def test_the_deepest_chunk_of_the_coldest_prefix_goes_first(make: Callable[..., StorageTier]) -> None:
    medium = Medium()
    tier = make(medium, capacity=8 * OBJECT)
    first, second = keys(4), keys(4, 100)
    put(tier, first)
    put(tier, second)
    tier.touch(first)
    put(tier, keys(2, 200))
    assert medium.deleted == [second[3], second[2]]


def test_a_prefix_written_piece_by_piece_keeps_its_beginning(make: Callable[..., StorageTier]) -> None:
    """Later pieces are deeper: without the chain the first piece would be the coldest, and the rest useless."""
    medium = Medium()
    tier = make(medium, capacity=8 * OBJECT)
    whole = keys(8)
    for at in range(0, 8, 2):
        put(tier, whole[at : at + 2], chain=whole[: at + 2])
    put(tier, keys(3, 100))
    assert medium.deleted == whole[:4:-1]
    assert tier.present(whole) == [True] * 5 + [False] * 3


def test_no_space_evicts_a_little_more_and_tries_again(make: Callable[..., StorageTier]) -> None:
    """The medium is smaller than the operator said."""
    medium = Medium(capacity=3 * OBJECT)
    tier = make(medium, capacity=100 * OBJECT)
    assert put(tier, keys(3)) == [None] * 3
    assert put(tier, keys(1, 10)) == [None]
    assert set(medium.objects) == {*keys(2), *keys(1, 10)} and tier.used == 3 * OBJECT
    more = keys(4, 20)
    assert put(tier, more) == [None] * 3 + [MissReason.NO_ROOM], "a prefix never evicts its own beginning"
    assert set(medium.objects) == set(more[:3])
    tier.check()


@pytest.mark.parametrize("room", [1, 7, 8, 9])
@pytest.mark.parametrize("pieces", [1, 6])
def test_a_prefix_longer_than_the_tier_keeps_its_beginning(
    make: Callable[..., StorageTier], pieces: int, room: int
) -> None:
    medium = Medium()
    tier = make(medium, capacity=room * OBJECT)
    put(tier, keys(8, 100))
    whole = keys(12)
    outcomes: list[MissReason | None] = []
    for at in range(0, 12, 12 // pieces):
        outcomes += put(tier, whole[at : at + 12 // pieces], chain=whole[: at + 12 // pieces])
    assert outcomes == [None] * room + [MissReason.NO_ROOM] * (12 - room)
    assert set(medium.objects) == set(whole[:room]) and medium.peak == room * OBJECT


def test_no_space_with_nothing_to_evict_is_no_room(make: Callable[..., StorageTier]) -> None:
    tier = make(Medium(capacity=OBJECT - 1))
    assert put(tier, keys(2)) == [MissReason.NO_ROOM] * 2
    raising = Medium()
    raising.before_put = _raise(NoSpace("full"))
    tier = make(raising)
    assert put(tier, keys(2)) == [MissReason.NO_ROOM] * 2
    tier = make(Medium(capacity=OBJECT - 1, scannable=False))
    assert put(tier, keys(2)) == [MissReason.NO_ROOM] * 2


def _raise(error: BaseException) -> Callable[[Sequence[ChunkKey]], None]:
    def fail(_: Sequence[ChunkKey]) -> None:
        raise error

    return fail


def test_what_cannot_be_deleted_stays_in_the_books(make: Callable[..., StorageTier]) -> None:
    """A medium that refuses to delete is full as before: nothing is put beyond its capacity, and it recovers."""
    medium = Medium()
    tier = make(medium, capacity=4 * OBJECT)
    put(tier, keys(4))
    medium.fail_delete = True
    for at in range(10, 30):
        assert put(tier, keys(1, at))[0] in (MissReason.ERROR, MissReason.NO_ROOM)
    assert medium.peak == 4 * OBJECT and len(medium.objects) == 4
    medium.fail_delete = False
    assert [put(tier, keys(1, at))[0] for at in range(30, 36)][-4:] == [None] * 4
    assert medium.peak == 4 * OBJECT and tier.used == 4 * OBJECT
    tier.check()


def test_a_chunk_being_deleted_is_not_written_meanwhile(make: Callable[..., StorageTier]) -> None:
    """Else the delete, coming second, would take the new object and leave its entry."""
    medium = Medium()
    tier = make(medium)
    put(tier, keys(2))
    outcomes: list[MissReason | None] = []
    delete = medium.delete

    def slowly(names: Sequence[ChunkKey]) -> None:
        outcomes.extend(put(tier, keys(1)))
        delete(names)

    medium.delete = slowly  # type: ignore[method-assign]
    assert tier.forget(keys(1)) == 1
    assert outcomes == [MissReason.RACED]
    assert tier.present(keys(2)) == [False, True] and set(medium.objects) == set(keys(2)[1:])


def swept(tier: StorageTier) -> None:
    """Let the tier do in the background what an engine's next call would let it do."""
    tier.sweep()
    assert tier.drain(10)


def test_what_could_not_be_deleted_is_tried_again_without_an_eviction(make: Callable[..., StorageTier]) -> None:
    """Nothing else is ever deleted from a tier that is not full: its chunk must be storable again all the same."""
    medium = Medium()
    tier = make(medium)
    put(tier, keys(2))
    flip(medium.objects, keys(1)[0], 5000)
    medium.fail_delete = True
    assert get(tier, keys(1)) == [MissReason.CORRUPT]
    swept(tier)
    assert put(tier, keys(1)) == [MissReason.RACED] and tier.owes(keys(2)) and tier.stats()["undeleted"] == 1
    medium.fail_delete = False
    swept(tier)
    assert not tier.owes(keys(2)) and set(medium.objects) == {keys(2)[1]}
    assert put(tier, keys(1)) == [None] and get(tier, keys(2)) == [None, None]


@pytest.mark.parametrize("raises", [True, False])
def test_a_put_whose_answer_and_deletion_were_lost_leaves_nothing_outside_the_books(
    make: Callable[..., StorageTier], raises: bool
) -> None:
    class Mute(Medium):
        mute = True

        def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Exception | None]:
            results = super().put_from(keys, buffers)
            if not self.mute:
                return results
            if raises:
                raise OSError(5, "no answer")
            return [OSError(5, "no answer")] * len(keys)

    medium = Mute()
    tier = make(medium, capacity=4 * OBJECT)
    medium.fail_delete = True
    assert put(tier, keys(3)) == [MissReason.ERROR] * 3
    medium.mute = False
    assert put(tier, keys(3, 10)) == [None] + [MissReason.NO_ROOM] * 2, "their bytes are not given to others"
    assert medium.peak == 4 * OBJECT
    medium.fail_delete = False
    swept(tier)
    assert set(medium.objects) == set(keys(1, 10)) and put(tier, keys(3)) == [None] * 3


def test_without_an_index_an_answer_that_was_lost_leaves_a_chunk_that_is_served(
    make: Callable[..., StorageTier],
) -> None:
    class Mute(Medium):
        def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Exception | None]:
            super().put_from(keys, buffers)
            raise OSError(5, "no answer")

    tier = make(Mute(scannable=False, local=True))
    assert put(tier, keys(2)) == [MissReason.ERROR] * 2
    assert tier.present(keys(3)) == [True, True, False] and get(tier, keys(2)) == [None, None]


def test_without_an_index_a_damaged_object_that_cannot_be_deleted_counts_as_absent(
    make: Callable[..., StorageTier],
) -> None:
    medium = Medium(scannable=False, local=True)
    tier = make(medium)
    put(tier, keys(2))
    flip(medium.objects, keys(1)[0], 5000)
    medium.fail_delete = True
    assert get(tier, keys(1)) == [MissReason.CORRUPT]
    assert tier.present(keys(2)) == [False, True], "it is not looked at again"
    assert put(tier, keys(1)) == [None], "a put replaces it"
    medium.fail_delete = False
    swept(tier)
    assert tier.present(keys(2)) == [True, True] and get(tier, keys(2)) == [None, None]
    flip(medium.objects, keys(1)[0], 5000)
    medium.fail_delete = True
    assert get(tier, keys(1)) == [MissReason.CORRUPT]
    medium.fail_delete = False
    swept(tier)
    assert set(medium.objects) == {keys(2)[1]}


def test_what_a_clear_could_not_delete_is_not_served(make: Callable[..., StorageTier]) -> None:
    medium = Medium(scannable=False, local=True)
    tier = make(medium)

    def clear(_: Sequence[ChunkKey]) -> None:
        tier.begin_wipe()
        tier.wipe()
        medium.fail_delete = True

    medium.before_put = clear
    put(tier, keys(2))
    assert set(medium.objects) == set(keys(2)), "it came after the medium was cleared"
    assert tier.present(keys(2)) == [False, False]
    medium.fail_delete = False
    swept(tier)
    assert not medium.objects


def test_what_is_remembered_of_deletions_is_bounded(
    make: Callable[..., StorageTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_core.books.MOST_TOMBSTONES", 3)
    medium = Medium(scannable=False, local=True)
    tier = make(medium)
    put(tier, keys(8))
    medium.fail_delete = True
    tier.forget(keys(8))
    assert tier.present(keys(8)) == [True] * 5 + [False] * 3
    tier.books.check("store")


def test_deletions_that_keep_failing_are_tried_less_and_less(make: Callable[..., StorageTier]) -> None:
    medium = Medium()
    tier = make(medium)
    put(tier, keys(1))
    medium.fail_delete = True
    tier.forget(keys(1))
    for _ in range(50):
        swept(tier)
    assert tier.counts["delete_errors"] == 1 + Breaker.ERRORS_IN_A_ROW
    assert not tier.write_lane.breaker.open, "what can be written is still written"
    assert put(tier, keys(1, 5)) == [None]


# -- writing -----------------------------------------------------------------------------------------------------
def test_a_put_that_fails_for_some_stores_the_others(make: Callable[..., StorageTier]) -> None:
    class Picky(Medium):
        def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Exception | None]:
            results = super().put_from(keys[1::2], buffers[1::2])
            return [OSError(5, "no") if i % 2 == 0 else results[i // 2] for i in range(len(keys))]

    tier = make(Picky())
    assert put(tier, keys(4)) == [MissReason.ERROR, None, MissReason.ERROR, None]
    assert tier.present(keys(4)) == [False, True, False, True]
    assert tier.counts["put_errors"] == 2 and "OSError" in tier.last_error
    assert get(tier, keys(4)[1::2]) == [None, None]


def test_a_put_that_raises_half_way_leaves_nothing_outside_the_books(make: Callable[..., StorageTier]) -> None:
    class Dying(Medium):
        def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Exception | None]:
            super().put_from(keys[:2], buffers[:2])
            raise OSError(5, "died")

    medium = Dying()
    tier = make(medium, capacity=100 * OBJECT)
    assert put(tier, keys(4)) == [MissReason.ERROR] * 4
    assert not medium.objects and tier.used == 0
    assert tier.counts["put_errors"] == 1


def test_a_chunk_that_cannot_be_encoded_keeps_no_other_out(make: Callable[..., StorageTier], layout: KVLayout) -> None:
    """One NaN is enough for some serdes. The chunks that were encoded with it are stored."""
    names = keys(5)

    class Picky(Correct):
        refused = chunk(names[3], SIZE)

        def encode_one(self, chunk: bytes, room: memoryview) -> int:
            if chunk == self.refused:
                raise ValueError("not a number")
            return super().encode_one(chunk, room)

    serde = Picky(SerdeContext(layout, layout.chunk_bytes))
    nbytes = staging_buffer_bytes(serde)
    view = aligned(8 * nbytes)
    tier = make(Medium(), serde=serde, staging=Staging(Region(0, len(view), view), nbytes, threads=2))
    left = names[:3] + names[4:]
    for count in (1, 2):
        assert put(tier, names) == [None, None, None, MissReason.ERROR, None]
        assert tier.present(names) == [True, True, True, False, True]
        assert tier.counts["encode_errors"] == count and "not a number" in tier.last_error
    assert get(tier, left) == [None] * 4
    Picky.refused = b""
    assert put(tier, names) == [None] * 5
    assert get(tier, names) == [None] * 5


def test_keys_already_stored_are_left_alone(make: Callable[..., StorageTier]) -> None:
    medium = Medium()
    tier = make(medium)
    put(tier, keys(2))
    seen: list[ChunkKey] = []
    medium.before_put = seen.extend
    assert put(tier, keys(3)) == [None] * 3
    assert seen == keys(3)[2:]


def test_two_writers_of_one_key_put_it_once(make: Callable[..., StorageTier]) -> None:
    medium = Medium()
    tier = make(medium)
    inner: list[MissReason | None] = []
    calls: list[ChunkKey] = []

    def meanwhile(names: Sequence[ChunkKey]) -> None:
        calls.extend(names)
        if len(calls) == 1:
            inner.extend(put(tier, keys(1)))

    medium.before_put = meanwhile
    assert put(tier, keys(1)) == [None]
    assert inner == [None] and calls == keys(1)


def test_a_serde_takes_its_share_of_staging_only() -> None:
    staging = Staging(Region(0, 8 * PAGE, aligned(8 * PAGE)), PAGE, threads=4)
    taken = [staging.take(100) for _ in range(4)]
    assert [len(buffers) for buffers in taken] == [2, 2, 2, 2]
    assert len({buffer.obj for buffers in taken for buffer in buffers}) == 1
    for buffers in taken:
        staging.give_back(buffers)
    assert len(staging.take(1)) == 1


# -- reading -----------------------------------------------------------------------------------------------------
def test_absent_when_read_though_located_is_a_race(make: Callable[..., StorageTier]) -> None:
    medium = Medium()
    tier = make(medium)
    put(tier, keys(2))
    del medium.objects[keys(2)[0]]
    assert get(tier, keys(2)) == [MissReason.RACED, None]
    assert tier.present(keys(2)) == [False, True] and tier.used == OBJECT


def flip(objects: dict[ChunkKey, bytes], key: ChunkKey, at: int) -> None:
    obj = bytearray(objects[key])
    obj[at] ^= 1
    objects[key] = bytes(obj)


@pytest.mark.parametrize("scannable", [True, False])
def test_a_corrupt_object_is_quarantined_once(make: Callable[..., StorageTier], scannable: bool) -> None:
    medium = Medium(scannable=scannable)
    tier = make(medium)
    put(tier, keys(2))
    flip(medium.objects, keys(1)[0], 5000)
    assert get(tier, keys(2)) == [MissReason.CORRUPT, None]
    assert keys(1)[0] not in medium.objects and medium.deleted == keys(1)
    assert get(tier, keys(1)) == [MissReason.RACED]
    assert tier.counts["quarantined"] == tier.counts["quarantined_corrupt"] == 1


@pytest.mark.parametrize("scannable", [True, False])
def test_two_readers_of_a_corrupt_object_quarantine_it_once(make: Callable[..., StorageTier], scannable: bool) -> None:
    medium = Medium(scannable=scannable)
    tier = make(medium)
    put(tier, keys(1))
    flip(medium.objects, keys(1)[0], 5000)
    delete, inner = medium.delete, []

    def while_another_reads(names: Sequence[ChunkKey]) -> None:
        if not inner:
            inner.append(tier.read(keys(1), [40])[0])
        delete(names)

    medium.delete = while_another_reads  # type: ignore[method-assign]
    assert get(tier, keys(1)) == [MissReason.CORRUPT]
    assert inner == [MissReason.CORRUPT] and tier.counts["quarantined"] == 1 and medium.deleted == keys(1)


def test_every_reason_of_the_seal_is_counted_by_name(make: Callable[..., StorageTier], layout: KVLayout) -> None:
    medium = Medium()
    tier = make(medium)
    names = keys(6)
    put(tier, names)

    def forge(name: ChunkKey, **changes: Any) -> None:
        fields = {"key": name, "layout_id": layout.id, "codec": seal.RAW_CODEC, "raw_bytes": SIZE, **changes}
        obj = aligned(2 * PAGE)[:OBJECT]
        seal.seal(obj, stored_bytes=SIZE, created=1, **fields)
        medium.objects[name] = bytes(obj)

    forge(names[0], key=names[1])
    forge(names[1], key=ChunkKey(b"another-identity" + names[1][16:]))
    forge(names[2], layout_id=bytes(16))
    forge(names[3], codec="zip/9")
    forge(names[4], raw_bytes=SIZE + 1)
    medium.objects[names[5]] = medium.objects[names[5]][:-1]
    expected = [MissReason.CORRUPT, MissReason.IDENTITY, MissReason.LAYOUT, MissReason.CODEC] + [MissReason.CORRUPT] * 2
    assert get(tier, names) == expected
    assert tier.counts["quarantined"] == 6 and not medium.objects
    for reason in set(expected):
        assert reason is not None and tier.counts[f"quarantined_{reason}"] == expected.count(reason)


def test_a_reason_nobody_knows_is_corrupt(make: Callable[..., StorageTier]) -> None:
    class Inventive(Medium):
        def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Any]:
            return [CorruptChunk(f"moon phase {i}") for i in range(len(keys))]

    tier = make(Inventive())
    put(tier, keys(3))
    assert get(tier, keys(3)) == [MissReason.CORRUPT] * 3
    assert {name for name in tier.counts if "moon" in name} == set()


def test_messages_are_bounded(make: Callable[..., StorageTier]) -> None:
    medium = Medium()
    medium.before_put = _raise(OSError("x" * 100_000))
    tier = make(medium)
    put(tier, keys(1))
    assert 0 < len(tier.last_error) <= 500


@pytest.mark.parametrize("before", ["", "x" * 444 + " "])
def test_the_last_error_hides_what_urls_hold(make: Callable[..., StorageTier], before: str) -> None:
    medium = Medium()
    medium.before_put = _raise(
        OSError(f"{before}cannot reach redis://user:hunter2-and-more@host:6379/0?token=hunter2-and-more")
    )
    tier = make(medium)
    put(tier, keys(1))
    assert "OSError" in tier.stats()["last_error"]
    assert "hunter" not in str(tier.stats())


def test_a_medium_that_fails_to_answer_lookups_is_paused_for_reads_only_by_its_own_breaker(
    make: Callable[..., StorageTier],
) -> None:
    class Forgetful(Medium):
        def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
            raise OSError(5, "no")

    tier = make(Forgetful(scannable=False, local=True))
    answers = [tier.present(keys(1)) for _ in range(6)]
    assert answers == [MissReason.ERROR] * 5 + [MissReason.BREAKER]
    assert tier.ask_breaker.open and not tier.read_lane.breaker.open and not tier.write_lane.breaker.open
    assert tier.stats()["read_paused"] and not tier.stats()["write_paused"]


# -- clearing ----------------------------------------------------------------------------------------------------
def test_a_clear_forgets_what_is_being_written(make: Callable[..., StorageTier]) -> None:
    medium = Medium()
    tier = make(medium)
    put(tier, keys(1, 50))

    def clear(_: Sequence[ChunkKey]) -> None:
        medium.before_put = lambda _: None
        tier.begin_wipe()
        assert tier.present(keys(1, 50)) == [False] and put(tier, keys(1, 60)) == [MissReason.RACED]
        tier.wipe()

    medium.before_put = clear
    put(tier, keys(2))
    assert not medium.objects and tier.used == 0 and tier.present(keys(2)) == [False, False]
    assert put(tier, keys(2)) == [None, None], "afterwards it works"


def test_work_asked_for_before_a_clear_is_void(make: Callable[..., StorageTier]) -> None:
    tier = make(Medium())
    epoch = tier.epoch
    tier.begin_wipe()
    tier.wipe()
    assert tier.write(keys(1), [0], epoch) == [MissReason.RACED]
    assert tier.write(keys(1), [0], tier.epoch) == [None]


def test_a_failed_clear_keeps_the_tier_out_of_service(make: Callable[..., StorageTier]) -> None:
    medium = FaultyBackend(Medium(), Rates(), 0)
    tier = make(medium)
    put(tier, keys(2))
    medium.fail["clear"] = OSError(5, "no")
    tier.begin_wipe()
    tier.wipe()
    assert tier.wiping and tier.stats()["wiping"] and tier.present(keys(2)) == [False, False]
    assert put(tier, keys(1)) == [MissReason.RACED]
    medium.fail.clear()
    tier.wipe()
    assert not tier.wiping and put(tier, keys(1)) == [None]


def test_two_clears_at_once(make: Callable[..., StorageTier]) -> None:
    medium = FaultyBackend(Medium(), Rates(), 0)
    tier = make(medium)
    put(tier, keys(2))
    medium.hold("clear")
    tier.begin_wipe()
    first = threading.Thread(target=tier.wipe)
    first.start()
    medium.wait_held()
    tier.begin_wipe()
    second = threading.Thread(target=tier.wipe)
    second.start()
    medium.release()
    first.join()
    second.join()
    assert not tier.wiping and put(tier, keys(2)) == [None, None]


# -- life --------------------------------------------------------------------------------------------------------
def lane_threads() -> int:
    return sum(thread.name.startswith("lmcache-") for thread in threading.enumerate())


@pytest.mark.parametrize("method", ["scan", "footprint"])
def test_a_medium_that_cannot_be_scanned_leaves_no_thread(
    make: Callable[..., StorageTier], layout: KVLayout, method: str
) -> None:
    objects: dict[ChunkKey, bytes] = {}
    put(make(Medium(objects)), keys(1))
    medium = FaultyBackend(Medium(objects), Rates(), 0)
    medium.fail[method] = RuntimeError("broken medium")
    before = lane_threads()
    with pytest.raises(RuntimeError, match="broken medium"):
        make(medium)
    assert lane_threads() == before


def test_close_waits_for_a_hung_medium_no_longer_than_told(make: Callable[..., StorageTier], layout: KVLayout) -> None:
    medium = FaultyBackend(Medium(), Rates(), 0)
    tier = make(medium)
    medium.hold("get_into")
    tier.read_lane.submit(lambda: tier.read(keys(1), [1])[0], lambda _: None, 1)
    medium.wait_held()
    closed: list[str] = []
    medium.inner.close = lambda: closed.append("closed")  # type: ignore[method-assign]
    assert not tier.close(0.05) and not closed, "a thread is inside the backend: it must not be closed under it"
    medium.release()
    assert tier.close(10) and closed == ["closed"]


def test_errors_of_usage_and_close_are_counted(make: Callable[..., StorageTier]) -> None:
    medium = FaultyBackend(Medium(), Rates(), 0)
    tier = make(medium)
    assert tier.stats()["objects"] == 0
    medium.fail["usage"] = medium.fail["close"] = RuntimeError("no")
    assert tier.stats()["objects"] is None and tier.counts["usage_errors"] == 1
    assert tier.close(10) and tier.counts["close_errors"] == 1
    medium.fail.clear()
    medium.forge["usage"] = lambda _: Usage(3, 5, 7)
    assert tier.stats()["allocated_bytes"] == 7


def test_check_finds_books_that_do_not_add_up(layout: KVLayout) -> None:
    for message, damage in {
        "bytes in the books": lambda t: setattr(t.books, "used", t.used + 1),
        "policy and index disagree": lambda t: t.policy.remove(keys(1)[0]),
        "set aside": lambda t: setattr(t.books, "held", 1),
        "over its capacity": lambda t: setattr(t.books, "capacity", 1),
        "still being written": lambda t: t._writing.add(keys(1)[0]),
        "without an end": lambda t: t.books.deleting.update({keys(1)[0]: 0}),
        "raised": lambda t: setattr(t.read_lane, "defects", 1),
    }.items():
        tier = StorageTier(
            "store", Medium(), None, Lru(), slots_for(layout), layout.id, write="through", promote=True,
            capacity=9 * OBJECT, threads=1, queue=1, inflight=1, deadline=1.0, lookup_deadline=0.5, staging=None,
        )  # fmt: skip
        put(tier, keys(2))
        tier.check()
        damage(tier)
        with pytest.raises(AssertionError, match=message):
            tier.check()
        tier.close(10)


def test_results_for_other_than_every_key_are_an_error(make: Callable[..., StorageTier]) -> None:
    class Short(Medium):
        def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Any]:
            return super().get_into(keys, buffers)[:-1]

    tier = make(Short())
    put(tier, keys(3))
    assert get(tier, keys(3)) == [MissReason.ERROR] * 3
    assert BackendError.__name__ in tier.last_error and "2 results for 3 keys" in tier.last_error


def test_one_object_that_cannot_be_deleted_does_not_stop_eviction(make: Callable[..., Any]) -> None:
    """A file on a bad directory block, an object under retention: all others can still be evicted."""

    class Sticky(Medium):
        stuck: ChunkKey | None = None

        def delete(self, keys: Sequence[ChunkKey]) -> None:
            for key in keys:
                if key == self.stuck:
                    raise OSError(5, "bad block")
                super().delete([key])

    medium = Sticky()
    tier = make(medium, capacity=8 * OBJECT)
    assert put(tier, keys(8)) == [None] * 8
    medium.stuck = keys(8)[7]  # the coldest
    for at in range(100, 120):
        put(tier, keys(1, at))
        swept(tier)
    stored = [put(tier, keys(1, at))[0] for at in range(200, 210)]
    left = len(tier.books.index), len(tier.books.undeleted)
    medium.stuck = None
    tier._delete_breaker._until = 0.0
    swept(tier)
    assert stored == [None] * 10, (stored, left)
    assert left == (7, 1)
    assert medium.peak <= 8 * OBJECT


def test_what_is_being_deleted_again_is_not_served(make: Callable[..., Any]) -> None:
    medium = Medium(scannable=False, local=True)
    tier = make(medium)

    def clear(_: Sequence[ChunkKey]) -> None:
        tier.begin_wipe()
        tier.wipe()
        medium.fail_delete = True

    medium.before_put = clear
    put(tier, keys(2))  # reached the medium after it was cleared
    assert tier.present(keys(2)) == [False, False]
    medium.fail_delete = False
    seen: list[Any] = []
    delete = medium.delete

    def slowly(names: Sequence[ChunkKey]) -> None:
        seen.append(tier.present(keys(2)))
        delete(names)

    medium.delete = slowly  # type: ignore[method-assign]
    swept(tier)
    assert seen == [[False, False]]


@pytest.mark.parametrize("refuses", [True, False])
def test_a_clear_during_a_put_that_fails_leaks_no_room(make: Callable[..., Any], refuses: bool) -> None:
    """The disk goes away, the operator clears the tier, the disk comes back: all its room is there again."""

    class Gone(Medium):
        gone = False

        def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Exception | None]:
            if not self.gone:
                return super().put_from(keys, buffers)
            tier.begin_wipe()
            return [OSError(5, "gone")] * len(keys)

        def delete(self, keys: Sequence[ChunkKey]) -> None:
            if self.gone and not refuses and len(self.refusals) == 1:
                self.gone = False
            self.refusals.append(self.gone)
            if self.gone:
                raise OSError(5, "gone")
            super().delete(keys)

    medium = Gone()
    medium.refusals = []
    tier = make(medium, capacity=4 * OBJECT)
    medium.gone = True
    assert put(tier, keys(2)) == [MissReason.ERROR] * 2
    medium.gone = False
    tier.wipe()
    assert not tier.wiping
    swept(tier)
    assert (tier.books.held, tier.books.undeleted, tier.books.deleting) == (0, {}, {})
    assert put(tier, keys(4, 50)) == [None] * 4


def test_keys_given_twice_are_deleted_once(make: Callable[..., Any]) -> None:
    tier = make(Medium(), capacity=8 * OBJECT)
    put(tier, keys(3))
    assert tier.forget([*keys(2), *keys(2)]) == 2
    tier.check()
