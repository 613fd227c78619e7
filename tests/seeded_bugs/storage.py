"""Storage backends with one bug each, over a correct one in a dict. What each must be told is in `BUGS`."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from time import sleep
from typing import Any, BinaryIO, ClassVar

from lmcache_core.errors import CorruptChunk, NoSpace
from lmcache_core.protocols import BuildContext, Region, StorageBackend
from lmcache_core.testing.memory import DictBackend
from lmcache_core.types import IDENTITY_BYTES, ChunkKey, Got, Put, Usage, round_up

Objects = dict[ChunkKey, bytes]


class Correct(DictBackend):
    """The base: objects in a dict that outlives it, within the capacity it is given."""

    def __init__(self, objects: Objects, context: BuildContext) -> None:
        super().__init__(objects, capacity=context.capacity)
        self.context = context


class TornWrites(Correct):
    """Overwrites in place: the first half, then the second."""

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        for key, buffer in zip(keys, buffers, strict=True):
            old, new = self.objects.get(key), bytes(buffer)
            if old is not None and len(old) == len(new):
                self.objects[key] = new[: len(new) // 2] + old[len(new) // 2 :]
                sleep(0.0002)
        return super().put_from(keys, buffers)


class ClippedReads(Correct):
    """Reads up to 16 KiB, and says it was all."""

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results: list[Got] = []
        for key, buffer in zip(keys, buffers, strict=True):
            obj = self.objects.get(key)
            if obj is not None:
                buffer[: min(len(obj), 16 << 10)] = obj[: 16 << 10]
            results.append(None if obj is None else len(obj))
        return results


class ShortReads(Correct):
    """Returns what one read gave: never more than 16 KiB."""

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results: list[Got] = []
        for key, buffer in zip(keys, buffers, strict=True):
            obj = self.objects.get(key)
            part = None if obj is None else obj[: 16 << 10]
            if part is not None:
                buffer[: len(part)] = part
            results.append(None if part is None else len(part))
        return results


class LargeReadsClipped(Correct):
    """Receives once, at most 64 KiB, and says that it was all."""

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results: list[Got] = []
        for key, buffer in zip(keys, buffers, strict=True):
            obj = self.objects.get(key)
            if obj is not None:
                buffer[: min(len(obj), 64 << 10)] = obj[: 64 << 10]
            results.append(None if obj is None else len(obj))
        return results


class LargeValuesDropped(Correct):
    """Has a server that drops values over 1 MiB, and says nothing."""

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        results = super().put_from(keys, buffers)
        for key, buffer, result in zip(keys, buffers, results, strict=True):
            if result is None and buffer.nbytes > 1 << 20:
                del self.objects[key]
        return results


class LongObjectsAreErrors(Correct):
    """Says what the buffer says of an object that is longer: a bare error, again at every read."""

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results = super().get_into(keys, buffers)
        return [ValueError("too long") if isinstance(result, CorruptChunk) else result for result in results]


class LongObjectsSpoilTheBatch(Correct):
    """Lets the same error out of the call."""

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results = super().get_into(keys, buffers)
        for result in results:
            if isinstance(result, CorruptChunk):
                raise ValueError("too long")
        return results


class Overrun(Correct):
    """Uses the rest of the buffer as scratch."""

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results = super().get_into(keys, buffers)
        for buffer in buffers:
            buffer[-1] = 0
        return results


class Renamed(Correct):
    """Stores under a name that is made of the key."""

    @staticmethod
    def name(key: ChunkKey) -> ChunkKey:
        return key

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return super().contains([self.name(key) for key in keys])

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        return super().get_into([self.name(key) for key in keys], buffers)

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        return super().put_from([self.name(key) for key in keys], buffers)

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        super().delete([self.name(key) for key in keys])

    def scan(self) -> None:
        return None


class IdentityIgnored(Renamed):
    """Names objects by the tokens' half of the key: models and tenants share."""

    @staticmethod
    def name(key: ChunkKey) -> ChunkKey:
        return ChunkKey(key[IDENTITY_BYTES:])


class OtherMedium(Renamed):
    """Correct: keeps to the names that begin with its prefix, on a medium that it shares."""

    def __init__(self, objects: Objects, prefix: bytes, context: BuildContext) -> None:
        super().__init__(objects, context)
        self.prefix = prefix

    def name(self, key: ChunkKey) -> ChunkKey:  # type: ignore[override]
        return ChunkKey(self.prefix + key)

    def clear(self) -> None:
        self.delete([ChunkKey(name.removeprefix(self.prefix)) for name in self.objects if name.startswith(self.prefix)])


class PrefixIgnored(OtherMedium):
    """Reads its prefix from the settings, and forgets it."""

    def name(self, key: ChunkKey) -> ChunkKey:  # type: ignore[override]
        return key


class ShortNames(Renamed):
    """Cuts names after 31 bytes."""

    @staticmethod
    def name(key: ChunkKey) -> ChunkKey:
        return ChunkKey(key[:31])


class CaseIgnored(Renamed):
    """Lives on a medium that does not tell `a` from `A`."""

    @staticmethod
    def name(key: ChunkKey) -> ChunkKey:
        return ChunkKey(key.lower())


class NulEndsNames(Renamed):
    """Hands keys to C as strings."""

    @staticmethod
    def name(key: ChunkKey) -> ChunkKey:
        return ChunkKey(key.split(b"\0")[0])


class PutBufferKept(Correct):
    """Stores the buffer itself, without a copy."""

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        self.objects.update(zip(keys, buffers, strict=True))  # type: ignore[arg-type]
        return [None] * len(keys)


class WrittenBehind(Correct):
    """Copies the buffer a little later, when the call has long returned."""

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        results = super().put_from(keys, buffers)
        kept = list(zip(keys, buffers, strict=True))

        def later() -> None:
            sleep(0.001)
            for key, buffer in kept:
                if key in self.objects:
                    self.objects[key] = bytes(buffer)

        threading.Thread(target=later, daemon=True).start()
        return results


class GetBufferKept(Correct):
    """Writes into the last call's buffers again."""

    kept: Sequence[memoryview] = ()

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        for buffer in self.kept:
            buffer[100] ^= 1
        self.kept = buffers
        return super().get_into(keys, buffers)


class ContainsEverything(Correct):
    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [True] * len(keys)


class ContainsNothing(Correct):
    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [False] * len(keys)


class ContainsByFilter(Correct):
    """Answers from a filter: True for one absent key in fifty."""

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [there or key[20] < 5 for key, there in zip(keys, super().contains(keys), strict=True)]


class ContainsOnce(Correct):
    """Remembers that a key was there, and never forgets it."""

    def __init__(self, objects: Objects, context: BuildContext) -> None:
        super().__init__(objects, context)
        self.seen: set[ChunkKey] = set()

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        self.seen.update(key for key, there in zip(keys, super().contains(keys), strict=True) if there)
        return [key in self.seen for key in keys]


class ContainsBackwards(Correct):
    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return super().contains(keys)[::-1]


class GetsBackwards(Correct):
    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        return super().get_into(keys, buffers)[::-1]


class GetsSorted(Correct):
    """Reads in the order of the medium, into buffers in the order of the call."""

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        return super().get_into(sorted(keys), buffers)


class FewResults(Correct):
    """Returns a result for each key that it found."""

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        return [result for result in super().get_into(keys, buffers) if result is not None]


class OneResultForAll(Correct):
    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        return super().put_from(keys, buffers)[:1]


class LazyResults(Correct):
    def contains(self, keys: Sequence[ChunkKey]) -> Any:
        return (key in self.objects for key in keys)


class TruthForSize(Correct):
    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> Any:
        return [result is not None for result in super().get_into(keys, buffers)]


class TwiceTakesAway(Correct):
    """Renames one temporary file for both, when a batch names a key twice: the second takes the first away."""

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        results = super().put_from(keys, buffers)
        for i, key in enumerate(keys):
            if key in keys[:i]:
                self.objects.pop(key, None)
        return results


class TwiceRaises(Correct):
    """Does the same, and hears of it."""

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        if len(set(keys)) < len(keys):
            raise FileNotFoundError(2, "was renamed already")
        return super().put_from(keys, buffers)


class PutOnce(Correct):
    """Refuses a key that it has."""

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        here = self.contains(keys)
        results = super().put_from(keys, buffers)
        return [FileExistsError(17) if there else result for there, result in zip(here, results, strict=True)]


class CountsPuts(Correct):
    """Counts objects where it should count keys."""

    puts = 0

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        self.puts += sum(key in self.objects for key in keys)
        return super().put_from(keys, buffers)

    def usage(self) -> Usage:
        usage = super().usage()
        return Usage(usage.objects + self.puts, usage.object_bytes, usage.allocated_bytes)


class PutAppends(Correct):
    """Opens for appending."""

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        for key, buffer in zip(keys, buffers, strict=True):
            self.objects[key] = self.objects.get(key, b"") + bytes(buffer)
        return [None] * len(keys)


class HangingGet(Correct):
    """Waits for an answer that never comes."""

    forever = threading.Event()

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        self.forever.wait(30)
        return super().get_into(keys, buffers)


class HangingContains(HangingGet):
    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        self.forever.wait(30)
        return super().contains(keys)

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        return Correct.get_into(self, keys, buffers)


class RoundedSizes(Correct):
    """Says how much room an object takes, not how long it is."""

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results = super().get_into(keys, buffers)
        return [round_up(result) if isinstance(result, int) else result for result in results]


class ScanRoundsSizes(Correct):
    def scan(self) -> Iterator[tuple[ChunkKey, int]]:
        return iter([(key, round_up(len(obj))) for key, obj in self.objects.items()])


class ScanMissesTheLast(Correct):
    """Lists what was there when the list was last written."""

    def scan(self) -> Iterator[tuple[ChunkKey, int]]:
        return iter([(key, len(obj)) for key, obj in self.objects.items()][:-1])


class ScanListsTwice(Correct):
    """Lists a page again when it turned over."""

    def scan(self) -> Iterator[tuple[ChunkKey, int]]:
        listed = [(key, len(obj)) for key, obj in self.objects.items()]
        return iter(listed[:4] + listed[3:])


class ScanListsAPage(Correct):
    """Lists what the service names in one answer."""

    def scan(self) -> Iterator[tuple[ChunkKey, int]]:
        return islice(super().scan() or iter(()), 1000)


class ClearsAPage(Correct):
    """Clears what the service names in one answer."""

    def clear(self) -> None:
        for key in list(self.objects)[:1000]:
            del self.objects[key]


class DeletesAFew(Correct):
    """Has a request that takes 32 names."""

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        super().delete(keys[:32])


class Layered(Correct):
    """Deletes by marks in front of the objects: what lies behind comes back when the marks are lost."""

    def __init__(self, objects: Objects, context: BuildContext) -> None:
        super().__init__(dict(objects), context)
        self.behind = objects

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        results = super().put_from(keys, buffers)
        self.behind.update((key, self.objects[key]) for key in keys if key in self.objects)
        return results


class DeletesReturn(Layered):
    """Deletes from its index, not from the medium."""

    def clear(self) -> None:
        super().clear()
        self.behind.clear()


class ClearReturns(Layered):
    """Clears its index, not the medium."""

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        super().delete(keys)
        for key in keys:
            self.behind.pop(key, None)


class OldVersionReturns(Correct):
    """Puts under a key that was deleted bring back what was deleted."""

    def __init__(self, objects: Objects, context: BuildContext) -> None:
        super().__init__(objects, context)
        self.trash: Objects = {}

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        self.trash.update((key, self.objects[key]) for key in keys if key in self.objects)
        super().delete(keys)

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        results = super().put_from(keys, buffers)
        self.objects.update((key, self.trash.pop(key)) for key in keys if key in self.trash)
        return results


class DeletesNothing(Correct):
    def delete(self, keys: Sequence[ChunkKey]) -> None:
        pass


class ClearsNothing(Correct):
    def clear(self) -> None:
        pass


class ForgetsAtClose(Correct):
    """Keeps objects in the process."""

    def close(self) -> None:
        self.objects.clear()


class SharedStaging(Correct):
    """Collects every object in one buffer, whichever thread it comes from."""

    staging: list[bytes]

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        self.staging = [bytes(buffer) for buffer in buffers]
        sleep(0.0002)  # what any I/O does to the GIL
        return super().put_from(keys, [memoryview(obj) for obj in self.staging[: len(keys)]])


class LostUpdates(Correct):
    """Reads the index, changes it, writes it back."""

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        index = dict(self.objects)
        index.update((key, bytes(buffer)) for key, buffer in zip(keys, buffers, strict=True))
        sleep(0.0002)
        self.objects.clear()
        self.objects.update(index)
        return [None] * len(keys)


class SizesApart(Correct):
    """Keeps bytes and sizes in two places: a reader in between gets new bytes of the old size."""

    def __init__(self, objects: Objects, context: BuildContext) -> None:
        super().__init__(objects, context)
        self.sizes = {key: len(obj) for key, obj in objects.items()}

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        results = super().put_from(keys, buffers)
        sleep(0.0002)
        self.sizes.update((key, buffer.nbytes) for key, buffer in zip(keys, buffers, strict=True))
        return results

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results = super().get_into(keys, buffers)
        return [self.sizes.get(k, r) if isinstance(r, int) else r for k, r in zip(keys, results, strict=True)]


class ThreadIndex(Correct):
    """Keeps an index for each thread, read when the thread first asks."""

    def __init__(self, objects: Objects, context: BuildContext) -> None:
        super().__init__(objects, context)
        self.own = threading.local()

    def index(self) -> Objects:
        if not hasattr(self.own, "index"):
            self.own.index = dict(self.objects)
        index: Objects = self.own.index
        return index

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [key in self.index() for key in keys]

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        return DictBackend(self.index()).get_into(keys, buffers)

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        index = self.index()
        results = super().put_from(keys, buffers)
        index.update((key, self.objects[key]) for key, result in zip(keys, results, strict=True) if result is None)
        return results

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        DictBackend(self.index()).delete(keys)
        super().delete(keys)

    def clear(self) -> None:
        self.index().clear()
        super().clear()


class ThreadReadCache(ThreadIndex):
    """Remembers for each thread what it read: what another thread deletes is served."""

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return Correct.contains(self, keys)

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        index = self.index()
        index.update((key, self.objects[key]) for key in keys if key in self.objects and key not in index)
        return super().get_into(keys, buffers)

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        for key in keys:
            self.index().pop(key, None)
        return Correct.put_from(self, keys, buffers)


class GilHog(Correct):
    """Calls a library that waits, without releasing the GIL."""

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        ctypes.PyDLL(None).usleep(50_000)
        return super().get_into(keys, buffers)


class LocalWaits(Correct):
    """Says that it answers from memory, and asks its medium."""

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        sleep(0.02)
        return super().contains(keys)


class RegisterRaises(Correct):
    """Has no use for memory, and says so by raising anything."""

    def register(self, region: Region) -> None:
        raise NotImplementedError


class RegisteredOnly(Correct):
    """Takes every buffer for a part of the registered region."""

    region: Region | None = None

    def register(self, region: Region) -> None:
        self.region = region

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        return super().put_from(keys, [self.inside(buffer) for buffer in buffers])

    def inside(self, buffer: memoryview) -> memoryview:
        if self.region is None:
            return buffer
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        at = (address - self.region.address) % (self.region.nbytes - buffer.nbytes)
        return self.region.view[at : at + buffer.nbytes]


class SwallowsErrors(Correct):
    """Logs what went wrong, and returns None."""

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        super().put_from(keys, buffers)
        return [None] * len(keys)


class EvictsByItself(Correct):
    """Makes room by forgetting what was stored first."""

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        while NoSpace in map(type, results := super().put_from(keys, buffers)):
            self.delete(list(self.objects)[:8])
        return results


class FullIsAnyError(Correct):
    """Returns the system's own error when it is full."""

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        return [OSError(28, "full") if isinstance(r, NoSpace) else r for r in super().put_from(keys, buffers)]


class RefusedIsStored(Correct):
    """Says NoSpace, and stores it all the same."""

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        results = super().put_from(keys, buffers)
        for key, buffer, result in zip(keys, buffers, results, strict=True):
            if isinstance(result, NoSpace):
                self.objects[key] = bytes(buffer)
        return results


class ChangesObjects(Correct):
    """Stamps the object in the caller's buffer, and stores what it was."""

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        results = super().put_from(keys, buffers)
        for buffer in buffers:
            buffer[3000] ^= 1
        return results


class SortsKeys(Correct):
    """Sorts the caller's list of keys."""

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        super().delete(keys)
        if isinstance(keys, list):
            keys.sort()


class RaisesOnAbsent(Correct):
    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        _ = [self.objects[key] for key in keys]
        return super().get_into(keys, buffers)


class AbsentIsAnError(Correct):
    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        return [KeyError("absent") if result is None else result for result in super().get_into(keys, buffers)]


class AbsentIsEmpty(Correct):
    """Zero bytes read are a result like any other."""

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        return [
            result or 0 if not isinstance(result, Exception) else result for result in super().get_into(keys, buffers)
        ]


class DeleteNeedsPresence(Correct):
    def delete(self, keys: Sequence[ChunkKey]) -> None:
        for key in keys:
            del self.objects[key]


class ClosesOnce(Correct):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise OSError(9, "Bad file descriptor")
        self.closed = True


class LeavesFilesOpen(Correct):
    """Opens a file that its `close` forgets."""

    left: ClassVar[list[BinaryIO]] = []
    """Closed by the tests in the end."""

    def __init__(self, objects: Objects, context: BuildContext) -> None:
        super().__init__(objects, context)
        self.left.append(open("/dev/null", "rb"))  # noqa: SIM115


class FailsNowAndThen(Correct):
    """Has a time-out that is too short for its medium."""

    calls = 0

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        self.calls += 1
        return [TimeoutError()] * len(keys) if self.calls % 3 == 0 else super().get_into(keys, buffers)


class CountsNothing(Correct):
    def usage(self) -> Usage:
        return Usage(0, 0, 0)


class SmallFootprint(Correct):
    def footprint(self, nbytes: int) -> int:
        return 1


@dataclass(frozen=True)
class Bug:
    """A backend with a bug, and what a kit must say of it."""

    build: Callable[[Objects, BuildContext], StorageBackend]
    contract: str
    """The contract it breaks."""


BUGS = {
    "torn writes": Bug(TornWrites, "whole objects"),
    "clipped reads": Bug(ClippedReads, "exact bytes"),
    "short reads": Bug(ShortReads, "exact sizes"),
    "large reads clipped": Bug(LargeReadsClipped, "exact bytes"),
    "large values dropped": Bug(LargeValuesDropped, "acknowledged puts"),
    "long objects are errors": Bug(LongObjectsAreErrors, "exact sizes"),
    "long objects spoil the batch": Bug(LongObjectsSpoilTheBatch, "results"),
    "overrun": Bug(Overrun, "exact bytes"),
    "ignored identity": Bug(IdentityIgnored, "whole keys"),
    "short names": Bug(ShortNames, "whole keys"),
    "case ignored": Bug(CaseIgnored, "whole keys"),
    "NUL ends names": Bug(NulEndsNames, "whole keys"),
    "put buffer kept": Bug(PutBufferKept, "lent buffers"),
    "written behind": Bug(WrittenBehind, "lent buffers"),
    "get buffer kept": Bug(GetBufferKept, "lent buffers"),
    "contains everything": Bug(ContainsEverything, "contains"),
    "contains nothing": Bug(ContainsNothing, "contains"),
    "contains by filter": Bug(ContainsByFilter, "contains"),
    "contains once": Bug(ContainsOnce, "delete"),
    "contains backwards": Bug(ContainsBackwards, "results"),
    "gets backwards": Bug(GetsBackwards, "results"),
    "gets sorted": Bug(GetsSorted, "results"),
    "few results": Bug(FewResults, "results"),
    "one result for all": Bug(OneResultForAll, "results"),
    "lazy results": Bug(LazyResults, "results"),
    "truth for size": Bug(TruthForSize, "results"),
    "twice takes away": Bug(TwiceTakesAway, "results"),
    "twice raises": Bug(TwiceRaises, "results"),
    "put once": Bug(PutOnce, "put again"),
    "counts puts": Bug(CountsPuts, "put again"),
    "put appends": Bug(PutAppends, "put again"),
    "hanging get": Bug(HangingGet, "deadline"),
    "hanging contains": Bug(HangingContains, "deadline"),
    "rounded sizes": Bug(RoundedSizes, "exact sizes"),
    "scan rounds sizes": Bug(ScanRoundsSizes, "scan"),
    "scan misses the last": Bug(ScanMissesTheLast, "scan"),
    "scan lists twice": Bug(ScanListsTwice, "scan"),
    "scan lists a page": Bug(ScanListsAPage, "scan"),
    "deletes return": Bug(DeletesReturn, "delete"),
    "old version returns": Bug(OldVersionReturns, "delete"),
    "deletes nothing": Bug(DeletesNothing, "delete"),
    "deletes a few": Bug(DeletesAFew, "delete"),
    "clear returns": Bug(ClearReturns, "clear"),
    "clears nothing": Bug(ClearsNothing, "clear"),
    "clears a page": Bug(ClearsAPage, "clear"),
    "forgets at close": Bug(ForgetsAtClose, "reopen"),
    "shared staging": Bug(SharedStaging, "threads"),
    "lost updates": Bug(LostUpdates, "threads"),
    "sizes apart": Bug(SizesApart, "whole objects"),
    "thread index": Bug(ThreadIndex, "threads"),
    "thread read cache": Bug(ThreadReadCache, "threads"),
    "local waits": Bug(LocalWaits, "contains"),
    "register raises": Bug(RegisterRaises, "errors"),
    "registered only": Bug(RegisteredOnly, "exact bytes"),
    "GIL hog": Bug(GilHog, "GIL"),
    "swallows errors": Bug(SwallowsErrors, "acknowledged puts"),
    "evicts by itself": Bug(EvictsByItself, "acknowledged puts"),
    "refused is stored": Bug(RefusedIsStored, "acknowledged puts"),
    "full is any error": Bug(FullIsAnyError, "capacity"),
    "changes objects": Bug(ChangesObjects, "inputs"),
    "sorts keys": Bug(SortsKeys, "inputs"),
    "raises on absent": Bug(RaisesOnAbsent, "absent keys"),
    "absent is an error": Bug(AbsentIsAnError, "absent keys"),
    "absent is empty": Bug(AbsentIsEmpty, "absent keys"),
    "delete needs presence": Bug(DeleteNeedsPresence, "absent keys"),
    "closes once": Bug(ClosesOnce, "close"),
    "leaves files open": Bug(LeavesFilesOpen, "close"),
    "fails now and then": Bug(FailsNowAndThen, "errors"),
    "counts nothing": Bug(CountsNothing, "books"),
    "small footprint": Bug(SmallFootprint, "books"),
}
