"""TTFT of a hit whose copies are slowed to a multiple of what computing takes: all at once, and layer by layer.

usage: layerwise.py MODEL [FACTOR]

Prints one line of JSON: per way the time to compute alone, the time the copies take, and the time to the first token,
in seconds (medians of 7 hits of 1024 tokens with 256 tokens to compute).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from random import Random
from typing import Any

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "OMP_WAIT_POLICY": "passive"}
CACHED, COMPUTED, TIMES = 1024, 256, 7


def measure(model: str, factor: float, layerwise: bool) -> dict[str, float]:
    """One engine."""
    from vllm import LLM, SamplingParams

    from lmcache_core.copies import PagedKV

    tiers = [{"name": "dram", "capacity": "1GiB", "backend": {"type": "cpu"}}]
    connector = {
        "kv_connector": "LMCacheCoreConnector",
        "kv_connector_module_path": "lmcache_core.adapters.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"config": {"tiers": tiers}, "layerwise": layerwise},
    }
    options: dict[str, Any] = {"kv_transfer_config": connector, "enable_prefix_caching": False, "enforce_eager": True}
    llm = LLM(model=model, dtype="float32", max_model_len=2048, kv_cache_memory_bytes=512 << 20, **options)
    random = Random(1)
    prefix = random.choices(range(3, 40000), k=CACHED)

    def ask(tell: dict[str, Any] | None = None) -> float:
        prompt = prefix + random.choices(range(3, 40000), k=COMPUTED)
        extra = {"kv_transfer_params": tell} if tell else None
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, extra_args=extra)
        started = time.perf_counter()
        llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        return time.perf_counter() - started

    hit = {"lmcache.skip_write": True}
    ask()
    ask(hit)
    compute = statistics.median(ask(hit) for _ in range(TIMES))
    scatter, layers = PagedKV.scatter, llm.llm_engine.model_config.hf_text_config.num_hidden_layers

    def slowly(self: PagedKV, block_ids: Any, slot_addresses: Any) -> None:
        scatter(self, block_ids, slot_addresses)
        time.sleep(compute * factor * self.geometry.num_layers / layers)

    PagedKV.scatter = slowly  # type: ignore[method-assign]
    try:
        ttft = statistics.median(ask(hit) for _ in range(TIMES))
    finally:
        PagedKV.scatter = scatter  # type: ignore[method-assign]
        llm.llm_engine.engine_core.shutdown()
    bound = max(compute, compute * factor)
    return {"compute_s": compute, "load_s": compute * factor, "ttft_s": ttft, "ttft_over_bound": ttft / bound}


def main() -> None:
    os.environ.update(ENVIRONMENT)
    factor = float(sys.argv[2]) if len(sys.argv) > 2 else 2.0
    ways = {name: measure(sys.argv[1], factor, name == "layerwise") for name in ("at_once", "layerwise")}
    print(json.dumps(ways))


if __name__ == "__main__":
    main()
