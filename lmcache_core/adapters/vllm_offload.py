"""LMCache core inside vLLM's own offloading framework, loaded by module path; see docs/vllm.md.

`LMCacheCoreTier` is a secondary tier under vLLM's CPU tier (`TieringOffloadingSpec`); `LMCacheCoreOffloadingSpec` is an
offloading spec of its own, whose CPU tier is ours. Both keep rows of blocks by vLLM's block hashes under the identity
of the engine. An engine whose KV cannot be stored safely runs without them, and says why, once.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from queue import SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcache_core.adapters import _vllm_compat
from lmcache_core.adapters import _vllm_offload_compat as compat
from lmcache_core.adapters._page_store import Errors, PageStore, Store
from lmcache_core.adapters._vllm_offload_compat import (
    JobResult,
    Locality,
    LookupResult,
    Medium,
    OffloadingSpec,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    SecondaryTierManager,
    TransferJob,
    get_offload_group_idx,
    logger,
)
from lmcache_core.adapters._vllm_offload_manager import SHUTDOWN_S, Manager, Nothing
from lmcache_core.adapters._vllm_offload_worker import CopyWorker, copy_worker
from lmcache_core.config import load
from lmcache_core.copies import PagedKV, PageGeometry
from lmcache_core.errors import ConfigError, Unsupported
from lmcache_core.handles import Hit
from lmcache_core.layout import KVLayout

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOADERS = 4
"""Jobs that are loaded at the same time; each reads all its rows at once on the tiers' lanes."""


class Rows:
    """The rows of vLLM's CPU tier: bytes `[rows, row bytes]`, one for each chunk."""

    tokens = 1

    def __init__(self, view: memoryview, layout: KVLayout) -> None:
        rows = np.frombuffer(view, np.uint8).reshape(view.shape)
        self.layout = layout
        self._copier: PagedKV | None = PagedKV(
            [int(rows.ctypes.data)], PageGeometry.opaque(layout), len(rows), owner=rows
        )

    def gather(self, indices: Any, addresses: NDArray[np.int64]) -> None:
        """Copy rows into slots."""
        self._live().gather(indices, addresses)

    def scatter(self, indices: Any, addresses: NDArray[np.int64]) -> None:
        """Copy slots into rows."""
        self._live().scatter(indices, addresses)

    def release(self) -> None:
        """Let go of vLLM's memory, which it is about to unmap."""
        self._copier = None

    def _live(self) -> PagedKV:
        if self._copier is None:
            raise RuntimeError("vLLM's memory was released")
        return self._copier


@dataclass(slots=True)
class _Request:
    """What is known of one request's keys."""

    asking: dict[OffloadKey, None] = field(default_factory=dict)
    """To be asked for at the end of this step, from a medium that cannot answer at once."""
    asked: set[OffloadKey] = field(default_factory=set)
    """Not answered yet."""
    hits: list[tuple[list[OffloadKey], Hit]] = field(default_factory=list)
    """The same by question; `looked` says whether this step has seen what was answered."""
    looked: bool = False
    found: dict[OffloadKey, bool] = field(default_factory=dict)
    """What media answered. What could not be loaded is not found either: it would be tried again for ever."""


class LMCacheCoreTier(SecondaryTierManager):
    """Our pipeline as a secondary tier of vLLM's `TieringOffloadingSpec`.

    Runs in the scheduler's process: `submit_*` only queue, threads of its own copy between vLLM's rows and our slots,
    and the tiers' lanes do the I/O. A row goes into vLLM's memory only after all its bytes are here and verified.
    """

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        locality: str | None = None,
        **settings: Any,
    ) -> None:
        """`settings`: see `Settings`. Raise `ConfigError` for a mistake in them or in the configuration."""
        compat.check_api()
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = None if locality is None else Locality(locality)
        chosen = compat.settings_of(settings, "secondary_tiers")
        pipeline = load(chosen.config).config
        self._errors = Errors(logger)
        self._requests: dict[str, _Request] = {}
        self._running: dict[Future[None], TransferJob] = {}
        self._finished: SimpleQueue[tuple[TransferJob, JobResult]] = SimpleQueue()
        self._loaders = ThreadPoolExecutor(LOADERS, "lmcache-load")
        self._saver = ThreadPoolExecutor(1, "lmcache-save")
        self._store: PageStore | None = None
        try:
            vllm_config, kv_cache_config = compat.engine_of(offloading_spec.config)
            layout = compat.row_layout(
                offloading_spec.config,
                vllm_config,
                kv_cache_config,
                "tier",
                self.block_size_bytes,
                offloading_spec.blocks_per_chunk,
            )
            self._windows = compat.windows(offloading_spec.config, kv_cache_config)
            self._rows = Rows(primary_kv_view, layout)
            identify = partial(compat.identity, vllm_config, layout, chosen.weights)
            self._store = PageStore(pipeline, self._rows, identify, chosen.tenant)
        except Unsupported as error:
            logger.warning("lmcache-core: this tier is off: %s", error)
        else:
            self._counted = compat.Counted(self._store.pipeline.counts)
            logger.info("lmcache-core: %s", self._store)

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """Our counters, for vLLM's metrics."""
        return compat.metric_definitions()

    # -- asking ----------------------------------------------------------------------------------------------
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Whether a row is stored. A medium that has to be asked is asked at the end of the step."""
        store = self._store
        if store is None:
            return LookupResult.MISS
        request = self._requests.setdefault(req_context.req_id, _Request())
        if request.asked and not request.looked:
            self._answered(request)
        found = request.found.get(key)
        if found is None:
            if key in request.asked:
                return LookupResult.RETRY
            found = store.known(key)
            if found is None:
                request.asking[key] = None
                return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def _answered(self, request: _Request) -> None:
        """Take in what media have answered."""
        request.looked = True
        waiting = []
        for keys, hit in request.hits:
            if hit.wait(0):
                request.found.update({key: i < hit.count for i, key in enumerate(keys)})
                request.asked.difference_update(keys)
            else:
                waiting.append((keys, hit))
        request.hits = waiting

    def on_schedule_end(self, context: Any) -> None:
        """Ask for what the step's lookups left open, a request's keys at once."""
        for request in self._requests.values():
            request.looked = False
            if request.asking and self._store is not None:
                # A lookup is cut at its first gap, and a gap in one KV group says nothing of the others.
                # A window is sought from its right end, and some of its chunks are not stored: each is asked for alone.
                for number, group in groupby(request.asking, get_offload_group_idx):
                    asking = list(group)
                    for keys in [[key] for key in asking] if number in self._windows else [asking]:
                        request.hits.append((keys, self._store.pipeline.lookup(self._store.keys(keys))))
                request.asked.update(request.asking)
                request.asking = {}

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Every new block is offered once."""
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Forget the request."""
        self._requests.pop(req_context.req_id, None)

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Rows that vLLM's memory serves are in use here too: they must not be the first to go."""
        if self._store is not None:
            self._store.touch(list(keys))

    # -- jobs ------------------------------------------------------------------------------------------------
    def submit_store(self, job_metadata: TransferJob) -> None:
        """Queue the copy of rows into our memory; the tiers' lanes write them down from there."""
        self._submit(job_metadata, self._saver, lambda store, keys, rows: store.save(keys, rows))

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Queue the reading of rows, and their copy into vLLM's memory once they are verified."""
        self._submit(job_metadata, self._loaders, lambda store, keys, rows: store.load(keys, rows))

    def _submit(
        self,
        job: TransferJob,
        pool: ThreadPoolExecutor,
        copy: Callable[[PageStore, Sequence[Any], NDArray[np.int32]], list[bool]],
    ) -> None:
        store = self._store
        if store is None:
            self._finished.put((job, JobResult(job.job_id, success=False)))
            return
        names = list(job.keys)
        keys = store.keys(names)

        def run() -> None:
            begun = monotonic()
            what = "load" if job.is_promotion else "store"
            done = self._errors.safely(what, lambda: copy(store, keys, job.chunk_ids), [False] * len(keys))
            result = JobResult(
                job.job_id,
                success=all(done),
                successful_keys=[name for name, well in zip(names, done, strict=True) if well],
                transfer_time=monotonic() - begun,
                transfer_bytes=sum(done) * self.block_size_bytes,
            )
            self._finished.put((job, result))

        self._running[pool.submit(run)] = job

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """The jobs that ended since the last time. Of a load that failed in part, the leading rows are good."""
        self._running = {future: job for future, job in self._running.items() if not future.done()}
        results = []
        while not self._finished.empty():
            job, result = self._finished.get()
            request = self._requests.get(job.req_context.req_id)
            if job.is_promotion and not result.success and request is not None:
                loaded = set(result.successful_keys or ())
                request.found.update({key: False for key in job.keys if key not in loaded})
            results.append(result)
        return results

    def drain_jobs(self) -> None:
        """Wait for every job. vLLM calls this to reset its cache, as after a change of the weights that their files do
        not show: what is stored from now on is kept apart from what was stored before."""
        wait(self._running)
        self._requests = {name: _Request() for name in self._requests}
        try:
            if self._store is not None:
                self._store.renew(uuid.uuid4().hex)
        except (ConfigError, Unsupported) as error:
            # vLLM cannot do with a reset that fails, and what is stored was computed with other weights.
            logger.error("lmcache-core: this tier is off: %s", error)
            self._let_go()

    # -- life ------------------------------------------------------------------------------------------------
    def get_stats(self) -> Any:
        """What our counters grew by."""
        return None if self._store is None else self._counted.take()

    def shutdown(self) -> None:
        """End the jobs, write down what must be kept, and let go of vLLM's memory."""
        for pool in (self._loaders, self._saver):
            pool.shutdown(wait=True, cancel_futures=True)
        for future, job in self._running.items():
            if future.cancelled():
                self._finished.put((job, JobResult(job.job_id, success=False)))
        self._let_go()

    def _let_go(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.pipeline.close(SHUTDOWN_S)
            self._rows.release()


class LMCacheCoreOffloadingSpec(OffloadingSpec):
    """vLLM's offloading with our pipeline in the place of its CPU tier."""

    def __init__(self, config: Any) -> None:
        """Raise `ConfigError` for a mistake in `kv_connector_extra_config` or in the configuration."""
        compat.check_api()
        super().__init__(config)
        given = {name: value for name, value in self.extra_config.items() if name not in compat.SPEC_KEYS}
        self._settings = compat.settings_of(given, "kv_connector_extra_config")
        self._pipeline_config = load(self._settings.config).config
        block = config.groups[0].tokens_per_block
        # Several KV groups: a window may give up single blocks of a chunk.
        alone = len(config.groups) == 1
        chunk = self._pipeline_config.chunk_tokens
        self.blocks_per_chunk = _vllm_compat.blocks_in_chunk(chunk, block) if alone else 1
        self.replicated_layout = config.replicated_layout
        self._worker_bytes = config.worker_kv_bytes_per_block * self.blocks_per_chunk
        self._manager: Manager | Nothing | None = None

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """Our counters, for vLLM's metrics."""
        return compat.metric_definitions()

    def get_manager(self) -> Manager | Nothing:
        """The scheduler's half, which owns the pipeline."""
        if self._manager is None:
            try:
                windows = compat.windows(self.config, compat.engine_of(self.config)[1])
                events = self.kv_events_config.enable_kv_cache_events
                self._manager = Manager(self._open(), events=events, windows=windows)
            except Unsupported as error:
                logger.warning("lmcache-core: caching is off: %s", error)
                self._manager = Nothing()
        return self._manager

    def _open(self) -> Store:
        vllm_config, kv_cache_config = compat.engine_of(self.config)
        copies = 1 if self.replicated_layout else self.config.parallel.world_size
        layout = compat.row_layout(
            self.config, vllm_config, kv_cache_config, "spec", self._worker_bytes * copies, self.blocks_per_chunk
        )
        identify = partial(compat.identity, vllm_config, layout, self._settings.weights)
        store = Store(self._pipeline_config, layout, identify, self._settings.tenant, shared=True)
        if store.pipeline.slots.region.share is None:
            store.pipeline.close()
            raise Unsupported(f"tier {store.pipeline.memory_name}: vLLM's worker cannot map such memory; use type: cpu")
        logger.info("lmcache-core: %s", store)
        return store

    def get_worker(self, kv_caches: Any) -> CopyWorker:
        """A worker's half, which copies between the engine's pages and the pipeline's slots."""
        rank = 0 if self.replicated_layout else self.config.parallel.rank
        return copy_worker(kv_caches, self.blocks_per_chunk, rank * self._worker_bytes, self._worker_bytes)
