"""The scheduler's half of the vLLM connector: which chunks each step loads and saves.

It owns the pipeline: keys, pins, I/O. The worker gets offsets into the shared arena and copies. Nothing here imports
vLLM, waits for I/O while requests run, or touches a byte of KV.

A request goes through: `match` (how much is cached; starts reading) -> `allocated` (blocks to fill) -> `plan` of the
same step, or of a later one for an asynchronous load -> `done` when the worker reports -> `finished`.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lmcache_core.adapters import _vllm_params
from lmcache_core.adapters._vllm_params import PREFIX, Wishes
from lmcache_core.adapters._vllm_parts import Part, Rank
from lmcache_core.adapters._vllm_wire import Attach, Copies, StepPlan, StepReport
from lmcache_core.identity import Identity
from lmcache_core.keys import TokenChain
from lmcache_core.types import ChunkKey, MissReason

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


PINNED_SHARE = 4
"""Pins of ended requests hold at most one slot in this many."""

Tables = Sequence[Sequence[int]]
"""A request's blocks, by KV group."""


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
    wishes: Wishes
    extra: Callable[[int, int], bytes] | None = None
    """What the token ids from one place to another do not say; None where they say all."""
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
    reason: MissReason | None = None
    """Why the last hit was not longer."""
    stored: int = 0
    """Chunks it has offered to the pipeline that were not there."""

    def keys(self, count: int) -> list[ChunkKey]:
        """Keys of the first `count` chunks; hashes only tokens that were not hashed before."""
        have = len(self.chain.keys)
        size = self.chain.chunk_tokens
        if self.extra is not None:
            for at in range(have * size, count * size, size):
                self.chain.extend_with(self.request.all_token_ids[at : at + size], self.extra(at, at + size))
        elif have < count:
            self.chain.extend(self.request.all_token_ids[have * size : count * size])
        return self.chain.keys[:count]


@dataclass(slots=True, eq=False)
class _Load:
    """Blocks waiting for chunks."""

    request_id: str
    fetch: _Fetch
    tables: list[list[int]]
    """The request's blocks up to `stop`, by KV group."""
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
    saves: Copies | None = None
    """From where the reservations are filled."""
    spoiled: bool = False
    """What the reservations hold is not to be trusted."""
    prefilled: int = 0
    """Prompt tokens that the step computes."""
    arrivals: list[tuple[Request, list[ChunkKey], Sequence[int]]] = field(default_factory=list)
    """Chunks that are in memory once the step is done: the request, its keys, positions among them."""


@dataclass(slots=True)
class _Pin:
    """The prompt of an ended request, held in memory."""

    seconds: float
    keys: list[ChunkKey]
    transfer: Transfer | None = None
    until: float = 0.0


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
        parts: Mapping[Rank, Sequence[Part]],
        extra: Callable[[Request], Callable[[int, int], bytes] | None] = lambda request: None,
        arrived: Callable[[Request, list[ChunkKey], Sequence[int]], None] | None = None,
    ) -> None:
        """`admit` gives the identity of a request, or the reason why it takes no part. `asynchronous` loads every hit
        between steps, `overlap` only hits that must be read first; otherwise such a request waits until its chunks
        are in memory and is loaded within its first step. `parts` is what each worker holds of a chunk. `extra` names
        what a request's token ids do not say; `arrived` hears of chunks that are in memory now (`_Step.arrivals`)."""
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
        self._attach: Attach | None = Attach(dict(share), {rank: list(own) for rank, own in parts.items()})
        self._states: dict[str, _State] = {}
        self._extra = extra
        self._arrived = arrived
        self._refused: dict[str, tuple[Wishes, str]] = {}
        self._pins: deque[_Pin] = deque()
        self._sync: list[_Load] = []
        self._async: list[_Load] = []
        self._steps: dict[int, _Step] = {}
        self._step = 0
        self._workers = len(parts)
        self._reports: dict[int, StepReport] = {}
        """Of steps that some workers have not told of yet."""

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
        read = read and not state.wishes.skip_read
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
        state.reason = None if lease is None else lease.reason
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

    def allocated(self, request_id: str, tables: Callable[[], Tables], tokens: int) -> None:
        """The engine allocated blocks: `tables()` of the whole request; `tokens` are to be loaded into them."""
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
        held = [list(table[:stop]) for table in tables()]
        load = _Load(request_id, fetch, held, start, stop, asynchronous)
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

    def finished(self, request_id: str) -> dict[str, Any] | None:
        """The request ended, was aborted or failed. Blocks of an asynchronous load are still reported as received.

        Return the answer for a request that asked for one.
        """
        refused = self._refused.pop(request_id, None)
        state = self._states.pop(request_id, None)
        for load in self._async:
            if load.request_id == request_id:
                load.aborted = True
        if state is None:
            if refused is None or not refused[0].answer:
                return None
            return {PREFIX + "bypassed": refused[1], PREFIX + "refused": refused[0].refused}
        self._drop(state)
        wishes = state.wishes
        if wishes.pin_s and not wishes.skip_write:
            keys = state.keys(state.request.num_prompt_tokens // self._chunk)
            if sum(len(pin.keys) for pin in self._pins) + len(keys) > self.pipeline.slots.count // PINNED_SHARE:
                wishes.refused[PREFIX + "pin_s"] = f"more than 1/{PINNED_SHARE} of memory would be pinned"
            elif keys:
                self._pins.append(_Pin(wishes.pin_s, keys))
        if not wishes.answer:
            return None
        return {
            PREFIX + "hit_tokens": len(state.sources) * self._block,
            PREFIX + "sources": {tier: count * self._block for tier, count in Counter(state.sources).items()},
            PREFIX + "miss": None if state.reason is None else str(state.reason),
            PREFIX + "stored_tokens": state.stored * self._chunk,
            PREFIX + "refused": wishes.refused,
        }

    # -- one step --------------------------------------------------------------------------------------------
    @property
    def under_way(self) -> bool:
        """Whether a worker has yet to report copies of a step."""
        return bool(self._steps)

    def plan(
        self,
        scheduled: Mapping[str, int],
        tables: Callable[[str], Tables | None],
        written: Callable[[], Iterable[int]] | None = None,
    ) -> StepPlan:
        """The worker's part of a step that computes `scheduled` tokens per request; `tables` gives its blocks.

        `written()` is blocks that the step may write and no step of the same request before: given where a worker's
        copies may outlast their step.
        """
        self._step += 1
        plan, step = StepPlan(self._step), _Step(monotonic())
        try:
            if not scheduled:
                self._wait_idle()
            if self._pins:
                self._keep_pins()
            self._plan_loads(plan, step)
        except Exception:
            self._give_up("loads")
            self._withdraw(plan)
        step.prefilled = sum(tokens for tokens in scheduled.values() if tokens > 1)
        try:
            plan.saves = self._plan_saves(scheduled, tables, step)
        except Exception:
            self._give_up("saves")
            while step.reservations:
                step.reservations.pop().abort()
        if written is not None and self._steps:
            blocks = np.fromiter(written(), dtype=np.int64)
            if plan.loads is not None:
                blocks = np.concatenate([blocks, plan.loads.block_ids.ravel()])
            plan.after = max(self._saving(blocks), default=0)
        step.saves = plan.saves
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
        plan.needed = bool(rows)
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
            plan.loads = Copies(np.concatenate(rows, axis=1), np.concatenate(offsets))
        self._sync, self._async = [], waiting

    def _saving(self, blocks: NDArray[np.int64]) -> list[int]:
        """Steps whose saves may still read some of these blocks."""
        return [
            number
            for number, step in self._steps.items()
            if step.saves is not None and np.isin(step.saves.block_ids, blocks).any()
        ]

    def overwritten(self, blocks: Iterable[int]) -> None:
        """The engine writes these blocks and will not wait for their saves: what is still being saved is dropped."""
        for number in self._saving(np.fromiter(blocks, dtype=np.int64)):
            self._steps[number].spoiled = True

    def done(self, report: StepReport) -> None:
        """Workers have carried out the plan of a step (and of all before it)."""
        if report.step in self._reports:
            report = self._reports.pop(report.step).merge(report)
        if report.workers < self._workers:
            self._reports[report.step] = report
            return
        self._reports = {number: told for number, told in self._reports.items() if number > report.step}
        if report.attached is not None and self._attach is not None:
            self._attach = None
            if not report.attached:
                self._detached(report.error)
        elif report.error and not self.disabled:
            self._detached(report.error)
        if not report.copied:
            for step in self._steps.values():
                step.spoiled = True  # the engine may have computed on from what was never loaded
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
                if number == report.step and report.copied and not step.spoiled:
                    self.counts["saved_chunks"] += reservation.commit()
                else:
                    reservation.abort()
            if self._arrived is not None and number == report.step and report.copied and not step.spoiled:
                for arrival in step.arrivals:
                    self._arrived(*arrival)

    # -- life ------------------------------------------------------------------------------------------------
    def clear(self) -> bool:
        """Forget every cached chunk, and take the identities of live requests anew. What they have computed so far is
        not saved. False when loads already promised to the engine still bring old chunks."""
        for request_id, state in list(self._states.items()):
            self._drop(state)
            identity = self._admit(state.request)
            if isinstance(identity, str):
                self._refused[request_id] = (state.wishes, identity)
                self.counts[f"bypass.{identity}"] += 1
                del self._states[request_id]
            else:
                state.chain = TokenChain(identity)
                state.saved = _NEVER
        self._drop_pins()
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
        self._drop_pins()
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
            for table in load.tables:
                plan.failed_blocks += table[load.start : load.stop]
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
            wishes = _vllm_params.parse(getattr(request, "kv_transfer_params", None))
            identity = self._admit(request)
            if isinstance(identity, str):
                self._refused[request.request_id] = (wishes, identity)
                self.counts[f"bypass.{identity}"] += 1
                return None
            state = _State(request, TokenChain(identity), wishes, self._extra(request))
            self._states[request.request_id] = state
        return state

    def _keep_pins(self) -> None:
        """Take the pins of requests that ended since, and give back those whose time is over."""
        now = monotonic()
        for pin in list(self._pins):
            if pin.transfer is None:
                pin.transfer, pin.until = self.pipeline.fetch(pin.keys), now + pin.seconds
            elif now >= pin.until:
                pin.transfer.cancel()
                self._pins.remove(pin)

    def _drop_pins(self) -> None:
        while self._pins:
            pin = self._pins.pop()
            if pin.transfer is not None:
                pin.transfer.cancel()

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
            grid = np.full((len(load.tables), count * size), -1, dtype=np.int64)
            at = load.start - (first + skip) * size
            for own, table in zip(grid, load.tables, strict=True):
                own[at : at + stop - load.start] = table[load.start : stop]
            # The engine's null block, 0: these tokens are outside the group's window.
            grid[grid == 0] = -1
            rows.append(grid.reshape(len(load.tables), count, size))
            offsets.append(lease.offsets[skip : skip + count])
            if self._arrived is not None and load.request_id in self._states:
                state = self._states[load.request_id]
                positions = range(first + skip, first + skip + count)
                step.arrivals.append((state.request, state.keys(positions.stop), positions))
        failed = [block for table in load.tables for block in table[max(stop, load.start) :]]
        if failed:
            self.counts["failed_blocks"] += len(failed)
        if load.request_id in self._states:  # a reset may have refused it
            state = self._states[load.request_id]
            state.reason, state.failed = lease.reason, state.failed or bool(failed)
        return failed

    def _sources_of(self, load: _Load) -> list[str]:
        fetch = load.fetch
        tiers = fetch.transfer.sources if fetch.lease is None else fetch.lease.sources
        chunks = [block // self._blocks - fetch.first for block in range(load.start, load.stop)]
        # A read may have failed since it was promised; then nobody knows where its tokens came from.
        return [tiers[chunk] for chunk in chunks] if chunks and chunks[-1] < len(tiers) else []

    def _plan_saves(
        self, scheduled: Mapping[str, int], tables: Callable[[str], Tables | None], step: _Step
    ) -> Copies | None:
        """Reserve slots for the chunks this step completes."""
        if self.disabled:
            return None
        rows: list[NDArray[np.int64]] = []
        offsets: list[NDArray[np.int64]] = []
        size, most = self._blocks, self.pipeline.slots.count
        for request_id, tokens in scheduled.items():
            state = self._states.get(request_id)
            if state is None or state.wishes.skip_write:
                continue
            request = state.request
            # Draft tokens and tokens not known yet are no part of a key, so they end the prefix.
            known = request.num_tokens if self._save_decode else request.num_prompt_tokens
            complete = min(min(request.num_computed_tokens + tokens, known) // self._chunk, most)
            if complete <= state.saved:
                continue
            first, state.saved = state.saved, complete
            blocks = tables(request_id)
            if blocks is None:
                continue
            grid = np.array([table[first * size : complete * size] for table in blocks], dtype=np.int64)
            grid = grid.reshape(len(blocks), complete - first, size)
            whole = grid.all(axis=(0, 2))
            if not whole.all():
                # Block 0 is the engine's null block: these pages left their group's window, or belong to no token.
                gone = int(np.flatnonzero(~whole)[-1]) + 1
                grid, first = grid[:, gone:], first + gone
                self.counts["null_blocks"] += gone
            keys = state.keys(complete)
            reservation = self.pipeline.reserve(keys, first)
            if not reservation.positions:
                reservation.abort()
                continue
            state.stored += len(reservation.positions)
            rows.append(grid[:, [position - first for position in reservation.positions]])
            offsets.append(reservation.offsets)
            step.reservations.append(reservation)
            if self._arrived is not None:
                step.arrivals.append((request, keys, reservation.positions))
        return Copies(np.concatenate(rows, axis=1), np.concatenate(offsets)) if rows else None
