"""Lifetimes of a real vLLM engine with our two plugs of its own offloading; prints what each did as one line of JSON.

usage: vllm_offload_lifetimes.py WORK_DIRECTORY (tier | spec) (tiny | MODEL_DIRECTORY)

Run in a process of its own, as `vllm_lifetimes.py`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from vllm_lifetimes import CHUNK, ENVIRONMENT, damage, engine, tiny_model

MODULE = "lmcache_core.adapters.vllm_offload"


def transfer(face: str, disk: Path) -> dict[str, Any]:
    """vLLM's own offloading with our tiers: a DRAM tier over a disk tier at `disk`."""
    tiers = [
        {"name": "dram", "capacity": "512MiB", "backend": {"type": "cpu"}},
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


def run(face: str, model: Path, work: Path) -> dict[str, Any]:
    """Answers without a cache, with the engine's own, with ours cold, warm, after a restart, and over damaged media."""
    random = Random(3)
    document = random.choices(range(3, 512), k=1100)
    # A chunk boundary, inside a chunk, and a shared prefix with another end.
    prompts = [document[:768], document, document[:600] + random.choices(range(3, 512), k=90)]
    found: dict[str, Any] = {}
    with engine(model, work, cache=False) as e:
        found["baseline"] = e.ask(prompts)
    disk = work / "kv"
    for name in ("cold", "restart", "damaged"):
        if name == "damaged":
            found["damaged_objects"] = damage(disk, 2)
        with engine(model, disk, kv_transfer_config=transfer(face, disk)) as e:
            found[name] = e.ask(prompts)
            if name == "cold":
                found["warm"] = e.ask(prompts)
                found["salted"] = e.ask(prompts[:1], salt="tenant")
            found[name + "_books"] = books(face, e)
            if name == "restart":
                assert e.connector.reset_cache()
                found["reset"] = e.ask(prompts[:1])
    return found


def main(arguments: Sequence[str]) -> None:
    work = Path(arguments[0])
    work.mkdir(parents=True, exist_ok=True)
    model = tiny_model(work / "model") if arguments[2] == "tiny" else Path(arguments[2])
    print("\n" + json.dumps(run(arguments[1], model, work)))


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main(sys.argv[1:])
