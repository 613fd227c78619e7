"""The contract of `StorageBackend` as tests. A plugin's author subclasses it and gives it one fixture:

    class TestMyBackend(StorageBackendTests):
        @pytest.fixture
        def open_backend(self, tmp_path):
            return lambda context: MyConfig(path=tmp_path).build(context)

`open_backend(context)` opens a backend over one and the same medium each time it is called in a test.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from random import Random

from lmcache_core.errors import NoSpace
from lmcache_core.protocols import BuildContext, StorageBackend
from lmcache_core.seal import RAW_CODEC, seal
from lmcache_core.testing.memory import aligned
from lmcache_core.types import HEADER_BYTES, PAGE, ChunkKey, object_bytes, round_up

OpenBackend = Callable[[BuildContext], StorageBackend]

POISON = 0xDB
LAYOUT_ID = b"conformance-kit!"


def key_of(number: int) -> ChunkKey:
    """A key like real ones: an identity, then a digest."""
    return ChunkKey(b"conformance-kit:" + Random(number).randbytes(16))


def new_object(key: ChunkKey, nbytes: int, seed: int = 0) -> memoryview:
    """A sealed object of `nbytes` bytes in all, page-aligned as the core's are."""
    obj = aligned(nbytes, POISON)
    obj[HEADER_BYTES:] = Random(key + bytes([seed])).randbytes(nbytes - HEADER_BYTES)
    seal(obj, key, LAYOUT_ID, RAW_CODEC, nbytes - HEADER_BYTES, nbytes - HEADER_BYTES, 0)
    return obj


class StorageBackendTests:
    """Run by pytest in subclasses that give `open_backend`. Attributes are limits that a subclass may change."""

    payload_bytes = 16 << 10
    """Largest payload of the tests."""
    capacity = 8 << 20
    """Bytes the backend is given; room for at least 100 objects."""
    threads = 4

    # -- tools -----------------------------------------------------------------------------------------------
    @contextmanager
    def backend(self, open_backend: OpenBackend) -> Iterator[StorageBackend]:
        """An open backend, closed in the end."""
        largest = object_bytes(self.payload_bytes)
        backend = open_backend(BuildContext("conformance", largest, self.capacity, self.threads))
        try:
            yield backend
        finally:
            backend.close()

    def get(self, backend: StorageBackend, keys: Sequence[ChunkKey]) -> list[bytes | None]:
        """Read keys into poisoned buffers; check that nothing is written beyond the last page of an object."""
        buffers = [aligned(round_up(object_bytes(self.payload_bytes)) + PAGE, POISON) for _ in keys]
        results = backend.get_into(keys, buffers)
        assert len(results) == len(keys), f"{len(results)} results for {len(keys)} keys"
        found: list[bytes | None] = []
        for buffer, got in zip(buffers, results, strict=True):
            if isinstance(got, Exception):
                raise got
            assert got is None or 0 <= got <= len(buffer)
            end = round_up(got or 0)
            assert bytes(buffer[end:]) == bytes([POISON]) * (len(buffer) - end), "bytes beyond the object were written"
            found.append(None if got is None else bytes(buffer[:got]))
        return found

    def put(self, backend: StorageBackend, keys: Sequence[ChunkKey], objects: Sequence[memoryview]) -> None:
        """Store objects, all of which must be accepted."""
        results = backend.put_from(keys, objects)
        assert len(results) == len(keys), f"{len(results)} results for {len(keys)} keys"
        for result in results:
            if result is not None:
                raise result

    def some(self, number: int, nbytes: int | None = None) -> tuple[list[ChunkKey], list[memoryview]]:
        """Keys and objects for them, of the largest size unless `nbytes` says otherwise."""
        keys = [key_of(i) for i in range(number)]
        return keys, [new_object(key, nbytes or object_bytes(self.payload_bytes)) for key in keys]

    # -- the contract ----------------------------------------------------------------------------------------
    def test_what_was_put_is_got(self, open_backend: OpenBackend) -> None:
        """Every byte, in the order asked for, any number of times."""
        keys, objects = self.some(8)
        with self.backend(open_backend) as backend:
            self.put(backend, keys, objects)
            for order in (range(8), reversed(range(8)), (3, 3, 5)):
                wanted = list(order)
                assert self.get(backend, [keys[i] for i in wanted]) == [bytes(objects[i]) for i in wanted]
            assert backend.contains(keys) == [True] * 8

    def test_objects_of_every_size(self, open_backend: OpenBackend) -> None:
        """From a header alone to the largest, on and beside page boundaries."""
        sizes = {0, 1, 511, 512, 513, PAGE - 1, PAGE, PAGE + 1, self.payload_bytes - 1, self.payload_bytes}
        keys = [key_of(i) for i in range(len(sizes))]
        objects = [new_object(key, object_bytes(size)) for key, size in zip(keys, sorted(sizes), strict=True)]
        with self.backend(open_backend) as backend:
            self.put(backend, keys, objects)
            assert self.get(backend, keys) == [bytes(obj) for obj in objects]

    def test_absent_keys(self, open_backend: OpenBackend) -> None:
        """None, not an error; between present ones too; deleting them is fine."""
        keys, objects = self.some(3)
        absent = [key_of(i) for i in range(100, 103)]
        with self.backend(open_backend) as backend:
            assert self.get(backend, absent) == [None] * 3
            backend.delete(absent)
            self.put(backend, keys, objects)
            mixed = [absent[0], keys[0], absent[1], absent[2], keys[2]]
            assert backend.contains(mixed) == [False, True, False, False, True]
            assert self.get(backend, mixed) == [None, bytes(objects[0]), None, None, bytes(objects[2])]

    def test_empty_batches(self, open_backend: OpenBackend) -> None:
        with self.backend(open_backend) as backend:
            assert backend.contains([]) == []
            assert backend.get_into([], []) == []
            assert backend.put_from([], []) == []
            backend.delete([])

    def test_putting_again_is_allowed(self, open_backend: OpenBackend) -> None:
        keys, objects = self.some(3)
        with self.backend(open_backend) as backend:
            for _ in range(3):
                self.put(backend, keys, objects)
            assert self.get(backend, keys) == [bytes(obj) for obj in objects]
            usage = backend.usage()
            assert usage is None or usage.objects == 3

    def test_deleted_keys_are_gone_and_can_return(self, open_backend: OpenBackend) -> None:
        keys, objects = self.some(4)
        with self.backend(open_backend) as backend:
            self.put(backend, keys, objects)
            backend.delete(keys[1:3])
            backend.delete(keys[1:2])
            assert backend.contains(keys) == [True, False, False, True]
            assert self.get(backend, keys) == [bytes(objects[0]), None, None, bytes(objects[3])]
            newer = new_object(keys[1], objects[1].nbytes - 1, seed=1)
            self.put(backend, keys[1:2], [newer])
            assert self.get(backend, keys[1:2]) == [bytes(newer)]

    def test_clear_forgets_everything(self, open_backend: OpenBackend) -> None:
        """Also what a restart would find."""
        keys, objects = self.some(5)
        with self.backend(open_backend) as backend:
            self.put(backend, keys, objects)
            backend.clear()
            assert backend.contains(keys) == [False] * 5
            usage = backend.usage()
            assert usage is None or (usage.objects, usage.object_bytes) == (0, 0)
            self.put(backend, keys[:1], objects[:1])
            backend.clear()
        with self.backend(open_backend) as backend:
            assert self.get(backend, keys) == [None] * 5
            assert not list(backend.scan() or ())

    def test_scan_tells_what_is_there(self, open_backend: OpenBackend) -> None:
        """After a restart: each key once, with its size; what was deleted is not there. Or None, always."""
        keys, objects = self.some(6)
        with self.backend(open_backend) as backend:
            can_tell = backend.scan() is not None
            self.put(backend, keys, objects)
            backend.delete(keys[:1])
        with self.backend(open_backend) as backend:
            found = backend.scan()
            assert (found is not None) == can_tell
            if found is None:
                return
            listed = list(found)
            assert sorted(listed) == sorted((k, o.nbytes) for k, o in zip(keys[1:], objects[1:], strict=True))
            assert self.get(backend, keys) == [None, *(bytes(obj) for obj in objects[1:])]

    def test_buffers_are_lent_for_the_call_only(self, open_backend: OpenBackend) -> None:
        """Overwriting a buffer after the call changes nothing that is stored, nor does the backend write it later."""
        keys, objects = self.some(4)
        intact = [bytes(obj) for obj in objects]
        with self.backend(open_backend) as backend:
            self.put(backend, keys, objects)
            for obj in objects:
                obj[:] = bytes([POISON]) * len(obj)
            buffers = [aligned(round_up(object_bytes(self.payload_bytes)), POISON) for _ in keys]
            backend.get_into(keys, buffers)
            for buffer in buffers:
                buffer[:] = bytes([POISON]) * len(buffer)
            assert self.get(backend, keys) == intact
            assert all(bytes(buffer) == bytes([POISON]) * len(buffer) for buffer in buffers)

    def test_inputs_are_not_changed(self, open_backend: OpenBackend) -> None:
        keys, objects = self.some(2)
        intact = [bytes(obj) for obj in objects]
        with self.backend(open_backend) as backend:
            self.put(backend, keys, [obj.toreadonly() for obj in objects])
            assert [bytes(obj) for obj in objects] == intact

    def test_usage_and_footprint(self, open_backend: OpenBackend) -> None:
        """What an object takes is no less than its bytes, and is given back."""
        keys, objects = self.some(10)
        with self.backend(open_backend) as backend:
            assert all(backend.footprint(obj.nbytes) >= obj.nbytes for obj in objects)
            self.put(backend, keys, objects)
            usage = backend.usage()
            if usage is None:
                return
            assert (usage.objects, usage.object_bytes) == (10, sum(obj.nbytes for obj in objects))
            assert usage.allocated_bytes >= usage.object_bytes
            backend.delete(keys[:4])
            after = backend.usage()
            assert after is not None
            assert (after.objects, after.object_bytes) == (6, sum(obj.nbytes for obj in objects[4:]))

    def test_capacity_is_hard(self, open_backend: OpenBackend) -> None:
        """Beyond it a put is refused with `NoSpace`, what is there stays, and deleting makes room."""
        with self.backend(open_backend) as backend:
            stored: dict[ChunkKey, memoryview] = {}
            for number in count():
                key = key_of(number)
                obj = new_object(key, object_bytes(self.payload_bytes))
                (result,) = backend.put_from([key], [obj])
                if result is not None:
                    break
                stored[key] = obj
                if len(stored) * obj.nbytes > 2 * self.capacity:
                    return  # the medium has no limit of its own: the core keeps the tier's
            assert isinstance(result, NoSpace), f"a full medium says NoSpace, not {result!r}"
            usage = backend.usage()
            assert usage is None or usage.allocated_bytes <= self.capacity
            assert self.get(backend, list(stored)) == [bytes(obj) for obj in stored.values()]
            victims = list(stored)[:3]
            backend.delete(victims)
            assert backend.put_from([key], [obj]) == [None]
            assert self.get(backend, [key, *victims]) == [bytes(obj), None, None, None]

    def test_threads_see_whole_objects(self, open_backend: OpenBackend) -> None:
        """Readers beside writers and deleters of the same keys see the old object, none, or the new one."""
        keys, _ = self.some(6)
        size = object_bytes(self.payload_bytes)
        legal = {key: {bytes(new_object(key, size, seed)) for seed in range(3)} for key in keys}
        wrong: list[object] = []
        with self.backend(open_backend) as backend:

            def work(seed: int) -> None:
                random = Random(seed)
                try:
                    for _ in range(40):
                        some = random.sample(keys, 3)
                        choice = random.random()
                        if choice < 0.4:
                            self.put(backend, some, [new_object(key, size, random.randrange(3)) for key in some])
                        elif choice < 0.6:
                            backend.delete(some[:1])
                        else:
                            for key, obj in zip(some, self.get(backend, some), strict=True):
                                if obj is not None and obj not in legal[key]:
                                    wrong.append(key)
                except BaseException as error:
                    wrong.append(error)

            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(self.threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not wrong

    def test_close_is_idempotent(self, open_backend: OpenBackend) -> None:
        with self.backend(open_backend) as backend:
            keys, objects = self.some(1)
            self.put(backend, keys, objects)
            backend.close()
