"""What a pipeline hands out: hits, transfers, leases and reservations; and the two records behind them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from lmcache_core.errors import Closed
from lmcache_core.types import ChunkKey, MissReason

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lmcache_core.mirror import Mirror, Use
    from lmcache_core.pipeline import Pipeline
    from lmcache_core.tier import StorageTier

_SWEEP_S = 0.05
"""How often a waiting thread looks for overdue work."""


class Lease:
    """Chunks pinned in memory, a prefix of what was asked for. Use as a context manager, or `release()`."""

    __slots__ = ("_pipeline", "_slots", "_use", "keys", "reason", "sources")

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
        self._use: Use | None = None
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

    def on_device(self, stream: int, count: int | None = None) -> NDArray[np.int64]:
        """Addresses from which work queued on `stream`, one of the GPU tier's device, can read the first `count`
        payloads: device memory where there is room, pinned host memory beyond. What was there already says so in
        `sources`.

        Once, for a pipeline with a `mirror`. `release` then takes effect when all work queued by then is done.
        """
        addresses, self._use, found = _mirror_of(self._pipeline, self._use).bring(self.slots[:count], stream)
        self._pipeline._found_on_device(self.sources, found)
        return addresses

    def view(self, i: int) -> memoryview:
        """Raw bytes of chunk `i`; valid until release, not to be written."""
        return self._pipeline.slots.payload(self.slots[i])

    def release(self) -> None:
        """Drop the pins, after `on_device` when the stream has come so far. Idempotent, from any thread."""
        self._pipeline._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Reservation:
    """Slots for chunks that are not stored yet. Fill them, then `commit()`; leaving without commit aborts."""

    __slots__ = ("_chain", "_epoch", "_keys", "_pipeline", "_slots", "_use", "positions")

    def __init__(
        self,
        pipeline: Pipeline,
        chain: Sequence[ChunkKey],
        keys: list[ChunkKey],
        slots: list[int],
        positions: list[int],
        epoch: int,
    ) -> None:
        self._pipeline = pipeline
        self._chain = chain
        self._keys = keys
        self._slots: list[int] | None = slots
        self._use: Use | None = None
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

    def on_device(self, stream: int, count: int | None = None) -> NDArray[np.int64]:
        """Addresses to which work queued on `stream`, one of the GPU tier's device, writes the payloads of the first
        `count` of `positions`: device memory where there is room, pinned host memory beyond.

        Once, for a pipeline with a `mirror`. What the engine's pages held may change as soon as that work is done;
        `commit` and `abort` return at once and take effect later: with `commit`, when all is in host memory too.
        """
        addresses, self._use = _mirror_of(self._pipeline, self._use).room(self.slots[:count], stream)
        return addresses

    def view(self, i: int) -> memoryview:
        """Room for the raw bytes of the chunk at `positions[i]`."""
        return self._pipeline.slots.payload(self.slots[i])

    def commit(self) -> int:
        """Publish the filled chunks and hand them to the write tiers; the number of chunks published.

        After `on_device`, the number of chunks that will be, unless something else brings them meanwhile.
        """
        slots, self._slots = self.slots, None
        commit = partial(self._pipeline._commit, self._chain, self._keys, slots, self._epoch)
        if self._use is None:
            return commit()
        mirror = self._pipeline.mirror
        assert mirror is not None
        mirror.land(self._use, slots, commit, partial(self._pipeline._abort, self._keys, slots))
        return len(slots)

    def abort(self) -> None:
        """Give the slots back; nothing becomes visible. Does nothing after commit or abort."""
        slots, self._slots = self._slots, None
        if slots is not None:
            self._pipeline._after(self._use, partial(self._pipeline._abort, self._keys, slots))

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def _mirror_of(pipeline: Pipeline, use: Use | None) -> Mirror:
    """Its GPU tier. Raise `ValueError` where there is none, or where it is in use already."""
    if pipeline.mirror is None or use is not None:
        raise ValueError("on_device is for pipelines with a GPU tier" if use is None else "on_device was called before")
    return pipeline.mirror


class Hit:
    """Answer of a lookup: how much of the prefix is present, and where. Holds nothing; see `fetch` to hold it."""

    __slots__ = ("_locate", "_pipeline", "count", "pending", "reason", "sources")

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.count = 0
        """Chunks present, from the first on."""
        self.sources: list[str] = []
        """Name of the nearest tier of each present chunk."""
        self.reason: MissReason | None = None
        """Why chunk `count` is missing; None when all are present."""
        self.pending = False
        """True while a tier that must be asked over its lane has not answered; then the rest may still grow."""
        self._locate: Locate | None = None

    def wait(self, timeout: float) -> bool:
        """Wait for pending tiers; False when they have not answered within `timeout` seconds."""
        return self._locate is None or _wait(self._pipeline, self._locate, monotonic() + timeout)


class Locate:
    """Presence of keys in every storage tier; some answers may come later, from lanes."""

    __slots__ = ("_due", "_lock", "_silent", "_then", "event", "present", "reason")

    def __init__(self, tiers: int, keys: int, then: Callable[[Locate], None]) -> None:
        absent = [False] * keys
        self.present: list[list[bool]] = [absent] * tiers
        self.reason = MissReason.NOT_STORED
        """Why a key that no tier has is missing; says so when a tier could not be asked."""
        self.event = threading.Event()
        self._then = then
        self._silent = set(range(tiers))
        """Tiers that have not answered."""
        self._due: dict[int, float] = {}
        """Until when to wait for each tier that had to be asked on its lane."""
        self._lock = threading.Lock()

    @property
    def immediate(self) -> bool:
        """Whether every tier answered from memory."""
        return not self._due

    def expect(self, tier: int, deadline: float) -> None:
        """A tier is being asked; it has until then. Before the first answer."""
        self._due[tier] = deadline

    def expire(self, now: float) -> float:
        """Wait no longer for tiers whose time is up; return when the next one's is."""
        with self._lock:
            late = [tier for tier in self._silent if self._due.get(tier, inf) <= now]
        for tier in late:
            self.answer(tier, MissReason.DEADLINE)
        with self._lock:
            return min((self._due.get(tier, inf) for tier in self._silent), default=inf)

    def answer(self, tier: int, present: list[bool] | MissReason) -> None:
        """Take one tier's answer; a second one for the same tier comes too late and is ignored."""
        with self._lock:
            if tier not in self._silent:
                return
            if isinstance(present, MissReason):
                self.reason = present
            else:
                self.present[tier] = present
            self._silent.discard(tier)
            last = not self._silent
        if last:
            self._then(self)
            self.event.set()


class Batch:
    """One lane job: chunks read from one tier into slots."""

    __slots__ = ("deadline", "epoch", "goal", "keys", "probe", "slots", "tier", "waiters")

    def __init__(
        self,
        tier: StorageTier,
        keys: list[ChunkKey],
        slots: list[int],
        deadline: float,
        epoch: int,
        goal: float = inf,
        probe: bool = False,
    ) -> None:
        self.tier = tier
        self.keys = keys
        self.slots = slots
        self.deadline = deadline
        self.epoch = epoch
        self.goal = goal
        """When whoever waits would like to have it."""
        self.probe = probe
        """Read only to measure the tier again."""
        self.waiters: dict[ChunkKey, list[tuple[Transfer, int]]] = {key: [] for key in keys}


class Transfer:
    """A prefix on its way into memory. What was in memory is pinned at once; the rest is read on the lanes."""

    __slots__ = (
        "_batches",
        "_begun",
        "_deadline",
        "_detached",
        "_event",
        "_finished",
        "_late",
        "_locate",
        "_pending",
        "_pipeline",
        "_reason",
        "_slots",
        "_sources",
        "count",
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
        self._detached = False
        """Nobody waits: it ends itself."""
        self._slots: list[int] = []
        self._sources: list[str] = []
        self._pending = 0
        self._batches: list[Batch] = []
        self._begun = 0.0
        self._deadline = inf
        self._late = MissReason.DEADLINE
        """Why what is not here at the deadline is missing."""
        self._locate: Locate | None = None
        self._event: threading.Event | None = None
        self._reason: MissReason | None = None
        self._finished = False

    @property
    def done(self) -> bool:
        """Whether `result()` is there: everything arrived, failed, or ran out of time."""
        if self._event is None or (self.located and self._pending == 0):
            return True
        now = monotonic()
        if self._locate is not None and not self.located:
            self._locate.expire(now)
        self._pipeline._sweep()
        return (self.located and self._pending == 0) or now >= self._deadline

    @property
    def sources(self) -> list[str]:
        """Name of the tier each expected chunk comes from, valid once `located`."""
        return self._sources[: self.count]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until done, at most the tiers' deadline and `timeout` seconds; return `done`."""
        if self._event is not None and not self.done:
            end = inf if timeout is None else monotonic() + timeout
            _wait(self._pipeline, self._locate, end, self)
        return self.done

    def result(self) -> Lease:
        """The lease on what arrived: the prefix up to the first chunk that failed. Call once; waits if not done."""
        self.wait()
        return self._pipeline._finish(self)

    def cancel(self) -> None:
        """Stop waiting and drop the pins. Reads under way end on their own and stay as cached chunks."""
        self._pipeline._cancel(self)


def _wait(pipeline: Pipeline, locate: Locate | None, end: float, transfer: Transfer | None = None) -> bool:
    """Wait until `end` for the answers, or for the transfer, whose deadline may come nearer meanwhile."""
    event = transfer._event if transfer is not None else locate.event if locate is not None else None
    while event is not None and not event.is_set():
        now = monotonic()
        left = min(end, inf if transfer is None else transfer._deadline) - now
        if left <= 0:
            return False
        due = inf if locate is None else locate.expire(now)
        if not event.wait(max(0.0, min(left, _SWEEP_S, due - now))):
            pipeline._sweep()
    return True
