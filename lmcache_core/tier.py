"""One storage tier: a backend, perhaps a serde, its index and capacity, two lanes and two breakers.

`read`, `write`, `ask` and `forget` block and run on the tier's lanes; everything else is memory only. No backend error
leaves this module: each key gets a `MissReason`, and what was not what it claimed to be is quarantined once.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Literal, TypeVar

from lmcache_core import seal
from lmcache_core.errors import BackendError, CorruptChunk, NoSpace
from lmcache_core.lanes import Breaker, Lane
from lmcache_core.protocols import EvictionPolicy, Region, Serde, StorageBackend
from lmcache_core.slots import Slots
from lmcache_core.types import HEADER_BYTES, ChunkKey, MissReason, Usage, object_bytes, round_up

_T = TypeVar("_T")

Outcome = MissReason | None
"""None when a chunk was read or written, else why not."""

_RETRIES = 8
"""How often a put that found no space evicts a little more and tries again."""


class Staging:
    """A fixed pool of buffers for encoded objects, cut at start-up into an equal share for each lane thread."""

    def __init__(self, region: Region, buffer_bytes: int, threads: int) -> None:
        self.region = region
        count = region.nbytes // buffer_bytes
        self._share = count // threads
        self._free = [region.view[i * buffer_bytes : (i + 1) * buffer_bytes] for i in range(count)]
        self._lock = threading.Lock()

    def take(self, want: int) -> list[memoryview]:
        """Up to `want` buffers, at least one and at most a thread's share, so that no thread leaves another without."""
        count = min(want, self._share)
        with self._lock:
            taken = self._free[-count:]
            del self._free[-count:]
        if len(taken) < count or not taken:
            raise AssertionError(f"{count} staging buffers wanted, {len(taken)} left: a lane thread took two shares")
        return taken

    def give_back(self, buffers: Sequence[memoryview]) -> None:
        with self._lock:
            self._free.extend(buffers)


class StorageTier:
    """A medium outside memory, as the pipeline sees it."""

    def __init__(
        self,
        name: str,
        backend: StorageBackend,
        serde: Serde | None,
        policy: EvictionPolicy,
        slots: Slots,
        layout_id: bytes,
        *,
        write: Literal["through", "back", "never"],
        promote: bool,
        capacity: int | None,
        threads: int,
        queue: int,
        inflight: int,
        deadline: float,
        staging: Staging | None,
    ) -> None:
        self.name = name
        self.backend = backend
        self.write_mode = write
        self.promote = promote
        self.capacity = capacity
        self.threads = threads
        self.deadline = deadline
        self.codec = serde.codec if serde else seal.RAW_CODEC
        # What is read lands in slots that are taken already: memory itself bounds it.
        self.read_lane = Lane(f"{name}-read", threads, queue, slots.region.nbytes)
        self.write_lane = Lane(f"{name}-write", threads, queue, inflight)
        self.read_breaker = Breaker()
        self.write_breaker = Breaker()
        self.counts: Counter[str] = Counter()
        self._serde = serde
        self._slots = slots
        self._layout_id = layout_id
        self._staging = staging
        self._lock = threading.Lock()
        self._policy = policy
        self._index: dict[ChunkKey, int] | None = None
        self._used = 0
        self._pending = 0
        """Bytes that are being put and not in the index yet."""
        self._writing: set[ChunkKey] = set()
        self._epoch = 0
        found = backend.scan()
        if found is not None:
            self._index = {}
            for key, nbytes in found:
                self._enter([key], [backend.footprint(nbytes)])
            self.counts["recovered"] = len(self._index)
            self._delete(self._shrink(0))

    # -- index -----------------------------------------------------------------------------------------------
    def present(self, keys: Sequence[ChunkKey]) -> list[bool] | None:
        """Which keys the tier has; None when only the medium knows and it must be asked on the lane."""
        if self.paused:
            return [False] * len(keys)
        if self._index is not None:
            index = self._index
            return [key in index for key in keys]
        return self._contains(keys) if self.backend.contains_is_local else None

    @property
    def paused(self) -> bool:
        """Whether the breaker keeps everybody from reading now."""
        return self.read_breaker.open and not self.read_breaker.due

    def ask(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """Ask the medium which keys it has. Errors count as absent, and for the breaker."""
        before = self.counts["contains_errors"]
        present = self._contains(keys)
        self.read_breaker.record(MissReason.ERROR if self.counts["contains_errors"] > before else None)
        return present

    def has(self, key: ChunkKey) -> bool:
        """Whether the key is known to be stored, or is being written."""
        return key in self._writing or (self._index is not None and key in self._index)

    @property
    def used(self) -> int:
        """Bytes the tier's objects occupy on the medium, by its own books (0 without an index)."""
        return self._used

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        """Note a use, also when the chunks were served from a nearer tier."""
        if self._index is not None:
            with self._lock:
                self._policy.touch(keys)

    # -- blocking work, on the lanes -------------------------------------------------------------------------
    def read(self, keys: Sequence[ChunkKey], slots: Sequence[int]) -> list[Outcome]:
        """Fill each slot with its raw chunk, verified. Raw objects land in the slot with their header."""
        try:
            return self._read(keys, slots)
        except (Exception, SystemExit) as error:  # a plugin's surprise ends neither the lane's thread nor the request
            self._failed("read", error)
            return [MissReason.ERROR] * len(keys)

    def _read(self, keys: Sequence[ChunkKey], slots: Sequence[int]) -> list[Outcome]:
        if self._serde is None:
            views = [self._slots.view(slot) for slot in slots]
            outcomes = self._fetch(keys, views)
            for slot, outcome in zip(slots, outcomes, strict=True):
                self._slots.sealed[slot] = outcome is None
            return outcomes
        outcomes = []
        assert self._staging is not None
        buffers = self._staging.take(len(keys))
        try:
            for at in range(0, len(keys), len(buffers)):
                some = keys[at : at + len(buffers)]
                got = self._fetch(some, buffers[: len(some)], slots[at : at + len(buffers)])
                outcomes += got
        finally:
            self._staging.give_back(buffers)
        return outcomes

    @property
    def epoch(self) -> int:
        """Number of clears so far."""
        return self._epoch

    def write(self, keys: Sequence[ChunkKey], slots: Sequence[int], epoch: int) -> list[Outcome]:
        """Store the raw chunks of the slots, sealed. Keys already stored or being stored are left alone.

        `epoch` is the tier's when the write was asked for: what was cleared since then is not written.
        """
        with self._lock:
            new = [] if epoch != self._epoch else [i for i, key in enumerate(keys) if not self.has(key)]
            self._writing.update(keys[i] for i in new)
        outcomes: list[Outcome] = [None] * len(keys)
        try:
            if self._serde is None:
                views = [self._sealed(keys[i], slots[i]) for i in new]
                self._store(new, keys, views, outcomes)
            else:
                self._encode(new, keys, slots, outcomes)
        except (Exception, SystemExit) as error:  # as in `read`
            self._failed("write", error)
            outcomes = [MissReason.ERROR] * len(keys)
        finally:
            with self._lock:
                self._writing.difference_update(keys[i] for i in new)
                cleared = epoch != self._epoch
            if cleared:
                self.forget([keys[i] for i in new])
        return outcomes

    def forget(self, keys: Sequence[ChunkKey]) -> None:
        """Delete keys from the index and the medium."""
        self._leave(keys)
        self._delete(keys)

    def clear(self) -> None:
        """Delete everything, also what is being written. Raise what the backend raises; then nothing is forgotten."""
        with self._lock:
            self._epoch += 1
            gone = list(self._index or ())
        self.backend.clear()
        self._leave(gone)

    def close(self, timeout: float) -> None:
        """Stop the lanes, then the backend, unless a thread is still inside it."""
        ended = self.write_lane.close(timeout)
        if self.read_lane.close(timeout) and ended:
            self.backend.close()

    # -- reading ---------------------------------------------------------------------------------------------
    def _fetch(
        self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview], into: Sequence[int] | None = None
    ) -> list[Outcome]:
        try:
            results = _all(keys, self.backend.get_into(keys, buffers))
        except Exception as error:
            self._failed("get", error)
            return [MissReason.ERROR] * len(keys)
        outcomes: list[Outcome] = []
        for i, (key, buffer, got) in enumerate(zip(keys, buffers, results, strict=True)):
            if got is None:
                outcomes.append(MissReason.RACED if self._leave([key]) else MissReason.NOT_STORED)
            elif isinstance(got, CorruptChunk):
                outcomes.append(self._quarantine(key, got))
            elif not isinstance(got, int):
                self._failed("get", got)
                outcomes.append(MissReason.ERROR)
            else:
                try:
                    self._open(key, buffer[:got], None if into is None else self._slots.payload(into[i]))
                except CorruptChunk as error:
                    outcomes.append(self._quarantine(key, error))
                else:
                    self.count("read_bytes", got)
                    outcomes.append(None)
        return outcomes

    def _open(self, key: ChunkKey, obj: memoryview, payload: memoryview | None) -> None:
        chunk_bytes = self._slots.chunk_bytes
        head = seal.unseal(obj, key, self._layout_id, self.codec, chunk_bytes)
        if payload is None:
            if head.stored_bytes != chunk_bytes:
                raise CorruptChunk(
                    MissReason.CORRUPT, f"raw chunk of {head.stored_bytes} bytes, expected {chunk_bytes}"
                )
            return
        assert self._serde is not None
        try:
            self._serde.decode([obj[HEADER_BYTES:]], [payload])
        except CorruptChunk:
            raise
        except Exception as error:
            # A serde's own surprise on bytes it wrote is a defect of the object as far as a reader can tell.
            raise CorruptChunk(MissReason.CORRUPT, f"{type(error).__name__} while decoding: {error}") from error

    def _quarantine(self, key: ChunkKey, error: CorruptChunk) -> MissReason:
        """Never serve this object again, and never look at it again."""
        reason = MissReason(error.reason) if error.reason in set(MissReason) else MissReason.CORRUPT
        with self._lock:
            self.counts["quarantined"] += 1
            self.counts[f"quarantined_{reason}"] += 1
        self.forget([key])
        return reason

    # -- writing ---------------------------------------------------------------------------------------------
    def _sealed(self, key: ChunkKey, slot: int) -> memoryview:
        """The slot as a sealed raw object. Two tiers may do this at once: they write the same bytes."""
        view = self._slots.view(slot, object_bytes(self._slots.chunk_bytes))
        if not self._slots.sealed[slot]:
            size = self._slots.chunk_bytes
            seal.seal(view, key, self._layout_id, seal.RAW_CODEC, size, size, self._slots.created[slot])
            self._slots.sealed[slot] = 1
        return view

    def _encode(
        self, new: Sequence[int], keys: Sequence[ChunkKey], slots: Sequence[int], outcomes: list[Outcome]
    ) -> None:
        assert self._serde is not None and self._staging is not None
        if not new:
            return
        buffers = self._staging.take(len(new))
        bound = self._serde.bound()
        try:
            for at in range(0, len(new), len(buffers)):
                some = new[at : at + len(buffers)]
                bodies = [buffer[HEADER_BYTES : HEADER_BYTES + bound] for buffer in buffers[: len(some)]]
                try:
                    sizes = _all(some, self._serde.encode([self._slots.payload(slots[i]) for i in some], bodies))
                    if not all(0 <= size <= len(body) for size, body in zip(sizes, bodies, strict=True)):
                        raise BackendError(f"encoded into {sizes} bytes, the bound of {self.codec} is {bound}")
                except Exception as error:
                    self._failed("encode", error)
                    for i in some:
                        outcomes[i] = MissReason.ERROR
                    continue
                views = []
                for i, buffer, size in zip(some, buffers[: len(some)], sizes, strict=True):
                    obj = buffer[: object_bytes(size)]
                    created = self._slots.created[slots[i]]
                    seal.seal(obj, keys[i], self._layout_id, self.codec, self._slots.chunk_bytes, size, created)
                    views.append(obj)
                self._store(some, keys, views, outcomes)
        finally:
            self._staging.give_back(buffers)

    def _store(
        self, new: Sequence[int], keys: Sequence[ChunkKey], views: Sequence[memoryview], outcomes: list[Outcome]
    ) -> None:
        """Put, evicting as needed; an object enters the index only after the backend said that it is stored."""
        todo = list(zip(new, views, strict=True))
        for attempt in range(_RETRIES + 1):
            if not todo:
                return
            sizes = [self.backend.footprint(len(view)) for _, view in todo]
            with self._lock:
                victims = self._shrink(sum(sizes), spare=attempt)
                # What does not fit even now (a batch larger than the tier, or other writers' bytes) is not written.
                fits = self._fitting(sizes)
                charge = sum(sizes[:fits])
                self._pending += charge
            try:
                self._delete(victims)
                for i, _ in todo[fits:]:
                    outcomes[i] = MissReason.NO_ROOM
                if attempt and not victims:
                    break
                todo = self._put(todo[:fits], keys, sizes[:fits], outcomes) if fits else []
            finally:
                with self._lock:
                    self._pending -= charge
            if self._index is None:
                break
        for i, _ in todo:
            outcomes[i] = MissReason.NO_ROOM

    def _put(
        self,
        todo: Sequence[tuple[int, memoryview]],
        keys: Sequence[ChunkKey],
        sizes: Sequence[int],
        outcomes: list[Outcome],
    ) -> list[tuple[int, memoryview]]:
        """Put once; return what found no space."""
        batch = [keys[i] for i, _ in todo]
        try:
            results = _all(batch, self.backend.put_from(batch, [view for _, view in todo]))
        except Exception as error:
            results = [error] * len(todo)
        again: list[tuple[int, memoryview]] = []
        stored: list[ChunkKey] = []
        charged: list[int] = []
        written = 0
        for (i, view), size, result in zip(todo, sizes, results, strict=True):
            if result is None:
                stored.append(keys[i])
                charged.append(size)
                written += len(view)
            elif isinstance(result, NoSpace):
                again.append((i, view))
            else:
                self._failed("put", result)
                outcomes[i] = MissReason.ERROR
        with self._lock:
            self._enter(stored, charged)
            self.counts["written_bytes"] += written
        return again

    def _fitting(self, sizes: Sequence[int]) -> int:
        """How many objects of these sizes, from the first on, fit beside what is stored and being put. Lock held."""
        if self._index is None or self.capacity is None:
            return len(sizes)
        room = self.capacity - self._used - self._pending
        for count, size in enumerate(sizes):
            room -= size
            if room < 0:
                return count
        return len(sizes)

    def _shrink(self, need: int, spare: int = 0) -> list[ChunkKey]:
        """Take the coldest keys, at least `spare`, out of the index until `need` more bytes fit. Lock held."""
        if self._index is None:
            return []
        over = self._used + self._pending + need - self.capacity if self.capacity is not None else 0
        victims: list[ChunkKey] = []
        freed = 0
        for key in islice(self._policy.coldest(), len(self._index)):
            if freed >= over and len(victims) >= spare:
                break
            victims.append(key)
            freed += self._index[key]
        for key in victims:
            self._used -= self._index.pop(key)
            self._policy.remove(key)
        self.counts["evicted"] += len(victims)
        return victims

    def _delete(self, keys: Sequence[ChunkKey]) -> None:
        if keys:
            try:
                self.backend.delete(keys)
            except (Exception, SystemExit) as error:
                self._failed("delete", error)

    # -- books -----------------------------------------------------------------------------------------------
    def _enter(self, keys: Sequence[ChunkKey], sizes: Sequence[int]) -> None:
        if self._index is not None:
            for key, nbytes in zip(keys, sizes, strict=True):
                self._used += nbytes - self._index.get(key, 0)
                self._index[key] = nbytes
            self._policy.add(keys)

    def _leave(self, keys: Sequence[ChunkKey]) -> bool:
        """Take keys out of the index; whether any was in it."""
        if self._index is None:
            return False
        any_left = False
        with self._lock:
            for key in keys:
                nbytes = self._index.pop(key, None)
                if nbytes is not None:
                    any_left = True
                    self._used -= nbytes
                    self._policy.remove(key)
        return any_left

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter; several threads count at once."""
        with self._lock:
            self.counts[name] += by

    def _contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        try:
            return _all(keys, self.backend.contains(keys))
        except (Exception, SystemExit) as error:
            self._failed("contains", error)
            return [False] * len(keys)

    def usage(self) -> Usage | None:
        """What the medium holds, or None when it cannot say."""
        try:
            return self.backend.usage()
        except (Exception, SystemExit) as error:
            self._failed("usage", error)
            return None

    def _failed(self, operation: str, error: object) -> None:
        with self._lock:
            self.counts[f"{operation}_errors"] += 1
        self.last_error = f"{operation}: {type(error).__name__}: {error}" if str(error) else f"{operation}: {error!r}"

    last_error: str = ""
    """The latest error of the backend, for `stats()` and people."""

    def check(self) -> None:
        """Raise `AssertionError` when index, policy and usage disagree. Call when nothing is being written."""
        if self._index is None:
            return
        with self._lock:
            assert not self._pending, f"tier {self.name}: {self._pending} bytes charged for puts that ended"
            total = sum(self._index.values())
            assert self._used == total, f"tier {self.name}: {self._used} bytes in the books, {total} in the index"
            assert set(self._policy.coldest()) == self._index.keys(), f"tier {self.name}: policy and index disagree"
            if self.capacity is not None:
                assert total <= self.capacity, f"tier {self.name}: {total} bytes over its capacity {self.capacity}"


def _all(keys: Sequence[object], results: list[_T]) -> list[_T]:
    """The results, if there is one for each key: anything else would attach outcomes to the wrong chunks."""
    if len(results) != len(keys):
        raise BackendError(f"{len(results)} results for {len(keys)} keys: a backend returns exactly one for each")
    return results


def staging_buffer_bytes(serde: Serde) -> int:
    """Room for one sealed, encoded object, page aligned."""
    return round_up(HEADER_BYTES + serde.bound())
