"""A connector that drives a pipeline directly, in every way an adapter may: the one RefEngine uses by default."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lmcache_core.adapters._vllm_wire import Copies, StepPlan, StepReport
from lmcache_core.identity import Identity
from lmcache_core.keys import TokenChain
from lmcache_core.pipeline import Lease, Pipeline, Reservation, Transfer
from lmcache_core.testing.refengine import Request
from lmcache_core.types import ChunkKey


class Chain(Protocol):
    """What a connector needs of `TokenChain`."""

    keys: list[ChunkKey]

    def extend(self, tokens: Sequence[int]) -> list[ChunkKey]: ...


@dataclass(eq=False)
class _State:
    """One live request."""

    request: Request
    chain: Chain
    first: int = 0
    """Chunk at which the transfer starts."""
    computed: int = 0
    """Tokens the engine had when it last asked."""
    asynchronous: bool = False
    transfer: Transfer | None = None
    lease: Lease | None = None
    saved: int = 0
    """Chunks offered so far."""


@dataclass(eq=False)
class _Load:
    """Blocks waiting for chunks."""

    request_id: str
    first: int
    start: int
    """First block to fill; the last is the last of `table`."""
    table: list[int]
    transfer: Transfer
    lease: Lease | None
    aborted: bool = False


@dataclass
class _Held:
    """What is let go some steps later, as if copies took that long."""

    step: int
    due: int
    leases: list[Lease] = field(default_factory=list)
    reservations: list[Reservation] = field(default_factory=list)


class DirectConnector:
    """Looks up, prefetches, fetches, cancels, retrieves, reserves, commits and aborts, as a seed chooses."""

    def __init__(
        self,
        pipeline: Pipeline,
        seed: int,
        *,
        hold_steps: int = 2,
        chain: Callable[[Identity], Chain] = TokenChain,
        release_early: bool = False,
    ) -> None:
        """`hold_steps`: most steps between a copy and the release of its pins. `chain` and `release_early` plant bugs:
        other keys, and leases that are given up before their copies are made."""
        self.pipeline = pipeline
        self.asked = 0
        """Chunks of all results taken: hits and misses must add up to it."""
        self.counts: Counter[str] = Counter()
        layout = pipeline.layout
        self._chunk, self._block, self._blocks = layout.chunk_tokens, layout.block_tokens, layout.blocks
        self._random = Random(seed)
        self._hold_steps = hold_steps
        self._chain = chain
        self._release_early = release_early
        self._states: dict[str, _State] = {}
        self._ready: list[_Load] = []
        self._loading: list[_Load] = []
        self._held: list[_Held] = []
        self._step = 0

    # -- asking ----------------------------------------------------------------------------------------------
    def match(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond `computed`, and whether between steps; None to be asked again."""
        state = self._states.get(request.request_id)
        if state is None:
            state = self._states[request.request_id] = _State(request, self._chain(request.identity))
        state.saved = 0
        end = (request.num_tokens - 1) // self._block * self._block
        first, last = computed // self._chunk, min(request.num_tokens // self._chunk, -(-end // self._chunk))
        if last <= first:
            self._drop(state)
            return 0, False
        keys = self._keys(state, last)[first:]
        if state.transfer is not None and (state.first != first or len(state.transfer.keys) != len(keys)):
            self._drop(state)
        if state.transfer is None and not self._begin(state, keys):
            return (None if self._random.random() < 0.5 else 0), False
        transfer = state.transfer
        assert transfer is not None
        state.first, state.computed = first, computed
        if state.lease is None and transfer.done:
            state.lease = self._take(transfer)
        if state.lease is None and (not transfer.located or self._random.random() < 0.5):
            transfer.wait(0.0005)
            return None, False
        have = transfer.count if state.lease is None else len(state.lease)
        tokens = min((first + have) * self._chunk, end) - computed
        if tokens <= 0:
            self._drop(state)
            return 0, False
        state.asynchronous = state.lease is None or self._random.random() < 0.3
        return tokens, state.asynchronous

    def _begin(self, state: _State, keys: list[ChunkKey]) -> bool:
        """Start a transfer, or do one of the other things an adapter may do with keys; whether it was started."""
        choice = self._random.random()
        if choice < 0.05:
            self.pipeline.prefetch(keys)
        elif choice < 0.15:
            self._check_hit(keys)
        elif choice < 0.25:
            self._retrieve(keys)
        elif choice < 0.28:
            self.pipeline.fetch(keys).cancel()
        if choice < 0.05 or 0.25 <= choice < 0.3:
            return False
        state.transfer = self.pipeline.fetch(keys)
        return True

    def _check_hit(self, keys: list[ChunkKey]) -> None:
        hit = self.pipeline.lookup(keys)
        hit.wait(0.01)
        if not hit.pending:
            assert len(hit.sources) == hit.count
            assert (hit.reason is None) == (hit.count == len(keys)), f"{hit.count} of {len(keys)}: {hit.reason}"

    def _retrieve(self, keys: list[ChunkKey]) -> None:
        with self.pipeline.retrieve(keys, timeout=self._random.choice([0.0, 0.001, 1.0])) as lease:
            self._note(lease, len(keys))

    def _take(self, transfer: Transfer) -> Lease:
        lease = transfer.result()
        self._note(lease, len(transfer.keys))
        return lease

    def _note(self, lease: Lease, asked: int) -> None:
        """Every miss has a reason, and no hit has one."""
        self.asked += asked
        assert (lease.reason is None) == (len(lease) == asked), f"{len(lease)} of {asked} chunks: {lease.reason}"
        assert len(lease.sources) == len(lease)
        self.counts.update(lease.sources)
        if lease.reason is not None:
            self.counts[f"miss.{lease.reason}"] += asked - len(lease)

    def _keys(self, state: _State, count: int) -> list[ChunkKey]:
        have = len(state.chain.keys)
        if have < count:
            state.chain.extend(state.request.all_token_ids[have * self._chunk : count * self._chunk])
        return state.chain.keys[:count]

    def _drop(self, state: _State) -> None:
        transfer, lease = state.transfer, state.lease
        state.transfer = state.lease = None
        if lease is not None:
            lease.release()
        elif transfer is not None:
            transfer.cancel()

    # -- one step --------------------------------------------------------------------------------------------
    def allocated(self, request_id: str, table: Callable[[], list[int]], tokens: int) -> None:
        """The engine allocated blocks: `table()` of the whole request; `tokens` are to be loaded into them."""
        state = self._states[request_id]
        if tokens <= 0 or state.transfer is None:
            self._drop(state)
            return
        start = state.computed // self._block
        load = _Load(request_id, state.first, start, table(), state.transfer, state.lease)
        (self._loading if state.asynchronous else self._ready).append(load)
        state.transfer = state.lease = None

    def plan(self, scheduled: dict[str, int], table: Callable[[str], list[int] | None]) -> StepPlan:
        """The worker's work for a step that computes `scheduled` tokens per request."""
        self._step += 1
        plan = StepPlan(self._step)
        held = _Held(self._step, self._step + self._random.randint(0, self._hold_steps))
        loads: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for load in self._ready:
            self._fill(load, held, loads)
        self._ready.clear()
        waiting: list[_Load] = []
        for load in self._loading:
            if load.aborted:
                self._give_up(load)
                plan.received.append(load.request_id)
            elif load.lease is None and not load.transfer.done:
                waiting.append(load)
            else:
                plan.failed_blocks += self._fill(load, held, loads)
                plan.received.append(load.request_id)
        if waiting and not scheduled and not plan.received:
            waiting[0].transfer.wait(0.001)
        self._loading = waiting
        if self._release_early:
            for lease in held.leases:
                lease.release()
        saves = self._saves(scheduled, table, held)
        plan.loads, plan.saves = _copies(loads), _copies(saves)
        self._held.append(held)
        return plan

    def _fill(self, load: _Load, held: _Held, loads: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> list[int]:
        """Plan one load; return the blocks for which nothing arrived."""
        lease = load.lease or self._take(load.transfer)
        held.leases.append(lease)
        stop = min(len(load.table), (load.first + len(lease)) * self._blocks)
        for i in range(len(lease)):
            at = (load.first + i) * self._blocks
            row = [load.table[b] if load.start <= b < stop else -1 for b in range(at, at + self._blocks)]
            loads.append((np.array([row]), lease.offsets[i : i + 1]))
        return load.table[max(stop, load.start) :]

    def _give_up(self, load: _Load) -> None:
        if load.lease is None:
            load.transfer.cancel()
        else:
            load.lease.release()

    def _saves(
        self, scheduled: dict[str, int], table: Callable[[str], list[int] | None], held: _Held
    ) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Reserve slots for the chunks this step completes."""
        saves: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for request_id, tokens in scheduled.items():
            state = self._states[request_id]
            complete = (state.request.num_computed_tokens + tokens) // self._chunk
            if complete <= state.saved:
                continue
            first = state.saved if self._random.random() < 0.5 else 0
            reservation = self.pipeline.reserve(self._keys(state, complete), first)
            state.saved = complete
            blocks = table(request_id)
            if not reservation.positions or blocks is None or self._random.random() < 0.05:
                reservation.abort()
                continue
            grid = np.array(blocks[: complete * self._blocks], dtype=np.int64).reshape(complete, self._blocks)
            saves.append((grid[reservation.positions], reservation.offsets))
            held.reservations.append(reservation)
        return saves

    def done(self, report: StepReport) -> None:
        """The worker has carried out the plan of a step."""
        for held in self._held:
            if held.step == report.step and not report.copied:
                _let_go(held.reservations, commit=False)
        for held in [h for h in self._held if h.due <= report.step]:
            self._held.remove(held)
            self._let_go(held)

    def _let_go(self, held: _Held) -> None:
        for lease in held.leases:
            lease.release()
        _let_go(held.reservations, commit=self._random.random() >= 0.02)

    def finished(self, request_id: str) -> None:
        """The request ended or was aborted; blocks of an asynchronous load are still reported as received."""
        state = self._states.pop(request_id, None)
        if state is not None:
            self._drop(state)
        for load in self._loading:
            load.aborted |= load.request_id == request_id

    def close(self) -> None:
        """Let go of everything. The pipeline stays open."""
        for state in self._states.values():
            self._drop(state)
        for load in (*self._ready, *self._loading):
            self._give_up(load)
        for held in self._held:
            self._let_go(held)
        self._states.clear()
        self._ready.clear()
        self._loading.clear()
        self._held.clear()


def _let_go(reservations: list[Reservation], *, commit: bool) -> None:
    for reservation in reservations:
        if commit:
            reservation.commit()
        else:
            reservation.abort()
    reservations.clear()


def _copies(rows: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Copies | None:
    if not rows:
        return None
    return Copies(np.concatenate([grid for grid, _ in rows]), np.concatenate([offsets for _, offsets in rows]))
