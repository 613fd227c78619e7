"""The pipeline: one control plane over a memory tier and any number of storage tiers.

`lookup`, `fetch`, `reserve` and what they return never wait: they touch dictionaries under one short lock and leave
I/O to the tiers' lanes. A chunk is visible only after all its bytes are in place; what is handed out stays in place
until it is released; whatever goes wrong in a tier turns into a miss with a reason.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from lmcache_core import seal
from lmcache_core.errors import BackendError, Closed, CorruptChunk
from lmcache_core.layout import KVLayout
from lmcache_core.plan import Move, locate, split
from lmcache_core.protocols import MemoryBackend
from lmcache_core.slots import Slots
from lmcache_core.tier import Outcome, StorageTier
from lmcache_core.types import ChunkKey, MissReason, object_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")

_BATCH_BYTES = 32 << 20
"""Most bytes one lane job reads or writes, so that early chunks of a long prefix are ready early."""


class Lease:
    """Chunks pinned in memory, a prefix of what was asked for. Use as a context manager, or `release()`."""

    __slots__ = ("_pipeline", "_slots", "keys", "reason", "sources")

    def __init__(
        self,
        pipeline: Pipeline,
        keys: list[ChunkKey],
        slots: list[int],
        sources: list[str],
        reason: MissReason | None,
    ) -> None:
        self._pipeline = pipeline
        self._slots: list[int] | None = slots
        self.keys = keys
        self.sources = sources
        """Name of the tier each chunk came from."""
        self.reason = reason
        """Why the lease is shorter than the keys asked for; None when it is not."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def slots(self) -> list[int]:
        """Slot numbers, in key order. Raise `Closed` after release."""
        if self._slots is None:
            raise Closed("the lease was released; its slots may hold other chunks now")
        return self._slots

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Payload offsets in the arena, in bytes."""
        return self._pipeline.slots.offsets(self.slots)

    @property
    def addresses(self) -> NDArray[np.int64]:
        """Payload addresses in this process."""
        return self.offsets + self._pipeline.slots.region.address

    def view(self, i: int) -> memoryview:
        """Raw bytes of chunk `i`; valid until release, not to be written."""
        return self._pipeline.slots.payload(self.slots[i])

    def release(self) -> None:
        """Drop the pins. Idempotent."""
        slots, self._slots = self._slots, None
        if slots:
            self._pipeline._unpin(slots)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Reservation:
    """Slots for chunks that are not stored yet. Fill them, then `commit()`; leaving without commit aborts."""

    __slots__ = ("_epoch", "_keys", "_pipeline", "_slots", "positions")

    def __init__(
        self, pipeline: Pipeline, keys: list[ChunkKey], slots: list[int], positions: list[int], epoch: int
    ) -> None:
        self._pipeline = pipeline
        self._keys = keys
        self._slots: list[int] | None = slots
        self._epoch = epoch
        self.positions = positions
        """Indexes into the keys given to `reserve` that got a slot; the others are stored already or found no room."""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def slots(self) -> list[int]:
        """Slot numbers, aligned with `positions`. Raise `Closed` after commit or abort."""
        if self._slots is None:
            raise Closed("the reservation was committed or aborted")
        return self._slots

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Payload offsets in the arena, in bytes, aligned with `positions`."""
        return self._pipeline.slots.offsets(self.slots)

    @property
    def addresses(self) -> NDArray[np.int64]:
        """Payload addresses in this process, aligned with `positions`."""
        return self.offsets + self._pipeline.slots.region.address

    def view(self, i: int) -> memoryview:
        """Room for the raw bytes of the chunk at `positions[i]`."""
        return self._pipeline.slots.payload(self.slots[i])

    def commit(self) -> int:
        """Publish the filled chunks and hand them to the write tiers; the number of chunks published."""
        slots, self._slots = self.slots, None
        return self._pipeline._commit(self._keys, slots, self._epoch)

    def abort(self) -> None:
        """Give the slots back; nothing becomes visible. Does nothing after commit or abort."""
        slots, self._slots = self._slots, None
        if slots is not None:
            self._pipeline._abort(self._keys, slots)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class Hit:
    """Answer of a lookup: how much of the prefix is present, and where. Holds nothing; see `fetch` to hold it."""

    __slots__ = ("_locate", "count", "pending", "reason", "sources")

    def __init__(self) -> None:
        self.count = 0
        """Chunks present, from the first on."""
        self.sources: list[str] = []
        """Name of the nearest tier of each present chunk."""
        self.reason: MissReason | None = None
        """Why chunk `count` is missing; None when all are present."""
        self.pending = False
        """True while a tier that must be asked over its lane has not answered; then the rest may still grow."""
        self._locate: _Locate | None = None

    def wait(self, timeout: float) -> bool:
        """Wait for pending tiers; False when they have not answered within `timeout` seconds."""
        return self._locate is None or self._locate.event.wait(timeout)


class _Locate:
    """Presence of keys in every storage tier; some answers may come later, from lanes."""

    __slots__ = ("event", "lock", "paused", "present", "silent", "then", "waiting")

    def __init__(self, then: Callable[[_Locate], None]) -> None:
        self.present: list[list[bool]] = []
        self.paused = False
        """Whether a tier's breaker kept it from being asked."""
        self.silent: set[int] = set()
        """Tiers that were asked and have not answered."""
        self.waiting = 0
        self.then = then
        self.lock = threading.Lock()
        self.event = threading.Event()

    def answer(self, tier: int, present: list[bool]) -> None:
        self.present[tier] = present
        self.silent.discard(tier)
        self.arrive()

    def arrive(self) -> None:
        with self.lock:
            self.waiting -= 1
            last = self.waiting == 0
        if last:
            self.then(self)
            self.event.set()


class _Batch:
    """One lane job: chunks read from one tier into slots."""

    __slots__ = ("deadline", "epoch", "expired", "keys", "slots", "tier", "waiters")

    def __init__(self, tier: StorageTier, keys: list[ChunkKey], slots: list[int], deadline: float, epoch: int) -> None:
        self.tier = tier
        self.keys = keys
        self.slots = slots
        self.deadline = deadline
        self.epoch = epoch
        self.expired = False
        self.waiters: dict[ChunkKey, list[tuple[Transfer, int]]] = {key: [] for key in keys}


class Transfer:
    """A prefix on its way into memory. What was in memory is pinned at once; the rest is read on the lanes."""

    __slots__ = (
        "_asked",
        "_batches",
        "_deadline",
        "_event",
        "_finished",
        "_pending",
        "_pipeline",
        "_reason",
        "_slots",
        "_sources",
        "count",
        "detached",
        "keys",
        "located",
    )

    def __init__(self, pipeline: Pipeline, keys: list[ChunkKey]) -> None:
        self._pipeline = pipeline
        self.keys = keys
        self.count = 0
        """Chunks that can be expected, valid once `located`."""
        self.located = True
        """False while a remote tier has not said what it has."""
        self.detached = False
        self._slots: list[int] = []
        self._sources: list[str] = []
        self._pending = 0
        self._asked: _Locate | None = None
        self._batches: list[_Batch] = []
        self._deadline = 0.0
        self._event: threading.Event | None = None
        self._reason: MissReason | None = None
        self._finished = False

    @property
    def done(self) -> bool:
        """Whether `result()` is there: everything arrived, failed, or ran out of time."""
        return self._event is None or (self.located and self._pending == 0) or monotonic() >= self._deadline

    @property
    def sources(self) -> list[str]:
        """Name of the tier each expected chunk comes from, valid once `located`."""
        return self._sources[: self.count]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until done (at most the tiers' deadline), or for `timeout` seconds; return `done`."""
        end = monotonic() + (3600.0 if timeout is None else timeout)
        event = self._event
        while event is not None and not self.done:
            left = min(end, self._deadline) - monotonic()
            if left <= 0:
                break
            event.wait(left)
        return self.done

    def result(self) -> Lease:
        """The lease on what arrived: the prefix up to the first chunk that failed. Call once; waits if not done."""
        self.wait()
        return self._pipeline._finish(self)

    def cancel(self) -> None:
        """Stop waiting and drop the pins. Reads under way end on their own and stay as cached chunks."""
        self._pipeline._cancel(self)


class Pipeline:
    """See the module. Made by `lmcache_core.build.build`; thread-safe."""

    def __init__(
        self, layout: KVLayout, memory_name: str, memory: MemoryBackend, slots: Slots, tiers: Sequence[StorageTier],
        *, verify: Literal["load", "serve"] = "load",
    ) -> None:  # fmt: skip
        self.layout = layout
        self.slots = slots
        self.memory_name = memory_name
        self.tiers = list(tiers)
        self.counts: Counter[str] = Counter()
        self._memory = memory
        self._verify_on_serve = verify == "serve"
        self._lock = threading.Lock()
        self._loads: dict[ChunkKey, _Batch] = {}
        self._filling: set[ChunkKey] = set()
        self._live_transfers = 0
        self._demoting: dict[int, int] = {}
        self._epoch = 0
        self._closed = False
        self._back = [t for t, tier in enumerate(self.tiers) if tier.write_mode == "back"]
        self._dirty_limit = max(1, slots.count // 2)
        self._batch_chunks = max(1, _BATCH_BYTES // slots.slot_bytes)

    # -- asking ----------------------------------------------------------------------------------------------
    def lookup(self, keys: Sequence[ChunkKey]) -> Hit:
        """How much of the prefix is present, and where. Never waits; see `Hit.pending`."""
        hit = Hit()
        with self._lock:
            self._check_open()
            here, reach = self._here(keys)
        resident = _leading(here)
        hit.count = resident
        hit.sources = [self.memory_name] * resident
        if resident == len(keys):
            return hit
        hit.reason = MissReason.NOT_STORED
        if not self.tiers:
            return hit
        rest = list(keys[resident:])

        def fold(found: _Locate) -> None:
            end, moves = locate(resident, reach, here[resident:], found.present)
            sources = [self.memory_name] * end
            for move in moves:
                for position in move.positions:
                    sources[position] = self.tiers[move.tier].name
            hit.sources = sources
            hit.count = end
            hit.reason = _gap(end, reach, len(keys), found)
            hit.pending = False

        hit.pending = True
        hit._locate = self._locate(rest, fold)
        return hit

    def _here(self, keys: Sequence[ChunkKey]) -> tuple[list[bool], int]:
        """Which keys are in memory or on their way, and the position of the first whose read is overdue.

        An overdue read is a gap: whoever waited for it again would wait in vain. Lock held.
        """
        index, loads = self.slots.index, self._loads
        here = [key in index for key in keys]
        if loads:
            now = monotonic()
            for i, key in enumerate(keys):
                if not here[i] and key in loads:
                    if now >= loads[key].deadline:
                        return here, i
                    here[i] = True
        return here, len(keys)

    def _locate(self, keys: list[ChunkKey], then: Callable[[_Locate], None]) -> _Locate:
        """Ask every storage tier for the keys: memory at once, media on their lanes."""
        self._expire()
        found = _Locate(then)
        found.waiting = 1
        for t, tier in enumerate(self.tiers):
            present = tier.present(keys)
            found.present.append([False] * len(keys) if present is None else present)
            if tier.paused:
                found.paused = True
            elif present is None:
                if tier.read_breaker.allow():
                    found.silent.add(t)
                else:
                    found.paused = True
        asks = sorted(found.silent)
        found.waiting += len(asks)
        for t in asks:
            self._ask(found, t, keys)
        found.arrive()
        return found

    def _ask(self, found: _Locate, t: int, keys: list[ChunkKey]) -> None:
        tier = self.tiers[t]
        absent = [False] * len(keys)

        def cancel() -> None:
            tier.read_breaker.record(MissReason.DEADLINE)
            found.answer(t, absent)

        if not tier.read_lane.submit(lambda: found.answer(t, tier.ask(keys)), cancel, nbytes=0):
            cancel()

    # -- fetching --------------------------------------------------------------------------------------------
    def fetch(self, keys: Sequence[ChunkKey]) -> Transfer:
        """Hold the present prefix of `keys`: pin what is in memory, start reading the rest. Never waits."""
        transfer = Transfer(self, list(keys))
        slots = self.slots
        with self._lock:
            self._check_open()
            found = list(map(slots.index.get, keys))
            resident = found.index(None) if None in found else len(found)
            pins = slots.pins
            taken: list[int] = found[:resident]  # type: ignore[assignment]
            for slot in taken:
                pins[slot] += 1
            slots.policy.touch(transfer.keys)
            transfer._slots = taken
            transfer._sources = [self.memory_name] * resident
            transfer.count = resident
            self._live_transfers += 1
        if resident == len(found) or not self.tiers:
            if resident < len(found):
                transfer._reason = MissReason.NOT_STORED
            return transfer
        rest = transfer.keys[resident:]
        if len(set(rest)) < len(rest):
            transfer.cancel()
            raise ValueError("the keys repeat: a prefix has each chunk once")
        transfer._event = threading.Event()
        transfer.located = False
        transfer._deadline = monotonic() + max(tier.deadline for tier in self.tiers)
        transfer._asked = self._locate(rest, lambda located: self._start(transfer, resident, located))
        return transfer

    def _start(self, transfer: Transfer, start: int, located: _Locate) -> None:
        """Second half of a fetch, once it is known where every chunk is: reserve slots and submit the moves."""
        keys = transfer.keys
        failed: list[tuple[_Batch, MissReason]] = []
        with self._lock:
            slots = self.slots
            here, reach = self._here(keys[start:])
            reach += start
            end, moves = locate(start, reach, here, located.present)
            if transfer._finished or self._closed:
                end, moves = start, []
            transfer._slots += [-1] * (end - start)
            transfer._sources += [self.memory_name] * (end - start)
            transfer._reason = _gap(end, reach, len(keys), located)
            # Pin what is here before taking slots: taking evicts.
            for position in range(start, end):
                slot = slots.index.get(keys[position])
                if slot is not None:
                    slots.pins[slot] += 1
                    transfer._slots[position] = slot
            wanted = sorted(position for move in moves for position in move.positions)
            room = self._take(len(wanted))
            if len(room) < len(wanted):
                end = self._cut(transfer, start, wanted[len(room)])
                wanted = wanted[: len(room)]
            slot_at = dict(zip(wanted, room, strict=True))
            transfer.count = end
            for position in range(start, end):
                if transfer._slots[position] < 0 and position not in slot_at:
                    batch = self._loads[keys[position]]
                    batch.waiters[keys[position]].append((transfer, position))
                    transfer._sources[position] = batch.tier.name
                    transfer._batches.append(batch)
                    transfer._pending += 1
            for move in moves:
                tier = self.tiers[move.tier]
                kept = Move(move.tier, [position for position in move.positions if position in slot_at])
                admitted = False
                for part in split(kept, tier.threads, self._batch_chunks):
                    batch = _Batch(
                        tier,
                        [keys[position] for position in part.positions],
                        [slot_at[position] for position in part.positions],
                        monotonic() + tier.deadline,
                        self._epoch,
                    )
                    for position in part.positions:
                        transfer._sources[position] = tier.name
                        batch.waiters[keys[position]].append((transfer, position))
                        self._loads[keys[position]] = batch
                    transfer._pending += len(part.positions)
                    transfer._batches.append(batch)
                    refusal = self._submit(batch, admitted)
                    if refusal is None:
                        admitted = True
                    else:
                        failed.append((batch, refusal))
            transfer.located = True
            waiting = transfer._pending
        for batch, reason in failed:
            self._loaded(batch, [reason] * len(batch.keys))
        if waiting == 0 and transfer._event is not None:
            transfer._event.set()
        if transfer.detached:
            self._cancel(transfer)

    def _cut(self, transfer: Transfer, start: int, end: int) -> int:
        """Shorten a transfer for which memory has no room. Lock held."""
        late = [slot for slot in transfer._slots[end:] if slot >= 0]
        self.slots.unpin(late)
        del transfer._slots[end:], transfer._sources[end:]
        transfer._reason = MissReason.NO_ROOM
        return max(start, end)

    def _submit(self, batch: _Batch, admitted: bool) -> MissReason | None:
        """Queue one batch; why not, if refused. A prefix whose first batch was `admitted` is read whole. Lock held."""
        tier = batch.tier
        if not tier.read_breaker.allow():
            return MissReason.BREAKER

        def run() -> None:
            if monotonic() >= batch.deadline:
                self._loaded(batch, [MissReason.DEADLINE] * len(batch.keys))
                return
            outcomes = tier.read(batch.keys, batch.slots)
            if self._verify_on_serve:
                self._seal(batch.keys, batch.slots, outcomes)
            self._loaded(batch, outcomes, ran=True)

        def cancel() -> None:
            self._loaded(batch, [MissReason.DEADLINE] * len(batch.keys))

        if not tier.read_lane.submit(run, cancel, len(batch.keys) * self.slots.slot_bytes, admitted=admitted):
            if tier.read_breaker.open:
                tier.read_breaker.record(MissReason.DEADLINE)  # this call was the probe
            return MissReason.BUSY
        return None

    def _loaded(self, batch: _Batch, outcomes: Sequence[Outcome], *, ran: bool = False) -> None:
        """A batch ended: publish what arrived whole, give the rest back, tell whoever waits."""
        if not batch.expired:
            bad = next((o for o in outcomes if o in (MissReason.ERROR, MissReason.DEADLINE)), None)
            if ran or bad:
                batch.tier.read_breaker.record(bad)
        events: list[threading.Event] = []
        with self._lock:
            slots = self.slots
            stale = batch.epoch != self._epoch
            good = [i for i, outcome in enumerate(outcomes) if outcome is None and not stale]
            # A store may have published a chunk while it was being read.
            kept = {i for i in good if batch.keys[i] not in slots.index}
            arrived = [batch.keys[i] for i in good if i in kept]
            landed = [batch.slots[i] for i in good if i in kept]
            # The header page is only in the slot when the object is raw; then it keeps its own date.
            slots.publish_loaded(arrived, landed, int(time.time()))
            ready = {i: slots.index[batch.keys[i]] for i in good}
            for i, key in enumerate(batch.keys):
                del self._loads[key]
                for transfer, position in batch.waiters[key]:
                    if i in ready:
                        slots.pins[ready[i]] += 1
                        transfer._slots[position] = ready[i]
                    elif transfer._reason is None or position < transfer.count:
                        transfer.count = min(transfer.count, position)
                        transfer._reason = outcomes[i] or MissReason.RACED
                    transfer._pending -= 1
                    if transfer._pending == 0 and transfer._event is not None:
                        events.append(transfer._event)
            slots.give_back([batch.slots[i] for i in range(len(batch.keys)) if i not in kept])
            self._spread(arrived, landed, self.tiers.index(batch.tier))
        for event in events:
            event.set()

    def _finish(self, transfer: Transfer) -> Lease:
        with self._lock:
            slots, reason = self._detach(transfer)
        if self._verify_on_serve:
            slots, reason = self._verified(transfer, slots, reason)
        count = len(slots)
        sources = transfer._sources[:count]
        with self._lock:
            for source in set(sources):
                self.counts["hit." + source] += sources.count(source)
            if reason is not None:
                self.counts[f"miss.{reason}"] += len(transfer.keys) - count
        for tier in self.tiers:
            tier.touch(transfer.keys[:count])
        return Lease(self, transfer.keys[:count], slots, sources, reason)

    def _detach(self, transfer: Transfer) -> tuple[list[int], MissReason | None]:
        """Stop waiting for a transfer and keep its unbroken prefix. Lock held."""
        if transfer._finished:
            raise Closed("the result of this transfer was taken, or it was cancelled")
        transfer._finished = True
        self._live_transfers -= 1
        reason = transfer._reason
        now = monotonic()
        if not transfer.located:
            reason = MissReason.DEADLINE
            if transfer._asked is not None and now >= transfer._deadline:
                for t in list(transfer._asked.silent):
                    self.tiers[t].read_breaker.record(MissReason.DEADLINE)
        elif transfer._pending:
            for batch in transfer._batches:
                for key in batch.keys:
                    if key in batch.waiters:
                        batch.waiters[key] = [w for w in batch.waiters[key] if w[0] is not transfer]
                if now >= batch.deadline and not batch.expired and self._loads.get(batch.keys[0]) is batch:
                    batch.expired = True
                    batch.tier.read_breaker.record(MissReason.DEADLINE)
            transfer._pending = 0
        held = transfer._slots
        count = held.index(-1) if -1 in held else len(held)
        if count < transfer.count:
            reason = MissReason.DEADLINE  # not failed: not here in time
        if count < len(held):
            self.slots.unpin([slot for slot in held[count:] if slot >= 0])
        transfer._slots = []
        return held[:count], reason if count < len(transfer.keys) else None

    def _seal(self, keys: Sequence[ChunkKey], slots: Sequence[int], outcomes: Sequence[Outcome]) -> None:
        """Seal the chunks that have no header yet, so that they can be verified when they are served."""
        size, now = self.slots.chunk_bytes, int(time.time())
        for key, slot, outcome in zip(keys, slots, outcomes, strict=True):
            if outcome is None and not self.slots.sealed[slot]:
                view = self.slots.view(slot, object_bytes(size))
                seal.seal(view, key, self.layout.id, seal.RAW_CODEC, size, size, now)
                self.slots.sealed[slot] = 1

    def _verified(
        self, transfer: Transfer, slots: list[int], reason: MissReason | None
    ) -> tuple[list[int], MissReason | None]:
        """Check the bytes in memory once more before an engine gets them."""
        size = self.slots.chunk_bytes
        for i, slot in enumerate(slots):
            if not self.slots.sealed[slot]:
                continue
            try:
                seal.unseal(
                    self.slots.view(slot, object_bytes(size)), transfer.keys[i], self.layout.id, seal.RAW_CODEC, size
                )
            except CorruptChunk as error:
                with self._lock:
                    if self.slots.index.get(transfer.keys[i]) == slot:
                        self.slots.hide(transfer.keys[i])
                    self.slots.unpin(slots[i:])
                    self.counts["quarantined"] += 1
                return slots[:i], MissReason(error.reason)
        return slots, reason

    def _cancel(self, transfer: Transfer) -> None:
        with self._lock:
            if not transfer._finished:
                slots, _ = self._detach(transfer)
                self.slots.unpin(slots)

    def prefetch(self, keys: Sequence[ChunkKey]) -> None:
        """Start reading the present prefix into memory, as a hint; nothing is held."""
        transfer = self.fetch(keys)
        with self._lock:
            transfer.detached = not transfer.located
        if not transfer.detached:
            transfer.cancel()

    def retrieve(self, keys: Sequence[ChunkKey], timeout: float | None = None) -> Lease:
        """Fetch and wait, at most `timeout` seconds or the tiers' deadline. Blocks: not for an engine's thread."""
        transfer = self.fetch(keys)
        transfer.wait(timeout)
        return self._finish(transfer)

    # -- storing ---------------------------------------------------------------------------------------------
    def reserve(self, keys: Sequence[ChunkKey], first: int = 0) -> Reservation:
        """Slots for the keys from `first` on that are neither stored nor on their way.

        Give the whole prefix: it marks the use. A caller that stores a growing sequence piece by piece passes `first`,
        so that what was evicted in between is not copied again with every piece.
        """
        self._expire()
        with self._lock:
            self._check_open()
            slots = self.slots
            index, loads, filling = slots.index, self._loads, self._filling
            now = monotonic() if loads else 0.0
            positions = [
                i
                for i, key in enumerate(keys)
                if i >= first
                and key not in index
                and key not in filling
                and (key not in loads or now >= loads[key].deadline)
            ]
            if len(positions) < len(keys):
                slots.policy.touch(keys)
            new = [keys[i] for i in positions]
            if len(set(new)) < len(new):
                raise ValueError("the keys repeat: a prefix has each chunk once")
            taken = self._take(len(positions))
            if len(taken) < len(positions):
                self.counts["drop.no_room"] += len(positions) - len(taken)
                del positions[len(taken) :], new[len(taken) :]
            filling.update(new)
            return Reservation(self, new, taken, positions, self._epoch)

    def store(self, keys: Sequence[ChunkKey], fill: Callable[[Reservation], None]) -> int:
        """Reserve, let `fill` write the chunks, commit. Return how many chunks were published."""
        with self.reserve(keys) as reservation:
            if not reservation.positions:
                return 0
            fill(reservation)
            return reservation.commit()

    def _commit(self, keys: list[ChunkKey], slots: list[int], epoch: int) -> int:
        now = int(time.time())
        if self._verify_on_serve:
            self._seal(keys, slots, [None] * len(keys))
        with self._lock:
            self._filling.difference_update(keys)
            if epoch != self._epoch or self._closed:
                self.slots.give_back(slots)
                return 0
            # A read may have brought a chunk while it was being filled.
            late = [i for i, key in enumerate(keys) if key in self.slots.index]
            if late:
                self.slots.give_back([slots[i] for i in late])
                keys, slots = _without(keys, late), _without(slots, late)
            self.slots.publish(keys, slots, now, sealed=self._verify_on_serve)
            self.counts["stored"] += len(keys)
            if self.tiers:
                self._spread(keys, slots, len(self.tiers))
        return len(keys)

    def _abort(self, keys: list[ChunkKey], slots: list[int]) -> None:
        with self._lock:
            self._filling.difference_update(keys)
            self.slots.give_back(slots)

    # -- writing down ----------------------------------------------------------------------------------------
    def _spread(self, keys: Sequence[ChunkKey], slots: Sequence[int], origin: int) -> None:
        """New chunks in memory: write them through, or mark them for demotion. `origin` is the tier they came from,
        or the number of tiers for a fresh store; deeper tiers have them by then. Lock held."""
        if not keys:
            return
        stored = origin == len(self.tiers)
        for tier in self.tiers[:origin]:
            if tier.write_mode == "never" or not (stored or tier.promote):
                continue
            if tier.write_mode == "back":
                self.slots.dirty.update(slot for key, slot in zip(keys, slots, strict=True) if not tier.has(key))
            else:
                self._write(tier, keys, slots, None)
        if len(self.slots.dirty) > self._dirty_limit:
            self._demote(len(self.slots.dirty) - self._dirty_limit // 2 - len(self._demoting))

    def _take(self, want: int) -> list[int]:
        """Up to `want` slots. Where dirty chunks are in the way, start writing them down for next time. Lock held."""
        taken = self.slots.take(want)
        if len(taken) < want and self.slots.dirty:
            self._demote(want - len(taken))
        return taken

    def _demote(self, want: int) -> None:
        """Write the coldest dirty chunks to the write-back tiers, ahead of need. Lock held."""
        if want <= 0:
            return
        chosen: list[ChunkKey] = []
        slots = self.slots
        for key in slots.policy.coldest():
            slot = slots.index[key]
            if slot in slots.dirty and slot not in self._demoting:
                chosen.append(key)
                if len(chosen) >= want:
                    break
        numbers = [slots.index[key] for key in chosen]
        for slot in numbers:
            self._demoting[slot] = len(self._back)
        for t in self._back:
            self._write(self.tiers[t], chosen, numbers, self._demoted)

    def _demoted(self, slots: Sequence[int], written: bool) -> None:
        """A write-back batch ended (or was refused). Lock held."""
        for slot in slots:
            self._demoting[slot] -= 1
            if self._demoting[slot] == 0:
                del self._demoting[slot]
                if written:
                    self.slots.dirty.discard(slot)

    def _write(
        self,
        tier: StorageTier,
        keys: Sequence[ChunkKey],
        numbers: Sequence[int],
        then: Callable[[Sequence[int], bool], None] | None,
    ) -> None:
        """Queue chunks for a tier in batches, pinned until written. What the lane refuses is dropped. Lock held."""
        for at in range(0, len(keys), self._batch_chunks):
            some = list(keys[at : at + self._batch_chunks])
            held = list(numbers[at : at + self._batch_chunks])
            if tier.write_breaker.allow():
                reason = MissReason.BUSY
                for slot in held:
                    self.slots.pins[slot] += 1
                if tier.write_lane.submit(*self._write_job(tier, some, held, then), len(some) * self.slots.slot_bytes):
                    continue
                self.slots.unpin(held)
                if tier.write_breaker.open:
                    tier.write_breaker.record(MissReason.DEADLINE)  # this call was the probe
            else:
                reason = MissReason.BREAKER
            tier.count(f"dropped_{reason}", len(some))
            if then is not None:
                # A failing tier must not fill memory with chunks that cannot be evicted: they become clean, unwritten.
                then(held, reason is MissReason.BREAKER)

    def _write_job(
        self,
        tier: StorageTier,
        keys: list[ChunkKey],
        held: list[int],
        then: Callable[[Sequence[int], bool], None] | None,
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        epoch = tier.epoch

        def end(written: bool) -> None:
            with self._lock:
                self.slots.unpin(held)
                if then is not None:
                    then(held, written)

        def run() -> None:
            begun = monotonic()
            outcomes = tier.write(keys, held, epoch)
            bad = MissReason.ERROR if MissReason.ERROR in outcomes else None
            if monotonic() - begun > tier.deadline:
                bad = MissReason.DEADLINE
            tier.write_breaker.record(bad)
            for outcome in outcomes:
                if outcome is not None:
                    tier.count(f"dropped_{outcome}")
            end(True)

        def cancel() -> None:
            tier.write_breaker.record(MissReason.DEADLINE)
            tier.count("dropped_deadline", len(keys))
            end(True)

        return run, cancel

    # -- life ------------------------------------------------------------------------------------------------
    def clear(self, tier: str | None = None) -> None:
        """Forget every chunk: of one tier by name, or of all. Blocks on the media's own deletion.

        Raise `BackendError`, after every tier was tried, when a medium could not delete its objects.
        """
        names = [self.memory_name, *(t.name for t in self.tiers)]
        if tier is not None and tier not in names:
            raise ValueError(f"no tier {tier!r}; there are {', '.join(names)}")
        if tier in (None, self.memory_name):
            self._forget_memory()
        failed: list[str] = []
        for storage in self.tiers:
            if tier in (None, storage.name):
                try:
                    storage.clear()
                except Exception as error:
                    failed.append(f"{storage.name}: {type(error).__name__}: {error}")
        if tier is None:
            self._forget_memory()  # what was read from a tier before it was cleared
        if failed:
            raise BackendError(f"not cleared: {'; '.join(failed)}")

    def _forget_memory(self) -> None:
        with self._lock:
            self._epoch += 1
            for key in list(self.slots.index):
                self.slots.hide(key)

    def flush(self, timeout: float) -> bool:
        """Write down everything that must be written; False when that took longer than `timeout` seconds."""
        end = monotonic() + timeout
        while True:
            self._expire()
            with self._lock:
                if self._back and self.slots.dirty:
                    self._demote(len(self.slots.dirty) - len(self._demoting))
            for tier in self.tiers:
                if not tier.write_lane.drain(max(0.0, end - monotonic())):
                    return False
            if not self.slots.dirty:
                return True
            if self._closed or monotonic() >= end:
                return False

    def close(self, timeout: float = 10.0) -> None:
        """Flush, stop the lanes and release memory, within about `timeout` seconds. Idempotent."""
        if self._closed:
            return
        end = monotonic() + timeout
        self.flush(timeout / 2)
        with self._lock:
            self._closed = True
        for tier in self.tiers:
            tier.close(max(0.1, end - monotonic()))
        self._memory.close()

    def _expire(self) -> None:
        """Cancel work that waited behind a hung medium for too long. Its callbacks take the lock: it must be free."""
        for tier in self.tiers:
            tier.read_lane.expire(tier.deadline)
            tier.write_lane.expire(tier.deadline)

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the pipeline is closed")

    def _unpin(self, slots: Sequence[int]) -> None:
        with self._lock:
            self.slots.unpin(slots)

    def stats(self) -> dict[str, Any]:
        """Counters since start-up, and what is held now. Plain data."""
        with self._lock:
            counts = dict(self.counts)
            slots = self.slots
            memory = {
                "slots": slots.count,
                "slot_bytes": slots.slot_bytes,
                "ready": len(slots.index),
                "free": len(slots.free),
                "dirty": len(slots.dirty),
                "pinned": sum(1 for pins in slots.pins if pins),
                "evicted": slots.evicted,
            }
        tiers: dict[str, Any] = {self.memory_name: memory}
        for tier in self.tiers:
            usage = tier.usage()
            tiers[tier.name] = {
                **tier.counts,
                "used_bytes": tier.used,
                "objects": usage.objects if usage else None,
                "allocated_bytes": usage.allocated_bytes if usage else None,
                "read_paused": tier.read_breaker.open,
                "write_paused": tier.write_breaker.open,
                "last_error": tier.last_error,
            }
        return {
            "stored": counts.get("stored", 0),
            "hits": {name: counts.get(f"hit.{name}", 0) for name in tiers},
            "misses": {k.removeprefix("miss."): v for k, v in sorted(counts.items()) if k.startswith("miss.")},
            "dropped": {k.removeprefix("drop."): v for k, v in sorted(counts.items()) if k.startswith("drop.")},
            "quarantined": counts.get("quarantined", 0) + sum(t.counts["quarantined"] for t in self.tiers),
            "tiers": tiers,
        }

    def check(self, *, idle: bool = False) -> None:
        """Raise `AssertionError` on any broken invariant; with `idle`, also when anything is still held."""
        with self._lock:
            loading = len(self._loads)
            self.slots.check(loading + len(self._filling))
            if idle:
                pinned = {slot: pins for slot, pins in enumerate(self.slots.pins) if pins}
                assert not pinned, f"pins left behind: {pinned}"
                assert not self._filling, f"{len(self._filling)} reservations were neither committed nor aborted"
                assert not self._loads, f"{loading} loads never ended"
                assert not self._live_transfers, f"{self._live_transfers} transfers were neither taken nor cancelled"
        if idle:
            for tier in self.tiers:
                tier.check()


def _leading(flags: Sequence[bool]) -> int:
    """Length of the run of True at the start."""
    return flags.index(False) if False in flags else len(flags)


def _gap(end: int, reach: int, count: int, found: _Locate) -> MissReason | None:
    """Why a prefix of `count` chunks ends at `end`: where a read is overdue, a tier is paused, or nothing is stored."""
    if end == count:
        return None
    if end == reach:
        return MissReason.DEADLINE
    return MissReason.BREAKER if found.paused else MissReason.NOT_STORED


def _without(items: list[T], positions: Sequence[int]) -> list[T]:
    """The items that are not at `positions`."""
    gone = set(positions)
    return [item for i, item in enumerate(items) if i not in gone]
