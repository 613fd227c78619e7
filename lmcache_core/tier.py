"""One storage tier: a backend, perhaps a serde, its index and capacity; a lane and a breaker for each operation.

`read`, `write`, `ask` and `wipe` block and run on threads of the tier; everything else is memory only. No backend error
leaves this module: each key gets a `MissReason`, and what was not what it claimed to be is quarantined once.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from math import inf
from time import monotonic
from typing import Any, Literal, TypeVar

from lmcache_core import seal
from lmcache_core.cost import ReadSpeed
from lmcache_core.errors import BackendError, CorruptChunk, NoSpace
from lmcache_core.lanes import Breaker, Lane
from lmcache_core.protocols import EvictionPolicy, Region, Serde, StorageBackend
from lmcache_core.slots import Slots
from lmcache_core.tenancy import Share, Shares
from lmcache_core.types import HEADER_BYTES, ChunkKey, Got, MissReason, object_bytes, round_up

_T = TypeVar("_T")

Outcome = MissReason | None
"""None when a chunk was read or written, else why not."""

PLUGIN_ERRORS = (Exception, SystemExit)
"""What a plugin may raise without taking anything else with it."""

_RETRIES = 8
"""How often a put that found no space evicts a little more and tries again."""

_MESSAGE_CHARS = 500

ASK_THREADS = 2
"""Threads that ask a medium what it has: a second one, so that a question that hangs does not stop the next."""


class Staging:
    """A fixed pool of buffers for encoded objects, cut at start-up into an equal share for each lane thread."""

    def __init__(self, region: Region, buffer_bytes: int, threads: int) -> None:
        self.region = region
        count = region.nbytes // buffer_bytes
        self._share = count // threads
        self._free = [region.view[i * buffer_bytes : (i + 1) * buffer_bytes] for i in range(count)]
        self._lock = threading.Lock()

    def take(self, want: int) -> list[memoryview]:
        """Buffers for one thread: `want`, at most its share."""
        with self._lock:
            taken = [self._free.pop() for _ in range(min(want, self._share))]
        if not taken:
            raise AssertionError("staging has no buffer for each lane thread")
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
        lookup_deadline: float,
        staging: Staging | None,
    ) -> None:
        """`inflight`: bytes of queued and running writes, which pin their slots. Reads are bounded by memory itself.

        Raise what the backend's `scan` and `footprint` raise; then no thread is left behind.
        """
        self.name = name
        self.backend = backend
        self.write_mode = write
        self.promote = promote
        self.capacity = capacity
        self.threads = threads
        self.deadline = deadline
        # Half the time at most for asking: what was found, here or elsewhere, must still be read.
        self.lookup_deadline = min(lookup_deadline, deadline / 2)
        self.codec = serde.codec if serde else seal.RAW_CODEC
        self.target = inf
        """Seconds in which a prefix should be here, for a tier that can do something about it."""
        self.epoch = 0
        """Raised by every clear: work that was asked for before is void."""
        self.counts: Counter[str] = Counter()
        self.speed = ReadSpeed(threads)
        self._serde = serde
        self._slots = slots
        self._layout_id = layout_id
        self._staging = staging
        self._lock = threading.Lock()
        self.policy = policy
        self.shares = policy if isinstance(policy, Shares) else None
        """Whose the objects are, where tenants have quotas; counted in bytes of the index."""
        if self.shares is not None:
            self.shares.size_of = lambda key: 0 if self._index is None else self._index.get(key, 0)
        self._index: dict[ChunkKey, int] | None = None
        self._used = 0
        self._held = 0
        """Bytes set aside: objects being written, and evicted ones that the medium may still hold."""
        self._writing: set[ChunkKey] = set()
        self._deleting: dict[ChunkKey, int] = {}
        """Out of the index, not yet off the medium, with their bytes. Not written again before they are gone."""
        self._undeleted: dict[ChunkKey, int] = {}
        """Those the medium refused to delete; tried again with the next deletion."""
        self._wiping = False
        self._wipe_lock = threading.Lock()
        found = backend.scan()
        if found is None:
            self.shares = None  # the medium keeps its own books
        else:
            self._index = {}
            for key, nbytes in found:
                self._enter([key], [backend.footprint(nbytes)])
            self.counts["recovered"] = len(self._index)
            if capacity is not None and self._used > capacity:
                gone = self._evict(self._used - capacity, 0, ())
                if gone:
                    self._delete(gone)
        # Threads last: whatever fails above leaves none behind.
        self.ask_breaker = Breaker(2 * self.lookup_deadline)
        self.read_lane = Lane(f"{name}-read", threads, queue, slots.region.nbytes, deadline, Breaker(2 * deadline))
        inflight = max(inflight, slots.slot_bytes)
        self.write_lane = Lane(f"{name}-write", threads, queue, inflight, deadline, Breaker(2 * deadline))
        self.ask_lane: Lane | None = None
        """For a medium that must be asked; threads of its own, so that no question waits for a long read."""
        self.lanes = [self.read_lane, self.write_lane]
        """Each may give work to the next."""
        if self._index is None and not backend.contains_is_local:
            self.ask_lane = Lane(f"{name}-ask", ASK_THREADS, queue, 1, self.lookup_deadline, self.ask_breaker)
            self.lanes.insert(0, self.ask_lane)

    # -- index -----------------------------------------------------------------------------------------------
    def present(self, keys: Sequence[ChunkKey]) -> list[bool] | MissReason | None:
        """Which keys the tier has; why it cannot be asked; None when it must be asked on the lane."""
        if self._wiping:
            return [False] * len(keys)
        if self.read_lane.breaker.refuses or self.ask_breaker.refuses:
            return MissReason.BREAKER
        if self._index is not None:
            index = self._index
            return [key in index for key in keys]
        if not self.backend.contains_is_local:
            return None
        if not self.ask_breaker.allow():
            return MissReason.BREAKER
        answer = self.ask(keys)
        self.ask_breaker.record(answer if isinstance(answer, MissReason) else None)
        return answer

    def ask(self, keys: Sequence[ChunkKey]) -> list[bool] | MissReason:
        """Ask the medium which keys it has."""
        try:
            return list(_all(keys, self.backend.contains(keys)))
        except PLUGIN_ERRORS as error:
            self._failed("contains", error)
            return MissReason.ERROR

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
                self.policy.touch(keys)

    # -- blocking work, on the lanes -------------------------------------------------------------------------
    def read(self, keys: Sequence[ChunkKey], slots: Sequence[int], goal: float = inf) -> list[Outcome]:
        """Fill each slot with its raw chunk, verified. Raw objects land in the slot with their header.

        `goal`: when (`monotonic()`) whoever waits would like to have them; only a tier with a choice heeds it.
        """
        outcomes: list[Outcome] = []
        try:
            if self._serde is None:
                outcomes = self._fetch(keys, [self._slots.view(slot) for slot in slots])
                for slot, outcome in zip(slots, outcomes, strict=True):
                    self._slots.sealed[slot] = outcome is None
                return outcomes
            assert self._staging is not None
            buffers = self._staging.take(len(keys))
            try:
                while len(outcomes) < len(keys):
                    at = len(outcomes)
                    outcomes += self._read_some(keys[at:], slots[at:], buffers, goal)
            finally:
                self._staging.give_back(buffers)
        except PLUGIN_ERRORS as error:
            self._failed("read", error)
            outcomes += [MissReason.ERROR] * (len(keys) - len(outcomes))
        return outcomes

    def write(
        self,
        keys: Sequence[ChunkKey],
        slots: Sequence[int],
        epoch: int | None = None,
        chain: Sequence[ChunkKey] = (),
    ) -> list[Outcome]:
        """Store the raw chunks of the slots, sealed. Keys already stored or being stored are left alone.

        Nothing is stored when the tier was cleared since it had `epoch`. `chain`: the whole prefix the keys belong to,
        so that eviction knows which are the deeper ones.
        """
        chain = chain or keys
        with self._lock:
            epoch = self.epoch if epoch is None else epoch
            if self._wiping or epoch != self.epoch:
                return [MissReason.RACED] * len(keys)
            outcomes: list[Outcome] = [MissReason.RACED if key in self._deleting else None for key in keys]
            new = [i for i, key in enumerate(keys) if outcomes[i] is None and not self.has(key)]
            mine = [keys[i] for i in new]
            self._writing.update(mine)
        for i in new:
            outcomes[i] = MissReason.ERROR
        try:
            if self._serde is None:
                self._store([(i, self._sealed(keys[i], slots[i])) for i in new], keys, outcomes, epoch, chain)
            else:
                self._encode(self._serde, new, keys, slots, outcomes, epoch, chain)
        except PLUGIN_ERRORS as error:
            self._failed("write", error)
        finally:
            if mine and epoch != self.epoch:
                # Cleared meanwhile, so nothing was entered; what reached the medium after its own clear goes now.
                self._medium_delete(mine)
            with self._lock:
                self._writing.difference_update(mine)
                if self._index is not None:
                    self.policy.touch(chain)
        return outcomes

    # -- clearing --------------------------------------------------------------------------------------------
    def begin_wipe(self) -> None:
        """Forget everything, at once. The tier takes and serves nothing until `wipe` has cleared the medium."""
        with self._lock:
            self.epoch += 1
            self._wiping = True
            if self._index is not None:
                for key in self._index:
                    self.policy.remove(key)
                self._index = {}
                self._used = 0
                for share in self.shares or ():
                    share.used = 0

    def wipe(self) -> None:
        """Clear the medium after `begin_wipe`. If that fails, the tier stays out of service until a later clear."""
        with self._wipe_lock:
            if not self._wiping:
                return
            try:
                self.backend.clear()
            except PLUGIN_ERRORS as error:
                self._failed("clear", error)
                return
            with self._lock:
                self._wiping = False
                self._deleted(self._undeleted)
                self._undeleted = {}

    @property
    def wiping(self) -> bool:
        """Whether the tier is out of service because a clear has not ended, or failed."""
        return self._wiping

    # -- life ------------------------------------------------------------------------------------------------
    def sweep(self) -> None:
        """Give up on overdue work of every lane. Called with no lock held."""
        for lane in self.lanes:
            lane.sweep()

    def drain(self, timeout: float) -> bool:
        """Wait until no lane has work; False when that took longer than `timeout` seconds."""
        end = monotonic() + timeout
        return all(lane.drain(max(0.0, end - monotonic())) for lane in self.lanes)

    def stop(self) -> None:
        """Take no more work; cancel what has not begun. Does not wait."""
        for lane in self.lanes:
            lane.stop()

    def close(self, timeout: float) -> bool:
        """Stop the lanes, then close the backend; blocks as long as its `close` does.

        False, and the backend stays open, when a thread is still inside it after `timeout` seconds.
        """
        end = monotonic() + timeout
        self.stop()
        ended = [lane.join(max(0.0, end - monotonic())) for lane in self.lanes]
        if not all(ended):
            return False
        try:
            self.backend.close()
        except PLUGIN_ERRORS as error:
            self._failed("close", error)
        return True

    # -- reading ---------------------------------------------------------------------------------------------
    def _read_some(
        self, keys: Sequence[ChunkKey], slots: Sequence[int], buffers: Sequence[memoryview], goal: float
    ) -> list[Outcome]:
        """Read and decode the first of the keys, as many as there are buffers."""
        return self._fetch(keys[: len(buffers)], buffers[: len(keys)], slots[: len(buffers)], self._serde)

    def _fetch(
        self,
        keys: Sequence[ChunkKey],
        buffers: Sequence[memoryview],
        into: Sequence[int] = (),
        serde: Serde | None = None,
    ) -> list[Outcome]:
        """Read objects; with a serde, decode them into the slots `into`."""
        try:
            results = _all(keys, self._get(keys, buffers))
        except PLUGIN_ERRORS as error:
            self._failed("get", error)
            return [MissReason.ERROR] * len(keys)
        outcomes: list[Outcome] = []
        for i, (key, buffer, got) in enumerate(zip(keys, buffers, results, strict=True)):
            if got is None:
                # It was there when it was located.
                if self._index is not None:
                    self.forget([key])
                outcomes.append(MissReason.RACED)
            elif isinstance(got, CorruptChunk):
                outcomes.append(self._quarantine(key, got))
            elif isinstance(got, Exception):
                self._failed("get", got)
                outcomes.append(MissReason.ERROR)
            elif not isinstance(got, int) or not 0 <= got <= len(buffer):
                self._failed("get", BackendError(f"get_into returned {got!r} for a buffer of {len(buffer)} bytes"))
                outcomes.append(MissReason.ERROR)
            else:
                try:
                    self._open(key, buffer[:got], serde, self._slots.payload(into[i]) if serde else None)
                except CorruptChunk as error:
                    outcomes.append(self._quarantine(key, error))
                else:
                    self.count("read_bytes", got)
                    outcomes.append(None)
        return outcomes

    def _get(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        return self.backend.get_into(keys, buffers)

    def _open(self, key: ChunkKey, obj: memoryview, serde: Serde | None, payload: memoryview | None) -> None:
        chunk_bytes = self._slots.chunk_bytes
        head = seal.unseal(obj, key, self._layout_id, serde.codec if serde else seal.RAW_CODEC, chunk_bytes)
        if serde is None or payload is None:
            if head.stored_bytes != chunk_bytes:
                raise CorruptChunk(
                    MissReason.CORRUPT, f"raw chunk of {head.stored_bytes} bytes, expected {chunk_bytes}"
                )
            return
        try:
            serde.decode([obj[HEADER_BYTES:]], [payload])
        except CorruptChunk:
            raise
        except PLUGIN_ERRORS as error:
            # A serde's own surprise on bytes it wrote is a defect of the object as far as a reader can tell.
            raise CorruptChunk(MissReason.CORRUPT, f"{type(error).__name__} while decoding: {error}") from error

    def _quarantine(self, key: ChunkKey, error: CorruptChunk) -> MissReason:
        """Never serve this object again, and never look at it again."""
        known = error.reason in MissReason.__members__.values()
        reason = MissReason(error.reason) if known else MissReason.CORRUPT
        if self.forget([key]):
            with self._lock:
                self.counts["quarantined"] += 1
                self.counts[f"quarantined_{reason}"] += 1
        return reason

    def forget(self, keys: Sequence[ChunkKey]) -> int:
        """Delete keys from the index and the medium; how many nobody else had deleted or was deleting."""
        with self._lock:
            if self._index is None:
                gone = dict.fromkeys((key for key in keys if key not in self._deleting), 0)
                self._deleting.update(gone)
            else:
                gone = self._take_out([key for key in keys if key in self._index])
        if gone:
            self._delete(gone)
        return len(gone)

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
        self,
        serde: Serde,
        new: Sequence[int],
        keys: Sequence[ChunkKey],
        slots: Sequence[int],
        outcomes: list[Outcome],
        epoch: int,
        chain: Sequence[ChunkKey],
    ) -> None:
        assert self._staging is not None
        if not new:
            return
        bound = serde.bound()
        buffers = self._staging.take(len(new))
        try:
            for at in range(0, len(new), len(buffers)):
                some = new[at : at + len(buffers)]
                bodies = [buffer[HEADER_BYTES : HEADER_BYTES + bound] for buffer in buffers[: len(some)]]
                try:
                    chunks = [self._slots.payload(slots[i]) for i in some]
                    starts = [self._slots.starts[slots[i]] for i in some]
                    sizes = _all(some, serde.encode(chunks, bodies, starts))
                    if not all(0 <= size <= bound for size in sizes):
                        raise BackendError(f"serde {serde.codec}: sizes {sizes} are not within its bound of {bound}")
                except PLUGIN_ERRORS as error:
                    self._failed("encode", error)
                    continue
                views = []
                for i, buffer, size in zip(some, buffers, sizes, strict=False):
                    obj = buffer[: object_bytes(size)]
                    created = self._slots.created[slots[i]]
                    seal.seal(obj, keys[i], self._layout_id, serde.codec, self._slots.chunk_bytes, size, created)
                    views.append((i, obj))
                self._store(views, keys, outcomes, epoch, chain)
        finally:
            self._staging.give_back(buffers)

    def _store(
        self,
        todo: list[tuple[int, memoryview]],
        keys: Sequence[ChunkKey],
        outcomes: list[Outcome],
        epoch: int,
        chain: Sequence[ChunkKey],
    ) -> None:
        """Put objects in parts of at most a quarter of the tier, so that its threads do not take each other's room.

        With quotas, the same holds for each tenant's part of it, and a part is one tenant's.
        """
        part = quarter = None if self.capacity is None or self._index is None else self.capacity // 4
        if self.shares is not None:
            with self._lock:
                owners = {i: self.shares.of(keys[i]) for i, _ in todo}
            order = {id(share): n for n, share in enumerate(owners.values())}
            todo.sort(key=lambda entry: order[id(owners[entry[0]])])
        at = 0
        while at < len(todo):
            need, end = 0, at
            while end < len(todo):
                size = self.backend.footprint(len(todo[end][1]))
                if self.shares is not None:
                    share = owners[todo[end][0]]
                    if share is not owners[todo[at][0]]:
                        break
                    part = quarter if share.quota is None else share.quota // 4
                if part is not None and end > at and need + size > part:
                    break
                need, end = need + size, end + 1
            self._put(todo[at:end], keys, outcomes, epoch, chain)
            at = end

    def _put(
        self,
        todo: list[tuple[int, memoryview]],
        keys: Sequence[ChunkKey],
        outcomes: list[Outcome],
        epoch: int,
        chain: Sequence[ChunkKey],
    ) -> None:
        """Put, evicting as needed; an object enters the index only after the backend said that it is stored."""
        for attempt in range(_RETRIES + 1):
            if not todo:
                return
            sizes = [self.backend.footprint(len(view)) for _, view in todo]
            need = sum(sizes)
            with self._lock:
                first = keys[todo[0][0]]
                share = None if self.shares is None else self.shares.of(first)
                victims = self._make_room(need, attempt, chain, share)
                if victims is None or (attempt and not victims):
                    break
                # What is written takes the place of what was evicted for it: those bytes are set aside once.
                reused = min(need, sum(victims.values()))
                held = need - reused
                self._held += held
                if share is not None:
                    share.writing += need
            try:
                if victims:
                    if not self._delete(victims, keep=reused):
                        return
                    held = need
                todo = self._put_once(todo, sizes, keys, outcomes, epoch)
            finally:
                with self._lock:
                    self._held -= held
                    if self.shares is not None:
                        self.shares.of(first).writing -= need  # a tenant may have claimed it meanwhile
            if self._index is None:
                break
        if todo and self._undeleted:
            self._delete({})
        if victims is None and len(todo) > 1:
            # Not all together; perhaps the first of them.
            half = len(todo) // 2
            self._put(todo[:half], keys, outcomes, epoch, chain)
            self._put(todo[half:], keys, outcomes, epoch, chain)
            return
        for i, _ in todo:
            outcomes[i] = MissReason.NO_ROOM

    def _put_once(
        self,
        todo: list[tuple[int, memoryview]],
        sizes: Sequence[int],
        keys: Sequence[ChunkKey],
        outcomes: list[Outcome],
        epoch: int,
    ) -> list[tuple[int, memoryview]]:
        """One put; returns what found no space."""
        batch = [keys[i] for i, _ in todo]
        try:
            results: Sequence[object] = _all(batch, self.backend.put_from(batch, [view for _, view in todo]))
        except NoSpace:
            return todo
        except PLUGIN_ERRORS as error:
            self._failed("put", error)
            if self._index is not None:
                self._medium_delete(batch)  # some may be there, outside the books
            return []
        again: list[tuple[int, memoryview]] = []
        stored: list[int] = []
        doubtful: list[ChunkKey] = []
        for at, (entry, result) in enumerate(zip(todo, results, strict=True)):
            if result is None:
                stored.append(at)
                outcomes[entry[0]] = None
            elif isinstance(result, NoSpace):
                again.append(entry)
            else:
                self._failed("put", result if isinstance(result, Exception) else BackendError(f"put_from: {result!r}"))
                doubtful.append(batch[at])
        if doubtful and self._index is not None:
            self._medium_delete(doubtful)  # stored after all, perhaps, and only the answer was lost
        with self._lock:
            if epoch == self.epoch:
                self._enter([batch[at] for at in stored], [sizes[at] for at in stored])
            self.counts["written"] += len(stored)
            self.counts["written_bytes"] += sum(len(todo[at][1]) for at in stored)
        return again

    # -- room ------------------------------------------------------------------------------------------------
    def _make_room(
        self, need: int, spare: int, chain: Sequence[ChunkKey], share: Share | None
    ) -> dict[ChunkKey, int] | None:
        """Evict until `need` more bytes of `share` fit, at least `spare` keys; None when they never will. Lock held."""
        if self._index is None:
            return {}
        over = 0 if self.capacity is None else self._used + self._held + need - self.capacity
        if share is None or share.over(need) <= 0:
            return self._evict(over, spare, chain)
        own = self._coldest(share.policy, share.over(need), 0, chain, {})
        if own is None:
            return None
        left = self._coldest(self.policy, over - sum(own.values()), spare - len(own), chain, own)
        return None if left is None else self._evicted([*own, *left])

    def _evict(self, over: int, spare: int, chain: Sequence[ChunkKey]) -> dict[ChunkKey, int] | None:
        """Take the coldest keys, of `over` bytes or more, out of the index; None when it has not so many. Lock held."""
        victims = self._coldest(self.policy, over, spare, chain, {})
        return None if victims is None else self._evicted(list(victims))

    def _coldest(
        self,
        policy: EvictionPolicy,
        over: int,
        spare: int,
        chain: Sequence[ChunkKey],
        beside: dict[ChunkKey, int],
    ) -> dict[ChunkKey, int] | None:
        """The coldest keys of `over` bytes or more, at least `spare`, and not those `beside`; None when there are too
        few. Lock held.

        `chain` stays: a prefix that evicted its own beginning could never be used.
        """
        assert self._index is not None
        if over > self._used:
            return None
        victims: dict[ChunkKey, int] = {}
        freed = 0
        if over > 0 or spare > 0:
            own = set(chain)
            for key in policy.coldest():
                if key in own or key in beside:
                    continue
                victims[key] = self._index[key]
                freed += victims[key]
                if freed >= over and len(victims) >= spare:
                    break
        return None if freed < over else victims

    def _evicted(self, victims: list[ChunkKey]) -> dict[ChunkKey, int]:
        self.counts["evicted"] += len(victims)
        if self.shares is not None:
            for key in victims:
                self.shares.of(key).evicted += 1
        return self._take_out(victims)

    def _take_out(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, int]:
        """Take keys out of the index, to be deleted; their bytes stay set aside until they are. Lock held."""
        assert self._index is not None
        gone: dict[ChunkKey, int] = {}
        for key in keys:
            gone[key] = self._index.pop(key)
            self.policy.remove(key)
            if self.shares is not None:
                self.shares.of(key).used -= gone[key]
        nbytes = sum(gone.values())
        self._used -= nbytes
        self._held += nbytes
        self._deleting.update(gone)
        return gone

    def _delete(self, gone: dict[ChunkKey, int], keep: int = 0) -> bool:
        """Delete what was taken out of the index, and what could not be deleted before; whether that is done.

        `keep`: bytes of it that stay set aside then, for what takes their place.
        """
        with self._lock:
            gone = {**self._undeleted, **gone}
            self._undeleted = {}
        done = self._medium_delete(list(gone))
        with self._lock:
            if done or self._index is None:
                self._deleted(gone)
                self._held += keep
            else:
                self._undeleted.update(gone)
        return done

    def _deleted(self, gone: dict[ChunkKey, int]) -> None:
        self._held -= sum(gone.values())
        for key in gone:
            self._deleting.pop(key, None)

    def _medium_delete(self, keys: Sequence[ChunkKey]) -> bool:
        try:
            self.backend.delete(keys)
        except PLUGIN_ERRORS as error:
            self._failed("delete", error)
            return False
        return True

    # -- books -----------------------------------------------------------------------------------------------
    def _enter(self, keys: Sequence[ChunkKey], sizes: Sequence[int]) -> None:
        if self._index is not None:
            for key, nbytes in zip(keys, sizes, strict=True):
                more = nbytes - self._index.get(key, 0)
                self._used += more
                self._index[key] = nbytes
                if self.shares is not None:
                    self.shares.of(key).used += more
            self.policy.add(keys)

    def claim(self, prefix: bytes, tenant: str) -> None:
        """Objects of an identity belong to `tenant` from now on; see `Shares.claim`."""
        if self.shares is not None:
            with self._lock:
                self.shares.claim(prefix, tenant)

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter; several threads count at once."""
        with self._lock:
            self.counts[name] += by

    def _failed(self, operation: str, error: BaseException) -> None:
        text = f"{operation}: {type(error).__name__}: {error}" if str(error) else f"{operation}: {error!r}"
        with self._lock:
            self.counts[f"{operation}_errors"] += 1
            self.last_error = text[:_MESSAGE_CHARS]

    last_error: str = ""
    """The latest error of the backend, for `stats()` and people."""

    def stats(self) -> dict[str, Any]:
        """Counters since start-up, and the state now. Plain data."""
        try:
            usage = self.backend.usage()
        except PLUGIN_ERRORS as error:
            self._failed("usage", error)
            usage = None
        with self._lock:
            counts = dict(self.counts)
        return {
            **counts,
            "used_bytes": self._used,
            "objects": usage.objects if usage else None,
            "allocated_bytes": usage.allocated_bytes if usage else None,
            "read_paused": self.read_lane.breaker.open or self.ask_breaker.open,
            "write_paused": self.write_lane.breaker.open,
            "breakers": {
                "read": self.read_lane.breaker.stats(),
                "lookup": self.ask_breaker.stats(),
                "write": self.write_lane.breaker.stats(),
            },
            **({} if self.shares is None else {"tenants": self.shares.stats()}),
            "read_speed": self.speed.stats(),
            "wiping": self._wiping,
            "last_error": self.last_error,
        }

    def check(self) -> None:
        """Raise `AssertionError` when index, policy and usage disagree. Call when nothing is being read or written."""
        for lane in self.lanes:
            assert not lane.defects, f"{lane.defects} jobs of lane {lane.name} raised"
        with self._lock:
            assert not self._writing, f"tier {self.name}: {len(self._writing)} keys are still being written"
            undeleted = sum(self._undeleted.values())
            assert self._held == undeleted, f"tier {self.name}: {self._held} bytes set aside, {undeleted} to be deleted"
            assert self._deleting == self._undeleted, f"tier {self.name}: deletions without an end"
            if self._index is None:
                return
            total = sum(self._index.values())
            assert self._used == total, f"tier {self.name}: {self._used} bytes in the books, {total} in the index"
            for share in self.shares or ():
                held = sum(self._index.get(key, 0) for key in share.policy.coldest())
                assert share.used == held and not share.writing, f"tier {self.name}: a tenant's books do not add up"
            assert set(self.policy.coldest()) == self._index.keys(), f"tier {self.name}: policy and index disagree"
            if self.capacity is not None:
                assert total <= self.capacity, f"tier {self.name}: {total} bytes over its capacity {self.capacity}"


def _all(keys: Sequence[object], results: Sequence[_T]) -> Sequence[_T]:
    """The results, if there is one for each key: anything else would attach outcomes to the wrong chunks."""
    if len(results) != len(keys):
        raise BackendError(f"{len(results)} results for {len(keys)} keys: a plugin returns exactly one for each")
    return results


def staging_buffer_bytes(serde: Serde) -> int:
    """Room for one sealed, encoded object, page aligned."""
    return round_up(HEADER_BYTES + serde.bound())
