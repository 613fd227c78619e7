"""Assembly: everything that is wrong, at once; nothing left open; budgets cut to the byte."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from chunks import fill, keys, serve, store, verify

from lmcache_backends import cpu as cpu_module
from lmcache_backends.cpu import CpuConfig
from lmcache_backends.gds import GdsConfig
from lmcache_core.build import STAGING_PER_THREAD, build
from lmcache_core.config import LaneConfig, PipelineConfig, TierConfig
from lmcache_core.doorway import staging_buffer_bytes
from lmcache_core.errors import BackendUnavailable, ConfigError, PluginError, UnknownPlugin, Unsupported
from lmcache_core.hookspecs import hookimpl
from lmcache_core.layout import KVLayout
from lmcache_core.pipeline import Pipeline
from lmcache_core.plugins import Plugins
from lmcache_core.protocols import (
    BackendConfig,
    BuildContext,
    EvictionConfig,
    EvictionPolicy,
    MemoryBackend,
    Region,
    Serde,
    SerdeConfig,
    SerdeContext,
    StorageBackend,
)
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import DictBackend, DictConfig
from lmcache_serde.raw import RawConfig
from lmcache_serde.zstd import ZstdConfig

pytestmark = pytest.mark.timeout(60)

SLOT = 8192
MIB = 1 << 20


def dram(capacity: int = 8 * SLOT, backend: BackendConfig | None = None, **options: Any) -> TierConfig:
    return TierConfig(name="dram", capacity=capacity, backend=backend or CpuConfig(pin=False), **options)


def config(*tiers: TierConfig, memory: TierConfig | None = None, chunk_tokens: int = 16, **options: Any) -> Any:
    return PipelineConfig(chunk_tokens=chunk_tokens, tiers=(memory or dram(), *tiers), **options)


def disk(path: Path, name: str = "disk", **options: Any) -> TierConfig:
    backend = GdsConfig(path=path / name, free_floor="0B")
    return TierConfig(name=name, capacity=16 * MIB, backend=backend, **options)


def fresh(error: BaseException) -> BaseException:
    """A new exception: one that is kept would keep the frames it was raised through, and what they hold."""
    return type(error)(*error.args)


class Failing(BackendConfig):
    """A storage backend that fails at one point of its life."""

    type: Literal["failing"] = "failing"
    point: str = "build"
    error: Any = BackendUnavailable("no such server; start it")

    def build(self, context: BuildContext) -> StorageBackend:
        if self.point == "build":
            raise fresh(self.error)
        return FailingBackend(self.point, self.error)


class FailingBackend(DictBackend):
    def __init__(self, point: str, error: BaseException) -> None:
        super().__init__({})
        self._point = point
        self._error = error
        self.regions: list[Region] = []
        self.objects[keys(1)[0]] = bytes(5000)

    def register(self, region: Region) -> None:
        if self._point == "register":
            raise fresh(self._error)
        self.regions.append(region)

    def scan(self) -> Any:
        if self._point == "scan":
            raise fresh(self._error)
        return super().scan()

    def footprint(self, nbytes: int) -> int:
        if self._point == "footprint":
            raise fresh(self._error)
        return nbytes

    def close(self) -> None:
        if self._point == "close":
            raise fresh(self._error)


class BadSerde(SerdeConfig):
    type: Literal["bad"] = "bad"
    codec: str | None = None

    def build(self, context: SerdeContext) -> Serde:
        if self.codec is None:
            raise Unsupported("it needs float8")
        serde = ZstdConfig().build(context)
        named = type("Named", (type(serde),), {"codec": self.codec})
        return named(context, 1, False)  # type: ignore[no-any-return]


class BadEviction(EvictionConfig):
    type: Literal["bad"] = "bad"

    def build(self) -> EvictionPolicy:
        raise RuntimeError("no policy today")


class BadMemory(BackendConfig):
    in_memory: ClassVar[bool] = True

    type: Literal["badmem"] = "badmem"
    allowed: int = 0
    """How many allocations succeed."""
    inner: Any = None

    def build(self, context: BuildContext) -> MemoryBackend:
        return BadMemoryBackend(self.allowed, CpuConfig(pin=False, shared=True).build(context))


class BadMemoryBackend(MemoryBackend):
    def __init__(self, allowed: int, inner: MemoryBackend) -> None:
        self._allowed = allowed
        self._inner = inner

    def allocate(self, nbytes: int) -> Region:
        self._allowed -= 1
        if self._allowed < 0:
            raise BackendUnavailable("out of memory")
        return self._inner.allocate(nbytes)

    def close(self) -> None:
        self._inner.close()


# -- errors ------------------------------------------------------------------------------------------------------
def test_every_problem_is_named_at_once(layout: KVLayout) -> None:
    wrong = config(
        TierConfig(name="a", capacity=1000, backend=DictConfig()),
        TierConfig(name="b", serde=BadSerde(), backend=DictConfig()),
        TierConfig(name="c", eviction=BadEviction(), backend=DictConfig()),
        TierConfig(name="d", serde=BadSerde(codec="kompressor-ü/1"), backend=DictConfig()),
        TierConfig(name="e", serde=BadSerde(codec="x" * 33), backend=DictConfig()),
        memory=dram(capacity=SLOT + 1),
        chunk_tokens=256,
    )
    with pytest.raises(ConfigError) as caught:
        build(wrong, layout)
    found = {problem.path: str(problem) for problem in caught.value.problems}
    assert list(found) == [
        "chunk_tokens", "tiers.a.capacity", "tiers.b.serde", "tiers.c.eviction", "tiers.d.serde", "tiers.e.serde",
        "tiers.dram.capacity",
    ]  # fmt: skip
    assert "set chunk_tokens to 16" in found["chunk_tokens"]
    assert "1000 bytes are less than one chunk takes, 5120 bytes" in found["tiers.a.capacity"]
    assert "it needs float8" in found["tiers.b.serde"]
    assert "no policy today" in found["tiers.c.eviction"]
    assert "32 ASCII" in found["tiers.d.serde"] and "32 ASCII" in found["tiers.e.serde"]
    assert "8193 bytes hold 1 chunks of 8192 bytes" in found["tiers.dram.capacity"]
    assert all(path in str(caught.value) for path in found)


def test_the_capacity_it_asks_for_is_the_least_that_works(layout: KVLayout) -> None:
    encoded = TierConfig(name="cold", serde=ZstdConfig(), backend=DictConfig(), lane=LaneConfig(threads=3))
    with pytest.raises(ConfigError) as caught:
        build(config(encoded, memory=dram(capacity=2 * SLOT)), layout)
    asked = re.search(r"at least (\d+) bytes", caught.value.problems[0].fix)
    assert asked is not None
    least = int(asked[1])
    with pytest.raises(ConfigError):
        build(config(encoded, memory=dram(capacity=least - 1)), layout)
    pipeline = build(config(encoded, memory=dram(capacity=least)), layout)
    assert pipeline.slots.count == 2
    pipeline.close()


def test_one_backend_that_fails_raises_its_own_error_several_raise_all(layout: KVLayout) -> None:
    one = TierConfig(name="one", backend=Failing())
    two = TierConfig(name="two", backend=Failing(error=ValueError("bad option")))
    with pytest.raises(BackendUnavailable, match="no such server; start it"):
        build(config(one), layout)
    with pytest.raises(PluginError, match="tier `two`: building backend `failing` failed: ValueError: bad option"):
        build(config(two), layout)
    with pytest.raises(ConfigError) as caught:
        build(config(one, two), layout)
    assert [problem.path for problem in caught.value.problems] == ["tiers.one.backend", "tiers.two.backend"]
    assert "start it" in str(caught.value) and "bad option" in str(caught.value)


def test_a_medium_that_cannot_be_scanned_names_its_tier(layout: KVLayout) -> None:
    broken = TierConfig(name="store", backend=Failing(point="scan", error=KeyError("index")))
    with pytest.raises(PluginError, match="tier `store`: reading what is stored failed: KeyError: 'index'"):
        build(config(broken), layout)


@pytest.mark.parametrize("serde", [None, ZstdConfig()], ids=["raw", "encoded"])
def test_a_backend_is_told_the_memory_its_buffers_come_from(layout: KVLayout, serde: SerdeConfig | None) -> None:
    tier = TierConfig(name="store", backend=Failing(point="never"), serde=serde)
    pipeline = build(config(tier, memory=dram(capacity=64 * SLOT)), layout)
    backend = pipeline.tiers[0].backend
    assert isinstance(backend, FailingBackend)
    assert backend.regions[0] is pipeline.slots.region
    assert len(backend.regions) == (1 if serde is None else 2)
    pipeline.close()
    refusing = TierConfig(name="store", backend=Failing(point="register", error=OSError("locked memory")))
    with pytest.raises(PluginError, match="tier `store`: registering memory failed: OSError: locked memory"):
        build(config(refusing), layout)


def test_an_unknown_plugin_is_named(layout: KVLayout) -> None:
    with pytest.raises(UnknownPlugin, match="`tracer`"):
        build(config(plugins=("tracer",)), layout)


def test_an_error_while_closing_does_not_hide_the_first(layout: KVLayout) -> None:
    fine = TierConfig(name="fine", backend=Failing(point="close", error=RuntimeError("cannot close")))
    broken = TierConfig(name="broken", backend=Failing(point="scan", error=BackendUnavailable("the cause")))
    with pytest.raises(BackendUnavailable, match="the cause"):
        build(config(fine, broken), layout)
    with pytest.raises(BackendUnavailable, match="the cause") as caught:
        build(config(TierConfig(name="bad", backend=Failing(error=BackendUnavailable("the cause"))), fine), layout)
    assert caught.value.__notes__ == ["closing it failed as well: RuntimeError: cannot close"]


# -- nothing left open -------------------------------------------------------------------------------------------
def held_by_the_process() -> tuple[set[str], int, int]:
    """Open files, threads of ours, and bytes of large mappings."""
    gc.collect()
    files = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            files.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:
            continue  # the listing's own
    threads = sum(thread.name.startswith("lmcache-") for thread in threading.enumerate())
    large = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(bound, 16) for bound in line.split()[0].split("-"))
        large += last - first if last - first >= 24 * MIB and "[heap]" not in line else 0
    return files, threads, large


def memory_of(allowed: int) -> TierConfig:
    return dram(32 * MIB, BadMemory(allowed=allowed))


BROKEN: dict[str, Callable[[Path], PipelineConfig]] = {
    "sizes": lambda path: config(disk(path), memory=dram(1)),
    "plugin": lambda path: config(disk(path), plugins=("nonsense",)),
    "arena": lambda path: config(disk(path), memory=memory_of(0)),
    "staging": lambda path: config(disk(path), disk(path, "cold", serde=ZstdConfig()), memory=memory_of(1)),
    "eviction of memory": lambda path: config(disk(path), memory=dram(32 * MIB, eviction=BadEviction())),
    "last backend": lambda path: config(
        disk(path), TierConfig(name="bad", backend=Failing()), memory=dram(32 * MIB, CpuConfig(shared=True))
    ),
    "scan": lambda path: config(
        disk(path), TierConfig(name="bad", backend=Failing(point="scan")), memory=dram(32 * MIB, CpuConfig(shared=True))
    ),
    "footprint": lambda path: config(
        disk(path), TierConfig(name="bad", backend=Failing(point="footprint")), memory=dram(32 * MIB)
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_build_that_fails_leaves_nothing_open(tmp_path: Path, layout: KVLayout, what: str) -> None:
    build(config(disk(tmp_path)), layout).close()  # imports and directories
    before = held_by_the_process()
    with pytest.raises((ConfigError, PluginError, BackendUnavailable, RuntimeError)) as caught:
        build(BROKEN[what](tmp_path), layout)
    assert str(caught.value)
    del caught
    assert held_by_the_process() == before
    # The directory is not locked by a leftover either.
    build(config(disk(tmp_path)), layout).close()


def test_the_oracle_sees_what_is_open(tmp_path: Path, layout: KVLayout) -> None:
    before = held_by_the_process()
    pipeline = build(config(disk(tmp_path), memory=dram(32 * MIB, CpuConfig(shared=True))), layout)
    now = held_by_the_process()
    assert len(now[0]) > len(before[0]) and now[1] > before[1] and now[2] >= before[2] + 32 * MIB
    pipeline.close()
    del pipeline
    assert held_by_the_process() == before


# -- budgets -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("extra", [0, 1, SLOT - 1, SLOT])
@pytest.mark.parametrize("threads", [1, 3])
def test_memory_is_cut_to_the_byte(layout: KVLayout, extra: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots and staging together never take more than the capacity, and not a slot less than fits."""
    allocated: list[int] = []
    allocate = cpu_module.CpuMemory.allocate

    def record(self: Any, nbytes: int) -> Region:
        allocated.append(nbytes)
        return allocate(self, nbytes)

    monkeypatch.setattr(cpu_module.CpuMemory, "allocate", record)
    serde = ZstdConfig().build(SerdeContext(layout, layout.chunk_bytes))
    staging = 2 * threads * STAGING_PER_THREAD * staging_buffer_bytes(serde)
    lane = LaneConfig(threads=threads)
    cold = TierConfig(name="cold", serde=ZstdConfig(), backend=DictConfig(), lane=lane)
    raw = TierConfig(name="raw", serde=RawConfig(), backend=DictConfig(), lane=lane)
    capacity = 5 * SLOT + staging + extra
    pipeline = build(config(raw, cold, memory=dram(capacity)), layout)
    assert pipeline.slots.count == 5 + extra // SLOT
    assert allocated == [pipeline.slots.count * SLOT, staging] and sum(allocated) <= capacity
    assert [tier.codec for tier in pipeline.tiers] == ["raw/1", serde.codec]
    pipeline.close()


def test_threads_are_those_configured(layout: KVLayout) -> None:
    def count() -> int:
        return sum(thread.name.startswith("lmcache-") for thread in threading.enumerate())

    before = count()
    tiers = [TierConfig(name=f"t{n}", backend=DictConfig(), lane=LaneConfig(threads=n)) for n in (1, 2, 5)]
    pipeline = build(config(*tiers), layout)
    assert count() == before + 2 * (1 + 2 + 5)
    store(pipeline, keys(6))
    settle(pipeline)
    pipeline.clear("dram")
    serve(pipeline, keys(6))
    assert count() == before + 2 * (1 + 2 + 5)
    pipeline.close()
    assert count() == before


def test_contexts_tell_backends_what_to_expect(layout: KVLayout) -> None:
    seen: list[BuildContext] = []

    class Curious(DictConfig):
        def build(self, context: BuildContext) -> DictBackend:
            seen.append(context)
            return super().build(context)

    cold = TierConfig(name="cold", serde=ZstdConfig(), backend=Curious(), capacity=MIB, lane=LaneConfig(threads=3))
    warm = TierConfig(name="warm", backend=Curious(), lane=LaneConfig(threads=2))
    pipeline = build(config(warm, cold, memory=dram(60 * SLOT)), layout)
    bound = ZstdConfig().build(SerdeContext(layout, layout.chunk_bytes)).bound()
    assert seen == [
        BuildContext("warm", 4096 + layout.chunk_bytes, None, 2 * 2 + 2, lookup_deadline=0.25),
        BuildContext("cold", 4096 + bound, MIB, 2 * 3 + 2, lookup_deadline=0.25),
    ]
    pipeline.close()


def test_memory_of_backends_and_wrappers_comes_out_of_the_budget(layout: KVLayout) -> None:
    class Greedy(DictConfig):
        def memory_bytes(self, context: BuildContext) -> int:
            return 2 * SLOT

    class Wrapper:
        @hookimpl
        def lmcache_wrapper_memory(self, config: DictConfig, context: BuildContext) -> int:
            return 3 * SLOT

    plugins = Plugins()
    plugins.register(Wrapper(), "wrapper")
    greedy = TierConfig(name="greedy", backend=Greedy())
    pipeline = build(config(greedy, memory=dram(12 * SLOT)), layout, plugins=plugins)
    assert pipeline.slots.count == 12 - 2 - 3
    pipeline.close()
    with pytest.raises(ConfigError, match=f"{5 * SLOT} bytes of staging"):
        build(config(greedy, memory=dram(6 * SLOT)), layout, plugins=plugins)


# -- what is built -----------------------------------------------------------------------------------------------
CHILD = """
import json, sys
from lmcache_core.slots import map_shared
share, offsets = json.loads(sys.argv[1]), json.loads(sys.argv[2])
region = map_shared(share)
for offset in offsets:
    print(bytes(region.view[offset : offset + 1024]).hex())
region.view[offsets[0] : offsets[0] + 1024] = bytes(1024)
"""


def test_another_process_maps_the_arena_and_sees_the_chunks(layout: KVLayout) -> None:
    pipeline = build(config(), layout, shared=True)
    try:
        store(pipeline, keys(2))
        share = pipeline.slots.region.share
        assert share is not None and share["nbytes"] == 8 * SLOT
        with pipeline.retrieve(keys(2)) as lease, pipeline.reserve(keys(1, 50)) as room:
            expected = [bytes(lease.view(i)) for i in range(2)]
            room.view(0)[:] = bytes([1]) * 1024
            offsets = [*room.offsets.tolist(), *lease.offsets.tolist()]
            arguments = [sys.executable, "-c", CHILD, str(share).replace("'", '"'), str(offsets)]
            child = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=False)
            assert child.returncode == 0, child.stderr
            assert [bytes.fromhex(line) for line in child.stdout.split()] == [bytes([1]) * 1024, *expected]
            assert bytes(room.view(0)) == bytes(1024), "and writes into it, as a worker saves its pages"
            assert verify(pipeline, lease) == 2
        assert build_is_private(layout)
    finally:
        pipeline.close()


def build_is_private(layout: KVLayout) -> bool:
    pipeline = build(config(), layout)
    pipeline.close()
    return pipeline.slots.region.share is None


def test_options_reach_the_pipeline(layout: KVLayout) -> None:
    tiers = [
        TierConfig(name="a", write="back", promote=False, backend=DictConfig()),
        TierConfig(
            name="b", write="never", backend=DictConfig(), lane=LaneConfig(threads=1, queue=7, deadline="250ms")
        ),
    ]
    pipeline = build(config(*tiers, verify="serve", memory=dram(64 * SLOT)), layout, poison=True)
    a, b = pipeline.tiers
    assert (a.name, a.write_mode, a.promote, b.threads) == ("a", "back", False, 1)
    assert (b.write_mode, b.read_lane.max_jobs, b.write_lane.max_jobs, b.deadline) == ("never", 7, 7, 0.25)
    assert a.write_lane.max_bytes == 16 * SLOT, "a quarter of memory may be pinned by queued writes"
    store(pipeline, keys(1))
    assert pipeline.slots.sealed[pipeline.slots.index[keys(1)[0]]], "verified when served: sealed when stored"
    aborted = pipeline.reserve(keys(1, 9))
    slot = aborted.slots[0]
    fill(keys(1, 9))(aborted)
    aborted.abort()
    assert set(pipeline.slots.view(slot)) == {0xDB}
    pipeline.close()


def test_the_same_configuration_builds_again_and_finds_what_was_stored(tmp_path: Path, layout: KVLayout) -> None:
    wanted = config(disk(tmp_path))
    for pipeline in _lives(wanted, layout, 3):
        found = serve(pipeline, keys(4))
        assert found in ([], ["disk"] * 4)
        if not found:
            store(pipeline, keys(4))
            settle(pipeline)
    assert found == ["disk"] * 4


def _lives(wanted: PipelineConfig, layout: KVLayout, count: int) -> Sequence[Pipeline]:
    def live() -> Any:
        for _ in range(count):
            pipeline = build(wanted, layout)
            yield pipeline
            pipeline.close()

    return live()  # type: ignore[no-any-return]
