"""The vLLM connector's two halves, driven in vLLM's order by a small engine that knows every byte."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

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
from lmcache_core.pipeline import Transfer
from lmcache_core.testing.invariants import settle
from lmcache_core.types import MissReason


# -- memory ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 64, 65, 100])
def test_second_request_loads_the_prefix(length: int, lag: int, asynchronous: bool, prefix_cache: bool) -> None:
    pipeline = make_pipeline(32)
    engine = FakeEngine(pipeline, asynchronous=asynchronous, prefix_cache=prefix_cache, lag=lag)
    prompt = tokens(length)
    ask(engine, prompt)
    second = ask(engine, prompt)
    # At least one token is always computed, and hits end on a block; only whole chunks are stored.
    hit = min(length // CHUNK * CHUNK, (length - 1) // BLOCK * BLOCK)
    local = (length - 1) // BLOCK * BLOCK if prefix_cache else 0
    assert second.external == max(0, hit - local)
    settle(pipeline)


def test_hit_begins_and_ends_inside_chunks() -> None:
    pipeline = make_pipeline(32)
    prompt = tokens(3 * CHUNK)
    ask(FakeEngine(pipeline), prompt)
    # Another engine, with its own prefix cache, has seen one block and a bit of the same prompt.
    engine = FakeEngine(pipeline, prefix_cache=True)
    other = prompt[: BLOCK + 1] + tokens(20, seed=1)
    assert ask(engine, other).external == 0
    before = engine.computed_tokens
    request = ask(engine, prompt, max_new=1)
    # From the second block on, up to the block that holds the last token.
    assert request.external == 3 * CHUNK - BLOCK - BLOCK
    assert engine.computed_tokens - before == BLOCK
    settle(pipeline)


def test_chunked_prefill_saves_each_chunk_once() -> None:
    pipeline = make_pipeline(32)
    ask(FakeEngine(pipeline, budget=7), tokens(5 * CHUNK + 3), max_new=1)
    assert pipeline.stats()["stored"] == 5
    settle(pipeline)


@pytest.mark.parametrize("save_decode", [True, False])
@pytest.mark.parametrize("lag", [0, 1])
def test_generated_tokens_are_saved_if_wanted(save_decode: bool, lag: int) -> None:
    pipeline = make_pipeline(32)
    engine = FakeEngine(pipeline, save_decode=save_decode, lag=lag)
    first = ask(engine, tokens(CHUNK + 3), max_new=3 * CHUNK)
    # The KV of the last generated token is never computed.
    whole = (CHUNK + 3 + 3 * CHUNK - 1) // CHUNK if save_decode else 1
    assert pipeline.stats()["stored"] == whole
    again = ask(engine, first.all_token_ids, max_new=2)
    assert again.external == whole * CHUNK
    settle(pipeline)


def test_salts_and_adapters_are_kept_apart() -> None:
    pipeline = make_pipeline(64)
    engine = FakeEngine(pipeline)
    prompt = tokens(50)
    seen: list[dict[str, object]] = [{}, {"salt": "a"}, {"salt": "b"}, {"salt": ""}, {"lora": "x"}]
    for more in seen:
        assert ask(engine, prompt, **more).external == 0
    for more in seen:
        assert ask(engine, prompt, **more).external == 48


def test_refused_and_unread_requests() -> None:
    pipeline = make_pipeline(32)
    engine = FakeEngine(pipeline)
    prompt = tokens(50)
    assert ask(engine, prompt, refused="multimodal").external == 0
    assert pipeline.stats()["stored"] == 0
    assert engine.connector is not None
    assert engine.connector.counts["bypass.multimodal"] == 1
    # A request that must not read the cache still fills it.
    ask(engine, prompt, read=False)
    assert ask(engine, prompt, read=False).external == 0
    assert ask(engine, prompt).external == 48
    settle(pipeline)


def test_a_request_that_asks_gets_an_answer() -> None:
    pipeline = make_pipeline(32)
    engine = FakeEngine(pipeline)
    prompt = tokens(50)
    quiet = ask(engine, prompt, kv_transfer_params={"lmcache.skip_write": True, "do_remote_decode": False})
    assert quiet.answer is not None and quiet.answer["lmcache.miss"] == "not_stored"
    assert pipeline.stats()["stored"] == 0
    assert ask(engine, prompt, kv_transfer_params={"do_remote_decode": False}).answer is None
    assert ask(engine, prompt).answer is None
    unread = ask(engine, prompt, kv_transfer_params={"lmcache.skip_read": True})
    assert unread.external == 0
    wrong = {"lmcache.skip_read": 1, "lmcache.pin_s": "long", "lmcache.nonsense": 1, "lmcache.report": True, 7: 7}
    hit = ask(engine, prompt, kv_transfer_params=wrong)
    assert hit.external == 48 and hit.answer is not None
    assert hit.answer["lmcache.sources"] == {"dram": 48}
    assert set(hit.answer["lmcache.refused"]) == {"lmcache.skip_read", "lmcache.pin_s", "lmcache.nonsense"}
    out = ask(engine, prompt, refused="multimodal", kv_transfer_params={"lmcache.report": True})
    assert out.answer == {"lmcache.bypassed": "multimodal", "lmcache.refused": {}}
    settle(pipeline)


def test_pins_hold_the_prompt_for_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(_vllm_scheduler, "monotonic", lambda: now[0])
    pipeline = make_pipeline(16)
    engine = FakeEngine(pipeline, budget=100)
    prompt = tokens(3 * CHUNK)
    ask(engine, prompt, kv_transfer_params={"lmcache.pin_s": 60})
    greedy = ask(engine, tokens(5 * CHUNK, 1), kv_transfer_params={"lmcache.pin_s": 60})
    assert greedy.answer is not None and "lmcache.pin_s" in greedy.answer["lmcache.refused"]
    for seed in range(2, 8):  # enough to evict everything else
        ask(engine, tokens(5 * CHUNK, seed))
    assert pipeline.stats()["tiers"]["dram"]["pinned"] == 3
    assert ask(engine, prompt).external == 3 * CHUNK - BLOCK
    now[0] += 61
    ask(engine, tokens(3))
    settle(pipeline)
    for seed in range(2, 8):
        ask(engine, tokens(5 * CHUNK, seed))
    assert ask(engine, prompt).external == 0
    ask(engine, prompt, kv_transfer_params={"lmcache.pin_s": 60})
    ask(engine, tokens(3))
    assert engine.connector is not None
    engine.connector.clear()
    settle(pipeline)


RANKS = [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 0), (0, 1), (1, 0), (1, 1))]


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("ranks", RANKS)
def test_a_chunk_holds_every_workers_part(ranks: tuple[tuple[int, int], ...], by_layer: bool) -> None:
    layout, _ = assemble({rank: [BLOCK_LAYOUT] for rank in ranks}, CHUNK)
    storage = DictStorage()
    prompt = tokens(100)
    for promised in (0, 96):
        pipeline = make_pipeline(32, storage, layout=layout)
        engine = FakeEngine(pipeline, ranks=ranks, by_layer=by_layer)
        assert ask(engine, prompt).external == promised
        assert ask(engine, prompt).external == 96
        settle(pipeline)
        engine.close()
    # One object a chunk, whatever the number of workers.
    assert len(storage.stored) == 6


def test_a_worker_that_cannot_attach_ends_caching_for_all() -> None:
    ranks = RANKS[0]
    pipeline = make_pipeline(32, layout=assemble({rank: [BLOCK_LAYOUT] for rank in ranks}, CHUNK)[0])
    engine = FakeEngine(pipeline, ranks=ranks)
    assert engine.connector is not None
    engine.workers[1]._groups = []
    prompt = tokens(50)
    request = engine.add(FakeRequest("alone", prompt, 3))
    engine.run()
    assert request.output == answer(prompt, 3)
    assert "worker (0, 1) disagree" in engine.connector.disabled
    assert pipeline.stats()["stored"] == 0
    settle(pipeline)


def test_layers_the_engine_does_not_announce_are_computed_again() -> None:
    """A graph of the whole model reads layers without asking: then nothing that was loaded in that step counts."""
    pipeline = make_pipeline(32)
    engine = FakeEngine(pipeline, by_layer=True)
    prompt = tokens(100)
    ask(engine, prompt)
    (worker,) = engine.workers
    worker.wait_layer = lambda name: None  # type: ignore[method-assign]
    request = engine.add(FakeRequest("graph", prompt, 3))
    # The pages may or may not be filled when they are read: only the answer counts.
    engine.verify = False
    engine.run()
    assert request.output == answer(prompt, 3)
    # From now on everything is copied before the forward pass.
    engine.verify = True
    assert ask(engine, prompt).external == 96
    settle(pipeline)
    engine.close()


def test_the_speed_of_prefill_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the plan of a step that computes a prompt to its report; not where it loads, nor for single tokens."""
    now = [100.0]
    monkeypatch.setattr(_vllm_scheduler, "monotonic", lambda: now[0])
    monkeypatch.setattr(_vllm_scheduler, "MEASURED_TOKENS", CHUNK)
    pipeline = make_pipeline(32)
    noted: list[tuple[int, float]] = []
    monkeypatch.setattr(pipeline, "note_prefill", lambda tokens, seconds: noted.append((tokens, seconds)))
    engine = FakeEngine(pipeline, budget=100)
    prompt = tokens(4 * CHUNK)
    assert engine.connector is not None
    done = engine.connector.done

    def slowly(report: StepReport) -> None:
        now[0] += 0.5
        done(report)

    monkeypatch.setattr(engine.connector, "done", slowly)
    ask(engine, prompt, max_new=2 * CHUNK)
    assert noted == [(4 * CHUNK, 0.5)]
    ask(engine, [*prompt, *tokens(3 * CHUNK, seed=1)])
    assert noted == [(4 * CHUNK, 0.5)], "a step that loads says nothing about computing"
    settle(pipeline)


def test_match_is_idempotent() -> None:
    pipeline = make_pipeline(32)
    engine = FakeEngine(pipeline)
    prompt = tokens(60)
    ask(engine, prompt)
    connector = engine.connector
    assert connector is not None
    request = FakeRequest("again", prompt, 1)
    first = connector.match(request, 0)
    pinned = pipeline.stats()["tiers"]["dram"]["pinned"]
    assert first == (48, False)
    for _ in range(5):
        assert connector.match(request, 0) == first
    assert pipeline.stats()["tiers"]["dram"]["pinned"] == pinned == 3
    # The engine's own cache may grow or shrink between two questions.
    assert connector.match(request, CHUNK + BLOCK) == (48 - CHUNK - BLOCK, False)
    assert connector.match(request, 0) == first
    assert connector.match(request, 48) == (0, False)
    connector.finished("again")
    settle(pipeline)


def test_a_miss_is_counted_once_until_something_is_stored() -> None:
    pipeline = make_pipeline(32)
    engine = FakeEngine(pipeline)
    ask(engine, tokens(3))
    connector = engine.connector
    assert connector is not None
    prompt = tokens(60)
    request = FakeRequest("waiting", prompt, 1)
    for _ in range(4):
        assert connector.match(request, 0) == (0, False)
    assert pipeline.stats()["misses"] == {MissReason.NOT_STORED: 3}
    ask(engine, prompt)
    assert connector.match(request, 0) == (48, False)
    connector.finished("waiting")
    settle(pipeline)


def test_a_hit_the_engine_does_not_use_is_let_go() -> None:
    pipeline = make_pipeline(32)
    engine = FakeEngine(pipeline)
    prompt = tokens(60)
    ask(engine, prompt)
    connector = engine.connector
    assert connector is not None
    request = FakeRequest("unused", prompt, 1)
    assert connector.match(request, 0) == (48, False)
    connector.allocated("unused", lambda: [[]], 0)
    settle(pipeline)
    connector.finished("unused")


@pytest.mark.parametrize("mode", [{}, {"overlap": True}, {"asynchronous": True}])
def test_sources_name_the_tiers(mode: dict[str, bool]) -> None:
    storage = DictStorage()
    pipeline = make_pipeline(32, storage)
    engine = FakeEngine(pipeline, **mode)
    prompt = tokens(64)
    ask(engine, prompt)
    settle(pipeline)
    pipeline.clear("dram")
    connector = engine.connector
    assert connector is not None
    request = engine.add(FakeRequest("sources", prompt, 4))
    while not request.output:
        engine.step()
    assert connector.sources("sources", request.external) == {"disk": 60}
    assert connector.sources("sources", request.external + BLOCK) == {}
    engine.run()
    settle(pipeline)


# -- storage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_restart_reads_from_storage(mode: dict[str, bool], prefix_cache: bool) -> None:
    storage = DictStorage()
    prompt = tokens(100)
    assert len(fill(storage, prompt)) == len(storage.stored) == 6
    pipeline = make_pipeline(32, storage)
    engine = FakeEngine(pipeline, prefix_cache=prefix_cache, **mode)
    request = ask(engine, prompt)
    assert request.external == 96
    assert pipeline.stats()["hits"]["disk"] == 6
    settle(pipeline)


@pytest.mark.parametrize("mode", MODES)
def test_a_slow_read_holds_up_nobody_else(mode: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vllm_scheduler, "IDLE_WAIT_S", 0.0)
    storage = DictStorage()
    prompt = tokens(100)
    fill(storage, prompt)
    pipeline = make_pipeline(32, storage)
    storage.gate.clear()
    engine = FakeEngine(pipeline, **mode)
    slow = engine.add(FakeRequest("slow", prompt, 2))
    quick = engine.add(FakeRequest("quick", tokens(20, seed=5), 8))
    for _ in range(20):
        engine.step()
    assert quick.done and not slow.done
    storage.gate.set()
    engine.run()
    assert slow.output == answer(prompt, 2)
    assert slow.external == 96
    settle(pipeline)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [0, 2, 5])
def test_a_failed_read_is_computed_instead(mode: dict[str, bool], bad: int) -> None:
    storage = DictStorage()
    prompt = tokens(100)
    keys = fill(storage, prompt)
    assert set(keys) == set(storage.stored)
    storage.broken.add(keys[bad])
    pipeline = make_pipeline(32, storage)
    engine = FakeEngine(pipeline, **mode)
    ask(engine, tokens(3))
    storage.gate.clear()
    request = engine.add(FakeRequest("bad", prompt, 3))
    engine.step()
    storage.gate.set()
    engine.run()
    assert request.output == answer(prompt, 3)
    connector = engine.connector
    assert connector is not None
    promised = (6 if mode else bad) * CHUNK
    assert request.external == promised
    assert connector.counts["failed_blocks"] == ((6 - bad) * CHUNK // BLOCK if mode else 0)
    assert pipeline.stats()["misses"] == {MissReason.CORRUPT: 6 - bad}
    settle(pipeline)
    # The bad object was forgotten, and what was computed instead is stored and good.
    storage.broken.clear()
    third = make_pipeline(32, storage)
    assert ask(FakeEngine(third, **mode), prompt).external == 96
    settle(third)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("after", range(8))
def test_abort_at_every_step_of_a_load(mode: dict[str, bool], after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vllm_scheduler, "IDLE_WAIT_S", 0.0)
    storage = DictStorage()
    prompt = tokens(100)
    fill(storage, prompt)
    pipeline = make_pipeline(32, storage)
    storage.gate.clear()
    engine = FakeEngine(pipeline, lag=1, **mode)
    victim = engine.add(FakeRequest("victim", prompt, 5))
    for step in range(after):
        if step == 3:
            storage.gate.set()
            for state in list(engine.connector._states.values()):
                if state.fetch is not None:
                    assert state.fetch.transfer.wait(20)
        engine.step()
    engine.abort(victim)
    storage.gate.set()
    other = engine.add(FakeRequest("other", prompt, 2))
    engine.run()
    assert other.output == answer(prompt, 2)
    assert len(engine.free) == 63
    settle(pipeline)


def test_requests_beyond_the_limit_wait_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vllm_scheduler, "MAX_HELD", 2)
    storage = DictStorage()
    prompts = [tokens(40, seed) for seed in range(6)]
    fill(storage, *prompts)
    pipeline = make_pipeline(32, storage)
    engine = FakeEngine(pipeline, blocks=128)
    requests = [engine.add(FakeRequest(f"q{i}", prompt, 2)) for i, prompt in enumerate(prompts)]
    assert engine.connector is not None
    storage.gate.clear()
    for _ in range(4):
        engine.step()
        assert engine.connector._held() == 2
    storage.gate.set()
    engine.run()
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.output == answer(prompt, 2)
        assert request.external == 32
    settle(pipeline)


@pytest.mark.parametrize("mode", MODES[1:])
def test_an_aborted_load_gives_its_blocks_back_at_once(mode: dict[str, bool]) -> None:
    storage = DictStorage()
    prompt = tokens(100)
    fill(storage, prompt)
    pipeline = make_pipeline(32, storage)
    engine = FakeEngine(pipeline, **mode)
    ask(engine, tokens(3))
    storage.gate.clear()
    victim = engine.add(FakeRequest("victim", prompt, 5))
    engine.step()
    assert victim.receiving
    engine.abort(victim)
    engine.run(limit=3)
    assert len(engine.free) == 63
    storage.gate.set()
    settle(pipeline)


def test_blocks_the_engine_found_meanwhile_are_not_loaded() -> None:
    storage = DictStorage()
    prompt = tokens(100)
    fill(storage, prompt)
    pipeline = make_pipeline(32, storage)
    engine = FakeEngine(pipeline, prefix_cache=True)
    storage.gate.clear()
    reader = engine.add(FakeRequest("reader", prompt, 2))
    engine.step()
    # While it waits for its chunks, another request computes ten and a bit of its blocks.
    engine.add(FakeRequest("other", prompt[:41], 1, read=False))
    for _ in range(4):
        engine.step()
    storage.gate.set()
    engine.run()
    assert reader.output == answer(prompt, 2)
    assert reader.external == 96 - 40
    settle(pipeline)


def test_idle_steps_leave_the_interpreter_to_the_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = DictStorage()
    prompt = tokens(100)
    fill(storage, prompt)
    engine = FakeEngine(make_pipeline(32, storage))
    storage.gate.clear()
    waits: list[float | None] = []

    def wait(self: Transfer, timeout: float | None = None) -> bool:
        waits.append(timeout)
        return self.done

    monkeypatch.setattr(Transfer, "wait", wait)
    engine.add(FakeRequest("reader", prompt, 2))
    engine.step()
    assert waits == [_vllm_scheduler.IDLE_WAIT_S]
    # A step with work to do does not wait.
    engine.add(FakeRequest("worker", tokens(40, 1), 2))
    engine.step()
    assert [timeout for timeout in waits if timeout is not None] == [_vllm_scheduler.IDLE_WAIT_S]
    monkeypatch.undo()
    storage.gate.set()
    engine.run()


class Lazy:
    """A thread that comes to its work only when it is waited for."""

    def submit(self, call: Callable[..., None], *args: object) -> Future[None]:
        class Job(Future[None]):
            def result(self, timeout: float | None = None) -> None:
                call(*args)

        return Job()

    def shutdown(self) -> None: ...


@pytest.mark.parametrize("lag", [0, 1])
def test_steps_scheduled_on_top_of_unannounced_layers_are_not_saved(lag: int) -> None:
    """The engine computed on before its blocks were filled, and the next step on what came of that."""
    pipeline = make_pipeline(64)
    prompt = tokens(8 * CHUNK)
    ask(FakeEngine(pipeline), prompt[: 4 * CHUNK])
    engine: Any = FakeEngine(pipeline, by_layer=True, lag=lag, budget=CHUNK)
    ask(engine, tokens(20, 5))  # attaches
    (worker,) = engine.workers
    worker.wait_layer = lambda name: None
    worker._pool.shutdown()
    worker._pool = Lazy()
    request = engine.add(FakeRequest("graph", prompt, 3))
    engine.verify = False
    engine.run()
    assert request.output == answer(prompt, 3)
    other = FakeEngine(pipeline)
    for _ in range(2):
        assert ask(other, prompt).external  # every page that is loaded is compared
    settle(pipeline)
    engine.close()


def test_a_load_that_fails_after_a_reset_refused_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = DictStorage()
    prompt = tokens(4 * CHUNK)
    keys = fill(storage, prompt)
    storage.gate.clear()
    storage.broken.add(keys[2])
    engine = FakeEngine(make_pipeline(32, storage), overlap=True)
    ask(engine, tokens(20, 5))
    request = engine.add(FakeRequest("r", prompt, 2))
    for _ in range(3):
        engine.step()
    assert request.receiving
    with monkeypatch.context() as patch:  # its tenant has no identity left, or the files of its adapter are gone
        patch.setattr(engine.connector, "_admit", lambda request: "tenant")
        engine.connector.clear()
    storage.gate.set()
    engine.run()
    assert request.output == answer(prompt, 2)
    assert not engine.connector.disabled


def test_a_rank_whose_saves_are_never_made_publishes_nothing() -> None:
    """vLLM's first model runner takes the report of a rank before `wait_for_save`, which drafts put off."""
    pipeline = make_pipeline(64, layout=assemble({(0, 0): [BLOCK_LAYOUT], (1, 0): [BLOCK_LAYOUT]}, CHUNK)[0])
    engine: Any = FakeEngine(pipeline, ranks=((0, 0), (1, 0)))
    first = engine.workers[0]
    whole, first.save = first.save, lambda plan: None
    prompt = tokens(4 * CHUNK)
    ask(engine, prompt)
    first.save = whole
    ask(engine, prompt)  # every page that is loaded is compared
    settle(pipeline)


def test_a_report_that_is_taken_before_its_saves_are_made_counts() -> None:
    pipeline = make_pipeline(64)
    engine: Any = FakeEngine(pipeline)
    (worker,) = engine.workers
    load, report, taken = worker.load, worker.report, []

    def early(plan: Any) -> None:
        load(plan)
        taken.append(report())

    worker.load, worker.report = early, lambda: taken.pop() if taken else None
    prompt = tokens(4 * CHUNK)
    ask(engine, prompt)
    assert ask(engine, prompt).external == 4 * CHUNK - BLOCK
    settle(pipeline)
