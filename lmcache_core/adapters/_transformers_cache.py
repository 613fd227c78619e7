"""Bytes between a pipeline's chunks and the caches of Transformers, for every kind of cache that is supported.

Chunks are `[layer][plane][token][head][dim]`, or `[layer][token][head][K dim + V dim]` where K and V differ in size.
A cache's tensors are `[row, head, column, dim]`; a row's tokens begin after its padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from lmcache_core.adapters._transformers_model import Bypass, Geometry
from lmcache_core.copies import PagedKV, PageGeometry
from lmcache_core.errors import Unsupported
from lmcache_core.gpu import GpuPagedKV, How
from lmcache_core.keys import TokenChain
from lmcache_core.layout import KVLayout
from lmcache_core.mirror import Mirror
from lmcache_core.pipeline import Lease, Reservation


@dataclass(slots=True)
class Row:
    """One sequence of a batch."""

    chain: TokenChain
    pad: int
    """Columns of padding before its first token."""


def new_cache(geometry: Geometry, config: Any, static_tokens: int | None = None) -> Any | Bypass:
    """An empty cache such as `generate` would make, dynamic, or static for that many tokens."""
    if static_tokens is None:
        return DynamicCache(config=config)
    return usable(StaticCache(config=config, max_cache_len=static_tokens), geometry, static_tokens)


def usable(cache: Any, geometry: Geometry, tokens: int) -> Any | Bypass:
    """A caller's own cache, if it is empty and of a kind that can be filled with the beginning of `tokens` tokens."""
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading or len(cache.layers) != geometry.num_layers:
        return Bypass.OWN_CACHE
    kinds = {type(layer) for layer in cache.layers}
    if type(cache) is DynamicCache:
        return cache if kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and not _length(cache) else Bypass.OWN_CACHE
    # A static sliding window holds the last tokens only.
    if kinds != {StaticLayer} or not hasattr(cache.layers[0], "cumulative_length"):
        return Bypass.CACHE_KIND
    return cache if not _length(cache) and cache.layers[0].max_cache_len >= tokens else Bypass.OWN_CACHE


def _length(cache: Any) -> int:
    return int(cache.get_seq_length())


def record(cache: Any) -> None:
    """Let sliding-window layers keep every token, so that all of them can be stored; see `unrecord`."""
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.record_past = True


def unrecord(cache: Any) -> None:
    """Leave sliding-window layers as `generate` would have: with the last tokens."""
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
            layer.keys = layer.keys[:, :, -layer.sliding_window + 1 :]
            layer.values = layer.values[:, :, -layer.sliding_window + 1 :]
            layer.record_past = False


def synchronize(device: torch.device) -> None:
    """Wait for this thread's copies from and to the device: slots may change hands afterwards."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def is_gpu(device: torch.device, number: int) -> bool:
    """Whether it is the CUDA device of that number."""
    return bool(device == torch.device("cuda", number))


def stream_of(device: torch.device) -> int:
    """This thread's stream, as an address."""
    return int(torch.cuda.current_stream(device).cuda_stream)


class Mover:
    """Copies chunks of one model into and out of caches."""

    def __init__(self, geometry: Geometry, layout: KVLayout, mirror: Mirror | None = None) -> None:
        self._geometry = geometry
        self._layout = layout
        self._gpu = None if mirror is None else mirror.device
        """The device of a GPU tier: copies are queued on the stream of the call."""
        here = mirror is not None or geometry.device.type == "cpu"
        self.paged = here and layout.planes == 2
        """Copy straight between slots and tensors; otherwise with torch, a chunk at a time."""

    def fill(self, cache: Any, rows: Sequence[Row], leases: Sequence[Lease], columns: int) -> None:
        """Chunks of each row's lease -> the first `columns` columns of an empty cache. All or nothing."""
        g, size = self._geometry, self._layout.chunk_tokens
        counts = [-(-max(0, columns - row.pad) // size) for row in rows]
        # The last chunk of a row may reach beyond: what is too much is cut off.
        width = max(columns, *(row.pad + count * size for row, count in zip(rows, counts, strict=True)))
        make = torch.zeros if any(row.pad for row in rows) else torch.empty
        planes = [
            [
                make((len(rows), g.kv_heads, width, dim), dtype=g.dtype, device=g.device)
                for dim in (g.head_dim, g.value_dim)
            ]
            for _ in range(g.num_layers)
        ]
        for r, (row, lease, count) in enumerate(zip(rows, leases, counts, strict=True)):
            if self.paged and count:
                at = lease.addresses if self._gpu is None else lease.on_device(stream_of(g.device), count)
                self._pages(planes, r, row.pad, count).scatter(np.arange(count), at[:count])
                continue
            for i in range(count):
                chunk = self._chunk(lease.view(i)).to(g.device, non_blocking=True)
                part = slice(row.pad + i * size, row.pad + (i + 1) * size)
                for pair, (keys, values) in zip(planes, self._split(chunk), strict=True):
                    pair[0][r, :, part].copy_(keys.transpose(0, 1))
                    pair[1][r, :, part].copy_(values.transpose(0, 1))
        if not self.paged:
            synchronize(g.device)
        try:
            self._place(cache, [[plane[:, :, :columns] for plane in pair] for pair in planes], columns)
        except BaseException:
            cache.reset()
            raise

    def _place(self, cache: Any, planes: Sequence[Sequence[torch.Tensor]], columns: int) -> None:
        if isinstance(cache, StaticCache):
            for layer, (keys, values) in zip(cache.layers, planes, strict=True):
                if not layer.is_initialized:
                    layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
                layer.keys[:, :, :columns].copy_(keys)
                layer.values[:, :, :columns].copy_(values)
            for layer in cache.layers:
                layer.cumulative_length.fill_(columns)
            return
        for layer, (keys, values) in zip(cache.layers, planes, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = columns

    def tokens(self, cache: Any, rows: int) -> int:
        """Columns in use. Raise `Unsupported` unless the cache is the one this mover's layout describes."""
        g, length = self._geometry, _length(cache)
        want = {("keys", g.head_dim), ("values", g.value_dim)}
        static = isinstance(cache, StaticCache)
        for layer in cache.layers:
            for name, dim in want:
                tensor = getattr(layer, name)
                width = tensor.shape[2] if static else length
                found = (tuple(tensor.shape), tensor.dtype, tensor.device)
                if found != ((rows, g.kv_heads, width, dim), g.dtype, g.device) or width < length:
                    raise Unsupported(f"`generate` left {name} of {found} for {rows} rows of {length} tokens, not {g}")
        if len(cache.layers) != g.num_layers:
            raise Unsupported(f"`generate` left {len(cache.layers)} layers, not {g.num_layers}")
        return length

    def save(self, cache: Any, r: int, pad: int, room: Reservation) -> None:
        """Columns of row `r`, after its padding -> reserved slots. See `tokens` for what must hold."""
        size = self._layout.chunk_tokens
        if self.paged:
            planes = [[layer.keys.contiguous(), layer.values.contiguous()] for layer in cache.layers]
            at = room.addresses if self._gpu is None else room.on_device(stream_of(self._geometry.device))
            self._pages(planes, r, pad, max(room.positions) + 1).gather(room.positions, at)
            return
        for i, position in enumerate(room.positions):
            part = slice(pad + position * size, pad + (position + 1) * size)
            pairs = [(x.keys[r, :, part], x.values[r, :, part]) for x in cache.layers]
            if self._layout.planes == 2:
                stacked = torch.stack([torch.stack(pair) for pair in pairs]).transpose(2, 3)
            else:
                stacked = torch.stack([torch.cat(pair, dim=-1) for pair in pairs]).transpose(1, 2)
            chunk = self._chunk(room.view(i))
            chunk.copy_(stacked.reshape(chunk.shape), non_blocking=True)
        synchronize(self._geometry.device)

    def _chunk(self, view: memoryview) -> torch.Tensor:
        """A slot's payload as `[layer, plane, token, head, dim]`."""
        g, layout = self._layout, self._layout
        flat = torch.frombuffer(view, dtype=self._geometry.dtype)
        return flat.view(g.num_layers, g.planes, layout.chunk_tokens, g.kv_heads, g.head_dim)

    def _split(self, chunk: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V of each layer, `[token, head, dim]`."""
        if self._layout.planes == 2:
            return [(layer[0], layer[1]) for layer in chunk]
        dim = self._geometry.head_dim
        return [(layer[0, ..., :dim], layer[0, ..., dim:]) for layer in chunk]

    def _pages(self, planes: Sequence[Sequence[torch.Tensor]], r: int, pad: int, blocks: int) -> PagedKV:
        """Row `r` of K and V of every layer, contiguous, as `blocks` pages of one chunk each."""
        _, heads, width, dim = planes[0][0].shape
        start = (r * heads * width + pad) * dim * planes[0][0].itemsize
        bases = [[layer[plane].data_ptr() + start for layer in planes] for plane in range(2)]
        geometry = PageGeometry.sequence(self._layout, width)
        if self._gpu is not None:
            how = How(stream_of(self._geometry.device), self._gpu)
            return GpuPagedKV(bases, geometry, blocks, how=how, owner=planes)
        return PagedKV(bases, geometry, blocks, threads=torch.get_num_threads(), owner=planes)
