"""CacheEngine: KV in and out with a few words, for engines without an adapter of their own.

    store / lookup / retrieve     by token ids, in whole chunks, on contiguous or paged tensors
    put / get / has / evict       by name: a document or a system prompt, to its last token

Tensors are `kv[layer][plane]`: nested lists and stacked tensors alike; NumPy arrays, torch tensors or any buffer. Same
identity, salts, deadlines and promise as everywhere: what comes back is what was stored for this identity, or a miss.

A name is a *head*, a chunk whose payload is the token ids under a digest, then the whole chunks that every prompt with
these tokens shares, then a *tail*: the last tokens, the rest of it filled with copies of the last one.
"""

from __future__ import annotations

import copy
import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from lmcache_core.build import build
from lmcache_core.config import PipelineConfig, load
from lmcache_core.copies import PagedKV, PageGeometry
from lmcache_core.errors import ConfigError, LMCacheError
from lmcache_core.gpu import GpuPagedKV, How
from lmcache_core.identity import Identity, fingerprint_weights
from lmcache_core.keys import TokenChain, Tokens, as_int32
from lmcache_core.layout import DTYPE_BYTES, KVLayout
from lmcache_core.pipeline import Lease, Pipeline, Reservation
from lmcache_core.plugins import Plugins
from lmcache_core.types import ChunkKey

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

KV = Sequence[Any] | Any
"""`kv[layer][plane]` is one tensor, `[tokens, heads, dim]` or, paged, `[blocks, block_tokens, heads, dim]`; with order
`hnd`, heads come before tokens. Plane 0 is K, plane 1 is V; an MLA latent has plane 0 only."""

_THREADS = min(8, len(os.sched_getaffinity(0)))
_LANDING_S = 10.0
"""How long `put` waits for what a GPU still has to bring to host memory."""
_HEAD = struct.Struct("<8sQ32s")
"""Magic, number of tokens, SHA-256 of the token ids; int32 little-endian ids follow."""
_MAGIC = b"LMCNAME1"


@dataclass(frozen=True, slots=True)
class Found:
    """How much of a prefix is there, or was copied. False when nothing is."""

    tokens: int = 0
    sources: tuple[str, ...] = ()
    """Name of the tier of each whole chunk."""
    reason: str | None = None
    """Why there is no more, a `MissReason`; None when every whole chunk is there."""

    def __bool__(self) -> bool:
        return self.tokens > 0


class Named(NamedTuple):
    """What `get` returns."""

    tokens: NDArray[np.int32]
    kv: KV
    """What was passed as `into`, else a new tensor `[layers, planes, tokens, heads, dim]`; with order `hnd`, heads
    before tokens. It is a torch tensor where the engine's dtype was given as one, else NumPy, which knows
    `bfloat16` and `float8` as unsigned integers of that size only."""


class CacheEngine:
    """See the module. Thread-safe; a context manager that closes."""

    def __init__(
        self,
        config: PipelineConfig | Mapping[str, Any] | Path | str | None = None,
        *,
        model: str,
        weights: str | Path,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: Any,
        planes: int = 2,
        order: Literal["nhd", "hnd"] = "nhd",
        salt: str | None = None,
        tenant: str | None = None,
        plugins: Plugins | None = None,
        **identity: Any,
    ) -> None:
        """`config` is whatever `lmcache_core.config.load` takes: a file, a mapping, a `PipelineConfig`, or None for the
        environment.

        `weights` says which weights computed the KV: a `Path` to the model's directory, whose files are fingerprinted,
        or a fingerprint of your own. `dtype` is a torch dtype, a NumPy dtype or a name such as "bfloat16". `planes` is
        2 for K and V, 1 for an MLA latent. `identity` is any other field of `lmcache_core.identity.Identity`: `lora`,
        `revision`, `tp_rank`, ... Different salts never share; `tenant` is needed where the configuration has
        `tenancy`. `plugins` is a manager with plugin objects of the caller's, if there are any.

        Raise `ConfigError`, `ValueError` or `TypeError` with what is wrong; nothing is left open then.
        """
        if not weights:
            raise ValueError("weights must say which weights computed the KV: the model's Path, or a fingerprint")
        if order not in ("nhd", "hnd"):
            raise ValueError(f"order is 'nhd' ([tokens, heads, dim]) or 'hnd' ([heads, tokens, dim]), not {order!r}")
        settings = config if isinstance(config, PipelineConfig) else load(config).config
        self._torch_dtype = dtype if type(dtype).__module__ == "torch" else None
        layout = KVLayout(
            order="lknhd",
            dtype=_dtype_name(dtype),
            num_layers=layers,
            planes=planes,
            kv_heads=kv_heads,
            head_dim=head_dim,
            chunk_tokens=settings.chunk_tokens,
            block_tokens=settings.chunk_tokens,
        )
        who = Identity(
            model=model,
            weights=weights if isinstance(weights, str) else fingerprint_weights(weights),
            layout=layout,
            salt=salt,
            **{"engine": "direct", **identity},
        )
        if settings.tenancy is not None and not tenant:
            raise ConfigError("the configuration has `tenancy`: say whose KV this is with tenant=")
        self.order = order
        self.pipeline: Pipeline = build(settings, layout, plugins=plugins)
        """For `stats()`, `flush()`, `clear()` and `note_prefill()`."""
        try:
            self._base = replace(who, fidelity=self.pipeline.fidelity)
            self._tenant = tenant
            self.identity = self._admitted()
        except BaseException:
            self.pipeline.close()
            raise

    def _admitted(self) -> Identity:
        identity = self.pipeline.tenant_identity(self._base, self._tenant)
        if identity is None:
            raise LMCacheError(f"tenant {self._tenant!r} has too many identities, or is none: nothing can be cached")
        return identity

    def scope(self, *, salt: str | None = None, tenant: str | None = None, lora: str | None = None) -> CacheEngine:
        """The same cache for somebody else: another salt, tenant or adapter, which never share. Not to be closed."""
        other = copy.copy(self)
        other._base = self._base.with_request(lora=lora, salt=salt)
        other._tenant = tenant or self._tenant
        other.identity = other._admitted()
        return other

    def close(self, timeout: float = 30.0) -> None:
        """Write down what must be written, within `timeout` seconds, and release the memory. Idempotent."""
        self.pipeline.close(timeout)

    def __enter__(self) -> CacheEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one chunk: what is stored and found by tokens is a multiple of it."""
        return self.pipeline.layout.chunk_tokens

    # -- by tokens ---------------------------------------------------------------------------------------------
    def store(self, tokens: Tokens, kv: KV, *, blocks: ArrayLike | None = None, slots: ArrayLike | None = None) -> int:
        """Store the whole chunks of `tokens` that are not stored yet; how many tokens were. Slower tiers are written in
        the background.

        `kv` holds the KV of all `tokens`, see `KV`. Paged tensors need `blocks`, the block of each `block_tokens`
        tokens, or `slots`, the place of each token, `block * block_tokens + offset`. Raise `ValueError` or `TypeError`
        for tensors that cannot be that, before anything is stored.
        """
        chain = TokenChain(self.identity)
        ids = as_int32(tokens)
        chain.extend(ids)
        theirs = self._given(kv, ids.size, blocks, slots)
        return self.pipeline.store(chain.keys, theirs.save) * self.chunk_tokens

    def lookup(self, tokens: Tokens, *, timeout: float | None = None) -> Found:
        """How many of the first `tokens` are present. Waits for remote tiers, at most their deadline or `timeout`
        seconds, and holds nothing: only `retrieve` knows what it got."""
        hit = self.pipeline.lookup(TokenChain(self.identity).extend(tokens))
        hit.wait(inf if timeout is None else timeout)
        return Found(hit.count * self.chunk_tokens, tuple(hit.sources), hit.reason)

    def prefetch(self, tokens: Tokens) -> None:
        """Start reading what is stored of the first `tokens` into memory, as a hint. Never waits."""
        self.pipeline.prefetch(TokenChain(self.identity).extend(tokens))

    def retrieve(
        self,
        tokens: Tokens,
        into: KV,
        *,
        blocks: ArrayLike | None = None,
        slots: ArrayLike | None = None,
        timeout: float | None = None,
    ) -> Found:
        """Copy the KV of the longest stored prefix into the caller's tensors; how much that was. The rest is untouched.

        `into`, `blocks` and `slots` are as for `store`, with room for the whole chunks of `tokens`. Give
        `tokens[:-1]` to leave the last token to be computed. With a GPU tier, tensors on its device are written by work
        on torch's current stream. Waits at most the tiers' deadline or `timeout` seconds.
        """
        ids = as_int32(tokens)
        keys = TokenChain(self.identity).extend(ids)
        room = len(keys) * self.chunk_tokens
        theirs = self._given(into, room, blocks, slots, write=True)
        with self.pipeline.retrieve(keys, timeout) as lease:
            theirs.load(lease)
            return Found(len(lease) * self.chunk_tokens, tuple(lease.sources), lease.reason)

    # -- by name -----------------------------------------------------------------------------------------------
    def put(
        self, name: str, tokens: Tokens, kv: KV, *, blocks: ArrayLike | None = None, slots: ArrayLike | None = None
    ) -> bool:
        """Keep the KV of all `tokens` under a name; False when there is no room. What had the name before is forgotten.

        The whole chunks are the same as `store`'s, so that prompts which begin with these tokens find them too. Raise
        as `store` does, and `BackendError` when a tier cannot delete what had the name.
        """
        ids = as_int32(tokens)
        if not ids.size:
            raise ValueError(f"{name!r} has no tokens")
        if _HEAD.size + ids.nbytes > self.pipeline.layout.chunk_bytes:
            most = (self.pipeline.layout.chunk_bytes - _HEAD.size) // ids.itemsize
            raise ValueError(f"{name!r} has {ids.size} tokens; a name's ids must fit one chunk: at most {most}")
        theirs = self._given(kv, ids.size, blocks, slots)
        head, keys = self._head_key(name), self._keys(ids)
        before = self._tokens(head, None)
        if self._present([head]) if before is None else not np.array_equal(before, ids):
            self.pipeline.discard([head])  # of other tokens, or spoilt by a lossy tier
        self.pipeline.store(keys, theirs.save)

        def fill(room: Reservation) -> None:
            view = room.view(0)
            raw = ids.astype("<i4", copy=False).tobytes()
            content = _HEAD.pack(_MAGIC, ids.size, hashlib.sha256(raw).digest()) + raw
            view[: len(content)] = content
            view[len(content) :] = bytes(len(view) - len(content))

        self.pipeline.store([head], fill)
        if self.pipeline.mirror is not None:
            self.pipeline.mirror.drain(_LANDING_S)
        return self._present([head]) and self._present(keys)

    def get(
        self,
        name: str,
        into: KV | None = None,
        *,
        blocks: ArrayLike | None = None,
        slots: ArrayLike | None = None,
        timeout: float | None = None,
    ) -> Named | None:
        """The tokens and all the KV of a name, or None: also when any part of it is gone.

        `into`, `blocks` and `slots` are as for `retrieve`; without them a new tensor is made. When it returns None,
        `into` is untouched.
        """
        ids = self._tokens(self._head_key(name), timeout)
        if ids is None:
            return None
        kv = self._empty(ids.size) if into is None else into
        theirs = self._given(kv, ids.size, blocks, slots, write=True)
        keys = self._keys(ids)
        with self.pipeline.retrieve(keys, timeout) as lease:
            if len(lease) < len(keys):
                return None
            theirs.load(lease)
        return Named(ids, kv)

    def has(self, name: str, *, timeout: float | None = None) -> bool:
        """Whether `get` would find it now."""
        ids = self._tokens(self._head_key(name), timeout)
        return ids is not None and self._present(self._keys(ids), timeout)

    def evict(self, name: str, *, shared: bool = False) -> bool:
        """Forget a name, in every tier; False when there was none.

        Whole chunks stay for other prompts that begin the same until they are evicted; `shared` deletes them too. Waits
        for the media; raise `BackendError` when one fails.
        """
        head = self._head_key(name)
        ids = self._tokens(head, None)
        own: list[ChunkKey] = []
        if ids is not None:
            keys = self._keys(ids)
            own = keys if shared else keys[ids.size // self.chunk_tokens :]
        self.pipeline.discard([head, *own])
        return ids is not None

    def _head_key(self, name: str) -> ChunkKey:
        nothing = np.zeros(self.chunk_tokens, np.int32)
        return TokenChain(self.identity).extend_with(nothing, b"name:" + name.encode())

    def _keys(self, ids: NDArray[np.int32]) -> list[ChunkKey]:
        """The whole chunks, and the tail where there is one."""
        chain = TokenChain(self.identity)
        chain.extend(ids)
        rest = ids.size % self.chunk_tokens
        if rest:
            tail = np.zeros(self.chunk_tokens, np.int32)
            tail[:rest] = ids[-rest:]
            chain.extend_with(tail, b"tail:%d" % rest)
        return chain.keys

    def _tokens(self, head: ChunkKey, timeout: float | None) -> NDArray[np.int32] | None:
        """What a head says, if it is there; a lossy tier may have spoilt it."""
        with self.pipeline.retrieve([head], timeout) as lease:
            if not lease:
                return None
            view = lease.view(0)
            magic, count, digest = _HEAD.unpack_from(view)
            raw = bytes(view[_HEAD.size : _HEAD.size + 4 * min(count, len(view))])
        if magic != _MAGIC or hashlib.sha256(raw).digest() != digest:
            return None
        return np.frombuffer(raw, "<i4").astype(np.int32)

    def _given(
        self, kv: KV, tokens: int, blocks: ArrayLike | None, slots: ArrayLike | None, *, write: bool = False
    ) -> _Tensors:
        mirror = self.pipeline.mirror
        gpu = None if mirror is None else mirror.device
        return _Tensors(self.pipeline.layout, self.order, kv, tokens, blocks, slots, write=write, gpu=gpu)

    def _present(self, keys: Sequence[ChunkKey], timeout: float | None = None) -> bool:
        hit = self.pipeline.lookup(keys)
        hit.wait(inf if timeout is None else timeout)
        return hit.count == len(keys)

    def _empty(self, tokens: int) -> Any:
        layout = self.pipeline.layout
        middle = (tokens, layout.kv_heads) if self.order == "nhd" else (layout.kv_heads, tokens)
        shape = (layout.num_layers, layout.planes, *middle, layout.head_dim)
        if self._torch_dtype is not None:
            import torch

            return torch.empty(shape, dtype=self._torch_dtype)
        return np.empty(shape, layout.dtype if layout.dtype in _NUMPY else f"u{DTYPE_BYTES[layout.dtype]}")


_NUMPY = ("float32", "float16", "uint8", "int8")
"""Element types that NumPy has under the same name."""


def _dtype_name(dtype: Any) -> str:
    if isinstance(dtype, str):
        return dtype
    return str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else np.dtype(dtype).name


class _Tensors:
    """The caller's tensors, checked, and where each of its tokens lies in them.

    Whole chunks of tensors that all have one shape and strides move in one native call, in host memory and on the
    device of a GPU tier; everything else (tails, other devices, odd strides) is indexed, layer by layer.
    """

    def __init__(
        self,
        layout: KVLayout,
        order: str,
        kv: KV,
        tokens: int,
        blocks: ArrayLike | None,
        slots: ArrayLike | None,
        *,
        write: bool = False,
        gpu: int | None = None,
    ) -> None:
        """`gpu`: the device of the pipeline's GPU tier."""
        self._layout, self._order, self._tokens = layout, order, tokens
        if len(kv) != layout.num_layers:
            raise ValueError(f"kv has {len(kv)} layers, the engine {layout.num_layers}")
        for i, layer in enumerate(kv):
            if len(layer) != layout.planes:
                raise ValueError(f"kv[{i}] has {len(layer)} planes, the engine {layout.planes}: give kv[layer][plane]")
        self._planes = [
            [self._plane(kv[i][p], f"kv[{i}][{p}]", write) for p in range(layout.planes)]
            for i in range(layout.num_layers)
        ]
        first = self._planes[0][0]
        self._paged = first.ndim == 4
        self._device = first.device if _is_torch(first) else None
        for i, p in np.ndindex(layout.num_layers, layout.planes):
            if self._planes[i][p].ndim != first.ndim or _is_torch(self._planes[i][p]) != _is_torch(first):
                raise ValueError(f"kv[{i}][{p}] is paged or on another device, unlike kv[0][0]")
        # Axis of blocks (or of tokens), and of tokens within a block.
        inner = 1 if order == "nhd" else 2
        self._block = first.shape[inner] if self._paged else 1
        places = min(layer.shape[0] if self._paged else layer.shape[inner - 1] for row in self._planes for layer in row)
        self._where = self._places(blocks, slots, places)
        self._stream = None if gpu is None or self._device is None else _stream(self._device, gpu)
        """Of the caller, where its tensors are on the device of a GPU tier: copies are queued there."""
        fast = self._device is None or self._stream is not None
        self._fast = self._native(blocks, slots, places, gpu) if fast else None

    def _plane(self, tensor: Any, name: str, write: bool) -> Any:
        """One tensor as unsigned integers: NumPy in host memory, torch elsewhere."""
        g = self._layout
        size = DTYPE_BYTES[g.dtype]
        if _is_torch(tensor):
            found, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        else:
            try:
                tensor = tensor if isinstance(tensor, np.ndarray) else np.asarray(memoryview(tensor))
            except TypeError:
                raise TypeError(
                    f"{name} is a {type(tensor).__name__}: give NumPy arrays, torch tensors or buffers"
                ) from None
            found, shape = tensor.dtype.name, tensor.shape
            if g.dtype not in _NUMPY and tensor.dtype.kind in "ui" and tensor.dtype.itemsize == size:
                found = g.dtype  # NumPy has no name for it
            if write and not tensor.flags.writeable:
                raise ValueError(f"{name} is read-only")
        if found != g.dtype:
            raise ValueError(f"{name} holds {found}, the engine {g.dtype}")
        want = (g.kv_heads, g.head_dim)
        has = shape[-2:] if self._order == "nhd" else (*shape[-3:-2], *shape[-1:])
        if len(shape) not in (3, 4) or has != want:
            inner = f"tokens, {want[0]}" if self._order == "nhd" else f"{want[0]}, tokens"
            raise ValueError(
                f"{name} is of shape {tuple(shape)}; order {self._order!r} is [{inner}, {want[1]}], or paged "
                f"[blocks, {inner.replace('tokens', 'block_tokens')}, {want[1]}]"
            )
        if not _is_torch(tensor):
            return tensor.view(f"u{size}")
        import torch

        bits = tensor.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[size])
        return bits.numpy().view(f"u{size}") if _in_host_memory(bits) else bits

    def _places(self, blocks: ArrayLike | None, slots: ArrayLike | None, places: int) -> NDArray[np.int64]:
        """Slot of each token: `block * block_tokens + offset`, or its place in contiguous tensors."""
        if blocks is not None and slots is not None:
            raise ValueError("give `blocks` or `slots`, not both")
        if blocks is not None and not self._paged:
            raise ValueError("`blocks` are for paged tensors, with blocks in front; these are contiguous")
        if blocks is None and slots is None:
            if self._paged:
                raise ValueError("paged tensors need `blocks` (of the sequence) or `slots` (of each token)")
            if places < self._tokens:
                raise ValueError(f"the tensors have room for {places} tokens, {self._tokens} are asked for")
            return np.arange(self._tokens, dtype=np.int64)
        name, given, each = ("blocks", blocks, self._block) if blocks is not None else ("slots", slots, 1)
        ids = np.asarray(given.cpu() if _is_torch(given) else given)  # type: ignore[union-attr]
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"`{name}` must be one-dimensional integers, not {ids.dtype} of shape {ids.shape}")
        need = -(-self._tokens // each)
        if ids.size < need:
            raise ValueError(f"{ids.size} {name} for {self._tokens} tokens; {need} are needed")
        ids = ids[:need].astype(np.int64)
        limit = places if blocks is not None or not self._paged else places * self._block
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
            bad = int(ids[(ids < 0) | (ids >= limit)][0])
            raise ValueError(f"`{name}` has {bad}, outside [0, {limit})")
        return (ids[:, None] * each + np.arange(each)).reshape(-1)[: self._tokens] if each > 1 else ids

    def _native(
        self, blocks: ArrayLike | None, slots: ArrayLike | None, places: int, gpu: int | None
    ) -> tuple[PagedKV, Any] | None:
        """Pages for the native copy, and the block ids of every whole chunk; None where they do not lie evenly."""
        planes, size = self._planes, self._layout.chunk_tokens
        chunks = self._tokens // size
        even = {(tuple(x.shape), _strides(x)) for row in planes for x in row}
        (_, strides), *others = even
        if not chunks or others or strides[-1] != DTYPE_BYTES[self._layout.dtype] or min(strides) <= 0:
            return None
        heads, token = (-2, -3) if self._order == "nhd" else (-3, -2)
        step = strides[token]
        stride = strides[0]
        if not self._paged and slots is None:
            each, stride, count = size, size * step, places // size
        elif not self._paged:
            each, stride, count = 1, step, places
        elif blocks is not None and size % self._block == 0:
            each, count = self._block, places
        elif stride == self._block * step:
            each, stride, count = 1, step, places * self._block
        else:
            return None
        ids = self._where[: chunks * size : each] // each
        geometry = PageGeometry.strided(
            replace(self._layout, block_tokens=each),
            block_stride=stride,
            token_stride=step,
            head_stride=strides[heads],
        )
        bases = [[_address(row[p]) for row in planes] for p in range(self._layout.planes)]
        if self._stream is None or gpu is None:
            pages = PagedKV(bases, geometry, count, threads=_THREADS, owner=planes)
        else:
            pages = GpuPagedKV(bases, geometry, count, how=How(self._stream, gpu), owner=planes)
        return pages, ids.reshape(chunks, size // each)

    def save(self, room: Reservation) -> None:
        """Tensors -> reserved slots."""
        whole = self._tokens // self._layout.chunk_tokens
        fast = [i for i, position in enumerate(room.positions) if position < whole] if self._fast else []
        if self._fast and fast:
            pages, ids = self._fast
            at = room.addresses[fast] if self._stream is None else room.on_device(self._stream, len(fast))
            pages.gather(ids[[room.positions[i] for i in fast]], at)
        for i in range(len(fast), len(room)):
            self._indexed(room.positions[i], room.view(i), to_slot=True)

    def load(self, lease: Lease) -> None:
        """Leased chunks -> tensors."""
        fast = 0
        if self._fast and lease:
            pages, ids = self._fast
            fast = min(len(lease), len(ids))
            at = lease.addresses[:fast] if self._stream is None else lease.on_device(self._stream, fast)
            pages.scatter(ids[:fast], at)
        for i in range(fast, len(lease)):
            self._indexed(i, lease.view(i), to_slot=False)

    def _indexed(self, chunk: int, view: memoryview, *, to_slot: bool) -> None:
        """One chunk, or a tail: its last token fills the rest of the slot."""
        g, size = self._layout, self._layout.chunk_tokens
        where = self._where[chunk * size : (chunk + 1) * size]
        count = len(where)
        if to_slot:
            where = np.pad(where, (0, size - count), mode="edge")
        slot: Any = np.frombuffer(view, f"u{DTYPE_BYTES[g.dtype]}")
        at: Any = where
        if self._device is not None:
            import torch

            slot = torch.frombuffer(view, dtype=self._planes[0][0].dtype)
            at = torch.from_numpy(where).to(self._device)
        slot = slot.reshape(g.num_layers, g.planes, size, g.kv_heads, g.head_dim)
        index = (at // self._block, at % self._block) if self._paged else (at,)
        for i, p in np.ndindex(g.num_layers, g.planes):
            # Tokens first, whatever the order: an index after a slice moves to the front.
            tensor = self._planes[i][p]
            tokens = tensor if self._order == "nhd" else tensor.swapaxes(-3, -2)
            if to_slot:
                slot[i, p] = tokens[index]
            elif self._device is None:
                tokens[index] = slot[i, p, :count]
            else:
                tokens[index] = slot[i, p, :count].to(self._device)


def _stream(device: Any, gpu: int) -> int | None:
    """torch's stream for this thread; None where the device is not the one with the GPU tier."""
    if device.type != "cuda" or device.index != gpu:
        return None
    import torch

    return int(torch.cuda.current_stream(device).cuda_stream)


def _strides(tensor: Any) -> tuple[int, ...]:
    """In bytes."""
    return tuple(n * tensor.itemsize for n in tensor.stride()) if _is_torch(tensor) else tensor.strides


def _address(tensor: Any) -> int:
    return int(tensor.data_ptr() if _is_torch(tensor) else tensor.ctypes.data)


def _in_host_memory(tensor: Any) -> bool:
    return bool(tensor.device.type == "cpu")


def _is_torch(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] == "torch" or hasattr(thing, "data_ptr")
