"""A storage backend beside the dict that it should behave like: each step does the same to both and compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from random import Random
from typing import TypeVar

from lmcache_core.errors import NoSpace
from lmcache_core.protocols import StorageBackend
from lmcache_core.testing.concurrency import for_a_while
from lmcache_core.testing.contracts import ContractBroken, demand
from lmcache_core.types import ChunkKey, Got

_T = TypeVar("_T")


class Model:
    """One medium and what must be on it. Steps name keys by their number."""

    def __init__(
        self,
        opening: Callable[[], AbstractContextManager[StorageBackend]],
        keys: Sequence[ChunkKey],
        make: Callable[[ChunkKey, int], memoryview],
        read: Callable[[StorageBackend, Sequence[ChunkKey]], tuple[list[Got], list[bytes | None]]],
        capacity: int,
        durable: bool,
    ) -> None:
        """`make(key, version)` makes an object; `read` gets keys, raw results and bytes."""
        self.keys = keys
        self.expected: dict[ChunkKey, memoryview] = {}
        self._opening = opening
        self._make = make
        self._read = read
        self._capacity = capacity
        self._durable = durable
        self._versions = dict.fromkeys(keys, 0)
        self._opened = opening()
        self._backend = self._opened.__enter__()
        self._backend.clear()
        self._scans = self._backend.scan() is not None

    def close(self) -> None:
        self._opened.__exit__(None, None, None)

    def put(self, numbers: Sequence[int]) -> None:
        """Store objects and read them back: present keys' again, byte for byte, deleted keys' in another version."""
        keys = [self.keys[number] for number in dict.fromkeys(numbers)]
        objects = [self.expected.get(key) or self._make(key, self._versions[key]) for key in keys]
        for key, obj, result in zip(keys, objects, self._backend.put_from(keys, objects), strict=True):
            if result is None:
                self.expected[key] = obj
            elif isinstance(result, NoSpace):
                room = self._capacity - sum(stored.nbytes for stored in self.expected.values())
                demand(room < self._capacity // 2, "capacity", f"NoSpace for {obj.nbytes} bytes, {room} are free")
            else:
                raise ContractBroken("errors", f"put_from returned {result!r}") from result
        self.get(numbers)

    def get(self, numbers: Sequence[int]) -> None:
        keys = [self.keys[number] for number in numbers]
        results, found = self._read(self._backend, keys)
        for key, result in zip(keys, results, strict=True):
            if isinstance(result, Exception):
                contract = "errors" if key in self.expected else "absent keys"
                raise ContractBroken(contract, f"get_into returned {result!r}") from result
        compare(found, [bytes(obj) if (obj := self.expected.get(key)) else None for key in keys])

    def contains(self, numbers: Sequence[int]) -> None:
        keys = [self.keys[number] for number in numbers]
        compare_answers(self._backend.contains(keys), [key in self.expected for key in keys])

    def delete(self, numbers: Sequence[int]) -> None:
        keys = [self.keys[number] for number in numbers]
        self._backend.delete(keys)
        for key in keys:
            self._forget(key)
        demand(not any(self._backend.contains(keys)), "delete", "`contains` is True for a key just deleted")

    def clear(self) -> None:
        self._backend.clear()
        for key in list(self.expected):
            self._forget(key)
        demand(not any(self._backend.contains(self.keys)), "clear", "`contains` is True for a key just cleared")

    def reopen(self) -> None:
        """Close it and open another one on the same medium."""
        self.close()
        self._opened = self._opening()
        self._backend = self._opened.__enter__()
        present = self._backend.contains(self.keys)
        for key, there in zip(self.keys, present, strict=True):
            if there:
                demand(key in self.expected, "delete", "a key that was deleted is back after a reopen")
            elif key in self.expected:
                demand(not self._durable, "reopen", "a key that was stored is gone after a reopen")
                self._forget(key)

    def check(self) -> None:
        """Everything there is: after a reopen by `scan`, by `usage`, and read back."""
        self.reopen()
        found = self._backend.scan()
        demand((found is not None) == self._scans, "scan", "`scan` sometimes returns None and sometimes does not")
        if found is not None:
            compare_scan(list(found), {key: obj.nbytes for key, obj in self.expected.items()})
        usage = self._backend.usage()
        if usage is not None:
            counted = (usage.objects, usage.object_bytes)
            stored = (len(self.expected), sum(obj.nbytes for obj in self.expected.values()))
            demand(counted == stored, "books", f"usage says (objects, bytes) {counted}, stored are {stored}")
        self.get(range(len(self.keys)))

    def walk(self, seed: int, steps: int, seconds: float) -> None:
        """Random steps, the same for the same seed; fewer on a medium where they take more than `seconds`."""
        random = Random(seed)
        numbers = range(len(self.keys))
        for _ in for_a_while(steps, seconds):
            some = random.choices(numbers, k=random.randrange(1, 5))
            choice = random.random()
            if choice < 0.4:
                self.put(some)
            elif choice < 0.6:
                self.get(some)
            elif choice < 0.7:
                self.contains(some)
            elif choice < 0.9:
                self.delete(some)
            elif choice < 0.95:
                self.reopen()
            else:
                self.clear()
        self.check()

    def _forget(self, key: ChunkKey) -> None:
        if self.expected.pop(key, None) is not None:
            self._versions[key] += 1


def compare(found: Sequence[bytes | None], wanted: Sequence[bytes | None], *, present: str = "absent keys") -> None:
    """Gets beside what they should be; `present` is the contract of keys that should not be there. Raise the contract
    broken."""
    wrong = [i for i, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]]
    if not wrong:
        return
    if len(wrong) > 1 and _permuted([found[i] for i in wrong], [wanted[i] for i in wrong]):
        raise ContractBroken("results", "get_into: objects are right, but not in the order of the keys")
    sizes = [[None if obj is None else len(obj) for obj in objects] for objects in (found, wanted)]
    if len(wrong) > 1 and sizes[0] != sizes[1] and _permuted(*sizes):
        raise ContractBroken("results", "get_into: sizes are right, but not in the order of the keys")
    i = wrong[0]
    got, want = found[i], wanted[i]
    if want is None or got is None:
        demand(want is not None, present, f"key {i} of the batch should be absent, get_into found an object")
        raise ContractBroken("acknowledged puts", f"key {i} of the batch is stored, get_into says it is absent")
    if len(got) != len(want):
        raise ContractBroken("exact sizes", f"get_into returned {len(got)} for an object of {len(want)} bytes")
    at = next(at for at, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1])
    other = "; it is the object of another key" if got in wanted else ""
    raise ContractBroken("exact bytes", f"byte {at} of {len(want)} is {got[at]:#04x}, put was {want[at]:#04x}{other}")


def compare_answers(found: Sequence[bool], wanted: Sequence[bool], contract: str = "contains") -> None:
    """Answers of `contains` beside what they should be."""
    wrong = [i for i, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]]
    if wrong:
        order = len(wrong) > 1 and _permuted(found, wanted)
        demand(not order, "results", "contains: as many keys as should be there, but not in the order of the keys")
        i = wrong[0]
        said = f"key {i} of the batch is {'stored' if wanted[i] else 'not stored'}, `contains` says {found[i]}"
        raise ContractBroken(contract, said)


def compare_scan(found: Sequence[tuple[ChunkKey, int]], wanted: dict[ChunkKey, int]) -> None:
    """A scan beside keys and sizes that are stored."""
    listed = dict(found)
    demand(len(listed) == len(found), "scan", "`scan` lists a key twice")
    demand(not wanted.keys() - listed.keys(), "scan", "`scan` does not list a key that is stored")
    demand(not listed.keys() - wanted.keys(), "scan", "`scan` lists a key that is not stored")
    for key, nbytes in wanted.items():
        demand(listed[key] == nbytes, "scan", f"`scan` says {listed[key]} bytes of an object of {nbytes}")


def _permuted(found: Sequence[_T], wanted: Sequence[_T]) -> bool:
    """Whether both hold the same, differently ordered."""
    left = list(wanted)
    for item in found:
        if item not in left:
            return False
        left.remove(item)
    return True
