"""SGLang's host pools: where the bytes of a page lie, and copies between pages and slots. Nothing here imports SGLang.

Pools of plain attention, K and V or MLA latents, are copied into canonical chunks `[layer][plane][token][head][dim]`
whatever their layout, so that engines with different `--hicache-mem-layout` share what they store. The order of a
pool's axes is its layout's name; lengths and strides are the tensor's own, and every length is checked. Other pools
(Mamba states, indexers, K and V of unequal width) are copied piece by piece as `get_page_buffer_meta` points to them.

The facts are those of SGLang 0.5.23, `sglang/srt/mem_cache/pool_host/{mha,mla,base}.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcache_core import _native
from lmcache_core.copies import Dim, PagedKV, PageGeometry, Plane
from lmcache_core.errors import Unsupported
from lmcache_core.layout import DTYPE_BYTES, KVLayout

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE_FORMAT = 1
"""Version of the `packing` string of pools that are copied as they are. Raise it when the string's meaning changes."""

AXES: dict[str, dict[str, str]] = {
    "MHATokenToKVPoolHost": {
        "layer_first": "plane layer slot head dim",
        "page_first": "plane slot layer head dim",
        "page_first_direct": "plane page layer token head dim",
        "page_head": "plane page head token layer dim",
    },
    "MLATokenToKVPoolHost": {
        "layer_first": "layer slot head dim",
        "page_first": "slot layer head dim",
        "page_first_direct": "page layer token head dim",
    },
}
"""Axes of `kv_buffer` by class of the pool and name of the layout. A slot is a token's place in the whole pool."""

CANONICAL = ("layer", "plane", "token", "head")
"""Order of a chunk's axes before `dim`."""


def describe(pool: Any, name: str) -> StridedPages | PointerPages:
    """The pages of the pool that SGLang calls `name`. Raise `Unsupported` for any doubt about their meaning."""
    if getattr(pool, "dcp_size", 1) != 1:
        raise Unsupported(f"pool {name}: decode context parallel engines are not supported")
    axes = AXES.get(type(pool).__name__, {}).get(pool.layout)
    if axes is None:
        return PointerPages(pool, name)
    pages = StridedPages(pool, axes.split())
    pages.prove(pool)
    return pages


class StridedPages:
    """Pages of a plain K and V or MLA pool, as canonical chunks."""

    def __init__(self, pool: Any, axes: Sequence[str]) -> None:
        buffer, self.tokens = pool.kv_buffer, int(pool.page_size)
        latent = "plane" not in axes
        dtype = str(buffer.dtype).removeprefix("torch.")
        if dtype not in DTYPE_BYTES or buffer.device.type != "cpu":
            raise Unsupported(f"a host pool of {dtype} on {buffer.device} is not supported")
        heads, dim = (1, int(pool.kv_cache_dim)) if latent else (int(pool.head_num), int(pool.head_dim))
        lengths = {
            "plane": 1 if latent else 2,
            "layer": int(pool.layer_num),
            "slot": int(pool.size),
            "page": int(pool.size) // self.tokens,
            "token": self.tokens,
            "head": heads,
            "dim": dim,
        }
        expected = tuple(lengths[axis] for axis in axes)
        if tuple(buffer.shape) != expected or pool.size % self.tokens:
            raise Unsupported(
                f"a {type(pool).__name__} of layout {pool.layout} is of shape {tuple(buffer.shape)}, not {expected} "
                f"({', '.join(axes)})"
            )
        item = buffer.element_size()
        stride = {axis: step * item for axis, step in zip(axes, buffer.stride(), strict=True)}
        if stride["dim"] != item:
            raise Unsupported(f"the elements of a head are {stride['dim']} bytes apart, expected {item}")
        stride.setdefault("token", stride.get("slot", 0))
        stride.setdefault("page", stride["token"] * self.tokens)
        stride.setdefault("plane", 0)
        self.layout = KVLayout(
            "lknhd", dtype, lengths["layer"], lengths["plane"], heads, dim, self.tokens, block_tokens=self.tokens
        )
        self._shape: dict[str, int] = {axis: lengths[axis] for axis in CANONICAL} | {"bytes": dim * item}
        self._flat_axes = [{"slot": "token"}.get(axis, axis) for axis in axes[:-1] if axis != "page"]
        self._copier = PagedKV(
            [
                [buffer.data_ptr() + plane * stride["plane"] + layer * stride["layer"] for layer in range(self._layers)]
                for plane in range(lengths["plane"])
            ],
            self._geometry(stride),
            lengths["page"],
            owner=buffer,
        )

    @property
    def _layers(self) -> int:
        return self._shape["layer"]

    def _geometry(self, stride: dict[str, int]) -> PageGeometry:
        run = self._shape["bytes"]
        plane = self._shape["head"] * self.tokens * run
        dims = [
            Dim(self.tokens, stride["token"], self._shape["head"] * run),
            Dim(self._shape["head"], stride["head"], run),
        ]
        # What is one piece on both sides is one run.
        while dims and dims[-1].page_stride == dims[-1].slot_stride == run:
            run *= dims.pop().extent
        return PageGeometry(
            num_layers=self._layers,
            blocks=1,
            chunk_bytes=self.layout.chunk_bytes,
            block_stride=stride["page"],
            slot_layer_stride=self._shape["plane"] * plane,
            slot_block_stride=self.layout.chunk_bytes,
            planes=tuple(Plane(run, tuple(dims), 0, i * plane) for i in range(self._shape["plane"])),
        )

    def gather(self, indices: Any, addresses: NDArray[np.int64]) -> None:
        self._copier.gather(_page_numbers(indices, self.tokens), addresses)

    def scatter(self, indices: Any, addresses: NDArray[np.int64]) -> None:
        self._copier.scatter(_page_numbers(indices, self.tokens), addresses)

    def to_flat(self, chunk: memoryview, flat: Any) -> None:
        """A chunk into a flat page, a tensor in the order of the pool's `get_data_page(index, flat=True)`."""
        self._as_chunk(_bytes_of(flat))[...] = self._canonical(chunk)

    def from_flat(self, flat: Any, chunk: memoryview) -> None:
        """The same in the other direction."""
        self._canonical(chunk)[...] = self._as_chunk(_bytes_of(flat))

    def _canonical(self, chunk: memoryview) -> NDArray[np.uint8]:
        return np.frombuffer(chunk, np.uint8).reshape([self._shape[axis] for axis in (*CANONICAL, "bytes")])

    def _as_chunk(self, flat: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A flat page, looked at in the order of a chunk."""
        axes = self._flat_axes if "plane" in self._flat_axes else ["plane", *self._flat_axes]
        page = flat.reshape([self._shape[axis] for axis in (*axes, "bytes")])
        return page.transpose([*(axes.index(axis) for axis in CANONICAL), len(axes)])

    def prove(self, pool: Any) -> None:
        """Copy a pattern into the last page and compare it with what SGLang's own code finds there.

        Called before the engine serves; the page gets its bytes back. Raise `Unsupported` when a byte differs.
        """
        last = int(pool.size) - self.tokens
        indices = np.arange(last, last + self.tokens)
        slot = np.random.default_rng(0).integers(0, 256, self.layout.chunk_bytes, dtype=np.uint8)
        pattern, address = slot.copy(), np.array([slot.ctypes.data], dtype=np.int64)
        page = pool.get_data_page(last, flat=False)
        before = page.clone()
        try:
            self.scatter(indices, address)
            expected = np.empty_like(slot)
            self._as_chunk(expected)[...] = self._canonical(slot.data)
            flat = pool.get_data_page(last, flat=True)
            same = np.array_equal(_bytes_of(flat), expected)
            slot[:] = 0
            self.gather(indices, address)
            same = same and np.array_equal(slot, pattern)
        finally:
            page.copy_(before)
        if not same:
            raise Unsupported(
                f"copying a page of layout {pool.layout} did not give the bytes that SGLang finds there: not known"
            )


class DevicePages:
    """Pages of the engine's own K and V, `[slot, head, dim]` for each layer, on any device, as canonical chunks."""

    def __init__(self, pool: Any, page_size: int) -> None:
        self._planes = [list(pool.k_buffer), list(pool.v_buffer)]
        first = self._planes[0][0]
        dtype = str(first.dtype).removeprefix("torch.")
        strange = [
            tuple(tensor.shape)
            for tensor in (*self._planes[0], *self._planes[1])
            if tensor.shape != first.shape or tensor.dtype != first.dtype or not tensor.is_contiguous()
        ]
        if strange or first.ndim != 3 or len(self._planes[0]) != len(self._planes[1]) or dtype not in DTYPE_BYTES:
            raise Unsupported(f"KV of shapes {strange or tuple(first.shape)} and {dtype} is not [slot, head, dim]")
        if getattr(pool, "kv_cache_layout", "nhd") != "nhd":
            raise Unsupported(f"KV of layout {pool.kv_cache_layout} is not supported")
        slots, heads, dim = first.shape
        self.tokens = page_size
        layers = len(self._planes[0])
        self.layout = KVLayout("lknhd", dtype, layers, 2, heads, dim, page_size, block_tokens=page_size)
        self._copier: PagedKV | None = None
        if first.device.type == "cpu":
            bases = [[tensor.data_ptr() for tensor in plane] for plane in self._planes]
            self._copier = PagedKV(bases, PageGeometry.nhd(self.layout), slots // page_size, owner=self._planes)

    def gather(self, indices: Any, addresses: NDArray[np.int64]) -> None:
        if self._copier is not None:
            self._copier.gather(_page_numbers(indices.cpu(), self.tokens), addresses)
            return
        import torch

        stacked = torch.stack([torch.stack([layer[indices] for layer in plane]) for plane in self._planes])
        # [plane, layer, page, token, head, dim] -> [page, layer, plane, token, head, dim]
        chunks = stacked.unflatten(2, (-1, self.tokens)).transpose(0, 2).contiguous().cpu()
        for chunk, address in zip(chunks, addresses.tolist(), strict=True):
            np.copyto(_at(address, self.layout.chunk_bytes), _bytes_of(chunk))

    def scatter(self, indices: Any, addresses: NDArray[np.int64]) -> None:
        if self._copier is not None:
            self._copier.scatter(_page_numbers(indices.cpu(), self.tokens), addresses)
            return
        import torch

        first = self._planes[0][0]
        shape = (len(self._planes[0]), 2, self.tokens, *first.shape[1:])
        chunks = torch.empty((len(addresses), *shape), dtype=first.dtype)
        for chunk, address in zip(chunks, addresses.tolist(), strict=True):
            np.copyto(_bytes_of(chunk), _at(address, self.layout.chunk_bytes))
        # The copy waits for its end, so that slots may change hands afterwards.
        stacked = chunks.to(first.device).transpose(0, 2).flatten(2, 3)
        for plane, layers in zip(self._planes, stacked, strict=True):
            for tensor, layer in zip(plane, layers, strict=True):
                tensor.index_copy_(0, indices.to(first.device), layer)


class PointerPages:
    """Pages of any other pool, as the pieces that SGLang points to, one after the other."""

    def __init__(self, pool: Any, name: str) -> None:
        self.tokens = int(getattr(pool, "page_size", 1) or 1)
        self._pool = pool
        kind = type(pool).__name__
        try:
            _, sizes = pool.get_page_buffer_meta(_first_page(self.tokens))
        except (AssertionError, AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise Unsupported(f"pool {name}, a {kind} of layout {pool.layout}, does not point to its pages") from error
        self._sizes = [int(size) for size in sizes]
        if not self._sizes or min(self._sizes) < 1:
            raise Unsupported(f"pool {name}, a {kind}, has pages of no bytes: {self._sizes}")
        # All that decides what the pieces mean, as far as the pool can tell.
        facts = [str(getattr(pool, fact, "")) for fact in ("dtype", "layer_num", "start_layer", "storage_format_tag")]
        digest = hashlib.sha256(repr((facts, self._sizes)).encode()).hexdigest()[:16]
        self.layout = KVLayout(
            "pages", "uint8", 1, 1, 1, 1, self.tokens, block_tokens=self.tokens,
            packing=f"sglang/{PAGE_FORMAT}/{name}/{kind}/{pool.layout}/{digest}", page_bytes=sum(self._sizes),
        )  # fmt: skip

    def gather(self, indices: Any, addresses: NDArray[np.int64]) -> None:
        for slot, piece in self._pairs(indices, addresses):
            np.copyto(slot, piece)

    def scatter(self, indices: Any, addresses: NDArray[np.int64]) -> None:
        for slot, piece in self._pairs(indices, addresses):
            np.copyto(piece, slot)

    def _pairs(
        self, indices: Any, addresses: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """Each piece of each page and its place in a slot."""
        pointers, sizes = self._pool.get_page_buffer_meta(indices)
        if list(sizes) != self._sizes * len(addresses):
            raise ValueError(f"pages of {self._sizes} bytes were promised, SGLang points to {sizes}")
        found = iter(pointers)
        for address in addresses.tolist():
            for size in self._sizes:
                yield _at(address, size), _at(int(next(found)), size)
                address += size


def _page_numbers(indices: Any, tokens: int) -> NDArray[np.int64]:
    """Pages by the places of their tokens. Raise `ValueError` for tokens that are not whole pages."""
    slots = np.asarray(indices, dtype=np.int64).reshape(-1, tokens)
    pages = slots[:, 0] // tokens
    if (pages < 0).any() or ((pages * tokens)[:, None] + np.arange(tokens) != slots).any():
        raise ValueError(f"the indices are not whole pages of {tokens} tokens")
    return pages


def _at(address: int, nbytes: int) -> NDArray[np.uint8]:
    return np.frombuffer(_native.view_at(address, nbytes), np.uint8)


def _first_page(tokens: int) -> Any:
    import torch

    return torch.arange(tokens, dtype=torch.int64)


def _bytes_of(flat: Any) -> NDArray[np.uint8]:
    """A flat page's bytes, neither copied nor kept alive. Raise `ValueError` unless they are one run of host memory."""
    if flat.device.type != "cpu" or not flat.is_contiguous():
        raise ValueError("a flat page must be contiguous and in host memory")
    return _at(flat.data_ptr(), flat.numel() * flat.element_size())
