"""The GPU tier on a GPU: what tests/test_gpu_tier.py shows over a fake, with real copies and streams. `make gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chunks import keys

from lmcache_backends.cpu import CpuMemory
from lmcache_backends.gpu import GpuConfig
from lmcache_core import CacheEngine, _cuda
from lmcache_core.build import build
from lmcache_core.config import load
from lmcache_core.copies import PageGeometry
from lmcache_core.errors import BackendUnavailable
from lmcache_core.gpu import GpuPagedKV, How
from lmcache_core.layout import KVLayout
from lmcache_core.pipeline import Lease, Pipeline, Reservation
from lmcache_core.protocols import BuildContext
from lmcache_core.testing import MemoryBackendTests
from lmcache_core.testing.invariants import settle

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _cuda.available(), reason=_cuda.why_not())]

LAYOUT = KVLayout("lknhd", "bfloat16", 4, 2, 2, 64, chunk_tokens=64, block_tokens=16)


def tiers(places: int, slots: int = 64, disk: Path | None = None) -> list[dict[str, Any]]:
    nbytes = LAYOUT.chunk_bytes
    found: list[dict[str, Any]] = [
        {"name": "hbm", "capacity": places * nbytes, "backend": {"type": "gpu"}},
        {"name": "dram", "capacity": slots * (nbytes + 8192), "backend": {"type": "cpu"}},
    ]
    if disk is not None:
        found.append({"name": "disk", "capacity": "1GiB", "backend": {"type": "gds", "path": str(disk)}})
    return found


class TestGpuMemory(MemoryBackendTests):
    @pytest.fixture
    def open_memory(self) -> Any:
        return GpuConfig().build


def test_more_than_is_free_is_refused_and_takes_nothing() -> None:
    before, total = _cuda.memory(0)
    memory = GpuConfig().build(BuildContext("hbm", 1, None, 1))
    with pytest.raises(BackendUnavailable, match="do not fit"):
        memory.allocate(total)
    assert abs(_cuda.memory(0)[0] - before) < 64 << 20


@pytest.mark.parametrize("shared", [False, True])
def test_the_arena_is_pinned_near_the_gpu(shared: bool) -> None:
    memory = CpuMemory(pin=True, shared=shared, gpu=0)
    region = memory.allocate(64 << 20)
    assert region.pinned and region.remark == ""
    assert _cuda.unreachable(np.array([region.address, region.address + (64 << 20) - 1]), 0) is None
    memory.close()


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Pipeline]:
    found = build(load({"chunk_tokens": 64, "tiers": tiers(8, disk=tmp_path / "kv")}).config, LAYOUT)
    yield found
    settle(found)
    found.close()


def test_pages_come_back_from_every_tier(pipeline: Pipeline) -> None:
    torch: Any = pytest.importorskip("torch")
    count, names = 20, keys(20)  # more than has room on the device
    pages = torch.randint(0, 256, (count * LAYOUT.chunk_bytes,), dtype=torch.uint8, device="cuda")
    truth = pages.clone()
    stream = torch.cuda.Stream()
    each = pages.numel() // 8
    bases = pages.data_ptr() + np.arange(8).reshape(4, 2).T * each
    paged = GpuPagedKV(bases, PageGeometry.nhd(LAYOUT), 4 * count, how=How(stream.cuda_stream), owner=pages)
    ids = np.random.default_rng(0).permutation(4 * count).reshape(count, 4)
    torch.cuda.synchronize()

    def save(room: Reservation) -> None:
        paged.gather(ids[room.positions], room.on_device(stream.cuda_stream))

    def fill(lease: Lease) -> list[str]:
        paged.scatter(ids[: len(lease)], lease.on_device(stream.cuda_stream))
        return lease.sources

    assert pipeline.store(names, save) == count
    with torch.cuda.stream(stream):
        pages.zero_()  # queued behind the copy: the pages are the engine's again
    assert pipeline.flush(30)
    for clear, sources in (("", {"hbm", "dram"}), ("hbm", {"dram"}), ("dram", {"disk"}), ("", {"hbm", "dram"})):
        if clear:
            pipeline.clear(clear)
        with pipeline.retrieve(names) as lease:
            assert set(fill(lease)) == sources
        stream.synchronize()
        assert torch.equal(pages, truth)
        with torch.cuda.stream(stream):
            pages.zero_()
        assert pipeline.flush(30)


@pytest.mark.parametrize("order", ["nhd", "hnd"])
def test_the_direct_api_with_tensors_on_the_device(order: Any) -> None:
    torch: Any = pytest.importorskip("torch")
    model = {"model": "m", "weights": "1", "layers": 4, "kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16}
    with CacheEngine({"chunk_tokens": 64, "tiers": tiers(8)}, order=order, **model) as engine:
        tokens = torch.arange(200, device="cuda")
        shape = (4, 2, 200, 2, 64) if order == "nhd" else (4, 2, 2, 200, 64)
        kv = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        assert engine.put("doc", tokens, kv)
        into = torch.zeros_like(kv)
        found = engine.get("doc", into)
        assert found is not None and torch.equal(into.view(torch.int16), kv.view(torch.int16))
        assert engine.retrieve(tokens, into).sources == ("hbm",) * 3
        settle(engine.pipeline)


def test_transformers_on_the_device() -> None:
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    from lmcache_core.adapters.transformers import attach

    torch.manual_seed(0)
    size = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=257, num_key_value_heads=2, head_dim=64, **size)
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 257, (1, 64 * 6 + 5), device="cuda")
    plain = model.generate(ids, do_sample=False, max_new_tokens=4)
    with attach(model, {"chunk_tokens": 64, "tiers": tiers(4)}) as handle:
        for hbm, dram in ((0, 0), (4, 2), (0, 6), (4, 2)):
            assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=4), plain)
            assert handle.pipeline.flush(10) and handle.counts["errors"] == 0
            assert handle.last.sources[: hbm + dram] == ("hbm",) * hbm + ("dram",) * dram
            if hbm:
                handle.pipeline.clear("hbm")
        settle(handle.pipeline)
