"""What the storage kit's tests are made with: objects, backends under watch, reads into poisoned buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from random import Random

from lmcache_core.protocols import BuildContext, StorageBackend
from lmcache_core.seal import RAW_CODEC, seal
from lmcache_core.testing.contracts import ContractBroken, demand
from lmcache_core.testing.memory import aligned
from lmcache_core.testing.model import Model
from lmcache_core.testing.watched import Watched
from lmcache_core.types import HEADER_BYTES, PAGE, ChunkKey, Got, object_bytes, round_up

OpenBackend = Callable[[BuildContext], StorageBackend]

POISON = 0xDB
LAYOUT_ID = b"conformance-kit!"


def key_of(number: int) -> ChunkKey:
    """A key like real ones: an identity, then a digest."""
    return ChunkKey(b"conformance-kit:" + Random(number).randbytes(16))


def new_object(key: ChunkKey, nbytes: int, seed: int = 0) -> memoryview:
    """A sealed object of `nbytes` bytes in all, page-aligned as the core's are."""
    obj = aligned(nbytes, POISON)
    obj[HEADER_BYTES:] = Random(key + bytes([seed % 256])).randbytes(nbytes - HEADER_BYTES)
    seal(obj, key, LAYOUT_ID, RAW_CODEC, nbytes - HEADER_BYTES, nbytes - HEADER_BYTES, 0)
    return obj


class StorageTools:
    """Limits, which a subclass may change, and what the tests do more than once."""

    payload_bytes = 16 << 10
    """Largest payload of most tests."""
    large_bytes = (2 << 20) + 1234
    """Payload of a large object, as real chunks are: more than one read, packet or value may carry."""
    capacity = 8 << 20
    """Bytes the backend is given; room for at least 100 objects."""
    threads = 4
    deadline = 5.0
    """Seconds a call may take: `BuildContext.deadline`."""
    durable = True
    """False for a medium that lives and dies with the backend object."""

    def elsewhere(self) -> OpenBackend | None:
        """How to open a backend on another medium of the same kind: another path, prefix, bucket or database.

        A backend whose settings can say so overrides this; None leaves the contract `own medium` unchecked.
        """
        return None

    @contextmanager
    def backend(
        self,
        open_backend: OpenBackend,
        contract: str = "errors",
        *,
        largest: int | None = None,
        capacity: int | None = None,
    ) -> Iterator[Watched]:
        """An open backend, closed in the end. A call that raises broke `contract`; one that hangs, the deadline.

        `largest`, `capacity`: bytes of an object and of the medium, those of most tests unless given.
        """
        largest = largest or object_bytes(self.payload_bytes)
        context = BuildContext("conformance", largest, capacity or self.capacity, self.threads)
        backend = self.watch(open_backend, context, contract)
        try:
            yield backend
        except ContractBroken as broken:
            if broken.contract != "deadline":  # what hangs is not asked again
                backend.close()
            raise
        except BaseException:
            backend.close()
            raise
        else:
            backend.close()
        finally:
            backend.dismiss()

    def watch(self, open_backend: OpenBackend, context: BuildContext, contract: str = "errors") -> Watched:
        """A backend under watch."""
        given = BuildContext(
            context.tier, context.object_bytes, context.capacity, context.threads, False, self.deadline
        )
        return Watched(open_backend(given), self.deadline, contract)

    def read(
        self, backend: StorageBackend, keys: Sequence[ChunkKey], nbytes: int | None = None
    ) -> tuple[list[Got], list[bytes | None]]:
        """Read keys into buffers of `nbytes` and a page; the results, and the bytes of each."""
        room = round_up(nbytes or object_bytes(self.payload_bytes)) + PAGE
        return self.read_into(backend, keys, [aligned(room, POISON) for _ in keys])

    def read_into(
        self, backend: StorageBackend, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]
    ) -> tuple[list[Got], list[bytes | None]]:
        """Read keys into poisoned buffers, each a page longer than any object; the results, and the bytes of each.

        Checks that nothing is written behind the last page of an object.
        """
        results = backend.get_into(keys, buffers)
        found: list[bytes | None] = []
        for buffer, got in zip(buffers, results, strict=True):
            room = len(buffer)
            size = got if isinstance(got, int) else 0
            demand(size <= room, "exact sizes", f"get_into returned {size} for a buffer of {room} bytes")
            # A miss may be found out when a part was read already: only what lies behind any object stays untouched.
            end = round_up(size) if isinstance(got, int) else room - PAGE
            untouched = bytes(buffer[end:]) == bytes([POISON]) * (room - end)
            demand(untouched, "exact bytes", f"get_into returned {got!r} and wrote behind that")
            found.append(bytes(buffer[:size]) if isinstance(got, int) else None)
        return results, found

    def get(
        self, backend: StorageBackend, keys: Sequence[ChunkKey], contract: str = "errors", nbytes: int | None = None
    ) -> list[bytes | None]:
        """The objects of keys. A result that is an exception broke `contract`."""
        results, found = self.read(backend, keys, nbytes)
        for result in results:
            if isinstance(result, Exception):
                raise ContractBroken(contract, f"get_into returned {result!r}") from result
        return found

    def put(
        self,
        backend: StorageBackend,
        keys: Sequence[ChunkKey],
        objects: Sequence[memoryview],
        contract: str = "errors",
    ) -> None:
        """Store objects, all of which must be accepted. A result that is an exception broke `contract`."""
        for result in backend.put_from(keys, objects):
            if result is not None:
                raise ContractBroken(contract, f"put_from returned {result!r}") from result

    def some(self, number: int, nbytes: int | None = None) -> tuple[list[ChunkKey], list[memoryview]]:
        """Keys and objects for them, of the largest size unless `nbytes` says otherwise."""
        keys = [key_of(i) for i in range(number)]
        return keys, [new_object(key, nbytes or object_bytes(self.payload_bytes)) for key in keys]

    def model(self, open_backend: OpenBackend, keys: int = 10, *, large: bool = False) -> Model:
        """The medium beside a dict: some keys, with objects of many sizes unless all are `large`."""
        largest = object_bytes(self.payload_bytes)
        sizes = [largest, largest - 1, HEADER_BYTES + 1, largest // 2 + HEADER_BYTES // 2, HEADER_BYTES]
        sizes = [largest] if large else sizes

        def make(key: ChunkKey, version: int) -> memoryview:
            return _version(key, sizes[(key[-1] + version) % len(sizes)], version)

        names = [key_of(i) for i in range(keys)]
        return Model(lambda: self.backend(open_backend), names, make, self.read, self.capacity, self.durable)


@lru_cache(maxsize=256)
def _version(key: ChunkKey, nbytes: int, version: int) -> memoryview:
    """A version of a key's object; read only, as every test has the same."""
    return new_object(key, nbytes, version)
