"""The kits without pytest, the state machine's teeth, the wrappers and the measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import pytest
from media import store
from pydantic import Field
from seeded_bugs.storage import ClearsNothing, Correct, Objects, OldVersionReturns, RoundedSizes

from lmcache_backends.cpu import CpuConfig
from lmcache_backends.gds import GdsConfig
from lmcache_core.build import build
from lmcache_core.config import PipelineConfig, TierConfig
from lmcache_core.errors import BackendError, PluginError, UnknownPlugin
from lmcache_core.layout import KVLayout
from lmcache_core.plugins import EVICTIONS, SERDES
from lmcache_core.protocols import BackendConfig, BuildContext, StorageBackend
from lmcache_core.testing import CONTRACTS, ContractBroken, Outcome, run_storage_tests
from lmcache_core.testing.bench import measure
from lmcache_core.testing.conformance import conformance
from lmcache_core.testing.contracts import EVICTION, MEMORY, SERDE, STORAGE, demand
from lmcache_core.testing.memory import DictBackend, DictConfig, aligned
from lmcache_core.testing.rig import Medium
from lmcache_core.testing.stateful import StorageStateMachineTests
from lmcache_core.testing.storage import key_of, new_object
from lmcache_core.testing.wrappers import Forwarding, Slow, Wrapping
from lmcache_core.types import ChunkKey, Got, Put

MIB = 1 << 20


class SeededConfig(BackendConfig):
    """A backend of `seeded_bugs`."""

    type: Literal["seeded"] = "seeded"
    build_: Any
    objects: Any = Field(default_factory=dict)

    def build(self, context: BuildContext) -> StorageBackend:
        backend: StorageBackend = self.build_(self.objects, context)
        return backend


class Media:
    """Starts media that hold nothing, and counts them."""

    def __init__(self, build: Any) -> None:
        self.build = build
        self.places: list[Path] = []
        self.up = 0

    @contextmanager
    def start(self, directory: Path) -> Iterator[Medium]:
        assert not any(directory.iterdir())
        self.places.append(directory)
        self.up += 1
        yield Medium(SeededConfig(build_=self.build))
        self.up -= 1


def failures(outcomes: Sequence[Outcome]) -> dict[str, str]:
    return {outcome.name: outcome.contract for outcome in outcomes if not outcome.passed}


def test_a_correct_backend_passes_on_one_medium(tmp_path: Path) -> None:
    media = Media(Correct)
    outcomes = run_storage_tests(media.start, tmp_path)
    assert failures(outcomes) == {}
    assert len(outcomes) >= 19 and len({outcome.name for outcome in outcomes}) == len(outcomes)
    assert len(media.places) == 1 and media.up == 0


def test_a_failure_says_what_broke_and_leaves_nothing_to_the_next_test(tmp_path: Path) -> None:
    """A `clear` that does nothing breaks its own contract, and none for want of an empty medium."""
    media = Media(ClearsNothing)
    outcomes = run_storage_tests(media.start, tmp_path)
    assert failures(outcomes)["clear_forgets_everything"] == "clear"
    assert set(failures(outcomes).values()) == {"clear"}
    assert len(media.places) > 1 and media.up == 0
    (message,) = (outcome.message for outcome in outcomes if outcome.name == "clear_forgets_everything")
    assert message == "contract `clear`: `contains` is True for a key after `clear`"


def test_a_backend_that_cannot_be_built_is_an_outcome_of_every_test(tmp_path: Path) -> None:
    def build(objects: Objects, context: BuildContext) -> StorageBackend:
        raise OSError(2, "no such server")

    outcomes = run_storage_tests(Media(build).start, tmp_path)
    assert not any(outcome.passed for outcome in outcomes)
    assert {outcome.message for outcome in outcomes} == {"FileNotFoundError: [Errno 2] no such server"}
    assert {outcome.contract for outcome in outcomes} == {""}


def test_memory_backends_are_told_from_storage(tmp_path: Path) -> None:
    @contextmanager
    def start(directory: Path) -> Iterator[Medium]:
        yield Medium(CpuConfig(pin=False))

    outcomes = run_storage_tests(start, tmp_path)
    assert failures(outcomes) == {} and "no_page_is_left_to_fault_in" in {outcome.name for outcome in outcomes}


def test_conformance_by_name(tmp_path: Path) -> None:
    assert failures(conformance("zstd", tmp_path, SERDES)) == {}
    assert failures(conformance("lru", tmp_path, EVICTIONS)) == {}
    assert failures(conformance("cpu", tmp_path)) == {}
    with pytest.raises(UnknownPlugin, match="no backend `gdss` is installed; did you mean `gds`"):
        conformance("gdss", tmp_path)


def test_what_needs_settings_and_has_no_rig_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_core.testing.conformance.find_rig", lambda plugins, name: None)
    with pytest.raises(PluginError, match=r"`gds` cannot be tested with default settings.* path: .*lmcache\.rigs"):
        conformance("gds", tmp_path)


def test_contracts_are_named_once() -> None:
    assert {*STORAGE, *MEMORY, *SERDE, *EVICTION} == set(CONTRACTS)
    assert all(line.endswith(".") and "\n" not in line for line in CONTRACTS.values())
    with pytest.raises(ContractBroken, match=r"^contract `scan`: twice$") as caught:
        demand(False, "scan", "twice")
    assert caught.value.contract == "scan"
    with pytest.raises(AssertionError, match="no such"):
        demand(False, "no such", "")


def test_the_state_machine_finds_a_bug_and_names_it() -> None:
    kit = StorageStateMachineTests()
    kit.shrink = False
    objects: Objects = {}
    with pytest.raises(ContractBroken, match=r"^contract `"):
        kit.test_any_calls_agree_with_a_dict(lambda context: OldVersionReturns(objects, context))


# Wrappers.


def test_slow_takes_its_time_and_changes_nothing() -> None:
    inner = DictBackend({})
    slow = Slow(inner, latency_s=0.03, bytes_per_s=1e6)
    keys = [key_of(i) for i in range(2)]
    objects = [new_object(key, 10_000) for key in keys]
    began = perf_counter()
    assert slow.put_from(keys, objects) == [None, None]
    assert perf_counter() - began >= 0.05
    began = perf_counter()
    assert slow.contains(keys) == [True, True]
    assert perf_counter() - began >= 0.03
    buffers = [aligned(10_000) for _ in keys]
    began = perf_counter()
    assert slow.get_into(keys, buffers) == [10_000] * 2 and buffers == objects
    assert perf_counter() - began >= 0.05
    slow.delete(keys[:1])
    assert not slow.contains_is_local and inner.contains_is_local
    assert Slow(inner).contains_is_local
    assert list(slow.scan() or ()) == [(keys[1], 10_000)] and slow.footprint(7) == 7
    assert slow.usage() == inner.usage()
    slow.clear()
    assert slow.contains(keys) == [False, False]
    slow.close()


def test_wrappers_reach_the_tiers_they_name(layout: KVLayout, keys: list[ChunkKey]) -> None:
    class Counting(Forwarding):
        puts = 0

        def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
            self.puts += len(keys)
            return super().put_from(keys, buffers)

    wrapping = Wrapping({"near": lambda inner, context: Counting(inner)})
    memory = TierConfig(name="dram", capacity=MIB, backend=CpuConfig(pin=False))
    near, far = (TierConfig(name=name, backend=DictConfig()) for name in ("near", "far"))
    config = PipelineConfig(chunk_tokens=layout.chunk_tokens, tiers=(memory, near, far))
    pipeline = build(config, layout, plugins=wrapping.plugins())
    try:
        store(pipeline, keys[:3])
        assert pipeline.flush(10)
    finally:
        pipeline.close()
    assert wrapping.wrapped["near"].puts == 3
    assert wrapping.wrapped.keys() == {"near"}


# Measurements.


@pytest.mark.parametrize("config", [DictConfig(), DictConfig(local=False, scannable=False), CpuConfig(pin=False)])
def test_measure(config: BackendConfig) -> None:
    figures = measure(config, object_bytes=MIB // 4, seconds=0.1, threads=2, batch=4, working_set=8 * MIB)
    assert figures.put_gb_s > 0.01 and figures.get_gb_s > 0.01
    assert 0 < figures.exists_1000_ms < 1000 and 0 < figures.cpu_s_per_gb < 100
    assert figures.put_p99_ms > 0 and figures.get_p99_ms > 0
    assert (figures.object_bytes, figures.threads, figures.batch) == (MIB // 4, 2, 4)
    if isinstance(config, DictConfig):
        assert not config.objects


def test_measure_a_disk(tmp_path: Path) -> None:
    config = GdsConfig(path=tmp_path / "tier", free_floor="0B")
    figures = measure(config, object_bytes=MIB // 4, seconds=0.1, working_set=8 * MIB)
    assert figures.put_gb_s > 0.001 and figures.get_gb_s > 0.001


class SlowConfig(DictConfig):
    def build(self, context: BuildContext) -> Any:
        return Slow(super().build(context), latency_s=0.02)


def test_measure_cuts_a_slow_medium_off() -> None:
    """It does not store a whole working set, at 20 ms a call, before it looks at the clock."""
    began = perf_counter()
    figures = measure(SlowConfig(), object_bytes=8192, seconds=0.2, threads=2, batch=1, working_set=100 * MIB)
    assert perf_counter() - began < 60
    assert figures.put_p99_ms >= 20 and figures.exists_1000_ms >= 20
    assert figures.put_gb_s <= 2 * 8192 / 0.02 / 1e9


class Wrong(DictBackend):
    """Returns something else than was stored."""

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results = super().get_into(keys, buffers)
        buffers[0][5000] ^= 1
        return results


class LyingContains(DictBackend):
    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [True] * len(keys)


class Full(DictBackend):
    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        return [OSError(28, "full")] * len(keys)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda objects, context: Wrong(objects), "other bytes"),
        (lambda objects, context: LyingContains(objects), "`contains` was wrong about"),
        (lambda objects, context: Full(objects), "did not store an object"),
        (lambda objects, context: RoundedSizes(objects, context), "of a stored object of 10000 bytes came 12288"),
    ],
    ids=["wrong bytes", "lying contains", "full", "rounded sizes"],
)
def test_a_backend_that_is_wrong_has_no_speed(build: Any, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        measure(SeededConfig(build_=build), object_bytes=10_000, seconds=0.05, threads=2, working_set=MIB)
