"""The vLLM connector when things go wrong: preemption, eviction, resets, defects, and everything at once."""

from __future__ import annotations

import logging
import pickle
import random
from collections.abc import Callable

import pytest
from fake_vllm import (
    BLOCK,
    BLOCK_LAYOUT,
    CHUNK,
    MODES,
    DictStorage,
    FakeEngine,
    FakeRequest,
    answer,
    ask,
    fill,
    make_pipeline,
    tokens,
)

from lmcache_core.adapters import _vllm_scheduler
from lmcache_core.adapters._vllm_parts import assemble
from lmcache_core.adapters._vllm_wire import StepReport
from lmcache_core.pipeline import Pipeline
from lmcache_core.testing.invariants import settle


# -- trouble -----------------------------------------------------------------------------------------------------
def test_preempted_requests_load_again() -> None:
    pipeline = make_pipeline(64)
    engine = FakeEngine(pipeline, blocks=24, budget=16)
    requests = [engine.add(FakeRequest(f"p{i}", tokens(33, i), 24)) for i in range(4)]
    engine.run()
    assert sum(request.preemptions for request in requests) > 0
    for i, request in enumerate(requests):
        assert request.output == answer(tokens(33, i), 24)
    assert sum(request.external for request in requests) > 0
    settle(pipeline)


def test_a_request_that_starts_again_saves_again() -> None:
    pipeline = make_pipeline(32)
    connector = FakeEngine(pipeline).connector
    assert connector is not None
    request = FakeRequest("again", tokens(2 * CHUNK), 1)

    def compute() -> int:
        assert connector.match(request, 0) == (0, False)
        plan = connector.plan({"again": 2 * CHUNK}, lambda _: [list(range(1, 9))])
        connector.done(StepReport(plan.step, True))
        return 0 if plan.saves is None else len(plan.saves.offsets)

    assert compute() == 2
    pipeline.clear()
    assert compute() == 2
    connector.finished("again")
    settle(pipeline)


def test_memory_smaller_than_a_prompt() -> None:
    storage = DictStorage()
    pipeline = make_pipeline(3, storage)
    engine = FakeEngine(pipeline, budget=20)
    prompt = tokens(10 * CHUNK)
    ask(engine, prompt)
    assert ask(engine, prompt).external <= 3 * CHUNK
    settle(pipeline)


def test_worker_that_cannot_attach_turns_caching_off() -> None:
    pipeline = make_pipeline(32)
    prompt = tokens(50)
    ask(FakeEngine(pipeline), prompt)
    engine = FakeEngine(pipeline, attachable=False)
    request = engine.add(FakeRequest("alone", prompt, 3))
    engine.run()
    assert request.output == answer(prompt, 3)
    assert request.external == 0
    assert engine.connector is not None
    assert engine.connector.disabled == "this worker cannot attach"
    settle(pipeline)


def test_worker_that_never_answers_turns_caching_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vllm_scheduler, "MAX_ATTACH_STEPS", 5)
    pipeline = make_pipeline(32)
    prompt = tokens(50)
    ask(FakeEngine(pipeline), prompt)
    engine = FakeEngine(pipeline)
    monkeypatch.setattr(engine.workers[0], "report", lambda: None)
    request = engine.add(FakeRequest("alone", prompt, 3))
    engine.run()
    assert request.output == answer(prompt, 3)
    assert request.external == 0
    assert engine.connector is not None
    assert "5 steps" in engine.connector.disabled
    engine.connector.close(5)
    pipeline.check(idle=True)


@pytest.mark.parametrize("where", ["match", "loads", "saves"])
@pytest.mark.parametrize("mode", MODES)
def test_a_defect_of_ours_fails_no_request(
    mode: dict[str, bool], where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = make_pipeline(32)
    prompts = [tokens(60), tokens(50, 1), tokens(70, 2)]
    engine = FakeEngine(pipeline, budget=200, **mode)
    for prompt in prompts:
        ask(engine, prompt)

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("planted")

    assert engine.connector is not None
    requests = [engine.add(FakeRequest(f"d{i}", prompt, 20)) for i, prompt in enumerate(prompts)]
    if where == "match":
        engine.step()
        requests.append(engine.add(FakeRequest("late", tokens(40, 3), 2)))
    method = {"match": (pipeline, "fetch"), "loads": (engine.connector, "_fill"), "saves": (pipeline, "reserve")}[where]
    monkeypatch.setattr(*method, broken)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    engine.run()
    for request in requests:
        assert request.output == answer(request.prompt, request.max_new)
    assert engine.connector.disabled == f"unexpected error in {where}; see the log"
    assert "planted" in caplog.text
    settle(pipeline)


def test_saves_of_a_step_that_was_not_reported_are_not_published() -> None:
    pipeline = make_pipeline(32)
    engine = FakeEngine(pipeline, budget=CHUNK)
    connector = engine.connector
    assert connector is not None
    request = engine.add(FakeRequest("lost", tokens(3 * CHUNK), 1))
    reports: list[StepReport] = []
    done = connector.done
    connector.done = reports.append
    engine.run()
    assert request.done
    connector.done = done
    assert pipeline.stats()["stored"] == 0
    done(reports[-1])
    assert pipeline.stats()["stored"] == 1
    settle(pipeline)


def test_null_blocks_are_never_saved() -> None:
    pipeline = make_pipeline(32)
    connector = FakeEngine(pipeline).connector
    assert connector is not None
    request = FakeRequest("window", tokens(2 * CHUNK), 1)
    assert connector.match(request, 0) == (0, False)
    plan = connector.plan({"window": 2 * CHUNK}, lambda _: [[1, 2, 0, 3, 4, 5, 6, 7]])
    assert plan.saves is not None
    assert plan.saves.block_ids.tolist() == [[[4, 5, 6, 7]]]
    assert connector.counts["null_blocks"] == 1
    connector.done(StepReport(plan.step, True))
    connector.finished("window")
    settle(pipeline)


def test_a_chunk_that_is_read_while_it_is_saved_is_kept_once() -> None:
    storage = DictStorage()
    prompt = tokens(50)
    fill(storage, prompt)
    pipeline = make_pipeline(8, storage)
    engine = FakeEngine(pipeline, budget=64, lag=1)
    ask(engine, tokens(3))
    storage.gate.clear()
    saver = engine.add(FakeRequest("saver", prompt, 2, read=False))
    engine.step()  # its chunks are reserved, and not yet published
    reader = engine.add(FakeRequest("reader", prompt, 2))
    engine.step()
    engine.step()
    assert pipeline.stats()["stored"] == 3
    storage.gate.set()
    engine.run()
    assert saver.output == reader.output == answer(prompt, 2)
    settle(pipeline)


@pytest.mark.parametrize("lag", [0, 1])
def test_reset_forgets_what_was_stored_and_what_is_being_saved(lag: int) -> None:
    storage = DictStorage()
    pipeline = make_pipeline(32, storage)
    engine = FakeEngine(pipeline, budget=CHUNK, lag=lag)
    prompt = tokens(4 * CHUNK)
    request = engine.add(FakeRequest("running", prompt, 2))
    engine.step()
    engine.step()
    assert engine.connector is not None
    assert engine.connector.clear()
    engine.run()
    assert request.output == answer(prompt, 2)
    settle(pipeline)
    # What the running request had computed before the reset was not saved after it.
    assert not pipeline.slots.index
    assert not storage.stored
    ask(engine, prompt)
    assert ask(engine, prompt).external == 4 * CHUNK - BLOCK


def test_requests_that_waited_through_a_reset_are_saved_under_the_new_identity() -> None:
    pipeline = make_pipeline(32)
    engine = FakeEngine(pipeline)
    connector = engine.connector
    assert connector is not None
    prompt = tokens(2 * CHUNK)
    request = engine.add(FakeRequest("waiting", prompt, 1))
    assert connector.match(request, 0) == (0, False)
    engine.revision = "after"
    assert connector.clear()
    engine.run()
    assert len(pipeline.slots.index) == 2
    assert ask(engine, prompt).external > 0
    engine.revision = ""
    assert ask(engine, prompt).external == 0


def test_close_with_everything_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vllm_scheduler, "IDLE_WAIT_S", 0.0)
    storage = DictStorage()
    prompts = [tokens(40, seed) for seed in range(3)]
    fill(storage, *prompts)
    storage.gate.clear()
    pipeline = make_pipeline(32, storage)
    engine = FakeEngine(pipeline, overlap=True, lag=1)
    engine.add(FakeRequest("fresh", tokens(60, 9), 3))
    engine.step()
    for i, prompt in enumerate(prompts):
        engine.add(FakeRequest(f"c{i}", prompt, 3))
    engine.step()
    storage.gate.set()
    assert engine.connector is not None
    engine.connector.close(20)
    pipeline.check(idle=True)


def test_wire_survives_pickling() -> None:
    """vLLM moves metadata between processes by pickling it."""
    pipeline = make_pipeline(32)
    engine = FakeEngine(pipeline)
    connector = engine.connector
    assert connector is not None
    request = FakeRequest("wire", tokens(40), 1)
    connector.match(request, 0)
    plan = connector.plan({"wire": 40}, lambda _: [list(range(1, 11))])
    copy = pickle.loads(pickle.dumps(plan))
    assert copy.attach == plan.attach
    assert plan.saves is not None
    assert (copy.saves.block_ids == plan.saves.block_ids).all()
    assert pickle.loads(pickle.dumps(StepReport(3, True))) == StepReport(3, True)
    connector.close(5)


def test_reports_of_ranks_merge() -> None:
    good, bad = StepReport(4, True), StepReport(4, False, "no", copied=False)
    assert good.merge(good) == good
    for merged in (good.merge(bad), bad.merge(good)):
        assert merged == StepReport(4, False, "no", copied=False)
    with pytest.raises(AssertionError, match="steps 4 and 5"):
        good.merge(StepReport(5))


# -- everything at once --------------------------------------------------------------------------------------------
def _chaos(seed: int, mode: dict[str, bool]) -> None:
    rng = random.Random(seed)
    ranks = rng.choice([((0, 0),), ((0, 0), (0, 1)), ((0, 0), (0, 1), (1, 0), (1, 1))])
    layout, _ = assemble({rank: [BLOCK_LAYOUT] for rank in ranks}, CHUNK)
    by_layer = rng.random() < 0.5
    storage = DictStorage() if rng.random() < 0.8 else None
    engines: list[Callable[[Pipeline], FakeEngine]] = [
        lambda pipeline: FakeEngine(
            pipeline,
            blocks=rng.choice([24, 40, 100]),
            budget=rng.choice([5, 16, 40]),
            prefix_cache=rng.random() < 0.5,
            lag=rng.randrange(2),
            ranks=ranks,
            by_layer=by_layer,
            **mode,
        )
    ]
    roots = [tokens(70, rng.random()) for _ in range(3)]
    for _ in range(2):  # two lifetimes over one storage
        pipeline = make_pipeline(rng.choice([3, 8, 30]), storage, layout=layout)
        engine = engines[0](pipeline)
        live: list[FakeRequest] = []
        for i in range(25):
            prompt = rng.choice(roots)[: rng.randrange(1, 71)] + tokens(rng.randrange(12), rng.random())
            live.append(
                engine.add(FakeRequest(f"{i}", prompt, rng.randrange(1, 12), salt=rng.choice([None, None, "t"])))
            )
            for _ in range(rng.randrange(6)):
                engine.step()
            if rng.random() < 0.15:
                engine.abort(rng.choice(live))
            if storage is not None and storage.stored and rng.random() < 0.3:
                storage.broken.add(rng.choice(list(storage.stored)))
            if rng.random() < 0.03 and engine.connector is not None:
                engine.connector.clear()
            pipeline.check()
        engine.run()
        assert engine.connector is not None
        assert not engine.connector.disabled
        for request in live:
            if not request.aborted:
                assert request.output == answer(request.prompt, request.max_new, request.salt)
        settle(pipeline)
        engine.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(12))
def test_chaos(seed: int, mode: dict[str, bool]) -> None:
    """Random prompts, tenants, aborts, resets, evictions, preemptions and damaged objects: never a wrong byte."""
    _chaos(seed, mode)
