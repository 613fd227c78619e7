"""The kits for memory, serdes and eviction policies: what is here passes them, and bugs fail them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from seeded_bugs import evictions, memories, serdes

from lmcache_backends.cpu import CpuConfig
from lmcache_core.eviction.lru import LruConfig
from lmcache_core.testing.conformance import run_kit
from lmcache_core.testing.contracts import EVICTION, MEMORY, SERDE
from lmcache_core.testing.eviction import EvictionTests, OpenPolicy
from lmcache_core.testing.memory_kit import MemoryBackendTests, OpenMemory
from lmcache_core.testing.serde import OpenSerde, SerdeTests
from lmcache_serde.raw import RawConfig
from lmcache_serde.zstd import ZstdConfig


class TestCpu(MemoryBackendTests):
    @pytest.fixture(params=[False, True], ids=["private", "shared"])
    def open_memory(self, request: pytest.FixtureRequest) -> OpenMemory:
        return CpuConfig(pin=False, shared=request.param).build


class TestRaw(SerdeTests):
    @pytest.fixture
    def open_serde(self) -> OpenSerde:
        return RawConfig().build


class TestZstd(SerdeTests):
    @pytest.fixture(params=[True, False], ids=["planes", "whole"])
    def open_serde(self, request: pytest.FixtureRequest) -> OpenSerde:
        return ZstdConfig(planes=request.param).build


class TestLru(EvictionTests):
    @pytest.fixture
    def open_policy(self) -> OpenPolicy:
        return LruConfig().build


def find(kit: object, build: Callable[..., Any], contract: str, known: dict[str, str]) -> None:
    """Run the kit; the contract must be among those that its failures name, and nothing fails without a name."""
    failures = [outcome for outcome in run_kit(kit, build) if not outcome.passed]
    found = {failure.contract for failure in failures}
    assert contract in found, f"not found, or not by its name: {[failure.message for failure in failures]}"
    for failure in failures:
        assert failure.message.startswith(f"contract `{failure.contract}`: "), failure
        assert failure.contract in known


@pytest.mark.parametrize("name", memories.BUGS)
def test_memory_bugs_are_found(name: str) -> None:
    bug = memories.BUGS[name]
    find(MemoryBackendTests(), bug.build, bug.contract, MEMORY)


@pytest.mark.parametrize("name", serdes.BUGS)
def test_serde_bugs_are_found(name: str) -> None:
    bug = serdes.BUGS[name]
    find(SerdeTests(), bug.build, bug.contract, SERDE)


@pytest.mark.parametrize("name", evictions.BUGS)
def test_eviction_bugs_are_found(name: str) -> None:
    bug = evictions.BUGS[name]
    find(EvictionTests(), bug.build, bug.contract, EVICTION)


@pytest.mark.parametrize(
    "kit, build",
    [(MemoryBackendTests(), memories.Correct), (SerdeTests(), serdes.Correct), (EvictionTests(), LruConfig().build)],
    ids=["memory", "serde", "eviction"],
)
def test_what_the_bugs_are_in_is_correct(kit: object, build: Callable[..., Any]) -> None:
    assert [outcome for outcome in run_kit(kit, build) if not outcome.passed] == []


@pytest.mark.parametrize(
    "bugs, known", [(memories.BUGS, MEMORY), (serdes.BUGS, SERDE), (evictions.BUGS, EVICTION)], ids=["m", "s", "e"]
)
def test_every_contract_has_a_bug_that_breaks_it(bugs: dict[str, Any], known: dict[str, str]) -> None:
    assert {bug.contract for bug in bugs.values()} == set(known)
