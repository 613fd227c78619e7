"""Engine pages <-> slots: the geometry of an engine's paged KV, and batched copies in one GIL-free call.

A page (block) of an engine is described by strides, never guessed from shapes. One plane (K, V, or the whole of an
opaque page) is a nest of loops over runs of contiguous bytes:

    page address = base[plane][layer] + page_offset + block_id * block_stride        + sum_k i_k * page_stride[k]
    slot address = slot + slot_offset + layer * slot_layer_stride
                                      + block_index * slot_block_stride              + sum_k i_k * slot_stride[k]

That is enough for NHD and HND pages, K and V apart or packed together, layer-major or block-major (only the bases
and `block_stride` differ), MLA latents, the contiguous tensors of Transformers, and the packed pages of vLLM's CPU
attention. The slot side is either `KVLayout` order `pages` (opaque) or `lknhd` (canonical).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from lmcache_core import _native
from lmcache_core.layout import DTYPE_BYTES, KVLayout

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

SKIP = -1
"""Block id that `PagedKV.scatter` leaves alone."""


@dataclass(frozen=True, slots=True)
class Dim:
    """One loop: `extent` steps of `page_stride` bytes in the page and `slot_stride` bytes in the slot."""

    extent: int
    page_stride: int
    slot_stride: int


@dataclass(frozen=True, slots=True)
class Plane:
    """What is copied for one base address: `run_bytes` contiguous bytes at every point of `dims`."""

    run_bytes: int
    dims: tuple[Dim, ...] = ()
    page_offset: int = 0
    slot_offset: int = 0


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """Where the bytes of one chunk lie in the engine's pages and in a slot. All sizes and strides in bytes.

    Raise `ValueError` when the planes do not fill a slot's `chunk_bytes` exactly or reach outside it.
    """

    num_layers: int
    blocks: int
    """Engine blocks in one chunk."""
    chunk_bytes: int
    block_stride: int
    """From one block id to the next within a layer."""
    slot_layer_stride: int
    slot_block_stride: int
    planes: tuple[Plane, ...]

    def __post_init__(self) -> None:
        if min(self.num_layers, self.blocks, self.block_stride, len(self.planes)) < 1:
            raise ValueError(f"layers, blocks, block stride and planes must be at least 1: {self}")
        filled = 0
        for plane in self.planes:
            if len(plane.dims) > _native.MAX_DIMS:
                raise ValueError(f"a plane has at most {_native.MAX_DIMS} loops, not {len(plane.dims)}")
            counts = [plane.run_bytes, *(d.extent for d in plane.dims)]
            strides = [0, *(min(d.page_stride, d.slot_stride) for d in plane.dims)]
            if min(counts) < 1 or min(strides) < 0:
                raise ValueError(f"runs and extents must be at least 1 and strides not negative: {plane}")
            last = plane.slot_offset + sum((d.extent - 1) * d.slot_stride for d in plane.dims)
            last += (self.num_layers - 1) * self.slot_layer_stride + (self.blocks - 1) * self.slot_block_stride
            if min(plane.slot_offset, plane.page_offset) < 0 or last + plane.run_bytes > self.chunk_bytes:
                raise ValueError(f"{plane} reaches outside its slot of {self.chunk_bytes} bytes")
            filled += plane.run_bytes * prod(d.extent for d in plane.dims) * self.num_layers * self.blocks
        if filled != self.chunk_bytes:
            raise ValueError(f"the planes hold {filled} bytes but a chunk has {self.chunk_bytes}")

    @classmethod
    def opaque(cls, layout: KVLayout, *, block_stride: int | None = None) -> PageGeometry:
        """Pages as they are (`order="pages"`): `layout.block_bytes` contiguous bytes per block and layer.

        `block_stride` defaults to `block_bytes` (layer-major); block-major engines pass the distance between blocks.
        """
        _need(layout, "pages")
        return cls(
            num_layers=layout.num_layers,
            blocks=layout.blocks,
            chunk_bytes=layout.chunk_bytes,
            block_stride=layout.block_bytes if block_stride is None else block_stride,
            slot_layer_stride=layout.blocks * layout.block_bytes,
            slot_block_stride=layout.block_bytes,
            planes=(Plane(layout.block_bytes),),
        )

    @classmethod
    def strided(
        cls,
        layout: KVLayout,
        *,
        block_stride: int,
        token_stride: int,
        head_stride: int,
        plane_offsets: Sequence[int] | None = None,
    ) -> PageGeometry:
        """Pages addressed by (block, token, head) with contiguous heads, into canonical slots (`order="lknhd"`).

        `plane_offsets` is where each plane starts after its base address: zero by default, for K and V in tensors of
        their own; `(0, head_dim * itemsize)` when they are packed side by side.
        """
        _need(layout, "lknhd")
        head, token, plane = _slot_strides(layout)
        dims = (
            Dim(layout.block_tokens, token_stride, token),
            Dim(layout.kv_heads, head_stride, head),
        )
        offsets = plane_offsets if plane_offsets is not None else (0,) * layout.planes
        if len(offsets) != layout.planes:
            raise ValueError(f"{len(offsets)} plane offsets for {layout.planes} planes")
        return cls._canonical(
            layout, block_stride, [Plane(head, dims, offset, i * plane) for i, offset in enumerate(offsets)]
        )

    @classmethod
    def nhd(cls, layout: KVLayout, *, packed: bool = False, block_stride: int | None = None) -> PageGeometry:
        """Blocks of `[token, head, dim]`; `packed`: K and V side by side, `[token, head, 2 * dim]`.

        MLA latents (`planes=1`) are this with one head.
        """
        head, fused = _head_bytes(layout, packed)
        token = layout.kv_heads * fused
        return cls.strided(
            layout,
            block_stride=layout.block_tokens * token if block_stride is None else block_stride,
            token_stride=token,
            head_stride=fused,
            plane_offsets=(0, head) if packed else None,
        )

    @classmethod
    def hnd(cls, layout: KVLayout, *, packed: bool = False, block_stride: int | None = None) -> PageGeometry:
        """Blocks of `[head, token, dim]`; `packed`: K and V side by side, `[head, token, 2 * dim]`."""
        head, fused = _head_bytes(layout, packed)
        heads = layout.block_tokens * fused
        return cls.strided(
            layout,
            block_stride=layout.kv_heads * heads if block_stride is None else block_stride,
            token_stride=fused,
            head_stride=heads,
            plane_offsets=(0, head) if packed else None,
        )

    @classmethod
    def sequence(cls, layout: KVLayout, length: int) -> PageGeometry:
        """Contiguous `[head, length, dim]` tensors of one sequence; block id i is tokens [i, i + 1) * chunk_tokens.

        The layout has no blocks of its own: `block_tokens == chunk_tokens`. A tensor of `length` tokens has
        `length // chunk_tokens` such blocks.
        """
        if layout.block_tokens != layout.chunk_tokens:
            raise ValueError(f"a sequence has no blocks: block_tokens must be chunk_tokens, {layout.chunk_tokens}")
        head, _ = _head_bytes(layout, packed=False)
        return cls.strided(
            layout,
            block_stride=layout.chunk_tokens * head,
            token_stride=head,
            head_stride=length * head,
        )

    @classmethod
    def vllm_cpu(cls, layout: KVLayout, isa: str, *, block_stride: int | None = None) -> PageGeometry:
        """Pages of vLLM's CPU attention, `[head][K, V][block_tokens * head_dim]`, de-packed into canonical slots.

        `isa` is vLLM's name of the packing; found by running its `cpu_attn_reshape_and_cache` (vLLM 0.32) on
        numbered tokens and dims:

        * `vec`, `vec16`: K is `[dim][token]`, V is `[token][dim]`;
        * `amx` (2-byte elements): K is `[token / 16][dim / 2][16 tokens][2 dims]`,
          V is `[dim / 16][token / 2][16 dims][2 tokens]`.

        Raise `ValueError` for any other packing.
        """
        _need(layout, "lknhd")
        if layout.planes != 2:
            raise ValueError("vLLM's CPU attention has K and V: planes must be 2")
        item = DTYPE_BYTES[layout.dtype]
        tokens, dims = layout.block_tokens, layout.head_dim
        head, token, plane = _slot_strides(layout)
        half = tokens * head
        heads = Dim(layout.kv_heads, 2 * half, head)
        if isa in ("vec", "vec16"):
            k = Plane(item, (heads, Dim(tokens, item, token), Dim(dims, tokens * item, item)))
            v = Plane(head, (heads, Dim(tokens, head, token)), half, plane)
        elif isa == "amx" and item == 2 and tokens % 16 == 0 and dims % 16 == 0:
            tile = 32 * item
            k_dims = (
                Dim(tokens // 16, 16 * head, 16 * token),
                Dim(16, 2 * item, token),
                Dim(dims // 2, tile, 2 * item),
            )
            v_tokens = (Dim(tokens // 2, tile, 2 * token), Dim(2, item, token))
            v_dims = (Dim(dims // 16, tokens * 16 * item, 16 * item), Dim(16, 2 * item, item))
            k = Plane(2 * item, (heads, *k_dims))
            v = Plane(item, (heads, *v_tokens, *v_dims), half, plane)
        else:
            raise ValueError(
                f"no known packing {isa!r} of {layout.dtype} blocks of {tokens} tokens and {dims} dims; "
                "known: vec, vec16, and amx for 2-byte elements in multiples of 16"
            )
        return cls._canonical(layout, 2 * half * layout.kv_heads if block_stride is None else block_stride, [k, v])

    @classmethod
    def _canonical(cls, layout: KVLayout, block_stride: int, planes: list[Plane]) -> PageGeometry:
        _, token, plane = _slot_strides(layout)
        return cls(
            num_layers=layout.num_layers,
            blocks=layout.blocks,
            chunk_bytes=layout.chunk_bytes,
            block_stride=block_stride,
            slot_layer_stride=layout.planes * plane,
            slot_block_stride=layout.block_tokens * token,
            planes=tuple(planes),
        )


def _need(layout: KVLayout, order: str) -> None:
    if layout.order != order:
        raise ValueError(f"this geometry fills slots of order {order!r}, the layout says {layout.order!r}")


def _slot_strides(layout: KVLayout) -> tuple[int, int, int]:
    """Bytes of one head, one token and one plane in a canonical slot."""
    head = layout.head_dim * DTYPE_BYTES[layout.dtype]
    token = layout.kv_heads * head
    return head, token, layout.chunk_tokens * token


def _head_bytes(layout: KVLayout, packed: bool) -> tuple[int, int]:
    """Bytes of one head of one plane, and of what lies between one head and the next."""
    if packed and layout.planes != 2:
        raise ValueError("only K and V can be packed side by side: planes must be 2")
    head = layout.head_dim * DTYPE_BYTES[layout.dtype]
    return head, 2 * head if packed else head


class PagedKV:
    """The pages of one engine: base addresses, a geometry, and how many blocks lie behind each base.

    `bases` are byte addresses of block 0: `[num_layers]` where all planes share a tensor, or `[planes, num_layers]`.
    Whoever makes this vouches that `num_blocks` blocks of that geometry are there, on this host, for as long as it is
    used; `owner` keeps them alive. Copies run without the GIL, on `threads` threads when the batch is worth it.
    """

    def __init__(
        self, bases: ArrayLike, geometry: PageGeometry, num_blocks: int, *, threads: int = 1, owner: Any = None
    ) -> None:
        planes, layers = len(geometry.planes), geometry.num_layers
        given = np.asarray(bases, dtype=np.int64)
        if given.shape not in ((layers,), (planes, layers)):
            raise ValueError(f"bases must be of shape ({layers},) or ({planes}, {layers}), not {given.shape}")
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, not {num_blocks}")
        offsets = np.array([plane.page_offset for plane in geometry.planes], dtype=np.int64)
        self.geometry = geometry
        self.num_blocks = num_blocks
        self.threads = threads
        self._bases: NDArray[np.int64] = np.ascontiguousarray(given + offsets[:, None])
        self._owner = owner
        self._parts = (_native.Part * planes)()
        for part, plane, base in zip(self._parts, geometry.planes, self._bases, strict=True):
            part.bases = _native.address_of(base)
            part.block_stride = geometry.block_stride
            part.slot_offset = plane.slot_offset
            part.slot_layer_stride = geometry.slot_layer_stride
            part.slot_block_stride = geometry.slot_block_stride
            part.run_bytes = plane.run_bytes
            part.ndims = len(plane.dims)
            for i, dim in enumerate(plane.dims):
                part.extents[i], part.page_strides[i], part.slot_strides[i] = (
                    dim.extent,
                    dim.page_stride,
                    dim.slot_stride,
                )

    def gather(self, block_ids: ArrayLike, slot_addresses: ArrayLike) -> None:
        """Copy chunks from the engine's pages into slots.

        `block_ids`: int `[chunks, blocks]` (or flat); `slot_addresses`: int `[chunks]`, each `chunk_bytes` long.
        Raise `ValueError` for a block id outside [0, num_blocks), before anything is copied.
        """
        self._copy(block_ids, slot_addresses, to_slots=True)

    def scatter(self, block_ids: ArrayLike, slot_addresses: ArrayLike) -> None:
        """Copy chunks from slots into the engine's pages; blocks with id `SKIP` are left alone. See `gather`."""
        self._copy(block_ids, slot_addresses, to_slots=False)

    def _copy(self, block_ids: ArrayLike, slot_addresses: ArrayLike, *, to_slots: bool) -> None:
        ids, slots = self._batch(block_ids, slot_addresses)
        if _native.available():
            result = _native.copy_pages(
                self._parts,
                self.geometry.num_layers,
                self.num_blocks,
                ids,
                slots,
                to_slots=to_slots,
                skip_negative=not to_slots,
                threads=self.threads,
            )
            if result < 0:
                raise ValueError(f"the native library refuses this geometry: {self.geometry}")
            self._refuse(result - 1, ids)
        else:
            wrong = (ids < (0 if to_slots else SKIP)) | (ids >= self.num_blocks)
            self._refuse(int(wrong.argmax()) if wrong.any() else -1, ids)
            copy_reference(self.geometry, self._bases, ids, slots, to_slots=to_slots)

    def _batch(self, block_ids: ArrayLike, slot_addresses: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Block ids `[chunks, blocks]` and slot addresses `[chunks]`, of the right kind and shape."""
        blocks = self.geometry.blocks
        slots = _integers(slot_addresses, "slot addresses")
        ids = _integers(block_ids, "block ids")
        if slots.ndim != 1 or ids.size != slots.size * blocks or ids.shape not in ((ids.size,), (slots.size, blocks)):
            raise ValueError(
                f"{blocks} block ids are needed for each chunk, got ids of shape {ids.shape} for slots {slots.shape}"
            )
        return ids.reshape(slots.size, blocks), slots

    def _refuse(self, bad: int, ids: NDArray[np.int64]) -> None:
        """Raise for the block id at flat index `bad`, if that is not negative."""
        if bad >= 0:
            blocks = self.geometry.blocks
            raise ValueError(
                f"block id {ids.flat[bad]} (chunk {bad // blocks}, block {bad % blocks}) is outside "
                f"[0, {self.num_blocks})"
            )


def copy_reference(
    geometry: PageGeometry,
    bases: NDArray[np.int64],
    block_ids: NDArray[np.int64],
    slots: NDArray[np.int64],
    *,
    to_slots: bool,
) -> None:
    """The copy in plain NumPy, straight from the definition: the fallback, and the oracle of the tests.

    `bases` `[planes, num_layers]` with page offsets added; `block_ids` `[chunks, blocks]`, checked by the caller.
    """
    for chunk, (p, plane), layer in product(range(slots.size), enumerate(geometry.planes), range(geometry.num_layers)):
        in_slot = int(slots[chunk]) + plane.slot_offset + layer * geometry.slot_layer_stride
        for index, block in enumerate(block_ids[chunk]):
            if block == SKIP:
                continue
            page = _strided(int(bases[p, layer]) + int(block) * geometry.block_stride, plane, "page_stride")
            slot = _strided(in_slot + index * geometry.slot_block_stride, plane, "slot_stride")
            if to_slots:
                slot[...] = page
            else:
                page[...] = slot


def _strided(address: int, plane: Plane, side: str) -> NDArray[Any]:
    """One plane at `address` as an array of shape `[*extents, units]`; a unit is an element, or one byte."""
    unit = plane.run_bytes if plane.run_bytes in (2, 4, 8) else 1
    start = np.frombuffer(_native.view_at(address, unit), f"u{unit}")
    shape = (*(dim.extent for dim in plane.dims), plane.run_bytes // unit)
    return as_strided(start, shape, (*(getattr(dim, side) for dim in plane.dims), unit))


def _integers(values: ArrayLike, what: str) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{what} must be integers, not {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)
