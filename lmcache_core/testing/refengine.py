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
    def allocated(self, request_id: str, table: list[int], tokens: int) -> None: ...
    def plan(self, scheduled: dict[str, int], table: Callable[[str], list[int] | None]) -> StepPlan: ...
    def done(self, report: StepReport) -> None: ...
    def finished(self, request_id: str) -> None: ...


PageOrder = Literal["nhd", "hnd", "packed"]


class Pages:
    """Paged KV memory of an engine, with poison where nothing valid lies."""

    def __init__(self, layout: KVLayout, num_blocks: int, order: PageOrder) -> None:
        heads, tokens = layout.kv_heads, layout.block_tokens
        words = layout.head_dim * DTYPE_BYTES[layout.dtype] // 8
        planes, layers = layout.planes, layout.num_layers
        if order == "nhd":
            memory = np.empty((planes, layers, num_blocks, tokens, heads, words), np.uint64)
            self.view = memory
            geometry = PageGeometry.nhd(layout)
        elif order == "hnd":
            memory = np.empty((planes, layers, num_blocks, heads, tokens, words), np.uint64)
            self.view = memory.transpose(0, 1, 2, 4, 3, 5)
            geometry = PageGeometry.hnd(layout)
        else:
            memory = np.empty((layers, num_blocks, tokens, heads, planes, words), np.uint64)
            self.view = memory.transpose(4, 0, 1, 2, 3, 5)
            geometry = PageGeometry.nhd(layout, packed=True)
        memory[...] = POISON
        bases = memory.ctypes.data + np.arange(memory[..., 0, 0, 0, 0].size) * memory[..., 0, 0, 0, 0].itemsize
        leading = memory.shape[: memory.ndim - 4]
        stride = memory.strides[memory.ndim - 5]
        bases = memory.ctypes.data + np.arange(int(np.prod(leading))).reshape(leading) * stride
        self.paged = PagedKV(bases, geometry, num_blocks, owner=memory)

    def poison(self, blocks: Sequence[int]) -> None:
        """Make the blocks unusable."""
        self.view[:, :, blocks] = POISON
