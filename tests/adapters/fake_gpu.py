"""The small engine of fake_vllm with its pages on a fake GPU: work runs when a stream gets to it, in any order that the
events allow. So a wait that is missing shows as a wrong byte.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_vllm import BLOCK, BLOCK_LAYOUT, LAYERS, POISON, FakeEngine, FakeRequest, kv, layers_of

from lmcache_core import _cuda
from lmcache_core.adapters._vllm_gpu import GpuWorker
from lmcache_core.adapters._vllm_wire import StepPlan, StepReport
from lmcache_core.adapters._vllm_worker import Group
from lmcache_core.copies import PageGeometry
from lmcache_core.gpu import GpuPagedKV, How
from lmcache_core.layout import KVLayout
from lmcache_core.pipeline import Pipeline

Taste = Literal["late", "early", "any"]
TASTES: tuple[Taste, ...] = ("late", "early", "any")
COMPUTE = 0


@dataclass
class _Hold:
    """Work of a stream that is done when another has got to a point."""

    cuda: Adversary
    other: int
    point: int

    def __call__(self) -> bool:
        return self.cuda._done[self.other] >= self.point


class Adversary(FakeCuda):
    """Streams run as `late` as they may; or all but the engine's as `early` as they may; or `any` of them any time."""

    def __init__(self, taste: Taste, seed: int = 0) -> None:
        super().__init__()
        self.taste = taste
        self.rng = random.Random(seed)
        self.asked: dict[int, int] = {}

    def compute(self, work: Callable[[], None]) -> None:
        """Queue work of the engine."""
        with self._lock:
            self._put(COMPUTE, work)

    def finish(self) -> None:
        """Wait for the engine's work."""
        with self._lock:
            self._run(COMPUTE)

    def _put(self, stream: int, work: Callable[[], object]) -> None:
        self._streams[stream].append(work)
        self._queued[stream] += 1
        if self.taste == "early":
            for other in self._streams:
                while other != COMPUTE and self._step(other):
                    pass
        while self.taste == "any" and self.rng.random() < 0.6:
            self._step(self.rng.choice(list(self._streams)))

    def _wait(self, stream: int, event: int) -> int:
        self._put(stream, _Hold(self, *self._events[event]))
        return 0

    def _record(self, event: int, stream: int) -> int:
        self.asked[event] = 0
        return super()._record(event, stream)

    def _query(self, event: int) -> int:
        self.asked[event] += 1
        if self.asked[event] > 3:
            self._run(*self._events[event])
        return super()._query(event)

    def _step(self, stream: int) -> bool:
        queue = self._streams[stream]
        if not queue or queue[0]() is False:
            return False
        queue.popleft()
        self._done[stream] += 1
        return True

    def _run(self, stream: int, point: int | None = None) -> None:
        queue = self._streams.get(stream)
        while queue and (point is None or self._done[stream] < point):
            if isinstance(queue[0], _Hold):
                self._run(queue[0].other, queue[0].point)
            self._step(stream)


@contextmanager
def adversary(taste: Taste, seed: int = 0) -> Iterator[Adversary]:
    """The fake in place of the library; in the end nothing may be left."""
    fake = Adversary(taste, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda, "_library", fake)
        yield fake
    assert not fake.pinned, "host memory stays pinned"
    assert list(fake._streams) == [COMPUTE], "streams were not destroyed"
    assert fake.failed or not fake._events, "events were not destroyed"


class GpuEngine(FakeEngine):
    """`FakeEngine` that computes on a stream, and waits for it only to know the tokens it sampled."""

    def __init__(
        self,
        pipeline: Pipeline,
        cuda: Adversary,
        *,
        ranks: tuple[tuple[int, int], ...] = ((0, 0),),
        by_layer: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(pipeline, ranks=ranks, **options)
        self.cuda = cuda
        self.workers: list[GpuWorker] = []  # type: ignore[assignment]
        for i, rank in enumerate(ranks):
            names = tuple(str(layer) for layer in range(i * LAYERS, (i + 1) * LAYERS))
            group = Group(BLOCK_LAYOUT, names, partial(self._bind, i * LAYERS))
            worker = GpuWorker(rank, [group], device=0, compute=lambda: COMPUTE, by_layer=by_layer)
            self.workers.append(worker)
        self.grown: dict[str, list[int]] = {}
        self.reports: deque[list[StepReport]] = deque()
        self.told: dict[str, int] = {}

    def _bind(self, first: int, layout: KVLayout, start: int, stop: int) -> GpuPagedKV:
        stride = self.pages.strides
        bases = [self.pages.ctypes.data + layer * stride[0] for layer in range(first + start, first + stop)]
        geometry = PageGeometry.opaque(layout, block_stride=stride[1])
        return GpuPagedKV(bases, geometry, self.pages.shape[1], how=How(COMPUTE), owner=self.pages)

    def _poison(self, block: int) -> None:
        """A GPU's blocks keep what they hold until somebody writes them."""

    def _grow(self, request: FakeRequest, tokens: int) -> bool:
        had = len(request.table)
        grown = super()._grow(request, tokens)
        self.grown.setdefault(request.request_id, []).extend(request.table[had:])
        return grown

    def run(self, limit: int = 5000) -> None:
        super().run(limit)
        assert self.connector is not None
        for _ in range(100):
            if not self.connector.under_way:
                return
            self.step()
            super().run(limit)
        raise AssertionError("copies do not end")

    def step(self) -> None:
        self.steps += 1
        self.grown = {}
        running = {request.request_id for request in self.running}
        scheduled = self._schedule()
        starts = {request_id: self.requests[request_id].num_computed_tokens for request_id in scheduled}

        def written() -> Iterator[int]:
            for request_id, start in starts.items():
                admitted = request_id not in running
                table = self.requests[request_id].table[start // BLOCK :]
                yield from table if admitted else self.grown.get(request_id, ())

        tables = {request_id: [self.requests[request_id].table] for request_id in scheduled}
        assert self.connector is not None
        plan = self.connector.plan(scheduled, tables.get, written)
        for request_id, tokens in scheduled.items():
            request = self.requests[request_id]
            # A request that was given blocks and started in one step starts behind what is loaded.
            starts[request_id] = request.num_computed_tokens
            request.num_computed_tokens += tokens
            request.in_flight += tokens
        self._execute(plan, scheduled, starts)
        while len(self.outputs) > self.lag or (self.outputs and not scheduled):
            self._update()

    def _execute(self, plan: StepPlan, scheduled: dict[str, int], starts: dict[str, int]) -> None:
        workers = [] if plan.empty else self.workers
        early = bool(scheduled and plan.needed)
        for worker in workers:
            worker.begin(plan)
            if early:
                worker.load(plan)
        jobs = []
        for request_id, tokens in scheduled.items():
            request = self.requests[request_id]
            known = request.all_token_ids[: starts[request_id] + tokens]
            sound = self.verify and not set(plan.failed_blocks).intersection(request.table)
            jobs.append((known, list(request.table), starts[request_id], request.salt, sound))
            self.computed_tokens += tokens
        for layer in range(self.layers):
            for worker in self.workers:
                worker.wait_layer(str(layer))
            self.cuda.compute(partial(self._compute, layer, jobs))
            for worker in workers if early or plan.loads is None else ():
                if plan.loads is None and worker._flight is None:
                    worker.load(plan)
                worker.save_layer(plan, str(layer))
        reports: list[StepReport] = []
        received, failed = set(), set()
        for worker in workers:
            if worker._flight is None:
                worker.load(plan)
            worker.save(plan)
        for worker in self.workers:
            for name in worker.received():
                self.told[name] = self.told.get(name, 0) + 1
                if self.told[name] == len(self.workers):
                    received.add(name)
                    del self.told[name]
            failed |= worker.failed()
            while (report := worker.report()) is not None:
                reports.append(report)
        self.outputs.append((scheduled, received, failed, None))
        self.reports.append(reports)

    def _compute(self, layer: int, jobs: Sequence[tuple[list[int], list[int], int, str | None, bool]]) -> None:
        """One layer of a step, when the GPU gets to it."""
        pages = self.pages[layer]
        for known, table, start, salt, sound in jobs:
            for block in table[-(-start // BLOCK) :]:
                pages[block] = POISON
            last = b""
            for position, token in enumerate(known):
                last = kv(last, token, salt)
                value = layers_of(last, self.layers)[layer]
                page = pages[table[position // BLOCK], position % BLOCK]
                if position >= start:
                    page[:] = np.frombuffer(value, np.uint8)
                elif sound:
                    assert page.tobytes() == value, f"wrong KV at token {position} of {start}, layer {layer}"

    def _update(self) -> None:
        self.cuda.finish()
        assert self.connector is not None
        for report in self.reports.popleft():
            self.connector.done(report)
        super()._update()

    def close(self) -> None:
        super().close()
        self.cuda.finish()
