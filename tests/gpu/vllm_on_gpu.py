"""Lifetimes of a real vLLM engine on a GPU, in one process; prints what each answered as one line of JSON.

usage: vllm_on_gpu.py WORK_DIRECTORY (llama | window | mla)
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from random import Random
from typing import Any

from vllm_lifetimes import hybrid_model, mla_model, tiny_model

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
CHUNK = 256


def lifetime(work: Path, model: Path, prompts: list[list[int]], rounds: int, **settings: Any) -> list[dict[str, Any]]:
    """Answers to the prompts in each round, and how many tokens of the first were loaded."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    tiers = [
        {"name": "dram", "capacity": "1GiB", "backend": {"type": "cpu"}},
        {"name": "disk", "capacity": "4GiB", "backend": {"type": "gds", "path": str(work / "disk")}},
    ]
    transfer = {
        "kv_connector": "LMCacheCoreConnector",
        "kv_connector_module_path": "lmcache_core.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"config": {"chunk_tokens": CHUNK, "tiers": tiers}, **settings},
    }
    llm = LLM(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=4096,
        gpu_memory_utilization=0.4,
        enable_prefix_caching=False,
        enforce_eager=not rounds,
        kv_transfer_config=transfer if rounds else None,
    )
    sampling = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True, detokenize=False)
    found = []
    for _ in range(max(1, rounds)):
        # One by one, so that each is computed alone, in the same pieces whatever was loaded when.
        answers = [llm.generate([{"prompt_token_ids": own}], sampling, use_tqdm=False)[0] for own in prompts]
        tokens = [list(answer.outputs[0].token_ids) for answer in answers]
        found.append({"tokens": tokens, "loaded": answers[0].num_cached_tokens or 0})
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


def main() -> None:
    work, kind = Path(sys.argv[1]), sys.argv[2]
    model = {"llama": tiny_model, "window": hybrid_model, "mla": mla_model}[kind](work / "model")
    rng = Random(0)
    prompts = [rng.choices(range(3, 500), k=length) for length in (1500, 700, 2100)]
    (control,) = lifetime(work, model, prompts, 0)
    cold, warm = lifetime(work, model, prompts, 2)
    (restart,) = lifetime(work, model, prompts, 1)
    (layerwise,) = lifetime(work, model, prompts, 1, layerwise=True)
    lifetimes = {"control": control, "cold": cold, "warm": warm, "restart": restart, "layerwise": layerwise}
    print(json.dumps(lifetimes))


if __name__ == "__main__":
    main()
