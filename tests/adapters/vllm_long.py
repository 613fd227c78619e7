"""Longer runs of the real engine: `make vllm-long` (three minutes of CPU, so not part of `make test`)."""

from __future__ import annotations

from pathlib import Path

from test_vllm_engine import lifetimes, loaded, same
from test_vllm_model import MODEL


def test_two_workers(tmp_path: Path) -> None:
    """Tensor parallel: each worker has half of the heads, a chunk has all of them."""
    answers = lifetimes(tmp_path, "two")
    assert loaded(answers["alone"]) == loaded(answers["control"]) == [0, 0, 0]
    assert loaded(answers["cold"]) == [0, 1024, 512]
    assert answers["books"]["stored"] == answers["books"]["hits"]["disk"] == 7
    assert "failed_blocks" not in answers["books"]["counts"]
    for name in ("warm", "disk"):
        assert loaded(answers[name]) == [896, 1280, 1024]
        for answer, control in zip(answers[name], answers["control"], strict=True):
            assert (answer["tokens"], answer["logprobs"]) == (control["tokens"], control["logprobs"])


def test_mixed_workload(tmp_path: Path) -> None:
    """500 requests at random times with aborts, preemptions and reads that fail: no answer differs, nothing leaks."""
    found = lifetimes(tmp_path, "mixed")
    assert found["requests"] == 500
    assert found["differing"] == []
    assert found["aborted"] > 20 and found["preemptions"] > 0
    assert found["failed_reads"] > 5 and found["misses"].get("error", 0) + found["misses"].get("corrupt", 0) > 0
    assert found["loaded_tokens"] > 10_000
    assert found["free_blocks"] == found["free_blocks_before"]


def test_within_vllms_own_offloading(tmp_path: Path) -> None:
    """Our secondary tier and our offloading spec on the real model: a load is what the engine's own cache gives."""
    found = lifetimes(tmp_path, f"offload:{MODEL}")
    for face in ("tier", "spec"):
        answers = found[face]
        for name in ("alone", "cold", "restart", "damaged"):
            same(answers[name], answers["baseline"])
        same(answers["reset"], answers["baseline"][:1])
        # The prompt that ends inside a chunk: the engine and we have equally many of its blocks.
        loads, own = answers["restart"][1], answers["control"][1]
        assert (loads["tokens"], loads["logprobs"]) == (own["tokens"], own["logprobs"])
        assert [answer["cached"] for answer in answers["restart"]] == [768, 1024, 512]
        assert answers["restart_books"]["hits"]["disk"] == 4 and answers["restart_books"]["stored"] == 0
        assert answers["damaged_objects"] > 0 and answers["damaged_books"]["misses"]["corrupt"] > 0
        assert answers["reset"][0]["cached"] == 0
