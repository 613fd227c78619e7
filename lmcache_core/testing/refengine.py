"""RefEngine: a tiny deterministic engine that knows every byte of KV it should ever see.

The KV of a token is a keyed function of the identity, of all tokens up to it, and of layer, plane and head. So the
expected bytes of any page follow from the request alone; no oracle is stored. The engine schedules like a real one
(paged KV, chunked prefill, prefix cache, preemption, aborts, synchronous and asynchronous loads, failed loads that are
recomputed) and "attends" to every page it uses: one wrong byte raises `WrongBytes` with the seed and the step.
Freed blocks are filled with poison, so whatever is read late or saved late is wrong, and therefore found.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lmcache_core.adapters._vllm_wire import Copies, StepPlan, StepReport
from lmcache_core.copies import PagedKV, PageGeometry
from lmcache_core.identity import Identity
from lmcache_core.layout import DTYPE_BYTES, KVLayout

POISON = 0xDBDBDBDBDBDBDBDB
VOCABULARY = 32000

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9), np.uint64(27), np.uint64(0x94D049BB133111EB), np.uint64(31))
_KEEP, _SET = np.uint64(0x83FF83FF83FF83FF), np.uint64(0x3C003C003C003C00)

Words = NDArray[np.uint64]


class WrongBytes(AssertionError):
    """The engine read KV that is not the KV of its request."""


def mix(x: Words) -> Words:
    """Scramble 64-bit words: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> _MIX[0])) * _MIX[1]
    x = (x ^ (x >> _MIX[2])) * _MIX[3]
    return x ^ (x >> _MIX[4])


class RefModel:
    """KV and next tokens of one identity, for a canonical layout whose heads are whole 8-byte words."""

    def __init__(self, identity: Identity) -> None:
        layout = identity.layout
        head_bytes = layout.head_dim * DTYPE_BYTES[layout.dtype]
        if head_bytes % 8:
            raise ValueError(f"a head of RefModel is whole 8-byte words, not {head_bytes} bytes")
        self.identity = identity
        self.layout = layout
        self.words = head_bytes // 8
        self._seed = np.uint64(int.from_bytes(identity.digest[:8], "little"))
        shape = (layout.planes, layout.num_layers, 1, layout.kv_heads, self.words)
        counters = np.arange(1, 1 + int(np.prod(shape)), dtype=np.uint64).reshape(shape)
        self._offsets = counters * _GOLDEN

    def states(self, tokens: Sequence[int]) -> Words:
        """A digest of the prefix that ends with each token, uint64 `[tokens]`."""
        ids = np.asarray(tokens, dtype=np.uint64)
        positions = np.arange(1, len(ids) + 1, dtype=np.uint64)
        return mix(np.cumsum(mix(ids * _GOLDEN + mix(positions + self._seed)), dtype=np.uint64) ^ self._seed)

    def kv(self, states: Words) -> Words:
        """The KV of tokens with these prefix states, uint64 `[planes, layers, tokens, heads, words]`."""
        words = mix(states[:, None, None] + self._offsets)
        # Plausible bfloat16: few exponents, so that a codec finds something to compress.
        return (words & _KEEP) | _SET

    def complete(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The prompt and what the model says next, greedily."""
        tokens = list(prompt)
        for _ in range(new_tokens):
            tokens.append(int(self.states(tokens)[-1]) % VOCABULARY)
        return tokens


@dataclass(eq=False)
class Request:
    """One request; the attributes that adapters read have the names vLLM gives them."""

    request_id: str
    model: RefModel
    prompt: list[int]
    new_tokens: int
    num_computed_tokens: int = 0
    table: list[int] = field(default_factory=list)
    """Blocks of the sequence, in order."""
    loading: int = 0
    """Tokens that are being loaded between steps."""
    aborted: bool = False

    def __post_init__(self) -> None:
        self._final = self.model.complete(self.prompt, self.new_tokens)
        self.all_token_ids: list[int] = list(self.prompt)
        self.states = self.model.states(self._final)
        block = self.model.layout.block_tokens
        blocks = -(-len(self._final) // block)
        kv = self.model.kv(np.resize(self.states, blocks * block))
        planes, layers, _, heads, words = kv.shape
        self.truth = kv.reshape(planes, layers, blocks, block, heads, words)
        """The KV of every block, `[planes, layers, blocks, block_tokens, heads, words]`."""

    @property
    def identity(self) -> Identity:
        return self.model.identity

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def final(self) -> list[int]:
        """Prompt and answer as they must be in the end."""
        return self._final

    def sample(self) -> None:
        """Append the next token."""
        self.all_token_ids.append(self._final[len(self.all_token_ids)])


class Connector(Protocol):
    """What RefEngine asks of an adapter: the scheduler's half of a KV connector, as in vLLM."""

    def match(self, request: Request, computed: int) -> tuple[int | None, bool]: ...
    def allocated(self, request_id: str, table: Callable[[], list[int]], tokens: int) -> None: ...
    def plan(self, scheduled: dict[str, int], table: Callable[[str], list[int] | None]) -> StepPlan: ...
    def done(self, report: StepReport) -> None: ...
    def finished(self, request_id: str) -> None: ...


PageOrder = Literal["nhd", "hnd", "packed"]


class Pages:
    """Paged KV memory of an engine, with poison where nothing valid lies."""

    def __init__(self, layout: KVLayout, num_blocks: int, order: PageOrder) -> None:
        heads, tokens = layout.kv_heads, layout.block_tokens
        words = layout.head_dim * DTYPE_BYTES[layout.dtype] // 8
        bases: tuple[int, ...] = (layout.planes, layout.num_layers)
        if order == "nhd":
            memory = np.full((*bases, num_blocks, tokens, heads, words), POISON, np.uint64)
            self.view = memory
            geometry = PageGeometry.nhd(layout)
        elif order == "hnd":
            memory = np.full((*bases, num_blocks, heads, tokens, words), POISON, np.uint64)
            self.view = memory.transpose(0, 1, 2, 4, 3, 5)
            geometry = PageGeometry.hnd(layout)
        else:
            bases = (layout.num_layers,)
            memory = np.full((*bases, num_blocks, tokens, heads, layout.planes, words), POISON, np.uint64)
            self.view = memory.transpose(4, 0, 1, 2, 3, 5)
            geometry = PageGeometry.nhd(layout, packed=True)
        count = int(np.prod(bases))
        addresses = memory.ctypes.data + np.arange(count).reshape(bases) * (memory.nbytes // count)
        self.paged = PagedKV(addresses, geometry, num_blocks, owner=memory)

    def poison(self, blocks: Sequence[int]) -> None:
        """Make the blocks unusable."""
        self.view[:, :, blocks] = POISON


class BlockPool:
    """Blocks from 1 on (0 is the null block): references, and a prefix cache of full blocks that outlives them."""

    def __init__(self, pages: Pages, num_blocks: int, prefix_cache: bool) -> None:
        self._pages = pages
        self._free = deque(range(1, num_blocks))
        self._references = [0] * num_blocks
        self._prefix_cache = prefix_cache
        self._block_of: dict[tuple[bytes, int, int], int] = {}
        self._hash_of: dict[int, tuple[bytes, int, int]] = {}

    def __len__(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` poisoned blocks; the caller made sure that they are there."""
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
            digest = self._hash_of.pop(block, None)
            if digest is not None:
                del self._block_of[digest]
        self._pages.poison(blocks)
        return blocks

    def cached(self, request: Request) -> list[int]:
        """Blocks of the request's prefix that hold valid KV, with a reference each; never all of its tokens."""
        blocks: list[int] = []
        for i in range((request.num_tokens - 1) // request.model.layout.block_tokens):
            block = self._block_of.get(self._hash(request, i))
            if block is None:
                break
            blocks.append(block)
        for block in blocks:
            if self._references[block] == 0:
                self._free.remove(block)
            self._references[block] += 1
        return blocks

    def remember(self, request: Request, tokens: int) -> None:
        """Note that the first `tokens` tokens of the request have valid KV."""
        if not self._prefix_cache:
            return
        for i in range(tokens // request.model.layout.block_tokens):
            digest, block = self._hash(request, i), request.table[i]
            if digest not in self._block_of and block not in self._hash_of:
                self._block_of[digest] = block
                self._hash_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference of each; the last makes a block free, the deepest first to go."""
        freed: list[int] = []
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
                if block not in self._hash_of:
                    freed.append(block)
        self._pages.poison(freed)

    def _hash(self, request: Request, i: int) -> tuple[bytes, int, int]:
        last = (i + 1) * request.model.layout.block_tokens - 1
        return request.identity.digest, i, int(request.states[last])


class Worker:
    """The copying half: carries out plans with the engine's pages. Subclasses plant bugs."""

    def __init__(self, pages: Pages, arena: int) -> None:
        self.pages = pages
        self._arena = arena
        """Address of the pipeline's arena."""

    def load(self, copies: Copies) -> None:
        self.pages.paged.scatter(copies.block_ids, copies.offsets + self._arena)

    def save(self, copies: Copies) -> None:
        self.pages.paged.gather(copies.block_ids, copies.offsets + self._arena)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the engine schedules. Rates are 0 to 1."""

    num_blocks: int = 120
    page_order: PageOrder = "nhd"
    prefix_cache: bool = False
    step_tokens: int = 64
    """Most tokens computed in one step."""
    max_running: int = 4
    abort: float = 0.01
    """Requests aborted per step."""
    preempt: float = 0.01
    """Running requests preempted per step, beyond those for which blocks run out."""
    drop_copies: float = 0.0
    """Steps whose copies fail as a whole; the connector is told."""


class RefEngine:
    """One engine: a scheduler, paged memory, a worker and a connector. Single-threaded; run several side by side."""

    def __init__(
        self,
        connector: Connector,
        layout: KVLayout,
        arena: int,
        *,
        seed: int,
        options: EngineOptions | None = None,
        worker: type[Worker] = Worker,
    ) -> None:
        """`arena` is the address of the pipeline's arena in this process."""
        self.options = options or EngineOptions()
        self.connector = connector
        self.counts: Counter[str] = Counter()
        """`requests`, `aborted`, `steps`, `preempted`, `computed`, `loaded` and `cached` tokens, `checked` blocks."""
        self.seed = seed
        self._random = Random(seed)
        self._block = layout.block_tokens
        self.pages = Pages(layout, self.options.num_blocks, self.options.page_order)
        self._worker = worker(self.pages, arena)
        self._pool = BlockPool(self.pages, self.options.num_blocks, self.options.prefix_cache)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._loading: dict[str, Request] = {}

    def run(
        self, requests: Iterable[Request], *, each_step: Callable[[int], None] | None = None, most_waiting: int = 8
    ) -> None:
        """Serve the requests to the end; `each_step` is called with the number of every step after it.

        Raise `WrongBytes`, or `AssertionError` when the engine makes no progress.
        """
        source = iter(requests)
        idle = 0
        while True:
            for request in source:
                self._waiting.append(request)
                if len(self._waiting) >= most_waiting:
                    break
            if not (self._waiting or self._running or self._loading):
                break
            idle = 0 if self.step() else idle + 1
            if each_step is not None:
                each_step(self.counts["steps"])
            assert idle < 100_000, f"seed {self.seed}: no progress in {idle} steps, {len(self._waiting)} requests wait"
        self.step()  # lets go of what the last step held
        assert len(self._pool) == self.options.num_blocks - 1, f"seed {self.seed}: blocks leaked"

    def step(self) -> bool:
        """One step of the engine; whether anything was computed, loaded or ended."""
        self.counts["steps"] += 1
        before = self.counts["aborted"]
        self._interfere()
        scheduled = self._schedule()
        tables = {request.request_id: request.table for request in self._running}
        tokens = {request.request_id: count for request, count in scheduled}
        plan = self.connector.plan(tokens, tables.get)
        copied = not (self.options.drop_copies and self._random.random() < self.options.drop_copies)
        if plan.loads is not None:
            self._worker.load(plan.loads)
        received = [self._received(request_id, plan.failed_blocks) for request_id in plan.received]
        for request, count in scheduled:
            self._compute(request, count)
        if plan.saves is not None and copied:
            self._worker.save(plan.saves)
        attached = True if plan.attach is not None else None
        self.connector.done(StepReport(plan.step, attached=attached, copied=copied))
        for request, count in scheduled:
            self._advance(request, count)
        return bool(scheduled or received or self.counts["aborted"] > before)

    # -- scheduling ------------------------------------------------------------------------------------------
    def _interfere(self) -> None:
        """Abort and preempt at random."""
        for request in [*self._running, *self._waiting, *self._loading.values()]:
            if self._random.random() < self.options.abort and not request.aborted:
                self._abort(request)
        for request in list(self._running):
            if self._random.random() < self.options.preempt:
                self._preempt(request)

    def _abort(self, request: Request) -> None:
        self.counts["aborted"] += 1
        request.aborted = True
        self.connector.finished(request.request_id)
        if request.request_id in self._loading:
            return  # its blocks are being written: freed when the connector reports them
        if request in self._running:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        self._free(request)

    def _preempt(self, request: Request) -> None:
        self.counts["preempted"] += 1
        self._running.remove(request)
        self._free(request)
        self._waiting.appendleft(request)

    def _free(self, request: Request) -> None:
        self._pool.release(request.table)
        request.table = []
        request.num_computed_tokens = 0

    def _schedule(self) -> list[tuple[Request, int]]:
        budget = self.options.step_tokens
        scheduled: list[tuple[Request, int]] = []
        for request in list(self._running):
            if budget and request in self._running:
                count = min(budget, request.num_tokens - request.num_computed_tokens)
                if self._grow(request, request.num_computed_tokens + count):
                    scheduled.append((request, count))
                    budget -= count
        for _ in range(len(self._waiting)):
            if not budget or len(self._running) >= self.options.max_running:
                break
            request = self._waiting.popleft()
            if not self._admit(request):
                self._waiting.append(request)
                continue
            if request.request_id in self._loading:
                continue
            count = min(budget, request.num_tokens - request.num_computed_tokens)
            self._running.append(request)
            if self._grow(request, request.num_computed_tokens + count):
                scheduled.append((request, count))
                budget -= count
        return [(request, count) for request, count in scheduled if request in self._running]

    def _admit(self, request: Request) -> bool:
        """Find out what is cached here and elsewhere, and allocate blocks for it; False to ask again later."""
        if request.num_computed_tokens:
            return True  # an asynchronous load has ended
        cached = self._pool.cached(request)
        computed = len(cached) * self._block
        tokens, asynchronous = self.connector.match(request, computed)
        need = -(-(computed + (tokens or 0)) // self._block) - len(cached)
        if tokens is None or need > len(self._pool):
            self._pool.release(cached)
            return False
        assert tokens >= 0 and computed + tokens < request.num_tokens, f"{tokens} tokens promised beyond {computed}"
        request.table = cached + self._pool.take(need)
        self.connector.allocated(request.request_id, partial(list, request.table), tokens)
        self.counts["cached"] += computed
        self.counts["loaded"] += tokens
        request.num_computed_tokens = computed + tokens
        if asynchronous and tokens:
            request.loading = tokens
            self._loading[request.request_id] = request
        return True

    def _grow(self, request: Request, tokens: int) -> bool:
        """Give the request blocks for `tokens` tokens, preempting others (and at last itself) to get them."""
        need = -(-tokens // self._block) - len(request.table)
        while need > len(self._pool):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        request.table += self._pool.take(need) if need > 0 else []
        return True

    def _received(self, request_id: str, failed_blocks: list[int]) -> Request:
        """An asynchronous load ended: the request continues after its last good block."""
        request = self._loading.pop(request_id)
        if request.aborted:
            self._free(request)
            return request
        failed = set(failed_blocks)
        good = next((i for i, block in enumerate(request.table) if block in failed), len(request.table))
        request.num_computed_tokens = min(request.num_computed_tokens, good * self._block)
        self._verify(request, request.num_computed_tokens)
        if request.num_computed_tokens == 0:
            self._free(request)
        self._waiting.appendleft(request)
        return request

    # -- computing -------------------------------------------------------------------------------------------
    def _compute(self, request: Request, count: int) -> None:
        """The forward pass: write the KV of `count` tokens, attend to all up to them."""
        start, stop = request.num_computed_tokens, request.num_computed_tokens + count
        first, last = start // self._block, (stop - 1) // self._block
        blocks = request.table[first : last + 1]
        # Tokens of the first block that are there already are left alone: they may have been loaded.
        for i, block in enumerate(blocks, first):
            low, high = max(start - i * self._block, 0), min(stop - i * self._block, self._block)
            self.pages.view[:, :, block, low:high] = request.truth[:, :, i, low:high]
        self.counts["computed"] += count
        self._verify(request, stop)

    def _verify(self, request: Request, tokens: int) -> None:
        """Attention reads the KV of the first `tokens` tokens; every byte must be right."""
        blocks, rest = divmod(tokens, self._block)
        truth, view = request.truth, self.pages.view
        right = np.array_equal(view[:, :, request.table[:blocks]], truth[:, :, :blocks])
        if rest and right:
            right = np.array_equal(view[:, :, request.table[blocks], :rest], truth[:, :, blocks, :rest])
        if not right:
            raise WrongBytes(self._wrong(request, tokens))
        self.counts["checked"] += blocks + bool(rest)

    def _wrong(self, request: Request, tokens: int) -> str:
        view, size = self.pages.view, self._block
        for i in range(-(-tokens // size)):
            here = min(size, tokens - i * size)
            bad = np.argwhere(view[:, :, request.table[i], :here] != request.truth[:, :, i, :here])
            if len(bad):
                plane, layer, token, head, word = (int(n) for n in bad[0])
                got = int(view[plane, layer, request.table[i], token, head, word])
                want = int(request.truth[plane, layer, i, token, head, word])
                return (
                    f"seed {self.seed}, step {self.counts['steps']}, request {request.request_id}: token "
                    f"{i * size + token}, plane {plane}, layer {layer}, head {head} is {got:#018x}, not {want:#018x}"
                    f"{' (poison)' if got == POISON else ''}; {len(bad)} wrong words in block {request.table[i]}"
                )
        raise AssertionError("a mismatch that is not there")

    def _advance(self, request: Request, count: int) -> None:
        """After the pass: sample, finish, and remember what is valid."""
        request.num_computed_tokens += count
        self._pool.remember(request, request.num_computed_tokens)
        if request.num_computed_tokens < request.num_tokens:
            return
        if request.num_tokens < len(request.final):
            request.sample()
            return
        self.counts["requests"] += 1
        self._running.remove(request)
        self.connector.finished(request.request_id)
        self._free(request)


class Traffic:
    """Requests that share prefixes: documents by popularity, continued conversations, several identities."""

    def __init__(self, identities: Sequence[Identity], seed: int, *, documents: int = 12, length: int = 100) -> None:
        self._random = Random(seed)
        self._models = [RefModel(identity) for identity in identities]
        self._documents = [[self._random.randrange(VOCABULARY) for _ in range(length)] for _ in range(documents)]
        self._past: deque[tuple[RefModel, list[int]]] = deque(maxlen=8)
        self._length = length

    def requests(self, count: int, prefix: str = "r") -> Iterable[Request]:
        """Yield `count` requests."""
        random = self._random
        for i in range(count):
            if self._past and random.random() < 0.3:
                model, prompt = random.choice(self._past)
                prompt = prompt[: self._length]
            else:
                model = random.choice(self._models)
                rank = min(int(random.paretovariate(0.8)) - 1, len(self._documents) - 1)
                prompt = self._documents[rank][: random.randint(1, self._length)]
            prompt = prompt + [random.randrange(VOCABULARY) for _ in range(random.randint(1, 12))]
            request = Request(f"{prefix}{i}", model, prompt, random.randint(1, 5))
            self._past.append((model, request.final))
            yield request
