"""The vLLM adapter with pages on a real GPU. `make gpu` runs these; the second needs vLLM's CUDA build too."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_backends.cpu import CpuMemory
from lmcache_core import _cuda
from lmcache_core.adapters._vllm_gpu import GpuWorker
from lmcache_core.adapters._vllm_parts import Part
from lmcache_core.adapters._vllm_wire import Attach, Copies, StepPlan
from lmcache_core.adapters._vllm_worker import Group
from lmcache_core.copies import PageGeometry
from lmcache_core.gpu import GpuPagedKV, How
from lmcache_core.layout import KVLayout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _cuda.available(), reason=_cuda.why_not())]

LAYERS, BLOCKS, STEPS = 8, 512, 20
BLOCK = KVLayout("pages", "bfloat16", LAYERS, 2, 8, 128, 16, 16, packing="test")
CHUNK = replace(BLOCK, chunk_tokens=64)


def bind(pages: Any, layout: KVLayout, start: int, stop: int) -> GpuPagedKV:
    bases = [pages[layer].data_ptr() for layer in range(start, stop)]
    return GpuPagedKV(bases, PageGeometry.opaque(layout), BLOCKS, how=How(0), owner=pages)


def test_the_end_of_a_worker_without_work() -> None:
    torch = pytest.importorskip("torch")
    compute = partial(int, torch.cuda.current_stream(0).cuda_stream)
    GpuWorker((0, 0), [], device=0, compute=compute).close()


@pytest.mark.parametrize("by_layer", [False, True])
def test_copies_keep_their_order_with_what_is_computed(by_layer: bool) -> None:
    """The engine's stream is kept busy, so that copies that do not wait for it come too early, in every step."""
    torch = pytest.importorskip("torch")
    pages = torch.zeros((LAYERS, BLOCKS, BLOCK.block_bytes), dtype=torch.uint8, device="cuda")
    busy = torch.rand((4096, 4096), device="cuda")
    names = tuple(str(layer) for layer in range(LAYERS))
    worker = GpuWorker(
        (0, 0),
        [Group(BLOCK, names, partial(bind, pages))],
        device=0,
        compute=lambda: int(torch.cuda.current_stream(0).cuda_stream),
        by_layer=by_layer,
    )
    memory = CpuMemory(pin=False, shared=True)
    slot = CHUNK.chunk_bytes
    region = memory.allocate(2 * 8 * slot)
    arena = np.frombuffer(region.view, np.uint8).reshape(16, slot)
    assert region.share is not None
    attach = Attach(region.share, {(0, 0): [Part(CHUNK, 0, saves=True)]})
    told: list[int] = []

    def poll() -> None:
        worker.received()
        while (report := worker.report()) is not None:
            assert report.copied and not report.error
            told.append(report.step)

    rng = np.random.default_rng(0)
    for step in range(1, STEPS + 1):
        saved = rng.permutation(BLOCKS)[:64].reshape(2, 8, 4)
        arena[8:] = rng.integers(0, 256, (8, slot), dtype=np.uint8)
        expected = torch.from_numpy(arena[8:].copy()).cuda()
        plan = StepPlan(step, attach if step == 1 else None)
        plan.saves = Copies(saved[:1], np.arange(8) * slot)
        if step > 1:
            plan.loads, plan.needed = Copies(saved[1:], np.arange(8, 16) * slot), True
        torch.cuda.synchronize()
        worker.begin(plan)
        worker.load(plan)
        for layer, name in enumerate(names):
            worker.wait_layer(name)
            if step > 1:
                found = pages[layer, torch.from_numpy(saved[1].reshape(-1)).cuda()].reshape(8, -1)
                size = slot // LAYERS
                assert bool((found == expected[:, layer * size : (layer + 1) * size]).all())
            busy = busy @ busy / 4096
            pages[layer, torch.from_numpy(saved[0].reshape(-1)).cuda()] = step
            worker.save_layer(plan, name)
        worker.save(plan)
        # The next step writes the blocks that this one saves.
        after = StepPlan(step + STEPS, after=step)
        worker.begin(after)
        worker.load(after)
        pages[:, torch.from_numpy(saved[0].reshape(-1)).cuda()] = 255
        worker.save(after)
        torch.cuda.synchronize()
        poll()
        assert (arena[:8] == step).all()
    assert sorted(told) == list(range(1, 2 * STEPS + 1))
    worker.close()
    memory.close()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("model", ["llama", "window", "mla"])
def test_answers_of_vllm_do_not_depend_on_the_cache(tmp_path: Path, model: str) -> None:
    """Cold, warm and after a restart, layer by layer and not.

    Where the same is computed, the tokens are the same; behind a loaded prefix less is computed, in other pieces, which
    in bfloat16 may tip a near-tie later on.
    """
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), str(root / "tests" / "adapters"), os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("vllm_on_gpu.py")), str(tmp_path), model],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert child.returncode == 0, f"{child.stdout[-3000:]}\n{child.stderr[-6000:]}"
    found = json.loads(child.stdout.strip().splitlines()[-1])
    assert found["cold"] == {"tokens": found["control"]["tokens"], "loaded": 0}
    for name in ("warm", "restart", "layerwise"):
        assert found[name]["loaded"] >= 1024, name
        assert found[name]["tokens"] == found["warm"]["tokens"], name
        assert [own[0] for own in found[name]["tokens"]] == [own[0] for own in found["control"]["tokens"]], name
