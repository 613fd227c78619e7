"""Several lifetimes of a real vLLM engine in one process; prints what each did as one line of JSON.

usage: vllm_lifetimes.py WORK_DIRECTORY (tiny | two | mixed | offload:MODEL_DIRECTORY | MODEL_DIRECTORY)

Run in a process of its own: vLLM keeps global state and its environment must be set before it is imported.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

ENVIRONMENT = {
    # The engine in this process: quick to start, and its connector can be looked at.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The same threads in every lifetime, or numerics differ; passive, or they spin while others wait.
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{min(2, os.cpu_count() or 1) - 1}",
    "OMP_NUM_THREADS": str(min(2, os.cpu_count() or 1)),
    "OMP_WAIT_POLICY": "passive",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
CHUNK = 256


def tiny_model(path: Path, **changes: Any) -> Path:
    """A random four-layer Llama whose answers depend on every token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=512,
        max_position_embeddings=4096,
        initializer_range=0.15,
        **changes,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def hybrid_model(path: Path) -> Path:
    """A random Gemma 3: every other layer keeps a window of 256 tokens only, in a KV group of its own."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(7)
    config = Gemma3TextConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=512,
        max_position_embeddings=4096,
        sliding_window=256,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=32,
        tie_word_embeddings=False,
        initializer_range=0.15,
    )
    Gemma3ForCausalLM(config).save_pretrained(path)
    return path


def mla_model(path: Path) -> Path:
    """A random DeepSeek-V2-Lite in shape: its KV is one latent of 512 + 64 a token."""
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(7)
    config = DeepseekV2Config(
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=2,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        vocab_size=512,
        max_position_embeddings=4096,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        initializer_range=0.15,
    )
    DeepseekV2ForCausalLM(config).save_pretrained(path)
    return path


class Engine:
    """One lifetime."""

    def __init__(self, llm: Any) -> None:
        from vllm import SamplingParams

        self.llm = llm
        self.core = llm.llm_engine.engine_core.engine_core
        self.connector = self.core.scheduler.connector
        self._params = SamplingParams

    @property
    def loaded(self) -> int:
        """Tokens promised by the connector so far."""
        scheduler = getattr(self.connector, "_scheduler", None)
        return scheduler.counts["loaded_tokens"] if scheduler else 0

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        count: int = 6,
        salt: str | None = None,
        tell: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Answers one by one, so that each is computed alone: token ids, their log probabilities, tokens loaded.

        `tell` is what the requests say to the cache (`kv_transfer_params`)."""
        answers = []
        for prompt in prompts:
            before = self.loaded
            started = time.perf_counter()
            (answer,) = self.batch([prompt], count, salt, tell)
            answers.append({**answer, "loaded": self.loaded - before, "seconds": time.perf_counter() - started})
        return answers

    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        salt: str | None = None,
        tell: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Answers of requests that run together."""
        extra = {"kv_transfer_params": tell} if tell else None
        inputs = [{"prompt_token_ids": list(p)} | ({"cache_salt": salt} if salt else {}) for p in prompts]
        params = self._params(
            temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=0, extra_args=extra
        )
        requests = self.llm.generate(inputs, params, use_tqdm=False)
        return [
            {
                "tokens": list(output.token_ids),
                "logprobs": [
                    step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)
                ],
                "told": request.kv_transfer_params,
                "cached": request.num_cached_tokens,
            }
            for request in requests
            for output in request.outputs
        ]

    def connector_of_worker(self) -> Any:
        """The worker's half."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()

    def books(self) -> dict[str, Any]:
        """Flush, check that nothing is held, and return the counters."""
        scheduler = self.connector._scheduler
        assert not scheduler.disabled
        pipeline = scheduler.pipeline
        assert pipeline.flush(30)
        pipeline.check(idle=True)
        stats = pipeline.stats()
        return {
            "counts": dict(scheduler.counts),
            "stored": stats["stored"],
            "hits": stats["hits"],
            "misses": stats["misses"],
        }


@contextmanager
def engine(model: Path, work: Path, *, cache: bool = True, load: str = "auto", **options: Any) -> Iterator[Engine]:
    """Start vLLM on `model`; with `cache`, a DRAM tier over a disk tier below `work`, behind the connector unless
    `options` have another `kv_transfer_config`."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    if cache and "kv_transfer_config" not in options:
        tiers = [
            {"name": "dram", "capacity": options.pop("dram", "512MiB"), "backend": {"type": "cpu"}},
            {"name": "disk", "capacity": "2GiB", "write": "through", "backend": {"type": "gds", "path": str(work)}},
        ]
        options["kv_transfer_config"] = {
            "kv_connector": "LMCacheCoreConnector",
            "kv_connector_module_path": "lmcache_core.adapters.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": options.pop("policy", "recompute"),
            "kv_connector_extra_config": {
                "config": {"chunk_tokens": CHUNK, "tiers": tiers},
                "load": load,
                "layerwise": options.pop("layerwise", False),
            },
        }
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": 2048,
        "skip_tokenizer_init": True,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 512 << 20,
    }
    llm = LLM(model=str(model), **{**settings, **options})
    running = Engine(llm)
    try:
        yield running
    finally:
        llm.llm_engine.engine_core.shutdown()
        del running, llm
        cleanup_dist_env_and_memory()
        gc.collect()


def damage(work: Path, share: int) -> int:
    """Flip one byte in every `share`-th megabyte of the disk tier's large files; how many were changed."""
    changed = 0
    for file in work.rglob("*"):
        if file.is_file() and file.stat().st_size > 1 << 20:
            with file.open("r+b") as stream:
                for at in range(1 << 19, file.stat().st_size, share << 20):
                    stream.seek(at)
                    byte = stream.read(1)
                    if byte and byte != b"\0":
                        stream.seek(at)
                        stream.write(bytes([byte[0] ^ 0x10]))
                        changed += 1
    return changed


def tiny(work: Path) -> dict[str, Any]:
    """Every way a request can meet the cache, on a model that costs milliseconds."""
    model = tiny_model(work / "model")
    disk = work / "kv"
    random = Random(3)
    document = random.choices(range(3, 512), k=1400)
    # A chunk boundary, one beyond it, inside a chunk, shorter than a chunk, and a shared prefix with another end.
    prompts = [
        document[:1024],
        document[:1030],
        document,
        document[:200],
        document[:1100] + random.choices(range(3, 512), k=90),
    ]
    found: dict[str, Any] = {}
    with engine(model, disk, cache=False) as e:
        found["baseline"] = e.ask(prompts)
    with engine(model, disk, cache=False, enable_prefix_caching=True) as e:
        e.ask(prompts[1:2])
        found["control"] = e.ask(prompts[1:2])
    with engine(model, disk) as e:
        found["cold"] = e.ask(prompts[:1]) + e.ask(prompts[1:])
        found["warm"] = e.ask(prompts)
        found["salted"] = e.ask(prompts[1:3], salt="tenant")
        found["salted_again"] = e.ask(prompts[1:3], salt="tenant")
        long = e.ask([document[:300]], count=300)[0]["tokens"]
        found["continued"] = e.ask([document[:300] + long], count=2)
        found["first_books"] = e.books()
    restarts: dict[str, dict[str, Any]] = {
        "restart": {},
        "restart_polled": {"policy": "fail", "enable_prefix_caching": True},
        "damaged_async": {"load": "async"},
        "damaged_polled": {"load": "sync", "policy": "fail"},
    }
    for name, options in restarts.items():
        if name.startswith("damaged"):
            found[name + "_objects"] = damage(disk, 2)
        with engine(model, disk, **options) as e:
            found[name] = e.ask(prompts)
            found[name + "_books"] = e.books()
    found |= _crowded(model, work / "crowd")
    found["told"] = _told(model, work / "told")
    found["hybrid"] = _kind(hybrid_model(work / "hybrid"), work / "hybrid_kv")
    found["mla"] = _kind(mla_model(work / "mla"), work / "mla_kv", dtype="bfloat16")
    found |= _bypassed(work)
    found["offload"] = _offload(model, work, long=False)
    return found


def _offload(model: Path, work: Path, *, long: bool) -> dict[str, Any]:
    """Our two plugs of vLLM's own offloading, or what they say of a vLLM that is too old for them."""
    import vllm_offload_lifetimes

    from lmcache_core.errors import Unsupported

    try:
        from lmcache_core.adapters.vllm_offload import compat

        compat.check_api()
    except Unsupported as error:
        return {"refused": str(error)}
    return {face: vllm_offload_lifetimes.run(face, model, work, engine, damage, long=long) for face in ("tier", "spec")}


ALONE = {"lmcache.skip_read": True, "lmcache.skip_write": True}
"""What a request says that is to be computed as without a cache."""


def _kind(model: Path, disk: Path, **options: Any) -> dict[str, Any]:
    """A model or an engine of another kind: answers with what it has itself in its prefix cache, and without that,
    with what it loads from memory and from disk."""
    random = Random(3)
    document = random.choices(range(3, 512), k=1400)
    # Ends in a chunk's last block, so that the engine and we have equally many blocks of each.
    prompts = [document[:1024], document, document[:700] + random.choices(range(3, 512), k=340)]
    with engine(model, disk, enable_prefix_caching=True, **options) as e:

        def fresh(tell: dict[str, Any] | None = None, times: int = 1) -> list[dict[str, Any]]:
            answers = []
            for prompt in prompts:
                e.llm.reset_prefix_cache()
                answers.append(e.ask([prompt] * times, tell=tell)[-1])
            return answers

        found: dict[str, Any] = {"alone": fresh(ALONE), "control": fresh(ALONE, 2)}
        found |= {"cold": fresh(), "warm": fresh()}
        e.books()
        e.connector._scheduler.pipeline.clear("dram")
        found["disk"] = fresh()
        found["books"] = e.books()
    return found


def _told(model: Path, disk: Path) -> dict[str, Any]:
    """What requests, metrics and KV events say; and copies layer by layer."""
    random = Random(9)
    prompt = random.choices(range(3, 512), k=600)
    events = {"enable_kv_cache_events": True, "publisher": "null"}
    options = {"enable_prefix_caching": True, "disable_log_stats": False}
    with engine(model, disk, layerwise=True, kv_events_config=events, **options) as e:
        published: list[Any] = []
        e.core.scheduler.kv_event_publisher.publish = lambda batch: published.extend(batch.events)
        waits = _count(e.connector_of_worker()._worker, "wait_layer")
        found: dict[str, Any] = {"alone": e.ask([prompt], tell=ALONE)}
        e.llm.reset_prefix_cache()
        found["cold"] = e.ask([prompt], tell={"lmcache.report": True, "lmcache.ttl_s": 5, "other": 1})
        e.llm.reset_prefix_cache()
        found["warm"] = e.ask([prompt], tell={"lmcache.pin_s": 60})
        e.llm.reset_prefix_cache()
        found["silent"] = e.ask([prompt])
        e.ask([prompt[:20]])
        found["pinned"] = e.connector._scheduler.pipeline.stats()["tiers"]["dram"]["pinned"]
        found["waits"] = waits[0]
        told = {medium: [x for x in published if getattr(x, "medium", "") == medium] for medium in ("CPU", "GPU")}
        found["events"] = [type(event).__name__ for event in told["CPU"]]
        names = [{name for event in events for name in event.block_hashes} for events in told.values()]
        found["hashes_known"] = bool(names[0]) and names[0] <= names[1]
        found["metrics"] = {
            metric.name
            + ("." + label if (label := metric.labels.get("tier") or metric.labels.get("reason")) else ""): metric.value
            for metric in e.llm.get_metrics()
            if "lmcache" in metric.name
        }
        e.connector.reset_cache()
        e.books()
    return found


def _crowded(model: Path, disk: Path) -> dict[str, Any]:
    """Eight requests in room for three, so that vLLM preempts; and some that are aborted at different steps."""
    random = Random(5)
    crowd = [random.choices(range(3, 512), k=random.randrange(488, 512)) for _ in range(8)]
    room = {"kv_cache_memory_bytes": 14 * 262144, "max_model_len": 900}
    found: dict[str, Any] = {}
    with engine(model, disk, cache=False, **room) as e:
        found["crowd_baseline"] = e.ask(crowd, 30)
    with engine(model, disk, dram="12MiB", load="async", **room) as e:
        preempted = _count(e.core.scheduler, "_preempt_request")
        found["crowd"] = e.batch(crowd, 30)
        found["crowd_again"] = e.batch(crowd, 30)
        found["preemptions"] = preempted[0]
        _abort_some(e, crowd)
        found["after_aborts"] = e.ask(crowd[:3], 30)
        found["crowd_books"] = e.books()
        e.connector.reset_cache()
        found["after_reset"] = e.ask(crowd[:1], 30)
        found["after_reset_again"] = e.ask(crowd[:1], 30)
        e.books()
    return found


def _count(thing: Any, method: str) -> list[int]:
    """Count the calls of a method."""
    calls, original = [0], getattr(thing, method)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return original(*args, **kwargs)

    setattr(thing, method, counting)
    return calls


def _abort_some(e: Engine, prompts: Sequence[Sequence[int]]) -> None:
    """Abort each request a different number of steps after its arrival."""
    llm_engine = e.llm.llm_engine
    for steps, prompt in enumerate(prompts):
        name = f"abort-{steps}"
        params = e._params(temperature=0, max_tokens=50, ignore_eos=True, detokenize=False)
        llm_engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        for _ in range(steps):
            llm_engine.step()
        llm_engine.abort_request([name])
        llm_engine.step()
    while llm_engine.has_unfinished_requests():
        llm_engine.step()
    for _ in range(50):
        e.core.step_fn()


def _bypassed(work: Path) -> dict[str, Any]:
    """A model whose KV is not kept for the whole prefix runs as if there were no connector."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=512,
        sliding_window=128,
    )
    MistralForCausalLM(config).save_pretrained(work / "window")
    prompt = Random(1).choices(range(3, 512), k=600)
    with engine(work / "window", work / "none") as e:
        return {"window": e.ask([prompt, prompt]), "window_cached": e.connector._scheduler is not None}


def real(model: Path, work: Path) -> dict[str, Any]:
    """Cold, warm and after a restart on a real model, against a run whose own prefix cache holds the same tokens."""
    from transformers import AutoTokenizer

    from lmcache_core.cli.demo_common import document_text

    tokenizer = AutoTokenizer.from_pretrained(model)
    document = tokenizer(document_text(None), verbose=False)["input_ids"]
    tails = [tokenizer(q)["input_ids"] for q in ("\nIn short, this text", "\nThe President shall", "\nHere is")]
    prompts = [document[: 8 * CHUNK] + tail for tail in tails]
    assert len(document) >= 8 * CHUNK
    found: dict[str, Any] = {"prefix": 8 * CHUNK}
    options = {"max_model_len": 4096, "max_num_batched_tokens": 2048}
    with engine(model, work, cache=False, **options) as e:
        found["baseline"] = e.ask(prompts, 16)
    with engine(model, work, cache=False, enable_prefix_caching=True, **options) as e:
        e.ask(prompts[:1], 1)
        found["control"] = e.ask(prompts, 16)
    with engine(model, work, **options) as e:
        found["cold"] = e.ask(prompts[:1], 16)
        found["warm"] = e.ask(prompts, 16)
        found["books"] = e.books()
    for name, more in {"restart": {}, "restart_async": {"load": "async"}}.items():
        with engine(model, work, **options, **more) as e:
            found[name] = e.ask(prompts, 16)
            found[name + "_books"] = e.books()
    return found


def two(work: Path) -> dict[str, Any]:
    """Two workers, each with half of the heads (tensor parallel)."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    return _kind(tiny_model(work / "model"), work / "kv", **options)


def mixed(work: Path) -> dict[str, Any]:
    """500 requests in little room: shared beginnings, aborts, preemptions, and a disk whose reads fail or lie."""
    from vllm import SamplingParams

    random = Random(11)
    roots = [random.choices(range(3, 512), k=800) for _ in range(8)]
    prompts = [
        random.choice(roots)[: random.randrange(10, 780)] + random.choices(range(3, 512), k=random.randrange(1, 40))
        for _ in range(500)
    ]
    model = tiny_model(work / "model")
    room = {"kv_cache_memory_bytes": 24 * 262144, "max_model_len": 900, "load": "async", "dram": "6MiB"}
    with engine(model, work / "kv", **room) as e:
        blocks = e.core.scheduler.kv_cache_manager.block_pool
        found: dict[str, Any] = {"requests": len(prompts), "free_blocks_before": blocks.get_num_free_blocks()}
        expected = [answer["tokens"] for answer in e.ask(prompts, 8, tell=ALONE)]
        preempted = _count(e.core.scheduler, "_preempt_request")
        failures = _fail_reads(e.connector._scheduler.pipeline.tiers[0], random)
        llm_engine = e.llm.llm_engine
        waiting = list(range(len(prompts)))
        live: set[str] = set()
        answers: dict[str, list[int]] = {}
        aborted = 0
        while waiting or llm_engine.has_unfinished_requests():
            while waiting and len(live) < 8:
                at = waiting.pop()
                params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
                llm_engine.add_request(str(at), {"prompt_token_ids": prompts[at]}, params)
                live.add(str(at))
            for output in llm_engine.step():
                if output.finished:
                    live.discard(output.request_id)
                    answers[output.request_id] = list(output.outputs[0].token_ids)
            if live and random.random() < 0.05:
                victim = random.choice(sorted(live))
                llm_engine.abort_request([victim])
                live.discard(victim)
                aborted += 1
        for _ in range(50):
            e.core.step_fn()
        books = e.books()
        found["differing"] = [at for at, tokens in answers.items() if tokens != expected[int(at)]]
        found |= {"aborted": aborted, "preemptions": preempted[0], "failed_reads": failures[0]}
        found |= {"misses": books["misses"], "loaded_tokens": books["counts"]["loaded_tokens"]}
        found |= {"failed_blocks": books["counts"].get("failed_blocks", 0), "answered": len(answers)}
        found["free_blocks"] = blocks.get_num_free_blocks()
    return found


def _fail_reads(tier: Any, random: Random) -> list[int]:
    """Let some reads of a tier fail and some give a wrong byte; the number of them."""
    failures, read = [0], tier.backend.get_into

    def get_into(keys: Any, buffers: Any) -> Any:
        got = list(read(keys, buffers))
        for i, buffer in enumerate(buffers):
            if isinstance(got[i], int) and random.random() < 0.3:
                failures[0] += 1
                if random.random() < 0.5:
                    got[i] = OSError("injected")
                else:
                    buffer[got[i] // 2] ^= 1
        return got

    tier.backend.get_into = get_into
    return failures


def main(arguments: Sequence[str]) -> None:
    work = Path(arguments[0])
    work.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Callable[[Path], dict[str, Any]]] = {"tiny": tiny, "two": two, "mixed": mixed}
    _, _, directory = arguments[1].partition(":")
    if directory:
        runs[arguments[1]] = lambda work: _offload(Path(directory), work, long=True)
    run = runs.get(arguments[1]) or (lambda work: real(Path(arguments[1]), work / "kv"))
    print("\n" + json.dumps(run(work)))


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main(sys.argv[1:])
