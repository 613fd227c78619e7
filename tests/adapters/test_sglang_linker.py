"""SGLang's cache linker without SGLang: only loads that cannot fail are promised, and every page is the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_sglang as sgl
import numpy as np
import pytest
import torch
from fake_sglang import DIM, HEADS, LAYERS, PAGE, SLOTS, PoolName, PoolTransfer, indices_of

from lmcache_core.adapters import _page_store
from lmcache_core.adapters._sglang_pools import DevicePages
from lmcache_core.build import build
from lmcache_core.testing.faults import FaultInjector, Rates
from lmcache_core.testing.invariants import settle

Make = Callable[..., Any]


class MHATokenToKVPool:
    """The engine's own KV: `[slot, head, dim]` for each layer."""

    layer_num = LAYERS
    kv_cache_layout = "nhd"

    def __init__(self, seed: int = 1) -> None:
        random = torch.Generator().manual_seed(seed)
        self.k_buffer = [torch.randn(SLOTS, HEADS, DIM, generator=random) for _ in range(LAYERS)]
        self.v_buffer = [torch.randn(SLOTS, HEADS, DIM, generator=random) for _ in range(LAYERS)]

    def pages(self, numbers: list[int]) -> torch.Tensor:
        slots = indices_of(numbers)
        return torch.stack([tensor[slots] for tensor in (*self.k_buffer, *self.v_buffer)])


@pytest.fixture(scope="module")
def linker_class() -> Iterator[tuple[sgl.Runtime, Any]]:
    runtime = sgl.Runtime()
    with runtime.installed() as modules:
        yield runtime, modules["sglang_linker"].LMCacheCoreLinker


@pytest.fixture
def make(linker_class: tuple[sgl.Runtime, Any], tmp_path: Path) -> Iterator[Make]:
    runtime, kind = linker_class
    runtime.settings.clear()
    runtime.settings.update(sgl.SETTINGS, load_format="dummy", model_path=str(tmp_path))
    runtime.tp_size = 1
    (tmp_path / "config.json").write_text("{}")
    opened: list[Any] = []

    def linker(pool: Any, *, slots: int = 32, components: Any = ("FULL",), **changes: Any) -> Any:
        memory = {"name": "dram", "capacity": slots * 8192, "backend": {"type": "cpu", "pin": False}}
        store = {"type": "gds", "path": str(tmp_path / "store"), "mode": "files", "free_floor": 0}
        tiers = [memory, {"name": "disk", "capacity": "64MiB", "lane": {"deadline": "300ms"}, "backend": store}]
        params: dict[str, Any] = {
            "token_to_kv_pool_allocator": SimpleNamespace(get_kvcache=lambda: pool), "page_size": PAGE, "pp_size": 1,
            "attn_cp_size": 1, "mtp_draft_device_pools": (), "sidecar_draft_device_pools": (),
        }  # fmt: skip
        made = kind(
            None,
            SimpleNamespace(**{**params, **changes}),
            components=[SimpleNamespace(name=name) for name in components],
            extra_config={"config": {"tiers": tiers}},
            forward_stream=None,
        )
        opened.append(made)
        return made

    yield linker
    for made in opened:
        if made._store is not None:
            made.reset()
            settle(made._store.pipeline)
        made.close()


def transfer(pages: list[int], first: int = 0) -> list[Any]:
    keys = [f"{first + i:064x}" for i in range(len(pages))]
    return [PoolTransfer(PoolName.KV, keys=keys, device_indices=indices_of(pages))]


def stored(linker: Any, pages: list[int]) -> bool:
    """Offload pages and wait for the result, as SGLang counts and pops them."""
    assert linker.offload(transfer(pages), session_id="s")
    linker._offloads[-1].result(60)
    assert linker.num_completed_offloads() == 1
    result: bool = linker.pop_completed_offload()
    assert linker.num_completed_offloads() == 0
    return result


def test_a_round_trip(make: Make) -> None:
    pool = MHATokenToKVPool()
    linker = make(pool)
    assert linker.lookup("r", transfer([0, 1, 2])) == []
    before = pool.pages([0, 1, 2])
    assert stored(linker, [0, 1, 2])
    assert linker.lookup("r", transfer([9, 8, 7, 6])) == [1, 2, 3]
    assert linker.load("r", transfer([9, 8, 7]))
    untouched = pool.pages([3, 4, 5, 6, 10])
    index = linker.start_layer_wise_loading()
    assert linker.finish_layer_wise_loading(index)
    assert torch.equal(pool.pages([9, 8, 7]), before)
    assert torch.equal(pool.pages([3, 4, 5, 6, 10]), untouched)
    assert linker.start_layer_wise_loading() == -1
    assert PoolName.KV in linker.pools


def test_another_process_finds_them(make: Make) -> None:
    first, second = MHATokenToKVPool(), MHATokenToKVPool(seed=2)
    one = make(first)
    stored(one, [0, 1])
    one.close()
    two = make(second)
    assert two.lookup("r", transfer([5, 4])) == [1, 2]
    assert two.load("r", transfer([5, 4]))
    assert two.finish_layer_wise_loading(two.start_layer_wise_loading())
    assert torch.equal(second.pages([5, 4]), first.pages([0, 1]))


def test_nothing_is_promised_that_is_not_in_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    injector = FaultInjector({"disk": Rates()})
    monkeypatch.setattr(_page_store, "build", partial(build, plugins=injector.plugins()))
    pool = MHATokenToKVPool()
    one = make(pool)
    stored(one, [0, 1])
    one.close()
    two = make(pool)
    injector["disk"].fail["get_into"] = OSError(5, "planted")
    before = pool.pages(list(range(12)))
    assert two.lookup("r", transfer([5, 4])) == [1, 2]  # so it seems
    assert not two.load("r", transfer([5, 4]))
    injector["disk"].fail.clear()
    injector["disk"].hold("get_into")
    assert not two.load("r", transfer([5, 4]))  # not past the deadline
    injector.release()
    assert two.start_layer_wise_loading() == -1
    assert torch.equal(pool.pages(list(range(12))), before)


def test_queued_loads_can_be_cancelled(make: Make) -> None:
    pool = MHATokenToKVPool()
    linker = make(pool)
    stored(linker, [0, 1])
    assert linker.load("a", transfer([4, 5]))
    assert not linker.load("a", transfer([4, 5]))
    assert linker.cancel_queued_load("a")
    assert not linker.cancel_queued_load("a")
    assert linker.start_layer_wise_loading() == -1
    assert linker.load("b", transfer([4, 5]))
    linker.reset()
    assert linker.start_layer_wise_loading() == -1


def test_no_more_is_promised_than_memory_holds(make: Make) -> None:
    pool = MHATokenToKVPool()
    linker = make(pool, slots=8)
    for page in range(8):
        linker.offload(transfer([page], first=page))
    linker.reset()
    assert linker.lookup("r", transfer(list(range(8)))) == [1, 2, 3, 4]
    assert linker.load("r", transfer([0, 1, 2, 3]))


def test_weights_that_changed(make: Make, linker_class: tuple[sgl.Runtime, Any]) -> None:
    runtime, _ = linker_class
    pool = MHATokenToKVPool()
    linker = make(pool)
    stored(linker, [0, 1])
    runtime.settings["weight_version"] = "2"
    assert linker.lookup("r", transfer([0, 1])) == []
    assert not linker.load("r", transfer([0, 1]))
    assert not linker.offload(transfer([0, 1]))  # computed by the old ones
    linker.reset()
    assert linker.lookup("r", transfer([0, 1])) == []
    assert stored(linker, [2, 3])


@pytest.mark.parametrize(
    "tp_size, changes, reason",
    [
        (2, {}, "several ranks"),
        (1, {"pp_size": 2}, "several ranks"),
        (1, {"components": ("FULL", "SWA")}, "use the hierarchical cache"),
        (1, {"mtp_draft_device_pools": ("draft",)}, "draft models"),
    ],
)
def test_engines_that_cannot_be_served_run_uncached(
    make: Make, linker_class: tuple[sgl.Runtime, Any], caplog: pytest.LogCaptureFixture, tp_size: int,
    changes: dict[str, Any], reason: str,
) -> None:  # fmt: skip
    linker_class[0].tp_size = tp_size
    linker = make(MHATokenToKVPool(), **changes)
    assert reason in caplog.text
    assert linker.lookup("r", transfer([0])) == []
    assert not linker.load("r", transfer([0]))
    assert not linker.offload(transfer([0]))
    assert linker.start_layer_wise_loading() == -1


def test_kv_of_another_shape_runs_uncached(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    pool = MHATokenToKVPool()
    pool.v_buffer[1] = pool.v_buffer[1][:, :1].contiguous()
    make(pool)
    assert "is not [slot, head, dim]" in caplog.text
    assert make(SimpleNamespace()).lookup("r", transfer([0])) == []
    assert "KV of kind SimpleNamespace" in caplog.text


def test_a_failing_copy_aborts_only_its_batch(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    pool = MHATokenToKVPool()
    linker = make(pool)
    stored(linker, [0, 1])
    assert linker.load("r", transfer([SLOTS, 1]))  # pages that the engine does not have
    assert not linker.finish_layer_wise_loading(linker.start_layer_wise_loading())
    assert "please report" in caplog.text
    assert linker.load("r", transfer([4, 5]))
    assert linker.finish_layer_wise_loading(linker.start_layer_wise_loading())


def test_loads_of_a_batch_that_failed_are_not_made_later(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang aborts every request of the batch and gives its slots to others."""
    pool = MHATokenToKVPool()
    linker = make(pool)
    assert stored(linker, [0, 1])
    assert linker.load("a", transfer([4, 5]))
    assert linker.load("b", transfer([6, 7]))

    def full(*args: object) -> None:
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(linker._store.pages, "scatter", full)
        index = linker.start_layer_wise_loading()
    assert not linker.finish_layer_wise_loading(index)
    before = pool.pages([4, 5, 6, 7])  # somebody else's by now
    assert linker.load("c", transfer([9, 8]))
    assert linker.finish_layer_wise_loading(linker.start_layer_wise_loading())
    assert torch.equal(pool.pages([4, 5, 6, 7]), before)


def test_new_weights_that_cannot_be_named_are_not_taken_for_the_old_ones(
    make: Make, linker_class: tuple[sgl.Runtime, Any]
) -> None:
    runtime, _ = linker_class
    linker = make(MHATokenToKVPool())
    assert stored(linker, [0, 1])
    # The trainer replaces the weights and takes its files away, or is writing them at this moment.
    config = Path(runtime.settings["model_path"], "config.json")
    config.unlink()
    runtime.settings["weight_version"] = "2"
    linker.reset()
    assert linker.lookup("r", transfer([0, 1])) == []
    config.write_text("{}")
    linker.reset()  # the next flush finds them
    assert linker.lookup("r", transfer([0, 1])) == []
    assert stored(linker, [2, 3])


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_device_memory_holds_the_same_chunks(device: str) -> None:
    """The copies for device memory, which a CPU's tensors can do as well, and the native ones read each other."""
    pool, other = MHATokenToKVPool(), MHATokenToKVPool(seed=2)
    for planes in (other.k_buffer, other.v_buffer):
        planes[:] = [tensor.to(device) for tensor in planes]
    native, there = DevicePages(pool, PAGE), DevicePages(other, PAGE)
    there._copier = None
    assert native.layout == there.layout
    slots = np.zeros((3, native.layout.chunk_bytes), np.uint8)
    addresses = np.array([row.ctypes.data for row in slots])
    native.gather(indices_of([3, 1, 8]), addresses)
    expected = slots.copy()
    there.scatter(indices_of([0, 5, 2]).to(device), addresses)
    slots[:] = 0
    there.gather(indices_of([0, 5, 2]).to(device), addresses)
    assert np.array_equal(slots, expected)
    for mine, theirs in zip((*pool.k_buffer, *pool.v_buffer), (*other.k_buffer, *other.v_buffer), strict=True):
        assert torch.equal(mine[indices_of([3, 1, 8])], theirs.cpu()[indices_of([0, 5, 2])])
