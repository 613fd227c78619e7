"""Chunks on their way from memory to the storage tiers: written through when they are stored, written back later.

Everything here is called with the pipeline's lock held, but for what lanes call back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from lmcache_core.lanes import GiveUp, Job
from lmcache_core.slots import Slots
from lmcache_core.tier import StorageTier
from lmcache_core.types import IDENTITY_BYTES, ChunkKey, MissReason

Written = Callable[[Sequence[int], bool], None]
"""Called with the slots of a write that ended, and whether it must be tried again. Lock held."""


class WriteDown:
    """Which slots are still to be written, and to which tiers."""

    def __init__(
        self,
        lock: threading.Lock,
        slots: Slots,
        tiers: Sequence[StorageTier],
        batch_chunks: int,
        tenants: Mapping[bytes, str],
    ) -> None:
        """`lock`: the pipeline's. `batch_chunks`: most chunks of one lane job. `tenants`: by identity prefix."""
        self._lock = lock
        self._slots = slots
        self._tiers = tiers
        self._batch_chunks = batch_chunks
        self._tenants = tenants
        self._back = [tier for tier in tiers if tier.write_mode == "back"]
        self.demoting: dict[int, int] = {}
        """Dirty slots on their way to write-back tiers, with the number of writes under way."""
        self._refused: set[int] = set()
        """Those among them that a full lane refused: they stay dirty."""
        self.dirty_limit = max(1, slots.count // 2)
        """Slots that may be dirty before writing them down begins."""

    @property
    def waiting(self) -> int:
        """Slots that a write-back tier does not have yet."""
        return len(self._slots.dirty) + len(self.demoting)

    def check(self) -> None:
        """Raise `AssertionError` when the books do not add up."""
        assert not self.demoting.keys() & self._slots.dirty.keys(), "a slot is dirty and on its way"
        assert self._refused <= self.demoting.keys(), "a slot was refused that is not on its way"

    def spread(self, keys: Sequence[ChunkKey], slots: Sequence[int], chain: Sequence[ChunkKey], origin: int) -> None:
        """New chunks in memory: write them through, or mark them for demotion. `chain` is the prefix they belong to,
        `origin` the tier they came from, or the number of tiers for a fresh store; deeper tiers have them by then.
        Lock held."""
        if not keys:
            return
        for tier in self._tiers[:origin]:
            if tier.write_mode == "never":
                continue
            if tier.write_mode == "back":
                missing = (slot for key, slot in zip(keys, slots, strict=True) if not tier.has(key))
                self._slots.dirty.update(dict.fromkeys(missing))
            else:
                self._write(tier, keys, slots, chain, None)
        if self.waiting > self.dirty_limit:
            self.demote(len(self._slots.dirty) - self.dirty_limit // 2)

    def demote(self, want: int) -> None:
        """Write the longest waiting dirty chunks to the write-back tiers, as far as lanes have room. Lock held."""
        room = min(tier.write_lane.room for tier in self._back) // self._slots.slot_bytes
        dirty, key_of = self._slots.dirty, self._slots.key_of
        chosen = list(islice(dirty, min(want, room))) if want > 0 else []
        # Last batch first: what is written later counts as warmer, and the beginning of a prefix must be warmest.
        for at in reversed(range(0, len(chosen), self._batch_chunks)):
            numbers = chosen[at : at + self._batch_chunks]
            keys: list[ChunkKey] = [key_of[slot] for slot in numbers]  # type: ignore[misc]
            for slot in numbers:
                del dirty[slot]
                self.demoting[slot] = len(self._back)
            for tier in self._back:
                self._write(tier, keys, numbers, keys, self._demoted)

    def _demoted(self, slots: Sequence[int], refused: bool) -> None:
        """A write-back batch ended, or was refused by a full lane. Lock held.

        What failed counts as clean: a failing tier must not fill memory with chunks that cannot be evicted.
        """
        if refused:
            self._refused.update(slots)
        for slot in slots:
            self.demoting[slot] -= 1
            if self.demoting[slot] == 0:
                del self.demoting[slot]
                if slot in self._refused:
                    self._refused.discard(slot)
                    if self._slots.key_of[slot] is not None:
                        self._slots.dirty[slot] = None

    def _write(
        self,
        tier: StorageTier,
        keys: Sequence[ChunkKey],
        numbers: Sequence[int],
        chain: Sequence[ChunkKey],
        then: Written | None,
    ) -> None:
        """Queue chunks for a tier in batches, pinned until written. What the lane refuses is dropped. Lock held."""
        # What is written back was chosen among all tenants' chunks, as memory needs it.
        owner = self._tenants.get(keys[0][:IDENTITY_BYTES]) if then is None else None
        for at in range(0, len(keys), self._batch_chunks):
            some = list(keys[at : at + self._batch_chunks])
            held = list(numbers[at : at + self._batch_chunks])
            for slot in held:
                self._slots.pins[slot] += 1
            run, cancel = self._write_job(tier, some, held, chain, then)
            refusal = tier.write_lane.submit(run, cancel, len(some) * self._slots.slot_bytes, owner=owner)
            if refusal is not None:
                self._slots.unpin(held)
                again = refusal is MissReason.BUSY
                if then is None or not again:
                    tier.count(f"dropped_{refusal}", len(some))
                if then is not None:
                    then(held, again)

    def _write_job(
        self,
        tier: StorageTier,
        keys: list[ChunkKey],
        held: list[int],
        chain: Sequence[ChunkKey],
        then: Written | None,
    ) -> tuple[Job, GiveUp]:
        epoch = tier.epoch

        def end() -> None:
            with self._lock:
                self._slots.unpin(held)
                if then is not None:
                    then(held, False)

        def run() -> MissReason | None:
            outcomes = tier.write(keys, held, epoch, chain)
            for outcome in outcomes:
                if outcome is not None:
                    tier.count(f"dropped_{outcome}")
            end()
            return MissReason.ERROR if MissReason.ERROR in outcomes else None

        def cancel(reason: MissReason) -> None:
            tier.count(f"dropped_{reason}", len(keys))
            end()

        return run, cancel
