"""The scheduler's half of the vLLM connector: which chunks each step loads and saves.

It owns the pipeline: keys, pins, I/O. The worker gets offsets into the shared arena and copies. Nothing here imports
vLLM, waits for I/O while requests run, or touches a byte of KV.

A request goes through: `match` (how much is cached; starts reading) -> `allocated` (blocks to fill) -> `plan` of the
same step, or of a later one for an asynchronous load -> `done` when the worker reports -> `finished`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lmcache_core.adapters._vllm_wire import Attach, Copies, StepPlan, StepReport
from lmcache_core.identity import Identity
from lmcache_core.keys import TokenChain
from lmcache_core.types import ChunkKey

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lmcache_core.pipeline import Lease, Pipeline, Reservation, Transfer

logger = logging.getLogger("vllm.lmcache_core")

IDLE_WAIT_S = 0.005
"""Longest wait for a read in a step that computes nothing. It frees the interpreter for the reading threads, which a
scheduler that spins would starve; a step with work never waits."""

MAX_ATTACH_STEPS = 64
"""Steps within which the worker must say whether it could map the arena."""

MEASURED_TOKENS = 128
"""Fewest prompt tokens of a step that says how fast the engine computes them."""

_NEVER = 1 << 62

MAX_HELD = 16
"""Most requests whose chunks are pinned or being read before they have blocks; the next ones are asked again later."""


class Request(Protocol):
    """What the adapter reads of an engine's request."""

    request_id: str
    num_computed_tokens: int

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def all_token_ids(self) -> Sequence[int]: ...


@dataclass(slots=True, eq=False)
class _Fetch:
    """Chunks `first...` of a request, being read or held."""

    first: int
    keys: list[ChunkKey]
    transfer: Transfer
    lease: Lease | None = None
    computed: int = 0
    """Tokens the engine had of its own when it last asked."""

    def settle(self) -> Lease | None:
        """The lease, once everything has arrived or failed."""
        if self.lease is None and self.transfer.done:
            self.lease = self.transfer.result()
        return self.lease

    def drop(self) -> None:
        if self.lease is None:
            self.transfer.cancel()
        else:
            self.lease.release()


@dataclass(slots=True, eq=False)
class _State:
    """One live request."""

    request: Request
    chain: TokenChain
    fetch: _Fetch | None = None
    """Asked for, not yet given blocks."""
    saved: int = 0
    """Leading chunks that were offered to the pipeline since the request last started."""
    failed: bool = False
    """A load of this request failed; it is not tried again."""
    sources: list[str] = field(default_factory=list)
    """Tier of each block of the last load, for the engine's statistics."""
    missed: int = -1
    """Chunks stored by the pipeline in all when this request was last found to have no hit."""

    def keys(self, count: int) -> list[ChunkKey]:
        """Keys of the first `count` chunks; hashes only tokens that were not hashed before."""
        have = len(self.chain.keys)
        if have < count:
            size = self.chain.chunk_tokens
            self.chain.extend(self.request.all_token_ids[have * size : count * size])
        return self.chain.keys[:count]


@dataclass(slots=True, eq=False)
class _Load:
    """Blocks waiting for chunks."""

    request_id: str
    fetch: _Fetch
    table: list[int]
    """The request's blocks up to `stop`."""
    start: int
    stop: int
    """Blocks `start...stop` of the request are to be filled."""
    asynchronous: bool
    aborted: bool = False


@dataclass(slots=True)
class _Step:
    """What is held until the worker reports the step."""

    began: float
    leases: list[Lease] = field(default_factory=list)
    reservations: list[Reservation] = field(default_factory=list)
    prefilled: int = 0
    """Prompt tokens that the step computes."""


class Scheduler:
    """Plans loads and saves for one engine. Called by the engine's scheduler thread only."""

    def __init__(
        self,
        pipeline: Pipeline,
        admit: Callable[[Request], Identity | str],
        *,
        asynchronous: bool,
        overlap: bool,
        save_decode: bool,
    ) -> None:
        """`admit` gives the identity of a request, or the reason why it takes no part. `asynchronous` loads every hit
        between steps, `overlap` only hits that must be read first; otherwise such a request waits until its chunks
        are in memory and is loaded within its first step."""
        share = pipeline.slots.region.share
        if share is None:
            raise AssertionError("the pipeline must be built with shared=True")
        layout = pipeline.layout
        self.pipeline = pipeline
        self.counts: Counter[str] = Counter()
        self.disabled = ""
        """Why nothing is loaded or saved any more; empty while all is well."""
        self._admit = admit
        self._asynchronous = asynchronous
        self._overlap = overlap or asynchronous
        self._save_decode = save_decode
        self._chunk = layout.chunk_tokens
        self._block = layout.block_tokens
        self._blocks = layout.blocks
        self._attach: Attach | None = Attach(dict(share), layout)
        self._states: dict[str, _State] = {}
        self._refused: set[str] = set()
        self._sync: list[_Load] = []
        self._async: list[_Load] = []
        self._steps: dict[int, _Step] = {}
        self._step = 0

    # -- one request -----------------------------------------------------------------------------------------
    def match(self, request: Request, computed: int, *, read: bool = True) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond `computed`, and whether between steps; None means ask again later."""
        try:
            return self._match(request, computed, read)
        except Exception:
            self._give_up("match")
            return 0, False

    def _match(self, request: Request, computed: int, read: bool) -> tuple[int | None, bool]:
        state = self._state(request)
        if state is None:
            return 0, False
        state.saved = 0
        end = (request.num_tokens - 1) // self._block * self._block
        first = computed // self._chunk
        last = min(request.num_tokens // self._chunk, -(-end // self._chunk))
        if not read or state.failed or self.disabled or end <= computed or last <= first:
            self._drop(state)
            return 0, False
        fetch = state.fetch
        if fetch is not None and fetch.first > first:
            self._drop(state)
            fetch = None
        if fetch is None:
            if state.missed == self.pipeline.counts["stored"]:
                return 0, False  # asked again (no room in the engine), and nothing was stored since
            if self._held() >= MAX_HELD:
                return None, False
            keys = state.keys(last)[first:]
            fetch = state.fetch = _Fetch(first, keys, self.pipeline.fetch(keys, first))
        fetch.computed = computed
        lease = fetch.settle()
        if lease is None and (not self._overlap or not fetch.transfer.located):
            return None, False
        have = len(lease) if lease is not None else fetch.transfer.count
        tokens = min((fetch.first + have) * self._chunk, end) - computed
        if tokens <= 0:
            self._drop(state)
            state.missed = self.pipeline.counts["stored"]
            return 0, False
        if self._attach is not None:
            # The worker maps the arena in the next (perhaps empty) step; only then can a load be promised.
            return None, False
        return tokens, self._asynchronous or lease is None

    def allocated(self, request_id: str, table: Callable[[], list[int]], tokens: int) -> None:
        """The engine allocated blocks: `table()` of the whole request; `tokens` are to be loaded into them."""
        state = self._states.get(request_id)
        if state is None or state.fetch is None:
            return
        if tokens <= 0:
            self._drop(state)
            return
        fetch, state.fetch = state.fetch, None
        start = fetch.computed // self._block
        stop = start + tokens // self._block
        asynchronous = self._asynchronous or fetch.lease is None
        load = _Load(request_id, fetch, table()[:stop], start, stop, asynchronous)
        (self._async if asynchronous else self._sync).append(load)
        self.counts["loaded_tokens"] += tokens
        state.sources = self._sources_of(load)

    def sources(self, request_id: str, tokens: int) -> dict[str, int]:
        """Tokens of the request's last load by tier name; empty when unknown."""
        state = self._states.get(request_id)
        if state is None or len(state.sources) * self._block != tokens:
            return {}
        found = Counter(state.sources)
        return {tier: count * self._block for tier, count in found.items()}

    def finished(self, request_id: str) -> None:
        """The request ended, was aborted or failed. Blocks of an asynchronous load are still reported as received."""
        self._refused.discard(request_id)
        state = self._states.pop(request_id, None)
        if state is not None:
            self._drop(state)
        for load in self._async:
            if load.request_id == request_id:
                load.aborted = True

    # -- one step --------------------------------------------------------------------------------------------
    def plan(self, scheduled: Mapping[str, int], table: Callable[[str], list[int] | None]) -> StepPlan:
        """The worker's part of a step that computes `scheduled` tokens per request; `table` gives its blocks."""
        self._step += 1
        plan, step = StepPlan(self._step), _Step(monotonic())
        try:
            if not scheduled:
                self._wait_idle()
            self._plan_loads(plan, step)
        except Exception:
            self._give_up("loads")
            self._withdraw(plan)
        step.prefilled = sum(tokens for tokens in scheduled.values() if tokens > 1)
        try:
            plan.saves = self._plan_saves(scheduled, table, step)
        except Exception:
            self._give_up("saves")
            while step.reservations:
                step.reservations.pop().abort()
        if step.leases or step.reservations:
            self._steps[self._step] = step
        return plan

    def _plan_loads(self, plan: StepPlan, step: _Step) -> None:
        if self._attach is not None and self._step > MAX_ATTACH_STEPS:
            self._detached(f"the worker did not answer within {MAX_ATTACH_STEPS} steps")
        plan.attach = self._attach
        rows: list[NDArray[np.int64]] = []
        offsets: list[NDArray[np.int64]] = []
        waiting: list[_Load] = []
        for load in self._sync:
            self._fill(load, step, rows, offsets)
        for load in self._async:
            if load.aborted:
                load.fetch.drop()
                plan.received.append(load.request_id)
            elif load.fetch.settle() is None:
                waiting.append(load)
            else:
                plan.failed_blocks += self._fill(load, step, rows, offsets)
                plan.received.append(load.request_id)
        if rows:
            plan.loads = Copies(np.concatenate(rows), np.concatenate(offsets))
        self._sync, self._async = [], waiting

    def done(self, report: StepReport) -> None:
        """The worker has carried out the plan of a step (and of all before it)."""
        if report.attached is not None and self._attach is not None:
            self._attach = None
            if not report.attached:
                self._detached(report.error)
        for number in [n for n in self._steps if n <= report.step]:
            step = self._steps.pop(number)
            # Steps that save report, which prompts do; a step that waited behind another one looks slower than it was,
            # so that reading gets the benefit of the doubt. Loading is none of the computing.
            if number == report.step and step.prefilled >= MEASURED_TOKENS and not step.leases:
                self.pipeline.note_prefill(step.prefilled, monotonic() - step.began)
            for lease in step.leases:
                lease.release()
            for reservation in step.reservations:
                # A step that was never reported may not have been carried out: its slots hold nothing to be trusted.
                if number == report.step and report.copied:
                    self.counts["saved_chunks"] += reservation.commit()
                else:
                    reservation.abort()

    # -- life ------------------------------------------------------------------------------------------------
    def clear(self) -> bool:
        """Forget every cached chunk, and take the identities of live requests anew. What they have computed so far is
        not saved. False when loads already promised to the engine still bring old chunks."""
        for request_id, state in list(self._states.items()):
            self._drop(state)
            identity = self._admit(state.request)
            if isinstance(identity, str):
                self._refuse(request_id, identity)
                del self._states[request_id]
            else:
                state.chain = TokenChain(identity)
                state.saved = _NEVER
        self.pipeline.clear()
        return not (self._sync or self._async)

    def close(self, timeout: float) -> None:
        """Let go of everything and close the pipeline, within about `timeout` seconds."""
        for state in self._states.values():
            self._drop(state)
        for load in (*self._sync, *self._async):
            load.fetch.drop()
        for step in self._steps.values():
            for lease in step.leases:
                lease.release()
            for reservation in step.reservations:
                reservation.abort()
        self._states.clear()
        self._sync.clear()
        self._async.clear()
        self._steps.clear()
        self.disabled = self.disabled or "closed"
        self.pipeline.close(timeout)

    # -- inside ----------------------------------------------------------------------------------------------
    def _give_up(self, where: str) -> None:
        """Called in an exception handler: a defect of ours must not fail the engine's requests."""
        logger.exception("lmcache-core: please report this defect")
        self._detached(f"unexpected error in {where}; see the log")

    def _withdraw(self, plan: StepPlan) -> None:
        """Loads could not be planned: promised blocks hold nothing, and nothing stays promised."""
        plan.loads, plan.received, plan.failed_blocks = None, [], []
        for load in (*self._sync, *self._async):
            load.fetch.drop()
            plan.failed_blocks += load.table[load.start : load.stop]
            if load.asynchronous:
                plan.received.append(load.request_id)
        self._sync, self._async = [], []

    def _detached(self, reason: str) -> None:
        self._attach = None
        self.disabled = reason
        logger.error("lmcache-core: caching is off: %s", reason)

    def _state(self, request: Request) -> _State | None:
        state = self._states.get(request.request_id)
        if state is None and not self.disabled and request.request_id not in self._refused:
            identity = self._admit(request)
            if isinstance(identity, str):
                self._refuse(request.request_id, identity)
                return None
            state = self._states[request.request_id] = _State(request, TokenChain(identity))
        return state

    def _refuse(self, request_id: str, reason: str) -> None:
        self._refused.add(request_id)
        self.counts[f"bypass.{reason}"] += 1

    def _drop(self, state: _State) -> None:
        fetch, state.fetch = state.fetch, None
        if fetch is not None:
            fetch.drop()

    def _held(self) -> int:
        return sum(1 for state in self._states.values() if state.fetch is not None)

    def _wait_idle(self) -> None:
        """Nothing to compute: wait a moment for the oldest read, unless something is ready already."""
        transfers = [load.fetch.transfer for load in self._async if load.fetch.lease is None and not load.aborted]
        transfers += [s.fetch.transfer for s in self._states.values() if s.fetch is not None and s.fetch.lease is None]
        if transfers and not any(transfer.done for transfer in transfers):
            transfers[0].wait(IDLE_WAIT_S)

    def _fill(
        self, load: _Load, step: _Step, rows: list[NDArray[np.int64]], offsets: list[NDArray[np.int64]]
    ) -> list[int]:
        """Plan one load; return the blocks for which nothing arrived."""
        lease = load.fetch.settle()
        if lease is None:
            raise AssertionError("a load is filled when its transfer has ended")
        step.leases.append(lease)
        first, size = load.fetch.first, self._blocks
        stop = min(load.stop, (first + len(lease)) * size)
        skip = load.start // size - first
        count = -(-stop // size) - first - skip
        if count > 0:
            grid = np.full(count * size, -1, dtype=np.int64)
            at = load.start - (first + skip) * size
            grid[at : at + stop - load.start] = load.table[load.start : stop]
            rows.append(grid.reshape(count, size))
            offsets.append(lease.offsets[skip : skip + count])
        failed = load.table[max(stop, load.start) :]
        if failed:
            self.counts["failed_blocks"] += len(failed)
            self._states[load.request_id].failed = True
        return failed

    def _sources_of(self, load: _Load) -> list[str]:
        fetch = load.fetch
        tiers = fetch.transfer.sources if fetch.lease is None else fetch.lease.sources
        chunks = [block // self._blocks - fetch.first for block in range(load.start, load.stop)]
        # A read may have failed since it was promised; then nobody knows where its tokens came from.
        return [tiers[chunk] for chunk in chunks] if chunks and chunks[-1] < len(tiers) else []

    def _plan_saves(
        self, scheduled: Mapping[str, int], table: Callable[[str], list[int] | None], step: _Step
    ) -> Copies | None:
        """Reserve slots for the chunks this step completes."""
        if self.disabled:
            return None
        rows: list[NDArray[np.int64]] = []
        offsets: list[NDArray[np.int64]] = []
        size, most = self._blocks, self.pipeline.slots.count
        for request_id, tokens in scheduled.items():
            state = self._states.get(request_id)
            if state is None:
                continue
            request = state.request
            # Draft tokens and tokens not known yet are no part of a key, so they end the prefix.
            known = request.num_tokens if self._save_decode else request.num_prompt_tokens
            complete = min(min(request.num_computed_tokens + tokens, known) // self._chunk, most)
            if complete <= state.saved:
                continue
            reservation = self.pipeline.reserve(state.keys(complete), state.saved)
            state.saved = complete
            blocks = table(request_id) if reservation.positions else None
            if blocks is None:
                reservation.abort()
                continue
            grid = np.array(blocks[: complete * size], dtype=np.int64).reshape(complete, size)[reservation.positions]
            if not grid.all():
                # Block 0 is the engine's null block: these pages were freed or belong to no token.
                reservation.abort()
                self.counts["null_blocks"] += 1
                continue
            rows.append(grid)
            offsets.append(reservation.offsets)
            step.reservations.append(reservation)
        return Copies(np.concatenate(rows), np.concatenate(offsets)) if rows else None
