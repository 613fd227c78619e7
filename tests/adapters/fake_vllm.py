"""A small engine that drives the vLLM connector's two halves in vLLM's order, and knows every byte that must result.

KV of a token is a keyed function of all tokens up to it, written into opaque pages. Before a step reads a page, the
page is compared with that function, so one wrong byte in any load is found where it happens. Freed pages are poisoned.
"""

from __future__ import annotations

import functools
import itertools
import random
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b

import numpy as np

from lmcache_backends.cpu import CpuMemory
from lmcache_core.adapters._vllm_parts import assemble
from lmcache_core.adapters._vllm_scheduler import Scheduler
from lmcache_core.adapters._vllm_wire import StepPlan, StepReport
from lmcache_core.adapters._vllm_worker import Group, Worker
from lmcache_core.copies import PagedKV, PageGeometry
from lmcache_core.eviction.lru import Lru
from lmcache_core.identity import Identity
from lmcache_core.layout import KVLayout
from lmcache_core.pipeline import Pipeline
from lmcache_core.protocols import StorageBackend
from lmcache_core.slots import Slots
from lmcache_core.testing.invariants import settle
from lmcache_core.tier import StorageTier
from lmcache_core.types import ChunkKey, Got, Put, object_bytes, round_up

LAYERS, BLOCK, CHUNK, TOKEN_BYTES, VOCAB = 2, 4, 16, 16, 97
POISON = 0xDB
LAYOUT = KVLayout(
    order="pages",
    dtype="uint8",
    num_layers=LAYERS,
    planes=2,
    kv_heads=1,
    head_dim=TOKEN_BYTES // 2,
    chunk_tokens=CHUNK,
    block_tokens=BLOCK,
    packing="fake/1",
)
BLOCK_LAYOUT = replace(LAYOUT, chunk_tokens=BLOCK)


def kv(before: bytes, token: int, salt: str | None) -> bytes:
    """KV of a token in layer 0, from that of the token before it."""
    return blake2b(before + token.to_bytes(4, "little"), digest_size=TOKEN_BYTES, key=(salt or "").encode()).digest()


def layers_of(first: bytes, layers: int = LAYERS) -> list[bytes]:
    """KV of one token in every layer, from that in layer 0."""
    return [first, *(blake2b(first, digest_size=TOKEN_BYTES, salt=bytes([i])).digest() for i in range(1, layers))]


def next_token(first: bytes) -> int:
    """Greedy sampling: the next token from the KV of the last one."""
    return sum(first) % VOCAB


def answer(prompt: Sequence[int], count: int, salt: str | None = None) -> list[int]:
    """The tokens an engine without any cache generates."""
    last = b""
    for token in prompt:
        last = kv(last, token, salt)
    out = []
    for _ in range(count):
        out.append(next_token(last))
        last = kv(last, out[-1], salt)
    return out


@dataclass(eq=False)
class FakeRequest:
    """What the connector reads of vLLM's `Request`, and what the engine needs itself."""

    request_id: str
    prompt: list[int]
    max_new: int
    salt: str | None = None
    lora: str = ""
    read: bool = True
    refused: str = ""
    kv_transfer_params: dict[str, object] | None = None
    answer: dict[str, object] | None = None
    all_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    table: list[int] = field(default_factory=list)
    receiving: bool = False
    in_flight: int = 0
    external: int = 0
    """Tokens loaded by the connector, over all admissions."""
    preemptions: int = 0
    done: bool = False
    aborted: bool = False

    def __post_init__(self) -> None:
        self.all_token_ids = list(self.prompt)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def output(self) -> list[int]:
        return self.all_token_ids[len(self.prompt) :]


class DictStorage(StorageBackend):
    """A storage tier in a dictionary, with faults on demand."""

    contains_is_local = True

    def __init__(self, stored: dict[ChunkKey, bytes] | None = None) -> None:
        self.stored: dict[ChunkKey, bytes] = {} if stored is None else stored
        self.gate = threading.Event()
        """Reads wait while it is clear."""
        self.gate.set()
        self.broken: set[ChunkKey] = set()
        """Keys whose bytes come back changed."""

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [key in self.stored for key in keys]

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        self.gate.wait(30)
        got: list[Got] = []
        for key, buffer in zip(keys, buffers, strict=True):
            data = self.stored.get(key)
            if data is None:
                got.append(None)
                continue
            buffer[: len(data)] = data
            if key in self.broken:
                buffer[len(data) - 1] ^= 1
            got.append(len(data))
        return got

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        for key, buffer in zip(keys, buffers, strict=True):
            self.stored[key] = bytes(buffer)
        return [None] * len(keys)

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        for key in keys:
            self.stored.pop(key, None)

    def clear(self) -> None:
        self.stored.clear()

    def scan(self) -> Iterator[tuple[ChunkKey, int]]:
        return iter([(key, len(data)) for key, data in self.stored.items()])

    def close(self) -> None:
        pass


def make_pipeline(
    chunks: int, storage: DictStorage | None = None, *, deadline: float = 20.0, layout: KVLayout = LAYOUT
) -> Pipeline:
    """A pipeline of `chunks` slots in shared memory, over `storage`."""
    memory = CpuMemory(pin=False, shared=True)
    region = memory.allocate(chunks * round_up(object_bytes(layout.chunk_bytes)))
    slots = Slots(region, layout.chunk_bytes, Lru(), poison=True)
    tiers = []
    if storage is not None:
        tiers.append(
            StorageTier(
                "disk",
                storage,
                None,
                Lru(),
                slots,
                layout.id,
                write="through",
                promote=True,
                capacity=None,
                threads=2,
                queue=64,
                inflight=1 << 30,
                deadline=deadline,
                lookup_deadline=deadline / 2,
                staging=None,
            )
        )
    return Pipeline(layout, "dram", memory, slots, tiers)


IDENTITY = Identity(model="fake", weights="0" * 64, layout=LAYOUT)


class FakeEngine:
    """vLLM's scheduler and worker in miniature: chunked prefill, prefix cache, preemption, asynchronous loads."""

    def __init__(
        self,
        pipeline: Pipeline | None,
        *,
        blocks: int = 64,
        budget: int = 24,
        prefix_cache: bool = False,
        lag: int = 0,
        asynchronous: bool = False,
        overlap: bool = False,
        save_decode: bool = True,
        attachable: bool = True,
        ranks: tuple[tuple[int, int], ...] = ((0, 0),),
        by_layer: bool = False,
    ) -> None:
        self.layers = LAYERS * len(ranks)
        self.pages = np.full((self.layers, blocks, BLOCK, TOKEN_BYTES), POISON, dtype=np.uint8)
        self.revision = ""
        self.connector: Scheduler | None = None
        if pipeline is not None:
            self.connector = Scheduler(
                pipeline,
                self._admit,
                asynchronous=asynchronous,
                overlap=overlap,
                save_decode=save_decode,
                parts=assemble({rank: [BLOCK_LAYOUT] for rank in ranks}, CHUNK)[1],
            )
        self.workers = []
        for i, rank in enumerate(ranks):
            names = tuple(str(layer) for layer in range(i * LAYERS, (i + 1) * LAYERS))
            group = Group(BLOCK_LAYOUT, names, partial(self._bind, i * LAYERS))
            self.workers.append(Worker(rank, [group], by_layer=by_layer))
        self.attachable = attachable
        self.verify = True
        """Whether to check every page before it is read."""
        self.budget = budget
        self.lag = lag
        self.free = list(range(blocks - 1, 0, -1))
        self.refs = [0] * blocks
        self.cache: dict[bytes, int] | None = {} if prefix_cache else None
        self.hash_of: dict[int, bytes] = {}
        self.waiting: deque[FakeRequest] = deque()
        self.running: list[FakeRequest] = []
        self.requests: dict[str, FakeRequest] = {}
        self.received: set[str] = set()
        self.failed: set[str] = set()
        self.outputs: deque[tuple[dict[str, int], set[str], set[int], StepReport | None]] = deque()
        self.steps = 0
        self.computed_tokens = 0

    def _admit(self, request: FakeRequest) -> Identity | str:
        identity = replace(IDENTITY, revision=self.revision)
        return request.refused or identity.with_request(lora=request.lora, salt=request.salt)

    def _bind(self, first: int, layout: KVLayout, start: int, stop: int) -> PagedKV:
        if not self.attachable:
            raise ValueError("this worker cannot attach")
        stride = self.pages.strides
        bases = [self.pages.ctypes.data + layer * stride[0] for layer in range(first + start, first + stop)]
        geometry = PageGeometry.opaque(layout, block_stride=stride[1])
        return PagedKV(bases, geometry, self.pages.shape[1], owner=self.pages)

    # -- blocks ----------------------------------------------------------------------------------------------
    def _grow(self, request: FakeRequest, tokens: int) -> bool:
        need = -(-tokens // BLOCK) - len(request.table)
        if need > len(self.free) + sum(1 for b in self.hash_of if self.refs[b] == 0):
            return False
        for _ in range(need):
            if not self.free:
                victim = next(b for b in self.hash_of if self.refs[b] == 0)
                self._forget(victim)
            block = self.free.pop()
            self.refs[block] = 1
            request.table.append(block)
        return True

    def _fits(self, request: FakeRequest) -> bool:
        """Whether an asynchronous load can be admitted: held blocks must never keep each other from their end."""
        holders = [r for r in (*self.waiting, *self.running) if r.table and r.num_computed_tokens < r.num_tokens]
        reserved = sum(-(-r.num_tokens // BLOCK) - len(r.table) for r in holders)
        room = len(self.free) + sum(1 for block in self.hash_of if self.refs[block] == 0)
        return -(-request.num_tokens // BLOCK) <= room - reserved

    def _forget(self, block: int) -> None:
        key = self.hash_of.pop(block)
        assert self.cache is not None
        del self.cache[key]
        self._poison(block)
        self.free.append(block)

    def _poison(self, block: int) -> None:
        self.pages[:, block] = POISON

    def _release(self, request: FakeRequest) -> None:
        for block in reversed(request.table):
            self.refs[block] -= 1
            if self.refs[block] == 0 and block not in self.hash_of:
                self._poison(block)
                self.free.append(block)
        request.table = []

    def _hashes(self, request: FakeRequest) -> list[bytes]:
        keys, state = [], (request.salt or "").encode()
        for at in range(0, request.num_tokens // BLOCK * BLOCK, BLOCK):
            state = blake2b(state + repr(request.all_token_ids[at : at + BLOCK]).encode()).digest()
            keys.append(state)
        return keys

    def _local_hit(self, request: FakeRequest) -> list[int]:
        hit: list[int] = []
        if self.cache is not None and request.read:
            for key in self._hashes(request)[: (request.num_tokens - 1) // BLOCK]:
                if key not in self.cache:
                    break
                hit.append(self.cache[key])
        return hit

    def _publish(self, request: FakeRequest, tokens: int) -> None:
        if self.cache is not None:
            for key, block in zip(self._hashes(request)[: tokens // BLOCK], request.table, strict=False):
                if key not in self.cache and block not in self.hash_of:
                    self.cache[key] = block
                    self.hash_of[block] = key

    def close(self) -> None:
        if self.connector is not None:
            self.connector.close(20)
        for worker in self.workers:
            worker.close()

    # -- what an API server does -------------------------------------------------------------------------------
    def add(self, request: FakeRequest) -> FakeRequest:
        self.requests[request.request_id] = request
        self.waiting.append(request)
        return request

    def abort(self, request: FakeRequest) -> None:
        if request.done:
            return
        request.done = request.aborted = True
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._finish(request, hold=request.receiving and request.request_id not in self.received)
        self.received.discard(request.request_id)

    def _finish(self, request: FakeRequest, *, hold: bool = False) -> None:
        if self.connector is not None:
            request.answer = self.connector.finished(request.request_id)
        if not hold:
            self._release(request)
            del self.requests[request.request_id]

    def run(self, limit: int = 5000) -> None:
        """Step until every request has ended and every held block is back."""
        for _ in range(limit):
            if not self.requests and not self.outputs:
                return
            self.step()
        raise AssertionError(f"no end after {limit} steps: {list(self.requests)}")

    # -- one step --------------------------------------------------------------------------------------------
    def step(self) -> None:
        self.steps += 1
        scheduled = self._schedule()
        plan = StepPlan(self.steps)
        if self.connector is not None:
            tables = {request_id: [self.requests[request_id].table] for request_id in scheduled}
            plan = self.connector.plan(scheduled, tables.get)
        starts = {}
        for request_id, tokens in scheduled.items():
            request = self.requests[request_id]
            starts[request_id] = request.num_computed_tokens
            request.num_computed_tokens += tokens
            request.in_flight += tokens
        self._execute(plan, scheduled, starts)
        while len(self.outputs) > self.lag or (self.outputs and not scheduled):
            self._update()

    def _schedule(self) -> dict[str, int]:
        scheduled: dict[str, int] = {}
        left = self.budget
        for request in list(self.running):
            tokens = min(left, request.num_tokens - request.num_computed_tokens)
            if tokens <= 0 or request not in self.running:
                continue
            while not self._grow(request, request.num_computed_tokens + tokens):
                victim = next(r for r in reversed(self.running) if r.request_id not in scheduled)
                self._preempt(victim)
                if victim is request:
                    break
            if request in self.running:
                self._publish(request, request.num_computed_tokens + tokens)
                scheduled[request.request_id] = tokens
                left -= tokens
        preempted = any(r.preemptions and not r.table for r in self.waiting)
        # Requests that hold blocks go first, or they could wait for blocks behind one that waits for theirs.
        for request in sorted(self.waiting, key=lambda request: not request.table):
            if left <= 0 or (preempted and scheduled):
                break
            if request.in_flight:
                continue
            if request.receiving:
                if request.request_id not in self.received:
                    continue
                self.received.discard(request.request_id)
                request.receiving = False
                if request.request_id in self.failed:
                    self.failed.discard(request.request_id)
                    if not request.num_computed_tokens:
                        self._release(request)
                self._publish(request, request.num_computed_tokens)
            local: list[int] = []
            external, computed, asynchronous = 0, request.num_computed_tokens, False
            if request.num_computed_tokens == 0:
                local = self._local_hit(request)
                computed = len(local) * BLOCK
                if self.connector is not None:
                    answer, asynchronous = self.connector.match(request, computed, read=request.read)
                    if answer is None:
                        continue
                    external = answer
                    assert external % BLOCK == 0
                    assert computed + external < request.num_tokens
                    assert external or not asynchronous
            tokens = 0 if asynchronous else min(left, request.num_tokens - computed - external)
            if asynchronous and not self._fits(request):
                break
            for block in local:
                self.refs[block] += 1
            request.table = request.table or list(local)
            if not self._grow(request, computed + external + tokens):
                if request.num_computed_tokens == 0:
                    self._release(request)
                break
            if self.connector is not None:
                table = list(request.table)
                self.connector.allocated(request.request_id, lambda table=table: [table], external)
            request.external += external
            request.num_computed_tokens = computed + external
            if asynchronous:
                request.receiving = True
                continue
            self.waiting.remove(request)
            self.running.append(request)
            self._publish(request, computed + external + tokens)
            scheduled[request.request_id] = tokens
            left -= tokens
        return scheduled

    def _preempt(self, request: FakeRequest) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_computed_tokens = 0
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _execute(self, plan: StepPlan, scheduled: dict[str, int], starts: dict[str, int]) -> None:
        early = bool(scheduled and (plan.needed or plan.failed_blocks))
        if early:
            for worker in self.workers:
                worker.load(plan)
        for layer in range(self.layers):
            for worker in self.workers:
                worker.wait_layer(str(layer))
        for request_id, tokens in scheduled.items():
            request = self.requests[request_id]
            start = starts[request_id]
            if self.verify and not set(plan.failed_blocks).intersection(request.table):
                self._verify(request, start)
            self.computed_tokens += tokens
            last = self._read(request, start - 1)[0] if start else b""
            for position in range(start, start + tokens):
                last = kv(last, request.all_token_ids[position], request.salt)
                for layer, value in enumerate(layers_of(last, self.layers)):
                    page = self.pages[layer, request.table[position // BLOCK], position % BLOCK]
                    page[:] = np.frombuffer(value, np.uint8)
        for layer in range(self.layers if scheduled else 0):
            for worker in self.workers:
                worker.save_layer(plan, str(layer))
        reports: list[StepReport] = []
        received, failed = [], set()
        for worker in self.workers:
            if not early:
                worker.load(plan)
            worker.save(plan)
            received.append(worker.received())
            failed |= worker.failed()
            report = worker.report()
            if report is not None:
                reports.append(report)
        assert all(names == received[0] for names in received), "ranks end a load in different steps"
        merged = functools.reduce(StepReport.merge, reports) if reports else None
        self.outputs.append((scheduled, received[0], failed, merged))

    def _read(self, request: FakeRequest, position: int) -> list[bytes]:
        return [
            self.pages[layer, request.table[position // BLOCK], position % BLOCK].tobytes()
            for layer in range(self.layers)
        ]

    def _verify(self, request: FakeRequest, computed: int) -> None:
        last = b""
        for position in range(computed):
            last = kv(last, request.all_token_ids[position], request.salt)
            found = self._read(request, position)
            assert found == layers_of(last, self.layers), (
                f"{request.request_id}: wrong KV at token {position} of {computed}"
            )

    def _update(self) -> None:
        scheduled, received, failed_blocks, report = self.outputs.popleft()
        spoiled: set[str] = set()
        for request in self.running:
            # A load within a step failed: what was computed on top of it does not count.
            bad = failed_blocks.intersection(request.table)
            if bad and request.request_id in scheduled:
                first = next(i for i, block in enumerate(request.table) if block in bad)
                request.num_computed_tokens = first * BLOCK
                spoiled.add(request.request_id)
        for request in self.waiting:
            if request.receiving and failed_blocks.intersection(request.table):
                first = next(i for i, block in enumerate(request.table) if block in failed_blocks)
                request.num_computed_tokens = first * BLOCK
                self.failed.add(request.request_id)
        for request_id, tokens in scheduled.items():
            request = self.requests.get(request_id)
            if request is None or request.done:
                continue
            request.in_flight -= tokens
            if request not in self.running or request_id in spoiled:
                continue
            if request.num_computed_tokens == request.num_tokens:
                first = self._read(request, request.num_tokens - 1)[0]
                request.all_token_ids.append(next_token(first))
                if len(request.output) == request.max_new:
                    request.done = True
                    self.running.remove(request)
                    self._finish(request)
        if self.connector is not None and report is not None:
            self.connector.done(report)
        for request_id in received:
            request = self.requests[request_id]
            if request.done:
                self._release(request)
                del self.requests[request_id]
            else:
                self.received.add(request_id)


MODES: list[dict[str, bool]] = [{}, {"overlap": True}, {"asynchronous": True}]
"""Loads polled into a step, overlapped when they need reading, always asynchronous."""

_ids = itertools.count()


def tokens(count: int, seed: float = 0) -> list[int]:
    return random.Random(seed).choices(range(90), k=count)


def ask(engine: FakeEngine, prompt: list[int], max_new: int = 3, **more: object) -> FakeRequest:
    """Run one request to its end and compare its answer with an engine that has no cache."""
    request = engine.add(FakeRequest(f"r{next(_ids)}", prompt, max_new, **more))
    engine.run()
    assert request.output == answer(prompt, max_new, request.salt)
    assert engine.connector is not None
    assert not engine.connector.disabled
    return request


def fill(storage: DictStorage, *prompts: list[int]) -> list[ChunkKey]:
    """A first lifetime that leaves the prompts in `storage`; the keys it stored, in order."""
    pipeline = make_pipeline(64, storage)
    engine = FakeEngine(pipeline)
    for prompt in prompts:
        ask(engine, prompt)
    settle(pipeline)
    keys = list(pipeline.slots.index)
    pipeline.close()
    return keys
