"""Stock vLLM on a tiny random model, in float32: its answers with the cache in every state are those without it.

All lifetimes of the engine run in one child process (see `vllm_lifetimes.py`), once for all tests here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

HERE = Path(__file__).parent
CLOSE = 1e-4
"""Largest difference of a log probability in float32 between two ways to compute the same answer."""

Answers = Sequence[Mapping[str, Any]]


def lifetimes(work: Path, model: str) -> dict[str, Any]:
    """Run the child and return what it found."""
    root = str(HERE.parent.parent)
    # `make vllm-versions` names another vLLM, unpacked.
    path = os.pathsep.join(filter(None, [os.environ.get("LMCACHE_TEST_VLLM"), root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(HERE / "vllm_lifetimes.py"), str(work), model]
    child = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=900, check=False
    )
    assert child.returncode == 0, f"{child.stdout[-3000:]}\n{child.stderr[-6000:]}"
    found: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
    return found


def same(answers: Answers, expected: Answers) -> None:
    """The same tokens, and log probabilities as close as float32 allows."""
    assert [a["tokens"] for a in answers] == [e["tokens"] for e in expected]
    for answer, other in zip(answers, expected, strict=True):
        assert answer["logprobs"] == pytest.approx(other["logprobs"], abs=CLOSE)


def loaded(answers: Answers) -> list[int]:
    return [answer["loaded"] for answer in answers]


WHOLE = [896, 1024, 1280, 0, 1024]
"""What each prompt can load: whole chunks of 256, and one token is always computed, in blocks of 128."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return lifetimes(tmp_path_factory.mktemp("vllm"), "tiny")


def test_the_model_tells_prompts_apart(found: dict[str, Any]) -> None:
    """Otherwise equal answers would prove nothing."""
    answers = [tuple(a["tokens"]) for a in found["baseline"]]
    assert len(set(answers)) == len(answers)
    assert all(len(set(answer)) > 2 for answer in answers)


def test_cold_and_warm_answers(found: dict[str, Any]) -> None:
    same(found["cold"], found["baseline"])
    same(found["warm"], found["baseline"])
    # The first prompt fills the cache for the others, which begin alike.
    assert loaded(found["cold"]) == [0, 1024, 1024, 0, 1024]
    assert loaded(found["warm"]) == WHOLE


def test_a_load_is_bit_equal_to_the_engines_own_cache(found: dict[str, Any]) -> None:
    (control,) = found["control"]
    for name in ("warm", "restart"):
        assert found[name][1]["tokens"] == control["tokens"]
        assert found[name][1]["logprobs"] == control["logprobs"]


def test_tenants_do_not_share(found: dict[str, Any]) -> None:
    assert loaded(found["salted"]) == [0, 1024]
    assert loaded(found["salted_again"]) == [1024, 1280]
    same(found["salted"], found["baseline"][1:3])
    same(found["salted_again"], found["baseline"][1:3])


def test_generated_tokens_are_cached(found: dict[str, Any]) -> None:
    assert loaded(found["continued"]) == [512]


def test_restart_finds_everything_on_disk(found: dict[str, Any]) -> None:
    same(found["restart"], found["baseline"])
    assert loaded(found["restart"]) == WHOLE
    assert found["restart_books"]["hits"]["disk"] == 5
    assert found["restart_books"]["stored"] == 0


def test_the_engines_prefix_cache_is_asked_first(found: dict[str, Any]) -> None:
    same(found["restart_polled"], found["baseline"])
    # Later prompts find most of their blocks in the engine; only the rest is loaded, from inside a chunk on.
    assert loaded(found["restart_polled"]) == [896, 0, 256, 0, 0]


def test_damaged_objects_are_computed_again(found: dict[str, Any]) -> None:
    assert found["damaged_async_objects"] > 0
    same(found["damaged_async"], found["baseline"])
    assert found["damaged_async_books"]["misses"]["corrupt"] > 0
    assert found["damaged_async_books"]["stored"] > 0
    assert found["damaged_polled_objects"] > 0
    same(found["damaged_polled"], found["baseline"])
    assert found["damaged_polled_books"]["misses"]["corrupt"] > 0
    # A polled load knows what arrived before it promises anything, so it works where vLLM fails failed loads.
    assert "failed_blocks" not in found["damaged_polled_books"]["counts"]


def test_preempted_and_aborted_requests(found: dict[str, Any]) -> None:
    assert found["preemptions"] > 0
    same(found["crowd"], found["crowd_baseline"])
    same(found["crowd_again"], found["crowd_baseline"])
    same(found["after_aborts"], found["crowd_baseline"][:3])
    assert found["crowd_books"]["counts"]["loaded_tokens"] > 0


def test_reset_forgets(found: dict[str, Any]) -> None:
    assert loaded(found["after_reset"]) == [0]
    assert loaded(found["after_reset_again"]) == [256]
    same(found["after_reset"], found["crowd_baseline"][:1])
    same(found["after_reset_again"], found["crowd_baseline"][:1])


def test_unknown_kinds_of_kv_are_left_alone(found: dict[str, Any]) -> None:
    assert found["window_cached"] is False
    assert loaded(found["window"]) == [0, 0]
    assert found["window"][0]["tokens"] == found["window"][1]["tokens"]


@pytest.mark.parametrize("kind", ["hybrid", "mla"])
def test_kv_of_other_kinds(found: dict[str, Any], kind: str) -> None:
    """Layers with a sliding window beside others (two KV groups), and MLA latents: bit-equal to vLLM's own cache."""
    answers = found[kind]
    assert loaded(answers["alone"]) == loaded(answers["control"]) == [0, 0, 0]
    assert loaded(answers["cold"]) == [0, 1024, 512]
    assert answers["books"]["stored"] == 7
    for name in ("warm", "disk"):
        assert loaded(answers[name]) == [896, 1280, 1024]
        for answer, control in zip(answers[name], answers["control"], strict=True):
            assert (answer["tokens"], answer["logprobs"]) == (control["tokens"], control["logprobs"])
    assert answers["books"]["hits"]["disk"] == 7
    assert len({tuple(answer["tokens"]) for answer in answers["control"]}) == 3


def test_what_a_request_may_say_and_hear(found: dict[str, Any]) -> None:
    told = found["told"]
    same(told["cold"] + told["warm"] + told["silent"], told["alone"] * 3)
    assert loaded(told["warm"]) == loaded(told["silent"]) == [512]
    nothing = {"hit_tokens": 0, "sources": {}, "miss": None, "stored_tokens": 0, "refused": {}}
    answers = {}
    for name in ("alone", "cold", "warm"):
        (answer,) = told[name]
        answers[name] = {key.removeprefix("lmcache."): value for key, value in answer["told"].items()}
    assert answers["alone"] == nothing
    refused = answers["cold"].pop("refused")
    assert list(refused) == ["lmcache.ttl_s"] and "pin_s" in refused["lmcache.ttl_s"]
    assert answers["cold"] == {"hit_tokens": 0, "sources": {}, "miss": "not_stored", "stored_tokens": 512}
    assert answers["warm"] == {**nothing, "hit_tokens": 512, "sources": {"dram": 512}}
    assert told["silent"][0]["told"] is None
    assert told["pinned"] == 2


def test_metrics_and_events(found: dict[str, Any]) -> None:
    told = found["told"]
    assert told["metrics"] == {
        "vllm:lmcache_loaded_tokens": 1024,
        "vllm:lmcache_saved_chunks": 2,
        "vllm:lmcache_hit_chunks.dram": 4,
        "vllm:lmcache_missed_chunks.not_stored": 2,
    }
    assert told["events"] == ["BlockStored"] * 2
    # A router knows them by the hashes the engine uses for its own blocks.
    assert told["hashes_known"]


def test_layers_are_announced_before_they_are_read(found: dict[str, Any]) -> None:
    """What `layerwise` rests on: every layer of every step that computes."""
    assert found["told"]["waits"] > 0
    assert found["told"]["waits"] % 4 == 0


@pytest.mark.parametrize("face", ["tier", "spec"])
def test_within_vllms_own_offloading(found: dict[str, Any], face: str) -> None:
    """A secondary tier of vLLM's, and an offloading spec of our own: everything is on disk after a restart."""
    if "refused" in found["offload"]:
        assert os.environ.get("LMCACHE_TEST_VLLM"), found["offload"]["refused"]
        assert "tested with 0.32" in found["offload"]["refused"]
        return
    answers = found["offload"][face]
    for name in ("cold", "restart"):
        same(answers[name], answers["alone"])
    assert [answer["cached"] for answer in answers["alone"]] == [0, 0, 0]
    assert [answer["cached"] for answer in answers["cold"]] == [0, 768, 512]
    # At most all whole chunks but the last token: vLLM loads 768 of 768 and computes the last of them again.
    assert [answer["cached"] for answer in answers["restart"]] == [768, 1024, 512]
    assert answers["restart_books"]["hits"]["disk"] == 4
    assert answers["restart_books"]["stored"] == 0 and answers["restart_books"]["misses"] == {}
