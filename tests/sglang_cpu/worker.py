"""One process with a real SGLang engine on the CPU: takes orders as lines of JSON, answers each with one.

usage: worker.py MODEL (file | storage | linker) STORE LAYOUT INTERFACE_V1
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

PAGE = 64


def options(kind: str, store: str, layout: str, v1: bool) -> dict[str, Any]:
    """What `kind` adds to the engine's arguments."""
    disk = {"type": "gds", "path": store, "mode": "files", "free_floor": 0}
    tiers = [
        {"name": "dram", "capacity": "256MiB", "backend": {"type": "cpu"}},
        {"name": "disk", "capacity": "1GiB", "lane": {"deadline": "60s"}, "backend": disk},
    ]
    if kind == "linker":
        linker = {
            "linker": "LMCacheCoreLinker",
            "linker_module_path": "lmcache_core.adapters.sglang_linker",
            "linker_extra_config": {"config": {"tiers": tiers}},
        }
        return {
            "enable_unified_cache_external_linker": True,
            "unified_cache_external_linker_backend": "dynamic",
            "unified_cache_external_linker_config": linker,
        }
    extra = {
        "backend_name": "lmcache-core",
        "module_path": "lmcache_core.adapters.sglang",
        "class_name": "LMCacheCoreStorage",
        "interface_v1": int(v1),
        "config": {"tiers": tiers},
    }
    return {
        "enable_hierarchical_cache": True,
        "hicache_ratio": 1.2,
        "hicache_io_backend": "direct",
        "hicache_mem_layout": layout,
        "hicache_write_policy": "write_through",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend": "file" if kind == "file" else "dynamic",
        **({} if kind == "file" else {"hicache_storage_backend_extra_config": json.dumps(extra)}),
    }


def main() -> None:
    """Serve until standard input ends."""
    model, kind, store, layout, v1 = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints is no answer
    import sglang

    engine = sglang.Engine(
        model_path=model, served_model_name="model", device="cpu", attention_backend="torch_native",
        sampling_backend="pytorch", disable_cuda_graph=True, disable_overlap_schedule=True, dtype="float32",
        page_size=PAGE, max_total_tokens=4096, mem_fraction_static=0.5, chunked_prefill_size=-1,
        skip_server_warmup=True, **options(kind, store, layout, v1 == "1"),
    )  # fmt: skip
    print(json.dumps("up"), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order == "flush":
            engine.flush_cache()
            answer: Any = "flushed"
        else:
            parameters = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
            out = engine.generate(input_ids=order, sampling_params=parameters, return_logprob=True)
            meta = out["meta_info"]
            answer = {
                "tokens": out["output_ids"],
                "logprobs": [entry[0] for entry in meta["output_token_logprobs"]],
                "cached": meta["cached_tokens"],
                "details": meta.get("cached_tokens_details"),
            }
        print(json.dumps(answer), file=answers, flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
