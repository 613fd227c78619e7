"""One storage tier: a backend, perhaps a serde, its index and capacity; a lane and a breaker for each operation.

`read`, `write`, `ask` and `wipe` block and run on threads of the tier; everything else is memory only. No backend error
leaves this module: each key gets a `MissReason`, and what was not what it claimed to be is quarantined once.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from math import inf
from time import monotonic
from typing import Any, Literal, NamedTuple

from lmcache_core import seal
from lmcache_core.books import Books
from lmcache_core.cost import ReadSpeed
from lmcache_core.doorway import PLUGIN_ERRORS, Doorway, Staging, each
from lmcache_core.errors import BackendError, CorruptChunk, NoSpace
from lmcache_core.lanes import Breaker, Lane
from lmcache_core.protocols import EvictionPolicy, Serde, StorageBackend
from lmcache_core.redact import hide_urls
from lmcache_core.slots import Slots
from lmcache_core.types import ChunkKey, Got, MissReason

Outcome = MissReason | None
"""None when a chunk was read or written, else why not."""

_RETRIES = 8
"""How often a put that found no space evicts a little more and tries again."""

_MESSAGE_CHARS = 500
_HIDDEN_CHARS = 2048

ASK_THREADS = 2
"""Threads that ask a medium what it has: a second one, so that a question that hangs does not stop the next."""


class Write(NamedTuple):
    """One call of `write`. Chunks are known by their position in `keys`."""

    keys: Sequence[ChunkKey]
    slots: Sequence[int]
    outcomes: list[Outcome]
    """Of each key, as far as it is known."""
    epoch: int
    """Of the tier when the write was asked for."""
    chain: Sequence[ChunkKey]
    """The whole prefix the keys belong to."""


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
        self._door = Doorway(slots, layout_id)
        self._staging = staging
        self._lock = threading.Lock()
        self._writing: set[ChunkKey] = set()
        self._wiping = False
        self._wipe_lock = threading.Lock()
        self.policy = policy
        self.books = books = Books(policy, capacity, self.counts)
        books.open(backend.scan(), backend.footprint)
        if capacity is not None and books.used > capacity:
            gone = books.make_room(0, 0, (), None)
            if gone:
                self._delete(gone)
        # Threads last: whatever fails above leaves none behind.
        self.ask_breaker = Breaker(2 * self.lookup_deadline)
        self._delete_breaker = Breaker(2 * deadline)
        """Spaces out the attempts to delete what the medium refused to delete."""
        self._retrying = False
        self.read_lane = Lane(f"{name}-read", threads, queue, slots.region.nbytes, deadline, Breaker(2 * deadline))
        inflight = max(inflight, slots.slot_bytes)
        self.write_lane = Lane(f"{name}-write", threads, queue, inflight, deadline, Breaker(2 * deadline))
        self.ask_lane: Lane | None = None
        """For a medium that must be asked; threads of its own, so that no question waits for a long read."""
        self.lanes = [self.read_lane, self.write_lane]
        """Each may give work to the next."""
        if books.index is None and not backend.contains_is_local:
            self.ask_lane = Lane(f"{name}-ask", ASK_THREADS, queue, 1, self.lookup_deadline, self.ask_breaker)
            self.lanes.insert(0, self.ask_lane)

    # -- index -----------------------------------------------------------------------------------------------
    def present(self, keys: Sequence[ChunkKey]) -> list[bool] | MissReason | None:
        """Which keys the tier has; why it cannot be asked; None when it must be asked on the lane."""
        if self._wiping:
            return [False] * len(keys)
        if self.read_lane.breaker.refuses or self.ask_breaker.refuses:
            return MissReason.BREAKER
        index = self.books.index
        if index is not None:
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
            found = list(each(keys, self.backend.contains(keys)))
        except PLUGIN_ERRORS as error:
            self._failed("contains", error)
            return MissReason.ERROR
        unwanted = self.books.deleting
        return [there and key not in unwanted for key, there in zip(keys, found, strict=True)] if unwanted else found

    def has(self, key: ChunkKey) -> bool:
        """Whether the key is known to be stored, or is being written."""
        index = self.books.index
        return key in self._writing or (index is not None and key in index)

    def owes(self, keys: Sequence[ChunkKey]) -> bool:
        """Whether any of the keys was to be deleted, and the medium may still have it."""
        return any(key in self.books.deleting for key in keys)

    @property
    def used(self) -> int:
        """Bytes the tier's objects occupy on the medium, by its own books (0 without an index)."""
        return self.books.used

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        """Note a use, also when the chunks were served from a nearer tier."""
        if self.books.index is not None:
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
            busy = self.books.deleting
            if self.books.index is None:  # there a put may replace what could not be deleted
                busy = {key: 0 for key in busy if key not in self.books.undeleted}
            outcomes: list[Outcome] = [MissReason.RACED if key in busy else None for key in keys]
            new = [i for i, key in enumerate(keys) if outcomes[i] is None and not self.has(key)]
            mine = [keys[i] for i in new]
            self._writing.update(mine)
        for i in new:
            outcomes[i] = MissReason.ERROR
        try:
            job = Write(keys, slots, outcomes, epoch, chain)
            if self._serde is None:
                self._store([(i, self._door.seal(keys[i], slots[i])) for i in new], job)
            else:
                self._encode(self._serde, new, job)
        except PLUGIN_ERRORS as error:
            self._failed("write", error)
        finally:
            if mine and epoch != self.epoch:
                # Cleared meanwhile, so nothing was entered; what reached the medium after its own clear goes now.
                self._delete_doubtful(dict.fromkeys(mine, 0))
            with self._lock:
                self._writing.difference_update(mine)
                if self.books.index is not None:
                    self.policy.touch(chain)
        return outcomes

    # -- clearing --------------------------------------------------------------------------------------------
    def begin_wipe(self) -> None:
        """Forget everything, at once. The tier takes and serves nothing until `wipe` has cleared the medium."""
        with self._lock:
            self.epoch += 1
            self._wiping = True
            self.books.wipe()

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
                self.books.deleted(self.books.undeleted)
                self.books.undeleted = {}

    @property
    def wiping(self) -> bool:
        """Whether the tier is out of service because a clear has not ended, or failed."""
        return self._wiping

    # -- life ------------------------------------------------------------------------------------------------
    def sweep(self) -> None:
        """Give up on overdue work of every lane; try deletions again. Called with no lock held."""
        for lane in self.lanes:
            lane.sweep()
        if self.books.undeleted and not self._retrying:
            self._retry()

    def _retry(self) -> None:
        """Delete, on the write lane, what the medium refused to delete: at most one attempt at a time."""

        def run() -> Outcome:
            done = self._delete_again()
            if not done:
                self._delete_apart()
            self._retrying = False
            return None if done else MissReason.ERROR

        def cancel(_: MissReason) -> None:
            self._retrying = False

        self._retrying = True
        if self.write_lane.submit(run, cancel, 0, breaker=self._delete_breaker, urgent=True) is not None:
            self._retrying = False

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
            results = each(keys, self._get(keys, buffers))
        except PLUGIN_ERRORS as error:
            self._failed("get", error)
            return [MissReason.ERROR] * len(keys)
        outcomes: list[Outcome] = []
        for i, (key, buffer, got) in enumerate(zip(keys, buffers, results, strict=True)):
            if got is None:
                # It was there when it was located.
                if self.books.index is not None:
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
        self._door.open(key, obj, serde, payload)

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
            books = self.books
            if books.index is None:
                gone = dict.fromkeys((key for key in keys if key not in books.deleting), 0)
                books.doubt(gone)
            else:
                gone = books.take_out([key for key in keys if key in books.index])
            count = len(gone)
            gone = {**books.again(keys), **gone}
        if gone:
            self._delete(gone)
        return count

    # -- writing ---------------------------------------------------------------------------------------------
    def _encode(self, serde: Serde, new: Sequence[int], job: Write) -> None:
        assert self._staging is not None
        if not new:
            return
        buffers = self._staging.take(len(new))
        try:
            batches = [new[at : at + len(buffers)] for at in range(0, len(new), len(buffers))][::-1]
            while batches:
                some = batches.pop()
                try:
                    objects = self._door.encode(serde, [(job.keys[i], job.slots[i]) for i in some], buffers)
                except PLUGIN_ERRORS as error:
                    if len(some) > 1:  # one that cannot be encoded does not keep the others out
                        batches += [[i] for i in reversed(some)]
                    else:
                        self._failed("encode", error)
                    continue
                self._store(list(zip(some, objects, strict=True)), job)
        finally:
            self._staging.give_back(buffers)

    def _store(self, todo: list[tuple[int, memoryview]], job: Write) -> None:
        objects = [(job.keys[i], self.backend.footprint(len(view))) for i, view in todo]
        with self._lock:
            parts = self.books.parts(objects)
        for part in parts:
            self._put([todo[at] for at in part], job)

    def _put(self, todo: list[tuple[int, memoryview]], job: Write) -> None:
        """Put, evicting as needed; an object enters the index only after the backend said that it is stored."""
        books = self.books
        for attempt in range(_RETRIES + 1):
            if not todo:
                return
            sizes = [self.backend.footprint(len(view)) for _, view in todo]
            need = sum(sizes)
            with self._lock:
                first = job.keys[todo[0][0]]
                share = None if books.shares is None else books.shares.of(first)
                victims = books.make_room(need, attempt, job.chain, share)
                if victims is None or (attempt and not victims):
                    break
                # What is written takes the place of what was evicted for it: those bytes are set aside once.
                reused = min(need, sum(victims.values()))
                held = need - reused
                books.held += held
                if share is not None:
                    share.writing += need
            try:
                if victims:
                    if not self._delete(victims, keep=reused):
                        return
                    held = need
                todo = self._put_once(todo, sizes, job)
            finally:
                with self._lock:
                    books.held -= held
                    if books.shares is not None:
                        books.shares.of(first).writing -= need  # a tenant may have claimed it meanwhile
            if books.index is None:
                break
        if todo and books.undeleted:
            self._delete_again()
        if victims is None and len(todo) > 1:
            # Not all together; perhaps the first of them.
            half = len(todo) // 2
            self._put(todo[:half], job)
            self._put(todo[half:], job)
            return
        for i, _ in todo:
            job.outcomes[i] = MissReason.NO_ROOM

    def _put_once(
        self, todo: list[tuple[int, memoryview]], sizes: Sequence[int], job: Write
    ) -> list[tuple[int, memoryview]]:
        """One put; returns what found no space."""
        books = self.books
        batch = [job.keys[i] for i, _ in todo]
        try:
            results: Sequence[object] = each(batch, self.backend.put_from(batch, [view for _, view in todo]))
        except NoSpace:
            return todo
        except PLUGIN_ERRORS as error:
            self._failed("put", error)
            if books.index is not None:
                self._delete_doubtful(dict(zip(batch, sizes, strict=True)))  # some may be there, outside the books
            return []
        again: list[tuple[int, memoryview]] = []
        stored: list[int] = []
        doubtful: dict[ChunkKey, int] = {}
        for at, (entry, result) in enumerate(zip(todo, results, strict=True)):
            if result is None:
                stored.append(at)
                job.outcomes[entry[0]] = None
            elif isinstance(result, NoSpace):
                again.append(entry)
            else:
                self._failed("put", result if isinstance(result, Exception) else BackendError(f"put_from: {result!r}"))
                doubtful[batch[at]] = sizes[at]
        if doubtful and books.index is not None:
            self._delete_doubtful(doubtful)  # stored after all, perhaps, and only the answer was lost
        with self._lock:
            if job.epoch == self.epoch:
                books.enter([batch[at] for at in stored], [sizes[at] for at in stored])
            self.counts["written"] += len(stored)
            self.counts["written_bytes"] += sum(len(todo[at][1]) for at in stored)
        return again

    # -- deleting --------------------------------------------------------------------------------------------
    def _delete(self, gone: dict[ChunkKey, int], keep: int = 0) -> bool:
        """Delete what was taken out of the index; whether that is done.

        `keep`: bytes of it that stay set aside then, for what takes their place. What could not be deleted before is
        not in the same call: one object that never can be would stop all evictions.
        """
        books = self.books
        done = not gone or self._medium_delete(list(gone))
        with self._lock:
            if done:
                books.deleted(gone, keep)
            else:
                books.refused(gone)
        return done

    def _delete_again(self) -> bool:
        """Delete what could not be deleted before; whether that is done."""
        with self._lock:
            gone = self.books.again(key for key in self.books.undeleted if key not in self._writing)
        return self._delete(gone)

    def _delete_apart(self) -> None:
        """The same, one by one: perhaps one stands in the way of the others. Not all, where the medium is dead."""
        failed, keys = 0, list(self.books.undeleted)
        for key in keys if len(keys) > 1 else ():
            with self._lock:
                gone = self.books.again([] if key in self._writing else [key])
            failed += not self._delete(gone)  # then it is the last in the queue
            if failed == 2:
                break

    def _delete_doubtful(self, sizes: dict[ChunkKey, int]) -> None:
        """Delete what should not be there and may be, by key with its bytes."""
        with self._lock:
            sizes = self.books.doubt(sizes)
        self._delete(sizes)

    def _medium_delete(self, keys: Sequence[ChunkKey]) -> bool:
        try:
            self.backend.delete(keys)
        except PLUGIN_ERRORS as error:
            self._failed("delete", error)
            return False
        return True

    # -- books -----------------------------------------------------------------------------------------------
    def claim(self, prefix: bytes, tenant: str) -> None:
        """Objects of an identity belong to `tenant` from now on; see `Shares.claim`."""
        if self.books.shares is not None:
            with self._lock:
                self.books.shares.claim(prefix, tenant)

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter; several threads count at once."""
        with self._lock:
            self.counts[name] += by

    def _failed(self, operation: str, error: BaseException) -> None:
        text = f"{operation}: {type(error).__name__}: {error}" if str(error) else f"{operation}: {error!r}"
        # Hidden before it is shortened: the beginning of a secret is no longer known as one.
        text = hide_urls(text[:_HIDDEN_CHARS])[:_MESSAGE_CHARS]
        with self._lock:
            self.counts[f"{operation}_errors"] += 1
            self.last_error = text

    last_error: str = ""
    """The latest error of the backend, for `stats()` and people."""

    def stats(self) -> dict[str, Any]:
        """Counters since start-up, and the state now. Plain data."""
        usage, medium, encoding = None, {}, {}
        try:
            usage, medium = self.backend.usage(), self.backend.stats()
            encoding = self._serde.stats() if self._serde else {}
        except PLUGIN_ERRORS as error:
            self._failed("usage", error)
        with self._lock:
            counts = dict(self.counts)
        return {
            **counts,
            "used_bytes": self.used,
            "objects": usage.objects if usage else None,
            "allocated_bytes": usage.allocated_bytes if usage else None,
            "read_paused": self.read_lane.breaker.open or self.ask_breaker.open,
            "write_paused": self.write_lane.breaker.open,
            "breakers": {
                "read": self.read_lane.breaker.stats(),
                "lookup": self.ask_breaker.stats(),
                "write": self.write_lane.breaker.stats(),
            },
            **({} if self.books.shares is None else {"tenants": self.books.shares.stats()}),
            "undeleted": len(self.books.undeleted),
            "read_speed": self.speed.stats(),
            "wiping": self._wiping,
            "last_error": self.last_error,
            "medium": medium,
            "serde": encoding,
        }

    def check(self) -> None:
        """Raise `AssertionError` when index, policy and usage disagree. Call when nothing is being read or written."""
        for lane in self.lanes:
            assert not lane.defects, f"{lane.defects} jobs of lane {lane.name} raised"
        with self._lock:
            assert not self._writing, f"tier {self.name}: {len(self._writing)} keys are still being written"
            self.books.check(self.name)
