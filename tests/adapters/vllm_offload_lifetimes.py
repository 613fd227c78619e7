"""Lifetimes of a real vLLM engine with our two plugs of its own offloading; `vllm_lifetimes.py` runs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

MODULE = "lmcache_core.adapters.vllm_offload"
CHUNK = 256


def transfer(face: str, disk: Path) -> dict[str, Any]:
    """vLLM's own offloading with our tiers: a DRAM tier over a disk tier at `disk`."""
    tiers = [
        {"name": "dram", "capacity": "256MiB", "backend": {"type": "cpu"}},
        {"name": "disk", "capacity": "2GiB", "write": "through", "backend": {"type": "gds", "path": str(disk)}},
    ]
    config = {"chunk_tokens": CHUNK, "tiers": tiers}
    extra: dict[str, Any] = {
        "spec_name": "LMCacheCoreOffloadingSpec",
        "spec_module_path": MODULE,
        "config": config,
    }
    if face == "tier":
        extra = {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "vllm_cpu_tiering",
            "cpu_bytes_to_use": 256 << 20,
            "block_size": CHUNK,
            "secondary_tiers": [{"type": "LMCacheCoreTier", "module_path": MODULE, "config": config}],
        }
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def books(face: str, e: Any) -> dict[str, Any]:
    """Let jobs end, flush, check that nothing is held, and return the pipeline's counters."""
    manager = e.connector.connector_scheduler.manager
    for _ in range(3):
        e.core.step_fn()
    if face == "tier":
        (tier,) = manager.secondary_tiers
        for future in list(tier._running):
            future.result(30)
        pipeline = tier._store.pipeline
    else:
        pipeline = manager.pipeline
    assert pipeline.flush(30)
    pipeline.check(idle=True)
    stats = pipeline.stats()
    return {"stored": stats["stored"], "hits": stats["hits"], "misses": stats["misses"]}


def run(
    face: str, model: Path, work: Path, engine: Callable[..., Any], damage: Callable[[Path, int], int], *, long: bool
) -> dict[str, Any]:
    """Answers computed alone (each under a salt of its own), cold, and after a restart; with `long` also without
    any of us, from the engine's own prefix cache, over damaged media, and after a reset."""
    random = Random(3)
    document = random.choices(range(3, 512), k=1100)
    # A chunk boundary, inside a chunk, and a shared prefix with another end.
    prompts = [document[:768], document, document[:600] + random.choices(range(3, 512), k=90)]
    found: dict[str, Any] = {}
    disk = work / face
    if long:
        with engine(model, work, cache=False) as e:
            found["baseline"] = e.ask(prompts)
        with engine(model, work, cache=False, enable_prefix_caching=True) as e:
            e.ask(prompts)
            found["control"] = e.ask(prompts)
    for name in ("cold", "restart", "damaged")[: 3 if long else 2]:
        if name == "damaged":
            found["damaged_objects"] = damage(disk, 2)
        with engine(model, disk, kv_transfer_config=transfer(face, disk)) as e:
            found[name] = e.ask(prompts)
            if name == "cold":
                found["alone"] = [
                    answer for i, prompt in enumerate(prompts) for answer in e.ask([prompt], salt=f"s{i}")
                ]
            found[name + "_books"] = books(face, e)
            if name == "damaged":
                assert e.connector.reset_cache()
                found["reset"] = e.ask(prompts[:1])
    return found
