"""The scheduler's half of our offloading spec: vLLM's `OffloadingManager` over a pipeline.

vLLM takes for granted that a load cannot fail. So a chunk is a hit only once its verified bytes are in memory and
pinned for the request; until then its answer is "pending", and vLLM asks again in a later step.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from time import monotonic
from typing import Any

import numpy as np

from lmcache_core.adapters import _vllm_offload_compat as compat
from lmcache_core.adapters._page_store import Store
from lmcache_core.adapters._vllm_offload_compat import (
    CacheHitSource,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    get_offload_group_idx,
    logger,
)
from lmcache_core.adapters._vllm_offload_worker import ArenaSpec
from lmcache_core.errors import BackendError, ConfigError, Unsupported
from lmcache_core.handles import Lease, Reservation, Transfer
from lmcache_core.types import ChunkKey

SHUTDOWN_S = 10.0
"""Longest time to write down what is still in memory only when the engine stops."""


@dataclass(slots=True)
class _Request:
    """What is held for one request."""

    wanted: dict[OffloadKey, None] = field(default_factory=dict)
    """To be fetched at the end of this step, in this order."""
    waiting: dict[OffloadKey, Transfer] = field(default_factory=dict)
    held: dict[OffloadKey, tuple[Lease, int]] = field(default_factory=dict)
    """Hits: verified and pinned. A lease may hold several of them, each by its index."""
    loading: list[Lease] = field(default_factory=list)
    """Pinned until the workers have copied them."""
    sources: dict[OffloadKey, Any] = field(default_factory=dict)
    """Which kind of medium each hit came from."""
    missed: set[OffloadKey] = field(default_factory=set)
    """What could not be fetched: it would be tried again for ever."""
    asked: bool = False
    """Looked up in this step."""
    put_off: float | None = None
    """Since when (`monotonic()`) it has waited for memory that others hold."""
    finished: bool = False

    @property
    def slots(self) -> int:
        """Slots that it keeps, or may be about to fill."""
        return len(self.waiting) + len(self.held) + sum(map(len, self.loading))

    def leases(self) -> list[Lease]:
        """All that is pinned for hits, each once."""
        return list({id(lease): lease for lease, _ in self.held.values()}.values())

    def let_go(self) -> None:
        """Drop the pins of hits."""
        for lease in self.leases():
            lease.release()
        self.held = {}


class Manager(OffloadingManager):
    """See the module. Called by the scheduler's thread only; never waits but in `reset_cache` and `shutdown`."""

    def __init__(self, store: Store, *, events: bool = False, windows: Collection[int] = ()) -> None:
        """`events`: tell vLLM what comes into memory and leaves it. `windows`: KV groups of layers with a window."""
        self.store = store
        self.pipeline = store.pipeline
        self._windows = windows
        self._patience = max((tier.deadline for tier in self.pipeline.tiers), default=0.0)
        self._requests: dict[str, _Request] = {}
        self._storing: dict[OffloadKey, Reservation] = {}
        self._stale: list[Lease | Reservation] = []
        """What workers may still copy though a reset has made them strangers to vLLM."""
        self._told: dict[ChunkKey, OffloadKey] | None = {} if events else None
        self._news: list[OffloadKey] = []
        self._counted = compat.Counted(self.pipeline.counts)
        self._off = False
        """After a reset that could not find out whose the KV is from now on: nothing is loaded or stored any more."""

    # -- loads -----------------------------------------------------------------------------------------------
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """A hit is pinned until it was loaded, or this step has ended without that."""
        if self._off:
            return LookupResult.MISS
        request = self._requests.setdefault(req_context.req_id, _Request())
        request.asked = True
        transfer = request.waiting.get(key)
        if transfer is not None:
            if not transfer.done:
                return LookupResult.HIT_PENDING if transfer.located else LookupResult.RETRY
            self._settle(request, transfer)
        if key in request.held:
            return LookupResult.HIT
        if key in request.missed:
            return LookupResult.MISS
        if key in self._storing:
            return LookupResult.HIT_PENDING
        (name,) = self.store.keys([key])
        if name in self.pipeline.slots.index:
            request.waiting[key] = transfer = self.pipeline.fetch([name])
            if not transfer.done:  # evicted meanwhile
                return LookupResult.HIT_PENDING
            self._settle(request, transfer)
            return LookupResult.HIT if key in request.held else LookupResult.MISS
        found = self.store.known(key)
        if found is False:
            return LookupResult.MISS
        request.wanted[key] = None
        return LookupResult.HIT_PENDING if found else LookupResult.RETRY

    def _settle(self, request: _Request, transfer: Transfer) -> None:
        """Take what a fetch that has ended brought."""
        keys = [key for key, its in request.waiting.items() if its is transfer]
        lease = transfer.result()
        for i, key in enumerate(keys):
            del request.waiting[key]
            if i < len(lease):
                request.held[key] = lease, i
                at_once = lease.sources[i] == self.pipeline.memory_name
                request.sources.setdefault(key, CacheHitSource.HOST if at_once else CacheHitSource.DISK)
            else:
                request.missed.add(key)
        if not len(lease):
            lease.release()
        self._arrived(keys[: len(lease)])

    def on_schedule_end(self, context: Any) -> None:
        """Start to fetch what this step's lookups found on media, and drop the pins of hits that it did not use.

        Requests take turns where memory cannot hold what all of them want, for a chunk without room would be a miss;
        but nobody waits for others longer than for a medium.
        """
        taken, full, now = sum(request.slots for request in self._requests.values()), False, monotonic()
        for request in self._requests.values():
            asked, request.asked = request.asked, False
            if not asked and all(transfer.done for transfer in request.waiting.values()):
                # The engine has no room for it now: what was read stays in memory, but not pinned for as long as that.
                for transfer in dict.fromkeys(request.waiting.values()):
                    self._settle(request, transfer)
            others = taken - request.slots
            full = full or bool(others and request.wanted and taken + len(request.wanted) > self.pipeline.slots.count)
            if full and request.wanted:
                if request.put_off is None:
                    request.put_off = now
                if now - request.put_off < self._patience:
                    request.wanted = {}  # vLLM was told to ask again
            if request.wanted:
                request.put_off = None
            taken += len(request.wanted)
            # A fetch is cut at its first gap, and a gap in one KV group says nothing of the others.
            # A window is sought from its right end, and only some of its chunks are stored: each is fetched by itself.
            for number, group in groupby(request.wanted, get_offload_group_idx):
                wanted = list(group)
                for keys in [[key] for key in wanted] if number in self._windows else [wanted]:
                    transfer = self.pipeline.fetch(self.store.keys(keys))
                    request.waiting.update(dict.fromkeys(keys, transfer))
            request.wanted = {}
            if request.held and not request.waiting:
                request.let_go()

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> Any:
        """Which kind of medium a hit came from."""
        request = self._requests.get(req_context.req_id, _Request())
        return request.sources.get(key, CacheHitSource.EXTERNAL_UNSPECIFIED)

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> ArenaSpec:
        """Where the hits are. They stay there until `complete_load`."""
        request = self._requests[req_context.req_id]
        slots = [lease.slots[i] for lease, i in map(request.held.__getitem__, keys)]
        request.loading += request.leases()
        request.held = {}
        return self._spec(slots)

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """The workers have copied them. A request has one load at a time."""
        self._drop_stale()
        request = self._requests[req_context.req_id]
        for lease in request.loading:
            lease.release()
        request.loading = []
        if request.finished:
            del self._requests[req_context.req_id]

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """What the engine has in its own memory is in use here too."""
        self.store.touch(list(keys))

    # -- stores ----------------------------------------------------------------------------------------------
    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        """Slots for those of the keys that are not stored yet; None where there is no room for any of them."""
        offered = [] if self._off else list(keys)
        names = self.store.keys(offered)
        reservation = self.pipeline.reserve(names)
        new = [offered[i] for i in reservation.positions]
        spec = self._spec(reservation.slots)
        if not new:
            reservation.abort()
            index = self.pipeline.slots.index
            if any(name not in index and key not in self._storing for name, key in zip(names, offered, strict=True)):
                return None
        self._storing.update(dict.fromkeys(new, reservation))
        return PrepareStoreOutput(keys_to_store=new, store_spec=spec, evicted_keys=[])

    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        """The workers have filled them: publish, and hand them to the storage tiers."""
        self._drop_stale()
        for reservation in {id(its): its for its in map(self._storing.pop, keys)}.values():
            if success:
                reservation.commit()
            else:
                reservation.abort()
        if success:
            self._arrived(keys)

    def _spec(self, slots: list[int]) -> ArenaSpec:
        region = self.pipeline.slots.region
        assert region.share is not None  # `LMCacheCoreOffloadingSpec` has seen to it
        return ArenaSpec(region.share, self.pipeline.slots.offsets(slots))

    # -- requests --------------------------------------------------------------------------------------------
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Every new chunk is offered once."""
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Let go of the request, but for what workers are still copying."""
        request = self._requests.get(req_context.req_id)
        if request is not None:
            self._forget(request)
            request.finished = True
            if not request.loading:
                del self._requests[req_context.req_id]

    def _forget(self, request: _Request) -> None:
        for transfer in set(request.waiting.values()):
            transfer.cancel()
        request.waiting, request.wanted, request.missed = {}, {}, set()
        request.let_go()

    # -- what others hear ------------------------------------------------------------------------------------
    def _arrived(self, keys: Collection[OffloadKey]) -> None:
        if self._told is not None:
            for key, name in zip(keys, self.store.keys(list(keys)), strict=True):
                if name not in self._told and name in self.pipeline.slots.index:
                    self._told[name] = key
                    self._news.append(key)

    def take_events(self) -> Iterable[OffloadingEvent]:
        """What has come into memory since the last time, and what has left it."""
        if self._told is None:
            return
        index = self.pipeline.slots.index
        if gone := [name for name in self._told if name not in index]:
            yield OffloadingEvent(keys=[self._told.pop(name) for name in gone], medium=Medium.CPU, removed=True)
        news, self._news = self._news, []
        if news:
            yield OffloadingEvent(keys=news, medium=Medium.CPU, removed=False)

    def get_stats(self) -> Any:
        """What our counters grew by."""
        return self._counted.take()

    # -- life ------------------------------------------------------------------------------------------------
    def reset_cache(self) -> None:
        """Forget every chunk. vLLM does this after a change of the weights that their files do not show: what is
        stored from now on is kept apart from what was stored before, in every tier and for every process."""
        for request_id, request in list(self._requests.items()):
            self._forget(request)
            self._stale += request.loading
            request.loading = []
            if request.finished:
                del self._requests[request_id]
        self._stale += {id(its): its for its in self._storing.values()}.values()
        self._storing = {}
        try:
            self.store.clear(uuid.uuid4().hex)
        except BackendError as error:
            logger.warning("lmcache-core: %s", error)
        except (ConfigError, Unsupported) as error:
            # vLLM forgets its jobs only after a reset that did not fail; see `complete_store`.
            self._off = True
            logger.error("lmcache-core: caching is off: %s", error)

    def _drop_stale(self) -> None:
        """A job that vLLM made after the last reset has ended: by then workers have ended all that it made before."""
        stale, self._stale = self._stale, []
        for held in stale:
            if isinstance(held, Lease):
                held.release()
            else:
                held.abort()

    def shutdown(self) -> None:
        """Let go of everything, write down what must be kept, and close the pipeline."""
        for request in self._requests.values():
            self._forget(request)
            self._stale += request.loading
        self._stale += {id(its): its for its in self._storing.values()}.values()
        self._requests, self._storing = {}, {}
        self._drop_stale()
        self.pipeline.close(SHUTDOWN_S)


class Nothing(OffloadingManager):
    """In the place of `Manager` where nothing may be cached."""

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        return LookupResult.MISS

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> ArenaSpec:
        raise AssertionError("nothing was promised")

    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        return PrepareStoreOutput(keys_to_store=[], store_spec=ArenaSpec({}, np.array([], np.int64)), evicted_keys=[])

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()
