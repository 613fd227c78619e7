"""The vLLM worker on a GPU: what must come before what, on streams that run in any order its events allow."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from fake_cuda import LOST, NO_MEMORY
from fake_gpu import TASTES, Adversary, GpuEngine, Taste, adversary
from fake_vllm import BLOCK_LAYOUT, CHUNK, MODES, DictStorage, FakeRequest, answer, ask, make_pipeline, tokens

from lmcache_core.adapters._vllm_gpu import GpuWorker
from lmcache_core.adapters._vllm_parts import assemble
from lmcache_core.adapters._vllm_wire import StepPlan, StepReport
from lmcache_core.gpu import Event
from lmcache_core.testing.invariants import settle

RANKS = [((0, 0),), ((0, 0), (0, 1))]


@pytest.mark.parametrize("taste", TASTES)
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", RANKS)
def test_what_was_saved_is_loaded(
    ranks: tuple[tuple[int, int], ...], mode: dict[str, bool], by_layer: bool, taste: Taste
) -> None:
    layout, _ = assemble({rank: [BLOCK_LAYOUT] for rank in ranks}, CHUNK)
    storage = DictStorage()
    prompt = tokens(100)
    with adversary(taste) as cuda:
        for promised in (0, 96):
            pipeline = make_pipeline(32, storage, layout=layout)
            engine = GpuEngine(pipeline, cuda, ranks=ranks, by_layer=by_layer, lag=1, **mode)
            assert ask(engine, prompt).external == promised
            assert ask(engine, prompt).external == 96
            settle(pipeline)
            engine.close()
    assert len(storage.stored) == 6


def mixed(cuda: Adversary, seed: int, mode: dict[str, bool]) -> None:
    """Random requests in too few blocks, with aborts, preemptions and damaged objects; every answer is compared."""
    rng = random.Random(seed)
    ranks = rng.choice(RANKS)
    layout, _ = assemble({rank: [BLOCK_LAYOUT] for rank in ranks}, CHUNK)
    storage = DictStorage()
    pipeline = make_pipeline(rng.choice([6, 30]), storage, layout=layout)
    options = {"prefix_cache": rng.random() < 0.3, "by_layer": rng.random() < 0.5, "lag": rng.randrange(2), **mode}
    engine = GpuEngine(pipeline, cuda, blocks=28, budget=rng.choice([16, 40]), ranks=ranks, **options)
    roots = [tokens(60, rng.random()) for _ in range(3)]
    live: list[FakeRequest] = []
    try:
        for i in range(24):
            prompt = rng.choice(roots)[: rng.randrange(1, 61)] + tokens(rng.randrange(12), rng.random())
            live.append(engine.add(FakeRequest(f"{i}", prompt, rng.randrange(1, 9))))
            for _ in range(rng.randrange(6)):
                engine.step()
            if rng.random() < 0.2:
                engine.abort(rng.choice(live))
            if storage.stored and rng.random() < 0.2:
                storage.broken.add(rng.choice(list(storage.stored)))
            pipeline.check()
        engine.run()
        assert engine.connector is not None
        assert not engine.connector.disabled
        for request in live:
            assert request.aborted or request.output == answer(request.prompt, request.max_new)
        settle(pipeline)
    finally:
        engine.verify = False
        engine.close()


@pytest.mark.parametrize("taste", TASTES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(2))
def test_chaos(seed: int, mode: dict[str, bool], taste: Taste) -> None:
    with adversary(taste, seed) as cuda:
        mixed(cuda, seed, mode)


def aborted(cuda: Adversary) -> None:
    """A request is aborted while its step is still to be computed, and a load is given its blocks."""
    pipeline = make_pipeline(32)
    engine = GpuEngine(pipeline, cuda, lag=1, budget=64, asynchronous=True)
    try:
        prompt = tokens(60)
        ask(engine, prompt)
        victim = engine.add(FakeRequest("victim", tokens(60, 1), 3))
        engine.step()
        lost = set(victim.table)
        engine.abort(victim)
        loaded = engine.add(FakeRequest("loaded", prompt, 3))
        engine.step()
        assert lost.intersection(loaded.table) and loaded.receiving
        engine.run()
        assert loaded.output == answer(prompt, 3)
        settle(pipeline)
    finally:
        engine.verify = False
        engine.close()


@pytest.mark.parametrize("taste", TASTES)
def test_blocks_of_an_aborted_request_are_loaded_when_it_no_longer_writes(taste: Taste) -> None:
    with adversary(taste) as cuda:
        aborted(cuda)


def without_fence(worker: GpuWorker, plan: StepPlan) -> None:
    if plan.loads is not None:
        worker._before.record(worker._compute())


def without_before(worker: GpuWorker, plan: StepPlan) -> None:
    for flight in worker._flights:
        if flight.report.step == plan.after and flight.saved is not None:
            flight.saved.hold(worker._compute())


def told_at_once(worker: GpuWorker, flight: object, event: Event | None) -> bool:
    return True


HOLD = Event.hold
MUTANTS: dict[str, tuple[type, str, Callable[..., object]]] = {
    "saves do not wait for computing": (GpuWorker, "_saves_follow", lambda worker: None),
    "computing does not wait for saves of its blocks": (GpuWorker, "begin", without_fence),
    "loads do not wait for who had their blocks": (GpuWorker, "begin", without_before),
    "computing does not wait for its loads": (Event, "hold", lambda event, stream: stream and HOLD(event, stream)),
    "steps are told before they are done": (GpuWorker, "_fired", told_at_once),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_missing_wait_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    for seed in range(9):
        for taste in TASTES:
            try:
                with adversary(taste, seed) as cuda:
                    cuda.failed = True  # events may be left behind
                    if seed == 0:
                        aborted(cuda)
                    else:
                        mixed(cuda, seed, MODES[seed % 3])
            except AssertionError:
                return
    pytest.fail(f"not noticed: {name}")


# -- what fails --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", ["copy_pages", "record", "wait", "query", "event_create"])
@pytest.mark.parametrize("mode", MODES)
def test_an_error_of_cuda_ends_caching_and_nothing_else(mode: dict[str, bool], call: str) -> None:
    with adversary("any") as cuda:
        pipeline = make_pipeline(32)
        engine = GpuEngine(pipeline, cuda, lag=1, **mode)
        prompt = tokens(100)
        ask(engine, prompt)
        engine.verify = False  # what is computed on blocks that were not loaded does not count
        cuda.fail[call] = LOST
        request = engine.add(FakeRequest("failing", prompt, 30))
        other = engine.add(FakeRequest("other", tokens(90, 1), 30))
        engine.run()
        assert request.output == answer(prompt, 30)
        assert other.output == answer(other.prompt, 30)
        assert engine.connector is not None
        assert "a copy on GPU 0 failed" in engine.connector.disabled
        settle(pipeline)
        cuda.fail.clear()
        engine.close()


def test_memory_that_cannot_be_pinned_ends_caching() -> None:
    with adversary("any") as cuda:
        cuda.fail["pin"] = NO_MEMORY
        pipeline = make_pipeline(32)
        engine = GpuEngine(pipeline, cuda)
        request = engine.add(FakeRequest("alone", tokens(50), 3))
        engine.run()
        assert request.output == answer(request.prompt, 3)
        assert engine.connector is not None
        assert "raise the limit of locked memory" in engine.connector.disabled
        settle(pipeline)
        engine.close()


def test_layers_the_engine_does_not_announce_are_computed_again() -> None:
    with adversary("late") as cuda:
        pipeline = make_pipeline(32)
        engine = GpuEngine(pipeline, cuda, by_layer=True)
        prompt = tokens(100)
        ask(engine, prompt)
        (worker,) = engine.workers
        worker.wait_layer = lambda name: None  # type: ignore[method-assign]
        engine.verify = False
        request = engine.add(FakeRequest("graph", prompt, 3))
        engine.run()
        assert request.output == answer(prompt, 3)
        engine.verify = True
        assert ask(engine, prompt).external == 96
        settle(pipeline)
        engine.close()


def test_blocks_that_are_copied_over_without_a_wait_are_not_published() -> None:
    with adversary("late") as cuda:
        pipeline = make_pipeline(32)
        engine = GpuEngine(pipeline, cuda, budget=64)
        request = engine.add(FakeRequest("saving", tokens(40), 3))
        engine.step()
        assert engine.connector is not None and engine.connector.under_way
        engine.connector.overwritten([63])
        engine.connector.overwritten(request.table[:1])
        engine.run()
        assert pipeline.stats()["stored"] == 0
        settle(pipeline)
        engine.close()


def test_ranks_report_steps_at_different_times() -> None:
    layout, _ = assemble({rank: [BLOCK_LAYOUT] for rank in RANKS[1]}, CHUNK)
    with adversary("any") as cuda:
        pipeline = make_pipeline(32, layout=layout)
        engine = GpuEngine(pipeline, cuda, ranks=RANKS[1], budget=CHUNK)
        ask(engine, tokens(3))  # the workers have attached
        connector = engine.connector
        assert connector is not None
        done = connector.done
        held: list[StepReport] = []
        connector.done = held.append  # type: ignore[method-assign]
        engine.add(FakeRequest("slow", tokens(3 * CHUNK), 1))
        for _ in range(20):
            engine.step()
        steps = sorted(report.step for report in held)
        assert steps[::2] == steps[1::2] and len(set(steps)) == 3
        lost = held.pop(0)
        done(held[0])
        assert pipeline.stats()["stored"] == 0 and connector.under_way
        for report in held[1:]:
            done(report)
        # One of the two never told of the first step: that is not published, and not kept for ever.
        assert lost.step == steps[0] and pipeline.stats()["stored"] == 2
        settle(pipeline)
        engine.close()
