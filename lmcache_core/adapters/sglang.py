"""LMCache core for SGLang: a storage backend of its hierarchical cache (`HiCacheStorage`), loaded by module path.

    --enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
        '{"backend_name": "lmcache-core", "module_path": "lmcache_core.adapters.sglang",
          "class_name": "LMCacheCoreStorage", "interface_v1": 1, "config": "/etc/lmcache.yaml"}'

SGLang calls it from three threads: one asks what is stored, one reads, one writes. Pages move between SGLang's host
pool and the pipeline's slots; whatever goes wrong is a miss, or a page that is not stored. All three generations of the
interface read and write the same pages: flat tensors (legacy), host indices (v1), and pools by name (v2). An engine
whose pages cannot be stored safely runs as if nothing were ever stored, and says why, once.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolHitPolicy, PoolTransferResult

from lmcache_core.adapters import _sglang_engine as engine
from lmcache_core.adapters._page_store import Errors
from lmcache_core.adapters._sglang_pools import describe
from lmcache_core.adapters._sglang_store import PageStore, logger
from lmcache_core.errors import Unsupported
from lmcache_core.types import ChunkKey
from lmcache_core.units import format_bytes

KV = "kv"
CLOSE_S = 10.0
"""Longest time to write down what is still in memory only when the backend is detached."""
SMALL_PAGE = 64 << 10
"""Pages of fewer bytes are mostly overhead."""
NOT_OURS = ("backend_name", "module_path", "class_name", "interface_v1", "hicache_storage_pass_prefix_keys")
"""Entries of the extra config that SGLang reads itself."""


class LMCacheCoreStorage(HiCacheStorage):
    """The storage backend SGLang loads, one for each rank."""

    def __init__(self, storage_config: Any, kwargs: dict[str, Any] | None = None) -> None:
        engine.check_api(HiCacheStorage, engine.STORAGE_API)
        self._settings = engine.settings_of(storage_config.extra_config or {}, ours=NOT_OURS)
        self._ranks = engine.Ranks(
            tp_rank=storage_config.tp_rank,
            tp_size=storage_config.tp_size,
            pp_rank=storage_config.pp_rank,
            pp_size=storage_config.pp_size,
            cp_rank=storage_config.attn_cp_rank,
            cp_size=storage_config.attn_cp_size,
            replicated=storage_config.is_mla_model,
        )
        # Mistakes in the configuration stop the engine now.
        self._configs = {
            name: engine.load_config(source, self._ranks)
            for name, source in {KV: self._settings.config, **self._settings.pools}.items()
        }
        self.errors = Errors(logger)
        self._stores: dict[str, PageStore] = {}
        self._pools: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._epoch = ""
        self._mark = engine.model_mark()
        self._cleared = self._mark
        """The weights that ran when the KV pool was last cleared: its pages are theirs, or those of later ones."""

    # -- pools -----------------------------------------------------------------------------------------------
    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Build the pipeline for the KV pool's pages, or say why there is no caching."""
        super().register_mem_pool_host(mem_pool_host)
        self._register(mem_pool_host, KV)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """The same for another pool of a hybrid model."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._register(host_pool, str(host_pool_name))

    def _register(self, pool: Any, name: str) -> None:
        if name in self._pools:
            return
        self._pools[name] = pool
        if name == KV:
            self._watch(pool)
        try:
            if name not in self._configs:
                raise Unsupported(f'add "pools": {{"{name}": "<its configuration>"}} to the extra config')
            pages = describe(pool, name)
            identify = partial(engine.model_identity, pool=name, ranks=self._ranks, settings=self._settings)
            store = PageStore(self._configs[name], pages, identify, self._settings.tenant)
        except Unsupported as error:
            logger.warning("lmcache-core: pool %s is not stored: %s", name, error)
            return
        self._stores[name] = store
        logger.info("lmcache-core: storing pool %s (%s): %s", name, pool.layout, store)
        size = pages.layout.chunk_bytes
        if name == KV and size < SMALL_PAGE:
            logger.warning("lmcache-core: pages of %s are slow to store; use --page-size 64", format_bytes(size))

    def _watch(self, pool: Any) -> None:
        """Note the weights at each clearing of the pool. SGLang sets a new version first, then flushes its cache."""
        clear = pool.clear

        def cleared(*args: Any, **more: Any) -> Any:
            done = clear(*args, **more)
            self._cleared = engine.model_mark()
            return done

        pool.clear = cleared
        self._cleared = engine.model_mark()

    def _store(self, name: str = KV) -> PageStore | None:
        """The store of a pool, with the identity of the weights that the engine runs now."""
        mark = engine.model_mark()
        if mark != self._mark:
            with self._lock:
                if mark != self._mark:
                    for store in self._stores.values():
                        store.renew(self._epoch)
                    self._mark = mark
        return self._stores.get(name)

    def _writable(self, hashes: Sequence[str], name: str = KV) -> tuple[PageStore | None, list[ChunkKey]]:
        """The same with keys to store pages under; None while the host pool holds pages of other weights.

        SGLang forgets those with a flush, which clears the pool.
        """
        since = self._cleared
        store = self._store(name)
        keys = store.keys(hashes) if store is not None else []
        # Looked at after the keys were made: another thread may have renewed the identity, or the pool been cleared.
        if not since == self._cleared == self._mark:
            store = None
        return store, keys

    # -- v1: host indices of the KV pool ---------------------------------------------------------------------
    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many pages from the first on are stored."""

        def ask() -> int:
            store = self._store()
            return store.leading(store.keys(keys)) if store is not None else 0

        return self.errors.safely("batch_exists", ask, 0)

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Copy stored pages into the host pool, up to the first that is missing; whether each was."""
        return self.errors.safely("batch_get_v1", lambda: self._load(KV, keys, host_indices), [False] * len(keys))

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Store pages of the host pool; whether each is stored now."""
        return self.errors.safely("batch_set_v1", lambda: self._save(KV, keys, host_indices), [False] * len(keys))

    def _load(self, name: str, hashes: Sequence[str], indices: Any) -> list[bool]:
        store = self._store(name)
        return store.load(store.keys(hashes), indices) if store is not None else [False] * len(hashes)

    def _save(self, name: str, hashes: Sequence[str], indices: Any) -> list[bool]:
        store, keys = self._writable(hashes, name)
        return store.save(keys, indices) if store is not None else [False] * len(hashes)

    # -- v2: several pools -----------------------------------------------------------------------------------
    def batch_exists_v2(
        self, keys: list[str], pool_transfers: list[Any] | None = None, extra_info: Any = None
    ) -> PoolTransferResult:
        """How many pages from the first on are stored with everything that other pools must have for them."""
        return self.errors.safely(
            "batch_exists_v2", lambda: self._restorable(keys, pool_transfers or ()), PoolTransferResult.empty()
        )

    def _restorable(self, keys: Sequence[str], transfers: Sequence[Any]) -> PoolTransferResult:
        store = self._store()
        count = store.leading(store.keys(keys)) if store is not None else 0
        hits: dict[Any, int] = {KV: count} if count else {}
        lengths = set(range(1, count + 1))
        for transfer in transfers:
            if not lengths or transfer.hit_policy is PoolHitPolicy.BLOCK_GROUPS:
                continue  # groups of blocks are another form of the same pages, and never decide what can be restored
            here = self._stores.get(str(transfer.name))
            if here is None:
                lengths = set()
            elif transfer.hit_policy is PoolHitPolicy.ALL_PAGES:
                lengths &= set(range(1, here.leading(here.keys(keys[:count])) + 1))
            else:
                window, run = max(1, len(transfer.keys or ())), 0
                for page, present in enumerate(here.present(here.keys(keys[:count]))):
                    run = run + 1 if present else 0
                    if run < min(window, page + 1):
                        lengths.discard(page + 1)
            if lengths:
                hits[transfer.name] = max(lengths)
        return PoolTransferResult(max(lengths, default=0), hits, sorted(lengths))

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """Copy stored pages into each pool, up to the first that is missing; whether each was."""
        return self._each("batch_get_v2", transfers, self._load)

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """Store pages of each pool; whether each is stored now."""
        return self._each("batch_set_v2", transfers, self._save)

    def _each(
        self, what: str, transfers: Sequence[Any], move: Callable[[str, Sequence[str], Any], list[bool]]
    ) -> dict[Any, list[bool]]:
        done: dict[Any, list[bool]] = {}
        for transfer in transfers:
            keys = transfer.keys or []
            call = partial(move, str(transfer.name), keys, transfer.host_indices)
            done[transfer.name] = self.errors.safely(what, call, [False] * len(keys)) if keys else []
        return done

    # -- legacy: flat pages ----------------------------------------------------------------------------------
    def exists(self, key: str) -> bool:
        """Whether the page is stored."""
        return self.batch_exists([key]) == 1

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """The page as a flat tensor, `target_location` where given; None when it is not stored."""
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        """The pages as flat tensors, the given ones where given; None from the first on that is not stored."""

        def read() -> list[Any]:
            store = self._store()
            if store is None:
                return [None] * len(keys)
            targets = target_locations or [self._pools[KV].get_dummy_flat_data_page() for _ in keys]
            found = store.load_flat(store.keys(keys), targets)
            return [target if here else None for target, here in zip(targets, found, strict=True)]

        return self.errors.safely("batch_get", read, [None] * len(keys))

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store a flat page; whether it is stored now."""
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store flat pages; whether all are stored now."""

        def write() -> bool:
            store, names = self._writable(keys)
            return store is not None and all(store.save_flat(names, values))

        return self.errors.safely("batch_set", write, False)

    # -- life ------------------------------------------------------------------------------------------------
    def clear(self) -> bool:
        """Forget every page. What is stored from now on is kept apart from what was stored before."""

        def forget() -> bool:
            with self._lock:
                self._epoch = uuid.uuid4().hex
                for store in self._stores.values():
                    store.clear(self._epoch)
            return True

        return self.errors.safely("clear", forget, False)

    def close(self) -> None:
        """Write down what must be kept, then close."""
        stores, self._stores = self._stores, {}
        for store in stores.values():
            self.errors.safely("close", partial(store.pipeline.close, CLOSE_S), None)
