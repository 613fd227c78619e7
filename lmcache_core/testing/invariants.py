"""What must hold whenever a pipeline is at rest."""

from __future__ import annotations

from typing import Any

from lmcache_core.pipeline import Pipeline
from lmcache_core.types import MissReason


def settle(pipeline: Pipeline, timeout: float = 30.0) -> None:
    """Wait until nothing is being read or written, then check every invariant.

    Raise `AssertionError` when something is still held, the books do not add up, or `timeout` seconds do not suffice.
    """
    for tier in pipeline.tiers:
        assert tier.drain(timeout), f"tier {tier.name} is still at work after {timeout} s"
    assert pipeline.flush(timeout), f"something is still being written after {timeout} s"
    pipeline.check(idle=True)
    check_stats(pipeline.stats())


def check_stats(stats: dict[str, Any], asked: int | None = None) -> None:
    """Check that counters make sense: known reasons only, nothing negative, and hits + misses == chunks asked for."""
    reasons = set(MissReason)
    assert stats["misses"].keys() <= reasons, f"misses without a known reason: {stats['misses']}"
    assert stats["dropped"].keys() <= reasons, f"drops without a known reason: {stats['dropped']}"
    counted = sum(stats["hits"].values()) + sum(stats["misses"].values())
    assert all(count >= 0 for count in (*stats["hits"].values(), *stats["misses"].values())), stats
    if asked is not None:
        assert counted == asked, f"{asked} chunks were asked for, {counted} are counted: {stats}"
