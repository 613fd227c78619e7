"""The contract of `StorageBackend` as tests. A plugin's author subclasses it and gives it one fixture:

    class TestMyBackend(StorageBackendTests):
        @pytest.fixture
        def open_backend(self, tmp_path):
            return lambda context: MyConfig(path=tmp_path).build(context)

`open_backend(context)` opens a backend over one and the same medium each time it is called in a test; the medium is
empty when the test begins. A failure names the contract that is broken, as listed in `lmcache_core.testing.contracts`.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import count
from os import listdir
from random import Random
from time import monotonic, perf_counter, sleep

from lmcache_core.errors import BackendUnavailable, CorruptChunk, NoSpace
from lmcache_core.protocols import BuildContext, Region
from lmcache_core.testing.concurrency import CHANCES, for_a_while, held_beside, together
from lmcache_core.testing.contracts import ContractBroken, demand
from lmcache_core.testing.memory import aligned
from lmcache_core.testing.model import compare, compare_answers, compare_scan
from lmcache_core.testing.storage_tools import LAYOUT_ID, POISON, OpenBackend, StorageTools, key_of, new_object
from lmcache_core.types import HEADER_BYTES, KEY_BYTES, PAGE, ChunkKey, object_bytes, round_up

__all__ = ["LAYOUT_ID", "POISON", "OpenBackend", "StorageBackendTests", "key_of", "new_object"]

_LISTED = 1150
"""Objects of a large medium: many services name 1,000 in one answer."""
_LARGE_CAPACITY = 32 << 20
_LOCAL_S = 0.01
"""More than `contains` may take where it answers from memory; what asks the medium and waits takes longer."""


class StorageBackendTests(StorageTools):
    """Run by pytest in subclasses that give `open_backend`. Attributes are limits that a subclass may change."""

    def test_what_was_put_is_got(self, open_backend: OpenBackend) -> None:
        """Every byte, in the order asked for, any number of times."""
        keys, objects = self.some(8)
        with self.backend(open_backend) as backend:
            self.put(backend, keys, objects)
            for order in (range(8), reversed(range(8)), (3, 3, 5)):
                wanted = list(order)
                compare(self.get(backend, [keys[i] for i in wanted]), [bytes(objects[i]) for i in wanted])
            compare_answers(backend.contains(keys), [True] * 8)

    def test_objects_of_every_size(self, open_backend: OpenBackend) -> None:
        """From a header alone to the largest, on and beside page boundaries."""
        sizes = {0, 1, 511, 512, 513, PAGE - 1, PAGE, PAGE + 1, self.payload_bytes - 1, self.payload_bytes}
        keys = [key_of(i) for i in range(len(sizes))]
        objects = [new_object(key, object_bytes(size)) for key, size in zip(keys, sorted(sizes), strict=True)]
        with self.backend(open_backend) as backend:
            self.put(backend, keys, objects)
            compare(self.get(backend, keys), [bytes(obj) for obj in objects])

    def test_large_objects(self, open_backend: OpenBackend) -> None:
        """More than one read, packet or value of the medium may carry."""
        with self.backend(open_backend, largest=object_bytes(self.large_bytes), capacity=_LARGE_CAPACITY) as backend:
            for number, payload in enumerate((self.large_bytes // 8, self.large_bytes)):
                key, size = key_of(number), object_bytes(payload)
                obj = new_object(key, size)
                began = perf_counter()
                self.put(backend, [key], [obj])
                compare(self.get(backend, [key], nbytes=size), [bytes(obj)])
                if perf_counter() - began > self.deadline / 20:
                    return  # so slow a medium would need its deadline for the larger one

    def test_absent_keys(self, open_backend: OpenBackend) -> None:
        """None, not an error; between present ones too; deleting them is fine."""
        keys, objects = self.some(3)
        absent = [key_of(i) for i in range(100, 103)]
        with self.backend(open_backend, "absent keys") as backend:
            compare(self.get(backend, absent, "absent keys"), [None] * 3)
            compare_answers(backend.contains(absent), [False] * 3)
            backend.delete(absent)
            self.put(backend, keys, objects)
            mixed = [absent[0], keys[0], absent[1], absent[2], keys[2]]
            compare_answers(backend.contains(mixed), [False, True, False, False, True])
            wanted = [None, bytes(objects[0]), None, None, bytes(objects[2])]
            compare(self.get(backend, mixed, "absent keys"), wanted)
            backend.delete(mixed[:1] + keys[:1])
            compare_answers(backend.contains(mixed[:2]), [False, False], "delete")

    def test_empty_batches(self, open_backend: OpenBackend) -> None:
        with self.backend(open_backend, "results") as backend:
            demand(backend.contains([]) == [], "results", "contains([]) is not []")
            demand(backend.get_into([], []) == [], "results", "get_into([], []) is not []")
            demand(backend.put_from([], []) == [], "results", "put_from([], []) is not []")
            backend.delete([])

    def test_a_batch_may_name_a_key_twice(self, open_backend: OpenBackend) -> None:
        """Each time it gets the same result; stored it is once."""
        keys, objects = self.some(2)
        with self.backend(open_backend, "results") as backend:
            self.put(backend, [keys[0], keys[1], keys[0]], [objects[0], objects[1], objects[0]], "results")
            compare_answers(backend.contains([keys[0], keys[0], keys[1]]), [True] * 3, "results")
            found = self.get(backend, [keys[0], keys[1], keys[0]], "results")
            compare(found, [bytes(objects[i]) for i in (0, 1, 0)])
            usage = backend.usage()
            counted = usage is None or (usage.objects, usage.object_bytes) == (2, sum(obj.nbytes for obj in objects))
            demand(counted, "books", f"of 2 objects one was put twice in a batch, usage says {usage}")
            backend.delete([keys[0], keys[0]])
            compare_answers(backend.contains(keys), [False, True], "delete")

    def test_every_byte_of_a_key_counts(self, open_backend: OpenBackend) -> None:
        """Keys that share an identity, a chain or all bytes but one; and bytes that mean something to somebody."""
        base = bytes(key_of(7))
        near = [base[:i] + bytes([base[i] ^ flip]) + base[i + 1 :] for i in range(KEY_BYTES) for flip in (1, 0x20)]
        # What ends a string, a line or a name for somebody, with something behind it.
        near += [
            base[:20] + end + rest for end in (b"\0", b"\n", b"/", b" ") for rest in (b"some-chain!", b"other-chain")
        ]
        odd = [b"\0", b"\xff", b"/", b"..", b"\n", b"{}", b"%2F", b"*?[]", b"'\"", b" ", b"a", b"A", b"\r\n"]
        keys = [ChunkKey(key) for key in [base, *near, *((text * KEY_BYTES)[:KEY_BYTES] for text in odd)]]
        objects = [new_object(key, object_bytes(64)) for key in keys]
        with self.backend(open_backend, "whole keys") as backend:
            self.put(backend, keys[:1], objects[:1], "whole keys")
            compare_answers(backend.contains(keys), [i == 0 for i in range(len(keys))], "whole keys")
            self.put(backend, keys[::2], objects[::2], "whole keys")
            present = [i % 2 == 0 for i in range(len(keys))]
            compare_answers(backend.contains(keys), present, "whole keys")
            self.put(backend, keys[1::2], objects[1::2], "whole keys")
            for key, obj, found in zip(keys, objects, self.get(backend, keys, "whole keys"), strict=True):
                demand(
                    found == bytes(obj),
                    "whole keys",
                    f"key {key.hex()} does not give its own object beside similar keys",
                )

    def test_many_keys_at_once(self, open_backend: OpenBackend) -> None:
        """`contains` of as many keys as a long prompt has chunks, and a `delete` of many."""
        keys, objects = self.some(16, object_bytes(64))
        many = [key_of(i) for i in range(1000, 1240)]
        for i, key in enumerate(keys):
            many.insert(i * 15, key)
        with self.backend(open_backend) as backend:
            self.put(backend, keys, objects)
            stored = [key in set(keys) for key in many]
            compare_answers(backend.contains(many), stored)
            backend.delete(many[:64])
            compare_answers(backend.contains(many), [False] * 64 + stored[64:], "delete")

    def test_putting_again_is_allowed(self, open_backend: OpenBackend) -> None:
        keys, objects = self.some(3)
        with self.backend(open_backend, "put again") as backend:
            for _ in range(3):
                self.put(backend, keys, objects, "put again")
            found = self.get(backend, keys, "put again")
            demand(found == [bytes(obj) for obj in objects], "put again", "an object that was put again has changed")
            usage = backend.usage()
            counted = usage is None or (usage.objects, usage.object_bytes) == (3, sum(obj.nbytes for obj in objects))
            demand(counted, "put again", f"3 objects were put 3 times, usage says {usage}")
            backend.delete(keys)
            left = backend.contains(keys)
            demand(not any(left), "put again", "a key that was put 3 times is still there after one delete")

    def test_deleted_keys_are_gone_and_can_return(self, open_backend: OpenBackend) -> None:
        keys, objects = self.some(4)
        with self.backend(open_backend, "delete") as backend:
            self.put(backend, keys, objects)
            backend.delete(keys[1:3])
            backend.delete(keys[1:2])
            compare_answers(backend.contains(keys), [True, False, False, True], "delete")
            compare(self.get(backend, keys), [bytes(objects[0]), None, None, bytes(objects[3])], present="delete")
            newer = new_object(keys[1], objects[1].nbytes - 1, seed=1)
            self.put(backend, keys[1:2], [newer])
            (found,) = self.get(backend, keys[1:2])
            demand(
                found != bytes(objects[1]), "delete", "a deleted object is back after another one was put under its key"
            )
            compare([found], [bytes(newer)])
            backend.delete(keys[3:])
        with self.backend(open_backend, "delete") as backend:
            back = backend.contains(keys[2:])
            demand(not any(back), "delete", "a key that was deleted is back after a reopen")
            compare(self.get(backend, keys[2:]), [None, None], present="delete")

    def test_clear_forgets_everything(self, open_backend: OpenBackend) -> None:
        """Also what a restart would find."""
        keys, objects = self.some(5)
        with self.backend(open_backend, "clear") as backend:
            self.put(backend, keys, objects)
            backend.clear()
            demand(not any(backend.contains(keys)), "clear", "`contains` is True for a key after `clear`")
            compare(self.get(backend, keys), [None] * 5, present="clear")
            usage = backend.usage()
            empty = usage is None or (usage.objects, usage.object_bytes) == (0, 0)
            demand(empty, "clear", f"usage after `clear` is {usage}")
            self.put(backend, keys[:1], objects[:1])
            backend.clear()
        with self.backend(open_backend, "clear") as backend:
            compare(self.get(backend, keys), [None] * 5, present="clear")
            demand(not list(backend.scan() or ()), "clear", "`scan` lists keys after `clear` and a reopen")

    def test_scan_tells_what_is_there(self, open_backend: OpenBackend) -> None:
        """After a restart: each key once, with its size; what was deleted is not there. Or None, always."""
        keys, objects = self.some(6)
        objects[3] = new_object(keys[3], objects[3].nbytes - 100)
        with self.backend(open_backend) as backend:
            can_tell = backend.scan() is not None
            self.put(backend, keys, objects)
            backend.delete(keys[:1])
        with self.backend(open_backend) as backend:
            scanned = backend.scan()
            demand((scanned is not None) == can_tell, "scan", "`scan` is None before a restart or after it, not both")
            if not self.durable:
                return
            if scanned is not None:
                compare_scan(list(scanned), {k: o.nbytes for k, o in zip(keys[1:], objects[1:], strict=True)})
            kept = backend.contains(keys[1:])
            demand(all(kept), "reopen", "a key that was stored is gone after a reopen")
            compare(self.get(backend, keys), [None, *(bytes(obj) for obj in objects[1:])], present="delete")

    def test_more_objects_than_a_listing_names_at_once(self, open_backend: OpenBackend) -> None:
        """`scan` and `clear` go on to its last page. On a slow medium there are as many as it takes in a second."""
        if not self.durable:
            return
        stored: list[ChunkKey] = []
        with self.backend(open_backend, capacity=_LARGE_CAPACITY) as backend:
            for turn in for_a_while(_LISTED // 50, 1.0):
                numbers = range(50 * turn, 50 * turn + 50)
                keys = [key_of(number) for number in numbers]
                self.put(backend, keys, [_object(number, HEADER_BYTES) for number in numbers])
                stored += keys
        with self.backend(open_backend, capacity=_LARGE_CAPACITY) as backend:
            scanned = backend.scan()
            if scanned is not None:
                compare_scan(list(scanned), dict.fromkeys(stored, HEADER_BYTES))
            backend.clear()
        with self.backend(open_backend, capacity=_LARGE_CAPACITY) as backend:
            kept = [there for at in range(0, len(stored), 50) for there in backend.contains(stored[at : at + 50])]
            demand(not any(kept), "clear", f"{sum(kept)} of {len(kept)} keys are still there after `clear`")
            demand(not list(backend.scan() or ()), "clear", "`scan` lists keys after `clear` and a reopen")

    def test_another_medium_is_another_one(self, open_backend: OpenBackend) -> None:
        """Backends on two paths, prefixes or buckets share nothing. Checked where `elsewhere` is given."""
        other = self.elsewhere()
        if other is None:
            return
        keys, objects = self.some(3)
        contract = "own medium"
        with self.backend(open_backend, contract) as here, self.backend(other, contract) as there:
            self.put(here, keys[:2], objects[:2])
            self.put(there, keys[2:], objects[2:])
            compare_answers(there.contains(keys), [False, False, True], contract)
            compare_answers(here.contains(keys), [True, True, False], contract)
            compare(self.get(there, keys[:1]), [None], present=contract)
            there.delete(keys[:1])
            compare_answers(here.contains(keys[:2]), [True, True], contract)
        with self.backend(other, contract) as there:
            scanned = there.scan()
            listed = set() if scanned is None else {key for key, _ in scanned}
            demand(not listed & set(keys[:2]), contract, "`scan` lists objects of another medium")
            there.clear()
        if self.durable:
            with self.backend(open_backend, contract) as here:
                compare_answers(here.contains(keys[:2]), [True, True], contract)

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
            for pause in (0.0, 0.05):
                sleep(pause)  # for what a backend may still do behind our back
                kept = self.get(backend, keys) == intact
                demand(kept, "lent buffers", "what is stored changed with the buffer after put_from had returned")
                written = any(bytes(buffer) != bytes([POISON]) * len(buffer) for buffer in buffers)
                demand(not written, "lent buffers", "a buffer was written after get_into had returned")
                self.put(backend, keys[:1], [new_object(keys[0], len(intact[0]))])
            kept = all(bytes(obj) == bytes([POISON]) * len(obj) for obj in objects)
            demand(kept, "lent buffers", "a buffer was written after put_from had returned")

    def test_inputs_are_not_changed(self, open_backend: OpenBackend) -> None:
        keys, objects = self.some(3)
        intact = [bytes(obj) for obj in objects]
        given = list(keys)
        with self.backend(open_backend, "inputs") as backend:
            self.put(backend, given, objects)
            demand([bytes(obj) for obj in objects] == intact, "inputs", "put_from changed an object it was given")
            backend.contains(given)
            backend.get_into(given, [aligned(round_up(object_bytes(self.payload_bytes)), POISON) for _ in given])
            backend.delete(given)
            demand(given == keys, "inputs", "the list of keys was changed")

    def test_registered_memory(self, open_backend: OpenBackend) -> None:
        """Buffers come from it and, beside those, from elsewhere; or the backend cannot use such memory and says so."""
        room = round_up(object_bytes(self.payload_bytes)) + PAGE
        memory = aligned(4 * room, POISON)
        places = [memory[at * room : (at + 1) * room] for at in range(4)]
        region = Region(ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory), memory, owner=memory)
        keys, objects = self.some(4)
        with self.backend(open_backend) as backend:
            try:
                backend.register(region)
            except ContractBroken as broken:
                if isinstance(broken.__cause__, BackendUnavailable):
                    return
                raise
            inside = [place[: obj.nbytes] for place, obj in zip(places[2:], objects, strict=False)]
            for buffer, obj in zip(inside, objects, strict=False):
                buffer[:] = obj
            self.put(backend, keys, [*inside, *objects[2:]])
            compare(self.get(backend, keys), [bytes(obj) for obj in objects])
            memory[:] = bytes([POISON]) * len(memory)
            _, found = self.read_into(backend, [keys[0], keys[3], keys[1]], [places[3], places[0], places[1]])
            compare(found, [bytes(objects[i]) for i in (0, 3, 1)])
            untouched = bytes(places[2]) == bytes([POISON]) * room
            demand(untouched, "exact bytes", "get_into wrote into registered memory beside its buffers")

    def test_usage_and_footprint(self, open_backend: OpenBackend) -> None:
        """What an object takes is no less than its bytes, and is given back."""
        keys, objects = self.some(10)
        with self.backend(open_backend) as backend:
            for nbytes in (HEADER_BYTES, HEADER_BYTES + 1, objects[0].nbytes):
                takes = backend.footprint(nbytes)
                demand(takes >= nbytes, "books", f"footprint says {takes} bytes for an object of {nbytes}")
            self.put(backend, keys, objects)
            usage = backend.usage()
            if usage is None:
                return
            counted, stored = (usage.objects, usage.object_bytes), (10, sum(obj.nbytes for obj in objects))
            demand(counted == stored, "books", f"usage says (objects, bytes) {counted}, stored are {stored}")
            demand(usage.allocated_bytes >= usage.object_bytes, "books", f"less is allocated than stored: {usage}")
            backend.delete(keys[:4])
            after = backend.usage()
            stored = (6, sum(obj.nbytes for obj in objects[4:]))
            right = after is not None and (after.objects, after.object_bytes) == stored
            demand(right, "books", f"(objects, bytes) {stored} are left after a delete, usage says {after}")

    def test_capacity_is_hard(self, open_backend: OpenBackend) -> None:
        """Beyond it a put is refused with `NoSpace`, what is there stays, and deleting makes room."""
        size = object_bytes(self.payload_bytes)
        with self.backend(open_backend, "capacity") as backend:
            stored: dict[ChunkKey, int] = {}
            refused: list[int] = []
            for first in count(step=8):
                numbers = range(first, first + 8)
                results = backend.put_from([key_of(i) for i in numbers], [_object(i, size) for i in numbers])
                for number, result in zip(numbers, results, strict=True):
                    full = result is None or isinstance(result, NoSpace)
                    demand(full, "capacity", f"a full medium says NoSpace, not {result!r}")
                    if result is None:
                        stored[key_of(number)] = number
                    else:
                        refused.append(number)
                if refused or len(stored) * size > 1.1 * self.capacity:
                    break
            absent = not any(backend.contains([key_of(number) for number in refused]))
            demand(absent, "acknowledged puts", "an object whose put was refused is stored")
            usage = backend.usage()
            within = usage is None or not refused or usage.allocated_bytes <= self.capacity
            demand(within, "capacity", f"{usage} is more than the {self.capacity} bytes it was given")
            # A medium without a limit of its own has none of these refusals: the core keeps the tier's capacity.
            for some in (list(stored)[:8], list(stored)[-8:]):
                found = self.get(backend, some)
                gone = sum(obj is None for obj in found)
                contract = "capacity" if refused else "acknowledged puts"
                demand(not gone, contract, f"put_from said that {gone} objects are stored which are not")
                compare(found, [bytes(_object(stored[key], size)) for key in some])
            if not refused:
                return
            kept = backend.contains(list(stored))
            demand(all(kept), "capacity", f"{kept.count(False)} stored objects are gone after a refused put")
            victims = list(stored)[:3]
            backend.delete(victims)
            late = refused[0]
            self.put(backend, [key_of(late)], [_object(late, size)], "capacity")
            found = self.get(backend, [key_of(late), *victims])
            compare(found, [bytes(_object(late, size)), None, None, None], present="delete")

    def test_objects_of_larger_settings(self, open_backend: OpenBackend) -> None:
        """An earlier serde or wrapper may have left an object longer than its buffer: it alone is damaged."""
        if not self.durable:
            return
        keys, objects = self.some(3)
        room = round_up(object_bytes(self.payload_bytes))
        objects[1] = new_object(keys[1], room + 80)
        with self.backend(open_backend, largest=room + 80) as backend:
            self.put(backend, keys, objects)
        with self.backend(open_backend, "results") as backend:
            kept = backend.contains(keys[::2])
            demand(all(kept), "reopen", "a key that was stored is gone after a reopen")
            memory = [aligned(room + PAGE, POISON) for _ in keys]
            results = backend.get_into(keys, [each[:room] for each in memory])
            long = results[1]
            fits = long is None or long == room or isinstance(long, CorruptChunk)
            demand(fits, "exact sizes", f"an object longer than its buffer is a CorruptChunk, not {long!r}")
            untouched = all(bytes(each[room:]) == bytes([POISON]) * PAGE for each in memory)
            demand(untouched, "exact bytes", "an object longer than its buffer was written behind it")
            right = results[0] == objects[0].nbytes and results[2] == objects[2].nbytes
            demand(right, "results", f"beside an object that is too long the results of others are {results}")
            found = [bytes(memory[i][: objects[i].nbytes]) for i in (0, 2)]
            compare(found, [bytes(objects[i]) for i in (0, 2)])

    def test_threads_see_whole_objects(self, open_backend: OpenBackend) -> None:
        """Readers beside writers and deleters of the same keys see the old object, none, or the new one."""
        keys, _ = self.some(3)
        size = object_bytes(self.payload_bytes)
        # Two of a size, as what is torn may be, and two of another, as sizes may be kept apart from bytes.
        versions = {key: [new_object(key, size - 1000 * (seed // 2), seed) for seed in range(4)] for key in keys}
        legal = {key: {bytes(obj) for obj in objects} for key, objects in versions.items()}
        everything = set().union(*legal.values())
        with self.backend(open_backend, "threads") as backend:

            def work(seed: int) -> None:
                random = Random(seed)
                for _ in for_a_while(100, 1.5):
                    some = random.sample(keys, 2)
                    choice = random.random()
                    if choice < 0.45:
                        self.put(backend, some, [random.choice(versions[key]) for key in some], "threads")
                    elif choice < 0.55:
                        backend.delete(some[:1])
                    else:
                        for key, obj in zip(some, self.get(backend, some, "threads"), strict=True):
                            if obj is not None and obj not in legal[key]:
                                demand(obj not in everything, "threads", "a get returned the object of another key")
                                raise ContractBroken("whole objects", "a reader beside writers got a mixture")

            together(work, self.threads)

    def test_threads_do_not_disturb_each_other(self, open_backend: OpenBackend) -> None:
        """Each with keys of its own: everything a thread stored is there, and is its own."""
        with self.backend(open_backend, "threads") as backend:

            def work(seed: int) -> None:
                for turn in for_a_while(12, 1.5):
                    numbers = range(1000 * seed + 4 * turn, 1000 * seed + 4 * turn + 4)
                    keys = [key_of(number) for number in numbers]
                    objects = [_object(number, object_bytes(self.payload_bytes - number % 3)) for number in numbers]
                    self.put(backend, keys, objects, "threads")
                    there = backend.contains(keys)
                    demand(all(there), "threads", "an object just put is absent, while other threads put others")
                    found = self.get(backend, keys, "threads")
                    right = found == [bytes(obj) for obj in objects]
                    demand(right, "threads", "a get beside other threads did not return what its own thread had put")
                    backend.delete(keys[:2])
                    left = backend.contains(keys)
                    demand(left == [False, False, True, True], "threads", f"after a delete `contains` says {left}")

            together(work, self.threads)
            usage = backend.usage()
        with self.backend(open_backend) as backend:
            scanned = backend.scan()
            if usage is not None and scanned is not None and self.durable:
                listed = len(list(scanned))
                same = usage.objects == listed
                demand(same, "threads", f"usage counted {usage.objects} objects after threads, scan lists {listed}")

    def test_threads_see_what_others_did(self, open_backend: OpenBackend) -> None:
        """One lane writes, another reads: nothing that a backend keeps for each thread may hide that."""
        keys, objects = self.some(4)
        newer = new_object(keys[0], objects[0].nbytes - 1, seed=1)
        with self.backend(open_backend, "threads") as backend:
            for _ in range(2):  # each of two threads once in each part
                self.put(backend, keys, objects, "threads")
                backend.take_turns()
                compare_answers(backend.contains(keys), [True] * 4, "threads")
                found = self.get(backend, keys, "threads")
                demand(found == [bytes(obj) for obj in objects], "threads", "one thread put what another does not get")
                backend.take_turns()
                self.get(backend, keys, "threads")
                backend.delete(keys[:2])
                self.put(backend, keys[:1], [newer], "threads")
                # What the thread itself still gets is no fault of threads.
                compare(self.get(backend, keys[:2], "threads"), [bytes(newer), None], present="delete")
                backend.take_turns()
                found = self.get(backend, keys[:2], "threads")
                demand(found == [bytes(newer), None], "threads", "one thread still gets what another has deleted")
                compare_answers(backend.contains(keys), [True, False, True, True], "threads")
                backend.take_turns()
                backend.clear()
                compare(self.get(backend, keys, "threads"), [None] * 4, present="clear")
                backend.take_turns()
                found = self.get(backend, keys, "threads")
                demand(found == [None] * 4, "threads", "one thread still gets what another has cleared")
                compare_answers(backend.contains(keys), [False] * 4, "threads")

    def test_random_calls_agree_with_a_dict(self, open_backend: OpenBackend) -> None:
        """`stateful.StorageStateMachineTests` does this with hypothesis, which also finds the shortest failure."""
        model = self.model(open_backend)
        try:
            model.walk(seed=3, steps=80, seconds=2.0)
        finally:
            model.close()

    def test_local_answers_do_not_wait(self, open_backend: OpenBackend) -> None:
        """`contains_is_local` is a promise to the engine's own thread."""
        keys, objects = self.some(4)
        with self.backend(open_backend) as backend:
            self.put(backend, keys, objects)
            if not backend.inner.contains_is_local:
                return
            ask = partial(backend.inner.contains, keys)  # within one watched call: no change of threads is timed
            taken: list[float] = []
            while len(taken) < CHANCES and (not taken or taken[-1] > _LOCAL_S):
                sleep(0.1 * len(taken))  # a busy machine takes the processor away now and then
                taken.append(backend.guard("contains", partial(_seconds, ask)))
            waits = f"`contains_is_local`, but answers for {len(keys)} keys take {1000 * min(taken):.0f} ms"
            demand(taken[-1] <= _LOCAL_S, "contains", waits)

    def test_the_gil_is_released(self, open_backend: OpenBackend) -> None:
        """Other Python threads go on while a call waits; else the engine stands still with every read and write."""
        size = object_bytes(256 << 10)
        keys = [key_of(i) for i in range(4)]
        objects = [new_object(key, size) for key in keys]
        buffers = [aligned(round_up(size), POISON) for _ in keys]
        watched = self.watch(open_backend, BuildContext("conformance", size, 32 << 20, self.threads))
        try:
            self.put(watched, keys, objects)
            backend = watched.inner  # within one watched call, so that nothing else takes turns
            for name, call in (
                ("get_into", lambda: backend.get_into(keys, buffers)),
                ("put_from", lambda: backend.put_from(keys, objects)),
                ("contains", lambda: backend.contains(keys)),
            ):
                held: list[float] = []
                while len(held) < CHANCES and (not held or held[-1]):
                    sleep(0.2 * len(held))
                    held.append(watched.guard(name, partial(held_beside, call)))
                demand(not held[-1], "GIL", f"{name} keeps other threads waiting for {1000 * min(held):.0f} ms")
        finally:
            watched.close()
            watched.dismiss()

    def test_close_is_idempotent(self, open_backend: OpenBackend) -> None:
        with self.backend(open_backend, "close") as backend:
            keys, objects = self.some(1)
            self.put(backend, keys, objects)
            backend.close()

    def test_close_lets_go(self, open_backend: OpenBackend) -> None:
        """Of files, sockets and threads: pipelines come and go in one process."""
        keys, objects = self.some(1)

        def turn() -> None:
            with self.backend(open_backend, "close") as backend:
                self.put(backend, keys, objects)
                self.get(backend, keys)

        for _ in range(2):  # what is made once stays
            turn()
        before, turns = _held(), 0
        for _ in for_a_while(6, 1.0):
            turn()
            turns += 1
        if turns < 3:
            return  # too few to tell a leak from what comes and goes
        until = monotonic() + 3
        while (more := _held() - before) >= turns and monotonic() < until:
            gc.collect()
            sleep(0.05)  # for what ends by itself
        leaks = f"{more} more files and threads are there after it was opened and closed {turns} times"
        demand(more < turns, "close", leaks)


def _held() -> int:
    """Files, sockets and threads of this process."""
    return len(listdir("/proc/self/fd")) + threading.active_count()


def _seconds(call: Callable[[], object]) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began


@lru_cache(maxsize=2048)
def _object(number: int, nbytes: int) -> memoryview:
    """The object of `key_of(number)`; read only, as every test has the same."""
    return new_object(key_of(number), nbytes)
