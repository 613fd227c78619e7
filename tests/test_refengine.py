"""End to end: RefEngine over faulty tiers. 20,000 requests, no wrong byte, every miss with a reason, nothing left held.

And the oracle itself is tested: planted bugs must raise `WrongBytes`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from conftest import BuildPipeline

from lmcache_backends.gds import GdsConfig
from lmcache_core import seal
from lmcache_core.adapters._vllm_parts import Part
from lmcache_core.adapters._vllm_scheduler import Scheduler
from lmcache_core.adapters._vllm_wire import Copies, StepPlan
from lmcache_core.config import LaneConfig, TierConfig
from lmcache_core.errors import BackendError
from lmcache_core.identity import Identity
from lmcache_core.keys import chunk_keys
from lmcache_core.layout import KVLayout
from lmcache_core.pipeline import Pipeline
from lmcache_core.testing.faults import FaultInjector, Rates
from lmcache_core.testing.invariants import check_stats, settle
from lmcache_core.testing.memory import DictBackend, DictConfig
from lmcache_core.testing.refconnector import DirectConnector
from lmcache_core.testing.refengine import (
    EngineOptions,
    RefEngine,
    RefModel,
    Request,
    Traffic,
    Worker,
    WrongBytes,
)
from lmcache_core.types import HEADER_BYTES, ChunkKey, Got, object_bytes
from lmcache_serde.zstd import ZstdConfig

pytestmark = [pytest.mark.usefixtures("quick_breaker"), pytest.mark.timeout(120)]

DEFAULTS = EngineOptions()
LANE = LaneConfig(threads=2, deadline=10.0, lookup_deadline=5.0)
"""No deadline that a busy machine would miss, so that the tier is used and not paused."""
HASTY = LaneConfig(threads=2, deadline=0.05)
"""For tiers that hang."""
FLAKY = Rates(
    error=0.02, late_error=0.02, slow=0.05, slow_s=0.001, refuse=0.02, no_space=0.02, lost_put=0.02, torn_put=0.02,
    lost_get=0.02, flip=0.03, truncate=0.02, zero_tail=0.02, misdirect=0.03,
)  # fmt: skip
HANGING = replace(FLAKY, hang=0.002, lie=0.02)


@pytest.fixture
def layout() -> KVLayout:
    """Two heads, so that the page orders differ."""
    return KVLayout("lknhd", "bfloat16", 2, 2, 2, 4, chunk_tokens=16, block_tokens=4)


@pytest.fixture
def identities(identity: Identity) -> list[Identity]:
    """One model for three tenants, and another model: the same tokens must never be shared between them."""
    return [identity, replace(identity, salt="a"), replace(identity, salt="b"), replace(identity, model="other/model")]


@dataclass(frozen=True)
class Case:
    """One configuration of 20,000 requests in all."""

    name: str
    requests: int
    tiers: Callable[[Path], list[TierConfig]]
    rates: dict[str, Rates]
    slots: int = 40
    options: EngineOptions = DEFAULTS
    clear: float = 0.0
    """Steps that clear a tier, or all."""
    engines: int = 1
    staging: int = 0
    verify: str = "load"


def disk(path: Path, mode: Any = "segments", **options: Any) -> TierConfig:
    backend = GdsConfig(path=path / mode, mode=mode, free_floor="0B", io="auto")
    return TierConfig(name=mode, capacity=8 << 20, backend=backend, lane=LANE, **options)


def store(name: str = "store", objects: int = 120, **options: Any) -> TierConfig:
    return TierConfig(name=name, capacity=objects * 5120, **{"backend": DictConfig(), "lane": LANE, **options})


CASES = [
    Case("memory only", 3000, lambda _: [], {}, slots=12, options=EngineOptions(page_order="hnd")),
    Case("write through, flaky", 4000, lambda _: [store()], {"store": FLAKY}, slots=16, clear=0.002),
    Case(
        "write back, remote, hanging", 3000,
        lambda _: [store("remote", write="back", lane=HASTY, backend=DictConfig(scannable=False, local=False))],
        {"remote": HANGING}, options=EngineOptions(page_order="packed", prefix_cache=True), clear=0.002,
    ),
    Case(
        "two stores, verified when served", 2500,
        lambda _: [store("near", objects=40, write="back"), store("far", objects=300, write="through", promote=False)],
        {"near": FLAKY, "far": FLAKY}, slots=24, options=EngineOptions(drop_copies=0.02), verify="serve",
    ),
    Case(
        "disk segments", 2500, lambda path: [disk(path), store("far", write="back")],
        {"segments": replace(FLAKY, slow=0.0), "far": FLAKY}, slots=16, options=EngineOptions(prefix_cache=True),
    ),
    Case(
        "disk files, compressed", 2000, lambda path: [disk(path, "files", serde=ZstdConfig(), write="back")],
        {"files": replace(FLAKY, slow=0.0)}, slots=16, staging=1 << 17,
    ),
    Case(
        "three engines at once", 3000, lambda _: [store(write="back"), store("far", objects=300, lane=HASTY)],
        {"store": FLAKY, "far": HANGING}, slots=48, engines=3, clear=0.001,
    ),
]  # fmt: skip


def meddler(pipeline: Pipeline, injector: FaultInjector, clear: float, seed: int) -> Callable[[int], None]:
    """What happens beside an engine: hangs end, somebody clears a tier."""
    random = Random(seed)
    tiers: list[str | None] = [None, pipeline.memory_name, *(tier.name for tier in pipeline.tiers)]

    def meddle(step: int) -> None:
        if step % 50 == 0:
            injector.release()
        if random.random() < clear:
            with suppress(BackendError):  # a planted fault of the medium's own deletion
                pipeline.clear(random.choice(tiers))

    return meddle


def test_requests_add_up() -> None:
    assert sum(case.requests for case in CASES) == 20_000


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_no_wrong_byte(case: Case, pipelines: BuildPipeline, identities: list[Identity], tmp_path: Path) -> None:
    injector = FaultInjector(case.rates, seed=11)
    pipeline = pipelines(
        *case.tiers(tmp_path), slots=case.slots, injector=injector, staging=case.staging, verify=case.verify
    )
    connectors = [DirectConnector(pipeline, seed) for seed in range(case.engines)]
    engines = [
        RefEngine(connector, pipeline.layout, pipeline.slots.region.address, seed=seed, options=case.options)
        for seed, connector in enumerate(connectors)
    ]
    errors: list[BaseException] = []

    def serve(engine: RefEngine) -> None:
        traffic = Traffic(identities, engine.seed)
        meddle = meddler(pipeline, injector, case.clear, engine.seed)
        try:
            engine.run(traffic.requests(case.requests // case.engines), each_step=meddle)
        except BaseException as error:
            errors.append(error)
            raise

    if case.engines == 1:
        serve(engines[0])
    else:
        threads = [threading.Thread(target=serve, args=(engine,)) for engine in engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    injector.release()
    for connector in connectors:
        connector.close()
    settle(pipeline)
    stats = pipeline.stats()
    check_stats(stats, asked=sum(connector.asked for connector in connectors))
    served = sum(engine.counts["requests"] + engine.counts["aborted"] for engine in engines)
    assert served == case.requests
    # The test tested something: every tier served chunks, faults of every kind happened, and some were caught.
    assert all(stats["hits"].values()), stats["hits"]
    for tier in case.rates:
        injected, counts = injector[tier].counts, stats["tiers"][tier]
        corrupted = sum(injected[fault] for fault in ("flip", "truncate", "zero_tail", "misdirect", "torn_put"))
        # Once each: again only where the medium failed to delete the object.
        assert counts["quarantined"] <= corrupted + counts.get("delete_errors", 0)
    if case.rates:
        assert stats["quarantined"] > 0
        assert sum((injector[tier].counts for tier in case.rates), Counter()).total() > 60


def test_a_restart_serves_what_is_on_disk(pipelines: BuildPipeline, identities: list[Identity], tmp_path: Path) -> None:
    for life in range(3):
        pipeline = pipelines(disk(tmp_path), slots=16)
        connector = DirectConnector(pipeline, life)
        engine = RefEngine(connector, pipeline.layout, pipeline.slots.region.address, seed=life)
        engine.run(Traffic(identities, 5).requests(150))
        connector.close()
        settle(pipeline)
        assert (pipeline.tiers[0].counts["recovered"] > 0) == (life > 0)
        assert pipeline.stats()["hits"]["segments"] > 0
        pipeline.close()


class OneGroup(Scheduler):
    """The scheduler half for an engine with one KV group: one table of blocks for each request."""

    def allocated(self, request_id: str, table: Callable[[], Any], tokens: int) -> None:
        super().allocated(request_id, lambda: (table(),), tokens)

    def plan(self, scheduled: Mapping[str, int], table: Callable[[str], Any]) -> StepPlan:
        plan = super().plan(scheduled, lambda name: None if (own := table(name)) is None else (own,))
        plan.loads = None if plan.loads is None else replace(plan.loads, block_ids=plan.loads.block_ids[0])
        plan.saves = None if plan.saves is None else replace(plan.saves, block_ids=plan.saves.block_ids[0])
        return plan


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_the_vllm_scheduler_half(
    pipelines: BuildPipeline, identities: list[Identity], prefix_cache: bool, asynchronous: bool
) -> None:
    """The same oracle over the adapter that vLLM gets, without vLLM."""
    injector = FaultInjector({"store": FLAKY})
    pipeline = pipelines(store(), slots=24, injector=injector, shared=True)
    scheduler = OneGroup(
        pipeline,
        lambda request: request.identity,
        asynchronous=asynchronous,
        overlap=True,
        save_decode=True,
        parts={(0, 0): [Part(pipeline.layout, 0, saves=True)]},
    )
    engine = RefEngine(
        scheduler,
        pipeline.layout,
        pipeline.slots.region.address,
        seed=3,
        options=EngineOptions(prefix_cache=prefix_cache, drop_copies=0.01),
    )
    engine.run(Traffic(identities, 3).requests(600))
    assert engine.counts["loaded"] > 1000
    assert all(pipeline.stats()["hits"].values())
    assert not scheduler._steps and not scheduler._states


# -- the oracle can fail --------------------------------------------------------------------------------------


def run(
    pipeline: Pipeline,
    identities: Sequence[Identity],
    *,
    seed: int = 2,
    worker: type[Worker] = Worker,
    requests: int = 400,
    **options: Any,
) -> None:
    connector = DirectConnector(pipeline, seed, **options)
    engine = RefEngine(connector, pipeline.layout, pipeline.slots.region.address, seed=seed, worker=worker)
    try:
        engine.run(Traffic(identities, seed).requests(requests))
    finally:
        connector.close()


class SwappingBackend(DictBackend):
    """Now and then returns another object's payload under the key asked for, sealed anew: no checksum helps."""

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results = super().get_into(keys, buffers)
        for key, buffer, got in zip(keys, buffers, results, strict=True):
            other = next(reversed(self.objects.values()))
            if got and len(other) == got and key[-1] % 4 == 0:
                head = seal.read_header(buffer[:got])
                buffer[HEADER_BYTES:got] = other[HEADER_BYTES:]
                seal.seal(buffer[:got], key, head.layout_id, head.codec, head.raw_bytes, head.stored_bytes, 0)
        return results


class SwappingConfig(DictConfig):
    def build(self, context: Any) -> DictBackend:
        return SwappingBackend(self.objects)


class WrongSlot(Worker):
    """Gathers the chunks of a batch into each other's slots."""

    def save(self, copies: Copies) -> None:
        super().save(replace(copies, offsets=np.roll(copies.offsets, 1)))


class WrongBlock(Worker):
    """Loads the blocks of a chunk in the wrong order."""

    def load(self, copies: Copies) -> None:
        super().load(replace(copies, block_ids=copies.block_ids[:, ::-1].copy()))


class LateSave(Worker):
    """Saves one step late, when blocks may have been freed and used again."""

    _late: Copies | None = None

    def save(self, copies: Copies) -> None:
        late, self._late = self._late, copies
        if late is not None:
            super().save(late)


class NoPrefix:
    """Keys of chunks by their own tokens alone."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.keys: list[ChunkKey] = []

    def extend(self, tokens: Sequence[int]) -> list[ChunkKey]:
        size = self.identity.layout.chunk_tokens
        for at in range(0, len(tokens) - size + 1, size):
            self.keys += chunk_keys(self.identity, tokens[at : at + size])
        return self.keys


class NoSalt(NoPrefix):
    """Keys that forget the tenant."""

    def extend(self, tokens: Sequence[int]) -> list[ChunkKey]:
        self._all = [*getattr(self, "_all", []), *tokens]
        self.keys = chunk_keys(replace(self.identity, salt=None), self._all)
        return self.keys


class Repeating(Traffic):
    """Documents that hold the same chunk at different places."""

    def __init__(self, identities: Sequence[Identity], seed: int) -> None:
        super().__init__(identities, seed, documents=4)
        page = self._documents[0][:16]
        self._documents = [page * 6, page * 5 + self._documents[1][:16], page * 4, page * 6]


@pytest.mark.parametrize("worker", [WrongSlot, WrongBlock, LateSave])
def test_oracle_sees_wrong_copies(pipelines: BuildPipeline, identities: list[Identity], worker: type[Worker]) -> None:
    with pytest.raises(WrongBytes, match=r"seed 2, step \d+, request r\d+: token \d+"):
        run(pipelines(slots=40), identities, worker=worker)


def test_oracle_sees_a_lying_backend(pipelines: BuildPipeline, identities: list[Identity]) -> None:
    with pytest.raises(WrongBytes):
        run(pipelines(store(backend=SwappingConfig()), slots=12), identities)


def test_oracle_sees_a_backend_that_keeps_buffers(pipelines: BuildPipeline, identities: list[Identity]) -> None:
    with pytest.raises(WrongBytes):
        run(pipelines(store(), slots=12, injector=FaultInjector({"store": Rates(keep=0.2)})), identities)


def test_oracle_sees_a_lease_given_up_too_early(pipelines: BuildPipeline, identities: list[Identity]) -> None:
    with pytest.raises(WrongBytes, match="poison"):
        run(pipelines(slots=8), identities, release_early=True)


def test_oracle_sees_keys_that_forget_the_tenant(pipelines: BuildPipeline, identities: list[Identity]) -> None:
    with pytest.raises(WrongBytes):
        run(pipelines(slots=40), identities, chain=NoSalt)


def test_oracle_sees_keys_that_forget_the_prefix(pipelines: BuildPipeline, identities: list[Identity]) -> None:
    pipeline = pipelines(slots=40)
    connector = DirectConnector(pipeline, 2, chain=NoPrefix)
    engine = RefEngine(connector, pipeline.layout, pipeline.slots.region.address, seed=2)
    with pytest.raises((WrongBytes, ValueError)):
        engine.run(Repeating(identities, 2).requests(400))
    connector.close()


def test_model_is_keyed_and_causal(identity: Identity) -> None:
    """Same request, same bytes; another identity, position or earlier token, other bytes; later tokens, no change."""
    model = RefModel(identity)
    tokens = list(range(20))
    kv = model.kv(model.states(tokens))
    assert kv.shape == (2, 2, 20, 2, 1)
    np.testing.assert_array_equal(kv, RefModel(identity).kv(model.states(tokens)))
    assert len(np.unique(kv)) == kv.size
    for other in (replace(identity, salt="a"), replace(identity, weights="01ff")):
        another = RefModel(other)
        assert not (another.kv(another.states(tokens)) == kv).any()
    changed = tokens.copy()
    changed[7] = 99
    same = (model.kv(model.states(changed)) == kv).all(axis=(0, 1, 3, 4))
    np.testing.assert_array_equal(same, np.arange(20) < 7)
    swapped = [1, 0, *tokens[2:]]
    assert not (model.kv(model.states(swapped))[:, :, 2:] == kv[:, :, 2:]).any()


def test_a_request_ends_with_the_same_tokens_in_any_engine(pipelines: BuildPipeline, identity: Identity) -> None:
    """Token ids do not depend on chunked prefill, preemption or what was loaded."""
    pipeline = pipelines(store(), slots=8)
    model = RefModel(identity)
    results = []
    for tokens in (4, 7, 64):
        connector = DirectConnector(pipeline, tokens)
        options = EngineOptions(step_tokens=tokens, abort=0.0, preempt=0.1)
        engine = RefEngine(connector, pipeline.layout, pipeline.slots.region.address, seed=tokens, options=options)
        request = Request("one", model, list(range(70)), 5)
        engine.run([request])
        connector.close()
        results.append(request.all_token_ids)
    assert results == [model.complete(list(range(70)), 5)] * 3
    assert object_bytes(pipeline.layout.chunk_bytes) == 4096 + 1024
