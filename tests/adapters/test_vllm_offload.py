"""Our two plugs of vLLM's own offloading, without an engine: vLLM's managers drive them, and every byte is known.

Rows and slots are poisoned when they are free, so that a byte that was not loaded is found where it is read.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lmcache_core.adapters import _page_store
from lmcache_core.adapters._page_store import Store
from lmcache_core.build import build
from lmcache_core.config import load
from lmcache_core.errors import ConfigError, Unsupported
from lmcache_core.testing.faults import FaultInjector, Rates
from lmcache_core.testing.invariants import settle

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM and what it imports
    import torch
    from fake_gpu import COMPUTE, TASTES, Adversary, Taste, adversary
    from fake_vllm import CHUNK, IDENTITY, LAYOUT
    from test_vllm_compat import cache_config, engine_config, spec, window
    from vllm.v1.kv_offload.base import (
        CanonicalKVCacheRef,
        CanonicalKVCaches,
        CanonicalKVCacheTensor,
        GPULoadStoreSpec,
        LookupResult,
        ReqContext,
        ScheduleEndContext,
        make_offload_key,
    )
    from vllm.v1.kv_offload.config import (
        OffloadingCacheConfig,
        OffloadingConfig,
        OffloadingGroupConfig,
        OffloadingModelConfig,
        OffloadingParallelConfig,
    )
    from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager

    from lmcache_core.adapters import _vllm_offload_compat as compat
    from lmcache_core.adapters import vllm_offload
    from lmcache_core.adapters._vllm_offload_manager import Manager
    from lmcache_core.adapters._vllm_offload_worker import GpuCopyWorker
    from lmcache_core.adapters.vllm_offload import LMCacheCoreOffloadingSpec, LMCacheCoreTier

HIT, MISS, PENDING, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING, LookupResult.RETRY
POISON, BLOCK, PAGE, LAYERS, ROW = 0xDB, 32, 128, 4, 4096
"""A page is one layer of one block; a row of vLLM's CPU tier is aligned to 4096 bytes."""


def offloading_config(extra: dict[str, Any] | None = None, **changes: Any) -> OffloadingConfig:
    parallel = OffloadingParallelConfig(
        rank=0,
        world_size=1,
        tp_size=1,
        pp_size=1,
        pcp_size=1,
        dcp_size=1,
        data_parallel_index=0,
        data_parallel_size=1,
        data_parallel_rank_local=None,
        is_parallelism_agnostic=False,
    )
    given = {
        "groups": (OffloadingGroupConfig(BLOCK, ("model.layers.0.attn",), 0),),
        "worker_kv_bytes_per_block": LAYERS * PAGE,
        "enable_kv_cache_events": False,
        "extra_config": extra or {},
        "engine_id": "engine",
        "model": OffloadingModelConfig("nowhere", "float32"),
        "cache": OffloadingCacheConfig(BLOCK, 1),
        "parallel": parallel,
        "kv_cache_layout": "LBHNC",
    }
    return OffloadingConfig(**{**given, **changes})


def keys_of(*names: int, group: int = 0) -> list[Any]:
    return [make_offload_key(blake2b(name.to_bytes(4, "little"), digest_size=32).digest(), group) for name in names]


def content(key: bytes, nbytes: int) -> np.ndarray[Any, Any]:
    """The bytes that belong under a key."""
    return np.random.default_rng(list(key)).integers(0, 256, nbytes, dtype=np.uint8)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the engine around the plugs is: `config` and `groups` as vLLM's connector has them."""
    config = engine_config(
        lora_config=None,
        cache_config__prefix_caching_hash_algo="sha256",
        kv_transfer_config__engine_id="engine",
    )
    found = SimpleNamespace(config=config, groups=cache_config(spec()))
    monkeypatch.setattr(compat, "engine_of", lambda _: (found.config, found.groups))
    return found


@pytest.fixture
def injector(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultInjector]:
    injector = FaultInjector({"disk": Rates()})
    monkeypatch.setattr(_page_store, "build", partial(build, poison=True, plugins=injector.plugins()))
    yield injector
    injector.release()


def tiers(tmp_path: Path, slots: int, slot_bytes: int, **disk: Any) -> dict[str, Any]:
    store = {"type": "gds", "path": str(tmp_path / "store"), "mode": "files", "free_floor": 0}
    return {
        "chunk_tokens": BLOCK,
        "tiers": [
            {"name": "dram", "capacity": slots * slot_bytes, "backend": {"type": "cpu", "pin": False}},
            {"name": "disk", "capacity": "64MiB", "backend": store, **disk},
        ],
    }


def asked(tmp_path: Path, slot_bytes: int) -> dict[str, Any]:
    """The same over a medium whose contents only it knows."""
    config = tiers(tmp_path, 8, slot_bytes)
    config["tiers"][1] = {"name": "disk", "backend": {"type": "fsspec", "url": f"memory://{tmp_path.name}"}}
    return config


# -- the secondary tier ------------------------------------------------------------------------------------------
class Region:
    """vLLM's CPU tier: rows in memory of its own."""

    def __init__(self, rows: int) -> None:
        self.rows = np.full((rows, ROW), POISON, np.uint8)
        self.view = memoryview(self.rows.view(np.int8))

    def create_kv_memoryview(self) -> memoryview:
        return self.view

    def cleanup(self) -> None:
        pass


class Tiered:
    """vLLM's tiering manager over a CPU tier of `rows` and our tier, driven as the scheduler does."""

    def __init__(self, config: Any, rows: int = 8, **settings: Any) -> None:
        self.region = Region(rows)
        primary = CPUPrimaryTierOffloadingManager(rows, self.region)
        given = SimpleNamespace(config=offloading_config(), blocks_per_chunk=1)
        self.tier = LMCacheCoreTier(
            offloading_spec=given,
            primary_kv_view=primary.get_kv_memoryview(),
            tier_type="LMCacheCoreTier",
            config=config,
            **settings,
        )
        self.manager = TieringOffloadingManager(primary, [self.tier])
        self._requests = 0

    def request(self) -> ReqContext:
        self._requests += 1
        context = ReqContext(f"r{self._requests}")
        self.manager.on_new_request(context)
        return context

    def step(self) -> None:
        self.manager.on_schedule_end(ScheduleEndContext((), ()))

    def settle(self) -> None:
        """Steps until vLLM knows that no job is under way."""
        for _ in range(4):
            for future in list(self.tier._running):
                future.exception(30)
            self.step()
        assert not self.manager.has_pending_work()

    def store(self, keys: Sequence[Any]) -> None:
        context = self.request()
        output = self.manager.prepare_store(keys, context)
        assert output is not None
        for key, row in zip(output.keys_to_store, output.store_spec.chunk_ids, strict=True):
            self.region.rows[row] = content(key, ROW)
        self.manager.complete_store(output.keys_to_store, context)
        self.manager.on_request_finished(context)

    def find(self, keys: Sequence[Any], context: ReqContext, patience: int = 10) -> int:
        """How many leading keys can be loaded, after at most so many steps."""
        for _ in range(patience):
            answers = [self.manager.lookup(key, context) for key in keys]
            hits = answers.index(MISS) if MISS in answers else len(answers)
            if all(answer is HIT for answer in answers[:hits]):
                return hits
            self.step()
            for future in list(self.tier._running):
                future.exception(30)
            for request in self.tier._requests.values():
                for _, hit in request.hits:
                    hit.wait(30)
        raise AssertionError(f"no answer after {patience} steps: {answers}")

    def load(self, keys: Sequence[Any]) -> int:
        """Load what there is into the engine, and compare every byte."""
        context = self.request()
        hits = list(keys[: self.find(keys, context)])
        where = self.manager.prepare_load(hits, context)
        for key, row in zip(hits, where.chunk_ids, strict=True):
            assert np.array_equal(self.region.rows[row], content(key, ROW))
        self.manager.complete_load(hits, context)
        self.manager.on_request_finished(context)
        return len(hits)

    def close(self) -> None:
        store = self.tier._store
        if store is not None:
            self.settle()
            settle(store.pipeline)
        self.manager.shutdown()


SLOT = ROW + 4096


@pytest.fixture
def tiered(engine: SimpleNamespace, injector: FaultInjector, tmp_path: Path) -> Iterator[Callable[..., Tiered]]:
    """Make engines one after another over one directory: nothing may be held when one ends."""
    opened: list[Tiered] = []

    def make(rows: int = 8, slots: int = 8, disk: dict[str, Any] | None = None, **settings: Any) -> Tiered:
        while opened:
            opened.pop().close()
        opened.append(Tiered(tiers(tmp_path, slots, SLOT, **(disk or {})), rows, **settings))
        return opened[-1]

    yield make
    injector.release()
    for one in opened:
        one.close()


def test_rows_come_back_after_a_restart(tiered: Callable[..., Tiered]) -> None:
    keys = keys_of(*range(6))
    one = tiered()
    assert one.load(keys) == 0
    one.store(keys[:4])
    one.settle()
    assert one.load(keys) == 4
    two = tiered()
    assert two.load(keys) == 4
    assert two.tier._store is not None and two.tier._store.pipeline.stats()["hits"]["disk"] == 4
    stats = two.manager.get_stats()
    assert "vllm:lmcache_hit_chunks" in str(stats.data)
    assert two.load(keys_of(0, 1, group=1)) == 0


def test_more_rows_than_vllms_memory_or_ours(tiered: Callable[..., Tiered]) -> None:
    one = tiered(rows=4, slots=5)
    for first in range(0, 40, 4):
        one.store(keys_of(*range(first, first + 4)))
        one.settle()
    for first in range(0, 40, 4):
        assert one.load(keys_of(*range(first, first + 4))) == 4
    two = tiered(rows=24, slots=5)
    assert two.load(keys_of(*range(24))) == 24


def test_wrong_bytes_are_never_served(
    tiered: Callable[..., Tiered], injector: FaultInjector, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_of(*range(6))
    one = tiered()
    one.store(keys)
    one.settle()
    two = tiered()
    assert two.tier._store is not None
    bad = two.tier._store.keys(keys)[3]
    read = injector["disk"].inner.get_into

    def spoiled(names: Any, buffers: Any) -> Any:
        got = read(names, buffers)
        for name, buffer in zip(names, buffers, strict=True):
            if name == bad:
                buffer[5000] ^= 1
        return got

    monkeypatch.setattr(injector["disk"].inner, "get_into", spoiled)
    context = two.request()
    assert two.find(keys, context) == 3  # within a few steps, though the tier said that it had all of them
    served = {tuple(row) for row in two.region.rows[:3]}
    assert served == {tuple(content(key, ROW)) for key in keys[:3]}
    assert two.tier._store.pipeline.stats()["misses"] == {"corrupt": 3}
    two.manager.on_request_finished(context)
    assert two.load(keys) == 3  # quarantined: not there any more


def test_a_job_whose_leading_rows_are_good(tiered: Callable[..., Tiered], injector: FaultInjector) -> None:
    keys = keys_of(*range(4))
    one = tiered()
    one.store(keys)
    one.settle()
    two = tiered()
    context = two.request()
    assert [two.manager.lookup(key, context) for key in keys] == [PENDING] * 4
    assert two.tier._store is not None
    two.tier._store.pipeline.discard(two.tier._store.keys(keys[2:3]))
    assert two.find(keys, context) == 2
    two.manager.on_request_finished(context)


def test_a_medium_that_has_to_be_asked(engine: SimpleNamespace, injector: FaultInjector, tmp_path: Path) -> None:
    config = asked(tmp_path, SLOT)
    keys = keys_of(*range(4))
    one = Tiered(config)
    one.store(keys[:3])
    one.close()
    two = Tiered(config)
    injector["disk"].hold("contains")
    context = two.request()
    for _ in range(3):
        # Nothing here waits for the medium: it hangs.
        assert [two.manager.lookup(key, context) for key in keys] == [RETRY] * 4
        two.step()
    injector["disk"].wait_held()
    injector["disk"].release()
    assert two.find(keys, context) == 3
    two.manager.on_request_finished(context)
    two.close()


def test_a_medium_that_hangs_is_given_up_at_its_deadline(
    tiered: Callable[..., Tiered], injector: FaultInjector
) -> None:
    keys = keys_of(*range(4))
    one = tiered()
    one.store(keys)
    one.settle()
    two = tiered(disk={"lane": {"deadline": 0.2}})
    injector["disk"].hold("get_into")
    assert two.load(keys) == 0
    two.store(keys_of(10, 11))  # memory holds them, and a load of others goes on
    two.settle()
    assert two.load(keys_of(10, 11)) == 2
    injector["disk"].release()


def test_shutdown_in_the_middle_of_a_job(
    tiered: Callable[..., Tiered], injector: FaultInjector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_offload, "SHUTDOWN_S", 0.5)
    keys = keys_of(*range(4))
    one = tiered()
    one.store(keys)
    one.settle()
    two = tiered(disk={"lane": {"deadline": 0.3}})
    injector["disk"].hold("get_into")
    context = two.request()
    assert [two.manager.lookup(key, context) for key in keys] == [PENDING] * 4
    two.step()
    injector["disk"].wait_held()
    two.manager.shutdown()
    (result,) = two.tier.get_finished_jobs()
    assert not result.success and not result.successful_keys
    injector["disk"].release()
    # vLLM unmaps its memory now: nothing of ours holds it, and nothing was written there.
    assert (two.region.rows == POISON).all()
    with pytest.raises(RuntimeError, match="released"):
        two.tier._rows.gather([0], [0])


def test_a_reset_keeps_what_was_stored_before_apart(tiered: Callable[..., Tiered]) -> None:
    keys = keys_of(*range(3))
    one = tiered()
    one.store(keys)
    one.manager.reset_cache()
    assert not one.tier._running
    assert one.load(keys) == 0
    one.store(keys[:2])
    one.settle()
    assert one.load(keys) == 2
    # What was computed after the reset may be of other weights than the files say: it is nobody else's.
    two = tiered()
    assert two.load(keys) == 3


@pytest.mark.parametrize(
    "path, value",
    [
        ("model_config__seed", 1),  # other random weights
        ("model_config__quantization", "fp8"),
        ("model_config__revision", "main"),
        ("model_config__served_model_name", "other"),
        ("model_config__dtype", torch.bfloat16),
        ("parallel_config__tensor_parallel_size", 2),
    ],
)
def test_another_engine_finds_nothing(
    tiered: Callable[..., Tiered], engine: SimpleNamespace, path: str, value: Any
) -> None:
    one = tiered()
    one.store(keys_of(1))
    one.settle()
    changed = engine_config(lora_config=None, cache_config__prefix_caching_hash_algo="sha256", **{path: value})
    before, engine.config = engine.config, changed
    assert tiered().load(keys_of(1)) == 0
    engine.config = before
    assert tiered().load(keys_of(1)) == 1


REFUSED = {
    "lora": ({"lora_config": object()}, None, "--enable-lora"),
    "hashes": ({"cache_config__prefix_caching_hash_algo": "xxhash"}, None, "xxhash"),
    "diffusion": ({"model_config__is_diffusion": True}, None, "later tokens"),
    "images": (
        {
            "model_config__multimodal_config": SimpleNamespace(mm_processor_cache_gb=0),
            "cache_config__enable_prefix_caching": False,
        },
        None,
        "images are named by a number",
    ),
}


def test_a_reset_of_the_tier_that_cannot_tell_whose_the_kv_is(
    tiered: Callable[..., Tiered], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tiered()
    keys = keys_of(1, 2)
    one.store(keys)
    one.settle()

    def gone() -> Any:
        raise Unsupported("no files")

    assert one.tier._store is not None
    monkeypatch.setattr(one.tier._store, "_identify", gone)
    one.manager.reset_cache()
    assert one.tier.lookup(keys[0], one.request()) is MISS


@pytest.mark.parametrize("changes, groups, why", REFUSED.values(), ids=REFUSED)
def test_engines_that_run_without_us(
    engine: SimpleNamespace,
    tmp_path: Path,
    changes: dict[str, Any],
    groups: Any,
    why: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = engine.config
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, last, value)
    one = Tiered(tiers(tmp_path, 8, SLOT))
    assert why in caplog.text
    one.store(keys_of(1))
    one.settle()
    context = one.request()
    assert one.tier.lookup(keys_of(2)[0], context) is MISS
    one.manager.reset_cache()
    one.close()
    manager = LMCacheCoreOffloadingSpec(offloading_config({"config": tiers(tmp_path, 8, SLOT)})).get_manager()
    assert manager.lookup(keys_of(1)[0], context) is MISS
    output = manager.prepare_store(keys_of(1), context)
    assert output is not None and output.keys_to_store == []


def test_windows_give_up_single_blocks_of_a_chunk(engine: SimpleNamespace) -> None:
    groups = cache_config(spec(), window(64))
    for i, group in enumerate(groups.kv_cache_groups):
        group.group_id = i
    config = offloading_config(
        groups=tuple(OffloadingGroupConfig(BLOCK, tuple(g.layer_names), g.group_id) for g in groups.kv_cache_groups)
    )
    layout = compat.row_layout(config, engine.config, groups, "tier", ROW, 1)
    assert (layout.chunk_tokens, layout.chunk_bytes) == (BLOCK, ROW)
    with pytest.raises(Unsupported, match="--disable-hybrid-kv-cache-manager"):
        compat.row_layout(config, engine.config, groups, "tier", ROW, 2)


# -- settings and versions ---------------------------------------------------------------------------------------
def test_mistakes_in_settings(engine: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)secondary_tiers.*confg.*known settings: config, weights, tenant"):
        Tiered(tiers(tmp_path, 8, SLOT), confg="x")
    with pytest.raises(ConfigError, match=r"(?s)block_size.*`chunk_tokens` of the configuration"):
        LMCacheCoreOffloadingSpec(offloading_config({"config": tiers(tmp_path, 8, SLOT), "block_size": 64}))
    with pytest.raises(ConfigError, match=r"(?s)not a multiple of vLLM's block.*set chunk_tokens: 64"):
        LMCacheCoreOffloadingSpec(offloading_config({"config": {**tiers(tmp_path, 8, SLOT), "chunk_tokens": 48}}))


def test_the_installed_framework_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.differences() == []
    compat.check_api()
    monkeypatch.setitem(compat._METHODS[compat.SecondaryTierManager], "lookup", ("key",))
    monkeypatch.setitem(compat._FIELDS, compat.TransferJob, ("chunk_rows",))
    with pytest.raises(Unsupported, match=r"(?s)lookup takes \(key, req_context\), expected.*chunk_rows is missing"):
        LMCacheCoreOffloadingSpec(offloading_config())


def test_a_vllm_without_the_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.kv_offload.tiering.base", None)
    found = importlib.util.spec_from_file_location("older", compat.__file__)
    assert found is not None and found.loader is not None
    with pytest.raises(Unsupported, match=r"(?s)^vLLM 0\.\d+.*tested with 0\.32.*lmcachectl engine-args vllm"):
        found.loader.exec_module(importlib.util.module_from_spec(found))


def test_made_by_a_stranger() -> None:
    with pytest.raises(Unsupported, match="OffloadingConnector"):
        compat.engine_of(offloading_config())


# -- the offloading spec -----------------------------------------------------------------------------------------
BLOCKS = 24


class Offloaded:
    """Our manager and our worker around an engine of `BLOCKS` blocks; a chunk is two blocks."""

    def __init__(self, config: Any, cuda: Adversary | None = None, **changes: Any) -> None:
        """`cuda`: the engine computes on a stream of it, and its pages are on a GPU."""
        self.cuda = cuda
        extra = {"config": {**config, "chunk_tokens": 2 * BLOCK}, "spec_name": "LMCacheCoreOffloadingSpec"}
        self.spec = LMCacheCoreOffloadingSpec(offloading_config(extra, **changes))
        assert self.spec.blocks_per_chunk == 2
        found = self.spec.get_manager()
        assert isinstance(found, Manager)
        self.manager = found
        # Two layers in one tensor, and two in tensors of their own, with room between their blocks.
        whole = torch.full((BLOCKS, 2 * LAYERS * PAGE), POISON, dtype=torch.uint8).view(torch.int8)
        self.layers = [whole[:, i * PAGE : (i + 1) * PAGE] for i in range(2)]
        self.layers += [torch.full((BLOCKS, PAGE), POISON - 256, dtype=torch.int8) for _ in range(2)]
        caches = CanonicalKVCaches(
            [CanonicalKVCacheTensor(layer, PAGE) for layer in self.layers],
            [[CanonicalKVCacheRef(i, PAGE) for i in range(LAYERS)]],
        )
        self.worker = self.spec.get_worker(caches)
        if cuda is not None:
            self.worker = GpuCopyWorker(caches, 2, 0, 2 * LAYERS * PAGE, device=0, compute=lambda: COMPUTE)
        self.jobs = 0
        self.requests = 0

    def request(self) -> ReqContext:
        self.requests += 1
        context = ReqContext(f"r{self.requests}")
        self.manager.on_new_request(context)
        return context

    def step(self) -> None:
        self.manager.on_schedule_end(ScheduleEndContext((), ()))

    def block(self, block: int) -> np.ndarray[Any, Any]:
        return np.concatenate([layer[block].numpy() for layer in self.layers]).view(np.uint8)

    def compute(self, work: Callable[[], None]) -> None:
        if self.cuda is None:
            work()
        else:
            self.cuda.compute(work)

    def write(self, block: int, data: np.ndarray[Any, Any]) -> None:
        def work() -> None:
            for i, layer in enumerate(self.layers):
                layer[block] = torch.from_numpy(data[i * PAGE : (i + 1) * PAGE].view(np.int8).copy())

        self.compute(work)

    def poison(self) -> None:
        def work() -> None:
            for layer in self.layers:
                layer.fill_(POISON - 256)

        self.compute(work)

    def done(self, *, wait: bool = False) -> None:
        """The worker's answer to the last job."""
        if wait:
            self.worker.wait({self.jobs})
        for _ in range(10):
            if results := self.worker.get_finished():
                break
        (result,) = results
        assert result.success and result.job_id == self.jobs

    def begin_store(self, keys: Sequence[Any]) -> tuple[Any, ReqContext, Any]:
        context = self.request()
        output = self.manager.prepare_store(keys, context)
        return output, context, output and output.keys_to_store

    def copy_out(self, new: Sequence[Any], where: Any) -> None:
        """The engine computes the chunks in its blocks 0, 1, ..., and its worker copies them."""
        for i, key in enumerate(new):
            data = content(key, 2 * LAYERS * PAGE)
            self.write(2 * i, data[: LAYERS * PAGE])
            self.write(2 * i + 1, data[LAYERS * PAGE :])
        self.jobs += 1
        blocks = list(range(2 * len(new)))
        assert self.worker.submit_store(self.jobs, GPULoadStoreSpec(blocks, [len(blocks)], [0]), where)
        self.done(wait=self.jobs % 2 == 0)
        self.poison()

    def store(self, keys: Sequence[Any]) -> int:
        output, context, new = self.begin_store(keys)
        if new:
            self.copy_out(new, output.store_spec)
            self.manager.complete_store(set(new), context)
        self.manager.on_request_finished(context)
        self.step()
        return len(new or ())

    def find(self, keys: Sequence[Any], context: ReqContext) -> int:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            answers = [self.manager.lookup(key, context) for key in keys]
            hits = answers.index(MISS) if MISS in answers else len(answers)
            if all(answer is HIT for answer in answers[:hits]):
                return hits
            self.step()
            for request in self.manager._requests.values():
                for transfer in request.waiting.values():
                    transfer.wait(30)
            time.sleep(0.001)
        raise AssertionError(f"no answer: {answers}")

    def load(self, keys: Sequence[Any], skip: int = 0) -> int:
        """Load what there is, without its first `skip` blocks, and compare every byte of every block."""
        context = self.request()
        hits = list(keys[: self.find(keys, context)])
        if hits:
            where = self.manager.prepare_load(hits, context)
            self.step()
            self.copy_in(hits, where, skip)
            self.manager.complete_load(set(hits), context)
        self.manager.on_request_finished(context)
        self.step()
        return len(hits)

    def copy_in(self, hits: Sequence[Any], where: Any, skip: int = 0) -> None:
        self.poison()
        blocks = list(range(BLOCKS))
        Random(7).shuffle(blocks)
        used = blocks[: 2 * len(hits) - skip]
        self.jobs += 1
        assert self.worker.submit_load(self.jobs, where, GPULoadStoreSpec(used, [len(used)], [skip]))
        self.done()
        if self.cuda is not None:
            self.cuda.finish()  # what else the engine does to its blocks
        halves = [half for key in hits for half in content(key, 2 * LAYERS * PAGE).reshape(2, -1)]
        for block, half in zip(used, halves[skip:], strict=True):
            assert np.array_equal(self.block(block), half)
        for block in blocks[len(used) :]:
            assert (self.block(block) == POISON).all()

    def close(self) -> None:
        self.worker.shutdown()
        settle(self.manager.pipeline)
        self.manager.shutdown()


@pytest.fixture
def offloaded(engine: SimpleNamespace, injector: FaultInjector, tmp_path: Path) -> Iterator[Callable[..., Offloaded]]:
    """Make engines one after another over one directory: nothing may be held when one ends."""
    opened: list[Offloaded] = []

    def make(slots: int = 8, disk: dict[str, Any] | None = None, **changes: Any) -> Offloaded:
        while opened:
            opened.pop().close()
        opened.append(Offloaded(tiers(tmp_path, slots, 8192, **(disk or {})), **changes))
        return opened[-1]

    yield make
    injector.release()
    for one in opened:
        one.close()


def test_chunks_go_out_and_come_back(offloaded: Callable[..., Offloaded]) -> None:
    one = offloaded()
    keys = keys_of(*range(5))
    assert one.load(keys) == 0
    assert one.store(keys[:3]) == 3
    settle(one.manager.pipeline)
    assert one.store(keys[:4]) == 1
    assert one.load(keys) == 4
    assert one.load(keys, skip=1) == 4
    settle(one.manager.pipeline)
    two = offloaded()
    assert two.load(keys) == 4
    assert two.manager.pipeline.stats()["hits"]["disk"] == 4
    stats = two.manager.get_stats()
    assert "vllm:lmcache_hit_chunks" in str(stats.data)
    assert two.manager.get_stats() is None


@pytest.mark.parametrize("taste", TASTES)
def test_pages_on_a_gpu(engine: SimpleNamespace, tmp_path: Path, taste: Taste) -> None:
    """Copies begin after what was computed before, and have ended when the worker says so."""
    with adversary(taste) as cuda:
        one = Offloaded(tiers(tmp_path, 8, 8192), cuda)
        keys = keys_of(*range(6))
        for first in range(0, 6, 2):
            assert one.store(keys[first : first + 2]) == 2
            settle(one.manager.pipeline)
        for skip in (0, 1):
            assert one.load(keys, skip=skip) == 6
        one.close()


def test_where_hits_come_from(offloaded: Callable[..., Offloaded]) -> None:
    offloaded().store(keys_of(1))
    two = offloaded()
    for expected in ("disk", "host"):
        context = two.request()
        assert two.find(keys_of(1), context) == 1
        assert two.manager.get_load_source(keys_of(1)[0], context).value == expected
        two.manager.on_request_finished(context)


def test_a_hit_is_in_memory_until_it_was_loaded(offloaded: Callable[..., Offloaded]) -> None:
    one = offloaded(slots=4)
    keys = keys_of(*range(3))
    one.store(keys)
    context = one.request()
    assert one.find(keys, context) == 3
    where = one.manager.prepare_load(keys, context)
    one.manager.on_request_finished(context)
    for name in range(10, 30):
        one.store(keys_of(name))
    one.copy_in(keys, where)
    one.manager.complete_load(set(keys), context)


def test_a_hit_that_the_step_did_not_use_can_be_evicted(offloaded: Callable[..., Offloaded]) -> None:
    one = offloaded(slots=4)
    one.store(keys_of(*range(4)))
    context = one.request()
    assert one.find(keys_of(*range(4)), context) == 4
    output = one.manager.prepare_store(keys_of(9), one.request())
    assert output is None  # everything is pinned
    one.step()
    settle(one.manager.pipeline)
    assert one.store(keys_of(10)) == 1
    settle(one.manager.pipeline)
    assert one.find(keys_of(*range(4)), context) == 4  # one of them from the disk again
    one.manager.on_request_finished(context)


def test_more_than_memory_holds(offloaded: Callable[..., Offloaded]) -> None:
    one = offloaded(slots=4)
    for first in range(0, 12, 3):
        one.store(keys_of(*range(first, first + 3)))
        settle(one.manager.pipeline)
    assert one.load(keys_of(*range(6))) == 4  # the rest finds no room, and vLLM computes it


def settle_lanes(one: Offloaded) -> None:
    for tier in one.manager.pipeline.tiers:
        assert tier.drain(10)


def on_disk(offloaded: Callable[..., Offloaded], slots: int, count: int) -> Offloaded:
    one = offloaded(slots=slots)
    for name in range(count):
        assert one.store(keys_of(name)) == 1
        settle(one.manager.pipeline)
    return offloaded(slots=slots)


def test_a_request_that_is_not_asked_again_pins_nothing(
    offloaded: Callable[..., Offloaded],
) -> None:
    """The engine is full: requests that wait are not looked up for as long as others run."""
    one = on_disk(offloaded, 4, 4)
    waiting = one.request()
    for key in keys_of(*range(4)):
        assert one.manager.lookup(key, waiting) in (PENDING, RETRY)
    one.step()
    for transfer in one.manager._requests[waiting.req_id].waiting.values():
        assert transfer.wait(30)
    settle_lanes(one)
    for _ in range(3):
        one.step()
    settle_lanes(one)
    assert one.store(keys_of(9)) == 1, "the save of a running request found no room"
    settle_lanes(one)
    assert one.find(keys_of(*range(4)), waiting) == 4
    one.manager.on_request_finished(waiting)


def test_requests_that_wait_side_by_side_do_not_lose_their_hits(offloaded: Callable[..., Offloaded]) -> None:
    one = on_disk(offloaded, 4, 8)
    first, second = one.request(), one.request()
    wants = {first.req_id: keys_of(*range(4)), second.req_id: keys_of(*range(4, 8))}
    found: dict[str, int] = {}
    for _ in range(20):
        for context in (first, second):
            if context.req_id in found:
                continue
            answers = [one.manager.lookup(key, context) for key in wants[context.req_id]]
            hits = answers.index(MISS) if MISS in answers else len(answers)
            if all(answer is HIT for answer in answers[:hits]):
                found[context.req_id] = hits
                if hits:
                    where = one.manager.prepare_load(wants[context.req_id][:hits], context)
                    one.copy_in(wants[context.req_id][:hits], where)
                    one.manager.complete_load(set(wants[context.req_id][:hits]), context)
        one.step()
        for request in one.manager._requests.values():
            for transfer in request.waiting.values():
                transfer.wait(30)
    one.manager.on_request_finished(first)
    one.manager.on_request_finished(second)
    assert found == {first.req_id: 4, second.req_id: 4}


def test_nobody_waits_for_others_longer_than_for_a_medium(offloaded: Callable[..., Offloaded]) -> None:
    """A load that never ends keeps its slots: what the next one has no room for is computed."""
    on_disk(offloaded, 4, 8)
    one = offloaded(slots=4, disk={"lane": {"deadline": 0.3}})
    stuck, other = one.request(), one.request()
    assert one.find(keys_of(*range(4)), stuck) == 4
    one.manager.prepare_load(keys_of(*range(4)), stuck)
    began = time.monotonic()
    assert one.find(keys_of(*range(4, 8)), other) == 0
    assert time.monotonic() - began >= 0.3
    one.manager.complete_load(set(keys_of(*range(4))), stuck)
    one.manager.on_request_finished(stuck)
    one.manager.on_request_finished(other)


def test_wrong_bytes_are_a_miss(offloaded: Callable[..., Offloaded], injector: FaultInjector) -> None:
    keys = keys_of(*range(4))
    offloaded().store(keys)
    two = offloaded()
    injector["disk"].rates = Rates(flip=1.0)
    assert two.load(keys) == 0
    assert two.manager.pipeline.stats()["misses"] == {"corrupt": 4}


def test_a_hanging_medium_is_a_miss(offloaded: Callable[..., Offloaded], injector: FaultInjector) -> None:
    keys = keys_of(*range(4))
    offloaded().store(keys)
    two = offloaded(disk={"lane": {"deadline": 0.2}})
    injector["disk"].hold("get_into")
    assert two.load(keys) == 0
    assert two.store(keys_of(10)) == 1
    assert two.load(keys_of(10)) == 1


def test_a_medium_that_has_to_be_asked_again(engine: SimpleNamespace, injector: FaultInjector, tmp_path: Path) -> None:
    keys = keys_of(*range(4))
    one = Offloaded(asked(tmp_path, 8192))
    one.store(keys[:3])
    one.close()
    two = Offloaded(asked(tmp_path, 8192))
    injector["disk"].hold("contains", "get_into")
    context = two.request()
    for _ in range(3):
        assert [two.manager.lookup(key, context) for key in keys] == [RETRY] * 4
        two.step()
    injector["disk"].wait_held()
    injector["disk"].release()
    assert two.find(keys, context) == 3
    two.manager.on_request_finished(context)
    two.close()


def test_a_chunk_that_is_being_stored_is_waited_for(offloaded: Callable[..., Offloaded]) -> None:
    one = offloaded()
    keys = keys_of(1, 2)
    output, storing, new = one.begin_store(keys)
    context = one.request()
    assert [one.manager.lookup(key, context) for key in keys] == [PENDING] * 2
    _, other, nothing = one.begin_store(keys)
    assert nothing == []
    one.copy_out(new, output.store_spec)
    one.manager.complete_store(set(new), storing)
    assert one.find(keys, context) == 2
    for request in (storing, context, other):
        one.manager.on_request_finished(request)


def test_a_store_that_failed(offloaded: Callable[..., Offloaded]) -> None:
    one = offloaded()
    _, context, new = one.begin_store(keys_of(1, 2))
    one.manager.complete_store(set(new), context, success=False)
    one.manager.on_request_finished(context)
    assert one.load(keys_of(1, 2)) == 0


def test_a_reset_while_workers_copy(offloaded: Callable[..., Offloaded]) -> None:
    one = offloaded(slots=6)
    one.store(keys_of(1, 2))
    reading = one.request()
    assert one.find(keys_of(1, 2), reading) == 2
    where = one.manager.prepare_load(keys_of(1, 2), reading)
    output, writing, new = one.begin_store(keys_of(3, 4))
    one.manager.reset_cache()
    # Workers have not heard of it yet: what they read and write is nobody else's until a later job has ended.
    taken = {*where.offsets.tolist(), *output.store_spec.offsets.tolist()}
    later, context, fresh = one.begin_store(keys_of(5, 6, 7, 8))
    assert len(fresh) == 2 and taken.isdisjoint(later.store_spec.offsets.tolist())
    one.copy_in(keys_of(1, 2), where)
    one.copy_out(new, output.store_spec)
    one.copy_out(fresh, later.store_spec)
    one.manager.complete_store(set(fresh), context)
    for request in (reading, writing, context):
        one.manager.on_request_finished(request)
    assert one.load(keys_of(1)) == one.load(keys_of(3)) == 0
    assert one.load(fresh) == 2
    settle(one.manager.pipeline)
    assert one.store(keys_of(11, 12, 13, 14, 15, 16)) == 6


def test_a_reset_that_cannot_tell_whose_the_kv_is(
    offloaded: Callable[..., Offloaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of the weights are gone, or a tenant has no identity left. vLLM must see its reset succeed."""
    one = offloaded(slots=6)
    output, context, new = one.begin_store(keys_of(1, 2))

    def gone() -> Any:
        raise Unsupported("no files")

    monkeypatch.setattr(one.manager.store, "_identify", gone)
    one.manager.reset_cache()
    one.copy_out(new, output.store_spec)
    one.manager.on_request_finished(context)
    assert one.load(keys_of(1, 2)) == one.store(keys_of(3)) == 0
    one.manager._drop_stale()  # nothing is stored any more, and so no later job says that the workers have ended


def test_windows_over_a_medium_that_has_to_be_asked(injector: FaultInjector, tmp_path: Path) -> None:
    """vLLM seeks the chunks of a window from the right, where a prompt is longer than what is stored."""
    config = load({**asked(tmp_path, 8192), "chunk_tokens": CHUNK}).config
    keys = keys_of(*range(6), group=1)
    one = Manager(Store(config, LAYOUT, lambda: IDENTITY, None, shared=True), windows={1})
    context = ReqContext("r")
    one.prepare_store(keys[:4], context)
    one.complete_store(keys[:4], context)
    assert one.pipeline.flush(5)
    one.shutdown()
    two = Manager(Store(config, LAYOUT, lambda: IDENTITY, None, shared=True), windows={1})
    for _ in range(6):
        answers = [two.lookup(key, context) for key in reversed(keys)]
        if RETRY not in answers:
            break
        two.on_schedule_end(ScheduleEndContext((), ()))
        for transfer in two._requests["r"].waiting.values():
            transfer.wait(30)
    assert answers == [MISS] * 2 + [HIT] * 4
    two.on_request_finished(context)
    two.shutdown()


def test_events_of_memory(offloaded: Callable[..., Offloaded]) -> None:
    one = offloaded(slots=3, enable_kv_cache_events=True)
    one.store(keys_of(1, 2))
    (stored,) = one.manager.take_events()
    assert (set(stored.keys), stored.removed, stored.medium.value) == (set(keys_of(1, 2)), False, "CPU")
    settle(one.manager.pipeline)
    one.store(keys_of(3, 4))
    removed, stored = one.manager.take_events()
    assert removed.removed and len(removed.keys) == 1 and set(removed.keys) < set(keys_of(1, 2))
    assert set(stored.keys) == set(keys_of(3, 4)) and not stored.removed
    assert list(one.manager.take_events()) == []


def test_at_random(offloaded: Callable[..., Offloaded], injector: FaultInjector) -> None:
    """Requests in any order over a disk that loses, spoils and refuses: every byte loaded is the right one."""
    random = Random(5)
    one = offloaded(slots=6, disk={"lane": {"deadline": 0.3}})  # how long one waits for another's slots
    injector["disk"].rates = Rates(flip=0.1, lost_get=0.1, error=0.1)
    loaded = 0
    live: list[tuple[ReqContext, list[Any], Any]] = []
    for _ in range(300):
        first = random.randrange(20)
        keys = keys_of(*range(first, first + random.randrange(1, 5)))
        match random.randrange(8):
            case 0 | 1:
                one.store(keys)
            case 2 | 3:
                loaded += one.load(keys, skip=random.randrange(2))
            case 4:
                context = one.request()
                hits = keys[: one.find(keys, context)]
                if hits:
                    live.append((context, hits, one.manager.prepare_load(hits, context)))
                else:
                    one.manager.on_request_finished(context)
            case 5 | 6 if live:
                context, hits, where = live.pop(random.randrange(len(live)))
                if random.random() < 0.5:
                    one.manager.on_request_finished(context)
                    one.copy_in(hits, where)
                    one.manager.complete_load(set(hits), context)
                else:
                    one.copy_in(hits, where)
                    one.manager.complete_load(set(hits), context)
                    one.manager.on_request_finished(context)
            case _:
                one.step()
        one.manager.pipeline.check()
    for context, hits, _ in live:
        one.manager.complete_load(set(hits), context)
        one.manager.on_request_finished(context)
    assert loaded > 10
    assert threading.active_count() < 40
