"""LMCache core for SGLang without a host pool: a `UnifiedCacheLinker`, loaded by module path.

    --enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic
        --unified-cache-external-linker-config '{"linker": "LMCacheCoreLinker",
          "linker_module_path": "lmcache_core.adapters.sglang_linker",
          "linker_extra_config": {"config": "/etc/lmcache.yaml"}}'

SGLang aborts the requests of a load that fails after it was promised. So a load is promised only when every page of it
is in memory and pinned: until then the scheduler waits, never past the tiers' deadlines, and a page that does not come
is computed. An engine whose KV cannot be stored safely runs as if nothing were ever stored, and says why, once.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from sglang.srt import runtime_context
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter, UnifiedCacheLinker

from lmcache_core.adapters import _sglang_engine as engine
from lmcache_core.adapters._page_store import Errors
from lmcache_core.adapters._sglang_pools import DevicePages
from lmcache_core.adapters._sglang_store import PageStore, logger
from lmcache_core.errors import Unsupported
from lmcache_core.pipeline import Lease

KV = "kv"
CLOSE_S = 10.0
"""Longest time to write down what is still in memory only."""


class LMCacheCoreLinker(UnifiedCacheLinker):
    """The linker SGLang loads. Called by its scheduler's thread only."""

    def __init__(
        self, server_args: Any, params: Any, *, components: Any, extra_config: Any = None, forward_stream: Any = None
    ) -> None:
        engine.check_api(UnifiedCacheLinker, engine.LINKER_API)
        self.forward_stream = forward_stream
        self.errors = Errors(logger)
        settings = engine.settings_of(extra_config or {}, ours=())
        config = engine.load_config(settings.config, engine.Ranks())
        kvcache = params.token_to_kv_pool_allocator.get_kvcache()
        self.pools = {PoolName.KV: kvcache}
        self.layer_done_counter = LayerWiseLoadCounter(getattr(kvcache, "layer_num", 1))
        self._mark = engine.model_mark()
        self._queued: dict[str, tuple[Lease, Any]] = {}
        self._offloads: deque[Future[bool]] = deque()
        self._writer = ThreadPoolExecutor(1, "lmcache-offload")
        self._store: PageStore | None = None
        try:
            _refuse(params, components, kvcache)
            pages = DevicePages(kvcache, params.page_size)
            identify = partial(engine.model_identity, pool=KV, ranks=engine.Ranks(), settings=settings)
            self._store = PageStore(config, pages, identify, settings.tenant)
        except Unsupported as error:
            logger.warning("lmcache-core: caching is off: %s", error)
        else:
            logger.info("lmcache-core: %s", self._store)

    def _current(self) -> PageStore | None:
        """The store, unless the weights were replaced since the engine's cache was last reset."""
        return self._store if engine.model_mark() == self._mark else None

    # -- loading ---------------------------------------------------------------------------------------------
    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        """Every number of leading pages that could be loaded. Starts reading them into memory."""

        def ask() -> list[int]:
            store, hashes = self._current(), _kv(transfers).keys
            if store is None or not hashes:
                return []
            # No more than memory holds beside what is being written.
            keys = store.keys(hashes[: max(1, store.pipeline.slots.count // 2)])
            count = store.leading(keys)
            if count:
                store.pipeline.prefetch(keys[:count])
            return list(range(1, count + 1))

        return self.errors.safely("lookup", ask, [])

    def load(self, rid: str, transfers: list[Any]) -> bool:
        """Pin every page in memory; False when one is not there."""

        def pin() -> bool:
            store, transfer = self._current(), _kv(transfers)
            if store is None or rid in self._queued:
                return False
            lease = store.pipeline.retrieve(store.keys(transfer.keys))
            if len(lease) < len(transfer.keys):
                lease.release()
                return False
            self._queued[rid] = lease, transfer.device_indices
            return True

        return self.errors.safely("load", pin, False)

    def start_layer_wise_loading(self) -> int:
        """Copy what is queued into the engine's pages, all layers at once; the batch's number, -1 without one."""
        if not self._queued or self._store is None:
            return -1
        index: int = self.layer_done_counter.update_producer()
        try:
            while self._queued:
                lease, indices = self._queued.popitem()[1]
                with lease:
                    self._store.pages.scatter(indices, lease.addresses)
        except Exception as error:
            logger.exception("lmcache-core: please report this defect")
            # SGLang aborts every request of the batch, and their places are others' then.
            for rid in list(self._queued):
                self.cancel_queued_load(rid)
            self.layer_done_counter.fail(index, error)
        else:
            for layer in range(self.layer_done_counter.num_layers):
                self.layer_done_counter.complete(index, layer)
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Whether every page of the batch was copied."""
        return bool(self.layer_done_counter.finish(counter_index))

    def cancel_queued_load(self, rid: str) -> bool:
        """Let go of a load that has not started."""
        queued = self._queued.pop(rid, None)
        if queued is not None:
            queued[0].release()
        return queued is not None

    # -- storing ---------------------------------------------------------------------------------------------
    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        """Store pages in the background; SGLang keeps them unchanged until it has seen the result."""
        store, transfer = self._current(), _kv(transfers)
        if store is None or not transfer.keys:
            return False
        keys, written = store.keys(transfer.keys), self.record_offload_ready()

        def write() -> bool:
            for event in written:
                event.synchronize()
            return all(store.save(keys, transfer.device_indices))

        self._offloads.append(self._writer.submit(self.errors.safely, "offload", write, False))
        return True

    def num_completed_offloads(self) -> int:
        """How many of the oldest ended."""
        return next((i for i, future in enumerate(self._offloads) if not future.done()), len(self._offloads))

    def pop_completed_offload(self) -> bool:
        """Whether the oldest stored everything."""
        return self._offloads.popleft().result()

    # -- life ------------------------------------------------------------------------------------------------
    def reset(self) -> None:
        """The engine forgets its cache: end what is under way, and take the identity of the weights it has now."""
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        while self._offloads:
            self._offloads.popleft().result()
        self.layer_done_counter.reset()
        mark = engine.model_mark()
        if mark != self._mark and self._store is not None and self.errors.safely("reset", self._store.renew, None):
            self._mark = mark  # while the new weights cannot be named, nothing is theirs: see `_current`

    def close(self) -> None:
        """Write down what must be kept, then close."""
        self.reset()
        self._writer.shutdown()
        store, self._store = self._store, None
        if store is not None:
            self.errors.safely("close", partial(store.pipeline.close, CLOSE_S), None)


def _kv(transfers: list[Any]) -> Any:
    return next(transfer for transfer in transfers if transfer.name == KV)


def _refuse(params: Any, components: Any, kvcache: Any) -> None:
    """Raise `Unsupported` when KV of this engine cannot be stored this way."""
    parallel = runtime_context.get_parallel()
    if parallel.tp_size * params.pp_size * params.attn_cp_size > 1:
        raise Unsupported(
            "several ranks: one may find what another misses; use the hierarchical cache (docs/sglang.md)"
        )
    if {component.name for component in components} != {"FULL"} or type(kvcache).__name__ != "MHATokenToKVPool":
        raise Unsupported(f"KV of kind {type(kvcache).__name__} is not supported this way; use the hierarchical cache")
    if params.mtp_draft_device_pools or params.sidecar_draft_device_pools:
        raise Unsupported("draft models with KV of their own are not supported this way")
