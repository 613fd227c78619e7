"""Masters and nodes that die, hang and come back under a pipeline: no wrong byte, no long call, no restart."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from time import monotonic, sleep

import pytest
from lmcache_backend_mooncake import MooncakeBackend, MooncakeConfig
from lmcache_backend_mooncake.rig import Cluster, missing

from lmcache_backends.cpu import CpuConfig
from lmcache_core.build import build
from lmcache_core.config import PipelineConfig, TierConfig
from lmcache_core.lanes import Breaker
from lmcache_core.layout import KVLayout
from lmcache_core.pipeline import Pipeline, Reservation
from lmcache_core.protocols import BuildContext
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import aligned
from lmcache_core.testing.storage import key_of, new_object
from lmcache_core.types import ChunkKey, object_bytes, round_up

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(bool(missing()), reason=missing())]

LAYOUT = KVLayout("lknhd", "bfloat16", 4, 2, 4, 64, chunk_tokens=64, block_tokens=16)
"""Chunks of 256 KiB."""

DEADLINE_S = 5.0
SLACK_S = 1.0
"""For a machine of two cores that others use."""

NODE_BYTES = 256 << 20
SLOTS = 16
CHAIN = 4
CHAINS = 12


def chain(number: int) -> list[ChunkKey]:
    return [ChunkKey(b"mooncake-faults!" + (number * CHAIN + i).to_bytes(16, "big")) for i in range(CHAIN)]


def chunk(key: ChunkKey) -> bytes:
    return Random(key).randbytes(LAYOUT.chunk_bytes)


TRUTH = {key: chunk(key) for number in range(CHAINS) for key in chain(number)}


def store(pipeline: Pipeline, keys: Sequence[ChunkKey]) -> None:
    def fill(reservation: Reservation) -> None:
        for i, position in enumerate(reservation.positions):
            reservation.view(i)[:] = TRUTH[keys[position]]

    pipeline.store(keys, fill)


class Engine:
    """Threads that retrieve and store chains, and look at every byte."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.served: Counter[str] = Counter()
        self.longest = 0.0
        self.failures: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(seed,)) for seed in range(3)]

    def _work(self, seed: int) -> None:
        random = Random(seed)
        try:
            while not self._stop.is_set():
                keys = chain(random.randrange(CHAINS))
                begin = monotonic()
                with self.pipeline.retrieve(keys) as lease:
                    self.longest = max(self.longest, monotonic() - begin)
                    for i, key in enumerate(lease.keys):
                        assert bytes(lease.view(i)) == TRUTH[key], "wrong bytes"
                    self.served.update(lease.sources)
                if len(lease) < len(keys):
                    begin = monotonic()
                    store(self.pipeline, keys)
                    self.longest = max(self.longest, monotonic() - begin)
                sleep(0.002)
        except BaseException as error:
            self.failures.append(error)

    def __enter__(self) -> Engine:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if error[0] is None and self.failures:
            raise self.failures[0]

    def goes_on(self, chunks: int = 30, source: str = "store") -> None:
        """Wait until so many more chunks came from there."""
        before = self.served[source]
        eventually(lambda: bool(self.failures) or self.served[source] >= before + chunks)


def eventually(reached: Callable[[], bool], seconds: float = 40.0) -> None:
    end = monotonic() + seconds
    while not reached():
        assert monotonic() < end, "did not happen"
        sleep(0.01)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        cluster.start_master()
        cluster.start_nodes(2, NODE_BYTES)
        yield cluster


@contextmanager
def engine(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine at work over a memory too small for what it works on; in the end all books must add up."""
    monkeypatch.setattr(Breaker, "PAUSE_S", (0.05, 1.0))
    slot = round_up(object_bytes(LAYOUT.chunk_bytes))
    config = PipelineConfig(
        chunk_tokens=LAYOUT.chunk_tokens,
        tiers=(
            TierConfig(name="dram", capacity=SLOTS * slot, backend=CpuConfig(pin=False)),
            TierConfig(name="store", backend=MooncakeConfig(master=cluster.address)),
        ),
    )
    pipeline = build(config, LAYOUT, poison=True)
    try:
        backend = pipeline.tiers[0].backend
        assert isinstance(backend, MooncakeBackend)
        assert backend.is_registered(pipeline.slots.region.address, pipeline.slots.region.nbytes)
        with Engine(pipeline) as engine:
            engine.goes_on()
            yield engine
        assert engine.longest < DEADLINE_S + SLACK_S
        settle(pipeline)
    finally:
        pipeline.close()


def test_a_node_is_killed_and_replaced(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(cluster, monkeypatch) as at_work:
        _kill(cluster.nodes[0])
        at_work.goes_on(60)  # from the other one
        cluster.start_nodes(1, NODE_BYTES)
        _kill(cluster.nodes[1])
        at_work.goes_on(60)  # from the new one
    assert at_work.longest < DEADLINE_S


def test_objects_of_a_dead_node_are_misses_until_stored_anew(cluster: Cluster) -> None:
    """While the master still lists them, too; `contains` knows after the first try."""
    keys = [key_of(i) for i in range(16)]
    sealed = [new_object(key, 64 << 10) for key in keys]
    buffers = [aligned(64 << 10) for _ in keys]
    backend = MooncakeConfig(master=cluster.address).build(BuildContext("store", 64 << 10, None, 4))
    try:
        assert backend.put_from(keys, sealed) == [None] * 16
        _kill(cluster.nodes[0])
        found = backend.get_into(keys, buffers)
        assert set(found) == {None, 64 << 10}, "one half of the objects is gone, more or less"
        assert backend.contains(keys) == [got is not None for got in found]
        # Mooncake offers the dead node's room until the master knows: a put may fail, but it never pretends.
        left = {i for i, got in enumerate(found) if got is None}

        def stored() -> bool:
            some = sorted(left)
            put = backend.put_from([keys[i] for i in some], [sealed[i] for i in some])
            left.difference_update(i for i, result in zip(some, put, strict=True) if result is None)
            return not left

        eventually(stored)
        assert backend.contains(keys) == [True] * 16
        assert backend.get_into(keys, buffers) == [64 << 10] * 16
        assert buffers == sealed
    finally:
        backend.close()


def test_a_call_ends_in_time_however_much_it_asks_of_a_hung_node(cluster: Cluster) -> None:
    nbytes = 4 << 20
    keys = [key_of(i) for i in range(12)]
    buffers = [aligned(nbytes) for _ in keys]
    backend = MooncakeConfig(master=cluster.address).build(BuildContext("store", nbytes, None, 4, deadline=DEADLINE_S))
    try:
        assert backend.put_from(keys, [new_object(key, nbytes) for key in keys]) == [None] * 12
        for node in cluster.nodes:
            node.send_signal(signal.SIGSTOP)
        begin = monotonic()
        found = backend.get_into(keys, buffers)
        assert monotonic() - begin < DEADLINE_S + SLACK_S
        assert any("TRANSFER_FAIL (-800)" in str(got) for got in found)
        assert not any(isinstance(got, int) for got in found)
    finally:
        for node in cluster.nodes:
            node.send_signal(signal.SIGCONT)
        backend.close()


def test_a_node_hangs_and_wakes(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a hung node was sent before it is declared dead arrives when it wakes, in memory nobody uses for it."""
    with engine(cluster, monkeypatch) as at_work:
        node = cluster.nodes[0]
        node.send_signal(signal.SIGSTOP)
        try:
            at_work.goes_on(60)
        finally:
            node.send_signal(signal.SIGCONT)
        at_work.goes_on(60)


def test_the_master_is_killed_and_restarted(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(cluster, monkeypatch) as at_work:
        _kill(cluster.master)
        eventually(lambda: "does not answer" in at_work.pipeline.stats()["tiers"]["store"]["last_error"])
        at_work.goes_on(30, "dram")
        cluster.start_master()
        at_work.goes_on(60)


def test_the_master_hangs_and_wakes(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(cluster, monkeypatch) as at_work:
        cluster.master.send_signal(signal.SIGSTOP)
        try:
            eventually(lambda: "RPC_TIMEOUT" in at_work.pipeline.stats()["tiers"]["store"]["last_error"])
        finally:
            cluster.master.send_signal(signal.SIGCONT)
        at_work.goes_on(60)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
