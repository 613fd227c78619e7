"""Reuse KV across calls, processes and restarts with vLLM's offline engine.

    python examples/vllm_offline.py MODEL [CONFIG]

Run it twice: the second process loads from disk what the first one computed.
"""

from __future__ import annotations

import sys
import time

from vllm import LLM, SamplingParams


def main() -> None:
    model, config = sys.argv[1], (sys.argv[2:] or ["examples/lmcache.yaml"])[0]
    llm = LLM(
        model=model,
        enforce_eager=True,
        kv_transfer_config={
            "kv_connector": "LMCacheCoreConnector",
            "kv_connector_module_path": "lmcache_core.adapters.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"config": config},
        },
    )
    document = "It was a bright cold day in April, and the clocks were striking thirteen. " * 100
    for question in ("What was the weather like?", "What did the clocks do?"):
        begun = time.perf_counter()
        llm.generate(document + question, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        print(f"first token after {time.perf_counter() - begun:.3f} s: {question}")


if __name__ == "__main__":
    main()
