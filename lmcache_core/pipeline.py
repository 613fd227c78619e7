"""The pipeline: one control plane over a memory tier and any number of storage tiers.

`lookup`, `fetch`, `reserve` and what they return never wait: they touch dictionaries under one short lock and leave
I/O to the tiers' lanes. A chunk is visible only after all its bytes are in place; what is handed out stays in place
until it is released; whatever goes wrong in a tier turns into a miss with a reason.

Locks: the pipeline's, then a tier's or a lane's; callbacks of lanes run with none held.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any, Literal

from lmcache_core import seal
from lmcache_core.cost import Recompute
from lmcache_core.errors import BackendError, Closed, CorruptChunk
from lmcache_core.eviction.guard import trouble
from lmcache_core.handles import Batch, Hit, Lease, Locate, Reservation, Transfer
from lmcache_core.identity import Identity
from lmcache_core.lanes import finish_within
from lmcache_core.layout import KVLayout
from lmcache_core.mirror import Mirror, Use
from lmcache_core.plan import Move, locate, split
from lmcache_core.protocols import MemoryBackend
from lmcache_core.slots import Slots
from lmcache_core.tenancy import Tenancy
from lmcache_core.tier import Outcome, StorageTier
from lmcache_core.types import ChunkKey, MissReason, object_bytes
from lmcache_core.writedown import WriteDown

__all__ = ["Hit", "Lease", "Pipeline", "Reservation", "Transfer"]

_BATCH_BYTES = 32 << 20
"""Most bytes one lane job reads or writes, so that early chunks of a long prefix are ready early."""

CLEAR_S = 60.0
"""How long `clear` waits for a medium."""


class Pipeline:
    """See the module. Made by `lmcache_core.build.build`; thread-safe."""

    def __init__(
        self, layout: KVLayout, memory_name: str, memory: MemoryBackend, slots: Slots, tiers: Sequence[StorageTier],
        *, verify: Literal["load", "serve"] = "load", recompute: Recompute | None = None, fidelity: str = "",
        tenancy: Tenancy | None = None, mirror: Mirror | None = None,
    ) -> None:  # fmt: skip
        self.layout = layout
        self.slots = slots
        self.memory_name = memory_name
        self.tiers = list(tiers)
        self.counts: Counter[str] = Counter()
        self.recompute = recompute or Recompute()
        """What reading must be faster than."""
        self.tenancy = tenancy
        """None where tenants are not told apart."""
        self.mirror = mirror
        """The GPU tier, of copies; None without one."""
        self.fidelity = fidelity
        """Codecs of lossy tiers, empty without any: part of the identity of every key this pipeline is asked for."""
        self._memory = memory
        self._verify_on_serve = verify == "serve"
        self._lock = threading.Lock()
        self._loads: dict[ChunkKey, Batch] = {}
        """Reads that somebody may wait for."""
        self._overdue: dict[ChunkKey, Batch] = {}
        """Reads that nobody waits for any longer, though the medium has not let go of them."""
        self._reading = 0
        """Slots that lane jobs read into, awaited or not."""
        self._filling: set[ChunkKey] = set()
        self._void: Counter[ChunkKey] = Counter()
        """Keys that are being deleted: no read may bring them back."""
        self._live_transfers = 0
        self._epoch = 0
        self._closing = False
        self._closed = False
        self._batch_chunks = max(1, _BATCH_BYTES // slots.slot_bytes)
        self._down = WriteDown(
            self._lock, slots, self.tiers, self._batch_chunks, tenancy.names if tenancy is not None else {}
        )
        self._patience = max((tier.deadline for tier in self.tiers), default=0.0)
        """Longest that any tier may take, in seconds."""

    # -- asking ----------------------------------------------------------------------------------------------
    def lookup(self, keys: Sequence[ChunkKey]) -> Hit:
        """How much of the prefix is present, and where. Never waits; see `Hit.pending`."""
        hit = Hit(self)
        self._sweep()
        with self._lock:
            self._check_open()
            index, loads = self.slots.index, self._loads
            here = [key in index or key in loads for key in keys]
        resident = _leading(here)
        hit.count = resident
        hit.sources = [self.memory_name] * resident
        if resident == len(keys):
            return hit
        hit.reason = MissReason.NOT_STORED
        if not self.tiers:
            return hit

        rest = list(keys[resident:])

        def fold(found: Locate) -> None:
            with self._lock:
                end, moves, hit.reason, _ = self._route(keys, resident, here[resident:], found)
            sources = [self.memory_name] * end
            for move in moves:
                for position in move.positions:
                    sources[position] = self.tiers[move.tier].name
            hit.sources = sources
            hit.count = end
            hit.pending = False

        hit.pending = True
        hit._locate = self._locate(rest, fold)
        return hit

    def _hide_overdue(self, keys: Sequence[ChunkKey], found: Locate) -> None:
        """A tier does not have what it failed to read in time: waiting for it again would be in vain. Lock held."""
        if self._overdue:
            for i, key in enumerate(keys):
                batch = self._overdue.get(key)
                if batch is not None:
                    t = self.tiers.index(batch.tier)
                    found.present[t] = [*found.present[t][:i], False, *found.present[t][i + 1 :]]

    def _route(
        self, keys: Sequence[ChunkKey], start: int, here: Sequence[bool], found: Locate
    ) -> tuple[int, list[Move], MissReason | None, dict[int, int]]:
        """From where to take the chunks `start...`, leaving out tiers that are not worth waiting for. Lock held.

        Return the length of the prefix, its moves, why it ends, and the tiers left out with the first chunk of each.
        """
        self._hide_overdue(keys[start:], found)
        end, moves = locate(start, len(keys), here, found.present)
        slow: dict[int, int] = {}
        hidden: list[list[bool]] = []
        while late := [move for move in moves if not self._is_worth(move, end)]:
            for move in late:
                slow[move.tier] = move.positions[0]
                hidden.append(found.present[move.tier])
                found.present[move.tier] = [False] * len(here)
            end, moves = locate(start, len(keys), here, found.present)
        reason = None if end == len(keys) else found.reason
        if reason is not None and keys[end] in self._overdue:
            reason = MissReason.DEADLINE
        elif reason is not None and any(present[end - start] for present in hidden):
            reason = MissReason.COST
        return end, moves, reason, slow

    def _is_worth(self, move: Move, end: int) -> bool:
        """Whether reading is quicker than computing what is lost without it: all from its first chunk to `end`."""
        limit = self.recompute.limit((end - move.positions[0]) * self.layout.chunk_tokens)
        if limit is None:
            return True
        tier, size = self.tiers[move.tier], self.slots.slot_bytes
        takes = tier.speed.seconds(len(move.positions) * size, self._batch_chunks * size, tier.read_lane.inflight_bytes)
        return takes is None or takes <= limit

    def _locate(self, keys: list[ChunkKey], then: Callable[[Locate], None]) -> Locate:
        """Ask every storage tier for the keys: memory at once, media on their lanes. Lock not held."""
        found = Locate(len(self.tiers), len(keys), then)
        asked: list[int] = []
        for t, tier in enumerate(self.tiers):
            present = tier.present(keys)
            if present is None:
                asked.append(t)
                found.expect(t, monotonic() + tier.lookup_deadline)
            else:
                found.answer(t, present)
        for t in asked:
            self._ask(found, t, keys)
        return found

    def _ask(self, found: Locate, t: int, keys: list[ChunkKey]) -> None:
        tier = self.tiers[t]

        def run() -> MissReason | None:
            answer = tier.ask(keys)
            found.answer(t, answer)
            return answer if isinstance(answer, MissReason) else None

        def give_up(reason: MissReason) -> None:
            found.answer(t, reason)

        if tier.ask_lane is None:
            raise AssertionError(f"tier {tier.name} answers lookups itself")
        refusal = tier.ask_lane.submit(run, give_up, 0, late=give_up)
        if refusal is not None:
            found.answer(t, refusal)

    # -- fetching --------------------------------------------------------------------------------------------
    def fetch(self, keys: Sequence[ChunkKey], preceding: int = 0) -> Transfer:
        """Hold the present prefix of `keys`: pin what is in memory, start reading the rest. Never waits.

        `preceding`: chunks of the sequence that come before `keys`, because the engine has them itself.
        """
        transfer = Transfer(self, list(keys))
        slots = self.slots
        self._sweep()
        with self._lock:
            self._check_open()
            found = list(map(slots.index.get, keys))
            resident = found.index(None) if None in found else len(found)
            if self.tiers and len(set(transfer.keys[resident:])) < len(found) - resident:
                raise ValueError("the keys repeat: a prefix has each chunk once")
            pins = slots.pins
            taken: list[int] = found[:resident]  # type: ignore[assignment]
            slots.policy.touch(transfer.keys)
            for slot in taken:
                pins[slot] += 1
            transfer._slots = taken
            transfer._sources = [self.memory_name] * resident
            transfer.count = resident
            self._live_transfers += 1
        if resident == len(found) or not self.tiers:
            if resident < len(found):
                transfer._reason = MissReason.NOT_STORED
            return transfer
        transfer._event = threading.Event()
        transfer.located = False
        transfer._begun = monotonic()
        transfer._deadline = transfer._begun + self._patience
        self._hurry(transfer, len(found) - resident)
        transfer._locate = self._locate(
            transfer.keys[resident:], lambda located: self._start(transfer, resident, located, preceding)
        )
        return transfer

    def _start(self, transfer: Transfer, start: int, located: Locate, preceding: int) -> None:
        """Second half of a fetch, once it is known where every chunk is: reserve slots and submit the moves."""
        keys = transfer.keys
        failed: list[tuple[Batch, MissReason]] = []
        with self._lock:
            slots = self.slots
            here = [key in slots.index or key in self._loads for key in keys[start:]]
            end, moves, transfer._reason, slow = self._route(keys, start, here, located)
            if transfer._finished or self._closed:
                end, moves, transfer._reason, slow = start, [], MissReason.CLOSED, {}
            transfer._slots += [-1] * (end - start)
            transfer._sources += [self.memory_name] * (end - start)
            # Pin what is here before taking slots: taking evicts.
            for position in range(start, end):
                slot = slots.index.get(keys[position])
                if slot is not None:
                    slots.pins[slot] += 1
                    transfer._slots[position] = slot
            wanted = sorted(position for move in moves for position in move.positions)
            room = self._fit(transfer, wanted)
            end = len(transfer._slots)
            slot_at = dict(zip(wanted, room, strict=True))
            slots.place(room, wanted, preceding * self.layout.chunk_tokens, self.layout.chunk_tokens)
            transfer.count = end
            for position in range(start, end):
                if transfer._slots[position] < 0 and position not in slot_at:
                    self._await(transfer, position, self._loads[keys[position]])
            # Reading has its whole time, where the call's deadline leaves it: a medium had to be asked first.
            begun = transfer._begun if located.immediate else monotonic()
            latest = transfer._begun + self._patience
            for move in moves:
                tier = self.tiers[move.tier]
                kept = Move(move.tier, [position for position in move.positions if position in slot_at])
                admitted = False
                for part in split(kept, tier.threads, self._batch_chunks):
                    batch = Batch(
                        tier,
                        [keys[position] for position in part.positions],
                        [slot_at[position] for position in part.positions],
                        min(begun + tier.deadline, latest),
                        self._epoch,
                        min(transfer._begun + tier.target, transfer._deadline),
                    )
                    self._reading += len(batch.slots)
                    for position in part.positions:
                        self._loads[keys[position]] = batch
                        self._await(transfer, position, batch)
                    refusal = self._submit(batch, admitted)
                    if refusal is None:
                        admitted = True
                    else:
                        failed.append((batch, refusal))
            if transfer._batches:
                transfer._deadline = min(transfer._deadline, max(batch.deadline for batch in transfer._batches))
                self._hurry(transfer, end - start)
            for t, position in slow.items():
                failed += self._probe(self.tiers[t], keys[position])
            transfer.located = True
            ended = transfer._pending == 0
        for batch, reason in failed:
            self._loaded(batch, [reason] * len(batch.keys))
        if ended:
            self._end([transfer])

    def _hurry(self, transfer: Transfer, chunks: int) -> None:
        """Let a transfer wait for `chunks` chunks no longer than the cost rule allows. The reads have their own time: a
        medium is not to blame when a short prompt is computed quickly."""
        limit = self.recompute.limit(chunks * self.layout.chunk_tokens)
        if limit is not None and transfer._begun + limit < transfer._deadline:
            transfer._deadline = transfer._begun + limit
            transfer._late = MissReason.COST

    def _probe(self, tier: StorageTier, key: ChunkKey) -> list[tuple[Batch, MissReason]]:
        """A tier was left out because it is slow: now and then read one chunk, for nobody, to see whether it still is.
        Return the batch if its lane refused it. Lock held."""
        tier.count("bypassed_cost")
        if key in self.slots.index or key in self._loads or not tier.speed.take_probe():
            return []
        slots = self._take(1, key)
        if not slots:
            return []
        self.slots.starts[slots[0]] = -1
        batch = Batch(tier, [key], slots, monotonic() + tier.deadline, self._epoch, probe=True)
        self._reading += 1
        refusal = self._submit(batch, False)
        return [] if refusal is None else [(batch, refusal)]

    def _fit(self, transfer: Transfer, wanted: list[int]) -> list[int]:
        """Slots for the wanted positions. What memory has no room for is cut off the end of the transfer. Lock held."""
        room = self._take(len(wanted), transfer.keys[0])
        while len(room) < len(wanted):
            slot = transfer._slots.pop()
            transfer._sources.pop()
            transfer._reason = MissReason.NO_ROOM
            if wanted[-1] == len(transfer._slots):
                wanted.pop()
            elif slot >= 0:
                self.slots.unpin([slot])
                room += self.slots.take(1, transfer.keys[0])
        return room

    def _await(self, transfer: Transfer, position: int, batch: Batch) -> None:
        """Let a transfer wait for one chunk of a batch. Lock held."""
        batch.waiters[transfer.keys[position]].append((transfer, position))
        transfer._sources[position] = batch.tier.name
        transfer._pending += 1
        if batch not in transfer._batches:
            transfer._batches.append(batch)

    def _submit(self, batch: Batch, admitted: bool) -> MissReason | None:
        """Queue one batch; why not, if refused. A prefix whose first batch was `admitted` is read whole. Lock held."""

        def run() -> MissReason | None:
            begun = monotonic()
            outcomes = batch.tier.read(batch.keys, batch.slots, batch.goal)
            if outcomes.count(None) == len(outcomes):
                nbytes = len(batch.keys) * self.slots.slot_bytes
                batch.tier.speed.note(nbytes, monotonic() - begun, probe=batch.probe)
            if self._verify_on_serve:
                self._seal(batch.keys, batch.slots, outcomes)
            self._loaded(batch, outcomes)
            return MissReason.ERROR if MissReason.ERROR in outcomes else None

        def cancel(reason: MissReason) -> None:
            self._loaded(batch, [reason] * len(batch.keys))

        def late(reason: MissReason) -> None:
            self._abandon(batch, reason)

        return batch.tier.read_lane.submit(
            run,
            cancel,
            len(batch.keys) * self.slots.slot_bytes,
            late=late,
            deadline=batch.deadline,
            admitted=admitted,
        )

    def _loaded(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        """A batch ended: publish what arrived whole, give the rest back, tell whoever waits."""
        arrived: list[ChunkKey] = []
        landed: list[int] = []
        spare: list[int] = []
        with self._lock:
            slots = self.slots
            stale = batch.epoch != self._epoch
            for key, slot, outcome in zip(batch.keys, batch.slots, outcomes, strict=True):
                # A store, or a later read of the same chunk, may have been faster.
                if outcome is None and not stale and key not in slots.index and key not in self._void:
                    arrived.append(key)
                    landed.append(slot)
                else:
                    spare.append(slot)
            # The header page is only in the slot when the object is raw; then it keeps its own date.
            slots.publish_loaded(arrived, landed, int(time.time()))
            slots.give_back(spare)
            self._reading -= len(batch.slots)
            for key in batch.keys:
                if self._overdue.get(key) is batch:
                    del self._overdue[key]
            ended = self._tell(batch, dict(zip(batch.keys, outcomes, strict=True)))
            if batch.tier.promote:
                self._down.spread(arrived, landed, arrived, self.tiers.index(batch.tier))
            else:
                for key in arrived:
                    slots.hide(key)  # freed with the last pin of those that waited for it
        self._end(ended)

    def _abandon(self, batch: Batch, reason: MissReason) -> None:
        """A read is overdue: nobody waits for it any longer. Its slots stay taken until the medium lets go of them."""
        with self._lock:
            self._overdue.update((key, batch) for key in batch.keys if self._loads.get(key) is batch)
            ended = self._tell(batch, dict.fromkeys(batch.keys, reason))
        self._end(ended)

    def _tell(self, batch: Batch, outcomes: dict[ChunkKey, Outcome]) -> list[Transfer]:
        """Give a batch's waiters their chunks, or the reasons why not; return those that wait no longer. Lock held."""
        ended: list[Transfer] = []
        slots = self.slots
        for key, outcome in outcomes.items():
            if self._loads.get(key) is batch:
                del self._loads[key]
            for transfer, position in batch.waiters.pop(key, ()):
                slot = slots.index.get(key)
                if slot is not None:
                    slots.pins[slot] += 1
                    transfer._slots[position] = slot
                elif transfer._reason is None or position < transfer.count:
                    transfer.count = min(transfer.count, position)
                    transfer._reason = outcome or MissReason.RACED
                transfer._pending -= 1
                if transfer._pending == 0 and transfer.located:
                    ended.append(transfer)
        return ended

    def _end(self, transfers: Sequence[Transfer]) -> None:
        """Wake whoever waits for the transfers; end those nobody waits for. Lock not held."""
        for transfer in transfers:
            if transfer._event is not None:
                transfer._event.set()
            if transfer._detached:
                self._cancel(transfer)

    def _finish(self, transfer: Transfer) -> Lease:
        self._sweep()
        with self._lock:
            slots, reason = self._detach(transfer)
        if self._verify_on_serve:
            slots, reason = self._verified(transfer, slots, reason)
        count = len(slots)
        keys, sources = transfer.keys[:count], transfer._sources[:count]
        with self._lock:
            for source in set(sources):
                self.counts["hit." + source] += sources.count(source)
            if reason is not None:
                self.counts[f"miss.{reason}"] += len(transfer.keys) - count
        if count:
            for tier in self.tiers:
                tier.touch(keys)
        return Lease(self, keys, slots, sources, reason)

    def _detach(self, transfer: Transfer) -> tuple[list[int], MissReason | None]:
        """Stop waiting for a transfer and keep its unbroken prefix. Lock held."""
        if transfer._finished:
            raise Closed("the result of this transfer was taken, or it was cancelled")
        transfer._finished = True
        self._live_transfers -= 1
        held = transfer._slots
        count = held.index(-1) if -1 in held else len(held)
        reason = transfer._reason
        if not transfer.located or count < transfer.count:
            reason = transfer._late  # not failed: not here in time
        if transfer._pending:
            for batch in transfer._batches:
                for waiters in batch.waiters.values():
                    waiters[:] = [waiter for waiter in waiters if waiter[0] is not transfer]
            transfer._pending = 0
        transfer._batches = []
        if count < len(held):
            self.slots.unpin([slot for slot in held[count:] if slot >= 0])
        if transfer._event is not None:
            # Batches arrive in any order; a deeper chunk must not end up warmer than a shallower one.
            self.slots.policy.touch(transfer.keys)
        transfer._slots = []
        return held[:count], reason if count < len(transfer.keys) else None

    def _verified(
        self, transfer: Transfer, slots: list[int], reason: MissReason | None
    ) -> tuple[list[int], MissReason | None]:
        """Check the bytes in memory once more before an engine gets them."""
        size = self.slots.chunk_bytes
        for i, slot in enumerate(slots):
            try:
                seal.unseal(
                    self.slots.view(slot, object_bytes(size)), transfer.keys[i], self.layout.id, seal.RAW_CODEC, size
                )
            except CorruptChunk as error:
                with self._lock:
                    if self.slots.index.get(transfer.keys[i]) == slot:
                        self.slots.hide(transfer.keys[i])
                        self.counts["quarantined"] += 1
                    self.slots.unpin(slots[i:])
                return slots[:i], MissReason(error.reason)
        return slots, reason

    def _seal(self, keys: Sequence[ChunkKey], slots: Sequence[int], outcomes: Sequence[Outcome]) -> None:
        """Seal the chunks that have no header yet, so that they can be verified when they are served."""
        size, now = self.slots.chunk_bytes, int(time.time())
        for key, slot, outcome in zip(keys, slots, outcomes, strict=True):
            if outcome is None and not self.slots.sealed[slot]:
                view = self.slots.view(slot, object_bytes(size))
                seal.seal(view, key, self.layout.id, seal.RAW_CODEC, size, size, now)
                self.slots.sealed[slot] = 1

    def _cancel(self, transfer: Transfer) -> None:
        with self._lock:
            if not transfer._finished:
                slots, _ = self._detach(transfer)
                self.slots.unpin(slots)

    def prefetch(self, keys: Sequence[ChunkKey]) -> None:
        """Start reading the present prefix into memory, as a hint; it is held until it has arrived, no longer."""
        transfer = self.fetch(keys)
        with self._lock:
            transfer._detached = True
            ended = transfer.located and transfer._pending == 0
        if ended:
            self._cancel(transfer)

    def retrieve(self, keys: Sequence[ChunkKey], timeout: float | None = None) -> Lease:
        """Fetch and wait, at most `timeout` seconds or the tiers' deadline. Blocks: not for an engine's thread."""
        transfer = self.fetch(keys)
        try:
            transfer.wait(timeout)
            return self._finish(transfer)
        except BaseException:
            transfer.cancel()
            raise

    def _release(self, lease: Lease) -> None:
        with self._lock:
            slots, lease._slots = lease._slots, None
            if slots and lease._use is None:
                self.slots.unpin(slots)
        if slots is not None and lease._use is not None:  # an empty one has an event all the same
            self._after(lease._use, partial(self._unpin, slots))

    def _unpin(self, slots: Sequence[int]) -> None:
        with self._lock:
            self.slots.unpin(slots)

    def _after(self, use: Use | None, then: Callable[[], None]) -> None:
        """Call `then`: now, or when a GPU is done with what it uses. Lock not held."""
        if use is None or self.mirror is None:
            then()
        else:
            self.mirror.after(use, then)

    def _found_on_device(self, sources: list[str], found: Sequence[bool]) -> None:
        """Chunks that are served from the GPU tier after all: correct their sources, and the counters."""
        assert self.mirror is not None
        with self._lock:
            for i, here in enumerate(found):
                if here:
                    self.counts["hit." + sources[i]] -= 1
                    self.counts["hit." + self.mirror.name] += 1
                    sources[i] = self.mirror.name

    # -- storing ---------------------------------------------------------------------------------------------
    def reserve(self, keys: Sequence[ChunkKey], first: int = 0) -> Reservation:
        """Slots for the keys from `first` on that are neither stored nor on their way.

        Give the whole prefix: it marks the use. A caller that stores a growing sequence piece by piece passes `first`,
        so that what was evicted in between is not copied again with every piece.
        """
        self._sweep()
        with self._lock:
            self._check_open()
            slots = self.slots
            index, loads, filling = slots.index, self._loads, self._filling
            own: list[int] = []
            if index.keys().isdisjoint(keys) and loads.keys().isdisjoint(keys) and filling.isdisjoint(keys):
                positions = list(range(first, len(keys)))  # the usual case, without a look at each key
            else:
                positions = [
                    i
                    for i, key in enumerate(keys)
                    if key not in index and key not in loads and key not in filling and i >= first
                ]
                if len(slots.free) < len(positions) or slots.shares is not None:
                    # A prefix must not evict its own beginning.
                    own = [index[key] for key in keys if key in index]
            if len(positions) < len(keys):
                slots.policy.touch(keys)
            new = [keys[i] for i in positions]
            if len(set(new)) < len(new):
                raise ValueError("the keys repeat: a prefix has each chunk once")
            for slot in own:
                slots.pins[slot] += 1
            taken = self._take(len(positions), keys[0] if positions else None)
            for slot in own:
                slots.pins[slot] -= 1
            if len(taken) < len(positions):
                self.counts["drop.no_room"] += len(positions) - len(taken)
                del positions[len(taken) :], new[len(taken) :]
            slots.place(taken, positions, 0, self.layout.chunk_tokens)
            filling.update(new)
            return Reservation(self, keys, new, taken, positions, self._epoch)

    def store(self, keys: Sequence[ChunkKey], fill: Callable[[Reservation], None]) -> int:
        """Reserve, let `fill` write the chunks, commit. Return how many chunks were published."""
        with self.reserve(keys) as reservation:
            if not reservation.positions:
                return 0
            fill(reservation)
            return reservation.commit()

    def _commit(self, chain: Sequence[ChunkKey], keys: list[ChunkKey], slots: list[int], epoch: int) -> int:
        if self._verify_on_serve:
            self._seal(keys, slots, [None] * len(keys))
        with self._lock:
            self._filling.difference_update(keys)
            if epoch != self._epoch or self._closed:
                self.slots.give_back(slots)
                return 0
            index = self.slots.index
            if not index.keys().isdisjoint(keys):
                # A read brought some of them meanwhile.
                self.slots.give_back([slot for key, slot in zip(keys, slots, strict=True) if key in index])
                slots = [slot for key, slot in zip(keys, slots, strict=True) if key not in index]
                keys = [key for key in keys if key not in index]
            self.slots.publish(keys, slots, int(time.time()), sealed=self._verify_on_serve)
            if len(keys) < len(chain):
                self.slots.policy.touch(chain)
            self.counts["stored"] += len(keys)
            if self.tiers:
                self._down.spread(keys, slots, chain, len(self.tiers))
        return len(keys)

    def _abort(self, keys: list[ChunkKey], slots: list[int]) -> None:
        with self._lock:
            self._filling.difference_update(keys)
            self.slots.give_back(slots)

    def _take(self, want: int, owner: ChunkKey | None) -> list[int]:
        """Up to `want` slots for chunks of `owner`'s tenant. Where dirty chunks are in the way, start writing them down
        for next time. Lock held."""
        taken = self.slots.take(want, owner)
        if len(taken) < want and self.slots.dirty:
            self._down.demote(want - len(taken))
        return taken

    def tenant_identity(self, identity: Identity, tenant: str | None) -> Identity | None:
        """The identity of one tenant's request, and note whose its chunks are.

        None for a request that takes no part: it has no tenant, or its tenant has too many identities. Without tenancy
        the identity as it is. `tenant` comes from the operator's gateway, never from whoever wrote the prompt.
        """
        tenancy = self.tenancy
        if tenancy is None:
            return identity
        if not tenant:
            return None
        identity = tenancy.identity(identity, tenant)
        prefix = identity.prefix
        if prefix not in tenancy.names:
            with self._lock:
                if prefix not in tenancy.names and not tenancy.admit(prefix, tenant):
                    return None
                self.slots.claim(prefix, tenant)
            for tier in self.tiers:
                tier.claim(prefix, tenant)
        return identity

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """An engine computed `tokens` tokens of a prompt in `seconds`: what adapters measure for the cost rule."""
        self.recompute.note(tokens, seconds)

    # -- life ------------------------------------------------------------------------------------------------
    def clear(self, tier: str | None = None) -> None:
        """Forget every chunk: of one tier by name, or of all. None is served from now on, whatever the media do.

        Waits for the media to delete their objects, at most `CLEAR_S` seconds. Raise `BackendError` when one fails or
        takes longer: that tier stays out of service until a clear succeeds.
        """
        device = [] if self.mirror is None else [self.mirror.name]
        names = [*device, self.memory_name, *(t.name for t in self.tiers)]
        if tier is not None and tier not in names:
            raise ValueError(f"no tier {tier!r}; there are {', '.join(names)}")
        chosen = [t for t in self.tiers if tier in (None, t.name)]
        ended: list[Transfer] = []
        with self._lock:
            # All at once: nothing moves from one tier to another meanwhile, and what is on its way is void.
            for storage in chosen:
                storage.begin_wipe()
            if tier in (None, self.memory_name):
                self._epoch += 1
                for key in list(self.slots.index):
                    self.slots.hide(key)
                for batch in list({id(batch): batch for batch in self._loads.values()}.values()):
                    ended += self._tell(batch, dict.fromkeys(batch.keys, MissReason.RACED))
        if self.mirror is not None and tier in (None, self.memory_name, self.mirror.name):
            self.mirror.clear()
        self._end(ended)
        finish_within(CLEAR_S, [storage.wipe for storage in chosen], "clear")
        failed = [f"{t.name} ({t.last_error or 'no answer'})" for t in chosen if t.wiping]
        if failed:
            raise BackendError(f"not cleared, and out of service until a clear succeeds: {', '.join(failed)}")

    def discard(self, keys: Sequence[ChunkKey], timeout: float = CLEAR_S) -> None:
        """Delete these chunks from every tier. Waits until nothing that is under way can bring them back, at most
        `timeout` seconds. Raise `BackendError` when a tier fails or takes longer: it may still have them."""
        end = monotonic() + timeout
        gone: list[StorageTier] = []

        def delete(tier: StorageTier) -> None:
            # What was being written when the first deletion came is there for the second.
            for _ in range(2):
                tier.forget(keys)
                if not tier.drain(max(0.0, end - monotonic())):
                    return
            present = tier.present(keys)
            present = tier.ask(keys) if present is None else present
            if isinstance(present, list) and not any(present) and not tier.owes(keys):
                gone.append(tier)

        # Stores that a device has not finished yet.
        landed = self.mirror is None or self.mirror.drain(timeout)
        with self._lock:
            self._check_open()
            self._void.update(keys)
            for key in keys:
                if key in self.slots.index:
                    self.slots.hide(key)
        try:
            finish_within(max(0.0, end - monotonic()), [partial(delete, tier) for tier in self.tiers], "discard")
        finally:
            with self._lock:
                self._void -= Counter(keys)
        left = [f"{tier.name} ({tier.last_error or 'no answer'})" for tier in self.tiers if tier not in gone]
        if self.mirror is not None and not landed:
            left.insert(0, f"{self.mirror.name} (still being stored)")
        if left:
            raise BackendError(f"not deleted, and may be served again: {', '.join(left)}")

    def flush(self, timeout: float) -> bool:
        """Write down everything that must be written; False when that took longer than `timeout` seconds."""
        end = monotonic() + timeout
        if self.mirror is not None and not self.mirror.drain(timeout):
            return False
        while True:
            self._sweep()
            with self._lock:
                if self.slots.dirty:
                    self._down.demote(len(self.slots.dirty))
            idle = [tier.write_lane.drain(max(0.0, min(0.05, end - monotonic()))) for tier in self.tiers]
            with self._lock:
                clean = not self._down.waiting
            if clean and all(idle):
                return True
            if self._closed or monotonic() >= end:
                return False

    def close(self, timeout: float = 10.0) -> None:
        """Flush, stop the lanes and release memory, within about `timeout` seconds. Idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        end = monotonic() + timeout
        self.flush(timeout / 2)
        with self._lock:
            self._closed = True
        for tier in self.tiers:
            tier.stop()
        left = max(0.1, end - monotonic())
        finish_within(left, [partial(tier.close, left) for tier in self.tiers], "close")
        # Memory that a GPU may still copy from or to stays.
        if self.mirror is None or self.mirror.close(max(0.1, end - monotonic())):
            self._memory.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the pipeline is closed")

    def _sweep(self) -> None:
        """Give up on what a hung tier has not done in time. Every call of an engine does this. Lock not held."""
        for tier in self.tiers:
            tier.sweep()

    def stats(self) -> dict[str, Any]:
        """Counters since start-up, and what is held now. Plain data."""
        with self._lock:
            counts = dict(self.counts)
            slots = self.slots
            memory: dict[str, Any] = {
                "slots": slots.count,
                "slot_bytes": slots.slot_bytes,
                "ready": len(slots.index),
                "free": len(slots.free),
                "dirty": self._down.waiting,
                "evicted": slots.evicted,
                "remark": slots.region.remark,
            }
        if slots.shares is not None:
            memory["tenants"] = slots.shares.stats()
        memory["pinned"] = sum(1 for pins in slots.pins if pins)
        tiers: dict[str, Any] = {self.memory_name: memory, **{tier.name: tier.stats() for tier in self.tiers}}
        for entry, policy in zip(tiers.values(), (slots.policy, *(tier.policy for tier in self.tiers)), strict=True):
            entry["eviction_trouble"] = trouble(policy)
        if self.mirror is not None:
            tiers = {self.mirror.name: self.mirror.stats(), **tiers}
        return {
            "stored": counts.get("stored", 0),
            "hits": {name: counts.get(f"hit.{name}", 0) for name in tiers},
            "misses": {k.removeprefix("miss."): v for k, v in sorted(counts.items()) if k.startswith("miss.")},
            "dropped": {k.removeprefix("drop."): v for k, v in sorted(counts.items()) if k.startswith("drop.")},
            "recompute": self.recompute.stats(),
            "fidelity": self.fidelity or "exact",
            "quarantined": counts.get("quarantined", 0) + sum(t.counts["quarantined"] for t in self.tiers),
            "tiers": tiers,
        }

    def check(self, *, idle: bool = False) -> None:
        """Raise `AssertionError` on any broken invariant; with `idle`, also when anything is still held."""
        with self._lock:
            self.slots.check(self._reading + len(self._filling))
            self._down.check()
            if self.mirror is not None:
                self.mirror.check(idle=idle)
            if idle:
                pinned = {slot: pins for slot, pins in enumerate(self.slots.pins) if pins}
                assert not pinned, f"pins left behind: {pinned}"
                assert not self._filling, f"{len(self._filling)} reservations were neither committed nor aborted"
                left = f"{self._reading} reads never ended"
                assert not self._loads and not self._overdue and not self._reading, left
                assert not self._down.demoting, f"{len(self._down.demoting)} demotions never ended"
                assert not self._live_transfers, f"{self._live_transfers} transfers were neither taken nor cancelled"
        if idle:
            for tier in self.tiers:
                tier.check()


def _leading(flags: Sequence[bool]) -> int:
    """Length of the run of True at the start."""
    return flags.index(False) if False in flags else len(flags)
