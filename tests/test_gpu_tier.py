"""The GPU tier over a CUDA that does everything as late as it may: see fake_cuda."""

from __future__ import annotations

import ctypes
import errno
import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chunks import chunk, keys, serve, store, tier
from fake_cuda import LOST, NO_MEMORY, FakeCuda, installed

from lmcache_backends import cpu as cpu_module
from lmcache_backends.cpu import CpuConfig
from lmcache_backends.gpu import GpuConfig
from lmcache_core import _cuda, cli
from lmcache_core.build import build
from lmcache_core.config import PipelineConfig, TierConfig, load
from lmcache_core.copies import PageGeometry
from lmcache_core.errors import BackendError, BackendUnavailable, ConfigError
from lmcache_core.gpu import CudaError, Event, GpuPagedKV, How, Stream
from lmcache_core.layout import KVLayout
from lmcache_core.mirror import Mirror
from lmcache_core.pipeline import Lease, Pipeline, Reservation
from lmcache_core.protocols import BuildContext
from lmcache_core.testing import MemoryBackendTests
from lmcache_core.testing.invariants import settle
from lmcache_core.types import ChunkKey

pytestmark = pytest.mark.timeout(60)

SLOT, PLACE = 8192, 1024
GPU = GpuConfig(spare=0)
Make = Callable[..., Pipeline]


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with installed() as fake:
        yield fake


def hbm(places: int = 4, **options: Any) -> TierConfig:
    return TierConfig(name="hbm", capacity=places * PLACE, backend=GPU, **options)


def dram(slots: int = 8, **options: Any) -> TierConfig:
    return TierConfig(name="dram", capacity=slots * SLOT, backend=CpuConfig(**options))


@pytest.fixture
def pipelines(cuda: FakeCuda, layout: KVLayout) -> Iterator[Make]:
    opened: list[Pipeline] = []

    def make(*tiers: TierConfig, places: int = 4, slots: int = 8) -> Pipeline:
        config = PipelineConfig(chunk_tokens=layout.chunk_tokens, tiers=(hbm(places), dram(slots), *tiers))
        opened.append(build(config, layout, poison=True))
        return opened[-1]

    yield make
    try:
        for pipeline in opened:
            settle(pipeline)
    finally:
        for pipeline in opened:
            pipeline.close()


class Engine:
    """Pages on the device, written and read by work on a stream."""

    def __init__(self, cuda: FakeCuda, pipeline: Pipeline, stream: int | None = None) -> None:
        self.cuda, self.pipeline = cuda, pipeline
        self.own = None if stream is not None else Stream(0)
        self.stream = self.own.handle if self.own is not None else 0
        self.read = 0
        """Chunks whose bytes were read and right."""

    def queue(self, work: Callable[[], None]) -> None:
        with self.cuda._lock:
            self.cuda._put(self.stream, work)

    def write(self, names: Sequence[ChunkKey], room: Reservation, count: int | None = None) -> None:
        for position, address in zip(room.positions, room.on_device(self.stream, count).tolist(), strict=False):
            raw = chunk(names[position], self.pipeline.layout.chunk_bytes)
            self.queue(lambda at=address, raw=raw: ctypes.memmove(at, raw, len(raw)))

    def store(self, names: Sequence[ChunkKey]) -> int:
        return self.pipeline.store(names, lambda room: self.write(names, room))

    def check(self, lease: Lease) -> list[str]:
        for key, address in zip(lease.keys, lease.on_device(self.stream).tolist(), strict=True):
            self.queue(lambda at=address, key=key: self._compare(key, at))
        return lease.sources

    def _compare(self, key: ChunkKey, address: int) -> None:
        raw = chunk(key, self.pipeline.layout.chunk_bytes)
        assert ctypes.string_at(address, len(raw)) == raw, f"wrong bytes for {key!r}"
        self.read += 1

    def serve(self, names: Sequence[ChunkKey]) -> list[str]:
        with self.pipeline.retrieve(names) as lease:
            return self.check(lease)

    def finish(self) -> None:
        done = Event(0)
        done.record(self.stream)
        done.synchronize()
        done.close()

    def close(self) -> None:
        self.finish()
        if self.own is not None:
            self.own.close()


@pytest.fixture
def engine(cuda: FakeCuda) -> Iterator[Callable[[Pipeline], Engine]]:
    opened: list[Engine] = []

    def make(pipeline: Pipeline) -> Engine:
        opened.append(Engine(cuda, pipeline))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def mirror(pipeline: Pipeline) -> Mirror:
    assert pipeline.mirror is not None
    return pipeline.mirror


# -- copies ------------------------------------------------------------------------------------------------------
def test_what_a_device_stores_is_served_from_it_and_reaches_the_host(
    pipelines: Make, engine: Callable[[Pipeline], Engine]
) -> None:
    pipeline = pipelines(tier())
    gpu, names = engine(pipeline), keys(3)
    assert gpu.store(names) == 3
    assert pipeline.flush(10)
    assert serve(pipeline, names) == ["dram"] * 3, "the host has the bytes"
    assert gpu.serve(names) == ["hbm"] * 3
    gpu.finish()
    assert gpu.read == 3
    stats = pipeline.stats()
    assert stats["hits"] == {"hbm": 3, "dram": 3, "store": 0}
    assert stats["tiers"]["hbm"]["demoted"] == 3 and stats["tiers"]["store"]["written"] == 3


def test_chunks_are_visible_when_all_their_bytes_are_in_host_memory(
    cuda: FakeCuda, pipelines: Make, engine: Callable[[Pipeline], Engine]
) -> None:
    pipeline = pipelines()
    gpu, names = engine(pipeline), keys(2)
    cuda.gate.clear()
    gpu.store(names)
    assert pipeline.lookup(names).count == 0 and not cuda.copied
    with pipeline.reserve(names) as other:
        assert not other.positions, "they are on their way"
    assert not pipeline.flush(0.01)
    cuda.gate.set()
    assert pipeline.flush(10) and pipeline.lookup(names).count == 2


def test_the_second_use_of_a_chunk_is_served_from_the_device(
    pipelines: Make, engine: Callable[[Pipeline], Engine]
) -> None:
    pipeline = pipelines()
    gpu, names = engine(pipeline), keys(3)
    store(pipeline, names)
    assert gpu.serve(names) == ["dram"] * 3
    assert gpu.serve(names) == ["hbm"] * 3
    assert gpu.serve(keys(2)) == ["hbm"] * 2
    gpu.finish()
    assert gpu.read == 8 and pipeline.flush(10)
    assert mirror(pipeline).stats()["promoted"] == 3


def test_chunks_from_a_medium_are_copied_up_too(pipelines: Make, engine: Callable[[Pipeline], Engine]) -> None:
    pipeline = pipelines(tier())
    gpu, names = engine(pipeline), keys(3)
    store(pipeline, names)
    settle(pipeline)
    pipeline.clear("dram")
    assert gpu.serve(names) == ["store"] * 3
    assert gpu.serve(names) == ["hbm"] * 3


def test_what_does_not_fit_on_the_device_is_used_where_it_is(
    pipelines: Make, engine: Callable[[Pipeline], Engine]
) -> None:
    pipeline = pipelines(places=3)
    gpu, names = engine(pipeline), keys(7)
    gpu.store(names)
    assert pipeline.flush(10)
    assert gpu.serve(names) == ["hbm"] * 3 + ["dram"] * 4, "the beginning of a prefix has the places"
    gpu.finish()
    assert gpu.read == 7 and mirror(pipeline).stats()["beside"] == 4
    assert pipeline.flush(10)
    assert gpu.serve(keys(3, 100)) == [] and gpu.store(keys(1, 100)) == 1
    assert pipeline.flush(10)
    assert gpu.serve(names)[:3] == ["hbm", "hbm", "dram"], "the deepest copy went first"


@pytest.mark.parametrize("how", ["clear all", "clear dram", "clear hbm", "discard", "evict"])
def test_a_copy_goes_with_its_slot(pipelines: Make, engine: Callable[[Pipeline], Engine], how: str) -> None:
    pipeline = pipelines(places=4, slots=4)
    gpu, names = engine(pipeline), keys(3)
    gpu.store(names)
    assert pipeline.flush(10) and mirror(pipeline).stats()["ready"] == 3
    if how == "discard":
        pipeline.discard(names)
    elif how == "evict":
        store(pipeline, keys(4, 100))
    else:
        pipeline.clear(None if how == "clear all" else how.removeprefix("clear "))
    assert mirror(pipeline).stats()["ready"] == 0 and mirror(pipeline).stats()["free"] == 4
    assert gpu.serve(names) == (["dram"] * 3 if how == "clear hbm" else [])


def test_a_lease_holds_slots_and_places_until_its_stream_is_done(
    cuda: FakeCuda, pipelines: Make, engine: Callable[[Pipeline], Engine]
) -> None:
    pipeline = pipelines(places=2, slots=2)
    gpu, names = engine(pipeline), keys(2)
    store(pipeline, names)
    cuda.gate.clear()
    assert gpu.serve(names) == ["dram"] * 2
    pipeline.clear("hbm")
    assert mirror(pipeline).stats()["free"] == 0, "the copies are read still"
    assert store(pipeline, keys(2, 100)) == 0, "so are the slots"
    assert gpu.read == 0
    cuda.gate.set()
    assert pipeline.flush(10) and gpu.read == 2
    assert mirror(pipeline).stats()["free"] == 2 and store(pipeline, keys(2, 100)) == 2


def test_what_is_released_or_aborted_early_never_reaches_anybody(
    cuda: FakeCuda, pipelines: Make, engine: Callable[[Pipeline], Engine]
) -> None:
    pipeline = pipelines(places=2, slots=2)
    gpu, names = engine(pipeline), keys(2)
    cuda.gate.clear()
    with pipeline.reserve(names) as room:
        gpu.write(names, room)
    assert store(pipeline, keys(2, 100)) == 0, "the stream may still write there"
    cuda.gate.set()
    assert pipeline.flush(10)
    assert pipeline.lookup(names).count == 0 and store(pipeline, keys(2, 100)) == 2
    lease = pipeline.retrieve(keys(2, 100))
    gpu.check(lease)
    lease.release()
    lease.release()
    assert pipeline.flush(10)


def test_a_part_on_the_device_and_the_rest_by_the_host(pipelines: Make, engine: Callable[[Pipeline], Engine]) -> None:
    pipeline = pipelines()
    gpu, names = engine(pipeline), keys(3)

    def write(room: Reservation) -> None:
        gpu.write(names, room, 2)
        room.view(2)[:] = chunk(names[2], len(room.view(2)))

    pipeline.store(names, write)
    assert pipeline.flush(10) and serve(pipeline, names) == ["dram"] * 3
    with pipeline.retrieve(names) as lease:
        assert len(lease.on_device(gpu.stream, 2)) == 2
        assert lease.sources == ["hbm", "hbm", "dram"]


def test_on_device_once_and_with_a_gpu_tier_only(
    cuda: FakeCuda, pipelines: Make, layout: KVLayout, engine: Callable[[Pipeline], Engine]
) -> None:
    pipeline = pipelines()
    store(pipeline, keys(1))
    with pipeline.retrieve(keys(1)) as lease:
        lease.on_device(0)
        with pytest.raises(ValueError, match="called before"):
            lease.on_device(0)
    plain = build(PipelineConfig(chunk_tokens=layout.chunk_tokens, tiers=(dram(),)), layout)
    with pytest.raises(ValueError, match="with a GPU tier"), plain.reserve(keys(1)) as room:
        room.on_device(0)
    plain.close()


# -- when CUDA fails ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", ["copy_batch", "record", "wait", "event_create"])
def test_a_device_that_fails_costs_the_copy_and_nothing_else(
    cuda: FakeCuda, pipelines: Make, engine: Callable[[Pipeline], Engine], call: str
) -> None:
    pipeline = pipelines()
    gpu, names = engine(pipeline), keys(2)
    store(pipeline, names)
    cuda.fail[call] = LOST
    early = call in ("wait", "event_create")  # told before anything is queued
    with pytest.raises(CudaError, match="launch failure"):
        gpu.serve(names)
    if not early:
        assert gpu.store(keys(2, 100)) == 2
    else:
        with pytest.raises(CudaError):
            gpu.store(keys(2, 100))
    assert pipeline.flush(10) and pipeline.lookup(keys(2, 100)).count == 0
    assert early or mirror(pipeline).stats()["errors"]
    cuda.fail.clear()
    settle(pipeline)
    assert gpu.serve(names) and gpu.store(keys(2, 100)) == 2
    gpu.finish()


def test_a_stream_that_fails_on_its_way_publishes_nothing(
    cuda: FakeCuda, pipelines: Make, engine: Callable[[Pipeline], Engine]
) -> None:
    pipeline = pipelines()
    gpu, names = engine(pipeline), keys(2)
    cuda.fail["synchronize"] = LOST
    gpu.store(names)
    assert pipeline.flush(10) and pipeline.lookup(names).count == 0
    assert "launch failure" in mirror(pipeline).stats()["last_error"]
    cuda.fail.clear()


# -- many at once ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_random_use_from_many_threads(cuda: FakeCuda, pipelines: Make, seed: int) -> None:
    """Prefixes stored and read by the CPU and by streams, evicted everywhere, cleared now and then: no wrong byte."""
    pipeline = pipelines(tier(), places=5, slots=12)
    failures: list[BaseException] = []
    served: list[int] = []

    def work(number: int) -> None:
        rng = random.Random(100 * seed + number)
        gpu = Engine(cuda, pipeline)
        try:
            for _ in range(60):
                names = keys(rng.randint(1, 5), 10 * rng.randrange(4))
                choice = rng.random()
                if choice < 0.35:
                    gpu.store(names)
                elif choice < 0.45:
                    store(pipeline, names)
                elif choice < 0.6:
                    serve(pipeline, names)
                elif choice < 0.97:
                    gpu.serve(names)
                else:
                    pipeline.clear(rng.choice(["hbm", "dram"]))
                if rng.random() < 0.4:
                    pipeline.flush(10)
            gpu.close()
            served.append(gpu.read)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures and len(served) == 4, failures
    settle(pipeline)
    stats = pipeline.stats()["tiers"]["hbm"]
    assert sum(served) > 20 and min(stats["hit"], stats["promoted"], stats["evicted"]) > 0, (served, stats)


# -- the way of the bytes ----------------------------------------------------------------------------------------
def test_the_fastest_way_is_measured(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is a clock of the test's: `engine` is refused, `staged` takes half as long as `kernel`."""
    layout = KVLayout("lknhd", "bfloat16", 2, 2, 2, 16, chunk_tokens=8, block_tokens=4)
    pages = np.random.default_rng(0).integers(0, 256, 8 * layout.chunk_bytes // 2, dtype=np.uint8)
    before, slot = pages.copy(), np.zeros(layout.chunk_bytes, np.uint8)
    bases = pages.ctypes.data + np.arange(4).reshape(2, 2) * (pages.size // 4)
    now, copy = [0.0], cuda._copy_pages

    def timed(*arguments: Any) -> int:
        path = arguments[-1]._obj.path
        now[0] += {0: 2.0, 1: 1.0, 2: 0.0}[path]
        return -errno.EINVAL if path == 2 else copy(*arguments)

    monkeypatch.setattr("lmcache_core.gpu.perf_counter", lambda: now[0])
    cuda._copy_pages = timed  # type: ignore[method-assign]
    ways = [How(0), How(0, path="staged"), How(0, path="engine")]
    paged = GpuPagedKV(bases, PageGeometry.nhd(layout), 8, how=ways[0])
    assert paged.choose([5, 2], [slot.ctypes.data], ways) is ways[1] is paged.how
    assert np.array_equal(pages, before) and slot.any()
    with pytest.raises(ValueError, match="none of 1 ways"):
        paged.choose([5, 2], [slot.ctypes.data], ways[2:])


# -- assembly ----------------------------------------------------------------------------------------------------
def refused(layout: KVLayout, *tiers: TierConfig, shared: bool = False, **options: Any) -> str:
    config = PipelineConfig(chunk_tokens=layout.chunk_tokens, tiers=tiers or (hbm(), dram()), **options)
    with pytest.raises((ConfigError, BackendUnavailable)) as caught:
        build(config, layout, shared=shared)
    return str(caught.value)


@pytest.mark.skipif(_cuda.available(), reason="there is a GPU here")
def test_without_a_gpu_the_tier_is_refused(layout: KVLayout) -> None:
    assert "tier `hbm` needs an NVIDIA GPU: " in (said := refused(layout)) and said.endswith("or remove the tier")


def test_what_a_gpu_cannot_give_is_refused(cuda: FakeCuda, layout: KVLayout) -> None:
    cuda.taken = cuda.total - 3 * PLACE
    assert "has 3 KiB of 64 MiB free" in (said := refused(layout)) and "lower the tier's capacity" in said
    cuda.taken = 0
    cuda.fail["allocate"] = NO_MEMORY
    assert "cannot allocate 4096 bytes of GPU 0: allocate: out of memory" in refused(layout)
    cuda.fail = {"stream_create": LOST}
    assert "tier `hbm`: stream_create: unspecified launch failure" in refused(layout)
    cuda.fail = {"pin": NO_MEMORY}
    assert "is not pinned (not pinned for GPU 0: pin: out of memory" in refused(layout)
    cuda.fail = {}
    spare = TierConfig(name="hbm", capacity=PLACE, backend=GpuConfig(spare=cuda.total))
    assert "and 64 MiB to `spare`, do not fit" in refused(layout, spare, dram())
    far = TierConfig(name="hbm", capacity=PLACE, backend=GpuConfig(device=2))
    assert "there is no GPU 2, there are 2" in refused(layout, far, dram())
    assert "not pinned: `pin` is false" in refused(layout, hbm(), dram(pin=False))
    cuda.devices = 0
    assert "the driver lists none" in refused(layout)


def test_set_ups_that_make_no_sense_are_refused_before_the_gpu_is_asked(cuda: FakeCuda, layout: KVLayout) -> None:
    assert "this engine can have no GPU tier" in refused(layout, shared=True)
    assert "`serve` cannot be had with a GPU tier" in refused(layout, verify="serve")
    assert "9216 bytes hold 9 chunks, tier `dram` 8" in refused(layout, hbm(9), dram())
    assert "1023 bytes hold no chunk of 1024" in refused(
        layout, TierConfig(name="hbm", capacity=1023, backend=GPU), dram()
    )
    assert not cuda.calls


@pytest.mark.parametrize(
    "tiers, said",
    [
        (["gpu"], "there is no memory tier"),
        (["cpu", "gpu"], "the GPU tier must come first"),
        (["gpu", "cpu", "gpu"], "only one GPU tier is supported"),
        (["gpu", "cpu", "cpu"], "only one memory tier is supported"),
        (["gpu", "gds", "cpu"], "the memory tier must come first"),
    ],
)
def test_the_order_of_tiers(tiers: list[str], said: str, tmp_path: Path) -> None:
    sizes = {"gpu": "1KiB", "cpu": "64KiB", "gds": "1MiB"}
    backends: dict[str, Any] = {"gds": {"path": str(tmp_path)}}
    data = [
        {"name": f"t{i}", "capacity": sizes[kind], "backend": {"type": kind, **backends.get(kind, {})}}
        for i, kind in enumerate(tiers)
    ]
    with pytest.raises(ConfigError) as caught:
        load({"chunk_tokens": 16, "tiers": data})
    assert said in str(caught.value) and len(caught.value.problems) == 1


def test_settings_that_mean_nothing_for_a_gpu() -> None:
    for change, said in [
        ({"capacity": "30%"}, "has no meaning for a GPU"),
        ({"serde": {"type": "zstd"}}, "takes no serde"),
        ({"write": "back"}, "has no write mode"),
    ]:
        gpu = {"name": "hbm", "capacity": "1KiB", "backend": {"type": "gpu"}, **change}
        with pytest.raises(ConfigError, match=said):
            load({"tiers": [gpu, {"name": "dram", "capacity": "1GiB", "backend": {"type": "cpu"}}]})


def test_when_assembly_fails_later_nothing_is_left_open(cuda: FakeCuda, layout: KVLayout, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bad = TierConfig(name="disk", capacity=1 << 20, backend={"type": "gds", "path": str(tmp_path / "file")})
    refused(layout, hbm(), dram(), bad)
    assert not [thread for thread in threading.enumerate() if thread.name == "hbm-device"]


def test_lmcachectl_check_sends_chunks_through_it(
    cuda: FakeCuda, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = {"name": "hbm", "capacity": "4MiB", "backend": {"type": "gpu", "spare": 0}}
    memory = {"name": "dram", "capacity": "64MiB", "backend": {"type": "cpu"}}
    file = tmp_path / "lmcache.yaml"
    file.write_text(json.dumps({"tiers": [gpu, memory]}))
    assert cli.main(["check", str(file)]) == 0
    hbm, dram = capsys.readouterr().out.splitlines()[2:4]
    assert hbm.split()[:3] == ["hbm", "gpu", "ok"] and "8 slots of 512 KiB on GPU 0" in hbm and "ok" in dram
    cuda.devices = 0
    assert cli.main(["check", str(file)]) == 1
    hbm, dram = capsys.readouterr().out.splitlines()[2:4]
    assert "FAILED" in hbm and "the driver lists none" in hbm and "ok" in dram


# -- host memory -------------------------------------------------------------------------------------------------
def test_host_memory_is_taken_near_the_gpu(
    cuda: FakeCuda, layout: KVLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = tmp_path / cuda.node
    near.mkdir()
    (near / "numa_node").write_text("0\n")
    asked: list[int] = []
    prefer = cpu_module._prefer
    monkeypatch.setattr(cpu_module, "PCI", tmp_path)
    monkeypatch.setattr(cpu_module, "_prefer", lambda at, n, node: asked.append(node) or prefer(at, n, node))
    context = BuildContext("dram", PLACE, None, 1, gpu=1)

    def remark(config: CpuConfig) -> str:
        memory = config.build(context)
        region = memory.allocate(1 << 20)
        memory.close()
        assert region.pinned
        return region.remark

    assert remark(CpuConfig()) == "" and asked == [0]
    assert remark(CpuConfig(shared=True, numa_node=1000)).startswith("not taken from NUMA node 1000: ")
    (near / "numa_node").write_text("-1\n")
    assert remark(CpuConfig()) == "" and asked == [0, 1000], "the machine does not say"


# -- the contract of every memory backend ------------------------------------------------------------------------
class TestGpuMemory(MemoryBackendTests):
    @pytest.fixture
    def open_memory(self, cuda: FakeCuda) -> Any:
        return GPU.build


def test_discard_says_so_when_a_device_was_not_done(cuda: FakeCuda, pipelines: Make) -> None:
    pipeline = pipelines(tier())
    cuda.gate.clear()
    pipeline.store(keys(2), lambda room: room.on_device(0))
    try:
        with pytest.raises(BackendError, match="hbm"):
            pipeline.discard(keys(2), timeout=0.1)
    finally:
        cuda.gate.set()


def test_an_event_that_cannot_be_made_at_release_serves_no_wrong_bytes(
    cuda: FakeCuda, pipelines: Make, engine: Callable[[Pipeline], Engine]
) -> None:
    pipeline = pipelines(places=2, slots=4)
    gpu, names = engine(pipeline), keys(2)
    store(pipeline, names)
    lease = pipeline.retrieve(names)
    with suppress(CudaError):
        gpu.check(lease)  # queued on the stream, not run yet
    cuda.fail["event_create"] = NO_MEMORY  # a device as full as engines like it; no launch was lost
    lease.release()
    cuda.fail.clear()
    store(pipeline, keys(4, 100))  # takes the slots, if they are free
    other = engine(pipeline)
    with suppress(CudaError), pipeline.retrieve(keys(4, 100)[:2]) as lease:
        other.check(lease)
    other.finish()
    gpu.finish()  # compares every byte
    assert gpu.read == 2


def test_an_event_that_cannot_be_made_at_commit_lets_no_late_write_into_other_chunks(
    cuda: FakeCuda, pipelines: Make, engine: Callable[[Pipeline], Engine]
) -> None:
    pipeline = pipelines(places=2, slots=4)
    gpu, names = engine(pipeline), keys(4)
    room = pipeline.reserve(names)
    gpu.write(names, room)  # 2 into places, 2 straight into slots; queued
    cuda.fail["event_create"] = NO_MEMORY
    room.commit()
    cuda.fail.clear()
    others = keys(4, 100)
    stored = store(pipeline, others)
    gpu.finish()
    with pipeline.retrieve(others[:stored]) as lease:
        wrong = [
            i for i, key in enumerate(lease.keys) if bytes(lease.view(i)) != chunk(key, pipeline.layout.chunk_bytes)
        ]
    assert not wrong, f"chunks {wrong} of another prefix were overwritten, and are served"
