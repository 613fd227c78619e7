"""SGLang's storage backend without SGLang: every generation of its interface, every layout of its host pool.

The pools are shaped as SGLang 0.5.23 shapes them (`fake_sglang`); the real engine has a run of its own
(`make test-sglang`).
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any

import fake_sglang as sgl
import numpy as np
import pytest
import torch
from fake_sglang import PAGE, PAGES, MambaPoolHost, PoolHitPolicy, PoolName, PoolTransfer, indices_of

from lmcache_core.adapters import _page_store, _sglang_pools
from lmcache_core.build import build
from lmcache_core.errors import ConfigError, Unsupported
from lmcache_core.testing.faults import FaultInjector, Rates
from lmcache_core.testing.invariants import settle

LAYOUTS = tuple(sgl.MHA_SHAPES)
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def runtime() -> Iterator[sgl.Runtime]:
    runtime = sgl.Runtime()
    with runtime.installed() as modules:
        runtime.modules_ = modules  # type: ignore[attr-defined]
        yield runtime


@pytest.fixture
def settings(runtime: sgl.Runtime, tmp_path: Path) -> dict[str, Any]:
    """The engine's settings, with a model on this machine."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "fake"}')
    (model / "model.safetensors").write_bytes(b"weights" * 100)
    runtime.settings.clear()
    runtime.settings.update(sgl.SETTINGS, model_path=str(model))
    return runtime.settings


@pytest.fixture
def make(runtime: sgl.Runtime, settings: dict[str, Any], tmp_path: Path) -> Iterator[Make]:
    """Make backends over one directory; when the test ends, nothing may be held and all books must add up."""
    opened: list[Any] = []

    def backend(
        pool: Any = None,
        *,
        slots: int = 32,
        tiers: Sequence[dict[str, Any]] | None = None,
        ranks: Any = None,
        **extra: Any,
    ) -> Any:
        if tiers is None:
            store = {"type": "gds", "path": str(tmp_path / "store"), "mode": "files", "free_floor": 0}
            tiers = [{"name": "disk", "capacity": "64MiB", "backend": store}]
        memory = {"name": "dram", "capacity": slots * 8192, "backend": {"type": "cpu", "pin": False}}
        config = {"tiers": [memory, *tiers]}
        sglangs_own = {"backend_name": "lmcache-core", "module_path": "m", "class_name": "c", "interface_v1": 1}
        given = sgl.StorageConfig(**(ranks or {}), extra_config={**sglangs_own, "config": config, **extra})
        module = runtime.modules_["sglang"]  # type: ignore[attr-defined]
        made = module.LMCacheCoreStorage(given, {})
        if pool is not None:
            made.register_mem_pool_host(pool)
            made.on_host_pools_registered()
        opened.append(made)
        return made

    yield backend
    try:
        for made in opened:
            for store in made._stores.values():
                settle(store.pipeline)
    finally:
        for made in opened:
            made.close()


def hashes(count: int, seed: str = "", first: int = 0) -> list[str]:
    """SGLang's page hashes of a sequence: hexadecimal SHA-256."""
    return [sha256(f"{seed}/{i}".encode()).hexdigest() for i in range(first, first + count)]


def fill(pool: Any, seed: int = 1) -> None:
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape, generator=torch.Generator().manual_seed(seed)))


def tokens(pool: Any, pages: Sequence[int]) -> torch.Tensor:
    """What SGLang's transfers find in pages of a plain pool, token by token."""
    slots = indices_of(pages).tolist()
    planes = 1 if "MLA" in type(pool).__name__ else 2
    found = [pool.token(plane, layer, slot) for plane in range(planes) for layer in range(sgl.LAYERS) for slot in slots]
    return torch.stack(found).clone()


def quiet(backend: Any) -> bool:
    return not backend.errors.counts


# -- bytes ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_come_back_anywhere(make: Make, layout: str, dtype: torch.dtype) -> None:
    pool = sgl.MHATokenToKVPoolHost(layout, dtype)
    backend, keys = make(pool), hashes(4)
    fill(pool)
    before = tokens(pool, [7, 2, 9, 4])
    assert backend.batch_exists(keys) == 0
    assert backend.batch_set_v1(keys, indices_of([7, 2, 9, 4])) == [True] * 4
    assert backend.batch_exists(keys) == 4
    fill(pool, seed=2)
    others = tokens(pool, [0, 2, 4, 5, 7, 8, 9, 10])
    assert backend.batch_get_v1(keys, indices_of([1, 11, 3, 6])) == [True] * 4
    assert torch.equal(tokens(pool, [1, 11, 3, 6]), before)
    assert torch.equal(tokens(pool, [0, 2, 4, 5, 7, 8, 9, 10]), others)
    assert quiet(backend)


@pytest.mark.parametrize("layout", tuple(sgl.MLA_SHAPES))
def test_latents_come_back(make: Make, layout: str) -> None:
    pool = sgl.MLATokenToKVPoolHost(layout)
    backend = make(pool, ranks={"is_mla_model": True, "tp_rank": 1, "tp_size": 2})
    fill(pool)
    before = tokens(pool, [3, 0])
    assert backend.batch_set_v1(hashes(2), indices_of([3, 0])) == [True] * 2
    fill(pool, seed=2)
    assert backend.batch_get_v1(hashes(2), indices_of([1, 2])) == [True] * 2
    assert torch.equal(tokens(pool, [1, 2]), before)


@pytest.mark.parametrize("writer", LAYOUTS)
@pytest.mark.parametrize("reader", LAYOUTS)
def test_layouts_share_what_they_store(make: Make, writer: str, reader: str) -> None:
    first, second = sgl.MHATokenToKVPoolHost(writer), sgl.MHATokenToKVPoolHost(reader)
    fill(first)
    one = make(first)
    assert one.batch_set_v1(hashes(3), indices_of([4, 5, 6])) == [True] * 3
    one.close()
    two = make(second)  # another process, after a restart
    assert two.batch_exists(hashes(3)) == 3
    assert two.batch_get_v1(hashes(3), indices_of([0, 2, 1])) == [True] * 3
    assert torch.equal(tokens(second, [0, 2, 1]), tokens(first, [4, 5, 6]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flat_pages_are_the_same_pages(make: Make, layout: str) -> None:
    """The legacy generation and the others read what the other has written."""
    pool = sgl.MHATokenToKVPoolHost(layout)
    backend, keys = make(pool), hashes(3)
    fill(pool)
    before = tokens(pool, [3, 4])
    values = [pool.get_data_page(page * PAGE) for page in (3, 4)]
    assert backend.batch_set(keys[:2], values) is True
    assert backend.exists(keys[1]) and not backend.exists(keys[2])
    assert backend.batch_get_v1(keys[:2], indices_of([8, 9])) == [True] * 2
    assert torch.equal(tokens(pool, [8, 9]), before)

    assert backend.batch_set_v1([keys[2]], indices_of([5])) == [True]
    targets = [pool.get_dummy_flat_data_page() for _ in range(4)]
    found = backend.batch_get([*keys, "absent"], targets)
    assert found[0] is targets[0] and found[3] is None
    assert torch.equal(found[2], pool.get_data_page(5 * PAGE))
    pool.set_from_flat_data_page(10 * PAGE, found[0])
    assert torch.equal(tokens(pool, [10]), tokens(pool, [8]))
    assert torch.equal(backend.get(keys[2]), pool.get_data_page(5 * PAGE))
    assert backend.get("absent", targets[0]) is None
    assert backend.set("another", pool.get_data_page(0)) is True
    assert quiet(backend)


def test_memory_smaller_than_a_batch(make: Make) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    backend, keys = make(pool, slots=4), hashes(PAGES)
    fill(pool)
    before = pool.kv_buffer.clone()
    assert backend.batch_set_v1(keys, indices_of(range(PAGES))) == [True] * PAGES
    fill(pool, seed=2)
    assert backend.batch_exists(keys) == PAGES
    assert backend.batch_get_v1(keys, indices_of(range(PAGES))) == [True] * PAGES
    assert torch.equal(pool.kv_buffer, before)


# -- prefixes and pieces -------------------------------------------------------------------------------------
def test_a_hole_ends_the_prefix(make: Make) -> None:
    pool = sgl.MHATokenToKVPoolHost("layer_first")
    backend, keys = make(pool), hashes(5)
    fill(pool)
    backend.batch_set_v1([*keys[:2], *keys[3:]], indices_of([0, 1, 3, 4]))
    untouched = tokens(pool, [9, 10, 11])
    assert backend.batch_exists(keys) == 2
    assert backend.batch_get_v1(keys, indices_of([7, 8, 9, 10, 11])) == [True, True, False, False, False]
    assert torch.equal(tokens(pool, [9, 10, 11]), untouched)
    assert backend.batch_exists(keys[3:]) == 2
    assert backend.batch_exists([]) == 0
    assert backend.batch_get_v1([], indices_of([])) == []
    assert backend.batch_set_v1([], indices_of([])) == []


def test_storing_again_is_success(make: Make) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    backend, keys = make(pool), hashes(3)
    fill(pool)
    before = tokens(pool, [0, 1])
    backend.batch_set_v1(keys[:2], indices_of([0, 1]))
    fill(pool, seed=2)
    assert backend.batch_set_v1(keys, indices_of([0, 1, 2])) == [True] * 3
    assert backend.batch_get_v1(keys[:2], indices_of([5, 6])) == [True] * 2
    assert torch.equal(tokens(pool, [5, 6]), before)


@pytest.mark.parametrize(
    "indices",
    [
        pytest.param(indices_of([0]), id="too few"),
        pytest.param(torch.arange(1, 1 + 2 * PAGE), id="not aligned"),
        pytest.param(torch.flip(indices_of([0, 1]), (0,)), id="not in order"),
        pytest.param(indices_of([0, PAGES]), id="outside the pool"),
        pytest.param(indices_of([0, -1]), id="before the pool"),
        pytest.param(None, id="none"),
    ],
)
def test_strange_indices_are_misses(make: Make, indices: Any, caplog: pytest.LogCaptureFixture) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first_direct")
    backend, keys = make(pool), hashes(2)
    fill(pool)
    assert backend.batch_set_v1(keys, indices) == [False, False]
    assert backend.batch_exists(keys) == 0
    backend.batch_set_v1(keys, indices_of([2, 3]))
    before = pool.kv_buffer.clone()
    assert backend.batch_get_v1(keys, indices) == [False, False]
    assert torch.equal(pool.kv_buffer, before)
    assert backend.errors.counts["batch_set_v1"] == 1
    assert "taken for a miss" in caplog.text


def test_strange_flat_pages_are_misses(make: Make) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    backend = make(pool)
    assert backend.batch_set(hashes(1), [pool.get_data_page(0)[:-1]]) is False
    assert backend.batch_set(hashes(1), None) is False
    assert backend.batch_set(hashes(1), [pool.kv_buffer[:, :PAGE]]) is False  # not one run of memory
    backend.batch_set_v1(hashes(1), indices_of([0]))
    assert backend.batch_get(hashes(1), [torch.zeros(3)]) == [None]


# -- several pools -------------------------------------------------------------------------------------------
def hybrid(make: Make, tmp_path: Path) -> tuple[Any, Any, MambaPoolHost]:
    pool, states = sgl.MHATokenToKVPoolHost("page_first"), MambaPoolHost()
    memory = {"name": "dram", "capacity": 32 * 8192, "backend": {"type": "cpu", "pin": False}}
    store = {"type": "gds", "path": str(tmp_path / "states"), "mode": "files", "free_floor": 0}
    tiers = [memory, {"name": "disk", "capacity": "64MiB", "backend": store}]
    backend = make(pool, pools={"mamba": {"tiers": tiers}})
    backend.register_mem_host_pool_v2(pool, PoolName.KV)
    backend.register_mem_host_pool_v2(states, PoolName.MAMBA)
    fill(pool)
    states.temporal.copy_(torch.randn(states.temporal.shape))
    states.conv.copy_(torch.randn(states.conv.shape))
    return backend, pool, states


def test_pools_of_a_hybrid_model(make: Make, tmp_path: Path) -> None:
    backend, _, states = hybrid(make, tmp_path)
    keys = hashes(6)
    kv = PoolTransfer(PoolName.KV, indices_of(range(6)), keys=keys)
    state = PoolTransfer(PoolName.MAMBA, torch.tensor([5, 2]), keys=[keys[2], keys[4]])
    assert backend.batch_set_v2([kv, state]) == {PoolName.KV: [True] * 6, PoolName.MAMBA: [True] * 2}
    before = states.temporal[[5, 2]].clone(), states.conv[[5, 2]].clone()
    states.temporal.zero_()
    states.conv.zero_()
    again = PoolTransfer(PoolName.MAMBA, torch.tensor([0, 7]), keys=[keys[2], keys[4]])
    assert backend.batch_get_v2([again]) == {PoolName.MAMBA: [True, True]}
    assert torch.equal(states.temporal[[0, 7]], before[0])
    assert torch.equal(states.conv[[0, 7]], before[1])
    assert backend.batch_exists(keys) == 6  # the KV pool's pages are the same in every generation
    assert quiet(backend)


def test_what_can_be_restored(make: Make, tmp_path: Path) -> None:
    backend, _, _ = hybrid(make, tmp_path)
    keys = hashes(6)
    backend.batch_set_v2([PoolTransfer(PoolName.KV, indices_of(range(6)), keys=keys)])
    trailing = PoolHitPolicy.TRAILING_PAGES

    def ask(*transfers: PoolTransfer) -> tuple[int, Any, Any]:
        result = backend.batch_exists_v2(keys, list(transfers))
        return result.kv_hit_pages, result.restorable_prefix_pages, dict(result.extra_pool_hit_pages)

    assert ask() == (6, [1, 2, 3, 4, 5, 6], {"kv": 6})
    assert ask(PoolTransfer(PoolName.MAMBA, keys=keys[-1:], hit_policy=trailing)) == (0, [], {"kv": 6})
    backend.batch_set_v2([PoolTransfer(PoolName.MAMBA, torch.tensor([0, 1, 2]), keys=[keys[0], keys[2], keys[3]])])
    assert ask(PoolTransfer(PoolName.MAMBA, keys=keys[-1:], hit_policy=trailing))[:2] == (4, [1, 3, 4])
    assert ask(PoolTransfer(PoolName.MAMBA, keys=keys[-2:], hit_policy=trailing))[:2] == (4, [1, 4])
    assert ask(PoolTransfer(PoolName.MAMBA, keys=keys)) == (1, [1], {"kv": 6, "mamba": 1})
    assert ask(PoolTransfer(PoolName.INDEXER, keys=keys))[:2] == (0, [])  # a pool that is not stored
    groups = PoolTransfer(PoolName.INDEXER, keys=keys, hit_policy=PoolHitPolicy.BLOCK_GROUPS)
    assert ask(groups)[:2] == (6, [1, 2, 3, 4, 5, 6])


def test_a_pool_without_a_configuration_is_not_stored(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    backend = make(sgl.MHATokenToKVPoolHost("page_first"))
    backend.register_mem_host_pool_v2(MambaPoolHost(), PoolName.MAMBA)
    assert 'add "pools": {"mamba"' in caplog.text
    state = PoolTransfer(PoolName.MAMBA, torch.tensor([0]), keys=hashes(1))
    assert backend.batch_set_v2([state]) == {PoolName.MAMBA: [False]}
    assert backend.batch_get_v2([state]) == {PoolName.MAMBA: [False]}
    assert quiet(backend)


# -- who shares with whom ------------------------------------------------------------------------------------
def test_equal_engines_share(make: Make) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    one = make(pool)
    one.batch_set_v1(hashes(2), indices_of([0, 1]))
    one.close()
    assert make(pool).batch_exists(hashes(2)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"served_model_name": "another"},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"weight_version": "2"},
        {"revision": "main"},
        {"attention_backend": "triton"},
        {"json_model_override_args": '{"rope_scaling": {"factor": 2}}'},
        {"quantization": "fp8"},
        {"device": "cuda"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_engine_does_not(make: Make, settings: dict[str, Any], change: dict[str, Any]) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    one = make(pool)
    one.batch_set_v1(hashes(2), indices_of([0, 1]))
    one.close()
    settings.update(change)
    assert make(pool).batch_exists(hashes(2)) == 0


@pytest.mark.parametrize(
    "one, other",
    [
        ({}, {"salt": "a"}),
        ({"salt": "a"}, {"salt": "b"}),
        ({}, {"weights": "b"}),
        ({}, {"ranks": {"tp_size": 2}}),
        ({"ranks": {"tp_rank": 0, "tp_size": 2}}, {"ranks": {"tp_rank": 1, "tp_size": 2}}),
        ({"ranks": {"pp_rank": 0, "pp_size": 2}}, {"ranks": {"pp_rank": 1, "pp_size": 2}}),
        ({"ranks": {"attn_cp_rank": 0, "attn_cp_size": 2}}, {"ranks": {"attn_cp_rank": 1, "attn_cp_size": 2}}),
    ],
    ids=str,
)
def test_another_rank_or_salt_does_not(make: Make, one: dict[str, Any], other: dict[str, Any]) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    writer = make(pool, **one)
    writer.batch_set_v1(hashes(2), indices_of([0, 1]))
    assert writer.batch_exists(hashes(2)) == 2
    writer.close()
    assert make(pool, **other).batch_exists(hashes(2)) == 0


def test_other_weights_or_shapes_do_not(make: Make, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one = make(sgl.MHATokenToKVPoolHost("page_first"))
    one.batch_set_v1(hashes(2), indices_of([0, 1]))
    one.close()
    assert make(sgl.MHATokenToKVPoolHost("page_first", torch.int8)).batch_exists(hashes(2)) == 0
    Path(settings["model_path"], "model.safetensors").write_bytes(b"trained" * 100)
    assert make(sgl.MHATokenToKVPoolHost("page_first")).batch_exists(hashes(2)) == 0


def test_ranks_of_a_replicated_pool_share(make: Make) -> None:
    pool = sgl.MLATokenToKVPoolHost("page_first")
    one = make(pool, ranks={"is_mla_model": True, "tp_rank": 0, "tp_size": 2})
    one.batch_set_v1(hashes(2), indices_of([0, 1]))
    one.close()
    assert make(pool, ranks={"is_mla_model": True, "tp_rank": 1, "tp_size": 2}).batch_exists(hashes(2)) == 2


def test_adapters_are_known_by_content(make: Make, settings: dict[str, Any], tmp_path: Path) -> None:
    class Adapter:
        lora_name, lora_path = "poet", str(tmp_path / "adapter")

    directory = Path(Adapter.lora_path)
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(b"a" * 64)
    settings.update(enable_lora=True, lora_paths=[Adapter])
    pool = sgl.MHATokenToKVPoolHost("page_first")
    one = make(pool)
    one.batch_set_v1(hashes(2), indices_of([0, 1]))
    one.close()
    two = make(pool)
    assert two.batch_exists(hashes(2)) == 2
    two.close()
    (directory / "adapter_model.safetensors").write_bytes(b"b" * 64)
    assert make(pool).batch_exists(hashes(2)) == 0


def test_tenants(make: Make, tmp_path: Path) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    memory = {"name": "dram", "capacity": 32 * 8192, "backend": {"type": "cpu", "pin": False}}
    disk = {"type": "gds", "path": str(tmp_path / "store"), "mode": "files", "free_floor": 0}
    tiers = [memory, {"name": "disk", "capacity": "64MiB", "backend": disk}]
    config = {"tiers": tiers, "tenancy": {"secret": "s" * 32}}
    one = make(pool, config=config, tenant="a")
    one.batch_set_v1(hashes(1), indices_of([0]))
    one.close()
    two = make(pool, config=config, tenant="b")
    assert two.batch_exists(hashes(1)) == 0
    two.close()
    assert make(pool, config=config, tenant="a").batch_exists(hashes(1)) == 1
    with pytest.raises(ConfigError, match="name the tenant"):
        make(pool, config={**config, "tiers": tiers[:1]})


def test_a_gpu_tier_is_refused_and_not_left_empty(make: Make) -> None:
    hbm = {"name": "hbm", "capacity": 8192, "backend": {"type": "gpu"}}
    memory = {"name": "dram", "capacity": 32 * 8192, "backend": {"type": "cpu", "pin": False}}
    with pytest.raises(ConfigError, match="this engine can have no GPU tier"):
        make(sgl.MHATokenToKVPoolHost("page_first"), config={"tiers": [hbm, memory]})


# -- weights that change -------------------------------------------------------------------------------------
def test_pages_of_old_weights_are_neither_served_nor_stored(make: Make, settings: dict[str, Any]) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    backend, keys = make(pool), hashes(3)
    backend.batch_set_v1(keys, indices_of([0, 1, 2]))
    settings["weight_version"] = "step-2"
    assert backend.batch_exists(keys) == 0
    assert backend.batch_set_v1(keys, indices_of([0, 1, 2])) == [False] * 3  # still the old weights' pages
    assert backend.batch_set(keys, [pool.get_data_page(0)]) is False
    pool.clear()  # SGLang flushes its cache after an update
    assert backend.batch_set_v1(keys, indices_of([3, 4, 5])) == [True] * 3
    assert backend.batch_exists(keys) == 3
    settings["weight_version"] = "default"
    assert backend.batch_exists(keys) == 3  # the first ones, which are theirs
    assert quiet(backend)


def test_weights_that_change_during_a_write(
    make: Make, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another of SGLang's threads notices first; the pages at hand are still those of the old weights."""
    pool = sgl.MHATokenToKVPoolHost("page_first")
    backend = make(pool)
    store = backend._stores["kv"]
    keys_of = store.keys

    def late(hashes: Sequence[str]) -> Any:
        settings["weight_version"] = "step-2"
        backend._store()
        return keys_of(hashes)

    with monkeypatch.context() as patch:
        patch.setattr(store, "keys", late)
        assert backend.batch_set_v1(hashes(2), indices_of([0, 1])) == [False, False]
    assert backend.batch_exists(hashes(2)) == 0
    assert quiet(backend)


def test_clear_forgets_and_keeps_apart(make: Make) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    backend, keys = make(pool), hashes(3)
    backend.batch_set_v1(keys, indices_of([0, 1, 2]))
    assert backend.clear() is True
    assert backend.batch_exists(keys) == 0
    backend.batch_set_v1(keys, indices_of([0, 1, 2]))
    assert backend.batch_exists(keys) == 3
    backend.close()
    assert make(pool).batch_exists(keys) == 0


# -- trouble -------------------------------------------------------------------------------------------------
@pytest.fixture
def injector(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultInjector]:
    injector = FaultInjector({"disk": Rates()})
    monkeypatch.setattr(_page_store, "build", partial(build, plugins=injector.plugins()))
    yield injector
    injector.release()


def slow_disk(tmp_path: Path, **lane: Any) -> list[dict[str, Any]]:
    store = {"type": "gds", "path": str(tmp_path / "store"), "mode": "files", "free_floor": 0}
    return [{"name": "disk", "capacity": "64MiB", "lane": lane, "backend": store}]


def restarted(make: Make, pool: Any, tiers: Any) -> Any:
    """A backend whose pages are on disk only."""
    one = make(pool, tiers=tiers)
    assert one.batch_set_v1(hashes(4), indices_of([0, 1, 2, 3])) == [True] * 4
    one.close()
    return make(pool, tiers=tiers)


def test_damage_is_a_miss(make: Make, tmp_path: Path) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    backend = restarted(make, pool, slow_disk(tmp_path))
    key = backend._stores["kv"].keys(hashes(4))[2]
    (damaged,) = (tmp_path / "store").rglob(f"*{key.hex()[4:]}*")
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    fill(pool, seed=3)
    untouched = tokens(pool, [8, 9])
    assert backend.batch_exists(hashes(4)) == 4
    assert backend.batch_get_v1(hashes(4), indices_of([6, 7, 8, 9])) == [True, True, False, False]
    assert torch.equal(tokens(pool, [8, 9]), untouched)
    assert backend.batch_exists(hashes(4)) == 2
    assert quiet(backend)


@pytest.mark.parametrize("method", ["get_into", "put_from"])
def test_a_medium_that_fails(make: Make, injector: FaultInjector, tmp_path: Path, method: str) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    backend = restarted(make, pool, slow_disk(tmp_path))
    injector["disk"].fail[method] = OSError(5, "planted")
    reads = method != "get_into"
    assert backend.batch_get_v1(hashes(4), indices_of([4, 5, 6, 7])) == [reads] * 4
    assert backend.batch_set_v1(hashes(2, "new"), indices_of([0, 1])) == [True] * 2  # memory holds them
    assert quiet(backend)


def test_a_medium_that_hangs_is_waited_for_until_its_deadline(
    make: Make, injector: FaultInjector, tmp_path: Path
) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    backend = restarted(make, pool, slow_disk(tmp_path, deadline="200ms"))
    injector["disk"].hold("get_into")
    begun = monotonic()
    assert backend.batch_get_v1(hashes(4), indices_of([4, 5, 6, 7])) == [False] * 4
    assert monotonic() - begun < 5
    injector.release()
    assert quiet(backend)


def test_writing_waits_no_longer_than_the_deadline(make: Make, injector: FaultInjector, tmp_path: Path) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    backend = make(pool, slots=8, tiers=slow_disk(tmp_path, deadline="200ms"))
    injector["disk"].hold("put_from")
    begun = monotonic()
    done = backend.batch_set_v1(hashes(PAGES), indices_of(range(PAGES)))
    assert monotonic() - begun < 5
    assert done == sorted(done, reverse=True)  # a prefix
    injector.release()
    assert quiet(backend)


def test_defects_of_ours_are_misses(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    backend = make(pool)
    store = backend._stores["kv"]
    state = PoolTransfer(PoolName.KV, indices_of([0]), keys=hashes(1))
    with monkeypatch.context() as patch:
        patch.setattr(store, "keys", lambda hashes: 1 / 0)
        assert backend.batch_exists(hashes(1)) == 0
        assert backend.batch_get_v1(hashes(1), indices_of([0])) == [False]
        assert backend.batch_set_v1(hashes(1), indices_of([0])) == [False]
        assert backend.batch_exists_v2(hashes(1), []).kv_hit_pages == 0
        assert backend.batch_get_v2([state]) == {PoolName.KV: [False]}
        assert backend.batch_set_v2([state]) == {PoolName.KV: [False]}
        assert backend.get(hashes(1)[0]) is None
        assert backend.set(hashes(1)[0], pool.get_data_page(0)) is False
        assert backend.exists(hashes(1)[0]) is False
    assert sum(backend.errors.counts.values()) == 9


def test_after_close_everything_is_a_miss(make: Make) -> None:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    backend, keys = make(pool), hashes(1)
    backend.batch_set_v1(keys, indices_of([0]))
    backend.close()
    backend.close()
    assert backend.batch_exists(keys) == 0
    assert backend.batch_get_v1(keys, indices_of([0])) == [False]
    assert backend.batch_set_v1(keys, indices_of([0])) == [False]
    assert backend.batch_get(keys, [pool.get_dummy_flat_data_page()]) == [None]
    assert backend.get_stats() is None


def test_three_threads_as_sglang_has_them(make: Make) -> None:
    """One asks, one reads, one writes, in a memory too small for all; every page read is the one that was written."""
    pool = sgl.MHATokenToKVPoolHost("page_first_direct")
    backend = make(pool, slots=6)
    wrong: list[str] = []
    done = threading.Event()

    def page(number: int) -> torch.Tensor:
        return torch.full_like(pool.get_data_page(0), float(number))

    def write() -> None:
        for number in range(60):
            pool.set_from_flat_data_page(0, page(number))
            if backend.batch_set_v1([f"page {number}"], indices_of([0])) != [True]:
                wrong.append(f"{number} was not stored")
        done.set()

    def read() -> None:
        choose = random.Random(1)
        while not done.is_set():
            number = choose.randrange(60)
            if backend.batch_get_v1([f"page {number}"], indices_of([5])) == [True]:
                found = pool.get_data_page(5 * PAGE)
                if not torch.equal(found, page(number)):
                    wrong.append(f"{number} came back as {found[:3]}")

    def ask() -> None:
        while not done.is_set():
            backend.batch_exists([f"page {number}" for number in range(60)])

    threads = [threading.Thread(target=job) for job in (write, read, ask)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert backend.batch_exists([f"page {number}" for number in range(60)]) == 60
    assert quiet(backend)


# -- start-up ------------------------------------------------------------------------------------------------
def test_what_is_stored_is_said_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make(sgl.MHATokenToKVPoolHost("page_first"))
    said = [record.getMessage() for record in caplog.records if "storing pool" in record.getMessage()]
    assert len(said) == 1
    assert said[0].endswith(
        "(page_first): canonical, pages of 4 tokens, 1.5 KiB each: dram 32 pages; disk 64 MiB (write through)"
    )
    assert "use --page-size 64" in caplog.text


def strange_pool(**changes: Any) -> Any:
    pool = sgl.MHATokenToKVPoolHost("page_first")
    for name, value in changes.items():
        setattr(pool, name, value)
    return pool


@pytest.mark.parametrize(
    "pool, reason",
    [
        (lambda: strange_pool(layout="page_unified"), "does not point to its pages"),
        (lambda: strange_pool(dcp_size=2), "context parallel"),
        (lambda: strange_pool(head_num=3), "is of shape"),
        (lambda: strange_pool(layout="layer_first"), "is of shape"),
        (lambda: strange_pool(kv_buffer=torch.zeros(sgl.MHA_SHAPES["page_first"], dtype=torch.float64)), "float64"),
        (lambda: strange_pool(get_data_page=lambda i, flat: torch.zeros(2 * 4 * 3 * 2 * 8)), "SGLang finds there"),
    ],
)
def test_strange_pools_are_left_alone(
    make: Make, pool: Callable[[], Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = make(pool())
    assert "pool kv is not stored" in caplog.text
    assert reason in caplog.text
    assert backend.batch_exists(hashes(1)) == 0
    assert backend.batch_set_v1(hashes(1), indices_of([0])) == [False]
    assert backend.batch_get_v1(hashes(1), indices_of([0])) == [False]
    assert quiet(backend)


def test_the_proof_leaves_the_page_as_it_was() -> None:
    pool = sgl.MHATokenToKVPoolHost("page_head")
    fill(pool)
    before = pool.kv_buffer.clone()
    _sglang_pools.describe(pool, "kv")
    assert torch.equal(pool.kv_buffer, before)


def test_weights_that_cannot_be_found(make: Make, settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    settings["model_path"] = "nobody/nothing"
    pool = sgl.MHATokenToKVPoolHost("page_first")
    assert make(pool).batch_set_v1(hashes(1), indices_of([0])) == [False]
    assert 'name them yourself with "weights"' in caplog.text
    assert make(pool, weights="mine").batch_set_v1(hashes(1), indices_of([0])) == [True]


def test_random_weights_are_known_by_their_seed(make: Make, settings: dict[str, Any]) -> None:
    settings["load_format"] = "dummy"
    pool = sgl.MHATokenToKVPoolHost("page_first")
    one = make(pool)
    one.batch_set_v1(hashes(1), indices_of([0]))
    one.close()
    two = make(pool)
    assert two.batch_exists(hashes(1)) == 1
    two.close()
    settings["random_seed"] = 8
    assert make(pool).batch_exists(hashes(1)) == 0


def test_unknown_settings_stop_the_engine(make: Make) -> None:
    with pytest.raises(ConfigError, match="known settings: config, pools, weights, salt, tenant"):
        make(sgl.MHATokenToKVPoolHost("page_first"), wieghts="x")
    with pytest.raises(ConfigError):
        make(sgl.MHATokenToKVPoolHost("page_first"), config={"tiers": []})


def test_every_rank_may_have_a_file_of_its_own(make: Make, tmp_path: Path) -> None:
    for rank, slots in enumerate((8, 16)):
        (tmp_path / f"tp{rank}-pp0.yaml").write_text(
            f"tiers: [{{name: dram, capacity: {slots * 8192}, backend: {{type: cpu, pin: false}}}}]"
        )
    config = str(tmp_path / "{rank}.yaml")
    pool = sgl.MHATokenToKVPoolHost("page_first")
    made = [make(pool, config=config, ranks={"tp_rank": rank, "tp_size": 2}) for rank in range(2)]
    assert [backend._stores["kv"].pipeline.slots.count for backend in made] == [8, 16]


def test_another_interface_is_refused(runtime: sgl.Runtime) -> None:
    engine = runtime.modules_["_sglang_engine"]  # type: ignore[attr-defined]
    engine.check_api(sgl.HiCacheStorage, engine.STORAGE_API)
    engine.check_api(sgl.UnifiedCacheLinker, engine.LINKER_API)

    class Newer(sgl.HiCacheStorage):
        def exists(self, key: str, group: int) -> bool:  # type: ignore[override]
            return False

    Newer.clear = None  # type: ignore[assignment,method-assign]
    with pytest.raises(Unsupported) as refused:
        engine.check_api(Newer, engine.STORAGE_API)
    assert "Newer.exists takes (key, group), expected (key)" in str(refused.value)
    assert "Newer.clear is missing" in str(refused.value)


def test_facts_that_the_engine_does_not_tell(
    make: Make, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    del settings["quantization"]
    assert make(sgl.MHATokenToKVPoolHost("page_first")).batch_set_v1(hashes(1), indices_of([0])) == [False]
    assert "does not tell what it runs with" in caplog.text


def test_runs_are_as_long_as_both_sides_allow() -> None:
    """Copies of a page-first pool go head by head of all tokens at once where the bytes are one piece."""
    runs = {
        layout: {
            part.run_bytes for part in _sglang_pools.describe(sgl.MHATokenToKVPoolHost(layout), "kv")._copier._parts
        }
        for layout in LAYOUTS
    }
    head = sgl.DIM * 4
    assert runs == {
        "layer_first": {PAGE * sgl.HEADS * head},
        "page_first": {sgl.HEADS * head},
        "page_first_direct": {PAGE * sgl.HEADS * head},
        "page_head": {head},
    }


def test_pointer_pages_that_change_are_refused() -> None:
    states = MambaPoolHost()
    pages = _sglang_pools.describe(states, "mamba")
    assert isinstance(pages, _sglang_pools.PointerPages)
    slot = np.zeros(pages.layout.chunk_bytes, np.uint8)
    states.conv = torch.zeros(states.size, sgl.LAYERS, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="were promised"):
        pages.gather(torch.tensor([0]), np.array([slot.ctypes.data]))


def test_weights_replaced_and_flushed_before_storage_is_called_again(make: Make, settings: dict[str, Any]) -> None:
    """SGLang's scheduler does both in one go: the threads of storage see them at once."""
    pool = sgl.MHATokenToKVPoolHost("page_first")
    backend, keys = make(pool), hashes(3)
    assert backend.batch_set_v1(keys, indices_of([0, 1, 2])) == [True] * 3
    for step in (2, 3):
        settings["weight_version"] = f"step-{step}"
        pool.clear()
        assert backend.batch_exists(keys) == 0
        assert backend.batch_set_v1(keys, indices_of([3, 4, 5])) == [True] * 3
        assert backend.batch_exists(keys) == 3
