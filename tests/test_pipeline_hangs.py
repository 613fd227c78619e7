"""A medium that hangs for ever: the caller is free at its deadline, engine calls never wait, other tiers go on, the
breaker opens and recovers, `close` returns, and the process can exit."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from math import inf
from time import monotonic
from typing import Any

import pytest
from chunks import OBJECT, fill, keys, serve, store, tier, verify
from conftest import BuildPipeline

from lmcache_core import pipeline as pipeline_module
from lmcache_core.config import LaneConfig
from lmcache_core.errors import BackendError
from lmcache_core.handles import Locate
from lmcache_core.lanes import Breaker
from lmcache_core.pipeline import Pipeline
from lmcache_core.testing.faults import FaultInjector, Rates
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import DictConfig
from lmcache_core.types import ChunkKey, MissReason

pytestmark = pytest.mark.timeout(60)

PROMPT_S = 1.0
"""Far more than any call that does not wait takes, far less than the minute that a held medium hangs."""

QUICK = LaneConfig(threads=2, deadline=0.1)
PATIENT = LaneConfig(threads=2, deadline=30.0, lookup_deadline=15.0)
ALL_METHODS = ("contains", "get_into", "put_from", "delete")


class Stopwatch:
    """The longest that any of some calls took."""

    def __init__(self) -> None:
        self.longest = 0.0

    def __call__(self, call: Callable[..., Any], *arguments: Any) -> Any:
        begin = monotonic()
        result = call(*arguments)
        self.longest = max(self.longest, monotonic() - begin)
        return result


def remote() -> DictConfig:
    return DictConfig(scannable=False, local=False)


def filled(pipelines: BuildPipeline, *tiers: Any, names: Sequence[ChunkKey], **options: Any) -> Pipeline:
    """A pipeline whose storage tiers have the chunks and whose memory has none."""
    pipeline = pipelines(*tiers, **options)
    store(pipeline, names)
    settle(pipeline)
    pipeline.clear("dram")
    return pipeline


@pytest.mark.parametrize("backend", [DictConfig, remote], ids=["local", "remote"])
@pytest.mark.parametrize("write", ["through", "back"])
def test_engine_calls_never_wait_for_a_hung_tier(pipelines: BuildPipeline, backend: Any, write: Any) -> None:
    injector = FaultInjector({"store": Rates()})
    names = keys(6)
    config = tier(backend=backend(), write=write, lane=QUICK)
    pipeline = filled(pipelines, config, names=names, injector=injector, slots=32)
    injector["store"].hold(*ALL_METHODS)
    watch = Stopwatch()
    transfers = []
    end = monotonic() + 1.0
    counts: list[int] = []
    while monotonic() < end:
        watch(pipeline.lookup, names)
        transfers.append(watch(pipeline.fetch, names))
        watch(pipeline.prefetch, keys(4, 50))
        new = keys(4, 100 + 4 * len(counts))
        reservation = watch(pipeline.reserve, new)
        fill(new)(reservation)
        counts.append(watch(reservation.commit))
        watch(pipeline.stats)
        watch(pipeline.check)
        if len(transfers) > 20:
            watch(transfers.pop(0).cancel)
    assert watch.longest < PROMPT_S
    assert counts[-1] == 4, "and memory goes on taking chunks"
    for transfer in transfers:
        transfer.cancel()


@pytest.mark.parametrize("method, backend", [("get_into", DictConfig), ("get_into", remote), ("contains", remote)])
def test_the_caller_is_free_at_its_deadline(pipelines: BuildPipeline, method: str, backend: Any) -> None:
    injector = FaultInjector({"store": Rates()})
    names = keys(3)
    pipeline = filled(pipelines, tier(backend=backend(), lane=QUICK), names=names, injector=injector)
    injector["store"].hold(method)
    watch = Stopwatch()
    with watch(pipeline.retrieve, names) as lease:
        assert len(lease) == 0 and lease.reason is MissReason.DEADLINE
    assert watch.longest < 0.1 + PROMPT_S
    with watch(pipeline.retrieve, keys(3, 50), 0.01) as lease:
        assert len(lease) == 0


@pytest.mark.parametrize("healthy", [False, True], ids=["alone", "beside a healthy tier"])
def test_a_question_has_a_deadline_of_its_own(pipelines: BuildPipeline, healthy: bool) -> None:
    """Half a minute for a read, a twentieth of a second to say what there is to read."""
    injector = FaultInjector({"store": Rates(), "other": Rates()})
    names = keys(3)
    lane = LaneConfig(threads=1, deadline=30.0, lookup_deadline=0.05)
    others = [tier("other", lane=PATIENT)] if healthy else []
    pipeline = filled(pipelines, tier(backend=remote(), lane=lane), *others, names=names, injector=injector)
    injector["store"].hold("contains")
    expected = ["other"] * 3 if healthy else []
    for _ in range(2):
        watch = Stopwatch()
        hit = pipeline.lookup(names)
        assert watch(hit.wait, 30.0) and hit.sources == expected and not hit.pending
        with watch(pipeline.retrieve, names) as lease:
            assert lease.sources == expected
            assert healthy or lease.reason in (MissReason.DEADLINE, MissReason.BREAKER)
        assert watch.longest < 0.05 + PROMPT_S
        pipeline.clear("dram")
    stats = pipeline.stats()["tiers"]["store"]["breakers"]
    assert stats["lookup"]["state"] == "open" and stats["lookup"]["trips"] == 1 and stats["lookup"]["for_s"] >= 0
    assert stats["read"] == stats["write"] == {"state": "closed", "trips": 0, "for_s": None}


def test_an_engine_that_polls_is_free_at_the_deadline_of_the_question(pipelines: BuildPipeline) -> None:
    """Also behind questions that hang, and with nobody waiting in `wait`."""
    injector = FaultInjector({"store": Rates()})
    lane = LaneConfig(threads=1, deadline=30.0, lookup_deadline=0.1)
    pipeline = filled(pipelines, tier(backend=remote(), lane=lane), names=keys(3), injector=injector)
    injector["store"].hold("contains")
    transfers = [pipeline.fetch(keys(3)) for _ in range(4)]
    begin = monotonic()
    while not all(transfer.done for transfer in transfers):
        assert monotonic() < begin + 0.1 + PROMPT_S
    for transfer in transfers:
        with transfer.result() as lease:
            assert len(lease) == 0 and lease.reason is MissReason.DEADLINE


def test_the_deadline_of_a_question_is_kept_to_the_moment(
    pipelines: BuildPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only when somebody looks for overdue work, nor later because the question began late."""
    monkeypatch.setattr("lmcache_core.handles._SWEEP_S", 20.0)
    injector = FaultInjector({"store": Rates()})
    lane = LaneConfig(threads=1, deadline=30.0, lookup_deadline=0.05)
    pipeline = filled(pipelines, tier(backend=remote(), lane=lane), names=keys(3), injector=injector)
    injector["store"].hold("contains")
    watch = Stopwatch()
    assert watch(pipeline.lookup(keys(3)).wait, 30.0)
    assert watch(serve, pipeline, keys(3)) == []
    monkeypatch.setattr(pipeline.tiers[0], "sweep", lambda: None)
    transfer = pipeline.fetch(keys(3, 50))
    begin = monotonic()
    while not transfer.done:
        assert monotonic() < begin + PROMPT_S
    transfer.cancel()
    assert watch.longest < PROMPT_S


def test_tiers_that_are_late_are_given_up_one_by_one() -> None:
    answers: list[Locate] = []
    found = Locate(3, 2, answers.append)
    found.expect(1, 10.0)
    found.expect(2, 20.0)
    assert not found.immediate and found.expire(9.9) == 10.0
    found.answer(0, [True, False])
    assert found.expire(10.0) == 20.0 and found.reason is MissReason.DEADLINE and not answers
    found.answer(1, [True, True])
    assert found.expire(30.0) == inf and answers == [found] and found.event.is_set()
    assert found.present == [[True, False], [False, False], [False, False]], "an answer that comes too late is ignored"


def test_a_question_does_not_wait_for_reads_that_hang(pipelines: BuildPipeline) -> None:
    injector = FaultInjector({"store": Rates()})
    lane = LaneConfig(threads=1, deadline=30.0, lookup_deadline=10.0)
    pipeline = filled(pipelines, tier(backend=remote(), lane=lane), names=keys(3), injector=injector)
    injector["store"].hold("get_into")
    reading = pipeline.fetch(keys(3))
    injector["store"].wait_held()
    watch = Stopwatch()
    hit = pipeline.lookup(keys(5))
    assert watch(hit.wait, 30.0) and hit.count == 3
    assert watch.longest < PROMPT_S
    reading.cancel()


def test_the_callers_own_timeout_is_kept_and_the_read_goes_on(pipelines: BuildPipeline) -> None:
    injector = FaultInjector({"store": Rates()})
    names = keys(3)
    pipeline = filled(pipelines, tier(lane=PATIENT), names=names, injector=injector)
    injector["store"].hold("get_into")
    watch = Stopwatch()
    with watch(pipeline.retrieve, names, 0.02) as lease:
        assert len(lease) == 0 and lease.reason is MissReason.DEADLINE
    assert watch.longest < PROMPT_S
    injector.release()
    settle(pipeline)
    assert serve(pipeline, names) == ["dram"] * 3


def test_a_late_arrival_is_cached_not_lost(pipelines: BuildPipeline) -> None:
    injector = FaultInjector({"store": Rates()})
    names = keys(3)
    pipeline = filled(pipelines, tier(lane=QUICK), names=names, injector=injector)
    injector["store"].hold("get_into")
    assert serve(pipeline, names) == []
    assert pipeline._reading == 3, "the medium may still write there: the slots belong to it"
    injector.release()
    settle(pipeline)
    assert serve(pipeline, names) == ["dram"] * 3


@pytest.mark.parametrize("method", ["get_into", "contains"])
def test_other_tiers_go_on(pipelines: BuildPipeline, method: str) -> None:
    """The healthy tier serves what it has, at once where the hung one need not be asked, else within the deadline."""
    injector = FaultInjector({"hung": Rates(), "healthy": Rates()})
    names = keys(6)
    pipeline = filled(
        pipelines, tier("hung", backend=remote(), lane=QUICK), tier("healthy", lane=PATIENT),
        names=names, injector=injector, slots=32,
    )  # fmt: skip
    injector["hung"].hold(*ALL_METHODS) if method == "contains" else injector["hung"].hold("get_into", "put_from")
    sources: list[list[str]] = []
    watch = Stopwatch()
    for _ in range(12):
        sources.append(watch(serve, pipeline, names))
        pipeline.clear("dram")
        if sources[-1] == ["healthy"] * 6:
            break
    assert sources[-1] == ["healthy"] * 6
    if method == "contains":
        assert len(sources) == 1, "the very first request gets what the healthy tier has"
    assert watch.longest < 2.0
    assert store(pipeline, keys(4, 50)) == 4
    assert pipeline.tiers[1].write_lane.drain(10)
    assert injector["healthy"].inner.contains(keys(4, 50)) == [True] * 4


@pytest.mark.parametrize("method, backend", [("get_into", DictConfig), ("get_into", remote), ("contains", remote)])
def test_the_breaker_opens_at_the_third_missed_deadline(pipelines: BuildPipeline, method: str, backend: Any) -> None:
    injector = FaultInjector({"store": Rates()})
    names = keys(6)
    lane = LaneConfig(threads=4, deadline=0.3)
    pipeline = filled(pipelines, tier(backend=backend(), lane=lane), names=names, injector=injector)
    injector["store"].hold(method)
    reasons = []
    for key in names:  # each of another chunk: the same would be known to be overdue
        with pipeline.retrieve([key]) as lease:
            reasons.append(lease.reason)
    assert reasons == [MissReason.DEADLINE] * 3 + [MissReason.BREAKER] * 3
    assert pipeline.stats()["tiers"]["store"]["read_paused"]
    assert pipeline.lookup(names).reason in (MissReason.BREAKER, MissReason.DEADLINE)


def test_the_breaker_opens_though_nobody_waits(pipelines: BuildPipeline) -> None:
    """Hints and cancelled requests only: the calls that hang are seen by whatever the engine does next."""
    injector = FaultInjector({"store": Rates()})
    names = keys(6)
    pipeline = filled(
        pipelines, tier(lane=LaneConfig(threads=3, deadline=0.05)), names=names, injector=injector, slots=16
    )
    injector["store"].hold("get_into")
    for key in names[:3]:
        pipeline.prefetch([key])
    injector["store"].wait_held(3)
    threading.Event().wait(0.1)
    assert pipeline.retrieve(names[3:]).reason is MissReason.BREAKER


def test_a_hung_write_opens_the_write_breaker_only(pipelines: BuildPipeline) -> None:
    injector = FaultInjector({"store": Rates()})
    names = keys(3)
    pipeline = filled(
        pipelines, tier(lane=LaneConfig(threads=1, deadline=0.05)), names=names, injector=injector, slots=32
    )
    injector["store"].hold("put_from")
    for i in range(50, 53):
        store(pipeline, keys(1, i))
    threading.Event().wait(0.1)
    store(pipeline, keys(1, 60))
    stats = pipeline.stats()["tiers"]["store"]
    assert stats["write_paused"] and not stats["read_paused"]
    assert serve(pipeline, names) == ["store"] * 3, "a full or hung writer still reads"


def test_a_medium_that_heals_is_used_again_after_one_probe(
    pipelines: BuildPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Breaker, "PAUSE_S", (0.05, 0.2))
    injector = FaultInjector({"store": Rates()})
    names = keys(8)
    pipeline = filled(pipelines, tier(lane=LaneConfig(threads=1, deadline=0.1)), names=names, injector=injector)
    injector["store"].hold("get_into")
    for key in names[:3]:
        assert serve(pipeline, [key]) == []
    breaker = pipeline.tiers[0].read_lane.breaker
    assert breaker.open
    injector.release()
    assert pipeline.tiers[0].read_lane.drain(10)
    end = monotonic() + 20
    while serve(pipeline, names) != ["store"] * 8 and monotonic() < end:
        pipeline.clear("dram")
        threading.Event().wait(0.02)
    assert not breaker.open and not pipeline.stats()["tiers"]["store"]["read_paused"]


def test_a_probe_that_hangs_is_lost_and_another_follows(
    pipelines: BuildPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Breaker, "PAUSE_S", (0.05, 0.05))
    injector = FaultInjector({"store": Rates()})
    names = keys(8)
    pipeline = filled(pipelines, tier(lane=LaneConfig(threads=6, deadline=0.05)), names=names, injector=injector)
    injector["store"].hold("get_into")
    breaker = pipeline.tiers[0].read_lane.breaker
    end = monotonic() + 20
    seen = 0
    for i in range(10_000):
        if breaker.trips >= 3 or monotonic() > end:
            break
        pipeline.prefetch([names[i % 8]])  # nobody waits for any of them
        threading.Event().wait(0.01)
        seen = max(seen, breaker.trips)
    assert breaker.trips >= 3, "opened, and two probes were lost"
    assert breaker.open


def test_a_queue_that_is_only_long_does_not_open_the_breaker(pipelines: BuildPipeline) -> None:
    """Saturation is not failure: reads that waited too long behind good ones are misses, and that is all."""
    injector = FaultInjector({"store": Rates(slow=1.0, slow_s=0.03)})
    names = keys(40)
    pipeline = pipelines(tier(lane=LaneConfig(threads=1, deadline=0.1)), slots=64, injector=injector)
    for at in range(0, 40, 4):
        store(pipeline, names[at : at + 4])
        assert pipeline.flush(10)
    pipeline.clear("dram")
    transfers = [pipeline.fetch([key]) for key in names]
    reasons = [transfer.result().reason for transfer in transfers]
    assert MissReason.DEADLINE in reasons and MissReason.BREAKER not in reasons
    assert not pipeline.tiers[0].read_lane.breaker.open
    for transfer in transfers:
        transfer.cancel()
    for key in names:
        serve(pipeline, [key])
    _release_all(pipeline)


def _release_all(pipeline: Pipeline) -> None:
    """The leases above were dropped without a release: give their pins back."""
    with pipeline._lock:
        pipeline.slots.unpin([slot for slot, pins in enumerate(pipeline.slots.pins) for _ in range(pins)])


def test_memory_is_not_eaten_by_a_hung_tier(pipelines: BuildPipeline) -> None:
    """Reads and writes that hang keep their slots: at most what the lanes may hold, whatever is asked meanwhile."""
    injector = FaultInjector({"store": Rates()})
    names = keys(30)
    pipeline = pipelines(tier(lane=LaneConfig(threads=1, deadline=0.05)), slots=32, injector=injector)
    for key in names:
        store(pipeline, [key])
        assert pipeline.flush(10)
    pipeline.clear("dram")
    injector["store"].hold("get_into", "put_from")
    for key in names:
        pipeline.prefetch([key])
        store(pipeline, keys(1, 1000))
    threading.Event().wait(0.15)
    free = []
    for i in range(50):
        free.append(store(pipeline, keys(16, 2000 + 16 * i)))
    assert min(free) == 16, "half of memory at least is for those whose tier works"


# -- clear, flush, close -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", [DictConfig, remote], ids=["local", "remote"])
def test_clear_returns_though_a_medium_hangs(
    pipelines: BuildPipeline, monkeypatch: pytest.MonkeyPatch, backend: Any
) -> None:
    monkeypatch.setattr(pipeline_module, "CLEAR_S", 0.1)
    injector = FaultInjector({"hung": Rates(), "healthy": Rates()})
    names = keys(3)
    hung, healthy = tier("hung", backend=backend(), lane=QUICK), tier("healthy", lane=QUICK)
    pipeline = filled(pipelines, hung, healthy, names=names, injector=injector)
    injector["hung"].hold("clear")
    watch = Stopwatch()
    with pytest.raises(BackendError, match=r"out of service.*hung \(no answer\)"):
        watch(pipeline.clear)
    assert watch.longest < 0.1 + PROMPT_S
    assert serve(pipeline, names) == [], "nothing of it is served, whatever the medium does"
    assert injector["healthy"].inner.usage().objects == 0
    store(pipeline, names)
    settle(pipeline)
    injector.release()
    pipeline.clear("hung")
    assert pipeline.lookup(names).sources == ["dram"] * 3


def test_flush_gives_up(pipelines: BuildPipeline) -> None:
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(write="back", lane=PATIENT), injector=injector)
    injector["store"].hold("put_from")
    store(pipeline, keys(2))
    watch = Stopwatch()
    assert not watch(pipeline.flush, 0.1)
    assert watch.longest < 0.1 + PROMPT_S
    injector.release()
    assert pipeline.flush(10)


@pytest.mark.parametrize("methods", [("get_into", "put_from", "contains"), ("close",), ("put_from", "close")])
def test_close_returns_within_its_timeout(pipelines: BuildPipeline, methods: tuple[str, ...]) -> None:
    injector = FaultInjector({"hung": Rates(), "healthy": Rates()})
    names = keys(4)
    objects: dict[ChunkKey, bytes] = {}
    pipeline = filled(
        pipelines, tier("hung", lane=PATIENT),
        tier("healthy", write="back", backend=DictConfig(objects=objects), lane=PATIENT),
        names=names, injector=injector, slots=32,
    )  # fmt: skip
    gate = threading.Event()
    if "close" in methods:
        injector["hung"].inner.close = lambda: gate.wait(30)  # type: ignore[assignment, return-value]
    injector["hung"].hold(*methods)
    transfer = pipeline.fetch(names)
    store(pipeline, keys(4, 50))
    watch = Stopwatch()
    watch(pipeline.close, 0.4)
    assert watch.longest < 0.4 + PROMPT_S
    gate.set()
    injector.release()
    transfer.cancel()
    assert [key in objects for key in keys(4, 50)] == [True] * 4, "what can be written down still is"


EXIT = """
import os, sys, threading, time
from lmcache_backends.cpu import CpuConfig
from lmcache_core.build import build
from lmcache_core.config import LaneConfig, PipelineConfig, TierConfig
from lmcache_core.layout import KVLayout
from lmcache_core.testing.memory import DictBackend, DictConfig

how, close = sys.argv[1], sys.argv[2] == "close"
never, _ = os.pipe()

class Hung(DictBackend):
    def hang(self):
        while True:
            {"sleep": lambda: time.sleep(1e6), "read": lambda: os.read(never, 1),
             "lock": lambda: threading.Event().wait()}[how]()
    def get_into(self, keys, buffers): self.hang()
    def put_from(self, keys, buffers): self.hang()
    def contains(self, keys): self.hang()
    def close(self): self.hang()

class HungConfig(DictConfig):
    def build(self, context): return Hung({}, scannable=False, local=False)

layout = KVLayout("lknhd", "bfloat16", 2, 2, 1, 8, 16, 4)
lane = LaneConfig(threads=2, deadline=0.2)
config = PipelineConfig(chunk_tokens=16, tiers=(
    TierConfig(name="dram", capacity=1 << 20, backend=CpuConfig()),
    TierConfig(name="store", backend=HungConfig(), lane=lane),
))
pipeline = build(config, layout)
pipeline.store([bytes(32), bytes([1]) * 32], lambda room: None)
begin = time.monotonic()
lease = pipeline.retrieve([bytes(32), bytes([9]) * 32])
assert len(lease) == 1 and time.monotonic() - begin < 1.5, time.monotonic() - begin
if close:
    begin = time.monotonic()
    pipeline.close(0.5)
    assert time.monotonic() - begin < 1.5, time.monotonic() - begin
print("done", flush=True)
"""


@pytest.mark.parametrize("how, close", [("sleep", "close"), ("read", "no close"), ("lock", "no close")])
def test_the_process_exits_after_a_hang(how: str, close: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", EXIT, how, close], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stderr is not None
        line = child.stdout.readline()
        begin = monotonic()
        child.wait(30)
        assert monotonic() - begin < 2.0
        assert (line, child.returncode) == (b"done\n", 0), child.stderr.read().decode()
    finally:
        child.kill()
        child.communicate()


def test_a_lease_taken_before_the_hang_stays_good(pipelines: BuildPipeline) -> None:
    injector = FaultInjector({"store": Rates()})
    pipeline = pipelines(tier(lane=QUICK, capacity=40 * OBJECT), injector=injector, slots=16)
    names = keys(4)
    store(pipeline, names)
    with pipeline.retrieve(names) as lease:
        injector["store"].hold(*ALL_METHODS)
        for i in range(20):
            store(pipeline, keys(4, 100 + 4 * i))
            serve(pipeline, keys(4, 5000 + i), timeout=0.01)
        assert verify(pipeline, lease) == 4
