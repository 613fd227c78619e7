"""Eight threads on one pipeline over media that fail, and what is left afterwards: nothing; and nothing has grown."""

from __future__ import annotations

import gc
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from time import monotonic
from typing import Any

import pytest
from chunks import OBJECT, chunk, keys, store, tier, verify
from conftest import BuildPipeline

from lmcache_core.config import LaneConfig
from lmcache_core.errors import BackendError
from lmcache_core.pipeline import Lease, Pipeline
from lmcache_core.testing.faults import FaultInjector, Rates
from lmcache_core.testing.invariants import settle
from lmcache_core.testing.memory import DictConfig
from lmcache_serde.zstd import ZstdConfig

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("quick_breaker")]

STRESS_S = 2.5
LANE = LaneConfig(threads=2, queue=8, deadline=0.1)
RATES = Rates(
    error=0.02, late_error=0.02, slow=0.1, slow_s=0.001, refuse=0.02, no_space=0.03, lost_put=0.02, torn_put=0.02,
    lost_get=0.02, flip=0.03, truncate=0.02, zero_tail=0.02, misdirect=0.03, hang=0.002, lie=0.02,
)  # fmt: skip
PREFIXES = [keys(12, start) for start in range(0, 240, 12)]


class User:
    """An engine that does random things; every byte it is given is checked."""

    def __init__(self, pipeline: Pipeline, seed: int) -> None:
        self._pipeline = pipeline
        self._rng = random.Random(seed)
        self._held: list[Lease] = []

    def act(self) -> None:
        """Do one thing."""
        pipeline, rng = self._pipeline, self._rng
        names = rng.choice(PREFIXES)[: rng.randint(1, 12)]
        action = rng.randrange(9)
        if action <= 1:
            store(pipeline, names)
        elif action == 2:
            with pipeline.retrieve(names, rng.choice([None, 0.001])) as lease:
                verify(pipeline, lease)
        elif action == 3:
            self._held.append(pipeline.retrieve(names))
        elif action == 4:
            pipeline.prefetch(names)
            pipeline.lookup(names).wait(0.001)
        elif action == 5:
            transfer = pipeline.fetch(names)
            if rng.random() < 0.5:
                transfer.wait(0.002)
            transfer.cancel()
        elif action == 6:
            with pipeline.reserve(names) as reservation:
                for i, position in enumerate(reservation.positions):
                    reservation.view(i)[:] = chunk(names[position], pipeline.layout.chunk_bytes)
                if rng.random() < 0.5:
                    reservation.commit()
        elif action == 7 and rng.random() < 0.1:
            with suppress(BackendError):
                pipeline.clear(rng.choice([None, "dram", "near", "far"]))
        else:
            pipeline.stats()
            pipeline.check()
        self.release(rng.randrange(3))

    def release(self, keep: int) -> None:
        """Release all but `keep` leases; their bytes are still the same, whatever happened since."""
        while len(self._held) > keep:
            lease = self._held.pop(self._rng.randrange(len(self._held)))
            verify(self._pipeline, lease)
            lease.release()


CASES: dict[str, Callable[[], list[Any]]] = {
    "disk and remote": lambda: [
        tier("near", capacity=60 * OBJECT, lane=LANE),
        tier("far", write="back", lane=LANE, backend=DictConfig(scannable=False, local=False)),
    ],
    "back and encoded": lambda: [
        tier("near", write="back", capacity=50 * OBJECT, lane=LANE),
        tier("far", serde=ZstdConfig(), capacity=150 * OBJECT, lane=LANE),
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_eight_threads(pipelines: BuildPipeline, case: str) -> None:
    injector = FaultInjector({"near": RATES, "far": RATES}, seed=5)
    pipeline = pipelines(
        *CASES[case](), slots=64, staging=1 << 17, injector=injector, verify="serve" if "encoded" in case else "load"
    )
    errors: list[BaseException] = []
    end = monotonic() + STRESS_S

    def run(seed: int) -> None:
        user = User(pipeline, seed)
        try:
            while monotonic() < end and not errors:
                user.act()
            user.release(0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        threading.Event().wait(0.05)
        injector.release()
    if errors:
        raise errors[0]
    while not all(t.read_lane.drain(0.05) and t.write_lane.drain(0.05) for t in pipeline.tiers):
        injector.release()
    injector["near"].rates = injector["far"].rates = Rates()
    settle(pipeline)
    stats = pipeline.stats()
    assert all(stats["hits"].values()), stats["hits"]
    assert stats["quarantined"] > 0 and stats["stored"] > 100
    for name in ("near", "far"):
        assert {"error", "flip", "misdirect", "no_space"} <= {f for f, n in injector[name].counts.items() if n}


def containers(thing: Any) -> Iterator[tuple[str, int]]:
    """Sizes of every container an object holds, by name."""
    for name, value in vars(thing).items():
        if isinstance(value, (dict, set, list, bytearray)) or hasattr(value, "maxlen"):
            yield f"{type(thing).__name__}.{name}", len(value)


def sizes(pipeline: Pipeline) -> dict[str, int]:
    found = dict(containers(pipeline)) | dict(containers(pipeline.slots))
    for storage in pipeline.tiers:
        for part in (storage, storage.read_lane, storage.write_lane, storage.policy):
            found |= {f"{storage.name}.{name}": size for name, size in containers(part)}
    return found


def test_nothing_grows(pipelines: BuildPipeline) -> None:
    """After warm-up, thousands of operations over ever new keys leave every container and the heap as they were."""
    lane = LaneConfig(threads=2, deadline=30.0, lookup_deadline=15.0)
    pipeline = pipelines(
        tier("near", capacity=30 * OBJECT, lane=lane),
        tier("far", write="back", capacity=40 * OBJECT, lane=lane),
        slots=32,
    )  # fmt: skip
    number = 0

    def work(rounds: int) -> None:
        nonlocal number
        for _ in range(rounds):
            names = keys(6, number)
            number += 6
            store(pipeline, names)
            with pipeline.retrieve(names) as lease:
                verify(pipeline, lease)
            if number > 60:
                pipeline.prefetch(keys(6, number - 60))
            pipeline.fetch(keys(3, number + 10**9)).cancel()
            pipeline.lookup(names)
            assert pipeline.flush(10)

    # Everything full: slots, both tiers, and the breakers' window.
    work(250)
    settle(pipeline)
    gc.collect()
    before = sizes(pipeline)
    tracemalloc.start()
    work(50)
    settle(pipeline)
    gc.collect()
    first = tracemalloc.get_traced_memory()[0]
    work(250)
    settle(pipeline)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    after = sizes(pipeline)
    for name, size in after.items():
        assert size <= before[name] + 2, f"{name} grew from {before[name]} to {size}"
    assert grown < 64 << 10, f"the heap grew by {grown} bytes over 1,500 chunks"
